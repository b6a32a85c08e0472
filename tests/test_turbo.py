"""The paper's formulas against closed forms, LoRA against peft, the reward gradient against the joint graph."""
import copy

import pytest
import torch
from torch import nn

import model
import turbo
from solver import Schedule, cfg, ddim_step, predict_z0
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

SMALL = model.UNetConfig(channels=32, mult=(1, 2), res_blocks=1, attention_levels=(0,), head_dim=16, context_dim=24,
                         init_heads=2, groups=8, fps=True, guidance=True)


def unet(seed=0, dtype=torch.float32):
    """A small UNet whose every weight is random, those that start at zero included."""
    torch.manual_seed(seed)
    network = model.UNet3D(SMALL)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network.to(dtype).eval()


def batch(B=2, dtype=torch.float32):
    torch.manual_seed(1)
    z, c, null = torch.randn(B, 4, 3, 4, 4, dtype=dtype), torch.randn(B, 5, 24, dtype=dtype), torch.randn(B, 5, 24, dtype=dtype)
    return z, c, null


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
    torch.testing.assert_close(skip.flatten(), torch.tensor([1, 0.25 / (190.0 ** 2 + 0.25), 0.25 / (9990.0 ** 2 + 0.25)]))
    torch.testing.assert_close(out.flatten(), torch.tensor([0, 190 / (190.0 ** 2 + 0.25) ** 0.5, 9990 / (9990.0 ** 2 + 0.25) ** 0.5]))


def test_f_is_almost_the_predicted_z0_elsewhere():
    (z, c, _), network, schedule, t = batch(), unet(), Schedule(50), torch.tensor([19, 999])
    w = torch.tensor([5.0, 15.0])
    z0 = predict_z0(z, network(z, t, c, w=w), *schedule.at(t))
    torch.testing.assert_close(consistency(network, schedule, z, t, w, c), z0, rtol=1e-4, atol=1e-4)


def test_pseudo_huber():
    a = torch.tensor([0.0, 3.0, -1e-4])
    expected = torch.tensor([0.0, (9 + 1e-6) ** 0.5 - 1e-3, (1e-8 + 1e-6) ** 0.5 - 1e-3]).mean()
    torch.testing.assert_close(pseudo_huber(a, torch.zeros(3)), expected)
    assert pseudo_huber(a, a) == 0


def test_solve_is_cfg_then_ddim_and_batching_changes_nothing():
    (z, c, null), network, schedule = batch(), unet(), Schedule(50)
    t, w = torch.tensor([999, 19]), torch.tensor([5.0, 7.5])
    s = schedule.previous(t)
    eps = cfg(network(z, t, c, fps=16), network(z, t, null, fps=16), w)
    expected = ddim_step(z, eps, schedule.at(t), schedule.at(s))
    z_s = solve(schedule, z, t, s, w, *teacher_eps(network, z, t, c, null, fps=16))
    torch.testing.assert_close(z_s, expected, rtol=1e-5, atol=1e-5)


def test_guidance_embedding_has_the_published_values():
    e = model.guidance_embedding(torch.tensor([7.5]))[0]
    for i, value in {0: -0.8512359, 1: 0.8421312, 128: -0.5247833, 255: 0.7316889}.items():
        assert e[i].item() == pytest.approx(value, abs=2e-6)


def test_draws_do_not_depend_on_the_split():
    z0, schedule = torch.randn(4, 4, 3, 4, 4), Schedule(50)

    def draw(rows):
        return Step.draw(z0[rows], schedule, (5.0, 15.0), [torch.Generator().manual_seed(i) for i in range(4)[rows]])

    whole, parts = draw(slice(0, 4)), [draw(slice(0, 1)), draw(slice(1, 4))]
    for name in ("t", "w", "eps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert set(whole.t.tolist()) <= set(schedule.grid.tolist()) and 5 <= whole.w.min() and whole.w.max() <= 15


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
    assert s[1] == 0 and torch.equal(f_target[1], z_s[1])              # below the grid the target is ẑ_s itself


@pytest.mark.parametrize("layer", [nn.Linear(12, 20), nn.Conv2d(12, 20, 3, 2, 1), nn.Conv3d(12, 20, (3, 1, 1), padding=(1, 0, 0))])
def test_lora_agrees_with_peft(layer):
    from peft import LoraConfig, get_peft_model
    x = torch.randn({nn.Linear: (5, 12), nn.Conv2d: (5, 12, 8, 8), nn.Conv3d: (2, 12, 4, 3, 3)}[type(layer)])
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), LoraConfig(r=4, lora_alpha=4, target_modules=["0"])).eval()
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


def test_ema_is_the_geometric_mean_and_swaps():
    p = nn.Parameter(torch.tensor([1.0]))
    ema = EMA([p], decay=0.95)
    expected = 1.0
    for value in (2.0, -3.0, 0.5):
        p.data.fill_(value)
        ema.update()
        expected = 0.95 * expected + 0.05 * value
    with ema.swapped():
        assert p.item() == pytest.approx(expected)
    assert p.item() == 0.5 and ema.average[0].item() == pytest.approx(expected)


# ---- rewards -------------------------------------------------------------------------------------------------------------------


def decode(z):
    """A stand-in decoder, nonlinear, 4 latent channels → 3 of pixels, frame by frame."""
    mix = torch.tensor([[1, 0.2, 0, 0.5], [0, 1, -0.3, 0.1], [0.4, 0, 1, 0]], dtype=z.dtype)
    return torch.tanh(torch.einsum("dc,bcthw->bdthw", mix, z)).repeat_interleave(2, 3)


def brightness(clips, captions, generators=None):
    return (clips ** 2).flatten(1).mean(1) * torch.tensor([len(c) for c in captions], dtype=clips.dtype)


def flicker(clips, captions, generators=None):
    return (clips[:, 1:] - clips[:, :-1]).pow(2).flatten(1).mean(1)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_reward_gradient_is_that_of_the_joint_graph(chunk):
    """∇_LoRA (L_CD - β_img J_img - β_vid J_vid): through ẑ0 in three stages, and through one graph. float64, 1e-10."""
    (z0, c, null), schedule = batch(dtype=torch.float64), Schedule(50)
    schedule.alpha, schedule.sigma = schedule.alpha.double(), schedule.sigma.double()
    network = unet(dtype=torch.float64)
    params = inject(network, 4)
    for p in params:
        p.data = p.data.double()
    shake(network)
    terms = [RewardTerm(brightness, 1.5, 2, name="image"), RewardTerm(flicker, -2.5, 3, video=True, name="video")]
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
        shown = torch.stack([(decode(z0_hat)[b, :, pick] / 2 + 0.5).clamp(0, 1).transpose(0, 1) for b, pick in enumerate(picks)])
        value = term.reward(shown, captions)
        torch.testing.assert_close(torch.as_tensor(scores[term.name]).double().mean(), value.mean().detach(), rtol=1e-6, atol=1e-9)
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


# ---- sampling ------------------------------------------------------------------------------------------------------------------


def test_few_step_sampling_agrees_with_diffusers_lcm(monkeypatch):
    """Against LCMScheduler for a made-up ε, step by step with the same noise. Its boundary scaling is the same, σ_data 0.5 and 10 t."""
    import diffusers.schedulers.scheduling_lcm as lcm
    theirs = lcm.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=50)
    theirs.set_timesteps(timesteps=[999, 759, 519, 279])
    schedule, noise = Schedule(50), Noise([3, 4], (4, 2, 3, 3))

    def eps_model(z, t):
        return torch.sin(z) + t.view(-1, 1, 1, 1, 1) / 2000

    def f(z, t):
        c_skip, c_out = boundary(t)
        return c_skip * z + c_out * predict_z0(z, eps_model(z, t), *schedule.at(t))

    ours = sample(f, schedule, noise, 4)
    noise, denoised = Noise([3, 4], (4, 2, 3, 3)), None
    z = noise()
    for t in theirs.timesteps:
        fresh = noise()
        monkeypatch.setattr(lcm, "randn_tensor", lambda *args, fresh=fresh, **kwargs: fresh)
        z, denoised = theirs.step(eps_model(z, t.expand(2)), t, z, return_dict=False)
    torch.testing.assert_close(ours, denoised, rtol=1e-4, atol=1e-4)


def test_a_clip_depends_on_its_seed_alone():
    schedule = Schedule(50)

    def f(z, t):
        return torch.tanh(z) * t.view(-1, 1, 1, 1, 1) / 1000

    together = sample(f, schedule, Noise([7, 8, 9], (4, 2, 3, 3)), 4)
    alone = torch.cat([sample(f, schedule, Noise([seed], (4, 2, 3, 3)), 4) for seed in (7, 8, 9)])
    assert torch.equal(together, alone) and not torch.equal(together[0], together[1])


def test_noise_is_drawn_in_every_step():
    noise, calls = Noise([0], (1, 1, 1, 1)), []
    sample(lambda z, t: z * 0, Schedule(50), lambda: calls.append(1) or noise(), 4)
    assert len(calls) == 1 + 4
