"""The README keeps its word: its quotes stand in the files, its commands parse, its pictures are made."""
import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import pytest

import evaluate
import sample
import train
from plumbing import cli
from shapes import pretrain

ROOT = Path(__file__).parent.parent
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "shapes/README.md")}

spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
figures = importlib.util.module_from_spec(spec)
sys.modules["figures"] = figures                            # where the help of its options is looked up
spec.loader.exec_module(figures)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


@pytest.mark.parametrize("block", blocks("README.md", "python"))
def test_quoted_code_stands_in_its_file(block):
    head, _, code = block.partition("\n")
    assert head.startswith("# "), "a quotation begins with its file's name"
    assert code.strip("\n") in (ROOT / head[2:].strip()).read_text(encoding="utf-8")


def test_what_a_reader_changes_stands_in_its_file():
    """Recipes: without their new lines, changes are verbatim text of the file."""
    for block in blocks("README.md", "diff"):
        head, *lines = block.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        assert old in (ROOT / head[2:].strip()).read_text(encoding="utf-8"), old


def test_a_readers_session(tmp_path, monkeypatch, capsys):
    """What is to be tried in Python, typed in order."""
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in blocks("README.md", "py"):
        (tmp_path / "try.png").unlink(missing_ok=True)
        exec(block, session)                                # as the reader does
        shown, printed = (tmp_path / "try.png").exists(), capsys.readouterr().out
        assert shown == ("show(" in block) and bool(printed) == ("print(" in block), block
    assert session["scores"]["reward"] > 0.5, "a reward that was hacked"


def commands(page):
    """The words of every command from its script on: in blocks of bash, and in `...` within the text."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", PAGES[page])
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if words and words[0] in ("python", "torchrun") and script is not None:
                yield words[script:]


@pytest.mark.parametrize("command", [command for page in PAGES for command in commands(page)], ids=" ".join)
def test_commands_parse(command):
    script, *args = command
    assert (ROOT / script).exists(), script
    if script == "train.py":
        train.configure(args)
    elif script == "sample.py":
        config = cli.parse(sample.Config, args, positional="prompt")
        sample.check(replace(config, model=config.model or "shapes"))
    elif script == "evaluate.py":
        cli.parse(evaluate.COMMANDS[args[0]][1], args[1:], positional=evaluate.COMMANDS[args[0]][2])
    elif script == "shapes/pretrain.py":
        cli.parse(pretrain.Config, args)
    elif script == "docs/figures.py":
        assert set(cli.parse(figures.Config, args, positional="names").names) <= {*figures.NAMES}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\((?!https:)([^)#]+)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("name", figures.NAMES)
def test_pictures_are_made(name, tmp_path, monkeypatch):
    """By their command, with no more than two steps of the teacher."""
    whole = figures.generate

    def shorter(models, captions, seeds, size, sampling):
        return whole(models, captions, seeds, size, replace(sampling, steps=min(sampling.steps, 2)))

    monkeypatch.setattr(figures, "generate", shorter)
    figures.main([name, "--out", str(tmp_path)])
    picture = imageio.imread(next(tmp_path.iterdir()))
    assert picture.std() > 10, "something is on it"


def test_an_unknown_picture_is_named(capsys):
    with pytest.raises(SystemExit):
        figures.main(["latent"])
    assert "no figure 'latent'; there are latents" in capsys.readouterr().err
