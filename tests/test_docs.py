"""The pages keep their word: quotations stand in the files, commands parse, links lead somewhere, pictures
are made, and the notebook is the tutorial."""
import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import benchmark
import imageio.v3 as imageio
import pytest

import evaluate
import prepare
import sample
import train
import turbo
from plumbing import cli
from shapes import grammar, pretrain

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "shapes" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
TUTORIAL = "docs/tutorial.md"


def script(name):
    """A module of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module                              # where the help of its options is looked up
    spec.loader.exec_module(module)
    return module


figures = script("figures")


def blocks(language, pages=PAGES):
    """(page, text) of each block in that language."""
    return [(page, text) for page in pages
            for text in re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)]


# ---- quotations --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page, block", blocks("python"), ids=lambda text: text.splitlines()[-1].strip())
def test_quoted_code_stands_in_its_file(page, block):
    head, _, code = block.partition("\n")
    assert head.startswith("# "), f"{page}: a quotation begins with its file's name"
    assert code.strip("\n") in (ROOT / head[2:].strip()).read_text(encoding="utf-8"), page


@pytest.mark.parametrize("page, block", blocks("diff"), ids=lambda text: text.splitlines()[-1].strip())
def test_what_a_reader_changes_stands_in_its_file(page, block):
    """Recipes: without their new lines, changes are verbatim text of the file."""
    head, *lines = block.splitlines()
    old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    assert old in (ROOT / head[2:].strip()).read_text(encoding="utf-8"), page


def test_a_readers_session(tmp_path, monkeypatch, capsys):
    """What is to be tried in Python, typed in order."""
    monkeypatch.chdir(tmp_path)
    session = {}
    for _, block in blocks("py", [TUTORIAL]):
        (tmp_path / "try.png").unlink(missing_ok=True)
        exec(block, session)                                # as the reader does
        shown, printed = (tmp_path / "try.png").exists(), capsys.readouterr().out
        assert shown == ("show(" in block) and bool(printed) == ("print(" in block), block
    assert session["scores"]["reward"] > 0.5, "a reward that was hacked"


# ---- commands ----------------------------------------------------------------------------------------------

def commands():
    """(page, words from the script on) of every command: in blocks of bash, and in `...` within the text."""
    for page, text in PAGES.items():
        lines = "".join(block for _, block in blocks("bash", [page])).replace("\\\n", " ").splitlines()
        lines += re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", text.replace("\n", " "))
        for part in (part for line in lines for part in line.split("&&")):
            words = shlex.split(part.strip().removesuffix("&"), comments=True)
            number = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if words and words[0] in ("python", "torchrun") and number is not None:
                yield page, words[number:]


ROWS = [pytest.param(*case, marks=() if case[1] == "--model ms" else pytest.mark.slow)
        for command, each in benchmark.BUDGETS.items() for case in ((command, options) for options in each)]


@pytest.mark.parametrize("command, options", ROWS)
def test_budgets_are_those_of_the_page(command, options):
    row = benchmark.budget_row(command, options, benchmark.simulated(command, options))
    assert row in PAGES["docs/training.md"].splitlines()


def check_sample(args):
    config = cli.parse(sample.Config, args, positional="prompt")
    config = replace(config, model=config.model or "shapes")
    sample.check(config)
    if config.model == "shapes" and config.prompt and not config.turbo:
        grammar.understand(config.prompt)


def check_evaluate(args):
    if args:
        _, config, positional = evaluate.COMMANDS[args[0]]
        cli.parse(config, args[1:], positional=positional)


CHECKS = {
    "train.py": train.configure, "sample.py": check_sample, "evaluate.py": check_evaluate,
    "prepare.py": lambda args: cli.parse(prepare.Config, args),
    "shapes/pretrain.py": lambda args: cli.parse(pretrain.Config, args),
    "docs/figures.py": lambda args: cli.parse(figures.Config, args, positional="names")}


@pytest.mark.parametrize("page, command", commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_commands_parse(page, command, monkeypatch):
    program, *args = command
    assert (ROOT / program).exists(), program
    monkeypatch.setattr(sample.Path, "exists", lambda path: True)           # a reader's files
    if program in CHECKS and "--help" not in args:
        CHECKS[program](args)


# ---- links and pictures ------------------------------------------------------------------------------------

def anchors(page):
    """Those that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        heading = re.sub(r"\]\([^)]*\)", "", heading)
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_each_picture_is_shown():
    shown = {((ROOT / page).parent / path).resolve() for page, text in PAGES.items()
             for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
    assert {path for suffix in ("png", "gif", "svg") for path in ROOT.glob(f"docs/*.{suffix}")} <= shown


@pytest.mark.parametrize("name", figures.NAMES)
def test_pictures_are_made(name, tmp_path, monkeypatch):
    """By their command, with no more than two steps of the teacher and one of refinement."""
    generate, refine = turbo.generate, turbo.generate_refined
    monkeypatch.setattr(turbo, "generate", lambda *args, **options: generate(
        *args[:4], replace(args[4], steps=min(args[4].steps, 2)), **options))
    monkeypatch.setattr(turbo, "generate_refined", lambda *args: refine(*args[:6], min(args[6], 1)))
    (tmp_path / "variety.json").write_text('{"strength": [["0.5", 80, 70.5], ["1", 60, 98]]}')
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss_cd": 0.3}\n{"step": 2, "loss_cd": 0, "oracle": 1}')
    monkeypatch.setattr(figures, "VARIETY", tmp_path / "variety.json")

    logs = ["--logs", f"run={tmp_path / 'log.jsonl'}"] if name == "curves" else []
    figures.main([name, *logs, "--out", str(tmp_path / "out")])
    path, = (tmp_path / "out").iterdir()
    assert imageio.imread(path).std() > 10, "something is on it"


# ---- the notebook ------------------------------------------------------------------------------------------

def test_the_notebook_is_the_tutorial():
    """`python docs/notebook.py` was run after the last change."""
    pytest.importorskip("jupytext")
    nbformat, made = pytest.importorskip("nbformat"), script("notebook").notebook(PAGES[TUTORIAL])
    stored = nbformat.read(ROOT / "docs" / "tutorial.ipynb", 4)
    assert [cell.source for cell in stored.cells] == [cell.source for cell in made.cells]
    code = "".join(cell.source for cell in made.cells if cell.cell_type == "code")
    assert all(line in code for _, block in blocks("py", [TUTORIAL]) for line in block.splitlines())


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """All of it, from the repository's folder; its runs go where the reader's would. A command that fails
    ends it, too."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.read(ROOT / "docs" / "tutorial.ipynb", 4)
    strict = "import subprocess; get_ipython().system = lambda x: subprocess.run(x, shell=True, check=True)"
    book.cells.insert(0, nbformat.v4.new_code_cell(strict))
    nbclient.NotebookClient(book, timeout=3600, resources={"metadata": {"path": str(ROOT)}}).execute()
