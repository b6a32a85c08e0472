"""Schedule and ODE solver against closed forms and diffusers."""
import pytest
import torch

from solver import Schedule, cfg, ddim_invert, ddim_sample, ddim_step, ddim_timesteps, z0_scale


def test_schedule_has_the_published_values():
    schedule = Schedule(50)
    published = {0: 0.99914998, 4: 0.99571025, 19: 0.98224396, 279: 0.62572908, 519: 0.25157733,
                 759: 0.05221289, 999: 0.00466010}
    for t, value in published.items():
        assert schedule.alpha_bar[t].item() == pytest.approx(value, abs=4.8e-7)  # theirs are made in float32
    assert schedule.alpha_bar.dtype == torch.float64 and schedule.alpha.dtype == torch.float32
    torch.testing.assert_close(schedule.alpha ** 2 + schedule.sigma ** 2, torch.ones(1000))


def test_schedule_agrees_with_diffusers():
    from diffusers import DDIMScheduler
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(Schedule().alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps, first, k", [(50, 19, 20), (200, 4, 5)])
def test_grid(steps, first, k):
    schedule = Schedule(steps)
    assert schedule.grid.tolist() == list(range(first, 1000, k))
    assert schedule.previous(torch.tensor([999, first, first + k])).tolist() == [999 - k, 0, first]


@pytest.mark.parametrize("grid, n, expected", [
    (50, 1, [999]), (50, 4, [999, 759, 519, 279]), (50, 8, [999, 879, 759, 639, 519, 399, 279, 159]),
    (50, 16, [*range(999, 98, -60)]), (200, 4, [999, 749, 499, 249]), (200, 8, [*range(999, 123, -125)])])
def test_few_steps_are_the_released_samplers(grid, n, expected):
    assert Schedule(grid).few_steps(n) == expected


def test_step_counts_that_do_not_fit_are_refused():
    for wrong in (
        lambda: Schedule(0),
        lambda: Schedule(300),                      # ends at t = 899, where no sampling starts
        lambda: Schedule(50).few_steps(51),
        lambda: ddim_timesteps(0),
    ):
        with pytest.raises(ValueError, match="choose"):
            wrong()


def gaussian_eps(schedule, mean, std):
    """The exact noise prediction for data ~ N(mean, std²): E[ε | z_t]."""
    def eps_model(z, t):
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return sigma * (z - alpha * mean) / (alpha ** 2 * std ** 2 + sigma ** 2)
    return eps_model


def test_ddim_is_the_ode_of_a_gaussian():
    """For data ~ N(m, s²) the flow is known: (z - α m) / √(α² s² + σ²) is constant in t. DDIM with many steps
    must follow it."""
    schedule, mean, std = Schedule(1000), 0.7, 0.3
    z = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, s = schedule.alpha_bar[[999, 0]].sqrt(), (1 - schedule.alpha_bar[[999, 0]]).sqrt()
    width = (a ** 2 * std ** 2 + s ** 2).sqrt()
    exact = a[1] * mean + (z - a[0] * mean) / width[0] * width[1]
    eps_model, errors = gaussian_eps(schedule, mean, std), []
    for step in (20, 10, 5, 1):
        z_0 = ddim_sample(schedule, eps_model, z, list(range(999, 0, -step)))
        errors.append((z_0 - exact).abs().max().item())
    assert errors[3] < 5e-3 and errors[0] / errors[1] > 1.7 and errors[1] / errors[2] > 1.7  # first order


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_sampling_agrees_with_diffusers(eta):
    """Against DDIMScheduler for a made-up ε; steps 981, 961, …, 1, final α of timestep 0."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                           clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(50)
    assert theirs.timesteps.tolist() == ddim_timesteps(50)

    def eps_model(z, t):
        return torch.sin(3 * z) + t.view(-1, 1, 1, 1, 1) / 2000

    z = start = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    noise = [torch.randn(start.shape, generator=torch.Generator().manual_seed(i)) for i in range(50)]
    for i, t in enumerate(theirs.timesteps):
        z = theirs.step(
            eps_model(z, t.expand(2)), t, z, eta=eta, variance_noise=noise[i] if eta else None
        ).prev_sample
    stream = iter(noise)
    ours = ddim_sample(Schedule(50), eps_model, start, ddim_timesteps(50), lambda: next(stream), eta)
    torch.testing.assert_close(ours, z, rtol=1e-5, atol=1e-4)  # 50 roundings, amplified by sin(3 z)


def test_z0_scale_is_videocrafters():
    scale = z0_scale()
    assert scale.shape == (1000,) and scale[0] == 1
    assert scale[399] == pytest.approx(0.7) and scale[999] == pytest.approx(0.7)
    assert scale[200].item() == pytest.approx(1 - 0.3 * 200 / 399, abs=1e-6)


def test_inversion_serves_every_timestep_alike():
    """Each timestep as if it were the only one; on the grid as a plain walk."""
    schedule = Schedule(50)
    eps_model = gaussian_eps(schedule, 0.7, 0.3)
    z0 = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverted = ddim_invert(schedule, eps_model, z0, [503, 99, 4, 999, 19])
    assert sorted(inverted) == [4, 19, 99, 503, 999] and ddim_invert(schedule, eps_model, z0, []) == {}
    for t, z in inverted.items():
        assert torch.equal(z, ddim_invert(schedule, eps_model, z0, [t])[t])

    z, s = z0, torch.tensor([0, 0])
    for t in (19, 39, 59, 79, 99):
        t = torch.tensor([t, t])
        z, s = ddim_step(z, eps_model(z, t), schedule.at(s), schedule.at(t)), t
    assert torch.equal(inverted[99], z)


def test_cfg_conventions():
    c, u = torch.tensor(3.0).view(1, 1, 1, 1, 1), torch.tensor(1.0).view(1, 1, 1, 1, 1)
    assert cfg(c, u, 0.0) == 3                                                  # ω = 0: no guidance
    assert cfg(c, u, 6.5) == 1 + 7.5 * (3 - 1)                                  # the usual scale s = ω + 1
    pair = cfg(c.expand(2, 1, 1, 1, 1), u.expand(2, 1, 1, 1, 1), torch.tensor([0.0, 2.0]))
    assert pair.flatten().tolist() == [3, 7]                                    # one ω per clip
