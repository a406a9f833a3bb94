"""README and docs: links lead somewhere, commands and configs are real, and texts stay short."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT, run_script

from msad_kd import build_config

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PROJECTS = sorted((ROOT / "projects").glob("*/*.md"))
LONG = {"FINDINGS.md", "ssim_benchmark.md"}  # for those who want the reasoning or every number
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHER_TESTS = "".join(
    p.read_text() for p in (ROOT / "tests").rglob("*.py") if p.name != "test_docs.py"
)
GAINS = {  # columns of tables.md that other tables call by a shorter name
    "box gain": "box, against the control",
    "mask gain": "mask, against the control",
    "gradient": "KD gradient",
}
# `python -c` and `python -m` run no script of this repository.
NO_SCRIPT = ("-c", "-m")


def name(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """Return a text without its fenced blocks."""
    return BLOCK.sub("", path.read_text())


def anchors(path):
    """Return the anchors that GitHub gives the headings of a file."""
    headings = re.findall(r"^#+ (.*)", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [README, *DOCS, *PROJECTS], ids=name)
def test_relative_links_resolve(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


def test_readme_is_read_in_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(prose(README).split()) <= 900
    assert len(re.findall(r"!\[[^\]]+\]\([^)]+\)", text)) >= 2


@pytest.mark.parametrize("path", [p for p in PROJECTS if p.name not in LONG] + DOCS, ids=name)
def test_other_texts_are_short(path):
    assert len(path.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", [README, *DOCS, ROOT / "projects/Shapes/README.md"], ids=name)
def test_lines_are_short(path):
    """Lines of tables and blocks may be longer."""
    assert not [x for x in prose(path).splitlines() if len(x) > 120 and not x.startswith("|")]


def table_rows(path):
    """Return (header, cells) of each row of the tables whose first column is "row"."""
    header, found = None, []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else None
        if cells is None or header is None:
            header = cells
        elif header[0] == "row" and cells[0].startswith("`"):
            found.append((header, cells))
    return found


@pytest.mark.parametrize("name", ["README.md", "FINDINGS.md"])
def test_numbers_are_those_of_the_results(name):
    """Every number in a table of rows stands in that row and column of results/tables.md."""
    shapes = ROOT / "projects" / "Shapes"
    results = {
        (row, title, cell)
        for header, (row, *cells) in table_rows(shapes / "results" / "tables.md")
        for title, cell in zip(header[1:], cells)
    }
    rows = table_rows(shapes / name)
    assert rows
    for header, (row, *cells) in rows:
        numbers = {(row, GAINS.get(x, x), y) for x, y in zip(header[1:], cells) if x != "model"}
        assert numbers <= results, numbers - results


@pytest.mark.parametrize("path", [README, ROOT / "projects/Shapes/README.md"], ids=name)
def test_the_demos_numbers_are_those_that_it_printed(path):
    """The models are those of projects/Shapes/results/demo.md, with shorter names."""
    titles = {
        "HR: high resolution": "high resolution",
        "LR, without a teacher": "LR without a teacher",
    }
    titles["teacher"] = "teacher, fused branch"
    measured = {row[0]: row for row in cells_of(ROOT / "projects/Shapes/results/demo.md")}
    shown = [row for row in cells_of(path) if row[-1].endswith(" ms")]
    assert len(shown) == len(measured) - 1  # without the headings
    for model, side, box, mask, macs, latency in shown:
        model = model.strip("*")
        row = measured[titles.get(model, model)]
        assert [x.strip("*") for x in (side, box, mask)] == [f"{row[1]} px", *row[2:4]]
        assert (macs, latency) == (f"{float(row[4]):.2f}", f"{row[6].split()[0]} ms")


def cells_of(path):
    """Return the cells of each line of the tables in a text, without the lines below headings."""
    lines = [x for x in path.read_text().splitlines() if x.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not set(row[0]) <= {"-", ":"}]


def commands(path):
    """Return the commands of a text's blocks that are neither Python nor YAML."""
    blocks = [
        text for language, text in BLOCK.findall(path.read_text()) if language in ("", "bash")
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(python|make|pip) ", line)]


@cache
def flags(script):
    """Return the flags that the help of a script names."""
    return set(re.findall(r"--[\w-]+", run_script(script, "--help").stdout))


@pytest.mark.parametrize("path", [README, *DOCS, *PROJECTS], ids=name)
def test_commands_are_real(path):
    """Scripts and make targets exist, and scripts know the flags that they are given.

    The commands themselves train for minutes to days, or need a user's data. So each script has to
    be named by another test, which runs it on tiny data.
    """
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(path):
        program, *words = shlex.split(command, comments=True)
        if program == "pip" or words[0] in NO_SCRIPT:
            continue
        if program == "make":
            assert words[0] in targets, command
            continue
        script, *arguments = words
        assert (ROOT / script).is_file(), command
        package, stem = ".".join(Path(script).parent.parts), Path(script).stem
        called = rf'{script}|load_tool\("(tools\.)?{stem}"\)|from {package}(\.| import ){stem}\b'
        assert re.search(called, OTHER_TESTS), f"no test runs {script}"
        unknown = {x.split("=")[0] for x in arguments if x.startswith("--")} - flags(script)
        assert not unknown, f"{command}: {unknown}"


@pytest.mark.parametrize("path", [README, *DOCS], ids=name)
def test_configs_are_valid(path, tmp_path):
    """Every YAML block that begins with "# my/NAME.yaml" is a config."""
    folder = tmp_path / "my"
    folder.mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    # A page may build on the configs of the README and of the page on own data.
    texts = [README, ROOT / "docs" / "own-data.md", path]
    blocks = [block for text in texts for block in BLOCK.findall(text.read_text())]
    names = []
    for language, text in blocks:
        match = re.match(r"# my/(\w+\.yaml)", text)
        if language == "yaml" and match:
            (folder / match[1]).write_text(text)
            names.append(match[1])
    for config in names:
        build_config(str(folder / config), [])


@pytest.mark.parametrize("path", [README, *DOCS], ids=name)
def test_python_examples_compile(path):
    for language, text in BLOCK.findall(path.read_text()):
        if language == "python":
            compile(text, str(path), "exec")
