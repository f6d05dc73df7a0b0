"""Write networks for another runtime, for a measurement or for a user."""

import copy
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab import units
from selab.attention.se import SqueezeExcitation
from selab.bench.backends import backend
from selab.bench.machine import int8_words
from selab.bench.progress import Report
from selab.deploy.spelling import respelled, spelling_of
from selab.deploy.target import Order, Target, scratch, target
from selab.errors import ModelError
from selab.experiments.images import batches, read_images
from selab.experiments.job import Job
from selab.fusion.external import external_blocks
from selab.fusion.related import related_blocks
from selab.graphs.blocks import find_blocks
from selab.graphs.graph import Graph
from selab.graphs.module import OnnxNetwork
from selab.meta import evaluating, make_pass
from selab.meta.fake import VALUE_NEEDED
from selab.models import catalog
from selab.models.build import build
from selab.models.checkpoint import load
from selab.models.external import exported_variant, runs_code_of
from selab.models.spec import Variant
from selab.records.exported import Agreement, Exported, ExportedFile
from selab.records.types import ONNX_RUNTIME, TORCH, Dtype, Frozen, Workload

_MOST_IMAGES = 64
"""For calibration; more change the ranges of activations hardly."""
_NOISE_IMAGES = 4
# Of the largest output; another order of sums makes 1e-5 in a deep network.
_MOST_FP32 = 1e-2
_NORM_BATCH = 16
_SETTLED = "random weights: batch normalisations have the statistics of what int8 was calibrated on"


def is_exported(job: Job) -> bool:
    """Return whether the networks of a job must be written for its runtime before they are measured."""
    workload = job.workload
    if workload.runtime == TORCH:
        return False
    return not (job.is_graph and workload.runtime == ONNX_RUNTIME and workload.dtype == "fp32")


def exported(job: Job, variant: nn.Module, baseline: nn.Module, folder: Path) -> tuple[Job, Exported, tuple[str, ...]]:
    """Write both networks of a job for its runtime, and look at what was written.

    Args:
        job: of a runtime other than PyTorch.
        variant: the network; it is left unchanged.
        baseline: likewise.
        folder: for the files.

    Returns:
        The job of the files, what they are, and what must be known of them.

    Raises:
        DeviceError: a package is missing.
        ModelError: one of them cannot be exported.
    """
    workload, to = job.workload, target(job.workload.runtime)
    remarks: list[str] = []
    images: Sequence[Tensor] = ()
    if workload.dtype == "int8":
        images, said = calibration_of(job)
        remarks += [said, *_int8_remarks()]
        if has_random_weights(job):
            remarks.append(_SETTLED)
            variant, baseline = settled(variant, images), settled(baseline, images)
    made = [
        write_network(model, to, workload, folder / f"{stem}{to.suffix}", name=named.name, images=images)
        for named, model, stem in zip(job.pair, (variant, baseline), ("variant", "baseline"), strict=True)
    ]
    found = [variant_of(one.path, workload) for one in made]
    inputs = _compared(job)
    agreement = _agreement(_outputs_of_network(variant, job, inputs.batches), made[0].path, workload, inputs)
    files = [looked_at(one.path, to) for one in made]
    facts = _facts(made[0], files[0], files[1], agreement)
    return msgspec.structs.replace(job, variant=found[0], baseline=found[1]), facts, tuple(remarks)


def variant_of(path: Path, workload: Workload) -> Variant:
    """Return the variant of a file that was written for a workload's runtime."""
    if workload.runtime == ONNX_RUNTIME:
        return catalog.find(str(path))
    return exported_variant(path, workload.runtime, input_chw=workload.input_chw)


def calibration_of(job: Job) -> tuple[list[Tensor], str]:
    """Return the batches that int8 is calibrated on, and what they are in words: every second image of the folder.

    Raises:
        DeviceError, FolderError: as `read_images`.
    """
    workload = job.workload
    if job.request.images is None:
        said = "int8 was calibrated on noise, not on images (--images FOLDER): its error means nothing"
        return _noise(workload, _NOISE_IMAGES, seed=job.request.seed), said
    images = read_images(Path(job.request.images), workload.input_chw, 2 * _MOST_IMAGES)[::2]
    said = f"int8 was calibrated on {units.counted(len(images), 'image')} of {job.request.images}"
    return batches(images, workload.batch), said


def _int8_remarks() -> list[str]:
    found = int8_words()
    return [] if found is None else [found]


def has_random_weights(job: Job) -> bool:
    """Return whether a job's network comes without weights: not a file, and not a user's code, which may load some."""
    return not job.is_graph and runs_code_of(job.variant) is None


def settled(model: nn.Module, images: Sequence[Tensor]) -> nn.Module:
    """Return a copy in eval mode whose batch normalisations have the statistics of these images.

    With random weights the outputs of a deep network vanish or overflow until they have, and with them all that a
    quantised network could be compared on.

    Args:
        model: left unchanged.
        images: batches.
    """
    model = copy.deepcopy(model)
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d) and one.track_running_stats]
    momenta = [one.momentum for one in norms]
    for one in norms:
        one.reset_running_stats()
        one.momentum = None  # the mean of all batches
    # Dropout stays out of it.
    model.eval()
    for one in norms:
        one.train()
    with torch.no_grad():
        # One image may leave a single value of a channel, which has no variance.
        together = torch.cat(list(images))
        for first in range(0, len(together), _NORM_BATCH):
            model(together[first : first + _NORM_BATCH])
    for one, momentum in zip(norms, momenta, strict=True):
        one.momentum = momentum
    return model.eval()


def _noise(workload: Workload, number: int, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (workload.batch, *workload.input_chw)
    return [torch.randn(shape, generator=generator) for _ in range(number)]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A network in a file.

    Attributes:
        respelled: the paths of its SE blocks that were; `left` is the number of those that were not.
        spelling: their spelling's name.
    """

    path: Path
    respelled: tuple[str, ...]
    spelling: str
    left: int = 0


def write_network(
    model: nn.Module, to: Target, workload: Workload, path: Path, *, name: str, images: Sequence[Tensor] = ()
) -> Written:
    """Write one network, its SE blocks in the workload's spelling or in the runtime's own.

    Args:
        model: left unchanged.
        to: the runtime.
        workload: batch, input, type, and how blocks are treated.
        path: of the file.
        name: of the network, for messages.
        images: batches for calibration; none for fp32.

    Raises:
        DeviceError: a package is missing.
        ModelError: the network cannot be exported, or takes several inputs.
        RecordError: the file cannot be written.
    """
    if workload.inputs:
        raise ModelError(f"{name}: takes several inputs; only networks of one image are exported")
    spelling = spelling_of(workload.spelling) if workload.spelling else to.spelling
    changed: tuple[str, ...] = ()
    if isinstance(model, OnnxNetwork):
        left = len(find_blocks(Graph(model.model)))
    else:
        own = {path for path, module in model.named_modules() if isinstance(module, SqueezeExcitation)}
        found = {*external_blocks(model), *related_blocks(model), *own}
        model, changed = respelled(model, spelling)
        left = len(found - {*changed})
        model.eval()
    order = Order(
        model=model,
        image=(workload.batch, *workload.input_chw),
        path=path,
        name=name,
        precision="int8" if workload.dtype == "int8" else "fp32",
        images=images,
        float_blocks=changed if workload.float_blocks else None,
        threads=workload.threads,
    )
    to.write(order)
    return Written(path=path, respelled=changed, spelling=spelling.name, left=left)


# ------------------------------------------------------------------------------------------------------- for a user
class Export(Frozen, frozen=True, kw_only=True):
    """What `selab export` wrote.

    Attributes:
        baseline: what it is compared with; empty for nothing.
        agreement_otherwise: of int8 with the SE blocks in fp32, where the file has them in int8, or the reverse.
        remarks: what must be known of it.
    """

    arch: str
    baseline: str = ""
    runtime: str
    path: str
    dtype: Dtype
    float_blocks: bool
    exported: Exported
    agreement_otherwise: Agreement | None
    remarks: tuple[str, ...]


# Their files are written by running the network once and noting its operators.
_TRACED = ("onnxruntime", "openvino")


def _values_steer(model: nn.Module, images: Sequence[Tensor]) -> bool:
    """Return whether code of a network decides by values of tensors, which a trace does not see."""
    try:
        with evaluating(model):
            make_pass(model, tuple(images[0].shape))()
    except VALUE_NEEDED:
        return True
    except Exception:
        # Whatever else is wrong the export tells.
        return False
    return False


def export(job: Job, path: Path, *, weights: Path | None, report: Report) -> Export:
    """Write a network for the runtime of a job, and compare the file with the network.

    Args:
        job: it may have no baseline.
        path: of the file.
        weights: of the network; None for random ones.
        report: called with what is done.

    Raises:
        SelabError: the network cannot be built, exported or run in the runtime; the file cannot be written.
    """
    workload, to = job.workload, target(job.workload.runtime)
    remarks: list[str] = []
    images: Sequence[Tensor] = ()
    with redirect_stdout(sys.stderr):
        model = build(job.variant, seed=job.request.seed, input_chw=workload.input_chw).model
        if weights is not None:
            load(model, weights, variant=job.variant)
        elif has_random_weights(job):
            remarks.append("the weights are random (--weights FILE)")
        model.eval()
        if workload.dtype == "int8":
            images, said = calibration_of(job)
            remarks.append(said)
            if weights is None and has_random_weights(job):
                remarks.append(_SETTLED)
                model = settled(model, images)
        inputs = _compared(job)
        if workload.runtime in _TRACED and not job.is_graph and _values_steer(model, inputs.batches):
            remarks.append(
                "values steer what the network computes: the file holds the one way that an example took, whatever the "
                "image"
            )
        report("exporting", None)
        written = write_network(model, to, workload, path, name=job.variant.name, images=images)
        expected = _outputs_of_network(model, job, inputs.batches)
        report("comparing", None)
        try:
            agreement = _agreement(expected, written.path, workload, inputs)
        except ModelError:
            for one in (written.path, written.path.with_suffix(".bin")):
                one.unlink(missing_ok=True)
            raise
        with scratch() as folder:
            otherwise = None
            if workload.dtype == "int8" and (written.respelled or job.is_graph):
                report("comparing with the blocks in the other type", None)
                other = msgspec.structs.replace(workload, float_blocks=not workload.float_blocks)
                beside = folder / f"otherwise{to.suffix}"
                write_network(model, to, other, beside, name=job.variant.name, images=images)
                otherwise = _agreement(expected, beside, workload, inputs)
            without = None
            if job.baseline is not None:
                report("exporting the baseline", None)
                base = build(job.baseline, seed=job.request.seed, input_chw=workload.input_chw).model
                beside = folder / f"baseline{to.suffix}"
                write_network(base, to, workload, beside, name=job.baseline.name, images=images)
                without = looked_at(beside, to)
        return Export(
            arch=job.variant.name,
            baseline="" if job.baseline is None else job.baseline.name,
            runtime=to.name,
            path=str(path),
            dtype=workload.dtype,
            float_blocks=workload.float_blocks,
            exported=_facts(written, looked_at(path, to), without, agreement),
            agreement_otherwise=otherwise,
            remarks=tuple(remarks),
        )


def _facts(written: Written, file: ExportedFile, without: ExportedFile | None, agreement: Agreement) -> Exported:
    return Exported(
        spelling=written.spelling if written.respelled else "",
        blocks=len(written.respelled),
        with_blocks=file,
        without_blocks=without,
        agreement=agreement,
        left=written.left,
    )


def looked_at(path: Path, to: Target) -> ExportedFile:
    """Return the size of a file that was written for a runtime, and what its compiler makes of it."""
    beside = path.with_suffix(".bin")
    files = [path, beside] if path.suffix == ".xml" and beside.is_file() else [path]
    return ExportedFile(bytes=sum(file.stat().st_size for file in files), partitions=to.partitions(path))


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    batches: Sequence[Tensor]
    words: str


def _compared(job: Job) -> _Inputs:
    """Return the inputs to compare on: every second image of the folder, beside those of the calibration."""
    workload = job.workload
    if job.request.images is None:
        noise = _noise(workload, 2 * _NOISE_IMAGES, seed=job.request.seed + 1)
        return _Inputs(batches=noise, words=f"{len(noise) * workload.batch} inputs of noise")
    every = read_images(Path(job.request.images), workload.input_chw, 2 * _MOST_IMAGES)
    images = every[1::2] or every
    words = f"{units.counted(len(images), 'image')} of {job.request.images}"
    return _Inputs(batches=batches(images, workload.batch), words=words)


def _outputs_of_network(model: nn.Module, job: Job, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the first output of the network itself for each input; an ONNX network runs in ONNX Runtime, in fp32."""
    if isinstance(model, OnnxNetwork):
        workload = msgspec.structs.replace(job.workload, runtime=ONNX_RUNTIME, dtype="fp32")
        return _run(model, workload, inputs)
    with evaluating(model), torch.inference_mode():
        return [tree_leaves(model(one))[0].clone() for one in inputs]


def outputs(path: Path, workload: Workload, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the first output of a network in a file for each input."""
    return _run(build(variant_of(path, workload), input_chw=workload.input_chw).model, workload, inputs)


def _run(model: nn.Module, workload: Workload, inputs: Sequence[Tensor]) -> list[Tensor]:
    runtime = backend(workload.runtime)
    found = []
    with runtime.session(workload, seed=0):
        loaded = runtime.prepare(model, workload, seed=0)
        with runtime.translated_errors(str(getattr(model, "place", ""))):
            for one in inputs:
                loaded.feed(one.numpy())
                loaded.call()
                found.append(torch.from_numpy(np.array(loaded.outputs()[0], dtype=np.float32)))
    if not all(bool(one.isfinite().all()) for one in found):
        raise ModelError(f"{getattr(model, 'place', 'the network')}: {workload.runtime} returns NaN or infinity")
    return found


def _agreement(expected: Sequence[Tensor], path: Path, workload: Workload, inputs: _Inputs) -> Agreement:
    absolute = relative = 0.0
    same: list[Tensor] = []
    for one, other in zip(expected, outputs(path, workload, inputs.batches), strict=True):
        if one.shape != other.shape:
            raise ModelError(
                f"the exported network returns {list(other.shape)}, the network itself {list(one.shape)}; "
                "report it as a fault of this export"
            )
        difference = float((one - other).abs().max())
        absolute = max(absolute, difference)
        relative = max(relative, difference / max(float(one.abs().max()), torch.finfo(torch.float32).tiny))
        if one.dim() == 2 and one.shape[1] > 1:
            same.append(one.argmax(1) == other.argmax(1))
    if workload.dtype == "fp32" and relative > _MOST_FP32:
        raise ModelError(
            f"{path.name}: computes something else than the network: an output differs by {relative:.2g} of the "
            "largest one; does its forward pass choose by the values of tensors? An exported program has one way only"
        )
    share = float(torch.cat(same).float().mean()) if same else None
    return Agreement(max_absolute=absolute, max_relative=relative, same_top_1=share, inputs=inputs.words)
