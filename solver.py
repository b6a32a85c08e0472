"""The noise schedule and the ODE solver: everything about time, nothing about networks. Functions on tensors.

Symbols, the same in the whole project:
    z0 clean latents, z (or z_t) noisy latents, eps ε the noise in them, all (B, C, T, H, W);
    t -> s one step from noisier t to cleaner s;  c caption embedding;  w guidance scale ω (0 = no guidance);
    alpha_t = √ᾱ_t and sigma_t = √(1-ᾱ_t).

Equation numbers, the same in the whole project: "v1" is T2V-Turbo (arXiv 2405.18750), "v2" T2V-Turbo-v2
(arXiv 2410.05677), "v1 Eq. 7" the number 7 there. What the papers use without a number has a letter:
    Eq. A   z_t = α_t z0 + σ_t ε                        noising
    Eq. B   ẑ0 = (z_t - σ_t ε) / α_t                    ẑ0 from ε
    Eq. C   ε = ε(c) + ω (ε(c) - ε(∅))                  classifier-free guidance
    Eq. D   z_s = α_s ẑ0 + σ_s ε',  ε' fresh            renoising between two evaluations of few-step sampling
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# ---- schedule ----------------------------------------------------------------------------------------------

class Schedule:
    """Variance-preserving noise schedule on timesteps 0..999 and the N-step grid that distillation walks on.

    β is "scaled linear" as in Stable Diffusion, VideoCrafter2 and ModelScopeT2V. All tables are computed in
    float64 and handed out in float32: in bfloat16 √(1-ᾱ_t) would be off by up to 5 % at small t.
    N counts the teacher's DDIM steps, one of which a consistency step spans: 50 in T2V-Turbo, 200 in v2. It
    divides 1000, so that the grid ends at t = 999, where sampling starts from pure noise."""

    def __init__(self, N: int = 50, device="cpu"):
        if N < 1 or 1000 % N:
            raise ValueError(f"a grid of {N} timesteps misses t = 999; choose a divisor of 1000")
        betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
        self.alpha_bar = torch.cumprod(1 - betas, 0)                        # float64 (1000,)
        self.alpha = self.alpha_bar.sqrt().float().to(device)               # float32 (1000,)
        self.sigma = (1 - self.alpha_bar).sqrt().float().to(device)
        self.N, self.k = N, 1000 // N
        self.grid = ((torch.arange(N) + 1) * self.k - 1).to(device)         # 19, 39, ..., 999 for N = 50

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of timesteps t (B,), shaped (B, 1, 1, 1, 1) to scale latents."""
        return self.alpha[t].view(-1, 1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1, 1)

    def previous(self, t: Tensor) -> Tensor:
        """s, one grid step cleaner than t. Below the grid's first point it is 0, where f(z, ω, c, 0) = z."""
        return (t - self.k).clamp(min=0)

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Sample of q(z_t | z0)."""
        alpha, sigma = self.at(t)
        return alpha * z0 + sigma * eps                                     # Eq. A

    def few_steps(self, n: int) -> list[int]:
        """The n timesteps, noisiest first, at which few-step sampling evaluates f: every (N // n)-th grid
        point from the top."""
        if not 1 <= n <= self.N:
            raise ValueError(f"{n} sampling steps on a grid of {self.N}; choose 1 to {self.N}")
        return [999 - i * (self.N // n) * self.k for i in range(n)]


# ---- equations ---------------------------------------------------------------------------------------------

def predict_z0(z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that z and the noise predicted in it imply."""
    return (z - sigma * eps) / alpha                                        # Eq. B


def cfg(eps_c: Tensor, eps_u: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance in the papers' convention: w = 0 is none (w = s - 1 of the usual
    "guidance_scale s")."""
    if isinstance(w, Tensor):
        w = w.view(-1, 1, 1, 1, 1)
    return eps_c + w * (eps_c - eps_u)                                      # Eq. C


def ddim_step(z: Tensor, eps: Tensor, at_t: tuple[Tensor, Tensor], at_s: tuple[Tensor, Tensor]) -> Tensor:
    """One DDIM step from t to s: the exact solution of the probability-flow ODE for an ε constant along the
    step.

    at_t, at_s: (alpha, sigma) of both ends."""
    alpha_s, sigma_s = at_s
    return alpha_s * predict_z0(z, eps, *at_t) + sigma_s * eps              # v1 Eq. 7


# ---- walks along the ODE -----------------------------------------------------------------------------------

EpsModel = Callable[[Tensor, Tensor], Tensor]               # (z, t (B,)) -> ε, guided or not


def ddim_timesteps(n: int) -> list[int]:
    """The n timesteps of VideoCrafter2's and ModelScope's DDIM samplers: 981, 961, ..., 1 for n = 50."""
    if not 1 <= n <= 1000:
        raise ValueError(f"{n} DDIM steps; choose 1 to 1000")
    return [min(i * (1000 // n) + 1, 999) for i in reversed(range(n))]


def z0_scale() -> Tensor:
    """VideoCrafter2's scale of ẑ0 per timestep, (1000,)."""
    falling = torch.linspace(1, 0.7, 400, dtype=torch.float64)              # and 0.7 from there on
    return torch.cat([falling, falling[-1].expand(600)]).float()


@torch.no_grad()
def ddim_sample(schedule: Schedule, eps_model: EpsModel, z: Tensor, timesteps: list[int],
                noise: Callable | None = None, eta: float = 0.0, scale: Tensor | None = None,
                push: Callable | None = None, progress=iter, watch: Callable | None = None) -> Tensor:
    """Teacher sampling, noise z -> clean latents: a DDIM step per timestep, noisiest first, and the last to
    0.

    eta > 0 is stochastic DDIM (VideoCrafter2: 1) and takes `noise()`, shaped like z, in each step.
    scale: `z0_scale()` for VideoCrafter2. push(z, t): what motion guidance takes from ε, None where it is
    off. progress wraps the list of timesteps (tqdm). watch(t, ẑ0) is called in each step."""
    scale = torch.ones(1000) if scale is None else scale
    for t, s in zip(progress(timesteps), [*timesteps[1:], 0]):
        times = torch.full((len(z),), t, device=z.device)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(times), schedule.at(torch.full_like(times, s))
        eps = eps_model(z, times)
        taken = push(z, times) if push else None
        z0 = predict_z0(z, eps, alpha_t, sigma_t) / scale[t]
        if watch:
            watch(t, z0)

        # η: fresh noise takes the place of a part of the predicted noise; the variance stays sigma_s²
        fresh = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()
        kept = (sigma_s ** 2 - fresh ** 2).sqrt()

        # the step; VideoCrafter2 divides ẑ0 by the scale of t and multiplies it by that of s
        z = alpha_s * scale[s] * z0 + kept * eps
        if taken is not None:
            z = z - kept * taken                            # v2 Eq. 8: from the noise of s, not from ẑ0
        if noise is not None:
            z = z + fresh * noise()                         # drawn in every step: the same stream for any η
    return z


@torch.no_grad()
def ddim_invert(schedule: Schedule, eps_model: EpsModel, z0: Tensor,
                timesteps: list[int]) -> dict[int, Tensor]:
    """Deterministic noising: DDIM backwards, with the noise predicted at the new time (v2, Sec. 3.3).

    timesteps: in 1..999, on the schedule's grid or not -> {timestep: latents there, like z0}. The grid is
    walked once, up to the latest of them, and each is one step from the last grid point before it: what a
    clip becomes does not depend on the other timesteps. Costs one pass per grid point and timestep."""
    def step(z, s, t):
        times_s, times_t = (torch.full((len(z),), time, device=z.device) for time in (s, t))
        return ddim_step(z, eps_model(z, times_t), schedule.at(times_s), schedule.at(times_t))

    grid, latest = set(schedule.grid.tolist()), max(timesteps, default=0)
    inverted, z, s = {}, z0, 0
    for t in sorted(grid.union(timesteps)):
        if t > latest:
            break
        z_t = step(z, s, t)
        if t in timesteps:
            inverted[t] = z_t
        if t in grid:
            z, s = z_t, t
    return inverted


# ---- how to sample -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sampling:
    """How latents are made from noise: what `turbo.generate` needs besides networks, captions, seeds, size.

    method: "student" evaluates f in few jumps (Eq. D between them); "ddim" walks the teacher's guided ODE (v1
    Eq. 7)."""
    method: str = "student"
    steps: int = 4                  # network evaluations; the teacher's guidance doubles them
    guidance: float = 7.5           # ω, 0 = none
    grid: int = 50                  # N of the grid that a student was trained on
    fps: float | None = None        # told to a UNet that knows frame rates
    motion: float | None = None     # λ' told to a student of T2V-Turbo-v2; None: it has no such input
    motion_share: float = 0.5       # τ: λ' is told at t >= 1000 (1 - τ), 0 below
    eta: float = 0.0                # ddim: share of fresh noise in each step
    on_grid: bool = False           # ddim: at 999, ... of the grid; False: the public samplers' 981, ..., 1
    scale_z0: bool = False          # ddim: VideoCrafter2's own scaling of ẑ0
    timesteps: tuple[int, ...] = ()  # student: those of len(timesteps) steps; else evenly spaced

    def jumps(self, schedule: Schedule) -> list[int]:
        """The timesteps of few-step sampling, noisiest first: the given ones if they are `steps`, else evenly
        spaced ones."""
        own = len(self.timesteps) == self.steps
        return list(self.timesteps) if own else schedule.few_steps(self.steps)
