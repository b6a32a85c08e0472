"""The trainer: presets, Algorithm 1, processes, numerics, memory, and what a run writes."""
import copy
import dataclasses
import json
import math
import time
from contextlib import nullcontext

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import model
import rewards
import train
import turbo
from data import BadClip
from plumbing import budget, folder, video, weights
from plumbing.errors import UserError
from plumbing.folder import checkpoints
from plumbing.run import Group, pick_device
from solver import Schedule
from turbo import consistency, pseudo_huber, solve, teacher_eps

LOAD_WORLD = train.load_world


def trainer(*argv, seed=0, unet=tiny.UNET, **recipe):
    """A Trainer in the tiny world, LoRA no longer zero."""
    config, group = tiny.configure(*argv, **recipe), Group()
    torch.manual_seed(config.seed)
    _, _, terms = tiny.load_world(config, group)
    made = train.Trainer(config, tiny.networks(seed, unet), terms, group)
    shake(made)
    return made


def shake(made):
    torch.manual_seed(9)
    for p in made.params:
        p.data += 0.02 * torch.randn_like(p)


def batch(n=6, start=0):
    clips = tiny.Clips()
    items = [clips.get(i, torch.Generator().manual_seed(i)) for i in range(start, start + n)]
    return dict(clip=torch.stack([item["clip"] for item in items]), reward_caption=[None] * n, bad=0,
                caption=[item["caption"] for item in items])


# ---- configuration -----------------------------------------------------------------------------------------

def test_presets_are_the_papers():
    table = {
        #             size        fps lora  β_img β_vid rewards
        "turbo-vc2": ((512, 320), 16, 64, 1.0, 2.0, ("hpsv2", "internvideo2")),
        "vcm-vc2": ((512, 320), 16, 64, 1.0, 2.0, ()),
        "turbo-ms": ((256, 256), 8, 32, 2.0, 3.0, ("hpsv2", "viclip")),
        "vcm-ms": ((256, 256), 8, 32, 2.0, 3.0, ()),
    }
    for preset, (size, fps, lora, beta_img, beta_vid, names) in table.items():
        c = train.configure(["--preset", preset])
        assert ((c.width, c.height), c.fps, c.lora) == (size, fps, lora)
        assert (c.image_weight, c.video_weight, c.reward) == (beta_img, beta_vid, names)
        assert (c.frames, c.grid, c.w_min, c.w_max, c.image_frames, c.video_frames) == (16, 50, 5, 15, 6, 8)
        assert (c.train_steps, c.batch, c.lr, c.ema, c.clip) == (10000, 8, 1e-5, 0.95, 1.0)
        assert (c.dtype, c.out) == ("bfloat16", f"runs/{preset}")
    v2 = train.configure(["--preset", "turbo-v2"])
    assert (v2.batch, v2.reward_batch, v2.grid, v2.train_steps) == (24, 8, 200, 8000)


def test_reward_lists_exactly_the_rewards():
    """With β of the preset for its kind, unless a weight is given; one of weight zero is not loaded."""
    def planned(*argv):
        terms = train.planned_rewards(train.configure([*argv]))
        return {term.name: (term.reward, term.weight, term.frames) for term in terms}

    ms = planned("--preset", "turbo-ms", "--reward", "pickscore=a.bin:0.5", "--reward", "viclip")
    assert ms == {"pickscore": ("a.bin", 0.5, 6), "viclip": (None, 3.0, 8)}
    assert planned("--preset", "vcm-vc2") == {}
    assert planned("--preset", "vcm-vc2", "--reward", "hpsv2:0", "--reward", "clip=a.pt") == {
        "clip": ("a.pt", 1.0, 6)}
    assert trainer("--reward", "shapes-clip:0").step(batch()).keys().isdisjoint({"image", "video"})


def test_help_shows_the_defaults_of_the_preset_in_use(capsys):
    """Options alone, in groups; what only a preset fixes is none."""
    for argv, shown in (([], "[800]"), (["--preset", "turbo-v2"], "[8000]")):
        with pytest.raises(SystemExit):
            train.configure([*argv, "--help"])
        text = capsys.readouterr().out
        assert shown in text[text.rindex("--train-steps"):][:200] and "--w-min" not in text
    assert text.count("\n  --") <= 29


def test_states_of_a_caption_that_comes_again_are_kept():
    made, calls = trainer(), []
    made.models.text.register_forward_hook(lambda text, captions, states: calls.extend(*captions))
    made.step(batch()), made.step(batch())
    assert sorted(calls) == sorted({*batch()["caption"]})


def test_a_batch_that_cannot_be_split_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--batch 6, 4 processes: try a multiple of 4"):
        tiny.configure()


# ---- Algorithm 1 -------------------------------------------------------------------------------------------

def by_hand(made, teacher, target, clips, positions):
    """L and its gradient, clip by clip in one joint graph, with separate networks for teacher and target."""
    c, vae, schedule, total, losses = made.config, made.models.vae, Schedule(50), 0, []
    for i, position in enumerate(positions):
        g = train.generator(c.seed, position)
        x, caption = clips["clip"][i:i + 1] / 127.5 - 1, clips["caption"][i]
        text, uncond = made.models.text([caption]), made.models.text([""])
        latent = 4, tiny.T, *(n // vae.config.factor for n in x.shape[3:])
        z0 = vae.encode(x, torch.randn(latent, generator=g)[None])
        t = schedule.grid[torch.randint(50, (1,), generator=g)]
        w = 5 + 10 * torch.rand(1, generator=g)
        eps = torch.randn(z0.shape[1:], generator=g)[None]
        s = (t - 20).clamp(min=0)
        z_t = schedule.add_noise(z0, eps, t)
        z_s = solve(schedule, z_t, t, s, w, *teacher_eps(teacher, z_t, t, text, uncond))
        with torch.no_grad():
            aim = consistency(target, schedule, z_s, s, w, text)
        z0_hat = consistency(made.student, schedule, z_t, t, w, text)
        loss = pseudo_huber(z0_hat, aim)
        pixels = (vae.decode(z0_hat)[0] / 2 + 0.5).clamp(0, 1).transpose(0, 1)                  # (T, 3, H, W)
        image = sorted(torch.randperm(tiny.T, generator=g)[:c.image_frames].tolist())
        start = torch.randint(tiny.T // c.video_frames, (1,), generator=g).item()
        strided = list(range(start, tiny.T, tiny.T // c.video_frames))[:c.video_frames]
        scores = [term.reward(pixels[pick][None], [caption]).mean()
                  for term, pick in zip(made.terms, (image, strided), strict=True)]
        total = total + (loss - c.image_weight * scores[0] - c.video_weight * scores[1]) / len(positions)
        losses.append(torch.stack([loss, *scores]))
    return total, torch.stack(losses).mean(0), torch.autograd.grad(total, made.params)


@pytest.mark.parametrize("lora", [4, 0])
def test_a_step_is_algorithm_1(lora):
    made, clips = trainer("--lora", lora), batch()
    assert (made.teacher is made.student) == bool(lora)     # of big weights there is one copy
    teacher, target = (copy.deepcopy(network.network) for network in (made.teacher, made.student))
    for layer in turbo.lora_layers(teacher).values():
        layer.on = False
    for p, average in zip((p for p in target.parameters() if p.requires_grad), made.ema.average, strict=True):
        p.data = average.clone()
    total, parts, gradient = by_hand(made, teacher, target, clips, range(6))
    made.update = lambda norm, lr, finite: None
    record = made.step(clips)
    assert record["loss"] == pytest.approx(total.item(), rel=1e-4)
    for name, value in zip(("loss_cd", "image", "video"), parts.tolist(), strict=True):
        assert record[name] == pytest.approx(value, rel=1e-4)
    expected = torch.cat([g.flatten() for g in gradient])
    ours = torch.cat([p.grad.flatten() for p in made.params])
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    assert record["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


def test_an_update_is_adamw_and_ema():
    """Gradient clipped at 1, against torch's own functions; θ⁻ = 0.95 θ⁻ + 0.05 θ."""
    made = trainer("--lr", 1e-2)
    theirs = [nn.Parameter(p.detach().clone()) for p in made.params]
    adam = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.999), weight_decay=0)
    average = [a.clone() for a in made.ema.average]
    for _ in range(3):
        torch.manual_seed(0)
        made.gradient.normal_(std=0.1)
        for p, q in zip(made.params, theirs, strict=True):
            q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_(theirs, 1.0)
        adam.step()
        made.update(made.gradient.norm(), 1e-2, True)
        average = [0.95 * a + 0.05 * q.detach() for a, q in zip(average, theirs, strict=True)]
    for p, q, a, b in zip(made.params, theirs, made.ema.average, average, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [4, 0])
def test_a_student_starts_from_another_one(tmp_path, lora):
    """--init: LoRA or whole weights; the teacher stays the teacher, and what does not fit is refused."""
    first, path = trainer("--lora", lora), tmp_path / "turbo.safetensors"
    first.optimizer.state["a step"] = {}
    train.export(first, tmp_path)
    state, header = weights.read_tensors(path), weights.read_header(path)       # as public files have it:
    state |= {name: x[..., None] for name, x in state.items() if name == "init_attn.0.proj_in.weight"}
    weights.save(path, state, header)
    made = train.Trainer(tiny.configure("--lora", lora, "--init", path), tiny.networks(), [], Group())
    alone, c = tiny.networks(), first.models.text(["a"])
    z, t = torch.randn(1, 4, 4, 4, 4), torch.tensor([519])
    with torch.no_grad(), turbo.lora_off(made.teacher):
        assert torch.equal(made.teacher(z, t, c), alone.unet(z, t, c))
    for p, q in zip(made.params, first.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)                # the toy's: float16
    for rank, message in ((0, "holds LoRA, not for --lora 0"), (8, "its rank is not --lora")) if lora else (
            (4, "holds all weights, not for --lora 4"),):
        with pytest.raises(UserError, match=message):
            train.Trainer(tiny.configure("--lora", rank, "--init", path), tiny.networks(), [], Group())
    if not lora:
        del state["out.2.bias"]
        weights.save(path, state, header)
        with pytest.raises(UserError, match="holds a part of a student's weights"):
            train.Trainer(tiny.configure("--lora", 0, "--init", path), tiny.networks(), [], Group())


# ---- processes ---------------------------------------------------------------------------------------------

def test_any_split_of_the_batch_trains_the_same(tmp_path):
    """Six clips on 1, 2 and 3 processes, in passes of 1 to 6: the same losses, moments and weights, to
    rounding; passes of the same clips differ in the order of sums alone."""
    runs = {}
    for world, micro in ((1, 6), (1, 3), (2, 3), (1, 1), (3, 1)):
        out = tmp_path / f"{world}-{micro}"
        options = ("--train-steps", 2, "--save-every", 1, "--micro-batch", micro)
        code, text = tiny.run(out, *options, world=world, on_policy=0.7)
        assert code == 0, text
        runs[world, micro] = tiny.log(out), torch.load(checkpoints(out)[0], weights_only=True)
    for one, other, near in (((1, 6), (1, 3), 1e-4), ((1, 3), (2, 3), 1e-6), ((1, 1), (3, 1), 1e-6)):
        (lines, state), (other_lines, other_state) = runs[one], runs[other]
        assert tiny.same(lines, other_lines, near=2e-4), (one, other)
        a, b = (torch.cat([s["exp_avg"].flatten() for s in each["optimizer"]["state"].values()])
                for each in (state, other_state))               # after clipping: of the gradients
        assert (a - b).norm() < near * a.norm(), (one, other)


def test_the_first_process_indexes_while_the_others_wait(tmp_path):
    def before(rank):
        load = tiny.load_world

        def load_world(config, group):
            with group.rank0_first(), open(tmp_path / "order", "a") as file:
                file.write(f"{rank} begins\n")
                file.flush()
                time.sleep(0.5)
                file.write(f"{rank} ends\n")
            return load(config, group)
        tiny.load_world = load_world

    code, text = tiny.run(tmp_path / "run", "--train-steps", 1, world=2, before=before)
    assert code == 0, text
    assert (tmp_path / "order").read_text().split("\n")[:-1] == ["0 begins", "0 ends", "1 begins", "1 ends"]


def test_devices(monkeypatch):
    """What --device means on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for processes, local_rank, typed, device in (
            (1, 0, "", "cuda:0"), (1, 0, "cpu", "cpu"), (1, 0, "cuda:1", "cuda:1"), (2, 1, "", "cuda:1"),
            (1, 0, "cuda:9", "--device cuda:9: no such device here; this machine has cpu:0, cuda:0, cuda:1"),
            (2, 0, "cuda:1", "--device cuda:1: every process takes a GPU of its own"),
            (3, 2, "cuda", "--device cuda:2: no such device here")):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(UserError, match=device) if "--" in device else nullcontext():
            assert str(pick_device(typed)) == device


# ---- numerics ----------------------------------------------------------------------------------------------

def test_a_step_without_a_finite_gradient_is_skipped_by_all(tmp_path, monkeypatch):
    """One clip of one process has a reward of nan in step 2; ten such steps in a row end the run."""
    def before(rank):
        score, count = tiny.Bright.__call__, iter(range(10 ** 6))
        bad = {6} if not (tmp_path / "ten").exists() else set(range(6, 10 ** 6))       # six calls a step

        def reward(self, clips, captions, generators=None):
            value = score(self, clips, captions)
            return value * float("nan") if rank == 1 and next(count) in bad else value
        tiny.Bright.__call__ = reward

    monkeypatch.setattr(folder, "KEPT", 3)
    options = ["--train-steps", 3, "--save-every", 1]
    code, text = tiny.run(tmp_path / "run", *options, world=2, before=before)
    assert code == 0, text
    lines = tiny.log(tmp_path / "run")
    assert [line["steps_skipped"] for line in lines] == [0, 1, 0] and math.isnan(lines[1]["loss"])
    one, two, three = (torch.load(path, weights_only=True) for path in checkpoints(tmp_path / "run"))
    assert tiny.same(one["params"], two["params"]) and tiny.same(one["optimizer"], two["optimizer"])
    assert not tiny.same(two["params"], three["params"]) and tiny.same(one["ema"], two["ema"])

    (tmp_path / "ten").mkdir()
    code, text = tiny.run(tmp_path / "run", "--train-steps", 30, "--resume", "auto", world=2, before=before)
    assert code == 2 and "10 steps without a finite gradient" in text
    assert [line["steps_skipped"] for line in tiny.log(tmp_path / "run")[3:]] == list(range(10))


def test_bfloat16_networks_and_float32_weights():
    made = trainer("--dtype", "bfloat16")
    for module in (made.models.unet, made.models.vae):
        for p in module.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()
    seen, up = [], turbo.lora_layers(made.models.unet)["time_embed.0"].up
    made.student.register_forward_hook(lambda m, args, out: seen.append(args[0].dtype))
    up.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    record = made.step(batch())
    assert set(seen) == {torch.float32, torch.bfloat16}                     # latents in, LoRA's own product
    assert {x.dtype for x in [*made.params, *made.ema.average, made.gradient]} == {torch.float32}
    exact = trainer().step(batch())
    assert record["loss_cd"] == pytest.approx(exact["loss_cd"], rel=0.1) and math.isfinite(record["loss"])


class Judge(tiny.Bright):
    """With a network that --offload can put away."""

    def __init__(self, name):
        super().__init__(name)
        self.model = nn.Linear(1, 1).requires_grad_(False)
        nn.init.constant_(self.model.weight, 0.5)

    def __call__(self, clips, captions, generators=None):
        return self.model(super().__call__(clips, captions)[:, None])[:, 0]


@pytest.mark.parametrize("lora", [4, 0])
def test_offload_changes_nothing(lora, monkeypatch):
    """Bit for bit, over two micro-batches, another step, and one of a resumed run; what is frozen waits."""
    monkeypatch.setattr(tiny, "Bright", Judge)
    options, results = ["--lora", lora], []
    for argv in (options, [*options, "--offload"]):
        made, again = trainer(*argv), trainer(*argv)
        records = [made.step(batch()), made.step(batch(start=6))]
        again.load_state(made.state(records[-1]))
        records.append(again.step(batch(start=12)))
        results.append((records, again.state(records[-1])))
    (records, state), (others, other) = results
    assert records == others
    assert tiny.same(state | {"config": 0}, other | {"config": 0})

    for owner in (made.student if lora else made.teacher, *made.judges, made.optimizer):
        pairs = made.offload.waiting[owner]
        assert pairs and all(x.data_ptr() == host.data_ptr() for x, host in pairs)
        with made.offload(owner):
            assert not any(x.data_ptr() == host.data_ptr() for x, host in pairs)


# ---- memory ------------------------------------------------------------------------------------------------

def test_the_reward_gradient_lowers_the_peak():
    """Rewards in the UNet's graph, and through ẑ0: the second peak is the larger half's, not the sum's."""
    made, clips = trainer("--batch", 1, "--micro-batch", 1, "--chunk", 1, checkpointing=True), batch(1)
    clips["clip"], peaks = clips["clip"].repeat(1, 1, 1, 4, 4), {}          # 64x64, and latents of 8x8
    vae = model.VAE(model.VAEConfig(channels=32, mult=(1, 1, 1, 1), res_blocks=1))
    made.models.vae = vae.requires_grad_(False)
    for way in ("joint", "staged"):
        made.gradient.zero_()
        with budget.Counter() as memory:
            if way == "staged":
                made.accumulate(clips, range(1))
            else:
                total, _, gradient = by_hand(made, made.teacher, made.student, clips, range(1))
                del total, gradient
        peaks[way] = memory.peak
    assert peaks["staged"] < 0.6 * peaks["joint"], peaks


@pytest.fixture
def tiny_family(monkeypatch):
    vae = model.VAEConfig(channels=32, mult=(1, 1), res_blocks=1, patch=2)
    text = model.TextConfig(width=16, layers=2, heads=2)
    unet = dataclasses.replace(tiny.MOTION, fps=True)
    family = dataclasses.replace(model.FAMILIES["vc2"], unet=unet, vae=vae, text=text)
    monkeypatch.setitem(model.FAMILIES, "vc2", family)
    return "--preset vcm-vc2 --height 16 --width 16 --frames 4".split()


@pytest.mark.parametrize("lora", ["4", "0"])
def test_the_simulation_agrees_with_the_steps_it_simulates(tiny_family, capsys, monkeypatch, lora):
    """Live bytes of fake tensors against those of real ones, float32 on the CPU, part by part."""
    if lora == "0":                                     # once with PyTorch's own mode: see conftest.py
        monkeypatch.setattr(budget, "FakeTensorMode", FakeTensorMode)
    options = [*tiny_family, "--lora", lora, "--dtype", "float32", "--batch", "1", "--dry-run"]
    fake, real = [train.main([*options, n]) for n in ("0", "1")]
    assert fake.peak.keys() == real.peak.keys() == {"construction", "encode", "distill", "backward", "update"}
    assert fake.peak == pytest.approx(real.peak, rel=0.01)
    simulated, made = capsys.readouterr().out.split("held all")[1:]
    assert "a step takes " in made and "a step takes" not in simulated and "most: " in simulated


# ---- results -----------------------------------------------------------------------------------------------

def test_results_load_where_they_are_needed(tmp_path, capsys):
    """turbo.safetensors and the merged UNet: the same student; and a merged UNet that was left behind."""
    unet = dataclasses.replace(tiny.UNET, fps=True)
    made = trainer("--merge", unet=unet)
    made.optimizer.state["a step"] = {}
    assert "init_attn.0.proj_in.down.weight" not in made.named      # Conv1d in VideoCrafter2
    z, t, c, w = torch.randn(1, 4, 4, 4, 4), torch.tensor([519]), made.models.text(["a"]), torch.tensor([7.5])
    with torch.no_grad():
        expected = made.student(z, t, c, w=w, fps=8)
    train.export(made, tmp_path)
    for name, near in (("turbo.safetensors", 2e-3), ("merged.safetensors", 1e-4)):      # the first in float16
        config, state, lora, header = model.read_turbo(tmp_path / name, unet)
        start = tiny.networks(0, unet).unet.state_dict() | {"time_cond_proj.weight": torch.zeros(32, 256)}
        student = weights.fill(model.UNet3D(config), state or start, name, lora=lora)
        with torch.no_grad():
            torch.testing.assert_close(student(z, t, c, w=w, fps=8), expected, rtol=near, atol=near)
        expected_header = dict(model="shapes", method="turbo", grid=50, w_min=5, w_max=15, fps=8, frames=4,
                               height=16, width=16, rank=4, rewards=["image", "video"], motion=None,
                               motion_share=None)
        assert expected_header.items() <= header.items() and header["train"]["lora"] == 4

    later = trainer(unet=unet)
    later.optimizer.state["a step"] = {}
    train.export(later, tmp_path)
    assert "merged.safetensors may be of an earlier step" in capsys.readouterr().err


@pytest.mark.parametrize("preset, method", [("turbo-vc2", "turbo"), ("turbo-v2", "turbo-v2")])
def test_merged_weights_are_also_written_as_released(preset, method, tmp_path):
    """`--merge` leaves t2v_turbo_vc2.pt with the UNet's released names, and says how it was trained."""
    teacher = {"model.diffusion_model.out.2.bias": torch.zeros(4), "first_stage_model.x": torch.ones(1)}
    torch.save({"state_dict": teacher}, tmp_path / "model.ckpt")
    made = trainer("--merge", unet=dataclasses.replace(tiny.UNET, fps=True))
    made.optimizer.state["a step"] = {}
    made.config = dataclasses.replace(made.config, preset=preset, motion=0, teacher=str(tmp_path))
    train.export(made, tmp_path)
    *_, header = model.read_turbo(tmp_path / "t2v_turbo_vc2.pt", made.models.unet.config)
    assert (header["method"], header["whole"]) == (method, True)
    written = torch.load(tmp_path / "t2v_turbo_vc2.pt")["state_dict"]
    assert written["first_stage_model.x"] == 1
    assert torch.equal(written["model.diffusion_model.out.2.bias"], made.models.unet.out[2].bias)


def test_a_student_without_a_step_or_not_finite_is_not_exported(tmp_path):
    made = trainer()
    with pytest.raises(UserError, match="no step had a finite gradient, so there is no student to export"):
        train.export(made, tmp_path)
    made.step(batch())
    made.params[0].data.flatten()[0] = float("nan")
    with pytest.raises(UserError, match="the student is not finite, so it is not exported"):
        train.export(made, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_log_samples_and_weights(tmp_path):
    options = ["--sample-every", 2]
    code, text = tiny.run(tmp_path / "run", *options, world=2)
    assert code == 0, text
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0].keys() == {"step", "loss", "loss_cd", "image", "video", "clips_skipped", "grad_norm",
                               "lr", "steps_skipped", "memory_gib", "seconds"} and "oracle" in lines[1]
    assert lines[0]["seconds"].keys() == {"data", "encode", "distill", "rewards", "backward", "update"}
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {
        f"step-00000{step}-{i}.gif" for step in (2, 4) for i in (0, 1)}
    assert "loss_cd" in text and "4/4" in text
    names = load_file(tmp_path / "run" / "turbo.safetensors")
    assert {name.rpartition(".")[2] for name in names} == {"down", "up"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lora"] == 4


def test_bad_clips_are_counted_over_all_processes(tmp_path):
    def before(rank):
        calls = iter(range(10 ** 6))

        def on_get(index):
            if next(calls) == 0:
                raise BadClip(f"clip {index}", "broken")
        tiny.Clips.on_get = staticmethod(on_get)

    assert tiny.run(tmp_path / "run", "--train-steps", 2, world=2, before=before)[0] == 0
    assert [line["clips_skipped"] for line in tiny.log(tmp_path / "run")] == [2, 2]
    assert tiny.run(tmp_path / "run", "--train-steps", 3, "--resume", "auto", world=2, before=before)[0] == 0
    assert tiny.log(tmp_path / "run")[-1]["clips_skipped"] == 4
    assert len((tmp_path / "run" / "bad_clips.jsonl").read_text().splitlines()) == 4


def test_the_whole_command_on_files(tmp_path, tiny_family):
    """The documented command on a folder of videos, decoded by workers, with rewards named by --reward."""
    (tmp_path / "clips").mkdir()
    for i in range(8):
        clip = tiny.Clips().get(i, torch.Generator().manual_seed(i))["clip"]
        video.write_video(tmp_path / "clips" / f"{i}.mp4", clip, 8)
        (tmp_path / "clips" / f"{i}.txt").write_text(f"noise {i}")

    def before(rank):
        def load(model, teacher, **options):
            assert (model, teacher) == ("vc2", str(tmp_path / "model.ckpt"))
            assert options["dtype"] == torch.bfloat16
            made = tiny.networks(0, dataclasses.replace(tiny.UNET, fps=True))
            for p in made.unet.parameters():
                p.data = p.data.bfloat16()
            return made
        tiny.load_world, model.load = LOAD_WORLD, load
        rewards.load = lambda name, path, device, dtype, frames: tiny.Bright(name)

    for name in ("model.ckpt", "a.pt", "b.pt"):
        (tmp_path / name).touch()
    argv = ["--preset", "turbo-vc2", "--teacher", tmp_path / "model.ckpt", "--data", tmp_path / "clips",
            "--reward", f"hpsv2={tmp_path / 'a.pt'}", "--reward", f"internvideo2={tmp_path / 'b.pt'}",
            "--dtype", "bfloat16", "--workers", 1, "--batch", 2, "--lora", 4, "--frames", 8,
            "--sample-every", 0, "--height", 16, "--width", 16, "--train-steps", 3]
    code, text = tiny.run(tmp_path / "run", *argv, world=2, before=before)
    assert code == 0, text
    lines = tiny.log(tmp_path / "run")
    assert len(lines) == 3 and {"hpsv2", "internvideo2"} < lines[0].keys()
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run" / "turbo.safetensors").exists()
