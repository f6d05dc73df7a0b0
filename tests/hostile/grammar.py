"""Hostile command lines from a grammar: every command, every option, and every kind of value and file that it may get.

A case is a command that works with one word replaced by a bad one. What a value is for (a number, a file to read, a
file to write, a network) decides by what it is replaced.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import tiny_family
import typer

from selab.cli.main import app

TOML = "nets.toml"
SE = f"{TOML}:se_tiny"
TRAINING = ("--data", "synthetic", "--epochs", "1", "--threads", "1")
# Command lines that work, and soon; `{}` stands for nothing. Positional words come last.
WORKING = {
    "archs": ["resnet18"],
    "show": [SE],
    "sites": ["--arch", SE],
    "count": ["--arch", SE],
    "profile": ["--arch", SE, "--budget", "0.1", "--threads", "1", "--phase", "forward"],
    "tax": ["--arch", SE, "--budget", "0.1", "--impl", "fused"],
    "sweep": ["--arch", SE, "--budget", "0.1"],
    "timeline": ["--arch", SE, "--steps", "1"],
    "roofline": ["--arch", SE, "--as", "h200"],
    "machine": [],
    "doctor": [],
    "train": ["--arch", f"{TOML}:tiny", *TRAINING],
    "eval": ["--arch", f"{TOML}:tiny", "--weights", "good.safetensors", "--data", "synthetic"],
    "compare": [*TRAINING, "--jobs", "1", "--seeds", "1", "--no-latency", f"{TOML}:tiny", f"{TOML}:se_tiny"],
    "gates": ["--arch", SE, "--weights", "good.safetensors", "--data", "synthetic", "--most", "10"],
    "blocks": ["--arch", SE, "--weights", "good.safetensors", "--data", "synthetic", "--most", "10"],
    "fold": [
        *("--arch", SE, "--weights", "good.safetensors", "--data", "synthetic", "--most", "10"),
        *("--max-drop", "100", "--budget", "0", "--replace"),
    ],
    "place": [
        *("--arch", f"{TOML}:tiny", *TRAINING, "--budget", "params=1.5", "--insert", "auto", "--trials", "1"),
        *("--search-epochs", "1", "--seeds", "1", "--measure", "1"),
    ],
    "export": ["--arch", f"{TOML}:se_tiny", "--to", "onnx", "--replace"],
    "import": [
        *("--arch", SE, "--from", "executorch", "--on-device", "a phone", "--replace"),
        *("--base", "timed.txt", "--variant", "timed-with-se.txt"),
    ],
    "check": ["budgets.toml"],
    "diff": ["record.json", "record.json"],
    "schema": [],
    "table": ["reduction"],
    "plot": ["--x", "params", "--y", "macs", "--arch", "se_resnet18", "--replace", "cost"],
    "new family": ["mine"],
    "new block": ["mine"],
    "weights list": [],
    "weights convert": [
        "--from",
        "torchvision",
        "--arch",
        "mobilenet_v2",
        "--dry-run",
        "good.safetensors",
        "out.safetensors",
    ],
}
# They train or measure when nothing is wrong, which takes seconds.
SLOW = ("profile", "tax", "sweep", "timeline", "train", "eval", "compare", "gates", "blocks", "fold", "place", "export")
NUMBERS = ["", "0", "-1", "1e400", "nan", "inf", "9" * 5000, "1" + "0" * 400, "0x10", "1 2", "٣", "\0", "--"]
TEXTS = [
    "",
    "nonsense",
    "\udc80",
    "a" * 300,
    "é→",
    "-",
    "../..",
    "%s{}",
    "[red]",
    "\x1b[31m\n",
    "a,b,,",
    "\0",
    "=",
    "+",
    ":",
]
CHANGES = [
    "",
    "x",
    "reduction",
    "reduction=",
    "reduction=0",
    "reduction=" + "9" * 5000,
    "reduction=4,reduction=4",
    "stages=1-99999999999",
    "stages=4-2",
    "stages=-",
    "block=nope",
    "block=os.py:path",
    "block=missing.py:Block",
    "block=os:getcwd",
    "block=raises.py:Outside",
    "block=se,bias=maybe",
    "sites=" + "*" * 300,
    "sites=[",
    "gate=\udc80",
    "placement=\n",
    "kernel_size=3",
    "\0",
]
SITES = ["", "nope", "auto+", "*" * 500, "[", "**.**.**", "\udc80", "\0", "conv", "../x", "0.0.0.0"]
NETWORKS = [
    "",
    ":",
    "nope",
    "nope" * 1000,
    "x.toml",
    f"{TOML}:nope",
    f"{TOML}:",
    "folder.toml",
    "folder:x",
    "missing.py:Net",
    "raises.py:",
    "raises.py:nope",
    "raises.py:Outside",
    "raises.py:Silent",
    "raises.py:Leaves",
    "raises.py:Constructor",
    "raises.py:number",
    "raises.py:Ends",
    "raises.py:Empty",
    "syntax.py:Net",
    "binary.py:Net",
    "exits.py:Net",
    "loop.toml:x",
    "pipe.toml:x",
    "deep.toml:x",
    "digits.toml:x",
    "binary.toml:x",
    "empty.toml:x",
    "utf16.toml:x",
    "shell.toml:x",
    "cyclic.toml:a",
    "/dev/zero.toml",
    "os:getcwd",
    "no.such.module:x",
    "timm:",
    "torchvision:\n",
    "resnet18+",
    "resnet18+reduction=",
    "resnet18+sites=**",
    "\udc80",
    "nul\0.toml:x",
    "n" * 300 + ".toml:x",
    "-",
    "[bold]",
]
# Names of `make_files`, and places of the system.
READ = [
    "",
    "missing",
    "empty",
    "folder",
    "binary",
    "nul",
    "utf16",
    "pipe",
    "loop",
    "socket",
    "deep.json",
    "digits.json",
    "list.json",
    "record.partial",
    "deep.toml",
    "digits.toml",
    "infinite.toml",
    "nets.toml",
    "evil.pt",
    "truncated.safetensors",
    "long.safetensors",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "n" * 256,
    "nul\0",
    "\udc80",
    "empty/below",
]
WRITE = [
    "",
    "folder",
    "missing/deep/file.svg",
    "empty/below.svg",
    "pipe",
    "loop",
    "dangling.svg",
    "socket",
    "/dev/full",
    "/dev/null",
    "/proc/nope.svg",
    "n" * 256,
    "n" * 250 + ".svg",
    "nul\0.svg",
    "\udc80.svg",
    "new\nline.svg",
    "old.svg",
    "-",
]
FOLDERS = [
    "",
    "empty",
    "missing",
    "folder",
    "poisoned",
    "garbage",
    "loop",
    "pipe",
    "/dev/null",
    "/proc",
    "n" * 256,
    "nul\0",
    "\udc80",
]

OPTIONS = {
    **dict.fromkeys(
        [
            "--batch",
            "--resolution",
            "--threads",
            "--seed",
            "--processes",
            "--budget",
            "--steps",
            "--epochs",
            "--accumulate",
            "--workers",
            "--resize",
            "--crop",
            "--seeds",
            "--num-classes",
            "--depth",
            "--reduction",
            "--most",
            "--max-drop",
            "--max-error",
            "--finetune",
            "--trials",
            "--search-epochs",
            "--measure",
            "--tune",
            "--tune-epochs",
            "--jobs",
        ],
        NUMBERS,
    ),
    **dict.fromkeys(
        [
            "--device",
            "--dtype",
            "--memory-format",
            "--mode",
            "--runtime",
            "--spelling",
            "--to",
            "--on-device",
            "--phase",
            "--format",
            "--amp",
            "--data",
            "--by",
            "--impl",
            "--as",
            "--x",
            "--y",
            "--workload",
            "--only",
            "--block",
            "--placement",
            "--stages",
            "--gate",
            "--ray",
            "--from",
            "--recipe",
            "--head",
            "--on",
            "--ema",
            "--classes",
        ],
        TEXTS,
    ),
    **dict.fromkeys(["--arch", "--baseline"], NETWORKS),
    "--input": [
        "",
        "3",
        "3x3",
        "0x3x3",
        "3x-3x3",
        "3x3x99999999999",
        "x".join(["9" * 5000] * 3),
        "axbxc",
        "3x3x3x3",
        "\0",
        "=3x3x3",
    ],
    "--se": CHANGES,
    "--insert": SITES,
    **dict.fromkeys(["--weights", "--record", "--classes-file", "--into", "--base", "--variant"], READ),
    **dict.fromkeys(["--json", "--svg", "--table"], WRITE),
    **dict.fromkeys(["--out", "--profiles", "--data-dir", "--pictures", "--images"], FOLDERS),
}
# A file here, a folder elsewhere.
OF_COMMAND = {
    ("plot", "--out"): WRITE,
    ("table", "--out"): WRITE,
    ("roofline", "--out"): WRITE,
    ("export", "--out"): WRITE,
    ("place", "--budget"): [*TEXTS, "latency", "latency=", "latency=1", "latency=nan", "bytes=1.1", "macs=1e400"],
}
ARGUMENTS = {
    "archs": TEXTS,
    "show": NETWORKS,
    "compare": NETWORKS,
    "check": READ,
    "diff": READ,
    "table": TEXTS,
    "plot": TEXTS,
    "new family": TEXTS,
    "new block": TEXTS,
    "weights convert": READ,
}


@dataclass(frozen=True)
class Case:
    """A command line; `slow` where nothing but the measured time tells it from one that is refused."""

    words: tuple[str, ...]
    slow: bool

    @property
    def name(self) -> str:
        """Return the words, shortened, as a name of a test."""
        return " ".join(ascii(word)[1:-1][:40] or "''" for word in self.words)


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command of the program by its words."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {key}": value for key, value in inner.items()}
    return found


def options_of(command) -> list[tuple[str, bool]]:
    """The options of a command, by their first name, and whether each is a flag."""
    return [
        (one.opts[0], one.is_flag) for one in command.params if one.param_type_name == "option" and one.name != "help"
    ]


def cases() -> list[Case]:
    """Every case, in the order of the commands."""
    found = {}
    for name, command in commands().items():
        working = WORKING[name]
        for option, is_flag in options_of(command):
            if option == "--all":
                continue  # it is right, and counts every network
            if is_flag:
                found[(*name.split(), *working, option, option)] = True
                found[(*name.split(), option)] = False
                continue
            for value in OF_COMMAND.get((name, option), OPTIONS[option]):
                found[(*name.split(), option, value, *_without(working, option))] = name in SLOW
        for value in ARGUMENTS.get(name, ()):
            found[(*name.split(), *working[:-1], value)] = name in SLOW
            if name in ("diff", "weights convert"):
                found[(*name.split(), *working[:-2], value, working[-1])] = False
    for value in FOLDERS:
        for table in ("latency", "accuracy", "tax", "report"):
            found[("table", table, "--profiles", value)] = False
        for picture in ("added", "accuracy"):
            found[("plot", picture, "--profiles", value)] = False
    for value in READ:
        for picture in ("curves", "tax"):
            found[("plot", picture, "--record", value)] = False
    found |= dict.fromkeys([("nope",), ("",), ("\0",), ("--nope",), ("new",), ("weights", "nope"), ("--debug",)], False)
    return [Case(words=words, slow=slow) for words, slow in found.items()]


def _without(words: list[str], option: str) -> list[str]:
    """Words without an option and its value."""
    kept = list(words)
    while option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept


# ---------------------------------------------------------------------------------------------------------------- files
RAISES = """
import torch
from torch import nn

number = 5


class Fault(BaseException):
    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


class Outside(nn.Module):
    def forward(self, x):
        raise BaseException("outside")


class Silent(nn.Module):
    def forward(self, x):
        raise Fault


class Leaves(nn.Module):
    def forward(self, x):
        raise SystemExit


class Constructor(nn.Module):
    def __init__(self):
        raise Fault


class Ends(nn.Module):
    def forward(self, x):
        return {"a": [x, None]}


class Empty(nn.Module):
    pass
"""


def make_files(folder: Path) -> None:
    """Fill a folder with everything that the words of the cases name."""
    import msgspec
    import safetensors.torch

    from selab.experiments.profiling import count_record
    from selab.records.types import to_json

    files: dict[str, str | bytes] = {
        "tiny_networks.py": tiny_family.MODULE,
        TOML: tiny_family.TOML,
        "raises.py": RAISES,
        "syntax.py": "def (",
        "exits.py": "raise SystemExit('bye')",
        "binary.py": bytes(range(256)),
        "empty": "",
        "empty.toml": "",
        "binary": bytes(range(256)),
        "binary.toml": bytes(range(256)),
        "nul": b"\0" * 100,
        "utf16": "x = 1".encode("utf-16"),
        "utf16.toml": tiny_family.TOML.encode("utf-16"),
        "deep.toml": "a = " + "[" * 20_000 + "]" * 20_000,
        "digits.toml": tiny_family.TOML.replace("10", "9" * 5000),
        "infinite.toml": "[budgets.x]\nparams = inf\n",
        "shell.toml": tiny_family.TOML.replace("tiny_networks:build", "os:system"),
        "cyclic.toml": tiny_family.TOML.replace("tiny", "a").replace(
            'title = "Tiny"', 'title = "Tiny"\nbaseline = "se_a"'
        ),
        "deep.json": "[" * 100_000 + "]" * 100_000,
        "digits.json": '{"schema": ' + "9" * 5000 + "}",
        "list.json": "[1, 2]",
        "timed.txt": "Model executed successfully 50 time(s) in 123.500000 ms.",
        "timed-with-se.txt": "Model executed successfully 50 time(s) in 131.500000 ms.",
        "budgets.toml": f'[budgets.b]\narch = "{folder / "nets.toml"}:se_tiny"\nparams = 1000000\n',
        "evil.pt": b"cos\nsystem\n(S'touch hacked'\ntR.",
        "truncated.safetensors": b"\x10\0\0\0\0\0\0\0{",
        "long.safetensors": b"\xff" * 16,
        "old.svg": "old",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    safetensors.torch.save_file(tiny_family.build().state_dict(), folder / "good.safetensors")
    record = to_json(count_record("se_small_cnn", batch=1, counters=False))
    (folder / "record.json").write_bytes(record)
    (folder / "record.partial").write_bytes(record[: len(record) // 2])
    for name in ("folder", "folder.toml", "poisoned", "garbage"):
        (folder / name).mkdir()
    (folder / "poisoned" / ".x.json.abc.json").write_bytes(record[:100])
    (folder / "poisoned" / ".selab-0123456789abcdef.tmp").write_bytes(record[:100])
    (folder / "poisoned" / "x.json").write_bytes(record)
    changed = msgspec.json.decode(record)
    changed["cost"]["params"] = -5
    for number, content in enumerate(
        [b"", b"{", b"[]", b"null", msgspec.json.encode(changed), b"\xff\xfe", b"[" * 10**5]
    ):
        (folder / "garbage" / f"{number}.json").write_bytes(content)
    for name in ("loop", "loop.toml"):
        (folder / name).symlink_to(name)
    (folder / "dangling.svg").symlink_to("not there.svg")
    for name in ("pipe", "pipe.toml"):
        os.mkfifo(folder / name)
    here = os.getcwd()  # noqa: PTH109 - the name of a socket is short only from its folder
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    os.chdir(here)
