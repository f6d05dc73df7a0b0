"""The only door to every check and every table; `nox -l` lists the sessions."""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_existing_virtualenvs = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
TABLES = Path("docs/tables")
IMAGES = Path("docs/images")
RESULTS = Path("docs/results.md")
TAX_RESULTS = Path("docs/se-tax-results.md")
RUNTIME_RESULTS = Path("docs/runtimes.md")
GATE_RESULTS = Path("docs/gates.md")
# One SE variant of each kind that the SENet paper publishes an ImageNet error for.
DRAWN = (
    "se_shufflenet",
    "se_mobilenet",
    "se_bn_inception",
    "se_resnet50",
    "se_resnet101",
    "se_resnet152",
    "se_resnext50_32x4d",
    "se_resnext101_32x4d",
    "se_inception_resnet_v2",
    "se_vgg16",
)
# Baseline, recipe, seeds; and what a CPU can do in days: baseline, recipe, its epochs, seeds. There each block also
# starts as the identity.
TRAINED = (
    ("small_cnn", "cifar_short_plain", "5"),
    ("resnet20_cifar", "cifar_resnet", "5"),
    ("resnet56_cifar", "cifar_resnet", "3"),
    ("resnet110_cifar", "cifar_resnet110", "3"),
    ("mobilenet_cifar", "cifar_resnet", "3"),
    ("shufflenet_cifar", "cifar_resnet110", "3"),
    ("vgg16_cifar", "cifar_resnet", "3"),
)
# Half an hour to an hour for each training on one core: networks, and how they are trained.
_KERAS = ("--recipe", "keras_cifar10_cnn")
TRAINED_ON_CPU = (
    (("small_cnn", "se_small_cnn+init=identity"), (*_KERAS, "--epochs", "25", "--seeds", "5", "--equal-time")),
    (("small_cnn", "se_small_cnn", "se_small_cnn+init=identity"), (*_KERAS, "--epochs", "25", "--seeds", "5")),
    (("se_small_cnn", "se_small_cnn+init=identity"), (*_KERAS, "--epochs", "25", "--seeds", "5")),
    (
        ("small_cnn", "se_small_cnn", "se_small_cnn+init=identity"),
        (*_KERAS, "--epochs", "5", "--seeds", "3", "--tune", "6", "--tune-epochs", "2"),
    ),
    *(
        ((base, f"se_{base}", f"se_{base}+init=identity"), ("--recipe", "cifar_short", "--seeds", "3"))
        for base in ("resnet20_cifar", "mobilenet_cifar")
    ),
)
PAIRS = (
    "se_mobilenet",
    "se_small_cnn",
    "se_resnet50",
    "se_shufflenet",
    "se_mobilenet_v2",
    "mobilenet_v3_large",
    "se_shufflenet_v2_x1_0",
    "se_resnet18",
    "se_vgg16",
    "se_resnet152",
    "se_resnet34",
    "se_resnet101",
)

# The output of `selab profile --svg` for a record that exists.
SHOWN = "profiles/amd-epyc-2c/sweep/se_resnet50.cpu-b1-224-fp32-t1.json"
SHOW_PROFILE = """
import sys
from pathlib import Path
from selab.cli.measure import _show_profile, _Shown
from selab.records.store import read_record
path, images = map(Path, sys.argv[1:])
shown = _Shown(path=path, json_to=None, svg=images / "profile.svg", look="rich", verbose=False)
_show_profile(read_record(path), shown)
"""


def group(name: str) -> tuple[str, ...]:
    """The requirements of one of pyproject.toml's dependency groups."""
    return nox.project.dependency_groups(PYPROJECT, name)


@nox.session
def tests(session: nox.Session) -> None:
    """Install the project and run every test on two processes; arguments after -- go to pytest (`-n 0`: in one)."""
    session.install("-e", ".", *group("test"))
    # Two processes share two cores: with a thread each they are faster than with two each.
    one_thread = {"OMP_NUM_THREADS": "1"}
    session.run("pytest", "-n", "2", "--dist", "loadgroup", *session.posargs, env=one_thread)


@nox.session
def hostile(session: nox.Session) -> None:
    """Run every command with every kind of bad value and file, and kill it at every write; arguments select cases."""
    session.install("-e", ".", *group("test"))
    session.run("python", "tests/hostile/battery.py", "--kills", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, strictly."""
    # mypy reads the checkout; only the dependencies have to be installed.
    session.install(*PYPROJECT["project"]["dependencies"], *group("types"))
    session.run("mypy")


@nox.session
def interop(session: nox.Session) -> None:
    """Test against torchvision, timm and ONNX Runtime: equal logits, counts and exports (a CUDA build, on the CPU)."""
    # pretrainedmodels 0.7.4 imports six without declaring it.
    libraries = ("torchvision==0.27.1", "timm==1.0.31", "pretrainedmodels==0.7.4", "six", "onnxscript", "onnxruntime")
    session.install("torch==2.12.1", *libraries, "-e", ".", *group("test"))
    session.run("pytest", "tests/interop", "tests/kernels/test_dynamic_shapes.py", *session.posargs)


@nox.session
def detection(session: nox.Session) -> None:
    """Train detectors on a small set in COCO's format until their AP is above 50 % (a CUDA build, on the CPU)."""
    session.install("torch==2.12.1", "torchvision==0.27.1", "-e", ".", *group("test"))
    session.run("pytest", "tests/interop/test_detection_training.py", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the tests of the native code on a build with the address and undefined-behaviour sanitizers."""
    session.install("-e", ".", *group("test"))
    work = Path(session.create_tmp()) / "sanitized"
    shutil.rmtree(work, ignore_errors=True)
    for part in ("selab", "archs", "tests"):
        shutil.copytree(part, work / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(file, work)
    libraries = [
        str(session.run("gcc", f"-print-file-name={name}", external=True, silent=True)).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    checks = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    with session.chdir(work):
        session.run("python", "setup.py", "build_ext", "--inplace", env={"CFLAGS": checks, "LDFLAGS": checks})
        session.run(
            "python",
            *("-P", "-m", "pytest", "tests/kernels", "-m", "not slow", "-p", "no:cacheprovider", *session.posargs),
            env={
                "PYTHONPATH": str(Path.cwd()),
                "LD_PRELOAD": ":".join(libraries),
                # Python and torch keep memory until the process ends.
                "ASAN_OPTIONS": "detect_leaks=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
        )


@nox.session
def fuzz(session: nox.Session) -> None:
    """Compare 2,000 random networks with plain PyTorch, in counting, inserting, fusing and exporting."""
    session.install("-e", ".", *group("test"))
    words = session.posargs or ("-n", "2", "tests/fuzz")
    session.run("pytest", *words, env={"SELAB_FUZZ": session.env.get("SELAB_FUZZ") or "2000"})


@nox.session
def cases(session: nox.Session) -> None:
    """Run the scripts of small hard networks beside the checkout, in $SELAB_SHARED/cases, where that folder is."""
    folder = Path(os.environ.get("SELAB_SHARED", "../shared")) / "cases"
    scripts = sorted(folder.glob("[0-9]*.py"))
    if not scripts:
        session.skip(f"no scripts in {folder}; SELAB_SHARED names another place")
    session.install("-e", ".")
    failed = []
    for script in scripts:
        # A line for everything that is checked, WRONG at the start of some. Those in parentheses are remarks.
        output = str(session.run("python", str(script.resolve()), success_codes=[0, 1], silent=True))
        wrong = [line for line in output.splitlines() if re.match(r"WRONG [^(]|Traceback", line)]
        if wrong or not re.search(r"^ok ", output, re.MULTILINE):
            failed.append(script.name)
            session.log("\n".join([script.name, *(wrong or output.splitlines()[-3:])]))
    if failed:
        session.error(f"{len(failed)} of {len(scripts)} fail: {', '.join(failed)}")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, check metadata and stable ABI, install each into a clean environment, and use it there."""
    session.install(*group("build"))
    built = Path(session.create_tmp()) / "dist"
    shutil.rmtree(built, ignore_errors=True)
    # The wheel is built from the unpacked sdist, which proves that the sdist is complete.
    session.run("python", "-m", "build", "--outdir", str(built), ".")
    (sdist,) = built.glob("*.tar.gz")
    (binary,) = built.glob("*-cp311-abi3-*.whl")
    session.run("twine", "check", "--strict", str(sdist), str(binary))
    session.run("abi3audit", "--strict", "--summary", str(binary))
    session.run("pip", "uninstall", "--yes", "selab", silent=True)
    session.install(str(binary))
    use_installed(session)
    # The dependencies are there from the wheel: the sdist has to bring only itself.
    session.install("--force-reinstall", "--no-deps", str(sdist))
    use_installed(session)


def use_installed(session: nox.Session) -> None:
    """Leave the checkout and use the installed package, its native code included."""
    with tempfile.TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        session.run("selab", "archs")
        session.run("selab", "count", "--arch", "se_mobilenet", "--json", "cost.json")
        check = "from selab.kernels.cpu import native_reason; assert not native_reason(), native_reason()"
        session.run("python", "-c", check)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; broken links and anchors are errors; arguments after -- go to mkdocs."""
    session.install(*group("docs"))
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Run the notebooks of docs/ from start to end, with selab as it is installed."""
    session.install(".", *group("notebooks"))
    session.run("pytest", "--nbmake", "--nbmake-timeout", "300", "docs", *session.posargs)


# What the tax is measured on: arguments of `selab tax`, on a CPU and with a GPU; and networks with SE of their own.
TAXED = (
    ("--arch", "se_mobilenet"),
    ("--arch", "se_resnet50"),
    ("--arch", "se_resnet50", "--phase", "forward_backward", "--batch", "8", "--channels-last"),
)
_H200 = ("--arch", "se_resnet50", "--device", "cuda", "--dtype", "bf16", "--channels-last")
TAXED_ON_GPU = (
    (*_H200, "--batch", "256", "--phase", "forward_backward"),
    _H200,
    (*_H200, "--compile"),
)
TAXED_FOREIGN = ("seresnet50", "mobilenetv3_large_100", "efficientnet_b0", "regnety_008")


def machine_folder(session: nox.Session) -> str:
    """The folder of this machine's records."""
    code = "from selab.bench.machine import machine; print(machine('cuda').name)"
    name = session.run("python", "-c", code, silent=True)
    return f"profiles/{str(name).strip()}"


def has_gpu(session: nox.Session) -> bool:
    """Whether torch finds a CUDA device."""
    found = session.run("python", "-c", "import torch; print(torch.cuda.is_available())", silent=True)
    return "True" in str(found)


def report(session: nox.Session, folder: str) -> None:
    """Render a machine's README from its records."""
    records = ["--profiles", folder] if any(Path(folder).glob("*.json")) else []
    session.run("selab", "table", "report", *records, "--out", f"{folder}/README.md", "--replace")


@nox.session
def tax(session: nox.Session) -> None:
    """Measure what SE costs as others write it and fused, into profiles/<machine>/tax; arguments go to `selab tax`."""
    session.install("-e", ".")
    on_gpu = has_gpu(session)
    for words in (*(TAXED_ON_GPU if on_gpu else ()), *(() if on_gpu else TAXED)):
        session.run("selab", "tax", *words, *session.posargs, "--out", "profiles", "--replace")
    report(session, machine_folder(session))


@nox.session
def tax_foreign(session: nox.Session) -> None:
    """Measure what selab.fuse saves of the tax that timm's own SE networks pay; arguments go to `selab tax`."""
    session.install("torch==2.12.1", "torchvision==0.27.1", "timm==1.0.31", "-e", ".")
    device = ("--device", "cuda") if has_gpu(session) else ()
    for name in TAXED_FOREIGN:
        session.run(
            "selab", "tax", "--arch", f"timm:{name}", *device, *session.posargs, "--out", "profiles", "--replace"
        )
    report(session, machine_folder(session))


def records_of(page: Path) -> str | None:
    """Return the folder that a page names: `[Records](…)`, or `records are in […](…)`; None if it names none."""
    link = r"(?:\[Records\]|records are in \[[^\]]*\])\(\.\./(profiles/[^/)]+)"
    found = re.search(link, page.read_text(encoding="utf-8"))
    return None if found is None else found[1]


@nox.session
def readme(session: nox.Session) -> None:
    """Render the tables and pictures of the docs and README.md again, from the records of the linked machines."""
    session.install("-e", ".")
    linked = re.findall(r"\(\.\./(profiles/[^)/]+)\)", RESULTS.read_text(encoding="utf-8"))
    folder = linked[0] if linked else machine_folder(session)
    for trained in dict.fromkeys(one for one in linked if (Path(one) / "accuracy").is_dir()):
        session.run("selab", "table", "accuracy", "--profiles", trained, "--into", str(RESULTS))
        starts = sorted((Path(trained) / "accuracy").glob("se_small_cnn*"))
        shown = [word for one in starts for word in ("--record", str(one))]
        session.run("selab", "plot", "curves", *shown, "--out", f"{IMAGES}/curves.svg", "--replace")
    taxed = records_of(TAX_RESULTS)
    if taxed is not None:
        session.run("selab", "table", "tax", "--profiles", taxed, "--into", str(TAX_RESULTS))
        for arch, picture in (("se_resnet50", "tax"), ("se_mobilenet", "tax-mobilenet")):
            record = f"{taxed}/tax/{arch}.cpu-b1-224-fp32-held-t1.forward.json"
            out = f"{IMAGES}/{picture}.svg"
            session.run("selab", "plot", "tax", "--record", record, "--out", out, "--replace")
    gates = records_of(GATE_RESULTS)
    if gates is not None:
        session.run("selab", "table", "gates", "--profiles", gates, "--into", str(GATE_RESULTS))
    folder_of_runtimes = records_of(RUNTIME_RESULTS)
    if folder_of_runtimes is not None:
        session.run("selab", "table", "runtimes", "--profiles", folder_of_runtimes, "--into", str(RUNTIME_RESULTS))
        drawn = ("--arch", "se_mobilenet", "--out", f"{IMAGES}/runtimes.svg", "--replace")
        session.run("selab", "plot", "runtimes", "--profiles", folder_of_runtimes, *drawn)
    for name in ("added", "mobile", "paper-2"):
        session.run("selab", "table", name, "--profiles", folder, "--into", str(RESULTS))
    session.run(
        "python", "-c", SHOW_PROFILE, "profiles/amd-epyc-2c/sweep/se_resnet50.cpu-b1-224-fp32-t1.json", str(IMAGES)
    )
    session.run("selab", "plot", "added", "--profiles", folder, "--out", f"{IMAGES}/added.svg", "--replace")
    arches = [word for name in DRAWN for word in ("--arch", name)]
    session.run("selab", "plot", "accuracy", *arches, "--out", f"{IMAGES}/accuracy.svg", "--replace")


@nox.session
def cost_tables(session: nox.Session) -> None:
    """Count the whole zoo and write every cost table under docs/tables; fails if that changes the committed ones."""
    session.install("-e", ".")
    before = {path.name: path.read_bytes() for path in TABLES.glob("*")}
    session.run("selab", "table", "all", "--out", str(TABLES), "--replace")
    after = {path.name: path.read_bytes() for path in TABLES.glob("*")}
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if changed:
        session.error(f"{TABLES}: rendered anew and now different: {', '.join(changed)}; look at them and commit them")


@nox.session
def latency_tables(session: nox.Session) -> None:
    """Measure SE against base; on a CPU, names after -- choose the networks."""
    session.install("-e", ".")
    common = ["--out", "profiles", "--replace"]
    if has_gpu(session):
        for dtype in ("fp32", "bf16"):
            for layout in ([], ["--channels-last"]):
                for batch in ("32", "256"):
                    options = ["--device", "cuda", "--dtype", dtype, "--batch", batch, *layout]
                    session.run("selab", "profile", "--arch", "se_resnet50", *options, *common)
    else:
        for arch in session.posargs or PAIRS:
            session.run("selab", "profile", "--arch", arch, "--thorough", *common)
    report(session, machine_folder(session))


@nox.session
def aa(session: nox.Session) -> None:
    """Measure a network against itself, and against itself made 2 % slower, live; the record goes to profiles/."""
    session.install("-e", ".")
    out = f"{machine_folder(session)}/acceptance/aa.json"
    session.run("python", "tests/benchmarks/aa.py", "--out", out, *session.posargs)


@nox.session
def error_rates(session: nox.Session) -> None:
    """Run `selab profile` again and again to see how often it is wrong; interrupt it, and it goes on the next time."""
    session.install("-e", ".")
    journal = f"{machine_folder(session)}/acceptance/error_rates.jsonl"
    session.run("python", "tests/benchmarks/error_rates.py", "--journal", journal, *session.posargs)


@nox.session
def bench_counts(session: nox.Session) -> None:
    """Time fvcore and thop against our counter, paired, in one run; the record goes to profiles/."""
    session.install("-e", ".")
    out = f"{machine_folder(session)}/acceptance/counts.json"
    session.run("python", "tests/benchmarks/bench_counts.py", "--out", out, *session.posargs)


@nox.session
def bench_gates(session: nox.Session) -> None:
    """Time a pass that reads gates against a plain pass, paired, in one run; the record goes to profiles/."""
    session.install("-e", ".")
    out = f"{machine_folder(session)}/acceptance/gates.json"
    session.run("python", "tests/benchmarks/bench_gates.py", "--out", out, *session.posargs)


@nox.session
def bench_depthwise(session: nox.Session) -> None:
    """Time blocks whose squeeze is taken in the pass of the depthwise convolution (a pilot); needs a C compiler."""
    session.install("-e", ".")
    out = f"{machine_folder(session)}/acceptance/depthwise.json"
    session.run("python", "tests/benchmarks/bench_depthwise.py", "--out", out, *session.posargs)


@nox.session
def runtimes(session: nox.Session) -> None:
    """Export for ONNX Runtime, OpenVINO, ExecuTorch and AOTInductor, and test what they run."""
    session.install("-e", ".[onnx,openvino,executorch,aoti,imagenet]", *group("test"))
    session.run("pytest", "tests/runtimes", "tests/deploy", *session.posargs)


COMPILED = "torch.compile"
RUNTIMES = ("onnxruntime", "openvino", "executorch", "aoti", COMPILED)
DEPLOYED = (
    *("se_mobilenet", "se_mobilenet_v2", "mobilenet_v3_large", "se_shufflenet", "se_shufflenet_v2_x1_0"),
    *("efficientnet_b0", "mnasnet_a1", "pp_lcnet_x1_0", "se_resnet50"),
)
"""The networks of the table of runtimes."""


def measure_runtimes(session: nox.Session, runtimes: Sequence[str]) -> None:
    """Measure what is not in the table yet, in fp32 and in int8; words after -- go to `selab profile`."""
    folder = machine_folder(session)
    # Not a sweep, whose cells have one row: the table shows all cores too.
    for dtype, arch, runtime in product(("fp32", "int8"), DEPLOYED, runtimes):
        compiled = runtime == COMPILED
        if compiled and dtype == "int8":
            continue
        how, name = (["--compile", "--freeze"], "frozen-held") if compiled else (["--runtime", runtime], runtime)
        if not (Path(folder) / f"{arch}.cpu-b1-224-{dtype}-{name}-t1.forward.json").exists():
            cell = ["--arch", arch, *how, "--dtype", dtype, "--phase", "forward", "--budget", "40"]
            images = [] if compiled else session.posargs
            session.run("selab", "profile", *cell, "--out", "profiles", *images)
    report(session, folder)


@nox.session
def runtime_tables(session: nox.Session) -> None:
    """Measure what SE costs in the runtimes that ship; goes on where it was stopped; --images FOLDER after --."""
    session.install("-e", ".[onnx,openvino,executorch,aoti,imagenet]")
    measure_runtimes(session, RUNTIMES)


def install_with_litert(session: nox.Session, *more: str) -> None:
    """Install the project beside LiteRT's converter, which needs a newer torch than the project names."""
    needed = PYPROJECT["project"]["dependencies"]
    session.install("litert-torch>=0.10", "pillow", *(one for one in needed if not one.startswith("torch")), *more)
    session.install("--no-deps", "-e", ".")


@nox.session
def runtimes_litert(session: nox.Session) -> None:
    """Export for LiteRT, which brings a torch of its own, and test what it runs."""
    install_with_litert(session, *group("test"))
    # A plugin that the converter's dependencies bring does not load with every pytest.
    session.run("pytest", "-p", "no:anyio", "tests/runtimes", "-k", "litert", *session.posargs)


@nox.session
def runtime_tables_litert(session: nox.Session) -> None:
    """Measure what SE costs in LiteRT, as `runtime_tables` does in the others."""
    install_with_litert(session)
    measure_runtimes(session, ["litert"])


@nox.session
def gpu(session: nox.Session) -> None:
    """Run everything that needs a CUDA device, in order of value; goes on where it was stopped; see -- --help."""
    session.install("-e", ".", *group("test"))
    session.run("python", "tests/benchmarks/gpu.py", *session.posargs)
    if has_gpu(session) and Path(machine_folder(session)).is_dir():
        report(session, machine_folder(session))


@nox.session
def accuracy_tables(session: nox.Session) -> None:
    """Train with SE and without on CIFAR-10, several seeds each; goes on where it was stopped; --data-dir after --."""
    session.install("-e", ".")
    # Finished trainings in profiles/runs are taken over, so that the records may be made anew.
    common = ["--data", "cifar10", "--replace", "--out", "profiles", *session.posargs]
    if has_gpu(session):
        common += ["--device", "cuda", "--channels-last"]
        for base, recipe, seeds in TRAINED:
            session.run("selab", "compare", base, f"se_{base}", "--recipe", recipe, "--seeds", seeds, *common)
    else:
        for arms, how in TRAINED_ON_CPU:
            session.run("selab", "compare", *arms, *how, *common)
    report(session, machine_folder(session))


@nox.session
def bench_data(session: nox.Session) -> None:
    """Time loading and augmentation, and whole training steps, beside torchvision's pipeline; DATA_DIR after --."""
    session.install("torch==2.12.1", "torchvision==0.27.1", "-e", ".")
    out = f"{machine_folder(session)}/acceptance/data.json"
    session.run("python", "tests/benchmarks/bench_data.py", "--out", out, "--data", *session.posargs)


@nox.session
def bench_training(session: nox.Session) -> None:
    """Time whole training steps against plain PyTorch with torchvision's loader, paired; DATA_DIR after --."""
    session.install("torch==2.12.1", "torchvision==0.27.1", "-e", ".")
    out = f"{machine_folder(session)}/acceptance/training.json"
    session.run("python", "tests/benchmarks/bench_training.py", "--out", out, "--data", *session.posargs)


@nox.session
def bench_tables(session: nox.Session) -> None:
    """Time the whole zoo's cost by fvcore, thop and ours, network by network; the record goes to profiles/."""
    session.install("-e", ".")
    out = f"{machine_folder(session)}/acceptance/tables.json"
    session.run("python", "tests/benchmarks/bench_tables.py", "--out", out, *session.posargs)
