"""What README and docs show is true: links lead somewhere, commands parse, Python runs, new import paths exist."""

import importlib
import importlib.util
import itertools
import re
import shlex

import pytest
import typer.main

from selab.cli.main import app
from selab.experiments.profiling import count_record
from selab.experiments.tax_record import read_tax_record
from selab.records import store
from selab.report import profiles
from selab.report import tax as report_tax

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md")
SKIPPED = {
    "resnet50_v1_5.safetensors": "a file that the command before makes from downloaded weights",
    "/data/imagenet": "ImageNet",
    "folded/se_small_cnn": "files that the command before makes from trained weights",
}
# tests/test_extending.py runs these, which need the files that the page shows.
RUN_ELSEWHERE = ("docs/extending.md",)


def pages(root):
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for pattern in PAGES
        for path in sorted(root.glob(pattern))
    }


def blocks(text, *languages):
    return [code for name, code in re.findall(r"^```(\w+).*?\n(.*?)^```", text, re.M | re.S) if name in languages]


def commands(text):
    """Every `selab …` of the shell blocks, as words; shell variables stand for numbers."""
    for block in blocks(text, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\s*\$?\s*|\s*\w+=\S+\s+)(selab\s.*)", re.sub(r"\$\w+", "0", line))
            if found and "…" not in line:
                yield shlex.split(found[1], comments=True)[1:]


def parse(words):
    """Parse a command without running it; click raises where an option or an argument is wrong."""
    command, context = typer.main.get_command(app), None
    while True:
        context = command.make_context(words[0] if words else "selab", list(words), parent=context)
        rest = [*context._protected_args, *context.args] if hasattr(command, "commands") else []
        if not rest:
            return
        name, command, words = command.resolve_command(context, rest)
        assert command is not None, name


def test_commands_are_found():
    text = "```sh\n$ selab count --arch a  # why\nA=1 selab b \\\n  --c $d\npip install x\n```\n"
    assert list(commands(text)) == [["count", "--arch", "a"], ["b", "--c", "0"]]


@pytest.mark.parametrize("words", [["count", "--arc", "a"], ["frobnicate"], ["profile"]])
def test_a_wrong_command_does_not_parse(words):
    with pytest.raises(Exception, match=r"(?i)no such|missing|required"):
        parse(words)


def test_commands_parse(root):
    seen = 0
    for name, text in pages(root).items():
        for words in commands(text):
            try:
                parse(words)
            except Exception as error:
                pytest.fail(f"{name}: selab {shlex.join(words)}: {error}")
            seen += 1
    assert seen > 30


# Of every command, and of other programs.
FOREIGN_OPTIONS = {"--help", "--signal", "--shm-size", "--logdir"}


def options_of(command):
    found = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for child in getattr(command, "commands", {}).values():
        found |= options_of(child)
    return found


def test_options_named_in_the_prose_exist(root):
    known = options_of(typer.main.get_command(app)) | FOREIGN_OPTIONS
    assert "--hold-heap" in known
    unknown = {}
    for name, text in pages(root).items():
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        named = {option for code in inline for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)}
        unknown |= {name: sorted(named - known)} if named - known else {}
    assert unknown == {}


def test_links_lead_to_files(root):
    broken = []
    for name, text in pages(root).items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        targets = re.findall(r"\]\(((?![a-z]+:)[^()\s#]+)(?:#[^()\s]*)?\)", prose)
        broken += [f"{name}: {target}" for target in targets if not ((root / name).parent / target).exists()]
    assert broken == []


def runnable(root):
    return [name for name, text in pages(root).items() if blocks(text, "python") and name not in RUN_ELSEWHERE]


RUN_HERE = (
    *("README.md", "docs/install.md", "docs/insertion.md", "docs/se-tax.md", "docs/api.md", "docs/weights.md"),
    *("docs/gates.md", "docs/detection.md"),
)


@pytest.mark.parametrize("name", RUN_HERE)
def test_python_runs(root, name, tmp_path, monkeypatch):
    """The Python of a page, block after block, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in blocks((root / name).read_text(encoding="utf-8"), "python"):
        if not any(word in code for word in SKIPPED):
            exec(compile(code, name, "exec"), namespace)


def test_every_page_with_python_is_run(root):
    skipped = {"docs/training.md", "docs/runtimes.md"}  # ImageNet only; what other runtimes load
    assert set(runnable(root)) == {*RUN_HERE} | skipped


# What the README shows of a command that measures comes from a committed record.
RECORDS = {
    "profile": "profiles/amd-epyc-2c/se_shufflenet.cpu-b1-224-fp32-held-t1.json",
    "tax": "profiles/amd-epyc-2c/tax/se_mobilenet.cpu-b1-224-fp32-held-t1.forward.json",
}


def tables_of(root, words):
    record = RECORDS.get(words[0])
    if record is None:
        assert words[0] == "count"
        names = [name for option, name in itertools.pairwise(words) if option == "--arch"]
        return [profiles.count_table([count_record(name, batch=1, counters=False) for name in names])]
    if words[0] == "tax":
        return report_tax.tax_tables(read_tax_record(root / record))
    return [profiles.profile_table(store.read_record(root / record))]


def test_outputs_in_the_readme_are_real(root):
    """Every line that stands below a command, its cells in this order; only columns at the end may be missing."""
    shown = blocks((root / "README.md").read_text(encoding="utf-8"), "console")
    assert len(shown) == 3
    for block in shown:
        command, *lines = block.splitlines()
        words = shlex.split(command)[2:]
        rows = [
            " ".join(" ".join(row).split()) for table in tables_of(root, words) for row in (table.columns, *table.rows)
        ]
        assert len(lines) >= 3
        for line in lines:
            assert any(row.startswith(" ".join(line.split())) for row in rows), line


def test_the_readme_fits_two_screens(root):
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_shows_results_only(root):
    """A row of a table that says that nothing was found does not stand in the README."""
    rows = [line for line in (root / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"n\.s\.|too noisy|no result|not shown", row)]


RENDERED = ("results.md", "se-tax-results.md", "runtimes.md")


def test_findings_in_the_readme_stand_in_the_tables(root):
    """The tables of the docs are rendered from records; the README repeats some of their cells."""
    tables = "".join((root / "docs" / name).read_text(encoding="utf-8") for name in RENDERED)
    text = (root / "README.md").read_text(encoding="utf-8").replace(" points", "")
    findings = re.findall(r"[+-][\d.]+(?: %)? \[[-\d., ]+\]", text.split("## Findings")[1].split("\n## ")[0])
    assert len(findings) == 14
    assert [one for one in findings if one not in tables] == []


def test_new_import_paths_exist(root):
    rows = re.findall(r"^\| `(selab\.[\w.]+)` \| `(selab\.[\w.]+)` \| (.*?) ?\|$", pages(root)["CHANGELOG.md"], re.M)
    assert len(rows) > 70
    for old, new, others in rows:
        for path in [new, *re.findall(r"`(selab\.[\w.]+)`", others)]:
            assert importlib.util.find_spec(path), path
        if old != "selab.attention":  # a package now
            assert not exists(old), old


def test_new_names_exist(root):
    renamed = pages(root)["CHANGELOG.md"].split("### Renamed")[1]
    cells = re.findall(r"^\| `.*? \| (.*) \|$", renamed, re.M)
    assert len(cells) > 8
    for cell in cells:
        names, module = re.match(r"(.*?) in `(selab\.[\w.]+)`", cell).groups()
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def exists(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_old_import_paths_stand_in_the_changelog_only(root):
    rows = re.findall(r"^\| `(selab\.[\w.]+)` \|", pages(root)["CHANGELOG.md"], re.M)
    old = "|".join(map(re.escape, sorted(set(rows) - {"selab.attention"}, key=len, reverse=True)))
    files = "|".join(sorted(one.replace(".", "/") + r"\.py" for one in set(rows)))
    gone = re.compile(rf"(?:from|import) (?:{old})\b(?! import)(?!\.)|from (?:{old}) import|(?:{files})")
    found = {name: gone.findall(text) for name, text in pages(root).items() if name != "CHANGELOG.md"}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_files_named_in_the_contributing_guide_exist(root):
    text = pages(root)["CONTRIBUTING.md"]
    missing = []
    for row in text.splitlines():
        folder = ""
        for name in re.findall(r"`([\w./*-]+(?:\.(?:py|toml|h|c)|/))`", row):
            folder = name.rpartition("/")[0] if "/" in name else folder
            path = name if "/" in name else f"{folder}/{name}"
            if not any(root.glob(path.rstrip("/"))):
                missing.append(path)
    assert missing == []


def test_every_package_stands_in_the_contributing_guide(root):
    text = pages(root)["CONTRIBUTING.md"]
    packages = {path.parent.name for path in (root / "selab").glob("*/__init__.py")}
    assert {name for name in packages if f"selab/{name}/" not in text} == set()
