"""sample.py with the embedded toy: files, seeds, prompts, messages."""
import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file

import model
import plumbing.run
import sample
import turbo
from model import UNet3D, UNetConfig, compile_layers, to_clip
from plumbing import cli, prompts, video
from plumbing.weights import save_checkpoint
from shapes import grammar, world
from shapes.models import TIMESTEPS

PROMPT = "a red circle rising and a blue square falling"


def run(*args):
    sample.main([str(a) for a in args])


def generate(models, captions, seeds, config):
    return turbo.generate(
        models, captions, seeds, sample.size_of(models, config), sample.sampling_of(models, config)
    )


def fails(capsys, *args, command=sample.main):
    with pytest.raises(SystemExit) as stop:
        command([str(a) for a in args])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in text and len(text.splitlines()) == 1, text
    return text


def test_the_readmes_first_command_shows_what_was_asked_for(tmp_path):
    """The clip of its seed is right in everything, and so are at least 4 of 8 seeds."""
    run(PROMPT, "--num", 8, "--out", tmp_path / "out.mp4", "--sheet", tmp_path / "sheet.png")
    clips = [video.read_clip(tmp_path / f"out-{i}.mp4") for i in range(8)]
    assert clips[0].shape == (3, 8, 64, 64) and iio.imread(tmp_path / "sheet.png").shape == (512, 512, 3)
    verdicts = [world.judge(grammar.understand(PROMPT), clip) for clip in clips]
    assert (
        verdicts[0]["all"] == 1
        and sum(v["all"] for v in verdicts) >= 4
        and sum(v["colour"] * v["shape"] for v in verdicts) >= 6
    )


def test_one_thing_is_right(tmp_path):
    """In at least 7 of 8 clips."""
    prompt = "a red circle moving right"
    run(prompt, "--num", 8, "--out", tmp_path / "out.safetensors")
    assert (
        sum(
            world.judge(grammar.understand(prompt), video.read_clip(tmp_path / f"out-{i}.safetensors"))["all"]
            for i in range(8)
        )
        >= 7
    )


def imported(*argv):
    """The modules that a command imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", sample.__file__, *map(str, argv)], text=True,
                          capture_output=True)
    assert "Traceback" not in done.stderr, done.stderr
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in imports}


def test_answers_come_at_once(tmp_path):
    """Help and mistakes without torch, the toy's clip without torch's compiler, open_clip and imageio: it is
    these that take seconds."""
    for argv in (["--help"], [PROMPT, "--frame", 3], ["a dog running"], [PROMPT, "--eta", 1]):
        modules = imported(*argv)
        assert "argparse" in modules and "torch" not in modules
    modules = imported(PROMPT, "--out", tmp_path / "out.mp4")
    assert "torch" in modules and modules.isdisjoint({"torch._dynamo", "open_clip", "imageio"})


@pytest.mark.parametrize("native, usual", [(True, "bfloat16"), (False, "float16")])
def test_networks_work_in_what_the_gpu_multiplies_in(monkeypatch, native, usual):
    monkeypatch.setattr(plumbing.run, "pick_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(sample.shapes, "load", lambda student, folder, device, dtype, scale: dtype)
    assert sample.load_models(sample.Config(PROMPT)) == getattr(torch, usual)
    assert sample.load_models(sample.Config(PROMPT, dtype="float32")) == torch.float32


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".safetensors", ".png", ""])
def test_files_are_read_back_as_they_were_made(tmp_path, suffix):
    run(
        "a green triangle growing",
        "--out",
        tmp_path / f"clip{suffix}",
        "--latents",
        tmp_path / "z.safetensors",
    )
    path = tmp_path / f"clip{suffix}" if suffix else tmp_path / "clip" / "a green triangle growing-0.mp4"
    clip, z = video.read_clip(path), load_file(tmp_path / "z.safetensors")["latents"]
    models = sample.load_models(sample.Config())
    exact = to_clip(models.vae, z)[0]
    assert z.dtype == torch.float32 and z.shape == (1, 8, 8, 8, 8)
    assert (clip.float() - exact.float()).abs().mean() < (
        0.1 if suffix in (".safetensors", ".png") else 6
    )  # mp4 halves colour


@pytest.mark.parametrize("method", ["turbo", "vcm", "teacher"])
def test_a_clip_depends_on_its_seed_and_not_on_its_batch(method):
    config = sample.Config(method=method, steps=3)
    models = sample.load_models(config)
    captions = [PROMPT, "a green square at rest on white", PROMPT]
    together = generate(models, captions, [5, 6, 7], config)
    assert torch.equal(together, generate(models, captions, [5, 6, 7], config))  # bit for bit
    for i in range(3):
        alone = generate(models, captions[i:i + 1], [5 + i], config)
        torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_timesteps_of_ones_own(tmp_path):
    """--steps makes even ones; the toy's own 4 are others."""
    def latents(*args):
        run(PROMPT, *args, "--latents", tmp_path / "z.safetensors", "--out", tmp_path / "clip.png")
        return load_file(tmp_path / "z.safetensors")["latents"]

    even, usual = latents("--steps", 4), latents()
    assert torch.equal(latents("--timesteps", "999,749,499,249"), even)
    assert torch.equal(latents("--timesteps", "999,624,499,374"), usual) and not torch.equal(usual, even)
    assert torch.equal(latents("--timesteps", "999,499"), latents("--steps", 2))

    models = sample.load_models(sample.Config())
    assert models.sampling.timesteps == TIMESTEPS
    models.header["steps"] = 10                             # a student of another grid never saw them
    assert (models.sampling.grid, models.sampling.timesteps) == (10, ())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_toy_runs_in_half_precision(tmp_path, dtype):
    run("a red circle moving right", "--seed", 1, "--dtype", dtype, "--out", tmp_path / "out.safetensors")
    assert world.judge(
        grammar.understand("a red circle moving right"), video.read_clip(tmp_path / "out.safetensors")
    )["all"]


def test_compile_captures_every_layer_in_one_graph(tmp_path, monkeypatch):
    """All of --compile but the code made from the graph (it takes minutes on a CPU: see the slow test)."""
    run(PROMPT, "--latents", tmp_path / "eager.safetensors", "--out", tmp_path / "out.mp4")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    run(PROMPT, "--latents", tmp_path / "compiled.safetensors", "--out", tmp_path / "out.mp4", "--compile")
    a, b = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("eager", "compiled"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compile_predicts_the_same_noise():
    """With the compiler itself, and a network of the published kind, for it has fewer layers."""
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=8,
        channels=32,
        mult=(1,),
        attention_levels=(0,),
        context_dim=128,
        head_dim=32,
        groups=8,
        init_heads=1,
    )
    unet = UNet3D(config).eval()
    for p in unet.parameters():
        p.data = 0.1 * torch.randn_like(p)
    z, t, c = torch.randn(1, 8, 4, 8, 8), torch.tensor([500]), torch.randn(1, 25, 128)
    with torch.no_grad():
        eager = unet(z, t, c)
        compile_layers(unet)
        torch.testing.assert_close(unet(z, t, c), eager, rtol=1e-4, atol=1e-4)


def test_several_clips_and_a_file_of_prompts(tmp_path, capsys):
    run("a red ring rising", "--num", 2, "--out", tmp_path / "x.gif")
    assert sorted(p.name for p in tmp_path.glob("*.gif")) == ["x-0.gif", "x-1.gif"]
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"prompt_en": "a red ring rising"}, {"prompt_en": "a blue box falling"}])
    )
    folder = tmp_path / "clips"
    run("--prompts", tmp_path / "prompts.json", "--num", 2, "--out", folder)
    names = [
        "a blue box falling-0.mp4",
        "a blue box falling-1.mp4",
        "a red ring rising-0.mp4",
        "a red ring rising-1.mp4",
    ]
    assert sorted(p.name for p in folder.iterdir()) == names
    kept = (folder / names[0]).stat().st_mtime_ns
    (folder / names[3]).unlink()
    run("--prompts", tmp_path / "prompts.json", "--num", 2, "--out", folder)
    assert (
        sorted(p.name for p in folder.iterdir()) == names and (folder / names[0]).stat().st_mtime_ns == kept
    )
    run("--prompts", tmp_path / "prompts.json", "--num", 2, "--out", folder)
    assert "nothing to do" in capsys.readouterr().out


# ---- VBench's folders, standard input, several processes ---------------------------------------------------

LISTS = {                               # entries of a prompts file -> clips that are made of each
    '["a red ring"]': {"a red ring": 1},
    '[{"prompt_en": "a red ring"}]': {"a red ring": 1},
    '[{"prompt_en": "a red ring", "dimension": ["scene"]}]': {"a red ring": 5},
    '[{"prompt_en": "a red ring", "dimension": ["scene"]}, {"prompt_en": "a red ring", '
    '"dimension": ["temporal_flickering", "color"]}]': {"a red ring": 25},
}


@pytest.mark.parametrize("text", LISTS)
def test_vbenchs_list_says_how_many_clips(tmp_path, text):
    (tmp_path / "list.json").write_text("\ufeff" + text, encoding="utf-8")
    assert prompts.read_prompts(str(tmp_path / "list.json")) == LISTS[text]


def test_prompts_are_whole_in_names_and_differ_in_capitals(tmp_path):
    """As VBench wants: 13 of its prompts have over 180 characters, two differ in one capital letter."""
    long = "a red circle " + "and a blue square " * 10
    known = {long: 2, "A blue box falling": 1, "a blue box falling": 1}
    jobs = prompts.plan(known, tmp_path, seed=7)
    assert [(job.prompt, job.seed, job.path.name) for job in jobs] == [
        (long, 7, f"{long}-0.mp4"),
        (long, 8, f"{long}-1.mp4"),
        ("A blue box falling", 7, "A blue box falling-0.mp4"),
        ("a blue box falling", 7, "a blue box falling-0.mp4"),
    ]
    prompts.check_names(jobs)


def test_a_file_system_that_ignores_case_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "ignores_case", lambda folder: True)
    with pytest.raises(ValueError, match="'A box' and 'a box' differ in capital letters only"):
        prompts.check_names(prompts.plan({"A box": 1, "a box": 1}, tmp_path, 0))


def test_a_sheet_is_of_all_clips_though_they_are_there(tmp_path):
    (tmp_path / "p.txt").write_text("a red ring\na blue box\n")
    argv = ["--prompts", tmp_path / "p.txt", "--out", tmp_path / "clips", "--sheet", tmp_path / "sheet.png"]
    for _ in range(2):
        run(*argv, "--latents", tmp_path / "z.safetensors")
        assert load_file(tmp_path / "z.safetensors")["latents"].shape[0] == 2
        assert iio.imread(tmp_path / "sheet.png").shape == (128, 512, 3)


def test_typed_prompts_become_clips_at_once(tmp_path, monkeypatch, capsys):
    """A wrong line is complained about, and the next one is made; the models are loaded once."""
    loaded, load = [], sample.load_models
    monkeypatch.setattr(sample, "load_models", lambda config: loaded.append(1) or load(config))
    monkeypatch.setattr(
        "sys.stdin", io.StringIO(f"a red ring\n\na dog\n{'x' * 300}\na/red ring\na blue box\na red ring\n")
    )
    with pytest.raises(SystemExit) as stop:
        run("--prompts", "-", "--out", tmp_path)
    said = capsys.readouterr()
    assert stop.value.code == 2 and len(loaded) == 1
    assert said.out.splitlines() == [
        str(tmp_path / f"a {name}-0.mp4") for name in ("red ring", "blue box", "red ring")
    ]
    complaints = [line.rpartition("\r")[2] for line in said.err.splitlines() if "sample.py: " in line]
    assert [next(word for word in ("dog", "unknown", "both") if word in line) for line in complaints] == [
        "dog",
        "unknown",
        "both",
    ]


def test_processes_share_the_clips(tmp_path, monkeypatch):
    """Each of torchrun's processes makes its part, without talking to the others; together all."""
    (tmp_path / "p.txt").write_text("a red ring\na blue box\na green triangle\n")
    config = sample.Config(
        prompts=str(tmp_path / "p.txt"), num=3, out=str(tmp_path / "clips"), model="shapes"
    )
    alone, shares = sample.plan_clips(config), []
    for rank in (0, 1):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        shares.append(sample.plan_clips(config))
    assert len(alone) == 9 and {*shares[0]} | {*shares[1]} == {*alone} and not {*shares[0]} & {*shares[1]}
    run("--prompts", tmp_path / "p.txt", "--num", 3, "--out", tmp_path / "clips")
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    assert sample.plan_clips(config) == shares[0]                       # the second one's are there


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["a dog running"], "real models: --model vc2"),
        ([], "give one prompt"),
        ([PROMPT, "--height", "70"], "height 70 is not a multiple of"),
        ([PROMPT, "--steps", "51"], "51 sampling steps"),
        ([PROMPT, "--steps", "0"], "at least 1"),
        ([PROMPT, "--frame", "3"], "did you mean --frames"),
        (["a", "red", "circle"], "quote the prompt"),
        ([PROMPT, "--prompts", "x.txt"], "give one prompt"),
        (["--prompts", "missing.txt"], "missing.txt"),
        ([PROMPT, "--turbo", "missing.safetensors"], "missing.safetensors"),
        ([PROMPT, "--model", "vc2", "--teacher", "missing.ckpt", "--turbo", "missing.pt"], "missing"),
        ([PROMPT, "--model", "vc2", "--method", "vcm"], "no public VCM"),
        ([PROMPT, "--dtype", "int8"], "int8"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path, monkeypatch, capsys, args, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in fails(capsys, *args)


def test_a_students_header_names_its_model(tmp_path, capsys):
    """Without --model the file is taken for what it says it is; a public .pt file says nothing."""
    save_checkpoint(
        tmp_path / "student.safetensors",
        {"x.up": torch.ones(1, 1), "x.down": torch.ones(1, 1)},
        {"model": "vc2"},
    )
    assert "LoRA for x, a layer that this UNet does not have" in fails(
        capsys, "an astronaut", "--turbo", tmp_path / "student.safetensors"
    )
    assert "--model vc2 or --model ms" in fails(capsys, PROMPT, "--turbo", "unet_lora.pt")
    (tmp_path / "student.safetensors").write_bytes(b"x" * 100)
    assert "not a weight file" in fails(capsys, PROMPT, "--turbo", tmp_path / "student.safetensors")


def test_options_of_every_kind_are_read():
    words = "a b --num 2 --dtype bfloat16 --compile --eta 0.5 --out x.gif".split()
    assert cli.parse(sample.Config, [" ".join(words[:2]), *words[2:]], positional="prompt") == sample.Config(
        "a b", num=2, dtype="bfloat16", compile=True, eta=0.5, out="x.gif")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a message for machines without a GPU")
def test_no_gpu_is_said(capsys):
    assert "no usable GPU" in fails(capsys, PROMPT, "--device", "cuda")


def test_the_budget_of_a_clip_needs_no_files(monkeypatch, capsys):
    """--dry-run on fake tensors: parts, FLOP, memory, seconds at the rates of three cards."""
    unet = replace(model.FAMILIES["vc2"].unet, channels=32, mult=(1, 2), res_blocks=1, attention_levels=(0,),
                   head_dim=16, context_dim=16, init_heads=2, groups=8)
    vae = model.VAEConfig(channels=32, mult=(1, 1), res_blocks=1, patch=2)
    tiny = replace(model.FAMILIES["vc2"], unet=unet, vae=vae,
                   text=model.TextConfig(width=16, layers=2, heads=2), frames=4, height=16, width=16)
    monkeypatch.setitem(model.FAMILIES, "vc2", tiny)
    sample.main(["a dog", "--model", "vc2", "--dry-run"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("UNet", "captions", "one step", "decode", "TFLOP", "H100", "most: "))
    assert "4 frames, 4 steps" in out
    sample.main(["a dog", "--model", "vc2", "--dry-run", "--timesteps", "999,519"])
    assert "4 frames, 2 steps" in capsys.readouterr().out


def test_motion_of_another_clip(tmp_path, monkeypatch):
    """--motion-from changes the teacher's clip; with λ' = 0 it does not (its energy: test_turbo.py)."""
    paths, invert = [], turbo.ddim_invert

    def inverted(*told):
        """50 passes, which are the same for each λ'."""
        paths.append(paths[0] if paths else invert(*told))
        return paths[0]

    monkeypatch.setattr(turbo, "ddim_invert", inverted)
    sample.main(["a red circle moving right", "--out", f"{tmp_path}/ref.mp4"])

    def latents(*argv):
        sample.main(["a blue square moving left", "--method", "teacher", "--steps", "2", "--out",
                     f"{tmp_path}/out.gif", "--latents", f"{tmp_path}/z.safetensors", *argv])
        return load_file(tmp_path / "z.safetensors")["latents"]

    follow = ("--motion-from", f"{tmp_path}/ref.mp4", "--motion-prompt", "a red circle moving right")
    plain = latents()
    assert torch.equal(latents(*follow, "--motion", "0"), plain)
    assert not torch.allclose(latents(*follow, "--motion", "1"), plain, atol=1e-3)
