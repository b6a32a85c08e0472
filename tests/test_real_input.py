"""What people type wrong ends in one line before anything is loaded; no output replaces what is not its own;
no terminal stops the work."""
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
import shapes.models
from plumbing import weights
from plumbing.errors import UserError
from plumbing.files import MARK, check_outputs

ROOT = Path(__file__).parent.parent
RED = "'a red circle'"

TYPED = {                               # command -> what is typed behind it -> what the message says
    "sample": {
        "": "give one prompt, or --prompts FILE",
        "a red circle": "unexpected argument 'red' (quote a prompt)",
        "'a dog'": "unknown word 'dog'",
        f"{RED} --gidance 3": "unknown option --gidance, did you mean --guidance?",
        f"{RED} --guidance 1e30": "--guidance: '1e30' is not a number from 0 to 100",
        f"{RED} --seed 1{'0' * 5000}": "is not a whole number from 0 to 2147483647",
        f"{RED} --seed 1 --seed 2": "--seed is given twice, as 1 and as 2",
        f"{RED} --height 70": "height 70 is not a multiple of 16; try 64 or 80",
        f"{RED} --device tpu": "--device tpu: no such device here",
        f"{RED} --out ''": "--out: '' is neither a file's name nor a folder's",
        f"{RED} --out a.avi": "--out a.avi: choose a folder's name, or for one prompt one that ends",
        f"{RED} --out red.txt/x.mp4": "red.txt: nothing can be written there: ",
        f"{RED} --out clips.mp4": "clips.mp4 is there already",
        f"{RED} --sheet x.jpg": "--sheet x.jpg: its name must end in .png",
        f"{RED} --motion 0.1": "--motion belongs to a T2V-Turbo-v2",
        f"{RED} --method teacher --motion-from m.mp4": "--motion-from belongs to --method teacher, and ",
        f"{RED} --best-of 2 --reward hpsv3": "no reward 'hpsv3'; there are hpsv2,",
        f"{RED} --model vc2 --best-of 2": "--best-of belongs to --reward NAME, e.g. --reward hpsv2",
        f"{RED} --best-of 2 --reward hpsv2=none.pt": "none.pt: no such file or folder",
        f"{RED} --turbo unet_lora.pt": "unet_lora.pt is not there, or does not say whose student it is",
        f"{RED} --turbo red.txt": "red.txt is not there, or does not say whose student it is; add --model",
        f"{RED} --out ~nosuch/x.mp4": "'~nosuch/x.mp4' is neither a file's name nor a folder's",
        f"{RED} --model vc2 --turbo pipe": "pipe is a pipe or a device, not a weight file",
        "--prompts empty.txt": "empty.txt: no prompts in it",
        "--prompts latin.txt": "latin.txt is not a list of prompts in utf-8",
        "--prompts broken.json": "broken.json is not a list of prompts",
        "--prompts half.jsonl": "half.jsonl is not a list of prompts in utf-8",
        "--prompts columns.csv": "entry 1: no prompt in any of prompt_en, prompt, caption, text; ",
        "--prompts commas.csv": "commas.csv, entry 2: neither a text nor a row of the header's columns",
        "--prompts red.txt --out x.mp4": "--out x.mp4: choose a folder's name",
        "--prompts slash.txt --out new": "'a red/ring' and 'a red ring' would both be written to new/a red",
    },
    "train": {
        "--data a.csv --data a.csv --out RUN --out RUN": "--out is given twice",
    },
}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with the files that TYPED names, from which the commands run."""
    monkeypatch.chdir(tmp_path)
    texts = {"red.txt": "a red circle\n", "empty.txt": "\n\n", "broken.json": "[",
             "slash.txt": "a red/ring\na red ring", "columns.csv": "file,words\na.mp4,a dog\n",
             "half.jsonl": r'{"prompt": "\ud83d"}', "commas.csv": "prompt\na ring\na ring, rising\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "clips.mp4").mkdir()
    (tmp_path / "latin.txt").write_bytes("ein grüner".encode("latin-1"))
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    "command, typed", [(command, typed) for command, rows in TYPED.items() for typed in rows],
    ids=lambda value: value[:60])
def test_mistakes_end_in_one_line(command, typed, inputs, monkeypatch, capsys):
    """And before anything is loaded, or written."""
    monkeypatch.setattr(shapes.models, "load", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(command).main(shlex.split(typed))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and TYPED[command][typed] in message, message
    assert len(message.splitlines()) <= 4, "four short lines for an unknown word"
    assert not list(inputs.rglob("*.mp4/*")) and not (inputs / "out.mp4").exists()


# ---- outputs -----------------------------------------------------------------------------------------------

OUTPUTS = {                             # outputs, inputs -> what the message says, "" where all is well
    "a.mp4 | s.png |": "",
    "old.mp4 | s.png | w.safetensors": "",                  # what the same command wrote
    "scores.json | |": "",
    "holiday.mp4 | |": "--out holiday.mp4 exists, and was not made by this program",
    "w.safetensors | | w.safetensors": "--out w.safetensors is also --turbo; an output never replaces an in",
    "link.safetensors | | w.safetensors": "--out link.safetensors is also --turbo",
    "w.safetensors | |": "--out w.safetensors exists, and was not made by this program",
    "list.json | |": "--out list.json exists, and was not made by this program",
    "o | o/0000.png |": "are one place",
    "x.png | w/../x.png |": "are one place",
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_replaces_nothing_but_its_own_kind(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights.save("w.safetensors", {"x": torch.ones(1)}, {"model": "vc2"})
    os.link("w.safetensors", "link.safetensors")
    os.mkdir("w")
    texts = {"list.json": '{"scores": 1}', "scores.json": MARK, "old.mp4": MARK, "holiday.mp4": ""}
    for name, text in texts.items():
        Path(name).write_text(text)
    out, sheet, source = (part.strip() for part in case.split("|"))
    try:
        check_outputs({"--out": [out], "--sheet": sheet}, {"--turbo": source})
        message = ""
    except UserError as error:
        message = str(error)
    assert OUTPUTS[case] in message and bool(OUTPUTS[case]) == bool(message)


@pytest.mark.parametrize("typed", [
    "--turbo s.safetensors --out s.safetensors", "--out frames.png", "--out p.mp4 --best-of 2",
    "--out o.png --sheet o/0000.png",
    "--method teacher --motion-from m.mp4 --motion-prompt x --out m.mp4"])
def test_sampling_loses_no_file(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("frames")
    Path("s.safetensors").write_bytes((shapes.WEIGHTS / "turbo.safetensors").read_bytes())
    for name in ("frames/0009.png", "m.mp4", "p.json"):
        Path(name).write_text("a red ring")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        sample.main(["a red ring", *typed.split()])
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# ---- terminals ---------------------------------------------------------------------------------------------

SHELL = {                               # a line of a shell, in which RUN makes a clip -> what it prints
    "RUN 2>&-": "a.mp4: ", "RUN 2>/dev/full": "a.mp4: ", "RUN >&- 2>&-": "", "RUN | true": "",
    "RUN >/dev/full": "",
    "PYTHONIOENCODING=ascii python sample.py --help": "\\u03c9, 0 = none",
    "python sample.py --help | head -1": "usage: sample.py",
    "RANK=1 python sample.py 'a ring' 2>&1": "RANK=1, WORLD_SIZE=1; unset both, or start with torchrun",
    "python sample.py 'a ring' --turbo $'\\377.safetensors' 2>&1": "\\udcff.safetensors is not there",
}


@pytest.mark.parametrize("line", SHELL)
def test_a_terminal_never_stops_the_work(line, tmp_path):
    run = f"python sample.py {RED} --steps 1 --out {tmp_path}/a.mp4"
    done = subprocess.run(["bash", "-c", line.replace("RUN", run).replace("python", sys.executable)],
                          capture_output=True, text=True, cwd=ROOT)
    assert SHELL[line] in done.stdout
    assert (tmp_path / "a.mp4").exists() == ("RUN" in line)
    if line == "RUN >/dev/full":
        assert done.returncode and "No space left" in done.stderr
    else:
        assert "Traceback" not in done.stdout + done.stderr
