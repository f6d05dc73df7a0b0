"""Fold gates that hardly vary into the weights beside them, write what is left, and compare it with the network."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
from torch import Tensor, nn

from selab.bench.progress import Report
from selab.deploy.target import scratch
from selab.errors import ModelError, RecordError, SelabError
from selab.experiments.job import Request, resolve
from selab.experiments.judged import HARD, PARTS, Batch, DeadChannels, Factors, Judged, JudgedGraph
from selab.experiments.profiling import Profile, count_job
from selab.graphs.module import OnnxNetwork
from selab.judging.choose import choose
from selab.judging.folding import OF_OUTPUT, POINTS, Folding, Size, folding_json
from selab.judging.look import parts_of
from selab.judging.loss import Bools, Loss, loss_of
from selab.judging.worth import Arm, answers, both, changes
from selab.meta import first_line
from selab.models import folded as models_folded
from selab.models.build import build
from selab.models.catalog import find
from selab.models.provenance import fixed_address
from selab.models.spec import Variant
from selab.records.files import check_writable, write_atomically
from selab.records.types import Cost
from selab.units import counted

RANKING, CHOOSING, REPORTING = range(PARTS)
"""Of three images one ranks the blocks, one decides how many of them become constants, and one reports."""
# How much folding may cost unless it is said.
_POINTS, _ERROR = 0.1, 0.01
# So many images that a network has all wrong are not its own.
_LEAST_WRONG = 50
# What folding itself may change: rounding of weights and sums, over the largest output.
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How much folding may cost.

    Attributes:
        points: of accuracy; None for a limit of the error.
        error: the largest difference of an output over the network's largest one; None for a limit of points.
    """

    points: float | None
    error: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that are none.

        Raises:
            SelabError: points that are not between 0 and 100, or an error that is not between 0 and 1.
        """
        for name, value, most in (("max_drop", self.points, 100), ("max_error", self.error, 1)):
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= most):
                raise SelabError(f"{name}: {value!r}: allowed: 0 to {most}")

    @classmethod
    def of(cls, points: float | None, error: float | None, *, labels: bool) -> "Rule":
        """Return the rule with these limits, of which one is None; by default 0.1 points, or 1 % without labels."""
        if error is not None or (points is None and not labels):
            return cls(points=None, error=_ERROR if error is None else error)
        return cls(points=_POINTS if points is None else points)

    @property
    def limit(self) -> float:
        """The limit in its unit."""
        limit = self.points if self.points is not None else self.error
        assert limit is not None
        return limit

    @property
    def unit(self) -> str:
        """What the limit counts."""
        return POINTS if self.points is not None else OF_OUTPUT


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A network after folding.

    Attributes:
        network: the copy.
        record: what was decided, and what it costs on the images that did not decide.
        narrowed: layers that lost channels, and their sizes.
    """

    network: nn.Module
    record: Folding
    narrowed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def too_dear(self) -> bool:
        """Whether it costs more than was allowed on the images that did not decide."""
        return self.record.cost > self.record.limit


def fold(network: Judged, rule: Rule, *, hard_gates: bool = False, prunes: bool = False, report: Report) -> Folded:
    """Choose blocks on two of three images, fold them, and compare the networks on the third.

    The blocks are ranked by what other images say than those that decide: the best of many on one set of images is
    partly the luckiest there, and costs more elsewhere.

    Args:
        network: with its images.
        rule: how much it may cost.
        hard_gates: whether the blocks that are left get a hard sigmoid.
        prunes: whether channels whose factor is always about zero are taken out, where that costs no more.
        report: called with what is done.

    Raises:
        InsertionError: the network has no gated block.
        SelabError: it does not run, or cannot be followed; there are no images, or no labels to count points by.
    """
    if rule.points is not None and not network.seen.classes:
        raise SelabError(
            f"{network.seen.words}: has no labels to lose points by; limit the error instead (--max-error, max_error)"
        )
    report("looking at the gates", None)
    if next(network.batches(REPORTING), None) is None:
        raise SelabError(f"{network.seen.words}: of three images two decide and one reports; give 3 or more")
    seen = network.gates(network.batches(RANKING, CHOOSING))
    means = {one.path: np.array(one.mean) for one in seen.blocks}

    costs = _Costs(network, rule)

    def cost_on(part: int, sets: Sequence[Sequence[str]]) -> list[float]:
        report(f"ranking {counted(len(sets), 'gate')}" if part == RANKING else f"trying {sets[0][-1]}", None)
        return costs.of([network.arm({path: means[path] for path in paths}) for paths in sets], part)

    choices = choose(network.candidates(seen), partial(cost_on, RANKING), partial(cost_on, CHOOSING), limit=rule.limit)
    constants = {one.path: means[one.path] for one in choices if one.folded}
    report("folding", None)
    made, went = network.folded(constants)
    for path, place in went.items():
        if isinstance(place, str):
            raise ModelError(f"{path}: {place}, though it seemed to fold; report it as a fault of selab fold")
    ran = network.running(made)
    _check_rounding(network, constants, ran)
    gate_error, gate_loss = None, None
    if hard_gates:
        made = network.with_hard_gates(made)
        before, ran = ran, network.running(made)
        gate_loss, gate_error = _difference(network, before, ran)
    dead = network.dead(made, seen, went)
    narrowed: dict[str, dict[str, int]] = {}
    if prunes:
        made, dead, narrowed = _pruned(network, made, dead, costs, report)
        ran = network.running(made)
    report("comparing on the other images", None)
    loss, error = _difference(network, network.model, ran)
    record = Folding(
        arch=network.name,
        weights=network.weights,
        data=network.seen.words,
        chosen_on=seen.images,
        # Images without labels are kept in memory, so that counting them reads no file.
        reported_on=_number(network) if loss is None else loss.images,
        limit=rule.limit,
        unit=rule.unit,
        choices=tuple(choices),
        dead=tuple(one.found for one in dead),
        loss=loss,
        error=error,
        gate=HARD if hard_gates else "",
        gate_error=gate_error,
        gate_loss=gate_loss,
    )
    return Folded(network=made, record=record, narrowed=narrowed)


def _difference(network: Judged, before: nn.Module, after: nn.Module) -> tuple[Loss | None, float]:
    """Return what a change costs on the images that did not decide: accuracy, with labels, and the outputs."""
    if not network.seen.classes:
        return None, changes(lambda: network.batches(REPORTING), [before, after])[0]
    (own, other), (error,) = both(lambda: network.batches(REPORTING), [before, after])
    return loss_of(own, other), error


class _Costs:
    """What arms cost, in the rule's unit; the answers of the network itself are kept."""

    def __init__(self, network: Judged, rule: Rule) -> None:
        self.rule = rule
        self._network = network
        self._own: dict[int, Bools] = {}

    def of(self, arms: Sequence[Arm], part: int) -> list[float]:
        """Return the cost of each arm on the images of a part."""
        network = self._network
        if self.rule.points is None:
            return changes(lambda: network.batches(part), [network.model, *arms])
        if part not in self._own:
            self._own[part], *others = answers(lambda: network.batches(part), [network.model, *arms])
            own = self._own[part]
            if len(own) >= _LEAST_WRONG and not own.any():
                raise SelabError(
                    f"{network.name}: has none of {len(own)} images right, so that no gate can cost a point: are the "
                    "labels those that it was trained on? Number them by its classes (--classes-file), or limit the "
                    "error instead (--max-error)"
                )
        else:
            others = answers(lambda: network.batches(part), arms)
        return [loss_of(self._own[part], one).points for one in others]


def _pruned(
    network: Judged, made: nn.Module, dead: Sequence[DeadChannels], costs: _Costs, report: Report
) -> tuple[nn.Module, list[DeadChannels], dict[str, dict[str, int]]]:
    """Take out the dead channels of one block after the other, while that costs no more than the limit."""
    narrowed: dict[str, dict[str, int]] = {}
    told = []
    for one in dead:
        report(f"without {counted(len(one.found.channels), 'channel')} of {one.found.path}", None)
        done = network.pruned(made, one)
        why_not = done if isinstance(done, str) else ""
        if not isinstance(done, str):
            trial, changed = done
            (cost,) = costs.of([network.running(trial)], CHOOSING)
            if cost <= costs.rule.limit:
                made = trial
                for path, sizes in changed.items():
                    narrowed.setdefault(path, {}).update(sizes)
            else:
                why_not = f"it costs {cost:.2g} {costs.rule.unit}"
        told.append(replace(one, found=msgspec.structs.replace(one.found, pruned=not why_not, why_not=why_not)))
    return made, told, narrowed


def _number(network: Judged) -> int:
    return sum(len(parts_of(batch)[0]) for batch in network.batches(REPORTING))


def _check_rounding(network: Judged, constants: Factors, folded: nn.Module) -> None:
    """Raise ModelError if the folded network computes something else than the network with constant gates."""
    if not constants:
        return

    def first() -> Iterator[Batch]:
        yield next(network.batches(CHOOSING))

    (difference,) = changes(first, [network.arm(constants), folded])
    if not difference <= _ROUNDING:
        raise ModelError(
            f"{network.name}: the folded network differs by {difference:.2g} of the largest output from the "
            "one with constant gates; report it as a fault of selab fold"
        )


# ------------------------------------------------------------------------------------------------------------- writing
@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a folded network goes.

    Attributes:
        network: its weights, or the ONNX file.
        family: the TOML that describes it; None for an ONNX file.
        record: of what was decided and measured.
        finetuned: weights after more training; None where there is none.
    """

    network: Path
    family: Path | None
    record: Path
    finetuned: Path | None = None

    @property
    def arch(self) -> str:
        """What `--arch` takes for it."""
        return str(self.network) if self.family is None else f"{self.family}:folded"

    @property
    def written(self) -> tuple[Path, ...]:
        """The files that are written."""
        return tuple(one for one in (self.network, self.family, self.finetuned, self.record) if one is not None)


def files_of(network: Judged, out: Path, *, replace: bool, finetune: bool = False) -> Files:
    """Return where a folded network goes, in a folder.

    Raises:
        RecordError: a file exists and may not be replaced, or the folder cannot be written.
    """
    name = network.name
    stem = re.sub(r"[^\w.-]+", "-", Path(name.rpartition(":")[2] or name).name.removesuffix(".onnx"))
    graph = isinstance(network, JudgedGraph)
    files = Files(
        network=out / (f"{stem}.onnx" if graph else f"{stem}.safetensors"),
        family=None if graph else out / f"{stem}.toml",
        record=out / f"{stem}.folding.json",
        finetuned=out / f"{stem}.finetuned.safetensors" if finetune else None,
    )
    if graph and Path(name).resolve() == files.network.resolve():
        raise RecordError(f"{files.network}: is the network itself; give another folder as --out")
    for one in files.written:
        check_writable(one, replace=replace)
    return files


def write(folded: Folded, network: Judged, files: Files) -> None:
    """Check that the description is that of a folded network, and write both.

    Raises:
        RecordError: a file cannot be written.
        ModelError: the description is another network's; nothing is written.
    """
    model, variant = folded.network, network.variant
    if isinstance(model, OnnxNetwork):
        write_atomically(files.network, model.model.SerializeToString())
        return
    state = state_of(model)
    described = {"folded_from": variant.name, "folded": " ".join(folded.record.folded), **network.preparation}
    family = family_text(variant, folded.record, folded.narrowed).encode()
    assert files.family is not None
    with scratch() as folder:
        tried = folder / files.family.name
        tried.write_bytes(family)
        again = build(find(f"{tried}:folded")).model
    try:
        again.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{files.family}: would describe another network than was folded: {first_line(error)}; report it as a "
            "fault of selab fold"
        ) from error
    write_atomically(files.network, safetensors.torch.save(state, described))
    write_atomically(files.family, family)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's weights and buffers on the CPU, as a file takes them."""
    return {key: one.detach().cpu().contiguous().clone() for key, one in model.state_dict().items()}


def family_text(variant: Variant, record: Folding, narrowed: Mapping[str, Mapping[str, int]]) -> str:
    """Return the TOML that describes a folded network, and beside it the network as it was."""
    chw = ", ".join(map(str, variant.input_chw))
    arch, source = json.dumps(fixed_address(variant)), json.dumps(f"selab fold --arch {variant.name}")
    both = {
        "original": (f"{variant.name} as it was", ""),
        "folded": (f"{variant.name}, {counted(len(record.folded), 'block')} folded", " ".join(record.folded)),
    }
    more = f", gate = {json.dumps(record.gate)}" if record.gate else ""
    more += f", narrowed = {json.dumps(models_folded.sizes_text(narrowed))}" if narrowed else ""
    text = (
        f'family = "folded"\nsource = {source}\nbuilder = "{models_folded.BUILDER}"\n'
        f"input_chw = [{chw}]\nnum_classes = {variant.num_classes}\n"
    )
    for name, (title, paths) in both.items():
        baseline = 'baseline = "original"\n' if name == "folded" else ""
        text += (
            f"\n[variants.{name}]\ntitle = {json.dumps(title)}\n{baseline}"
            f"arguments = {{ arch = {arch}, folded = {json.dumps(paths)}{more if baseline else ''} }}\n"
        )
    return text


def measured(folded: Folded, network: Judged, files: Files, *, runtime: str, budget_s: float, report: Report) -> Folded:
    """Return a folded network with its size, and its time over that of the network before, in fresh processes.

    Args:
        folded: as it was written.
        network: as it was.
        files: of the folded network.
        runtime: that runs both.
        budget_s: seconds of measuring; 0 to count alone.
        report: called with what is done.

    Raises:
        SelabError: it cannot be measured.
    """
    graph = isinstance(network, JudgedGraph)
    request = Request(
        arch=files.arch,
        baseline=network.name if graph else None,
        runtime=runtime,
        phases=("forward",),
        quick=True,
        budget_s=budget_s or None,
        input_chw=network.seen.image,
    )
    job = resolve(request)
    if budget_s:
        profile = Profile(job)
        profile.run(report)
        record = profile.record()
    else:
        record = count_job(job, by_module=False, counters=False)
    assert record.baseline_cost is not None
    found = msgspec.structs.replace(
        folded.record,
        before=_size(record.baseline_cost),
        after=_size(record.cost),
        latency=record.latency.get("forward"),
        runtime=record.workload.runtime if budget_s else "",
        machine=record.machine.name if budget_s else "",
    )
    return replace(folded, record=found)


def _size(cost: Cost) -> Size:
    return Size(params=cost.params, macs=cost.macs.all, bytes=cost.bytes)


def save(folded: Folded, files: Files) -> None:
    """Write the record of a folded network.

    Raises:
        RecordError: the file cannot be written.
    """
    write_atomically(
        files.record,
        folding_json(msgspec.structs.replace(folded.record, files=tuple(one.name for one in files.written[:-1]))),
    )
