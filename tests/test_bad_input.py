"""Bad input ends in one line that names file or option, value and remedy, before anything is loaded.

One table per area: what is typed -> what the message must say.
"""
import errno
import io
import json
import math
import os
import random
import shlex
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tqdm
from safetensors.torch import load_file, save_file

import evaluate
import model
import rewards
import sample
import shapes
import shapes.models
import train
from data import open_dataset
from plumbing import cli, video, weights
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

DATA = {  # what --data names -> what the message says
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
    "broken.jsonl": "broken.jsonl, line 3: Unterminated string starting at: line 1 column 2 (char 1); ",
    "list.jsonl": 'list.jsonl, line 1: not an object; expected {"path"',
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


# ---- evaluate.py -------------------------------------------------------------------------------------------

EVALUATE = [                            # what is typed behind evaluate.py -> what the message says
    ("shape", "no command 'shape'; there are shapes, score, vbench"),
    ("shapes --rows nothing", "--rows 'nothing': no row's name and steps contain this; there are teacher"),
    ("shapes --rows vcm,foo", "--rows 'foo': no row's name"),
    ("shapes --clips 0", "--clips: 0 must be at least 1"),
    ("shapes --batch -1", "--batch: -1 must be at least 1"),
    ("shapes --dtype foo", "invalid choice: 'foo'"),
    ("shapes --teacher-guidance nan", "--teacher-guidance: nan is not a finite number"),
    ("shapes --device foo", "--device foo: no such device"),
    ("shapes --folder {empty}", "--folder {empty}: no teacher.safetensors"),
    ("shapes --out {list}", "--out {list}: holds something else than rows"),
    ("shapes --out {rows} --seed 1", "{rows} holds rows made with --teacher-guidance None"),
    ("shapes --out o.txt", "--out o.txt: rows are stored as .json"),
    ("shapes --out {file}/o.json", "{file}/o.json cannot be written"),
    ("score", "score takes clips and at least one --reward NAME=FILE"),
    ("score {clips}", "score takes clips and at least one --reward NAME=FILE"),
    ("score nowhere.mp4 --reward shapes-clip", "nowhere.mp4: no such file or folder"),
    ("score {empty} --reward shapes-clip", "{empty}: no clips (.mp4, .gif, .safetensors) and no png frames"),
    ("score {clips} --reward hps", "no reward 'hps'; did you mean hpsv2"),
    ("score {clips} --reward shapes-clip=nowhere.pt", "--reward: there is no file of weights at nowhere.pt"),
    ("score {clips} --reward shapes-clip:nan", "the weight nan of reward"),
    ("score {clips} --reward shapes-clip --reward shapes-clip", "give each reward once"),
    ("score {clips} --reward shapes-clip --batch 0", "--batch: 0 must be at least 1"),
    ("score {clips} --reward shapes-clip --diversity", "--diversity compares clips of one prompt"),
    ("score {clips} --prompt a --reward shapes-clip --diversity", "--diversity compares features of a video"),
    ("score {clips} --reward shapes-clip --best {clips}", "--best {clips}: the clips themselves lie there"),
    ("score {clips} --reward shapes-clip --best {file}", "--best {file}: it is a file; give a folder"),
    ("score {clips} --reward shapes-clip --student {student}", "does not say which rewards it was"),
    ("score {clips} --reward shapes-clip --student {file}", "{file}"),
    ("score {short} --reward shapes-viclip", "{short}: shapes-viclip looks at 4 frames, the clip has 3"),
    ("score {file} --reward shapes-clip", "{file}"),
    ("vbench", "vbench takes VBench's result files"),
    ("vbench nowhere.json", "nowhere.json: no such file or folder"),
    ("vbench {empty}", "{empty}: no result files"),
    ("vbench {file}", "{file}: not JSON"),
    ("vbench {list}", "{list}: not a result file of VBench"),
    ("vbench {i2v}", "{i2v}: unknown dimension 'i2v_subject'; VBench's are subject_consistency"),
    ("vbench {percent}", "{percent}: color is 93.5; VBench writes shares, at most 1"),
    ("vbench {nothing}", "{nothing}: color is nan; VBench writes shares, at most 1"),
    ("vbench m={color1},{color2}", "color is 0.5 in {color1} and 0.6 in {color2}; tell two models apart"),
    ("vbench m={color1}", "m lacks subject_consistency, background_consistency, "),
    ("compare {clips}", "compare takes two folders of clips, not 1"),
    ("compare {clips} nowhere", "nowhere: no such folder"),
    ("compare {clips} {clips}", "both folders are called clips; tell the models apart with NAME=FOLDER"),
    ("compare {clips} {empty}", "{empty}: no .mp4 clips in this folder"),
    ("compare {clips} {other}", "have no clip of one name"),
    ("compare {clips} {damaged}", "{damaged}/a-0.mp4: not an mp4, or a damaged one"),
    ("compare a={clips} b={clips} --first 2", "--first 2: there are 2 pairs"),
    ("compare a={clips} b={clips} --out page.pdf", "--out page.pdf: a page ends in .html"),
    ("compare a={clips} b={clips} --out {file}/page.html", "{file}/page.html cannot be written"),
    ("tally", "tally takes files of votes"),
    ("tally nowhere.json", "nowhere.json: no such file"),
    ("tally {list}", "{list}: not a file of votes"),
    ("tally {file}", "{file}: not a file of votes"),
    ("tally {unvoted}", "{unvoted}: no votes in it"),
    ("tally {misvoted}", "{misvoted}: a vote is 3 answers, each A, B or same"),
    ("tally {unvoted} --out bars.gif", "bars.gif: a picture ends in .svg, .png, .pdf"),
    ("curves", "curves takes log files"),
    ("curves nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("curves {file}", "{file}: an empty log"),
    ("curves {broken}", "{broken}, line 1: not a JSON object"),
    ("curves {log} {log}", "two logs are called"),
    ("curves {log} --keys reward", "--keys reward: nothing to draw in these logs; they have loss"),
    ("curves {log} --smooth 0", "--smooth: 0 must be at least 1"),
    ("curves {log} --out c.jpg", "c.jpg: a picture ends in .svg, .png, .pdf"),
    ("curves {log} --out {file}/c.svg", "{file}/c.svg cannot be written"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files with something wrong in them, by name."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("clips/a-0.mp4", "clips/b-0.mp4", "other/c-0.mp4"):
        video.write_video(root / name, torch.zeros(3, 8, 64, 64, dtype=torch.uint8), fps=8)
    video.write_video(root / "short.safetensors", torch.zeros(3, 3, 64, 64, dtype=torch.uint8), fps=8)
    weights.save_checkpoint(root / "student.safetensors", {"x": torch.zeros(1)}, {"version": 1})
    for name in ("empty", "damaged"):
        (root / name).mkdir()
    (root / "file").write_text("")
    (root / "damaged" / "a-0.mp4").write_bytes(bytes(100))
    votes = dict(names=["A", "B"], judge="ann", votes=[])
    contents = {"list": [], "rows": dict(options={}, rows=[]), "i2v": {"i2v_subject": [0.5, []]},
                "percent": {"color": [93.5, []]}, "nothing": {"color": [math.nan, []]},
                "color1": {"color": [0.5, []]}, "color2": {"color": [0.6, []]},
                "unvoted": votes,
                "misvoted": votes | dict(votes=[dict(pair="a", answers=["A", "left", "B"])])}
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    (root / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (root / "broken.jsonl").write_text('{"step": 1,\n{"step": 2, "loss": 0.5}\n')
    return {path.stem: str(path) for path in root.iterdir()}


@pytest.mark.parametrize("typed, message", EVALUATE)
def test_evaluation_complains_in_one_line(typed, message, places, tmp_path, monkeypatch, capsys):
    """No network or reward is loaded before the complaint, but for those about what a clip holds."""
    monkeypatch.chdir(tmp_path)
    if "{short}" not in typed and typed != "score {file} --reward shapes-clip":
        monkeypatch.setattr(shapes, "load", None)
        monkeypatch.setattr(rewards, "load", None)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([word.format(**places) for word in typed.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message.format(**places) in said
    assert not list(tmp_path.iterdir())


# ---- train.py ----------------------------------------------------------------------------------------------

TRAIN = {
    # options that cannot take effect
    "--data clips": "--data has no effect here: it belongs to --preset turbo-vc2",
    "--reward hpsv2=HPS.pt": "--reward hpsv2 does not belong to --preset shapes",
    "--preset turbo-vc2 --reward shapes-clip": "--reward shapes-clip does not belong to --preset turbo-vc2",
    "--preset vcm-vc2 --reward hpsv2=HPS.pt":
        "--reward hpsv2 has no effect here: its weight is 0; set --image-weight",
    "--preset vcm-vc2 --video-frames 4": "--video-frames has no effect here: it belongs to a video reward",
    "--image-weight 0 --image-frames 4": "--image-frames has no effect here: it belongs to an image reward",
    "--sample-every 0 --guidance 3": "--guidance has no effect here: it belongs to --sample-every",
    "--lora 0 --merge": "--merge has no effect here: it belongs to --lora",
    "--lora 0 --export-lora": "--export-lora has no effect here: it belongs to --lora",
    "--preset turbo-v2 --prepare CACHE --dry-run 5": "preparing is only simulated",
    "--preset shapes-v2 --prepare CACHE --dry-run 0": "only for --preset turbo-v2",
    "--dry-run 1 --resume auto": "--resume has no effect here: it belongs to training",
    # numbers
    "--lr inf": "--lr: inf is not a finite number",
    "--lr 1e30": "--lr: 1e30 must be at most 1",
    "--lr 0": "--lr: 0 must be above 0",
    "--clip nan": "--clip: nan is not a finite number",
    "--w-min nan": "--w-min: nan is not a finite number",
    "--image-weight nan": "--image-weight: nan is not a finite number",
    "--ema nan": "--ema: nan is not a finite number",
    "--ema 2": "--ema: 2 must be at most 1",
    "--frames 0": "--frames: 0 must be at least 1",
    "--image-frames 0": "--image-frames: 0 must be at least 1",
    "--video-frames 0": "--video-frames: 0 must be at least 1",
    "--batch -1": "--batch: -1 must be at least 1",
    "--lora -1": "--lora: -1 must be at least 0",
    "--save-every 0": "--save-every: 0 must be at least 1",
    "--keep 0": "--keep: 0 must be at least 1",
    "--workers -1": "--workers: -1 must be at least 0",
    "--steps 1.5": "--steps: '1.5' is not a whole number",
    "--fps 10000": "--fps: 10000 must be at most 240",
    "--seed 99999999999999999999": "--seed: 99999999999999999999 must be at most",
    # options that do not fit each other
    "--w-min 3 --w-max 2": "--w-min 3.0 is above --w-max 2.0",
    "--image-frames 9": "--image-frames 9 is more than the clips have; choose at most --frames 8",
    "--width 128": "--width 128: the toy's clips are square; try --width 64",
    "--preset turbo-vc2 --width 328": "width 328 is not a multiple of 64; try 320 or 384",
    "--preset turbo-vc2 --reward hpsv2=HPS.pt": "--video-weight is 2.0, but no video reward is given",
    "--reward shapes-clip --reward shapes-clip": "--reward shapes-clip is given twice",
    "--reward shapes-klip": "no reward 'shapes-klip'; did you mean shapes-clip?",
    "--prompt dinosaur": "--prompt 'dinosaur': unknown word 'dinosaur'",
    # what is not there
    "--preset turbo-vc2": "no clips to train on; name them with --data",
    "--teacher nowhere": "--teacher nowhere: no such file or folder",
    "--preset turbo-vc2 --data . --teacher nowhere.ckpt": "--teacher nowhere.ckpt: no such file or folder",
    "--preset turbo-ms --data . --reward hpsv2=a.pt --reward viclip=b.pth":
        "--reward hpsv2=a.pt: no such file",
    "--preset turbo-vc2 --data nowhere --out RUN --reward hpsv2 --reward internvideo2": "no data at nowhere",
    "--out FILE/run": "FILE/run cannot be made or written",
    "--out RUN --resume nowhere.pt": "no checkpoint at nowhere.pt",
    "--out RUN --reward shapes-clip=x.pt --video-weight 0": "leave =x.pt out",
    "--out RUN --video-frames 3": "--video-frames 3: shapes-viclip takes 4",
    # devices
    "--device foo": "--device foo: no such device here; choose cpu, cuda",
    "--device meta": "--device meta: no such device here",
    "--device mps": "--device mps: training sums in float64, which MPS lacks",
    "--unknown 1": "unknown option --unknown",
}


@pytest.mark.parametrize("typed", TRAIN)
def test_train(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    with pytest.raises(SystemExit) as ended:
        train.main(typed.split())
    message, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and TRAIN[typed] in message


# ---- sample.py ---------------------------------------------------------------------------------------------

RED = "'a red circle'"
SAMPLE = [  # what is typed behind sample.py -> what the message says
    ("", "give one prompt, or --prompts FILE"),
    ("'  '", "give one prompt, or --prompts FILE"),
    (f"{RED} --motion-from x.mp4", "--motion-from belongs to --method teacher"),
    (f"{RED} --method teacher --motion-prompt x", "--motion-from CLIP and --motion-prompt"),
    (f"{RED} --method teacher --motion-from no.mp4 --motion-prompt x", "--motion-from no.mp4: no such file"),
    (f"{RED} --steps 0", "--steps: 0 must be at least 1"),
    (f"{RED} --guidance nan", "--guidance: nan is not a finite number"),
    (f"{RED} --guidance inf", "--guidance: inf is not a finite number"),
    (f"{RED} --guidance=-1", "--guidance: -1 must be at least 0"),
    (f"{RED} --method teacher --eta 2", "--eta: 2 must be at most 1"),
    (f"{RED} --method teacher --eta nan", "--eta: nan is not a finite number"),
    (f"{RED} --eta 0.5", "--eta belongs to --method teacher"),
    (f"{RED} --timesteps 999,x", "--timesteps 999,x: give falling whole numbers from 999 to 1"),
    (f"{RED} --timesteps 499,999", "--timesteps 499,999: give falling whole numbers from 999 to 1"),
    (f"{RED} --timesteps 1000,499", "--timesteps 1000,499: give falling whole numbers from 999 to 1"),
    (f"{RED} --timesteps 999,0", "--timesteps 999,0: give falling whole numbers from 999 to 1"),
    (f"{RED} --timesteps=", "--timesteps : give falling whole numbers from 999 to 1"),
    (f"{RED} --timesteps 999,499 --steps 4", "--timesteps has 2 steps, --steps says 4; leave one out"),
    (f"{RED} --method teacher --timesteps 999,499", "--timesteps belongs to students"),
    (f"{RED} --motion 0.1", "--motion belongs to a student of T2V-Turbo-v2; name its file with --turbo"),
    (f"{RED} --method teacher --lora-scale 0.5", "--lora-scale belongs to students, not to --method teacher"),
    (f"{RED} --method teacher --turbo x.safetensors", "--turbo belongs to students, not to --method teacher"),
    (f"{RED} --out x.png --fps 12", "--fps belongs to clips that play"),
    ("--prompts - --sheet x.png", "--sheet belongs to a known number of clips, not to --prompts -"),
    (f"{RED} --frames 0", "--frames: 0 must be at least 1"),
    (f"{RED} --frames -1", "--frames: -1 must be at least 1"),
    (f"{RED} --frames 100000", "--frames: 100000 must be at most 256"),
    (f"{RED} --num 1000000000", "--num: 1000000000 must be at most 10000"),
    (f"{RED} --batch -1", "--batch: -1 must be at least 1"),
    (f"{RED} --chunk 0", "--chunk: 0 must be at least 1"),
    (f"{RED} --seed 18446744073709551616", "--seed: 18446744073709551616 must be at most 4294967295"),
    (f"{RED} --seed 1{'0' * 400}", "must be at most 4294967295"),
    (f"{RED} --seed 4294967295 --num 2", "--seed 4294967295: the last clip's is beyond 2**32 - 1"),
    (f"{RED} --fps 10000", "--fps: 10000 must be at most 240"),
    (f"{RED} --height 70", "height 70 is not a multiple of 16; try 64 or 80"),
    (f"{RED} --out x.webm", "--out x.webm: choose .mp4, .gif, .png, .safetensors"),
    (f"{RED} --out x.jpg", "--out x.jpg: choose .mp4, .gif, .png, .safetensors"),
    (f"{RED} --sheet x.jpg", "--sheet x.jpg: its name must end in .png"),
    (f"{RED} --latents x.pt", "--latents x.pt: its name must end in .safetensors"),
    (f"{RED} --out x.safetensors --latents x.safetensors", "--out and --latents both name x.safetensors"),
    (f"{RED} --out x.png --sheet ./x.png", "--out and --sheet both name x.png"),
    (f"{RED} --num 2 --out x.png --sheet x-1.png", "--out and --sheet both name x-1.png"),
    (f"{RED} --out file/x.mp4", "file: nothing can be written there: "),
    (f"{RED} --out folder.mp4", "folder.mp4 is a folder"),
    (f"{RED} --out x.gif --fps 60", "a gif has 50 at most"),
    (f"{RED} --device foo", "--device foo: no such device here"),
    (f"{RED} --device meta", "--device meta: no such device here"),
    (f"{RED} --device CPU", "--device CPU: no such device here"),
    (f"{RED} --device 0", "--device 0: no such device here"),
    (f"{RED} --dtype int8", "--dtype: invalid choice: 'int8'"),
    (f"{RED} --gidance 3", "unknown option --gidance, did you mean --guidance?"),
    ("a red circle", "unexpected argument 'red' (quote the prompt)"),
    ("'a dog'", "unknown word 'dog'"),
    ("a" * 5000, f"unknown word '{'a' * 39}"),
    (f"{RED} --out ''", "--out is empty; name a file, or leave it out"),
    (f"{RED} --turbo ''", "--turbo is empty; name a file, or leave it out"),
    (f"{RED} --out .mp4", "--out .mp4: a suffix without a name; try --out clip.mp4"),
    ("--prompts none.txt", "none.txt: No such file or directory"),
    ("--prompts empty.txt", "empty.txt: no prompts in it"),
    ("--prompts latin.txt", "latin.txt: not a text file in utf-8 (byte 6)"),
    ("--prompts null.json", 'null.json, entry 1: neither a prompt nor an object with "prompt_en"'),
    ("--prompts object.json", 'object.json, entry 1: neither a prompt nor an object with "prompt_en"'),
    ("--prompts broken.json", "broken.json: not JSON: "),
    ("--prompts red.txt --out x.mp4", "--prompts writes many files; --out x.mp4 should be a folder"),
    (
        "--prompts red.txt --out foreign",
        "foreign: VBench wants nothing but clips in it, and there is notes.txt",
    ),
    (
        "--prompts red.txt --out new --sheet new/x.png",
        "new: VBench wants nothing but clips in it, and there is x.png",
    ),
    (
        "--prompts slash.txt --out new",
        "'a red/ring' and 'a red ring' would both be written to new/a red ring-0.mp4",
    ),
    ("--prompts long.txt --out new", "a file's name takes 255 bytes, this one has 256; shorten the prompt"),
    (f"{RED} --turbo none.safetensors", "none.safetensors: no such file"),
    (
        f"{RED} --turbo vc2.safetensors --model shapes",
        "vc2.safetensors is a student of vc2, not of shapes; use --model vc2",
    ),
    (
        f"{RED} --turbo unet_lora.pt",
        "unet_lora.pt is no file of the toy; say whose it is: --model vc2 or --model ms",
    ),
    (f"{RED} --model ms --method vcm", "there are no public VCM weights for ms; give your own: --turbo FILE"),
]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with the files that SAMPLE names, from which the commands run."""
    monkeypatch.chdir(tmp_path)
    for name in ("folder.mp4", "foreign"):
        (tmp_path / name).mkdir()
    texts = {
        "file": "",
        "foreign/notes.txt": "",
        "empty.txt": "\n\n",
        "red.txt": "a red circle\n",
        "null.json": '[{"prompt_en": null}]',
        "object.json": '{"prompt_en": "a red circle"}',
        "broken.json": "[",
        "slash.txt": "a red/ring\na red ring\n",
        "long.txt": "a red circle" + " " * 229 + "moving up",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("ein grüner".encode("latin-1"))
    weights.save_checkpoint(tmp_path / "vc2.safetensors", {"x": torch.ones(1)}, {"model": "vc2"})
    return tmp_path


@pytest.mark.parametrize("typed, message", SAMPLE)
def test_sampling_complains_in_one_line(typed, message, inputs, monkeypatch, capsys):
    """And before anything is loaded."""
    monkeypatch.setattr(shapes.models, "load", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        sample.main(shlex.split(typed))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said, said


def test_a_disk_without_room_is_noticed_first(inputs, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    monkeypatch.setattr(shapes.models, "load", lambda *args: pytest.fail("loaded"))
    for typed in ("--latents z.safetensors", "--out z.safetensors", "--sheet z.png", "--num 100 --out z.mp4"):
        with pytest.raises(SystemExit):
            sample.main(["a red circle", *typed.split()])
        said = capsys.readouterr().err
        assert "MB to write in all, and its disk has 0.0 MB left; make room" in said and said.count("\n") == 1


def test_what_was_made_is_kept_when_the_disk_is_full_after_all(inputs, monkeypatch, capsys):
    """Clip, sheet and latents lie in a temporary folder, which the message names."""
    replace, spare = os.replace, inputs / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))

    def full(source, target):
        if spare not in Path(target).resolve().parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit):
        sample.main(shlex.split("'a red circle' --steps 1 --num 2 --batch 1 --out new/a.gif"))
    said = capsys.readouterr().err
    kept, = spare.iterdir()
    assert f"new/a-0.gif cannot be written: No space left on device; what was made is kept in {kept}" in said
    assert [path.name for path in kept.iterdir()] == ["a-0.gif"]

    shutil.rmtree(kept)
    with pytest.raises(SystemExit):
        sample.main(shlex.split("'a red circle' --steps 1 --out a.gif --sheet s.png --latents z.safetensors"))
    kept, = spare.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["a.gif", "s.png", "z.safetensors"]


def test_suffixes_in_any_case(inputs):
    sample.main(["a red circle", "--steps", "1", "--out", "X.MP4"])
    assert (inputs / "X.MP4").is_file()


def test_a_message_stands_on_a_line_of_its_own(capsys):
    """Not behind a progress bar."""
    @cli.main
    def main(argv):
        for _ in tqdm.tqdm(range(3), leave=False):
            raise ValueError("it is broken")

    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.split("\n")[-2].endswith(": it is broken")
    assert not capsys.readouterr().err


ENVIRONMENT = [                         # variables of torchrun -> what the message says
    (dict(RANK="x"), "the environment variable RANK is 'x', not a number; unset it, or start with torchrun"),
    (dict(RANK=""), "the environment variable RANK is '', not a number"),
    (dict(WORLD_SIZE="-1"), "the environment variable WORLD_SIZE is '-1', not a number"),
    (dict(WORLD_SIZE="0"), "the environment says RANK=0 and WORLD_SIZE=0"),
    (dict(RANK="2", WORLD_SIZE="2"), "the environment says RANK=2 and WORLD_SIZE=2, but ranks end at"),
    (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="9" * 30), "the environment variable LOCAL_RANK is '999"),
]


@pytest.mark.parametrize("variables, message", ENVIRONMENT)
@pytest.mark.parametrize("command, typed", [
    (train.main, "--out RUN"), (sample.main, f"{RED} --out a.mp4"), (pretrain.main, "--stage vae --out RUN")])
def test_a_wrong_environment_is_named(variables, message, command, typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        command(shlex.split(typed))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said, said


def test_processes_without_an_address_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "run")])
    assert "WORLD_SIZE=2, but not MASTER_ADDR; start several" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["--help", "shapes --help"])
def test_a_reader_who_left_is_no_error(typed, monkeypatch, capsys):
    """evaluate.py --help | head -1"""
    class Pipe(io.StringIO):
        def flush(self):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    discarded = []
    monkeypatch.setattr(cli, "discard_output", lambda: discarded.append(1))
    monkeypatch.setattr(sys, "stdout", Pipe())
    with pytest.raises(SystemExit) as stop:
        evaluate.main(typed.split())
    assert stop.value.code == 141 and discarded and not capsys.readouterr().err


def test_out_of_memory_is_said(capsys):
    @cli.main
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(SystemExit):
        main([])
    assert "out of memory; try smaller or fewer clips" in capsys.readouterr().err


# ---- weight files ------------------------------------------------------------------------------------------

STUDENT = shapes.WEIGHTS / "turbo.safetensors"


def damaged(state: dict, key: str, value: float) -> dict:
    tensor = state[key].clone()
    tensor.view(-1)[-1] = value
    return state | {key: tensor}


WEIGHTS = {  # what a student's file holds -> what the message says
    "nothing": (lambda state, header: ({}, header), "holds no named tensors; it is not a weight file"),
    "ten layers": (lambda state, header: (dict(list(state.items())[:20]), header), "layers missing"),
    "one layer short": (
        lambda state, header: (dict(list(state.items())[2:]), header),
        "1 of 209 layers missing",
    ),
    "half a pair": (
        lambda state, header: (dict(list(state.items())[1:]), header),
        "its tensors are not pairs",
    ),
    "NaN": (
        lambda state, header: (damaged(state, "out.2.up", float("nan")), header),
        "out.2 holds NaN or infinity",
    ),
    "infinity": (
        lambda state, header: (damaged(state, "out.2.down", float("inf")), header),
        "out.2 holds NaN or infinity",
    ),
    "yes and no": (
        lambda state, header: (state | {"out.2.up": state["out.2.up"] > 0}, header),
        "LoRA of out.2 holds torch.strided torch.bool numbers",
    ),
    "whole numbers": (
        lambda state, header: (state | {"out.2.down": state["out.2.down"].long()}, header),
        "LoRA of out.2 holds torch.strided torch.int64 numbers",
    ),
    "a teacher": (
        lambda state, header: (load_file(shapes.WEIGHTS / "teacher.safetensors"), {}),
        "1 of 565 tensors missing",
    ),
    "another model's": (
        lambda state, header: (state, header | {"model": "vc2"}),
        "is a student of vc2, not of shapes",
    ),
    "a grid that is a word": (
        lambda state, header: (state, header | {"steps": "8"}),
        "says steps '8', no number",
    ),
    "a negative range": (lambda state, header: (state, header | {"w_min": -1}), "says w_min -1, no number"),
    "a model that is a number": (
        lambda state, header: (state, header | {"model": 3}),
        "says model 3, no name",
    ),
    "options that are a list": (
        lambda state, header: (state, header | {"train": []}),
        "training options are no JSON object",
    ),
    "a list for a header": (lambda state, header: (state, [1]), "its header is not a JSON object"),
}


@pytest.mark.parametrize("wrong", WEIGHTS)
def test_wrong_students_end_in_one_line(wrong, tmp_path):
    change, message = WEIGHTS[wrong]
    tensors, header = change(*weights.read_checkpoint(STUDENT))
    weights.save_checkpoint(tmp_path / "x.safetensors", tensors, header)
    with pytest.raises(ValueError, match=message) as error:
        shapes.load(tmp_path / "x.safetensors")
    assert str(tmp_path / "x.safetensors") in str(error.value) and "\n" not in str(error.value)


PICKLES = {  # what a .pt file holds -> what the message says
    "a tensor": torch.ones(3),
    "a number": 3,
    "nothing": None,
    "a tuple": (torch.ones(3),),
    "an empty dict": {},
    "a dict of numbers": {"a": 1},
    "numbers for names": {1: torch.ones(1)},
    "text": "state_dict",
}


@pytest.mark.parametrize("content", PICKLES)
def test_files_that_are_no_weights(content, tmp_path):
    torch.save(PICKLES[content], tmp_path / "x.pt")
    for read in (
        weights.read_named,
        lambda path: model.load("vc2", turbo=path),
        lambda path: model.load("vc2", path),
    ):
        with pytest.raises(ValueError, match="x.pt: holds no named tensors; it is not a weight file"):
            read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content, message",
    [([], "0 LoRA tensors, this UNet takes 1150"), ([1] * 1150, "a list, but not of tensors")],
)
def test_lists_that_are_no_lora(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: {message}"):
        model.load("vc2", turbo=tmp_path / "x.pt")


def test_a_list_is_no_students_file_of_the_toy(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: a list of LoRA matrices, of --model vc2 or ms"):
        shapes.load(tmp_path / "x.pt")


def test_damaged_bytes_never_show_a_traceback(tmp_path):
    """A weight file with any byte exchanged, or cut anywhere, is read or refused in one line."""
    torch.save({"state_dict": {"a.weight": torch.ones(30), "b": torch.zeros(2, 2)}}, tmp_path / "x.pt")
    good, rng = (tmp_path / "x.pt").read_bytes(), random.Random(0)
    for trial in range(300):
        wrong, place = bytearray(good), rng.randrange(len(good))
        wrong[place] = rng.randrange(256)
        (tmp_path / "y.pt").write_bytes(wrong if trial % 3 else good[:place])
        try:
            weights.read_named(tmp_path / "y.pt")
        except ValueError as error:
            assert "y.pt" in str(error) and "\n" not in str(error)


def test_a_compressed_file_is_read_and_not_mapped(tmp_path):
    """Repacked by an ordinary zip program: mapped, its tensors would be garbage."""
    state = {"a": torch.arange(1000.0), "b": torch.ones(3, 4)}
    torch.save(state, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as stored, \
            zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    read = weights.read_named(tmp_path / "y.pt")
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_an_unreadable_file_is_not_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(b"x")
    monkeypatch.setattr(
        "builtins.open",
        lambda *args: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")),
    )
    with pytest.raises(ValueError, match="x.pt cannot be read: Permission denied"):
        weights.read_named(tmp_path / "x.pt")
