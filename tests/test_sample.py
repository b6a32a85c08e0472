"""sample.py with the embedded toy: clips, seeds, files, lists of prompts, rewards at test time."""
import json
import subprocess
import sys
from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch

import model
import plumbing.run
import sample
import turbo
from model import to_clip
from plumbing import video
from plumbing.errors import UserError
from plumbing.weights import save
from shapes import grammar, world
from shapes.models import TIMESTEPS

PROMPT = "a red circle rising and a blue square falling"


def run(*args):
    sample.main([str(a) for a in args])


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        sample.main([str(a) for a in args])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in text, text
    return text


def latents(models, config, captions, seeds):
    return turbo.generate(models, captions, seeds, sample.size_of(models, config),
                          sample.sampling_of(models, config))


# ---- clips -------------------------------------------------------------------------------------------------

def test_the_readmes_first_command_shows_what_was_asked_for(tmp_path, capsys):
    """At least 6 of 8 seeds are right in everything; what the prompt leaves unsaid is said."""
    run(PROMPT, "--num", 8, "--out", tmp_path / "out.mp4")
    clips = [video.read_clip(tmp_path / f"out-{i}.mp4") for i in range(8)]
    assert clips[0].shape == (3, 8, 64, 64)
    verdicts = [world.judge(grammar.understand(PROMPT), clip) for clip in clips]
    assert sum(verdict["all"] for verdict in verdicts) >= 6
    assert f"out-0.mp4: {PROMPT} on a " in capsys.readouterr().err


def test_a_prompt_is_sampled_as_typed_on_demand(tmp_path, capsys):
    """Then nothing is said, and a prompt that leaves nothing unsaid is the same either way."""
    run(PROMPT, "--as-typed", "--out", tmp_path / "a.png")
    assert PROMPT not in capsys.readouterr().err
    run(f"{PROMPT} on white", "--out", tmp_path / "b.png")
    run(f"{PROMPT} on white", "--as-typed", "--out", tmp_path / "c.png")
    a, b, c = (video.read_clip(tmp_path / f"{name}.png") for name in "abc")
    assert torch.equal(b, c) and not torch.equal(a, b)


@pytest.mark.parametrize("method", ["turbo", "vcm", "teacher"])
def test_a_clip_depends_on_its_seed_and_not_on_its_batch(method):
    config = sample.Config(method=method, steps=3, model="shapes")
    models = sample.load_models(config)
    captions = [PROMPT, "a green square at rest on white", PROMPT]
    together = latents(models, config, captions, [5, 6, 7])
    assert torch.equal(together, latents(models, config, captions, [5, 6, 7]))              # bit for bit
    for i in range(3):
        alone = latents(models, config, captions[i:i + 1], [5 + i])
        torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_an_option_with_its_default_changes_nothing():
    """--steps 4 is the default, at the toy's own timesteps; other numbers of steps are evenly spaced."""
    config = sample.Config(PROMPT, model="shapes")
    models = sample.load_models(config)
    default = sample.sampling_of(models, config)
    assert sample.sampling_of(models, replace(config, steps=4, guidance=2.0)) == default
    schedule = turbo.Schedule(default.grid)
    assert tuple(default.jumps(schedule)) == TIMESTEPS
    assert sample.sampling_of(models, replace(config, steps=2)).jumps(schedule) == [999, 499]
    with pytest.raises(UserError, match="--steps 51: this model walks on a grid of 8"):
        sample.sampling_of(models, replace(config, steps=51))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".MP4", ""])
def test_files_are_read_back_as_they_were_made(tmp_path, suffix):
    prompt = "a green triangle growing on black"
    run(prompt, "--out", tmp_path / f"clip{suffix}")
    path = tmp_path / f"clip{suffix}" if suffix else tmp_path / "clip" / f"{prompt}-0.mp4"
    config = sample.Config(model="shapes")
    models = sample.load_models(config)
    exact = to_clip(models.vae, latents(models, config, [prompt], [0]))[0]
    error = (video.read_clip(path).float() - exact.float()).abs().mean()
    assert error < (0.1 if suffix == ".png" else 6)                   # mp4 halves colour


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_toy_runs_in_half_precision(tmp_path, dtype):
    prompt = "a red circle moving right"
    run(prompt, "--seed", 1, "--dtype", dtype, "--out", tmp_path / "out.png")
    assert world.judge(grammar.understand(prompt), video.read_clip(tmp_path / "out.png"))["all"]


def test_nan_never_becomes_a_black_clip(tmp_path, monkeypatch, capsys):
    nan = torch.full((1, 8, 8, 8, 8), float("nan"))
    monkeypatch.setattr(turbo, "generate", lambda *args: nan)
    assert "NaN or infinity, which would be a black" in fails(capsys, PROMPT, "--out", tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_motion_of_another_clip(tmp_path, monkeypatch):
    """--motion-from changes the teacher's clip; with λ' = 0 it does not (its energy: test_turbo.py)."""
    paths, invert = [], turbo.ddim_invert

    def inverted_once(*args):
        """50 passes, which are the same for each λ'."""
        paths.append(paths[0] if paths else invert(*args))
        return paths[0]

    monkeypatch.setattr(turbo, "ddim_invert", inverted_once)
    run("a red circle moving right", "--out", tmp_path / "ref.mp4")

    def clip(*argv):
        path = tmp_path / f"out{argv[-1:]}.png"
        run("a blue square moving left on black", "--method", "teacher", "--steps", 2, "--out", path, *argv)
        return video.read_clip(path)

    follow = ("--motion-from", tmp_path / "ref.mp4", "--motion-prompt", "a red circle moving right")
    plain = clip()
    assert torch.equal(clip(*follow, "--motion", 0), plain)
    assert not torch.equal(clip(*follow, "--motion", 1), plain)


# ---- rewards at test time ----------------------------------------------------------------------------------

def test_the_best_of_several_is_written(tmp_path, capsys):
    """It is the clip of one seed, the one with the highest reward; scores, and a sheet in their order."""
    prompt = "a red ring rising on black"
    run(prompt, "--best-of", 4, "--num", 2, "--batch", 3, "--steps", 1, "--out", tmp_path / "x.png",
        "--sheet", tmp_path / "sheet.png")
    lines = capsys.readouterr().out.splitlines()
    for number, seeds in enumerate(({0, 1, 2, 3}, {4, 5, 6, 7})):
        scores = json.loads((tmp_path / f"x-{number}.json").read_text())["scores"]
        totals = [take["total"] for take in scores]
        assert {take["seed"] for take in scores} == seeds and totals == sorted(totals, reverse=True)
        assert totals[0] == pytest.approx(scores[0]["shapes-clip"] + 2 * scores[0]["shapes-viclip"])
        assert f"{totals[0]:.4f}" in lines[number] and f"seed {scores[0]['seed']}" in lines[number]

        run(prompt, "--seed", scores[0]["seed"], "--steps", 1, "--out", tmp_path / f"one-{number}.png")
        best, one = (video.read_clip(tmp_path / f"{name}-{number}.png").float() for name in ("x", "one"))
        assert (best - one).abs().max() <= 1                # another batch: another last bit
    sheet = iio.imread(tmp_path / "sheet.png")
    assert sheet.shape == (8 * (128 + 12) + 12, 8 * (128 + 4) - 4 + 24, 3)
    assert (sheet[:12] == sheet[0, 0]).all() and (sheet[140:152] == sheet[0, 0]).all()      # borders


def test_refined_clips_climb_their_rewards(tmp_path):
    run("a red ring rising on black", "--refine", 3, "--method", "vcm", "--reward", "shapes-clip:2", "--out",
        tmp_path / "x.gif")
    take, = json.loads((tmp_path / "x.json").read_text())["scores"]
    assert len(take["climb"]) == 4 and max(take["climb"]) > take["climb"][0]
    assert take["total"] == pytest.approx(2 * take["shapes-clip"])


# ---- lists of prompts --------------------------------------------------------------------------------------

LISTS = {                               # name and content of a list -> (prompt, name, clips)
    ("a.txt", "a red ring\r\n\n a\u2028box \na red ring"):
        [("a red ring", "a red ring", 1), ("a\u2028box", "a\u2028box", 1)],
    ("a.json", '\ufeff["a red ring"]'): [("a red ring", "a red ring", 1)],
    ("a.json", '[{"prompt_en": "a", "dimension": ["scene"]}]'): [("a", "a", 5)],
    ("a.json", '[{"prompt_en": "a", "dimension": ["scene"]}, {"prompt_en": "a", '
     '"dimension": ["temporal_flickering", "color"]}]'): [("a", "a", 25)],
    ("a.json", json.dumps([{"prompt_en": "x" * 200, "dimension": ["Camera_Motion"]},
                           {"prompt_en": "b", "dimension": ["Diversity"]}])):
        [("x" * 200, "x" * 180, 3), ("b", "b", 20)],
    ("a.jsonl", '{"prompt": "a long/one", "name": "short"}\n\n{"caption": "b/c"}'):
        [("a long/one", "short", 1), ("b/c", "b c", 1)],
    ("a.jsonl", '{"prompt": "a", "name": 0}\n{"prompt": "b", "name": ""}'): [("a", "0", 1), ("b", "b", 1)],
    ("a.csv", 'Index,Prompt\n1,"a dog, running"\n2,"a\ncat"\n'):
        [("a dog, running", "a dog, running", 1), ("a\ncat", "a cat", 1)],
    ("a.tsv", 'text\tkind\na dog, running\tx\n'): [("a dog, running", "a dog, running", 1)],
}


@pytest.mark.parametrize("name, text", LISTS)
def test_lists_of_prompts(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    read = sample.read_prompts(str(tmp_path / name))
    assert [(prompt.text, prompt.name, prompt.count) for prompt in read] == LISTS[name, text]


def test_names_that_are_too_long_are_cut_and_differ(tmp_path, capsys):
    long = "ein großer Hund " * 30
    (tmp_path / "p.txt").write_text(f"{long}läuft\n{long}schläft\nein Hund\n")
    config = sample.Config(prompts=str(tmp_path / "p.txt"), out=str(tmp_path / "clips"), model="vc2", num=2,
                           seed=7)
    jobs = sample.plan_clips(config)
    assert len({job.path for job in jobs}) == 6 and all(len(job.path.name.encode()) <= 255 for job in jobs)
    assert jobs[1].seed == 8 and jobs[5].path.name == "ein Hund-1.mp4"
    assert "2 prompts do not name their files" in capsys.readouterr().err


def test_a_list_goes_on_where_it_ended(tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps([{"prompt_en": "a red ring"}, {"prompt_en": "a blue box"}]))
    argv = ["--prompts", tmp_path / "p.json", "--num", 2, "--steps", 1, "--best-of", 2]
    argv += ["--out", tmp_path / "v2.0"]
    run(*argv)
    clips = sorted((tmp_path / "v2.0").iterdir())
    names = [f"a {name}-{i}.mp4" for name in ("blue box", "red ring") for i in (0, 1)]
    assert [path.name for path in clips] == names
    assert sorted(path.stem + ".mp4" for path in (tmp_path / "v2.0-scores").iterdir()) == names
    before = clips[0].stat().st_mtime_ns
    clips[3].unlink()
    run(*argv)
    assert "3 clips are there already, and stay" in capsys.readouterr().err
    assert clips[3].exists() and clips[0].stat().st_mtime_ns == before
    run(*argv)
    assert "nothing to do" in capsys.readouterr().out
    run(*argv, "--sheet", tmp_path / "sheet.png")           # which is of all clips
    assert iio.imread(tmp_path / "sheet.png").shape[0] == 8 * 140 + 12


def test_a_file_system_that_ignores_case_is_noticed(tmp_path):
    """VBench has two prompts that differ in one capital letter. Played by a folder with two names."""
    two = [sample.Prompt("A box", "A box"), sample.Prompt("a box", "a box")]
    (tmp_path / "clips").mkdir()
    assert len(sample.jobs_of(two, tmp_path / "clips/new", sample.Config())) == 2
    (tmp_path / "CLIPS").symlink_to("clips")
    with pytest.raises(UserError, match="'A box' and 'a box' would both be written"):
        sample.jobs_of(two, tmp_path / "clips/new", sample.Config())


def test_processes_share_the_clips(tmp_path, monkeypatch):
    """Each of torchrun's processes makes its part, without talking to the others; together all."""
    (tmp_path / "p.txt").write_text("a red ring\na blue box\na green triangle\n")
    config = sample.Config(prompts=str(tmp_path / "p.txt"), num=3, out=str(tmp_path / "c"), model="shapes")
    alone, parts = sample.plan_clips(config), []
    for rank in (0, 1):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        parts.append(sample.plan_clips(config))
    assert len(alone) == 9 and {*parts[0]} | {*parts[1]} == {*alone} and not {*parts[0]} & {*parts[1]}


# ---- the command -------------------------------------------------------------------------------------------

def imported(*argv):
    """The modules that a command imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", sample.__file__, *map(str, argv)], text=True,
                          capture_output=True)
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_answers_come_at_once(tmp_path):
    """Help and mistakes without torch, the toy's clip without torch's compiler, open_clip and imageio: it is
    these that take seconds."""
    for argv in (["--help"], [PROMPT, "--frame", 3], ["a dog running"], [PROMPT, "--motion", 1]):
        modules = imported(*argv)
        assert "argparse" in modules and "torch" not in modules
    modules = imported(PROMPT, "--out", tmp_path / "out.mp4")
    assert "torch" in modules and modules.isdisjoint({"torch._dynamo", "open_clip", "imageio"})


@pytest.mark.parametrize("native, usual", [(True, "bfloat16"), (False, "float16")])
def test_networks_work_in_what_the_gpu_multiplies_in(monkeypatch, native, usual):
    def load(student, folder, device, dtype, scale, name):
        return model.Models("shapes", torch.nn.Linear(1, 1).to(dtype), None, None, None)

    monkeypatch.setattr(plumbing.run, "pick_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(sample.shapes, "load", load)
    for dtype, expected in ((None, usual), ("float32", "float32")):
        models = sample.load_models(sample.Config(PROMPT, model="shapes", dtype=dtype))
        assert models.unet.weight.dtype == getattr(torch, expected)


def test_a_students_header_names_its_model(tmp_path, capsys):
    """Without --model the file is taken for what it says it is; a public file says nothing."""
    path = tmp_path / "student.safetensors"
    save(path, {"x.up": torch.ones(1, 1), "x.down": torch.ones(1, 1)}, {"model": "vc2"})
    assert sample.model_of(sample.Config(PROMPT, turbo=str(path))) == "vc2"
    assert "is a student of vc2, not of ms" in fails(capsys, "a dog", "--turbo", path, "--model", "ms")
    assert "add --model vc2 or ms" in fails(capsys, PROMPT, "--turbo", "vc2-turbo-v2")
