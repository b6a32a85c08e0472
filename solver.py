"""The noise schedule and the ODE solver: everything about *time*, nothing about networks. Pure functions on tensors.

Symbols, the same in the whole project:
    z0 clean latents, z (or z_t) noisy latents, eps ε the noise in them, all (B, C, T, H, W);  t → s one step from noisier t to cleaner s;
    alpha_t = √ᾱ_t and sigma_t = √(1-ᾱ_t), so that z_t = alpha_t z0 + sigma_t ε;  w the guidance scale ω (0 = no guidance).
"""
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule:
    """Variance-preserving noise schedule on timesteps 0..999 and the N-step grid that distillation walks on.

    β is "scaled linear" as in Stable Diffusion, VideoCrafter2 and ModelScopeT2V. All tables are computed in float64 and handed
    out in float32: in bfloat16 √(1-ᾱ_t) would be off by up to 5 % at small t.
    `steps` is N: the teacher's DDIM steps that one consistency step may skip over (50 in T2V-Turbo, 200 in v2).
    """

    def __init__(self, steps: int = 50, device="cpu"):
        if not 1 <= steps <= 1000:
            raise ValueError(f"a grid of {steps} steps does not fit the 1000 timesteps; choose 1 to 1000 (the papers: 50, 200)")
        betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
        self.alpha_bar = torch.cumprod(1 - betas, 0)                                # float64 (1000,)
        self.alpha = self.alpha_bar.sqrt().float().to(device)                       # float32 (1000,)
        self.sigma = (1 - self.alpha_bar).sqrt().float().to(device)
        self.steps, self.k = steps, 1000 // steps
        self.grid = ((torch.arange(steps) + 1) * self.k - 1).to(device)             # 19, 39, …, 999 for N = 50

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of timesteps t (B,), shaped (B, 1, 1, 1, 1) to scale latents."""
        return self.alpha[t].view(-1, 1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1, 1)

    def previous(self, t: Tensor) -> Tensor:
        """s, one grid step cleaner than t. Below the grid's first point it is 0, where f(z, ω, c, 0) = z."""
        return (t - self.k).clamp(min=0)

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Sample of q(z_t | z0)."""
        alpha, sigma = self.at(t)
        return alpha * z0 + sigma * eps                                             # Eq. 1

    def few_steps(self, n: int) -> list[int]:
        """The n timesteps, noisiest first, at which few-step sampling evaluates f: every (N // n)-th grid point from the top."""
        if not 1 <= n <= self.steps:
            raise ValueError(f"{n} sampling steps on a grid of {self.steps}; choose 1 to {self.steps}")
        return self.grid.flip(0)[::self.steps // n][:n].tolist()


def predict_z0(z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that z and the noise predicted in it imply."""
    return (z - sigma * eps) / alpha                                                # Eq. 2


def cfg(eps_c: Tensor, eps_u: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance in the papers' convention: w = 0 is none (w = s - 1 of the usual "guidance_scale s")."""
    if isinstance(w, Tensor):
        w = w.view(-1, 1, 1, 1, 1)
    return eps_c + w * (eps_c - eps_u)                                              # Eq. 3


def ddim_step(z: Tensor, eps: Tensor, at_t: tuple[Tensor, Tensor], at_s: tuple[Tensor, Tensor], scale_t=1.0, scale_s=1.0) -> Tensor:
    """One DDIM step from t to s: the exact solution of the probability-flow ODE for an ε constant along the step.

    at_t, at_s: (alpha, sigma) of both ends. scale_t, scale_s: VideoCrafter2's own ẑ0 scaling, for its 50-step samples only (`z0_scale`).
    """
    z0 = predict_z0(z, eps, *at_t) / scale_t
    alpha_s, sigma_s = at_s
    return alpha_s * scale_s * z0 + sigma_s * eps                                   # Eq. 4 (paper Eq. 7 and 11)


def ddim_invert(schedule: Schedule, eps_model, z0: Tensor, t: int) -> Tensor:
    """Deterministic noising of z0 up to timestep t: DDIM run backwards along the grid, the noise predicted at the new time.

    eps_model(z, t) -> ε with t a (B,) tensor. Source: T2V-Turbo-v2, Sec. 3.3 (the motion prior's reference latents).
    """
    z, s = z0, torch.zeros(len(z0), dtype=torch.long, device=z0.device)
    at_s = schedule.at(s)
    for t_next in schedule.grid[schedule.grid <= t].tolist():
        t_next = torch.full_like(s, t_next)
        eps, at_t = eps_model(z, t_next), schedule.at(t_next)
        z, at_s = at_t[0] * predict_z0(z, eps, *at_s) + at_t[1] * eps, at_t
    return z


def ddim_timesteps(n: int) -> list[int]:
    """The n timesteps of VideoCrafter2's and ModelScope's own DDIM samplers, noisiest first: 981, 961, …, 1 for n = 50."""
    if not 1 <= n <= 1000:
        raise ValueError(f"{n} DDIM steps; choose 1 to 1000")
    return [min(i * (1000 // n) + 1, 999) for i in reversed(range(n))]


def z0_scale() -> Tensor:
    """VideoCrafter2's scale of ẑ0 per timestep, (1000,): falls from 1 to 0.7 over the first 400 timesteps, then stays."""
    return torch.cat([torch.linspace(1, 0.7, 400, dtype=torch.float64), torch.full((600,), 0.7, dtype=torch.float64)]).float()


@torch.no_grad()
def ddim_sample(schedule: Schedule, eps_model, z: Tensor, timesteps: list[int], noise=None, eta: float = 0.0,
                scale: Tensor | None = None, progress=iter) -> Tensor:
    """Teacher sampling: a DDIM step per timestep (noisiest first) and from the last to 0, from noise z to clean latents.

    eps_model(z, t) -> guided ε, t (B,). eta > 0 is stochastic DDIM (VideoCrafter2: 1) and takes `noise()` per step, shaped like z.
    scale: `z0_scale()` for VideoCrafter2. progress wraps the list of timesteps (tqdm).
    """
    for t, s in zip(progress(timesteps), timesteps[1:] + [0]):
        t = torch.full((len(z),), t, device=z.device)
        s = torch.full_like(t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        eps = eps_model(z, t)
        std = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()       # fresh noise replaces part of the predicted one
        direction = (sigma_s ** 2 - std ** 2).sqrt()
        scale_t, scale_s = (1.0, 1.0) if scale is None else (scale[t[0].item()].item(), scale[s[0].item()].item())
        z0 = predict_z0(z, eps, alpha_t, sigma_t) / scale_t
        z = alpha_s * scale_s * z0 + direction * eps
        if noise is not None:                                                       # drawn in every step: the same stream at any eta
            z = z + std * noise()
    return z


@dataclass(frozen=True)
class Sampling:
    """How latents are made from noise: all that `turbo.generate` is told besides networks, captions, seeds and size."""
    method: str = "student"         # student: f in few jumps; ddim: the teacher's ODE; jumps: the teacher's guided ẑ0 in place of f
    steps: int = 4                  # network evaluations (of the teacher: times two, with guidance)
    guidance: float = 7.5           # ω, 0 = none
    grid: int = 50                  # N of the grid that a student was trained on
    fps: float | None = None        # told to a UNet that knows frame rates
    motion: float | None = None     # λ' told to a student of T2V-Turbo-v2; None: it has no such input
    motion_share: float = 0.5       # τ: λ' is told at t >= 1000 (1 - τ), 0 below
    eta: float = 0.0                # ddim: share of fresh noise in each step
    on_grid: bool = False           # ddim: walk the grid's timesteps (999, ...) instead of the public samplers' (981, ..., 1)
    scale_z0: bool = False          # ddim: VideoCrafter2's own scaling of ẑ0
