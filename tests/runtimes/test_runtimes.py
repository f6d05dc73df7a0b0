"""Networks in the runtimes that ship, for real; `nox -s runtimes` installs them."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from selab.bench.backends import backend
from selab.bench.latency import measure_phase, networks
from selab.bench.sampler import Plan
from selab.deploy.spelling import SPELLINGS
from selab.deploy.target import REGISTRY, target
from selab.errors import DeviceError, ModelError, SpecError
from selab.experiments.exporting import export, outputs, settled, variant_of, write_network
from selab.experiments.job import Request, resolve
from selab.experiments.tax import Tax, TaxRequest, implementations_in
from selab.experiments.tax_record import AGAIN, BASELINE, read_tax_record, save_tax_record
from selab.experiments.workers import build_pair
from selab.models.build import build
from selab.models.catalog import find
from selab.report.tax import tax_tables

PACKAGES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
    "litert": "litert_torch",
    # fp32 needs torch alone, but compiling takes minutes: it is tested where the session of the runtimes is.
    "aoti": "torchao",
}
INT8 = {**PACKAGES, "openvino": "nncf"}
PLAN = Plan(warmup_least_s=0.0, warmup_most_s=0.05, sample_s=1e-4, budget_s=0.05)
pytestmark = pytest.mark.filterwarnings("ignore")


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; nox -s runtimes installs it")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name == "aoti" else ()) for name in REGISTRY])
def runtime(request):
    needs(PACKAGES[request.param])
    return request.param


def job_of(runtime, **changes):
    return resolve(Request(**{"arch": "se_small_cnn", "runtime": runtime, "phases": ("forward",), **changes}))


@pytest.fixture(scope="module")
def model():
    noise = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    return settled(build(find("se_small_cnn")).model, noise)


def inputs(batch, number=3):
    return [torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(50 + one)) for one in range(number)]


def closeness(model, found, given):
    with torch.no_grad():
        expected = [model(one) for one in given]
    return max(float((one - two).abs().max() / one.abs().max()) for one, two in zip(expected, found, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_it_computes_what_the_network_computes(runtime, model, tmp_path, batch):
    job, to = job_of(runtime, batch=batch), target(runtime)
    write_network(model, to, job.workload, tmp_path / f"a{to.suffix}", name="net")
    given = inputs(batch)
    assert closeness(model, outputs(tmp_path / f"a{to.suffix}", job.workload, given), given) < 1e-4


@pytest.mark.parametrize("spelling", [name for name, one in SPELLINGS.items() if not one.gate])
def test_every_spelling_computes_the_same(runtime, model, tmp_path, spelling):
    if runtime == "aoti" and spelling != "mean-linear":
        pytest.skip("compiling takes long, and a spelling says nothing of its own there")
    job, to = job_of(runtime, spelling=spelling), target(runtime)
    written = write_network(model, to, job.workload, tmp_path / f"a{to.suffix}", name="net")
    assert (written.spelling, len(written.respelled)) == (spelling, 4)
    given = inputs(1)
    assert closeness(model, outputs(written.path, job.workload, given), given) < 1e-4


@pytest.mark.parametrize("float_blocks", [False, True])
def test_int8_is_close_and_not_equal(runtime, model, tmp_path, float_blocks):
    needs(INT8[runtime])
    job, to = job_of(runtime, dtype="int8", float_blocks=float_blocks), target(runtime)
    path = tmp_path / f"a{to.suffix}"
    write_network(model, to, job.workload, path, name="net", images=inputs(1, 16))
    given = inputs(1)
    assert 1e-5 < closeness(model, outputs(path, job.workload, given), given) < 0.3
    if runtime == "litert":
        kinds = target(runtime).partitions(path).operators
        # Each of the four blocks takes its map out of int8 and puts it back.
        assert (kinds["DEQUANTIZE"], kinds["QUANTIZE"]) == ((5, 5) if float_blocks else (1, 1))


def test_what_its_compiler_makes_of_it(runtime, tmp_path):
    if runtime == "aoti":
        pytest.skip("one piece of compiled code")
    job, to = job_of(runtime), target(runtime)
    done = export(job, tmp_path / f"a{to.suffix}", weights=None, report=lambda *_: None)
    facts = done.exported
    found = facts.with_blocks.partitions
    assert sum(found.operators.values()) > 0
    if runtime in ("executorch", "litert"):
        assert (found.subgraphs, found.outside) == (1, {})
    else:
        # Whether a block costs changes of layout depends on the kernels, and so on the processor.
        assert found.reorders >= facts.without_blocks.partitions.reorders
    assert facts.with_blocks.bytes > facts.without_blocks.bytes > 4_900_000
    assert facts.agreement.max_relative < 1e-4
    assert facts.agreement.same_top_1 == 1
    assert (facts.blocks, facts.spelling) == (4, to.spelling.name)


def test_it_is_measured_like_any_other(runtime, tmp_path):
    job, to = job_of(runtime), target(runtime)
    pair = [
        write_network(one.model, to, job.workload, tmp_path / f"{place}{to.suffix}", name="net")
        for place, one in enumerate(build_pair(job))
    ]
    files = [build(variant_of(one.path, job.workload), input_chw=(3, 32, 32)).model for one in pair]
    with networks(files[1], files[0], job.workload) as nets:
        raw = measure_phase(nets, "forward", PLAN)["wall"]
    assert len(raw.run.quads) >= 1
    assert all(time > 0 for quad in raw.run.quads for time in quad.floor)


def test_another_runtimes_network_is_refused(runtime):
    if runtime == "onnxruntime":
        pytest.skip("it takes ONNX networks")
    job = job_of(runtime)
    with pytest.raises(ModelError, match="is no network that was exported for it"):
        backend(runtime).prepare(nn.Identity(), job.workload, seed=0)


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"dtype": "bf16"}, {"compiled": True}])
def test_what_no_such_runtime_has(runtime, changes):
    # A type is refused with the request, the rest where the runtime is asked for it.
    with pytest.raises((DeviceError, SpecError), match=f"runtime {runtime} has it not"):
        backend(runtime).prepare(nn.Identity(), job_of(runtime, **changes).workload, seed=0)


@pytest.mark.slow
def test_a_tax_of_spellings(runtime, tmp_path, quick_plans):
    names = ("pool-conv", "mean-linear") if runtime != "aoti" else ("mean-linear",)
    asked = TaxRequest(request=job_of(runtime, quick=True).request, implementations=names)
    assert set(names) <= set(implementations_in(runtime))
    tax = Tax(asked)
    record = tax.run(lambda *_: None)
    found = [(pair.baseline, pair.variant) for pair in record.pairs]
    assert found == [(BASELINE, AGAIN), *((BASELINE, name) for name in names)]
    assert not any(pair.latency.error for pair in record.pairs)
    path = tax.path(tmp_path)
    save_tax_record(record, path)
    (table,) = tax_tables(read_tax_record(path))
    assert f"Spelling to use in {runtime}: " in " ".join(table.notes)


def test_the_threads_are_the_workloads(runtime, model, tmp_path):
    """Two threads are as right as one."""
    job, to = job_of(runtime, threads=2), target(runtime)
    write_network(model, to, job.workload, tmp_path / f"a{to.suffix}", name="net")
    given = inputs(1)
    found = outputs(tmp_path / f"a{to.suffix}", job.workload, given)
    assert closeness(model, found, given) < 1e-4
    assert all(np.isfinite(one.numpy()).all() for one in found)
