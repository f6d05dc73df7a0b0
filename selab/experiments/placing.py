"""Search the sites of a network that deserve a block under a budget, against the same cost spent on width or depth.

1. The blocks are counted; their time is measured by one block alone, once for each shape of map.
2. Short trainings on a part of the training images choose; the other part is held back and judges. Optuna proposes
   sites and ends trainings early that are behind.
3. The best of each kind is trained on all training images from several seeds and tested on the test images, and its
   time is measured beside the original's.

Everything resumes: costs and results are in the record, trainings in folders of their own, trials in a journal.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from selab.bench.machine import machine
from selab.errors import ModelError, SelabError
from selab.experiments.candidates import (
    ORIGINAL,
    Network,
    Resized,
    Sites,
    dearest,
    ratio_of,
    repeats,
    shapes,
    sites_of,
    widths,
    with_ratios,
    write_networks,
)
from selab.experiments.compare import fitted, folder_of
from selab.experiments.job import Request, resolve
from selab.experiments.prices import times
from selab.experiments.tuning import optuna_for
from selab.judging.placement import (
    Arm,
    Kind,
    Limit,
    Placement,
    SeedTest,
    best,
    cost_of,
    fill,
    finalists,
    last_ones,
    placement_json,
    read_placement,
)
from selab.models.catalog import find
from selab.models.spec import Variant
from selab.records.files import check_writable, write_atomically
from selab.records.store import file_name
from selab.records.types import Frozen, Latency
from selab.training.data import Data
from selab.training.progress import TrainingProgress
from selab.training.recipe import Recipe, adapted
from selab.training.record import Options
from selab.training.train import DivergedError, Training, train
from selab.units import counted

Report = Callable[[str, TrainingProgress | None], object]
Say = Callable[[str], object]
HELD_BACK, PLACED = 0.1, "placed"
# Wider and deeper networks that are measured, to find one that is as slow as the limit.
_MOST_WIDTHS, _MOST_REPEATS = 4, 2
# Epochs of a training, and finished trials, before one may be ended early.
_WARMUP, _STARTUP = 1, 4
# Proposals for each network that is to be tried.
_MOST_ASKED = 4


class PlaceRequest(Frozen, frozen=True, kw_only=True):
    """What is asked for.

    Attributes:
        arch: the network without blocks, as `--arch` takes it.
        limit: what blocks may cost.
        se: changes of the block; `insert`: sites; both as the options take them.
        recipe: as named.
        options: of the trainings; their epochs are those of the last ones.
        search_epochs: of the trainings that choose.
        trials: of the search.
        seeds: of the last trainings.
        runtime: that the times are of, forward, one image.
        threads: of the CPU, for the times.
        budget_s: seconds of each of the two measurements.
        command: the command line.
    """

    arch: str
    limit: Limit
    se: str | None = None
    insert: tuple[str, ...] = ()
    recipe: Recipe
    options: Options
    search_epochs: int
    trials: int
    seeds: int
    runtime: str
    threads: int = 1
    budget_s: float = 60.0
    command: str = ""


class _StoppedEarlyError(Exception):
    """A training is behind the others."""


class Placing:
    """A placement while it runs; `record` is what is known at any moment.

    Args:
        request: what is asked for.
        data: to train and test on.
        out: the folder of everything that is written.

    Raises:
        SelabError: the network cannot get a block, the images cannot be divided; a record of something else is there.
    """

    def __init__(self, request: PlaceRequest, data: Data, out: Path) -> None:
        self.request, self.data, self.out = request, data, out
        self.choosing = data.held_out(HELD_BACK)
        original = fitted(find(request.arch), data)
        name = file_name(original.name)
        self.path = out / f"{name}.placement.json"
        self.networks = out / f"{name}.placed.toml"
        self._journal = out / f".{name}.search.jsonl"
        self.sites: Sites = sites_of(original, se=request.se, insert=request.insert)
        recipe = adapted(request.recipe, epochs=request.options.epochs, batch=request.options.batch)
        self.record = Placement(
            arch=original.name,
            block=self.sites.words,
            data=data.title,
            data_sha256=data.sha256,
            recipe=recipe.name,
            epochs=recipe.epochs,
            search_epochs=request.search_epochs,
            held_back=HELD_BACK,
            limit=request.limit,
            runtime=request.runtime,
            threads=request.threads,
            machine=machine(request.options.device).name,
            command=request.command,
            sites=self.sites.found,
        )
        self._made: dict[str, Network] = {}

    def take_over(self, *, replace: bool) -> None:
        """Take over what an earlier, equal call has measured and trained.

        Raises:
            DeviceError: Optuna is not installed.
            RecordError: the record there is of something else, or cannot be written.
        """
        optuna_for("place")
        check_writable(self.path, replace=True)
        if replace:
            self._journal.unlink(missing_ok=True)
        if not self.path.exists() or replace:
            return
        there = read_placement(self.path)
        for key in _DECIDING:
            old, new = getattr(there, key), getattr(self.record, key)
            if key == "sites":
                old, new = ([one.path for one in each] for each in (old, new))
            if old != new:
                raise SelabError(
                    f"{self.path}: is a placement whose {key} is {_shown(old)}, not {_shown(new)}; use --replace to "
                    "overwrite it, or name another folder with --out"
                )
        self.record = msgspec.structs.replace(there, complete=False, command=self.request.command)

    def expectation(self) -> str:
        """Return in words what will be trained."""
        request, sites = self.request, len(self.sites.found)
        return (
            f"{self.record.arch}: {counted(sites, 'site')} for a block ({self.record.block}) under "
            f"{request.limit.words}; about {request.trials + 6} short trainings of "
            f"{counted(request.search_epochs, 'epoch')} choose, then up to 6 networks × "
            f"{counted(request.seeds, 'seed')} × {counted(self.record.epochs, 'epoch')}; Ctrl-C saves everything, the "
            "same command resumes"
        )

    def run(self, report: Report, say: Say) -> None:
        """Measure, search and compare what is left.

        Raises:
            SelabError: a network cannot be measured or trained; what was done is kept.
        """
        self._cost(report, say)
        self._try_controls(report)
        self._search(report, say)
        self._finish(report, say)

    # ------------------------------------------------------------------------------------------------------- costs
    def _cost(self, report: Report, say: Say) -> None:
        """Measure what each block costs, and find the width and the depth that cost as much as the limit."""
        limit, base = self.request.limit, self.sites.cost
        resized: list[tuple[Kind, Resized]] = []
        remarks = []
        kinds: list[tuple[Kind, Any, int]] = [("width", widths, _MOST_WIDTHS), ("depth", repeats, _MOST_REPEATS)]
        for kind, make, most in kinds:
            try:
                others = make(self.sites, limit.ratio, limit.quantity, most=most)
            except ModelError as error:
                remarks.append(str(error))
                continue
            if not others and kind == "depth":
                remarks.append(
                    "more depth: no block of the network keeps the shape of its map, so that none runs once more"
                )
            resized += [(kind, one) for one in others]
        self._made = {one.network.name: one.network for _, one in resized}
        firsts = [places[0] for places in shapes(self.sites.found).values()]
        alone = {f"site_{place}": place for place in firsts}
        if self.record.arms:
            self._write()
            return
        ratios = {one.network.name: ratio_of(one.cost, base, limit.quantity) for _, one in resized}
        if limit.quantity == "latency":
            for name, place in alone.items():
                self._made[name] = self._network(name, (place,))
            self._write()
            found, told = self._times(list(self._made), report)
            remarks += told
            measured = {name: self._ratio(name, latency) for name, latency in found.items()}
            sites = with_ratios(self.sites.found, {place: measured[name] for name, place in alone.items()})
            self.record = msgspec.structs.replace(self.record, sites=sites)
            ratios = {name: measured[name] for name in ratios}
            self._made = {name: one for name, one in self._made.items() if name not in alone}
        arms = [self._arm(ORIGINAL, "original", ()), *self._controls(resized, ratios, remarks)]
        costs = self._costs()
        arms += [self._arm(_name_of(chosen), "last", chosen) for chosen in last_ones(costs, limit.ratio)]
        every = tuple(range(len(self.record.sites)))
        if not any(one.sites == every for one in arms):
            arms.append(self._arm("all", "all", every))
        if min(costs) > limit.ratio + 1e-6:
            cheapest = self.record.sites[costs.index(min(costs))].path
            raise SelabError(
                f"--budget {limit.quantity}={limit.ratio:g}: no block fits; the cheapest one, at {cheapest}, makes "
                f"it x {min(costs):.4f}; allow more"
            )
        self.record = msgspec.structs.replace(self.record, arms=tuple(arms), remarks=tuple(remarks))
        for remark in remarks:
            say(remark)
        self._save()

    def _controls(
        self, resized: Sequence[tuple[Kind, Resized]], ratios: Mapping[str, float], remarks: list[str]
    ) -> list[Arm]:
        """Return the width and the depth that cost as much as the limit, or the cheapest ones."""
        limit, kinds, arms = self.request.limit.ratio, dict.fromkeys(kind for kind, _ in resized), []
        for kind in kinds:
            own = {one.network.name: one.cost for which, one in resized if which == kind}
            name = dearest({each: ratios[each] for each in own}, limit)
            if ratios[name] > limit:
                remarks.append(f"{name}: costs {ratios[name]:.3f} times the network, more than the limit")
            arms.append(Arm(name=name, kind=kind, params=own[name].params, macs=own[name].macs.all, cost=ratios[name]))
        return arms

    def _times(self, names: Sequence[str], report: Report) -> tuple[dict[str, Latency | None], tuple[str, ...]]:
        """Return the times of networks over that of the original, by their names, and what must be known of them."""
        request = self.request
        job = resolve(
            Request(
                arch=self._arch(ORIGINAL),
                runtime=request.runtime,
                phases=("forward",),
                threads=request.threads,
                budget_s=request.budget_s,
                device=request.options.device,
                input_chw=self.data.input_chw,
            )
        )
        found, told = times(job, [self._arch(name) for name in names], lambda label, _state: report(label, None))
        return {name: found.get(self._arch(name)) for name in names}, told

    def _ratio(self, name: str, latency: Latency | None) -> float:
        if latency is None or latency.ratio is None:
            raise ModelError(
                f"{self._arch(name)}: could not be timed; try it alone: selab profile --arch {self._arch(name)}"
            )
        return latency.ratio

    def _costs(self) -> list[float]:
        return [self._cost_of((place,)) for place in range(len(self.record.sites))]

    def _cost_of(self, chosen: Sequence[int]) -> float:
        base = self.sites.cost
        return cost_of(self.record.sites, chosen, self.request.limit, params=base.params, macs=base.macs.all)

    # ---------------------------------------------------------------------------------------------------- networks
    def _arm(self, name: str, kind: Kind, chosen: tuple[int, ...]) -> Arm:
        sites, base = self.record.sites, self.sites.cost
        return Arm(
            name=name,
            kind=kind,
            sites=chosen,
            params=base.params + sum(sites[one].params for one in chosen),
            macs=base.macs.all + sum(sites[one].macs for one in chosen),
            cost=self._cost_of(chosen),
        )

    def _network(self, name: str, chosen: Sequence[int]) -> Network:
        paths = tuple(self.record.sites[one].path for one in chosen)
        title = f"{self.record.arch} with {len(paths)} of {len(self.record.sites)} blocks"
        return Network(name=name, title=title, sites=paths)

    def _arch(self, name: str) -> str:
        return f"{self.networks}:{name}"

    def _write(self) -> dict[str, Variant]:
        """Write the family of all networks; return its variants."""
        made = dict(self._made)
        for arm in self.record.arms:
            if arm.sites:
                made[arm.name] = self._network(arm.name, arm.sites)
        return write_networks(self.sites, list(made.values()), self.networks)

    def _set(self, arm: Arm) -> None:
        others = {one.name: one for one in self.record.arms}
        self.record = msgspec.structs.replace(self.record, arms=tuple({**others, arm.name: arm}.values()))
        self._save()

    def _save(self) -> None:
        write_atomically(self.path, placement_json(self.record))

    # -------------------------------------------------------------------------------------------------- trainings
    def _train(
        self, variant: Variant, data: Data, epochs: int, seed: int, report: Callable[[TrainingProgress], object]
    ) -> Training:
        request = self.request
        options = msgspec.structs.replace(request.options, epochs=epochs)
        folder = folder_of(variant, data, request.recipe, options, seed, out=self.out)
        return train(variant, data, request.recipe, seed=seed, folder=folder, options=options, report=report)

    def _try(self, arm: Arm, report: Callable[[TrainingProgress], object]) -> Arm:
        """Return an arm with the right answers to the images that were held back."""
        variant = self._write()[arm.name]
        test = self._train(variant, self.choosing, self.request.search_epochs, 0, report).test
        return msgspec.structs.replace(arm, held_out_pct=test.top1_pct)

    def _try_controls(self, report: Report) -> None:
        """Train what the search is compared with, for as long as its trials."""
        for arm in self.record.arms:
            if arm.kind != "tried" and arm.held_out_pct is None:
                label = f"choosing: {arm.name}"
                report(label, None)
                try:
                    self._set(self._try(arm, lambda state, label=label: report(label, state)))  # type: ignore[misc]
                except DivergedError:
                    self._set(msgspec.structs.replace(arm, held_out_pct=0.0))

    def _search(self, report: Report, say: Say) -> None:
        """Let Optuna propose sites, and train them."""
        study, states = self._study()
        known = {arm.sites: arm for arm in self.record.arms}
        costs, wanted = self._costs(), self.request.trials
        say(f"search: {self._trials} of {counted(wanted, 'trial')} done")
        # A small network has few placements within the limit: what is proposed again is not trained again.
        while self._trials < wanted and len(study.trials) < _MOST_ASKED * wanted:
            trial = study.ask()
            scores = [trial.suggest_float(one.path, 0.0, 1.0) for one in self.record.sites]
            chosen = fill(scores, costs, self.request.limit.ratio)
            trial.set_user_attr("sites", list(chosen))
            there = known.get(chosen)
            if there is not None and there.held_out_pct is not None:
                _tell(study, trial, there, states)
                continue
            arm = self._arm(_name_of(chosen), "tried", chosen)
            label = f"trial {self._trials + 1} of {wanted}"
            report(label, None)
            arm = self._tried(trial, arm, lambda state, label=label: report(label, state))  # type: ignore[misc]
            self._set(arm)
            known[chosen] = arm
            _tell(study, trial, arm, states)
        self.record = msgspec.structs.replace(self.record, trials=self._trials)
        self._save()

    @property
    def _trials(self) -> int:
        return sum(one.kind == "tried" and one.held_out_pct is not None for one in self.record.arms)

    def _tried(self, trial: Any, arm: Arm, report: Callable[[TrainingProgress], object]) -> Arm:
        told: dict[int, float] = {}

        def reported(state: TrainingProgress) -> None:
            report(state)
            last = state.last
            if last is None or last.epoch in told:
                return
            told[last.epoch] = last.score_pct
            trial.report(last.score_pct, last.epoch)
            if last.epoch < self.request.search_epochs and trial.should_prune():
                raise _StoppedEarlyError

        self.record = msgspec.structs.replace(self.record, arms=(*self.record.arms, arm))
        try:
            return self._try(arm, reported)
        except _StoppedEarlyError:
            return msgspec.structs.replace(arm, held_out_pct=max(told.values()), stopped=True)
        except DivergedError:
            return msgspec.structs.replace(arm, held_out_pct=0.0)

    def _study(self) -> tuple[Any, Any]:
        optuna = optuna_for("place")
        self.out.mkdir(parents=True, exist_ok=True)
        key = msgspec.json.encode([getattr(self.record, one) for one in _DECIDING]).decode()
        study = optuna.create_study(
            study_name=key,
            storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(self._journal))),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=_WARMUP),
            direction="maximize",
            load_if_exists=True,
        )
        # Another seed after each interruption: the same one would propose the same placements again.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), multivariate=True)
        states = optuna.trial.TrialState
        for one in study.get_trials(states=(states.RUNNING,)):
            study.tell(one.number, state=states.FAIL)
            study.enqueue_trial(one.params)
        if not study.trials:
            # What one would try first: blocks in the last sites.
            for arm in self.record.arms:
                if arm.kind == "last":
                    scores = {one.path: float(place in arm.sites) for place, one in enumerate(self.record.sites)}
                    study.enqueue_trial(scores)
        return study, states

    # ------------------------------------------------------------------------------------------------- the end
    def _finish(self, report: Report, say: Say) -> None:
        """Train the best of each kind on all training images, and measure their times."""
        chosen = finalists(self.record)
        number = len(chosen) * self.request.seeds
        say(f"last: {counted(len(chosen), 'network')} × {counted(self.request.seeds, 'seed')}, on all training images")
        done = 0
        for seed in range(self.request.seeds):
            for name in chosen:
                done += 1
                arm = self.record.arm(name)
                assert arm is not None
                if any(one.seed == seed for one in arm.tests):
                    continue
                label = f"training {done} of {number} (seed {seed}, {name})"
                report(label, None)
                variant = self._write()[name]
                try:
                    test = self._train(
                        variant,
                        self.data,
                        self.record.epochs,
                        seed,
                        lambda state, label=label: report(label, state),  # type: ignore[misc]
                    ).test
                except DivergedError as error:
                    say(f"{label}: {error}")
                    continue
                found = SeedTest(seed=seed, correct=test.right, images=test.images)
                self._set(msgspec.structs.replace(arm, tests=(*arm.tests, found)))
        self._write()
        others = [name for name in chosen if name != ORIGINAL]
        left = [name for name in others if (arm := self.record.arm(name)) is not None and arm.latency is None]
        if left:
            measured, told = self._times(others, report)
            for name in others:
                arm = self.record.arm(name)
                assert arm is not None
                self._set(msgspec.structs.replace(arm, latency=measured[name]))
            self.record = msgspec.structs.replace(self.record, remarks=(*self.record.remarks, *told))
        self.record = msgspec.structs.replace(self.record, complete=True)
        self._write_placed()
        self._save()

    def _write_placed(self) -> None:
        """Write the networks of the last comparison; the one that was found is named `placed` too."""
        made = []
        for name in finalists(self.record):
            arm = self.record.arm(name)
            assert arm is not None
            if arm.sites:
                made.append(self._network(name, arm.sites))
            elif name in self._made:
                made.append(self._made[name])
        found = best(self.record, "found")
        if found is not None:
            made.append(self._network(PLACED, found.sites))
        write_networks(self.sites, made, self.networks)


# What two calls must have in common for one to go on with the other's results.
_DECIDING = (
    *("arch", "block", "data_sha256", "recipe", "epochs", "search_epochs", "held_back", "limit", "runtime", "threads"),
    *("machine", "sites"),
)


def _shown(value: object) -> str:
    text = json.dumps(msgspec.to_builtins(value))
    return text if len(text) <= 60 else f"{text[:60]}…"


def _name_of(chosen: Sequence[int]) -> str:
    return "sites_" + "_".join(map(str, chosen)) if chosen else "none"


def _tell(study: Any, trial: Any, arm: Arm, states: Any) -> None:
    if arm.stopped:
        study.tell(trial, state=states.PRUNED)
    else:
        study.tell(trial, arm.held_out_pct)
