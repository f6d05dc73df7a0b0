"""The options of commands that train or test: which images, how they are prepared, and how networks are trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from selab.cli.options import DATA, TIME, TRAINING, Amp, natural, option
from selab.records.bounds import MOST_PIXELS, MOST_PROCESSES, MOST_THREADS
from selab.records.types import Device

DataName = Literal["cifar10", "cifar100", "synthetic", "imagenet", "places365", "folder", "coco", "shapes"]


@dataclass(kw_only=True)
class DataOptions:
    """Which images to train or test on."""

    data: Annotated[
        DataName,
        option(
            "--data", DATA, "cifar10, cifar100, synthetic, imagenet, places365, folder, coco or shapes.", metavar="NAME"
        ),
    ] = "cifar10"
    data_dir: Annotated[
        Path, option("--data-dir", DATA, "Where the images are, or are downloaded to.", metavar="FOLDER")
    ] = Path("data")
    download: Annotated[bool, option("--download/--no-download", DATA, "Fetch a data set that is not there.")] = True
    workers: Annotated[
        int | None,
        natural(
            "--workers",
            DATA,
            "Processes that decode an image folder; by default one per core, at most 8.",
            least=0,
            most=MOST_PROCESSES,
            show_default=False,
        ),
    ] = None
    classes_file: Annotated[
        Path | None,
        option("--classes-file", DATA, "Classes of an image folder, one a line, in order.", metavar="FILE"),
    ] = None

    @property
    def in_memory(self) -> bool:
        """Whether the images have one size and lie in memory; else they are files in a folder."""
        return self.data not in ("imagenet", "places365", "folder", "coco", "shapes")

    @property
    def boxed(self) -> bool:
        """Whether they are images with boxes, for detectors."""
        return self.data in ("coco", "shapes")


@dataclass(kw_only=True)
class PreparationOptions:
    """How the images of a folder are prepared for a test."""

    recipe: Annotated[
        str | None,
        option("--recipe", DATA, "Prepare an image folder as this recipe does.", metavar="NAME"),
    ] = None
    resize: Annotated[
        int | None,
        natural("--resize", DATA, "Shorter side of an image, in pixels.", most=MOST_PIXELS),
    ] = None
    crop: Annotated[
        int | None,
        natural("--crop", DATA, "Side of the centre crop, in pixels.", most=MOST_PIXELS),
    ] = None


@dataclass(kw_only=True)
class TrainOptions:
    """How to train."""

    recipe: Annotated[
        str | None,
        option(
            "--recipe",
            TRAINING,
            "A name, or FILE.toml[:NAME]; by default one for the network and data.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None
    epochs: Annotated[int | None, natural("--epochs", TIME, "Instead of the recipe's; its schedule shrinks too.")] = (
        None
    )
    batch: Annotated[
        int | None,
        natural("--batch", TRAINING, "Images per step, all processes together."),
    ] = None
    device: Annotated[Device, option("--device", TRAINING, "cpu or cuda.", metavar="NAME")] = "cpu"
    amp: Annotated[Amp, option("--amp", TRAINING, "Mixed precision: off, bf16 or fp16.", metavar="NAME")] = "off"
    channels_last: Annotated[
        bool | None,
        option("--channels-last/--no-channels-last", TRAINING, "NHWC; by default on a CPU or with --amp."),
    ] = None
    fused: Annotated[
        bool | None, option("--fused/--no-fused", TRAINING, "Through selab.fuse; by default on a CPU.")
    ] = None
    compiled: Annotated[bool, option("--compile", TRAINING, "Run through torch.compile.")] = False
    graphed: Annotated[
        bool, option("--cuda-graph", TRAINING, "Replay forward and backward as CUDA graphs: for small networks.")
    ] = False
    accumulate: Annotated[
        int, natural("--accumulate", TRAINING, "Micro-batches per step; the batch stays the same.")
    ] = 1
    threads: Annotated[
        int | None, natural("--threads", TRAINING, "CPU threads; by default torch's own choice.", most=MOST_THREADS)
    ] = None
