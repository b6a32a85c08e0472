"""T2V-Turbo: consistency distillation of a video diffusion teacher with mixed reward feedback. This file is the paper.

It knows nothing of architectures, files or processes: a denoiser is any callable unet(z, t, c, w=ω, **conditions) -> ε,
a decoder maps latents to pixels, a reward maps (clips, captions) to scores. Equation numbers are those of arXiv 2405.18750.

Symbols: z (B, C, T, H, W) noisy latents at timestep t (B,), s the next cleaner grid point; z0 clean latents and ẑ0 (z0_hat) their
prediction; c caption embedding, null that of the empty caption; w (B,) guidance scale ω; f the consistency function.
"""
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from solver import Sampling, Schedule, cfg, ddim_sample, ddim_step, ddim_timesteps, predict_z0, z0_scale

# ---- the consistency function -------------------------------------------------------------------------------------------------


def boundary(t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timesteps t (B,), shaped (B, 1, 1, 1, 1); (1, 0) at t = 0, almost (0, 1) from the first grid point on."""
    scaled = 10.0 * t.view(-1, 1, 1, 1, 1)
    return sigma_data ** 2 / (scaled ** 2 + sigma_data ** 2), scaled / (scaled ** 2 + sigma_data ** 2).sqrt()


def consistency(unet, schedule: Schedule, z: Tensor, t: Tensor, w: Tensor | None, c: Tensor, **conditions) -> Tensor:
    """f(z, ω, c, t): the end of the guided ODE path through z, in one network pass. f(z, ω, c, 0) = z exactly. In z's dtype, float32."""
    eps = unet(z, t, c, w=w, **conditions).to(z.dtype)
    z0 = predict_z0(z, eps, *schedule.at(t))
    c_skip, c_out = boundary(t)
    return c_skip * z + c_out * z0                                                  # Eq. 5


@torch.no_grad()
def solve(teacher, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, w: Tensor, c: Tensor, null: Tensor, **conditions) -> Tensor:
    """ẑ_s: one DDIM step of the teacher's guided ODE from t to s, both of its passes in one batch of 2 B."""
    eps = teacher(torch.cat([z, z]), torch.cat([t, t]), torch.cat([c, null]), **conditions).to(z.dtype)
    return ddim_step(z, cfg(*eps.chunk(2), w), schedule.at(t), schedule.at(s))      # Eq. 7


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """The distance d of Eq. 6: quadratic below c, linear above; mean over all elements."""
    return (((a - b) ** 2 + c ** 2).sqrt() - c).mean()


# ---- one training step (Algorithm 1, lines 3 to 10) ----------------------------------------------------------------------------


@dataclass
class Step:
    """What Algorithm 1 draws for one batch of clean latents z0: timesteps, guidance scales, noise. All on z0's device."""
    t: Tensor       # (B,) from the grid
    w: Tensor       # (B,) from [ω_min, ω_max]
    eps: Tensor     # like z0

    @classmethod
    def draw(cls, z0: Tensor, schedule: Schedule, w_range: tuple[float, float], generators: list[torch.Generator]) -> "Step":
        """One CPU generator per clip, so that a clip's draws do not depend on how a batch is split over processes."""
        index = torch.cat([torch.randint(len(schedule.grid), (1,), generator=g) for g in generators])
        w = torch.cat([torch.rand(1, generator=g) for g in generators]) * (w_range[1] - w_range[0]) + w_range[0]
        eps = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in generators])
        return cls(schedule.grid[index.to(schedule.grid.device)], w.to(z0.device), eps.to(z0.device))


def distill(student, teacher, ema, schedule: Schedule, step: Step, z0: Tensor, c: Tensor, null: Tensor,
            **conditions) -> tuple[Tensor, Tensor]:
    """L_CD and the student's one-step generation ẑ0 = f_θ(z_t, ω, c, t), with gradients to θ.

    teacher may be the student's own network: with its LoRA off it *is* the teacher. ema: an `EMA` of θ, or None for a target without (v2).
    """
    t, s = step.t, schedule.previous(step.t)
    z_t = schedule.add_noise(z0, step.eps, t)
    f = partial(consistency, schedule=schedule, w=step.w, c=c, **conditions)
    with torch.no_grad():
        with lora_off(teacher):
            z_s = solve(teacher, schedule, z_t, t, s, step.w, c, null, **conditions)
        with ema.swapped() if ema else nullcontext():
            target = f(student, z=z_s, t=s)
    z0_hat = f(student, z=z_t, t=t)
    return pseudo_huber(z0_hat, target), z0_hat                                     # Eq. 6


# ---- the reward gradient -------------------------------------------------------------------------------------------------------


@dataclass
class RewardTerm:
    """β R: a differentiable reward, its weight, and how many frames of a generated clip it is shown."""
    reward: Callable[..., Tensor]                   # (B, T, 3, H, W) in [0, 1], B captions, B generators -> (B,)
    weight: float                                   # β_img or β_vid
    frames: int                                     # M random frames of an image reward; evenly strided ones of a video reward
    video: bool = False
    name: str = "reward"

    def pick(self, T: int, generator: torch.Generator) -> list[int]:
        """Frame numbers: M at random for an image reward (Eq. 8), evenly strided from a random start for a video reward (Eq. 9)."""
        if self.frames > T:
            raise ValueError(f"{self.name} looks at {self.frames} frames, the clips have {T}")
        if not self.video:
            return sorted(torch.randperm(T, generator=generator)[:self.frames].tolist())
        stride = T // self.frames
        start = torch.randint(T - stride * (self.frames - 1), (1,), generator=generator).item() if stride > 1 else (T - self.frames) // 2
        return [start + i * stride for i in range(self.frames)]


def reward_gradient(z0_hat: Tensor, captions: list[str], decode, terms: list[RewardTerm], generators: list[torch.Generator],
                    chunk: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """g = ∂(β_img J_img + β_vid J_vid)/∂ẑ0 and each reward's mean score.

    Rewards reach the network only through ẑ0, so their gradient is taken on a detached ẑ0 and handed to the UNet's backward as
    L_CD - ⟨g, ẑ0⟩: the chain rule in three stages that never share memory.
        1. decode the frames that any reward wants, without a graph;
        2. ∂/∂pixels, one reward after the other;
        3. ∂/∂ẑ0 through the decoder, `chunk` frames at a time.
    decode: (B, C, T, h, w) -> (B, 3, T, H, W) in [-1, 1], frame by frame: it is given the wanted frames of all clips as one clip of P.
    generators: one per clip, they choose its frames. J is the mean over a clip's frames and over the batch.
    """
    z0_hat, g = z0_hat.detach(), torch.zeros_like(z0_hat)
    B, T = len(z0_hat), z0_hat.shape[2]
    picks = [[(b, i) for b in range(B) for i in term.pick(T, generators[b])] for term in terms]
    wanted = sorted(set().union(*picks))                                                    # P pairs (clip, frame)
    clip, frame = torch.tensor(wanted, device=z0_hat.device).T
    chunks = z0_hat[clip, :, frame].transpose(0, 1)[None].split(chunk, 2)                   # each (1, C, chunk, h, w)
    with torch.no_grad():
        pixels = torch.cat([decode(z).to(z.dtype) for z in chunks], 2)                          # (1, 3, P, H, W)
    pixels.requires_grad_()
    g_pixels, scores = torch.zeros_like(pixels), {}
    for term, pick in zip(terms, picks, strict=True):
        shown = pixels[0].transpose(0, 1)[[wanted.index(p) for p in pick]].unflatten(0, (B, -1))    # (B, M, 3, H, W)
        score = term.reward((shown / 2 + 0.5).clamp(0, 1), captions, generators)            # (B,)
        scores[term.name] = score.to(z0_hat.dtype).mean()                                   # Eq. 8, Eq. 9
        g_pixels += term.weight * torch.autograd.grad(scores[term.name], pixels)[0]
    g_chunks = []
    for z, g_some in zip(chunks, g_pixels.split(chunk, 2), strict=True):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            g_chunks.append(torch.autograd.grad(decode(z).to(z.dtype), z, g_some)[0])
    g[clip, :, frame] = torch.cat(g_chunks, 2)[0].transpose(0, 1)
    return g, {name: score.detach() for name, score in scores.items()}


def total_loss(loss_cd: Tensor, z0_hat: Tensor, g: Tensor | None) -> Tensor:
    """A scalar whose gradient is that of L = L_CD - β_img J_img - β_vid J_vid (its value is not L's)."""
    return loss_cd if g is None else loss_cd - (g * z0_hat).sum()                   # Eq. 10


# ---- few-step sampling ---------------------------------------------------------------------------------------------------------


class Noise:
    """The random stream of a batch of clips. Clip i owns a CPU float32 generator seeded with its own seed, so that what it becomes
    depends neither on the device nor on the clips beside it. Each call draws (B, C, T, H, W)."""

    def __init__(self, seeds: list[int], shape: tuple[int, int, int, int], device="cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


@torch.no_grad()
def sample(f, schedule: Schedule, noise: Noise, n: int, progress=iter) -> Tensor:
    """Multistep consistency sampling: jump to the end of the ODE path, add noise of the next level, jump again; n jumps.

    f(z, t) -> ẑ0 with t (B,). Noise is drawn in every step, the last included (unused there), as the released sampler does.
    """
    z, timesteps = noise(), schedule.few_steps(n)
    for t, s in zip(progress(timesteps), timesteps[1:] + [None]):
        z0_hat, fresh = f(z, torch.full((len(z),), t, device=z.device)), noise()
        if s is not None:
            z = schedule.add_noise(z0_hat, fresh, torch.full((len(z),), s, device=z.device))
    return z0_hat


@torch.no_grad()
def generate(models, captions: list[str], seeds: list[int], size: tuple[int, int, int], sampling: Sampling,
             progress=iter) -> Tensor:
    """Captions -> final latents (B, C, T, h, w), float32. Clip i depends on captions[i] and seeds[i] alone.

    models: has `unet`, `vae` and `text`. size: (T, H, W) of the clips, in frames and pixels.
    """
    T, H, W = size
    vae, device = models.vae.config, next(models.unet.parameters()).device
    noise = Noise(seeds, (vae.latent, T, H // vae.factor, W // vae.factor), device)
    schedule = Schedule(sampling.grid, device)
    c = models.text(captions)

    if sampling.method == "student":
        return sample(student_f(models.unet, schedule, c, sampling), schedule, noise, sampling.steps, progress)

    null = models.text([""] * len(captions))
    eps_model = guided_eps(models.unet, c, null, sampling)
    if sampling.method == "jumps":
        return sample(lambda z, t: predict_z0(z, eps_model(z, t), *schedule.at(t)), schedule, noise, sampling.steps, progress)

    timesteps = schedule.few_steps(sampling.steps) if sampling.on_grid else ddim_timesteps(sampling.steps)
    scale = z0_scale() if sampling.scale_z0 else None
    return ddim_sample(schedule, eps_model, noise(), timesteps, noise, sampling.eta, scale, progress)


def student_f(unet, schedule: Schedule, c: Tensor, sampling: Sampling):
    """The student as f(z, t) -> ẑ0. A student of v2 is told λ' at t >= 1000 (1 - τ) and 0 below, as its authors do."""
    w = torch.full((len(c),), sampling.guidance, device=c.device)

    def f(z, t):
        conditions = dict(fps=sampling.fps)
        if sampling.motion is not None:
            conditions["motion"] = sampling.motion * (t >= 1000 * (1 - sampling.motion_share)).float()
        return consistency(unet, schedule, z, t, w, c, **conditions)

    return f


def guided_eps(unet, c: Tensor, null: Tensor, sampling: Sampling):
    """The teacher as eps_model(z, t) -> guided ε, both of its passes in one batch; one pass without guidance."""
    both = torch.cat([c, null])

    def eps_model(z, t):
        if not sampling.guidance:
            return unet(z, t, c, fps=sampling.fps).float()
        eps_c, eps_u = unet(torch.cat([z, z]), torch.cat([t, t]), both, fps=sampling.fps).float().chunk(2)
        return cfg(eps_c, eps_u, sampling.guidance)

    return eps_model


# ---- LoRA: the student as a low-rank difference to its teacher -------------------------------------------------------------------


class LoRA(nn.Module):
    """base(x) + up(down(x)) with base frozen; kernel, stride and padding sit in `down`, `up` is 1x1. Zero at the start (up = 0)."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base, self.on = base.requires_grad_(False), True
        at = dict(bias=False, device=base.weight.device)                            # float32, whatever the base is stored in
        if isinstance(base, nn.Linear):
            r = min(rank, base.in_features, base.out_features)
            self.down, self.up = nn.Linear(base.in_features, r, **at), nn.Linear(r, base.out_features, **at)
        else:
            r = min(rank, base.in_channels, base.out_channels)
            self.down = type(base)(base.in_channels, r, base.kernel_size, base.stride, base.padding, **at)
            self.up = type(base)(r, base.out_channels, 1, **at)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> Tensor:
        """The base's weight; the networks read its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.down(x)) if self.on else y

    def delta(self) -> Tensor:
        """up ∘ down as one weight, shaped like the base's."""
        return (self.up.weight.flatten(1) @ self.down.weight.flatten(1)).view(self.base.weight.shape)


def inject(unet: nn.Module, rank: int, skip: tuple[str, ...] = ()) -> list[nn.Parameter]:
    """Freezes a network and wraps every Linear, Conv2d and Conv3d in it with LoRA. Returns the new parameters, the only ones that train.

    skip: names of layers to leave alone.
    """
    unet.requires_grad_(False)
    for name, module in list(unet.named_modules()):
        if type(module) in (nn.Linear, nn.Conv2d, nn.Conv3d) and name not in skip:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, LoRA(module, rank))
    return [p for p in unet.parameters() if p.requires_grad]


def lora_layers(unet: nn.Module) -> dict[str, LoRA]:
    """{name of the wrapped layer: LoRA}, in the network's order."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, LoRA)}


@contextmanager
def lora_off(unet: nn.Module):
    """Within the block a student is its own teacher; a network without LoRA is left as it is."""
    layers = [m for m in unet.modules() if isinstance(m, LoRA)] if isinstance(unet, nn.Module) else []
    for m in layers:
        m.on = False
    try:
        yield unet
    finally:
        for m in layers:
            m.on = True


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """{layer.down: …, layer.up: …}: all that training changed."""
    return {f"{name}.{part}": getattr(m, part).weight.detach() for name, m in lora_layers(unet).items() for part in ("down", "up")}


@torch.no_grad()
def merge(unet: nn.Module) -> nn.Module:
    """W += up ∘ down, and the wrappers go: a step then costs what the teacher's costs."""
    for name, lora in lora_layers(unet).items():
        weight = lora.base.weight
        weight.copy_((weight.float() + lora.delta().float()).to(weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, lora.base)
    return unet


class EMA:
    """θ⁻: the exponential moving average of the trained weights θ, which the target of Eq. 6 is computed with."""

    def __init__(self, params: list[nn.Parameter], decay: float = 0.95):
        self.params, self.decay = list(params), decay
        self.average = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        """θ⁻ ← decay θ⁻ + (1 - decay) θ."""
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - self.decay)

    @contextmanager
    def swapped(self):
        """Within the block the network runs with θ⁻: pointers are exchanged, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for i, p in enumerate(self.params):
            p.data, self.average[i] = self.average[i], p.data
