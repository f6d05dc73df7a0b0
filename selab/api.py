"""The public functions of selab, for scripts and notebooks."""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import torch
from torch import nn

from selab.attention.config import Init
from selab.cost.count import count as count_module
from selab.errors import ModelError, RecordError
from selab.experiments.job import Request, resolve, with_inputs
from selab.experiments.pair import Fed, measure_pair, plan_for
from selab.experiments.profiling import Profile
from selab.meta import Example, On
from selab.models import catalog, external
from selab.models.build import Built
from selab.models.build import build as build_variant
from selab.models.inputs import Input, main_input
from selab.records.bounds import MOST_IMAGES, MOST_SEED, MOST_THREADS
from selab.records.types import PHASES, Cost, Device, Dtype, Latency, MemoryFormat, Phase, Record, Workload
from selab.report.results import RecordChanges, RecordResult, read_any


def build(name: str, *, seed: int = 0, se: str | None = None, init: Init | None = None, on: On = "fake") -> nn.Module:
    """Build a network by its name, in train mode, with random weights.

    Args:
        name: what `--arch` takes: a name of the catalog (`selab archs`), `timm:NAME`, `torchvision:NAME`,
            `path/to/family.toml:VARIANT`, `path/to/file.py:callable` or `package.module:callable`.
        seed: of the weights. A variant and its baseline of one seed share the values of all common layers.
        se: attention blocks to insert or change, as `--se`: `reduction=8,stages=2-4`.
        init: how the blocks start, `he` or `identity`; None for what the configuration says.
        on: as in `insert_se`: `cpu` where the values of tensors decide what the network computes.

    Raises:
        UnknownNameError: no such network; the message lists the nearest names.
        SpecError: a file is malformed, or its builder fails.
        InsertionError: a block cannot be inserted at its site.

    Examples:
        >>> import selab
        >>> net = selab.build("se_small_cnn", se="reduction=8")
        >>> sum(isinstance(module, selab.SqueezeExcitation) for module in net.modules())
        4
    """
    _check_choice("selab.build", "on", on, get_args(On))
    return _built(name, seed=seed, se=se, init=init, on=on).model


def _built(
    name: str, *, seed: int = 0, se: str | None = None, init: Init | None = None, device: str = "cpu", on: On = "fake"
) -> Built:
    if not isinstance(name, str):
        raise ModelError(f"selab.build: expected the name of a network, got {type(name).__name__}")
    variant = with_inputs(catalog.find(_with_blocks(name, se), option="selab.build"), (), on)
    with redirect_stdout(sys.stderr):
        return build_variant(variant, seed=seed, init=init, device=device)


def _with_blocks(name: str, se: str | None) -> str:
    if se is None:
        return name
    return f"{name}+{se}" if catalog.split_address(name)[1] is None else f"{name},{se}"


def count(
    model: nn.Module | str,
    input: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,  # noqa: A002 - the usual name
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
    se_blocks: Collection[str] = (),
    inputs: Example | None = None,
    on: On = "fake",
) -> Cost:
    """Count parameters, MACs, FLOPs and bytes of one forward pass; the network is left as it is.

    The numbers depend on conventions, which `docs/counting.md` states: `macs.paper` is the one of the SE paper's
    tables. Operators without a rule are listed in `unknown`; `selab.cost.register_rule` adds rules.

    Args:
        model: a module, or a network's name as in `build`.
        input: the input's shape, (N, C, H, W); or a tensor, positional arguments in a tuple, keyword arguments in a
            mapping. None, for a name, is one image of the network's own size.
        dtype: of all floating-point tensors when bytes are counted; their own where None.
        training: count in train mode.
        se_blocks: paths of modules to count as SE besides the blocks of selab, timm and torchvision.
        inputs: another name of `input`, as in `insert_se` and `fuse`.
        on: `fake` for tensors without memory, on which no kernel runs; `cpu` to run the kernels on a copy with real
            tensors, for a network in which the values of tensors decide what is computed.

    Raises:
        ModelError: the forward pass fails, or no input was given for a module.

    Examples:
        >>> import selab
        >>> cost = selab.count("se_resnet50")
        >>> cost.params, cost.macs.paper
        (28088024, 3866007552)
        >>> from torch import nn
        >>> selab.count(nn.Conv2d(3, 8, 3, bias=False), (1, 3, 8, 8))
        216 parameters, 7.776 k MACs, 15.55 k FLOPs, 2.784 kB moved (forward pass)
    """
    _check_choice("selab.count", "on", on, get_args(On))
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ModelError(f"selab.count: dtype {dtype!r}: expected a torch.dtype, such as torch.float16")
    if input is not None and inputs is not None:
        raise ModelError("selab.count: input and inputs are two names of one thing; give one of them")
    given = inputs if input is None else input
    if isinstance(model, str):
        built = _built(model, device="meta", on=on)
        blocks = {*built.native, *se_blocks}
        given = (1, *catalog.find(model).input_chw) if given is None else given
        model = built.model
    else:
        _check_module(model, "selab.count")
        if given is None:
            raise ModelError("selab.count: a module needs `input`, the shape (N, C, H, W) of an example")
        blocks = {*external.se_blocks(model), *se_blocks}
    return count_module(model, given, dtype=dtype, training=training, se_blocks=blocks, on=on)


def _check_choice(where: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ModelError(f"{where}: {name} {value!r}: allowed: {', '.join(allowed)}")


def _check_positive(where: str, name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ModelError(f"{where}: {name} {value!r}: must be a finite number above 0")


def _check_whole(where: str, name: str, value: object, least: int, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ModelError(f"{where}: {name} {value!r}: must be a whole number from {least} to {most:,}")


def _check_module(model: object, where: str) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"{where}: expected a torch.nn.Module or a network's name, got {type(model).__name__}")


def measure(
    model: nn.Module | str,
    *,
    baseline: nn.Module | str,
    input: Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Sequence[int]] = (1, 3, 224, 224),  # noqa: A002
    phase: Phase = "forward",
    quick: bool = False,
    budget: float | None = None,
    threads: int = 1,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    memory_format: MemoryFormat = "contiguous",
    compiled: bool = False,
    seed: int = 0,
) -> Latency:
    """Measure the time of a network as a ratio to a baseline, with a 95 % interval.

    Both alternate in this process, framed by two controls in which the baseline runs against a copy of itself. The
    networks are copied and left as they are. `docs/measuring.md` explains the procedure.

    Args:
        model: any module, or a network's name as in `build`.
        baseline: what it is compared with; any module or name that takes the same input.
        input: the input's shape, (N, C, H, W); or the shapes of all inputs of networks with several, positional in a
            sequence or named in a mapping: one of them is (N, C, H, W), and all have the same N.
        phase: `forward` (in eval mode, without gradients), `backward` or `forward_backward` (in train mode).
        quick: stop at ±1 % instead of ±0.5 %, and after 15 s instead of 60.
        budget: seconds of sampling instead; the controls take as much again.
        threads: CPU threads.
        device: `cpu` or `cuda`.
        dtype: `fp32`, `tf32` (fp32 tensors, TF32 products; CUDA only), or `bf16` and `fp16` by autocast.
        memory_format: `contiguous` or `channels_last`.
        compiled: run both through torch.compile.
        seed: of the input and of the order of the samples.

    Returns:
        `ratio` (model / baseline), `interval`, `verdict` in words, `baseline_s`, `variant_s` in seconds per call.
        `verdict_kind` is `no_result` where the machine was too noisy; the figures are then rough.

    Raises:
        DeviceError: the device is not there.
        ModelError: a network fails, or its output is not finite.
        OutOfMemoryError: the workload does not fit.

    Examples:
        >>> from torch import nn
        >>> import selab
        >>> plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> with_se = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> inserted = selab.insert_se(with_se, "1", reduction=4, input_nchw=(1, 3, 16, 16))
        >>> time = selab.measure(with_se, baseline=plain, input=(1, 3, 16, 16), budget=0.2)
        >>> time.interval[0] <= time.ratio <= time.interval[1]
        True
        >>> print(time)
        forward: ...
    """
    _check_whole("selab.measure", "seed", seed, 0, MOST_SEED)
    networks = [_network(one, seed) for one in (model, baseline)]
    shape, several = _shapes_of_all(input)
    if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"selab.measure: input {shape}: expected four sizes above 0, (N, C, H, W)")
    _check_choice("selab.measure", "phase", phase, PHASES)
    _check_choice("selab.measure", "device", device, get_args(Device))
    _check_choice("selab.measure", "dtype", dtype, get_args(Dtype))
    _check_choice("selab.measure", "memory_format", memory_format, get_args(MemoryFormat))
    _check_whole("selab.measure", "threads", threads, 1, MOST_THREADS)
    _check_positive("selab.measure", "budget", budget)
    if several:
        networks = [Fed(network, several) for network in networks]
    workload = Workload(
        batch=shape[0],
        input_chw=(shape[1], shape[2], shape[3]),
        device=device,
        dtype=dtype,
        memory_format=memory_format,
        mode="auto",
        threads=threads,
        compiled=compiled,
    )
    plan = plan_for(workload, quick=quick, budget_s=budget)
    return measure_pair(networks[0], networks[1], workload, plan, phase=phase, seed=seed)


def _shapes_of_all(given: Any) -> tuple[tuple[int, ...], tuple[Input, ...]]:
    """Return the shape of the first image, and all inputs without the batch if there are several."""
    if not isinstance(given, Mapping) and (not isinstance(given, Sequence) or not given or isinstance(given[0], int)):
        return tuple(given) if isinstance(given, Sequence) else (given,), ()
    items = list(given.items()) if isinstance(given, Mapping) else [("", shape) for shape in given]
    for _, shape in items:
        if not isinstance(shape, Sequence) or not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ModelError(f"selab.measure: input {shape!r}: expected a shape such as (1, 3, 224, 224)")
    several = tuple(Input(shape=tuple(shape[1:]), name=name) for name, shape in items)
    place = main_input(several)
    if place is None or len({shape[0] for _, shape in items}) > 1:
        raise ModelError("selab.measure: input: one must be an image (N, C, H, W), and all must have the same N")
    return tuple(items[place][1]), several


def _network(model: nn.Module | str, seed: int) -> nn.Module:
    if isinstance(model, str):
        return build(model, seed=seed)
    _check_module(model, "selab.measure")
    return model


def profile(
    name: str,
    *,
    baseline: str | None = None,
    batch: int = 1,
    input_chw: tuple[int, int, int] | None = None,
    phases: Phase | Sequence[Phase] = PHASES,
    quick: bool = False,
    budget: float | None = None,
    threads: int | None = None,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    progress: Callable[[str], object] | None = None,
    options: Mapping[str, Any] | None = None,
) -> RecordResult:
    """Count and measure a network against its baseline, as `selab profile`; the record can be saved.

    Args:
        name: as in `build`; with blocks of your own as `resnet50+reduction=8`.
        baseline: what to compare with; None for the network's own baseline.
        batch: images.
        input_chw: channels, height and width; None for the network's own.
        phases: `forward`, `backward`, `forward_backward`.
        quick: about 30 s in 3 to 6 fresh processes, instead of 80 s in 6 to 12.
        budget: seconds of the whole measurement instead.
        threads: CPU threads; None for one, and a second row on all cores.
        device: `cpu` or `cuda`.
        dtype: `fp32`, `tf32` (fp32 tensors, TF32 products; CUDA only), or `bf16` and `fp16` by autocast.
        progress: called with what is being done.
        options: further fields of `selab.experiments.job.Request`, such as `{"fused": True}`, or `{"processes": 1}` to
            measure in this process.

    Raises:
        UnknownNameError: no such network.
        SpecError: no baseline, or an unknown option.
        ModelError: a network fails, or its output is not finite.

    Examples:
        >>> import selab
        >>> record = selab.profile("se_small_cnn", phases=["forward"], budget=0.5, threads=1, options={"processes": 1})
        >>> print(record)
        se_small_cnn against small_cnn: +0.10 % parameters, +0.42 % MACs; forward ...
        >>> record.cost.se.blocks
        4
    """
    asked = cast("tuple[Phase, ...]", (phases,) if isinstance(phases, str) else tuple(phases))
    for phase in asked:
        _check_choice("selab.profile", "phase", phase, PHASES)
    _check_choice("selab.profile", "device", device, get_args(Device))
    _check_choice("selab.profile", "dtype", dtype, get_args(Dtype))
    _check_whole("selab.profile", "batch", batch, 1, MOST_IMAGES)
    _check_whole("selab.profile", "threads", threads, 1, MOST_THREADS)
    _check_positive("selab.profile", "budget", budget)
    request = Request(
        arch=name,
        baseline=baseline,
        batch=batch,
        input_chw=input_chw,
        phases=asked,
        quick=quick,
        budget_s=budget,
        threads=threads,
        device=device,
        dtype=dtype,
    )
    if options:
        unknown = options.keys() - set(Request.__struct_fields__)
        if unknown:
            raise ModelError(
                f"selab.profile: options: unknown {sorted(unknown)[0]!r}; allowed: "
                f"{', '.join(Request.__struct_fields__)}"
            )
        request = msgspec.structs.replace(request, **options)
    job = resolve(request)
    running = Profile(job)
    running.run(lambda label, _state: None if progress is None else progress(label))
    return RecordResult(running.record())


def load(path: str | Path) -> RecordResult:
    """Read a record of any kind from its JSON file; its figures are computed again from its raw samples.

    Args:
        path: of a file that `selab profile`, `count --out`, `tax` or `compare` wrote, or `save`.

    Raises:
        RecordError: the file is not a record, or its figures are not those of its samples.

    Examples:
        >>> import tempfile
        >>> import selab
        >>> record = selab.profile("se_small_cnn", phases=["forward"], budget=0.5, threads=1, options={"processes": 1})
        >>> path = record.save(tempfile.mkdtemp() + "/r.json")
        >>> selab.load(path).arch
        'se_small_cnn'
    """
    return RecordResult(read_any(Path(path)))


RecordLike = RecordResult | Record | str | Path


def compare_records(before: RecordLike, after: RecordLike) -> RecordChanges:
    """Compare two profiles or counts of equal workload, machine and baseline, as `selab diff`.

    Ratios to the baseline are compared, not times: what the machine did between the two drops out of each ratio.

    Args:
        before: a record, or the path of one.
        after: a record, or the path of one.

    Raises:
        RecordError: the two cannot be compared; names the fields in which they differ.

    Examples:
        >>> import selab
        >>> record = selab.profile("se_small_cnn", phases=["forward"], budget=0.5, threads=1, options={"processes": 1})
        >>> selab.compare_records(record, record).worse
        ()
    """
    (one, first), (other, second) = (_record(value, name) for value, name in ((before, "before"), (after, "after")))
    return RecordChanges(one, other, names=(first, second))


def _record(value: RecordLike, name: str) -> tuple[Record, str]:
    if isinstance(value, str | Path):
        return _record(load(value), str(value))
    found = value.record if isinstance(value, RecordResult) else value
    if not isinstance(found, Record):
        kind = type(found).__name__
        raise RecordError(f"selab.compare_records: {name} is a {kind}; profiles and counts can be compared")
    return found, name
