"""Give every network of a comparison the same number of trials for its learning rate and weight decay.

The trials train on nine tenths of the training images and are judged on the tenth that is held back; the test images
choose nothing. The first trial is the recipe as it is. Optuna (TPE) proposes the others, and a training that is behind
the median of those before it is ended early. Every trial is written when it ends, so that a search goes on where it
was stopped, on another machine too.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from selab.errors import DeviceError, RecordError, SelabError
from selab.experiments.compare import folder_of
from selab.models.spec import Variant
from selab.records.files import read_text, write_atomically
from selab.records.types import Frozen, decoded
from selab.training.data import Data
from selab.training.progress import TrainingProgress, duration
from selab.training.recipe import Recipe, adapted
from selab.training.record import Options
from selab.training.train import DivergedError, train
from selab.units import counted

SCHEMA = "selab.tuning/1"
HELD_BACK = 0.1
"""Share of the training images that judges the trials."""
# The learning rate is a tenth to ten times the recipe's, the weight decay lies between these; both on a logarithmic
# scale.
_FACTORS, _DECAYS = (0.1, 10.0), (1e-6, 1e-2)
# Finished trials, and epochs of a training, before one may be ended early.
_STARTUP, _WARMUP = 4, 1
_SEED = 0

Report = Callable[[str, TrainingProgress | None], object]
Say = Callable[[str], object]


class Trial(Frozen, frozen=True, kw_only=True):
    """One training of a search.

    Attributes:
        held_out_pct: right answers to the images that were held back after each epoch; empty if it diverged.
        stopped: whether it was ended early.
    """

    lr: float
    weight_decay: float
    held_out_pct: tuple[float, ...] = ()
    stopped: bool = False


class Tuning(Frozen, frozen=True, kw_only=True):
    """The trials of a network so far.

    Attributes:
        facts_hash: of the network.
        data_sha256: of all images.
        recipe: as it is without tuning.
        epochs: of a trial.
    """

    schema: str = SCHEMA
    arch: str
    facts_hash: str
    data_sha256: str
    recipe: Recipe
    epochs: int
    trials: tuple[Trial, ...] = ()

    @property
    def best(self) -> Trial | None:
        """The finished trial with the most right answers after its last epoch; the first of equals."""
        ended = [one for one in self.trials if one.held_out_pct and not one.stopped]
        return max(ended, key=lambda one: one.held_out_pct[-1], default=None)


class _StoppedEarlyError(Exception):
    """A training is behind the others."""


def searching(seconds: Sequence[float | None], trials: int, epochs: int) -> str:
    """Return in words how many trials there will be and how long they take.

    Args:
        seconds: of a trial of each network; None where nobody knows.
        trials: of each network.
        epochs: of a trial.
    """
    each = f"{counted(trials, 'trial')} × {counted(epochs, 'epoch')} of each of {counted(len(seconds), 'network')}"
    known = [one for one in seconds if one is not None]
    about = f", about {duration(trials * math.fsum(known))} at most" if len(known) == len(seconds) else ""
    return (
        f"--tune: {each}, one after the other{about}; "
        "one that falls behind ends early. Then the trainings. Ctrl-C saves everything, the same command resumes"
    )


def tuned(
    variant: Variant,
    data: Data,
    recipe: Recipe,
    options: Options,
    *,
    trials: int,
    epochs: int,
    out: Path,
    report: Report,
    say: Say = lambda _: None,
    weights: Path | None = None,
) -> Recipe:
    """Return a recipe with a network's best learning rate and weight decay of some trials.

    Args:
        variant: the network.
        data: its training images are divided.
        recipe: with the values to begin with.
        options: of the trainings.
        trials: how many, those of earlier calls among them.
        epochs: of each.
        out: the folder of all results.
        report: called when a trial begins, and with its progress.
        say: called with one line: what is there already, what was found.
        weights: a file that each trial starts from; None for random weights.

    Raises:
        DeviceError: Optuna is not installed.
        SelabError: a training fails, every trial diverged, or what lies there cannot be read.
    """
    choosing = data.held_out(HELD_BACK)
    recipe = adapted(recipe, epochs=options.epochs, batch=options.batch)
    short = msgspec.structs.replace(options, epochs=epochs)
    where = folder_of(variant, choosing, recipe, short, _SEED, out=out, weights=weights)
    path = out / "tuning" / f"{where.name}.json"
    search = _there(path, variant, data, recipe, epochs)
    study = _study(search)
    if search.trials:
        say(f"{variant.name}: {len(search.trials)} of {counted(trials, 'trial')} already done")
    while len(search.trials) < trials:
        trial, asked = _asked(study, recipe, first=not search.trials)
        label = f"{variant.name}: trial {len(search.trials) + 1} of {trials} (lr {asked.lr:.3g}, weight decay "
        label += f"{asked.weight_decay:.3g})"
        report(label, None)
        done = _trained(trial, asked, variant, choosing, recipe, short, out, _labelled(report, label), weights)
        _tell(study, trial, done)
        search = msgspec.structs.replace(search, trials=(*search.trials, done))
        write_atomically(path, msgspec.json.format(msgspec.json.encode(search), indent=1) + b"\n")
    # Of more trials than are asked for, those that are: every network gets as many.
    best = msgspec.structs.replace(search, trials=search.trials[:trials]).best
    if best is None:
        raise SelabError(
            f"{variant.name}: none of {counted(trials, 'trial')} was finished: all diverged or were ended early; "
            "give another --recipe, or more trials"
        )
    say(f"{variant.name}: lr {best.lr:.3g}, weight decay {best.weight_decay:.3g}: best of {counted(trials, 'trial')}")
    return with_values(recipe, best, trials=trials)


def with_values(recipe: Recipe, trial: Trial, *, trials: int | None = None) -> Recipe:
    """Return a recipe with a trial's values: those of the best of some trials, or of one that is tried.

    The learning rate of the warm-up changes in proportion. The number of trials is in the name: a comparison after more
    of them has a record of its own.
    """
    return msgspec.structs.replace(
        recipe,
        name=f"{recipe.name}_tuned{trials or ''}",
        note="" if trials is None else f"learning rate and weight decay: best of {counted(trials, 'trial')}",
        lr=trial.lr,
        warmup_lr=recipe.warmup_lr * trial.lr / recipe.lr,
        weight_decay=trial.weight_decay,
    )


def _labelled(report: Report, label: str) -> Callable[[TrainingProgress], object]:
    return lambda state: report(label, state)


def _there(path: Path, variant: Variant, data: Data, recipe: Recipe, epochs: int) -> Tuning:
    """Return the search as far as it was done before."""
    new = Tuning(
        arch=variant.name, facts_hash=variant.facts_hash, data_sha256=data.sha256, recipe=recipe, epochs=epochs
    )
    if not path.exists():
        return new
    found = decoded(read_text(path).encode(), Tuning, schema=SCHEMA, where=str(path), again="delete it")
    if msgspec.structs.replace(found, trials=(), recipe=recipe, arch=variant.name) != new:
        raise RecordError(f"{path}: is a search of another network or other images; delete it")
    return found


def _trained(
    trial: Any,
    asked: Trial,
    variant: Variant,
    data: Data,
    recipe: Recipe,
    options: Options,
    out: Path,
    report: Callable[[TrainingProgress], object],
    weights: Path | None,
) -> Trial:
    told: list[float] = []

    def reported(state: TrainingProgress) -> None:
        report(state)
        last = state.last
        if last is None or last.epoch <= len(told):
            return
        told.append(last.score_pct)
        trial.report(last.score_pct, last.epoch)
        if last.epoch < (options.epochs or 0) and trial.should_prune():
            raise _StoppedEarlyError

    chosen = with_values(recipe, asked)
    folder = folder_of(variant, data, chosen, options, _SEED, out=out, weights=weights)
    common: dict[str, Any] = {"folder": folder, "options": options, "report": reported, "weights": weights}
    try:
        done = train(variant, data, chosen, seed=_SEED, **common)
    except _StoppedEarlyError:
        return msgspec.structs.replace(asked, held_out_pct=tuple(told), stopped=True)
    except DivergedError:
        return asked
    return msgspec.structs.replace(asked, held_out_pct=tuple(one.score_pct for one in done.epochs))


# ------------------------------------------------------------------------------------------------------------- Optuna
def optuna_for(option: str) -> Any:
    """Import Optuna.

    Args:
        option: what needs it, for the message.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import optuna
        import optuna.storages.journal
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"{option}: needs the package {error.name}, which is not installed; run pip install 'selab[place]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(search: Tuning) -> Any:
    """Return a study that knows the trials so far."""
    optuna = optuna_for("--tune")
    study = optuna.create_study(
        direction="maximize",
        # Another seed after each interruption: the same one would propose the same values again.
        sampler=optuna.samplers.TPESampler(seed=len(search.trials), multivariate=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=_WARMUP),
    )
    states = optuna.trial.TrialState
    for one in search.trials:
        state = states.FAIL if not one.held_out_pct else states.PRUNED if one.stopped else states.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                params=_params(one, search.recipe),
                distributions=_space(optuna),
                intermediate_values=dict(enumerate(one.held_out_pct, start=1)),
                value=one.held_out_pct[-1] if state == states.COMPLETE else None,
                state=state,
            )
        )
    return study


def _space(optuna: Any) -> dict[str, Any]:
    float_between = optuna.distributions.FloatDistribution
    return {"factor": float_between(*_FACTORS, log=True), "weight_decay": float_between(*_DECAYS, log=True)}


def _params(trial: Trial, recipe: Recipe) -> dict[str, float]:
    """Return a trial's values as the search knows them; those of a recipe may lie outside of its bounds."""
    factor, decay = trial.lr / recipe.lr, trial.weight_decay
    return {
        "factor": min(_FACTORS[1], max(_FACTORS[0], factor)),
        "weight_decay": min(_DECAYS[1], max(_DECAYS[0], decay)),
    }


def _asked(study: Any, recipe: Recipe, *, first: bool) -> tuple[Any, Trial]:
    """Return Optuna's next trial and its values; the first one is the recipe as it is."""
    own = Trial(lr=recipe.lr, weight_decay=recipe.weight_decay)
    if first:
        study.enqueue_trial(_params(own, recipe))
    trial = study.ask()
    factor = trial.suggest_float("factor", *_FACTORS, log=True)
    decay = trial.suggest_float("weight_decay", *_DECAYS, log=True)
    return trial, own if first else Trial(lr=recipe.lr * factor, weight_decay=decay)


def _tell(study: Any, trial: Any, done: Trial) -> None:
    states = optuna_for("--tune").trial.TrialState
    if not done.held_out_pct:
        study.tell(trial, state=states.FAIL)
    elif done.stopped:
        study.tell(trial, state=states.PRUNED)
    else:
        study.tell(trial, done.held_out_pct[-1])
