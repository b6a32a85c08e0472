"""Bad input ends in one line that names file or option, value and remedy, before anything is loaded.

One table per area: what is typed -> what the message must say.
"""
import errno
import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import shapes
from data import open_dataset
from plumbing import weights
from shapes import pretrain

# ---- shapes/ -----------------------------------------------------------------------------------------------

SHAPES = [                              # what is typed behind pretrain.py -> what the message says
    ("--vae-steps 0", "--vae-steps: 0 must be at least 1"),
    ("--save-every 0", "--save-every: 0 must be at least 1"),
    ("--teacher-steps nan", "--teacher-steps: 'nan' is not a whole number"),
    ("--seed -1", "--seed: -1 must be at least 0"),
    ("--seed 36893488147419103232", "--seed: 36893488147419103232 must be at most"),
    ("--stage unet", "invalid choice: 'unet'"),
    ("--steps 5", "unknown option --steps, did you mean"),
    ("--device foo", "--device foo"),
    ("--device meta", "--device meta"),
    ("--out {file}/runs", "--out {file}/runs cannot be made"),
    ("--stage viclip --out {folder}", "needs {folder}/clip.safetensors, which is not there; make it first"),
    ("--stage teacher --out {folder}", "needs {folder}/vae.safetensors, which is not there"),
    ("--out {damaged}", "{damaged}/vae.ckpt: no checkpoint of this stage, or a damaged one"),
    ("--out {foreign}", "{foreign}/vae.ckpt: no checkpoint of this stage, or a damaged one"),
]


@pytest.mark.parametrize("typed, message", SHAPES)
def test_pretraining_complains_in_one_line(typed, message, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("file", "folder", "damaged", "foreign")}
    for name, place in places.items():
        place.write_text("") if name == "file" else place.mkdir()
    (places["damaged"] / "vae.ckpt").write_bytes(b"PK\3\4 cut off")
    torch.save(dict(network={}, optimizer={}, ema=[], step=3), places["foreign"] / "vae.ckpt")

    with pytest.raises(SystemExit) as stop:
        pretrain.main([word.format(**places) for word in typed.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message.format(**places) in said


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Pretraining ends in one line that names the file, and what was saved before is whole."""
    layer = torch.nn.Linear(3, 1)
    config = pretrain.Config(out=str(tmp_path), save_every=1)
    steps, save = [], torch.save

    def full_from_the_third(state, file):
        steps.append(1)
        if len(steps) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full_from_the_third)
    with pytest.raises(ValueError, match=r"line\.ckpt cannot be written: No space left on device"):
        pretrain.fit("line", layer, lambda rng, progress: (layer(torch.ones(2, 3)).sum() ** 2, {}), 4, config)
    assert torch.load(tmp_path / "line.ckpt")["step"] == 2 and not list(tmp_path.glob(".*"))


TOY_FILES = {                           # what is wrong with a folder of weights -> what the message says
    "no teacher": "teacher.safetensors does not exist; make it with",
    "vae and teacher exchanged": "its header does not describe a VAE",
    "no header": "its header does not describe a VAE",
    "a tensor missing": "1 of 120 tensors missing",
    "cut off": "not a weight file, or a truncated one",
}


@pytest.mark.parametrize("wrong", TOY_FILES)
def test_wrong_toy_weights_end_in_one_line(wrong, tmp_path):
    for file in shapes.WEIGHTS.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    vae, teacher = tmp_path / "vae.safetensors", tmp_path / "teacher.safetensors"
    tensors = load_file(vae)
    if wrong == "no teacher":
        teacher.unlink()
    else:
        vae.unlink()
    if wrong == "vae and teacher exchanged":
        vae.symlink_to(shapes.WEIGHTS / "teacher.safetensors")
    elif wrong == "no header":
        save_file(tensors, vae)
    elif wrong == "a tensor missing":
        header = weights.read_header(shapes.WEIGHTS / "vae.safetensors")
        weights.save_checkpoint(vae, dict(list(tensors.items())[1:]), header)
    elif wrong == "cut off":
        vae.write_bytes((shapes.WEIGHTS / "vae.safetensors").read_bytes()[:-100])

    with pytest.raises(ValueError, match=TOY_FILES[wrong]) as error:
        shapes.load(folder=tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ---- data --------------------------------------------------------------------------------------------------

DATA = {                                # what --data names -> what the message says
    "nowhere": "no data at nowhere: expected a folder of clips, a .csv or .jsonl manifest, or .tars",
    "nowhere.csv": "no data at nowhere.csv: expected a folder",
    "{0..2}.tar": "3 of 3 shards are not there, e.g. 0.tar",
    "{2..0}.tar": "{2..0}.tar: {2..0} runs backwards; write {0..2}",
    "{0..99999999}.tar": "{0..99999999} is more than 1000000 shards; write fewer",
    "empty": "no clips in empty: expected *.mp4 with .txt beside them, e.g. 0001.mp4, 0001.txt",
    "shards": "no clips in shards: expected *.mp4 with .txt beside them, e.g. 0001.mp4, 0001.txt; "
              "for its shards write 'shards/{00..07}.tar'",
    "text.tar": "no clips in text.tar: a shard has members KEY.mp4 and KEY.txt",
    "folder.csv": "folder.csv cannot be read: Is a directory",
    "folder.tar": "folder.tar cannot be read: Is a directory",
    "clip.mp4": "clip.mp4 is no data: expected a folder of clips",
    "columns.csv": "columns.csv: no row has both a path and a caption; expected path,caption",
    "empty.csv": "empty.csv: no row has both a path and a caption; expected path,caption",
    "quote.csv": "quote.csv, line 2: a quote that is not closed in its row swallows the rows behind it",
    "broken.jsonl": "broken.jsonl, line 3: Unterminated string starting at: line 1 column 2 (char 1); expected",
    "list.jsonl": "list.jsonl, line 1: not an object; expected {\"path\"",
    "  ,  ": "no clips in   ,  : a shard has members KEY.mp4 and KEY.txt",
}


@pytest.fixture
def bad_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "shards", "folder.csv", "folder.tar"):
        (tmp_path / name).mkdir()
    for name, text in (("shards/00.tar", ""), ("shards/07.tar", ""), ("clip.mp4", "x"), ("empty.csv", ""),
                       ("columns.csv", "file,text\na.mp4,hello\n"),
                       ("quote.csv", 'path,caption\na.mp4,"a dog\nb.mp4,a cat\n'),
                       ("broken.jsonl", '{"path": "a.mp4", "caption": "a"}\n\n{"pa'),
                       ("list.jsonl", "[1, 2]\n")):
        (tmp_path / name).write_text(text)
    with tarfile.open("text.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme"))


@pytest.mark.parametrize("spec, message", DATA.items())
def test_data_that_is_none(spec, message, bad_data):
    with pytest.raises(ValueError) as error:
        open_dataset(spec)
    assert message in str(error.value) and "\n" not in str(error.value)
