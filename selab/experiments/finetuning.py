"""Train a folded network further, and the network before likewise, so that training is not taken for folding."""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import safetensors.torch
from torch import nn

from selab.deploy.target import scratch
from selab.errors import SelabError
from selab.experiments.compare import folder_of
from selab.experiments.folding import REPORTING, Files, Folded, state_of
from selab.experiments.judged import Judged, JudgedGraph
from selab.judging.folding import Finetuned
from selab.judging.loss import loss_of
from selab.judging.worth import answers
from selab.models.catalog import find
from selab.models.checkpoint import load
from selab.models.spec import Variant
from selab.records.files import write_atomically
from selab.training.progress import TrainingProgress
from selab.training.recipe import Recipe, default_recipe, find_recipe, finetuning, scaling_of
from selab.training.record import Options
from selab.training.train import train

Report = Callable[[str, TrainingProgress | None], object]
BEFORE, FOLDED = "as it was", "folded"


def recipe_for(network: Judged, epochs: int) -> Recipe:
    """Return how a network is trained further: by the end of the recipe in its weights' file, or of the default one.

    Raises:
        SelabError: the images have no labels.
    """
    data = network.seen.data
    if isinstance(network, JudgedGraph):
        raise SelabError(f"--finetune: {network.name} is an ONNX network; only networks in PyTorch are trained")
    if data is None:
        raise SelabError("--finetune: needs images with labels; give --data instead of --images")
    in_memory = getattr(data, "image", None) is None
    trained_by = default_recipe(network.variant.family, in_memory=in_memory)
    # The weights may be of another program, or of a recipe in a file that is elsewhere.
    with suppress(SelabError):
        named = find_recipe(network.metadata.get("recipe", ""))
        trained_by = named if named.suits(in_memory=in_memory) else trained_by
    scaling = scaling_of(network.metadata, place=network.weights)
    return msgspec.structs.replace(finetuning(trained_by, epochs), scaling=scaling)


def finetuned(
    folded: Folded,
    network: Judged,
    files: Files,
    recipe: Recipe,
    report: Report,
    say: Callable[[str], object] = lambda _: None,
) -> Folded:
    """Return a folded network that was trained further; its weights go into `files.finetuned`.

    The network as it was is trained likewise. Both trainings resume when they are interrupted; their folders are in
    `runs` beside the network.

    Args:
        folded: as it was written.
        network: as it was, with images that have labels.
        files: of the folded network.
        recipe: of `recipe_for`.
        report: called with the label of a training and its progress.
        say: called with one line where a training resumes or was finished.

    Raises:
        SelabError: as `selab.training.train.train`; what was folded is kept.
    """
    arms = [
        (BEFORE, network.variant, network.model),
        (FOLDED, find(files.arch), network.running(folded.network)),
    ]
    found, seconds = [], 0.0
    for label, variant, model in arms:
        trained, took = _trained(label, variant, model, network, files, recipe, report, say)
        found.append(trained)
        seconds += took
    own, further, after = answers(lambda: network.batches(REPORTING), [network.model, *found])
    described = {"folded_from": network.name, "finetuned": f"{recipe.epochs} epochs of {recipe.name}"}
    described |= network.preparation
    assert files.finetuned is not None
    write_atomically(files.finetuned, safetensors.torch.save(state_of(found[1]), described))
    done = Finetuned(
        epochs=recipe.epochs,
        recipe=recipe.name,
        lr=recipe.lr,
        loss=loss_of(further, after),
        alone=loss_of(own, further),
        seconds=seconds,
    )
    return replace(folded, network=found[1], record=msgspec.structs.replace(folded.record, finetuned=done))


def _trained(
    label: str,
    variant: Variant,
    model: nn.Module,
    network: Judged,
    files: Files,
    recipe: Recipe,
    report: Report,
    say: Callable[[str], object],
) -> tuple[nn.Module, float]:
    """Return a copy of a network that was trained further, and the seconds that it took."""
    data = network.seen.data
    assert data is not None
    options = Options(device="cuda" if network.device.startswith("cuda") else "cpu")
    with scratch() as temporary:
        start = temporary / "start.safetensors"
        write_atomically(start, safetensors.torch.save(state_of(model)))
        folder = folder_of(variant, data, recipe, options, 0, out=files.record.parent, weights=start)
        report(label, None)
        done = train(
            variant,
            data,
            recipe,
            seed=0,
            folder=folder,
            options=options,
            report=lambda state: report(label, state),
            say=lambda text: say(f"{label}: {text}"),
            weights=start,
        )
    made = copy.deepcopy(model)
    load(made, Path(done.weights))
    return made, done.seconds
