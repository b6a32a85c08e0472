"""The paper's formulas against closed forms, LoRA against peft, the reward gradient against the joint
graph."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_model
import torch
from oracles import peft, sizes
from test_model import published
from torch import nn

import model
import solver
import turbo
from solver import Sampling, Schedule, cfg, ddim_step, predict_z0
from turbo import (
    EMA,
    LoRA,
    Noise,
    RewardTerm,
    Step,
    boundary,
    consistency,
    distill,
    inject,
    lora_off,
    merge,
    pseudo_huber,
    sample,
    solve,
    teacher_eps,
    total_loss,
)

SMALL = model.UNetConfig(**sizes(32, (1, 2), 1, attention_levels=(0,)), head_dim=16,
                         context_dim=24, init_heads=2, groups=8, fps=True, guidance=True)


def unet(seed=0, dtype=torch.float32, config=SMALL):
    """A small UNet whose every weight is random, those that start at zero included."""
    torch.manual_seed(seed)
    network = model.UNet3D(config)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network.to(dtype).eval()


def batch(B=2, dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(B, *shape, dtype=dtype) for shape in ((4, 3, 4, 4), (5, 24), (5, 24))]   # z, c, null


def shake(network, seed=2):
    """LoRA that does something."""
    torch.manual_seed(seed)
    for layer in turbo.lora_layers(network).values():
        nn.init.normal_(layer.up.weight, std=0.05)


def test_f_is_the_identity_at_t_0():
    z, c, _ = batch()
    t = torch.zeros(2, dtype=torch.long)
    assert torch.equal(consistency(unet(), Schedule(50), z, t, torch.tensor([5.0, 15.0]), c), z)


def test_boundary_coefficients():
    skip, out = boundary(torch.tensor([0, 19, 999]))
    scaled = torch.tensor([0.0, 190.0, 9990.0])
    torch.testing.assert_close(skip.flatten(), 0.25 / (scaled ** 2 + 0.25))
    torch.testing.assert_close(out.flatten(), scaled / (scaled ** 2 + 0.25) ** 0.5)


def test_pseudo_huber():
    a = torch.tensor([0.0, 3.0, -1e-4])
    expected = torch.tensor([0.0, (9 + 1e-6) ** 0.5 - 1e-3, (1e-8 + 1e-6) ** 0.5 - 1e-3]).mean()
    torch.testing.assert_close(pseudo_huber(a, torch.zeros(3)), expected)
    assert pseudo_huber(a, a) == 0


def test_on_policy_clips_are_where_sampling_comes():
    """Each of them, with its own noise, against a sampler written out for it alone; others stay."""
    schedule, z0, n = Schedule(8), torch.randn(40, 1, 1, 2, 2), 4

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(len(z0))]

    def f(z, t, clips):
        return torch.tanh(z) + (t / 1000 + torch.tensor(clips)).view(-1, 1, 1, 1, 1)

    streams, jumps_made = generators(), []
    drawn = Step.draw(z0, schedule, (5.0, 15.0), streams)
    made, step = turbo.on_policy(f, schedule, z0, drawn, 0.5, n, streams)

    streams = generators()
    Step.draw(z0, schedule, (5.0, 15.0), streams)
    for i, stream in enumerate(streams):
        t, expected = drawn.t[i], z0[i:i + 1]
        if torch.rand(1, generator=stream) < 0.5:
            jumps_made.append(torch.randint(n, (1,), generator=stream).item())
            t, expected = 999, torch.zeros(1, 1, 1, 2, 2)
            for s in (749, 499, 249)[:jumps_made[-1]]:
                noise = torch.randn(1, 1, 1, 2, 2, generator=stream)
                z = schedule.add_noise(expected, noise, torch.tensor([t]))
                expected, t = torch.tanh(z) + t / 1000 + i, s
        assert step.t[i] == t and torch.allclose(made[i:i + 1], expected, atol=1e-6)
    assert set(jumps_made) == {0, 1, 2, 3} and 10 < len(jumps_made) < 30 and torch.equal(step.eps, drawn.eps)


def test_distillation_loss_is_eq_6():
    """Against Eq. 5 to 7 written out, with LoRA off for the teacher and θ⁻ for the target."""
    (z0, c, null), schedule, network = batch(), Schedule(50), unet()
    teacher = copy.deepcopy(network)
    ema = EMA(inject(network, 4))
    shake(network)
    online, target = copy.deepcopy(network), copy.deepcopy(network)
    for p, average in zip((p for p in target.parameters() if p.requires_grad), ema.average):
        p.data = average.clone()                                       # θ⁻ is still the start: LoRA zero
    step = Step(torch.tensor([999, 19]), torch.tensor([5.0, 9.0]), torch.randn_like(z0))
    loss, z0_hat = distill(network, network, ema, schedule, step, z0, c, null, fps=16)

    alpha, sigma = schedule.at(step.t)
    z_t, s = alpha * z0 + sigma * step.eps, schedule.previous(step.t)
    z_s = solve(schedule, z_t, step.t, s, step.w, *teacher_eps(teacher, z_t, step.t, c, null, fps=16))
    f = consistency(online, schedule, z_t, step.t, step.w, c, fps=16)
    f_target = consistency(target, schedule, z_s, s, step.w, c, fps=16)
    torch.testing.assert_close(z0_hat, f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, pseudo_huber(f, f_target), rtol=1e-4, atol=1e-6)
    assert s[1] == 0 and torch.equal(f_target[1], z_s[1])  # below the grid the target is ẑ_s itself


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(12, 20), (5, 12)), (nn.Conv2d(12, 20, 3, 2, 1), (5, 12, 8, 8)),
    (nn.Conv3d(12, 20, (3, 1, 1), padding=(1, 0, 0)), (2, 12, 4, 3, 3))])
def test_lora_agrees_with_peft(layer, shape):
    x, config = torch.randn(shape), peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).eval()
    ours = LoRA(copy.deepcopy(layer), 4)
    module = theirs.base_model.model[0]
    with torch.no_grad():
        for name, part in (("up", module.lora_B), ("down", module.lora_A)):
            nn.init.normal_(part["default"].weight, std=0.3)
            getattr(ours, name).weight.copy_(part["default"].weight)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()[0]
    torch.testing.assert_close(merge(nn.Sequential(ours))[0].weight, merged.weight, rtol=1e-5, atol=1e-6)


def test_lora_off_is_the_teacher_and_merging_is_lora_on():
    (z, c, _), network, t = batch(), unet(), torch.tensor([999, 19])
    before, w = network(z, t, c), torch.tensor([5.0, 9.0])
    params = inject(network, 4)
    torch.testing.assert_close(network(z, t, c), before, rtol=1e-6, atol=1e-6)      # zero at the start
    shake(network)
    with lora_off(network):
        torch.testing.assert_close(network(z, t, c), before, rtol=1e-6, atol=1e-6)
    student = network(z, t, c, w=w)
    assert (student - before).abs().max() > 0.01
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in params}
    merged = merge(network)
    assert not turbo.lora_layers(merged)
    torch.testing.assert_close(merged(z, t, c, w=w), student, rtol=1e-4, atol=1e-4)


# ---- rewards -----------------------------------------------------------------------------------------------

def decode(z):
    """A stand-in decoder, nonlinear, 4 latent channels → 3 of pixels, frame by frame."""
    mix = torch.tensor([[1, 0.2, 0, 0.5], [0, 1, -0.3, 0.1], [0.4, 0, 1, 0]], dtype=z.dtype)
    return torch.tanh(torch.einsum("dc,bcthw->bdthw", mix, z)).repeat_interleave(2, 3)


def brightness(clips, captions, generators=None):
    return (clips ** 2).flatten(1).mean(1) * torch.tensor([len(c) for c in captions], dtype=clips.dtype)


def flicker(clips, captions, generators=None):
    return (clips[:, 1:] - clips[:, :-1]).pow(2).flatten(1).mean(1)


@pytest.mark.parametrize("chunk", [0, 1, 2, 5])
def test_reward_gradient_is_that_of_the_joint_graph(chunk):
    """∇_LoRA (L_CD - β_img J_img - β_vid J_vid): through ẑ0 in three stages, and through one graph. float64,
    1e-10."""
    (z0, c, null), schedule = batch(dtype=torch.float64), Schedule(50)
    schedule.alpha, schedule.sigma = schedule.alpha.double(), schedule.sigma.double()
    network = unet(dtype=torch.float64)
    params = inject(network, 4)
    for p in params:
        p.data = p.data.double()
    shake(network)
    terms = [RewardTerm(brightness, 1.5, 2, name="image"), RewardTerm(flicker, -2.5, 3, True, "video")]
    step = Step(torch.tensor([999, 519]), torch.tensor([5.0, 9.0], dtype=torch.float64), torch.randn_like(z0))
    captions = ["one", "three"]

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    loss, z0_hat = distill(network, network, None, schedule, step, z0, c, null)
    g, scores = turbo.reward_gradient(z0_hat, captions, decode, terms, generators(), chunk=chunk)
    staged = torch.autograd.grad(total_loss(loss, z0_hat, g), params, allow_unused=True)

    loss, z0_hat = distill(network, network, None, schedule, step, z0, c, null)
    joint, draws = loss, generators()
    for term in terms:
        picks = [term.pick(3, d) for d in draws]
        shown = torch.stack([decode(z0_hat)[b, :, pick].transpose(0, 1) for b, pick in enumerate(picks)])
        shown = (shown / 2 + 0.5).clamp(0, 1)
        value = term.reward(shown, captions)
        torch.testing.assert_close(scores[term.name].double(), value.detach(), rtol=1e-6, atol=1e-9)
        joint = joint - term.weight * value.mean()
    expected = torch.autograd.grad(joint, params, allow_unused=True)
    assert sum(e is not None and e.abs().max() > 1e-6 for e in expected) > 50
    for a, b in zip(staged, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_frames_are_picked_as_the_paper_says():
    image, video = RewardTerm(brightness, 1, 6), RewardTerm(flicker, 1, 8, video=True)
    for seed in range(20):
        random = image.pick(16, torch.Generator().manual_seed(seed))
        assert len(set(random)) == 6 and random == sorted(random) and random[-1] < 16
        strided = video.pick(16, torch.Generator().manual_seed(seed))
        assert {b - a for a, b in zip(strided, strided[1:])} == {2} and strided[0] in (0, 1)
    assert video.pick(8, torch.Generator()) == list(range(8))
    with pytest.raises(ValueError, match="looks at 8 frames"):
        video.pick(7, torch.Generator())


# ---- sampling ----------------------------------------------------------------------------------------------

def test_few_step_sampling_agrees_with_diffusers_lcm(monkeypatch):
    """Against LCMScheduler for a made-up ε, step by step with the same noise. Its boundary scaling is the
    same, σ_data 0.5 and 10 t."""
    import diffusers.schedulers.scheduling_lcm as lcm

    theirs = lcm.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=50)
    theirs.set_timesteps(timesteps=[999, 759, 519, 279])
    schedule, noise = Schedule(50), Noise([3, 4], (4, 2, 3, 3))

    def eps_model(z, t):
        return torch.sin(z) + t.view(-1, 1, 1, 1, 1) / 2000

    def f(z, t):
        c_skip, c_out = boundary(t)
        return c_skip * z + c_out * predict_z0(z, eps_model(z, t), *schedule.at(t))

    ours = sample(f, schedule, noise, schedule.few_steps(4))
    noise, denoised = Noise([3, 4], (4, 2, 3, 3)), None
    z = noise()
    for t in theirs.timesteps:
        fresh = noise()
        monkeypatch.setattr(lcm, "randn_tensor", lambda *args, fresh=fresh, **kwargs: fresh)
        z, denoised = theirs.step(eps_model(z, t.expand(2)), t, z, return_dict=False)
    torch.testing.assert_close(ours, denoised, rtol=1e-4, atol=1e-4)


# ---- motion guidance ---------------------------------------------------------------------------------------

def test_motion_gradient_and_the_guided_step_as_published():
    """`get_motion_prior_score`, `compute_temp_loss` and v2's guided DDIM step of the T2V-Turbo code, run clip
    by clip."""
    unet = test_model.original(replace(test_model.SMALL, fps=True))
    z, t, c = test_model.INPUTS
    gradient, energy = turbo.motion_gradient(unet, z, test_model.randn(7, *z.shape), t, c, fps=8)
    torch.testing.assert_close(energy, torch.tensor([777.966858, 793.613809]), rtol=1e-6, atol=0)
    expected = torch.tensor([.1525772, -.1359894, -.2013959, -.0763146, -.1951038, -.2677202])
    torch.testing.assert_close(published(gradient), expected, rtol=0, atol=1e-5)
    assert gradient.abs().max().item() == pytest.approx(4.3690, abs=1e-4)

    schedule, t, motion = Schedule(200), torch.tensor([4, 979]), torch.tensor([0.0, 0.05])
    eps_c, eps_u = test_model.randn(8, *z.shape), test_model.randn(9, *z.shape)
    alpha, sigma = (x.flatten() for x in schedule.at(t))
    released = (1 - alpha).sqrt() / sigma                   # its factor over the paper's
    push = turbo.motion_push(schedule, t, gradient, motion * released)
    z_s = solve(schedule, z, t, schedule.previous(t), torch.tensor([7.5, 14.2]), eps_c, eps_u, push)
    expected = torch.tensor([-1.4515742, .7189023, -.1873581, -1.656083, -1.1011586, .1175635])
    torch.testing.assert_close(published(z_s), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("motion", [None, 0.05])
def test_a_stored_step_equals_a_step_with_the_teacher(motion):
    """Same loss and gradient as a target made by the teacher itself, guided by Eq. 8 written out."""
    dtype = torch.float64
    (z0, c, null), schedule = batch(dtype=dtype), Schedule(200)
    network, teacher = unet(0, dtype, replace(SMALL, motion=motion is not None)), unet(3, dtype)
    t, w = torch.tensor([999, 499]), torch.tensor([5.0, 9.0], dtype=dtype)
    eps, z_ref = torch.randn_like(z0), torch.randn_like(z0)
    outputs = [turbo.TeacherOutput.of(teacher, schedule, z0[i:i + 1], eps[i:i + 1], t[i:i + 1], reference,
                                      c[i:i + 1], null[i:i + 1], fps=8)
               for i, reference in enumerate((z_ref[:1], None))]                # t = 499 < 1000 (1 - τ)
    cached = turbo.TeacherOutput(*(torch.cat([getattr(output, name) for output in outputs])
                                   for name in vars(outputs[0])))
    strength = None if motion is None else turbo.motion_strength(t, motion, share=0.5)
    loss, z0_hat = turbo.distill_cached(network, schedule, cached, w, c, strength, fps=8)
    gradients = torch.autograd.grad(loss + z0_hat.mean(), network.parameters(), allow_unused=True)

    conditions = {} if motion is None else dict(motion=torch.tensor([motion, 0.0]))
    step = Step(t, w, eps)
    if motion is None:
        expected = distill(network, teacher, None, schedule, step, z0, c, null, fps=8)
    else:
        s, z_t = schedule.previous(t), schedule.add_noise(z0, eps, t)
        with torch.no_grad():
            guided = cfg(teacher(z_t, t, c, fps=8), teacher(z_t, t, null, fps=8), w)
        z_s = ddim_step(z_t, guided, schedule.at(t), schedule.at(s))
        score = turbo.motion_gradient(teacher, z_t[:1], z_ref[:1], t[:1], c[:1], fps=8)[0]
        z_s[:1] -= schedule.sigma[994] * motion * schedule.sigma[999] * score
        with torch.no_grad():
            target = consistency(network, schedule, z_s, s, w, c, fps=8, **conditions)
        z0_hat = consistency(network, schedule, z_t, t, w, c, fps=8, **conditions)
        expected = pseudo_huber(z0_hat, target), z0_hat
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    reference = torch.autograd.grad(expected[0] + expected[1].mean(), network.parameters(), allow_unused=True)
    for a, b in zip(gradients, reference, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


# ---- the one sampling function -----------------------------------------------------------------------------

class Told(nn.Module):
    """A denoiser that notes what it is told."""

    def __init__(self):
        super().__init__()
        self.weight, self.heard = nn.Parameter(torch.ones(1)), []

    def forward(self, z, t, c, w=None, fps=None, motion=None):
        w, strength = (None if x is None else x[0].item() for x in (w, motion))
        self.heard.append((t[0].item(), fps, w, strength))
        eps = torch.sin(3 * z) + t.view(-1, 1, 1, 1, 1) / 2000 + c.mean((1, 2)).view(-1, 1, 1, 1, 1)
        return eps if motion is None else eps + model.guidance_embedding(motion)[:, 0].view(-1, 1, 1, 1, 1)


def models():
    def text(captions):
        return torch.tensor([len(caption) / 10 for caption in captions]).view(-1, 1, 1).expand(-1, 5, 8)

    vae = SimpleNamespace(config=model.KL_F8)
    return SimpleNamespace(unet=Told(), vae=vae, text=text)


def generate(made, **options):
    return turbo.generate(made, ["", "a red circle"], [5, 6], (2, 16, 24), Sampling(**options))


def test_v2_is_sampled_under_the_conditions_of_its_authors():
    """Latents of the released pipeline for the same denoiser, caption and seed; λ' is told at t >= 500
    only."""
    made = models()
    z0 = generate(made, steps=4, guidance=7.5, grid=200, fps=8, motion=0.05, motion_share=0.5)
    expected = torch.tensor([30.4293537, -16.0383682, 22.8491955, 7.6976814, -1.8633358, -.2212937])
    torch.testing.assert_close(published(z0[:1]), expected, rtol=1e-5, atol=1e-4)
    strength = torch.tensor(0.05).item()
    assert made.unet.heard == [
        (999, 8, 7.5, strength), (749, 8, 7.5, strength), (499, 8, 7.5, 0), (249, 8, 7.5, 0)]


@pytest.mark.parametrize("share, told", [(0, 0), (0.3, 3), (0.5, 4), (1, 8)])
def test_the_strength_of_motion_guidance_is_told_in_the_share_that_had_it(share, told):
    made = models()
    generate(made, steps=8, grid=200, motion=0.1, motion_share=share)
    assert [motion > 0 for *_, motion in made.unet.heard] == [True] * told + [False] * (8 - told)
    generate(made, steps=1, grid=50)
    assert made.unet.heard[-1] == (999, None, 7.5, None)                        # v1 has no such input


@pytest.mark.parametrize("guidance", [0, 2.0])
@pytest.mark.parametrize("eta, scaled", [(0, False), (0.7, True)])
def test_the_teacher_is_sampled_as_its_parts_say(eta, scaled, guidance):
    """Eq. B, Eq. C and v1 Eq. 7 in a plain loop over one clip."""
    made, schedule = models(), Schedule(50)
    made.unet.requires_grad_(False)
    z0 = generate(made, method="ddim", steps=4, guidance=guidance, fps=8, eta=eta, scale_z0=scaled,
                  on_grid=not scaled)
    draw = torch.Generator().manual_seed(6)
    z, (c, null) = torch.randn(1, 4, 2, 2, 3, generator=draw), made.text(["a red circle", ""]).split(1)
    timesteps = [751, 501, 251, 1] if scaled else [999, 759, 519, 279]
    for t, s in zip(timesteps, timesteps[1:] + [0]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.at(torch.tensor([time])) for time in (t, s))
        eps_c, eps_u = (made.unet(z, torch.tensor([t]), x) for x in (c, null))
        eps = eps_c + guidance * (eps_c - eps_u)
        jump, noise = (z - sigma_t * eps) / alpha_t, torch.randn(1, 4, 2, 2, 3, generator=draw)
        ratio = solver.z0_scale()[[s, t]] if scaled else torch.ones(2)
        std = eta * (sigma_s / sigma_t) * (1 - alpha_t ** 2 / alpha_s ** 2).sqrt()
        z = alpha_s * ratio[0] / ratio[1] * jump + (sigma_s ** 2 - std ** 2).sqrt() * eps + std * noise
    torch.testing.assert_close(z0[1:], z, rtol=1e-4, atol=1e-4)


def test_motion_transfer_is_guidance_towards_another_clip():
    """The first of two DDIM steps is guided, in plain lines; where no step is, nothing changes."""
    network, schedule = unet(), Schedule(50)
    (clip, c, null), c_ref = batch(1), torch.randn(1, 5, 24)
    reference = turbo.Reference(clip, c_ref)

    def text(captions):
        return c if captions == ["a"] else null

    def transferred(share, reference):
        how = Sampling("ddim", 2, 2.0, on_grid=True, motion=1e4, motion_share=share, fps=8)
        return turbo.generate(made, ["a"], [3], (3, 4, 4), how, reference=reference)

    vae = SimpleNamespace(config=replace(model.KL_F8, mult=(1,)))
    made = SimpleNamespace(unet=network, vae=vae, text=text)
    plain, guided = transferred(0.4, None), transferred(0.4, reference)
    assert torch.equal(plain, transferred(0.0, reference))

    z, t = Noise([3], (4, 3, 4, 4))(), torch.tensor([999])
    z_ref = solver.ddim_invert(schedule, lambda z, t: network(z, t, c_ref, fps=8), clip, [999])[999]
    gradient = turbo.motion_gradient(network, z, z_ref, t, c, c_ref, fps=8)[0]
    for t, s, motion in ((999, 499, 1e4), (499, 0, 0.0)):
        t, s = torch.tensor([t]), torch.tensor([s])
        with torch.no_grad():
            eps_c, eps_u = teacher_eps(network, z, t, c, null, fps=8)
        push = turbo.motion_push(schedule, t, gradient, torch.tensor([motion]))
        z = solve(schedule, z, t, s, torch.tensor([2.0]), eps_c, eps_u, push)
    torch.testing.assert_close(guided, z, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided, plain, rtol=1e-3, atol=1e-3)


# ---- rewards at test time ----------------------------------------------------------------------------------

@pytest.mark.parametrize("lora, checkpointing, dtype, tolerance", [
    (0, False, torch.float64, 1e-10), (4, True, torch.float64, 1e-10), (4, False, torch.float32, 1e-6)])
def test_the_gradient_of_all_noises_is_that_of_the_whole_chain(lora, checkpointing, dtype, tolerance):
    """Jump by jump, and by autograd through the sampler, the decoder and both rewards in one graph."""
    (_, c, _), schedule, network = batch(dtype=dtype), Schedule(50), unet(dtype=dtype)
    schedule.alpha, schedule.sigma = schedule.alpha.to(dtype), schedule.sigma.to(dtype)
    if lora:
        inject(network, lora)
        network.to(dtype)
        shake(network)
    network.requires_grad_(False).checkpointing = checkpointing
    f = turbo.student_f(network, schedule, c, Sampling(guidance=7.5, fps=16))
    timesteps = [999, 759, 519, 279]
    terms = [RewardTerm(brightness, 1.5, 3, False, "0"), RewardTerm(flicker, 2.0, 3, True, "1")]
    noises = [torch.randn(2, 4, 3, 4, 4, dtype=dtype, requires_grad=True) for _ in timesteps]

    def gradient_at(z0_hat):
        g, scores = turbo.reward_gradient(z0_hat, ["a", "bcd"], decode, terms, [torch.Generator()] * 2)
        return 2 * g, sum(term.weight * scores[term.name] for term in terms)

    plain = [noise.detach() for noise in noises]
    gradients, z0_hat, reward = turbo.chain_gradient(f, schedule, plain, timesteps, gradient_at)

    z = noises[0]
    for i, t in enumerate(timesteps):
        answer = f(z, torch.full((2,), t))
        if i < 3:
            z = schedule.add_noise(answer, noises[i + 1], torch.full((2,), timesteps[i + 1]))
    pixels = (decode(answer) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    value = sum(term.weight * term.reward(pixels, ["a", "bcd"]) for term in terms)
    torch.testing.assert_close(z0_hat, answer.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reward, value.detach(), rtol=10 * tolerance, atol=tolerance)
    for ours, joint in zip(gradients, torch.autograd.grad(value.sum(), noises), strict=True):
        assert joint.abs().max() > 0 and (ours - joint).abs().max() <= tolerance * joint.abs().max()


def test_refining_raises_the_reward_and_keeps_noise_as_large_as_noise():
    """A clip does not depend on those beside it, and the best iterate of each is kept."""
    schedule, target, sizes = Schedule(50), torch.randn(2, 1, 1, 4, 4), []
    noises = [torch.randn(2, 1, 1, 4, 4) for _ in range(2)]

    def f(z, t):
        sizes.append(z.flatten(1).norm(dim=1) if t[0] == 999 else None)
        return torch.tanh(z)

    def refined(clips, steps, rate):
        def gradient_at(z0_hat):
            error = z0_hat - target[clips]
            return -2 * error, -error.pow(2).flatten(1).sum(1)

        some = [noise[clips] for noise in noises]
        return turbo.refine(f, schedule, some, [999, 499], gradient_at, steps, rate)

    best, rewards = refined(slice(0, 2), 30, 0.03)
    assert len(rewards) == 31 and (rewards[-1] > rewards[0] + 0.2).all()
    for size in sizes[::4]:
        torch.testing.assert_close(size, noises[0].flatten(1).norm(dim=1))
    torch.testing.assert_close(best[1:], refined(slice(1, 2), 30, 0.03)[0])
    best, rewards = refined(slice(0, 2), 12, 3.0)                               # a rate that overshoots
    top = torch.stack(rewards).amax(0)
    torch.testing.assert_close(-(best - target).pow(2).flatten(1).sum(1), top)
