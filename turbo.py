"""T2V-Turbo and T2V-Turbo-v2: consistency distillation of a video diffusion teacher, with mixed reward
feedback and motion guidance. This file is the papers.

It knows nothing of architectures, files or processes. A denoiser is any callable unet(z, t, c, w=ω, ...) ->
ε, a decoder maps latents to pixels, a reward maps (clips, captions, generators) to scores.

Symbols and equation numbers are those of solver.py. Beside them: f the consistency function, ẑ0 (z0_hat) its
one-step generation, uncond the embedding of the empty caption, motion λ' (the strength of motion guidance).
What goes beyond the papers stands in a section of that name, at the end.
"""
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from solver import (
    Sampling,
    Schedule,
    cfg,
    ddim_invert,
    ddim_sample,
    ddim_step,
    ddim_timesteps,
    predict_z0,
    z0_scale,
)

# ---- the consistency function ------------------------------------------------------------------------------

def boundary(t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timesteps t (B,), shaped (B, 1, 1, 1, 1).

    (1, 0) at t = 0, so that f is the identity there; almost (0, 1) from the first grid point on."""
    scaled = 10.0 * t.view(-1, 1, 1, 1, 1)
    c_skip = sigma_data ** 2 / (scaled ** 2 + sigma_data ** 2)
    c_out = scaled / (scaled ** 2 + sigma_data ** 2).sqrt()
    return c_skip, c_out


def consistency(unet, schedule: Schedule, z: Tensor, t: Tensor, w: Tensor | None, c: Tensor,
                **conditions) -> Tensor:
    """f(z, ω, c, t): the end of the guided ODE path through z, in one network pass. In z's dtype, float32."""
    eps = unet(z, t, c, w=w, **conditions).to(z.dtype)
    z0 = predict_z0(z, eps, *schedule.at(t))                                # Eq. B
    c_skip, c_out = boundary(t)
    return c_skip * z + c_out * z0                                          # v1 Eq. 5


def pseudo_huber(a: Tensor, b: Tensor, bend: float = 0.001) -> Tensor:
    """The distance d of v1 Eq. 6: quadratic below `bend`, linear above; mean over all elements."""
    return (((a - b) ** 2 + bend ** 2).sqrt() - bend).mean()


# ---- the teacher's step ------------------------------------------------------------------------------------

def teacher_eps(teacher, z: Tensor, t: Tensor, c: Tensor, uncond: Tensor,
                **conditions) -> tuple[Tensor, Tensor]:
    """ε(c) and ε(∅) of the teacher, both passes in one batch of 2 B."""
    eps = teacher(torch.cat([z, z]), torch.cat([t, t]), torch.cat([c, uncond]), **conditions).to(z.dtype)
    eps_c, eps_u = eps.chunk(2)
    return eps_c, eps_u


def solve(schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, w: Tensor, eps_c: Tensor, eps_u: Tensor,
          push: Tensor | None = None) -> Tensor:
    """ẑ_s: one DDIM step of the teacher's guided ODE from t to s.

    push: what motion guidance takes from ε (`motion_push`). As in the released code ẑ0 is left as it is, so
    that only the noise that is added back at s is guided."""
    at_s = schedule.at(s)
    z_s = ddim_step(z, cfg(eps_c, eps_u, w), schedule.at(t), at_s)          # v1 Eq. 7
    if push is not None:
        z_s = z_s - at_s[1] * push                                          # v2 Eq. 8
    return z_s


# ---- one training step (v1 Algorithm 1, lines 3 to 10) -----------------------------------------------------

@dataclass
class Step:
    """What Algorithm 1 draws for one batch of clean latents z0, on their device."""
    t: Tensor       # (B,) from the grid
    w: Tensor       # (B,) from [ω_min, ω_max]
    eps: Tensor     # noise like z0

    @classmethod
    def draw(cls, z0: Tensor, schedule: Schedule, w_range: tuple[float, float],
             generators: list[torch.Generator]) -> "Step":
        """One CPU generator per clip: its draws do not depend on how a batch is split over processes."""
        n, (w_min, w_max) = len(schedule.grid), w_range
        index = torch.cat([torch.randint(n, (1,), generator=g) for g in generators])
        w = torch.cat([torch.rand(1, generator=g) for g in generators]) * (w_max - w_min) + w_min
        eps = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in generators])
        return cls(schedule.grid[index.to(schedule.grid.device)], w.to(z0.device), eps.to(z0.device))


def distill(student, teacher, ema, schedule: Schedule, step: Step, z0: Tensor, c: Tensor, uncond: Tensor,
            **conditions) -> tuple[Tensor, Tensor]:
    """L_CD and the student's one-step generation ẑ0 = f_θ(z_t, ω, c, t), with gradients to θ.

    teacher: the student's own network, which is the teacher with its LoRA off, or another one. ema: of θ, or
    None."""
    t, s = step.t, schedule.previous(step.t)
    z_t = schedule.add_noise(z0, step.eps, t)                               # Eq. A
    with torch.no_grad(), lora_off(teacher):
        eps_c, eps_u = teacher_eps(teacher, z_t, t, c, uncond, **conditions)
    z_s = solve(schedule, z_t, t, s, step.w, eps_c, eps_u)
    return consistency_loss(student, ema, schedule, z_t, t, z_s, s, w=step.w, c=c, **conditions)


def consistency_loss(student, ema, schedule: Schedule, z_t: Tensor, t: Tensor, z_s: Tensor, s: Tensor,
                     **conditions) -> tuple[Tensor, Tensor]:
    """L_CD between two neighbours on one ODE path, and f_θ(z_t), with gradients to θ.

    The target has no gradient; it is made with θ⁻ where there is an EMA (v1), else with θ itself (v2)."""
    f = partial(consistency, student, schedule, **conditions)
    with torch.no_grad(), ema.swapped() if ema else nullcontext():
        target = f(z=z_s, t=s)
    z0_hat = f(z=z_t, t=t)
    return pseudo_huber(z0_hat, target), z0_hat                             # v1 Eq. 6, v2 Eq. 9


# ---- motion guidance (v2, Sec. 3.3) ------------------------------------------------------------------------

def motion_strength(t: Tensor, motion: float, share: float) -> Tensor:
    """λ' of each clip, (B,): `motion` in the noisiest share τ of all timesteps, t >= 1000 (1 - τ), 0 below.

    On the grid of distillation that is n >= N (1 - τ). Training and sampling agree on it: a student is told 0
    where its teacher had no motion guidance."""
    return motion * (t >= 1000 * (1 - share)).float()


def motion_energy(maps: list[Tensor], reference_maps: list[Tensor]) -> Tensor:
    """G of each clip, (B,): how far its temporal attention is from that of the clip whose motion it is to
    have.

    maps: per layer, probabilities (B, ..., queries, keys). The mask M keeps the reference's strongest key of
    each query. Mean over the masked entries of a clip, then over layers, times 100 x 100 as in the released
    code, whose λ' = 0.05 is the paper's λ = 500. Not a mean over the batch, which would shrink each gradient.
    """
    layers = []
    for probabilities, reference in zip(maps, reference_maps, strict=True):
        strongest = reference.argmax(-1, keepdim=True)                      # M, (B, ..., queries, 1)
        difference = reference.gather(-1, strongest) - probabilities.gather(-1, strongest)
        layers.append(difference.square().flatten(1).mean(1))
    return 100 * 100 * torch.stack(layers).mean(0)                          # v2 Eq. 6, 7


def motion_gradient(teacher, z_t: Tensor, z_ref: Tensor, t: Tensor, c: Tensor, c_ref: Tensor | None = None,
                    **conditions) -> tuple[Tensor, Tensor]:
    """∂G/∂z_t through the teacher's conditional pass, and G (B,).

    z_ref: latents of the reference clip at t (`solver.ddim_invert`); c_ref: its caption, if it is not c.
    teacher has `with_maps(z, t, c) -> (ε, attention maps)`."""
    with torch.no_grad():
        _, reference_maps = teacher.with_maps(z_ref, t, c if c_ref is None else c_ref, **conditions)
    with torch.enable_grad():
        z_t = z_t.detach().requires_grad_()
        _, maps = teacher.with_maps(z_t, t, c, **conditions)
        energy = motion_energy(maps, reference_maps)
        gradient, = torch.autograd.grad(energy.sum(), z_t)
    return gradient, energy.detach()


def motion_push(schedule: Schedule, t: Tensor, gradient: Tensor, motion: Tensor) -> Tensor:
    """λ' √(1 - ᾱ_t) ∂G/∂z_t, what motion guidance takes from ε. motion: λ' of each clip, (B,).

    The released code has √(1 - √ᾱ_t) in place of σ_t; at t = 499 it is 1.24 times weaker."""
    _, sigma = schedule.at(t)
    return motion.view(-1, 1, 1, 1, 1) * sigma * gradient


@dataclass
class TeacherOutput:
    """What the teacher says about noised clips, computed once before training (v2 Algorithm 1)."""
    t: Tensor           # (B,) from the grid
    z_t: Tensor         # (B, C, T, H, W), and so the other three
    eps_c: Tensor       # ε(c)
    eps_u: Tensor       # ε(∅)
    gradient: Tensor    # ∂G/∂z_t; 0 where motion guidance is off

    @classmethod
    def of(cls, teacher, schedule: Schedule, z0: Tensor, eps: Tensor, t: Tensor, z_ref: Tensor | None,
           c: Tensor, uncond: Tensor, **conditions) -> "TeacherOutput":
        """z_ref: z0 inverted to t (`solver.ddim_invert`), whose motion guides; None: no motion guidance."""
        z_t = schedule.add_noise(z0, eps, t)                                # Eq. A
        with torch.no_grad():
            eps_c, eps_u = teacher_eps(teacher, z_t, t, c, uncond, **conditions)
        gradient = torch.zeros_like(z_t)
        if z_ref is not None:
            gradient, _ = motion_gradient(teacher, z_t, z_ref, t, c, **conditions)
        return cls(t, z_t, eps_c, eps_u, gradient)


def distill_cached(student, schedule: Schedule, cached: TeacherOutput, w: Tensor, c: Tensor,
                   motion: Tensor | None = None, **conditions) -> tuple[Tensor, Tensor]:
    """`distill` without a teacher in memory (v2 Algorithm 2): L_CD and ẑ0. As guidance is linear in ε(c) and
    ε(∅), ω is drawn anew in each step.

    motion: λ' of each clip (`motion_strength`), an input of the student; None: v2 without motion guidance."""
    t, z_t, s, push = cached.t, cached.z_t, schedule.previous(cached.t), None
    if motion is not None:
        push = motion_push(schedule, t, cached.gradient, motion)
        conditions["motion"] = motion
    z_s = solve(schedule, z_t, t, s, w, cached.eps_c, cached.eps_u, push)
    return consistency_loss(student, None, schedule, z_t, t, z_s, s, w=w, c=c, **conditions)


# ---- the reward gradient -----------------------------------------------------------------------------------

@dataclass
class RewardTerm:
    """β R: a differentiable reward, its weight, and how many frames of a generated clip it is shown."""
    reward: Callable[..., Tensor]   # clips (B, T, 3, H, W) in [0, 1], B captions, B generators -> (B,)
    weight: float                   # β_img or β_vid
    frames: int                     # M random ones for an image reward, strided ones for a video reward
    video: bool = False
    name: str = "reward"

    def pick(self, T: int, generator: torch.Generator) -> list[int]:
        """Frame numbers: M random ones for an image reward (v1 Eq. 8), strided for a video one (v1 Eq. 9)."""
        if self.frames > T:
            raise ValueError(f"{self.name} looks at {self.frames} frames, the clips have {T}")
        if not self.video:
            return sorted(torch.randperm(T, generator=generator)[:self.frames].tolist())

        stride = T // self.frames
        span = stride * (self.frames - 1)                   # from the first frame to the last
        if stride > 1:
            start = torch.randint(T - span, (1,), generator=generator).item()
        else:
            start = (T - self.frames) // 2
        return [start + i * stride for i in range(self.frames)]


def reward_gradient(z0_hat: Tensor, captions: list[str], decode, terms: list[RewardTerm],
                    generators: list[torch.Generator], chunk: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """g = ∂(β_img J_img + β_vid J_vid)/∂ẑ0 and each reward's score of each clip, (B,).

    J is the mean over a clip's frames and over the batch. Rewards reach the network only through ẑ0, so their
    gradient is taken on a detached ẑ0 and handed to the UNet's backward as L_CD - ⟨g, ẑ0⟩: the chain rule in
    three stages that share no memory.

    decode: latents (1, C, P, h, w) -> pixels (1, 3, P, H, W) in [-1, 1], frame by frame. generators: one per
    clip, on the CPU, for its frames and then its crop windows. chunk: frames of which the decoder's graph is
    held at a time, when they are decoded again; 0: all, decoded once."""
    gradients, scores = [], []
    for z0, caption, generator in zip(z0_hat.detach(), captions, generators, strict=True):
        g, clip_scores = clip_gradient(z0, caption, decode, terms, generator, chunk)
        gradients.append(g / len(captions))
        scores.append(clip_scores)
    return torch.stack(gradients), {term.name: torch.cat([clip[term.name] for clip in scores])
                                    for term in terms}


@torch.enable_grad()
def clip_gradient(z0: Tensor, caption: str, decode, terms: list[RewardTerm], generator: torch.Generator,
                  chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """∂(Σ β R)/∂ẑ0 of one clip (C, T, h, w), and each reward's score (1,)."""
    picks = [term.pick(z0.shape[1], generator) for term in terms]
    frames = sorted({frame for pick in picks for frame in pick})            # that any reward looks at

    # 1 decode
    run = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False) if chunk else decode
    latents = [z[None].requires_grad_() for z in z0[:, frames].split(chunk or len(frames), dim=1)]
    decoded = [run(z).to(z.dtype) for z in latents]
    pixels = torch.cat(decoded, dim=2).detach().requires_grad_()            # (1, 3, P, H, W)

    # 2 rewards -> pixels, one after the other
    g_pixels, scores = torch.zeros_like(pixels), {}
    for term, pick in zip(terms, picks, strict=True):
        images = pixels[:, :, [frames.index(frame) for frame in pick]].transpose(1, 2)      # (1, M, 3, H, W)
        score = term.reward((images / 2 + 0.5).clamp(0, 1), [caption], [generator]).to(z0.dtype)
        g_pixels += term.weight * torch.autograd.grad(score.sum(), pixels)[0]   # v1 Eq. 8, v1 Eq. 9
        scores[term.name] = score.detach()

    # 3 pixels -> ẑ0, through the decoder
    g, g_decoded = torch.zeros_like(z0), g_pixels.split(chunk or len(frames), dim=2)
    g_latents = [torch.autograd.grad(x, z, g_x)[0] for x, z, g_x in zip(decoded, latents, g_decoded)]
    g[:, frames] = torch.cat(g_latents, dim=2)[0]
    return g, scores


def total_loss(loss_cd: Tensor, z0_hat: Tensor, g: Tensor | None) -> Tensor:
    """A scalar whose gradient is that of L = L_CD - β_img J_img - β_vid J_vid (its value is not L's)."""
    return loss_cd if g is None else loss_cd - (g * z0_hat).sum()           # v1 Eq. 10, v2 Eq. 11


# ---- few-step sampling -------------------------------------------------------------------------------------

class Noise:
    """The random stream of a batch of clips, one draw (B, C, T, H, W) per call.

    Clip i owns a CPU float32 generator seeded with its own seed, so that what it becomes depends neither on
    the device nor on the clips beside it."""

    def __init__(self, seeds: list[int], shape: tuple[int, int, int, int], device="cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


@torch.no_grad()
def sample(f, schedule: Schedule, noise: Noise, timesteps: list[int], progress=iter) -> Tensor:
    """Multistep consistency sampling: jump to the end of the ODE path, new noise, and from there again.

    f(z, t) -> ẑ0 with t (B,). timesteps: of the jumps, noisiest first. As in the released sampler noise is
    drawn in every step, unused in the last."""
    z = noise()
    for t, s in zip(progress(timesteps), [*timesteps[1:], None]):
        z0_hat = f(z, torch.full((len(z),), t, device=z.device))
        fresh = noise()
        if s is not None:
            z = schedule.add_noise(z0_hat, fresh, torch.full((len(z),), s, device=z.device))       # Eq. D
    return z0_hat


@dataclass
class Reference:
    """A clip whose motion others are to have, by motion guidance without training."""
    z0: Tensor      # (1, C, T, h, w)
    c: Tensor       # (1, L, D), of its own caption


@torch.no_grad()
def generate(models, captions: list[str], seeds: list[int], size: tuple[int, int, int], sampling: Sampling,
             progress=iter, reference: Reference | None = None, watch: Callable | None = None) -> Tensor:
    """Captions -> final latents (B, C, T, h, w), float32. Clip i depends on captions[i] and seeds[i] alone.

    models: has `unet`, `vae` and `text`. size: (T, H, W) of the clips, in frames and pixels. reference, with
    the method "ddim": a clip of that size whose motion guides at t >= 1000 (1 - τ) with strength λ'.
    watch(t, ẑ0): is called in each step."""
    assert reference is None or sampling.method == "ddim", "motion guidance is for the teacher's ODE"
    device = next(models.unet.parameters()).device
    noise, schedule = Noise(seeds, models.vae.config.shape(*size), device), Schedule(sampling.grid, device)
    c = models.text(captions)

    # the student's f, in few jumps
    if sampling.method == "student":
        f = student_f(models.unet, schedule, c, sampling, watch)
        return sample(f, schedule, noise, sampling.jumps(schedule), progress)

    # the teacher's ODE
    uncond = models.text([""] * len(captions))
    eps_model = guided_eps(models.unet, c, uncond, sampling)
    timesteps = schedule.few_steps(sampling.steps) if sampling.on_grid else ddim_timesteps(sampling.steps)
    scale = z0_scale() if sampling.scale_z0 else None
    push = None
    if reference is not None:
        push = motion_transfer(models.unet, schedule, c, reference, timesteps, sampling)
    return ddim_sample(schedule, eps_model, noise(), timesteps, noise, sampling.eta, scale, push, progress,
                       watch)


def student_f(unet, schedule: Schedule, c: Tensor, sampling: Sampling,
              watch: Callable | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The student as f(z, t) -> ẑ0."""
    w = torch.full((len(c),), sampling.guidance, device=c.device)

    def f(z, t):
        conditions = dict(fps=sampling.fps)
        if sampling.motion is not None:
            conditions["motion"] = motion_strength(t, sampling.motion, sampling.motion_share)
        z0_hat = consistency(unet, schedule, z, t, w, c, **conditions)
        if watch:
            watch(int(t[0]), z0_hat)
        return z0_hat

    return f


def guided_eps(unet, c: Tensor, uncond: Tensor, sampling: Sampling) -> Callable[[Tensor, Tensor], Tensor]:
    """The teacher as eps_model(z, t) -> guided ε; without guidance, one pass instead of two."""
    def eps_model(z, t):
        if not sampling.guidance:
            return unet(z, t, c, fps=sampling.fps).float()
        eps_c, eps_u = teacher_eps(unet, z, t, c, uncond, fps=sampling.fps)
        return cfg(eps_c, eps_u, sampling.guidance)                         # Eq. C

    return eps_model


def motion_transfer(unet, schedule: Schedule, c: Tensor, reference: Reference, timesteps: list[int],
                    sampling: Sampling) -> Callable[[Tensor, Tensor], Tensor | None]:
    """push(z, t) for `ddim_sample`, towards the temporal attention of the reference."""
    guided = [t for t in timesteps if t >= 1000 * (1 - sampling.motion_share)]

    def eps_model(z, t):
        return unet(z, t, reference.c, fps=sampling.fps).float()

    inverted = ddim_invert(schedule, eps_model, reference.z0, guided)

    def push(z, t):
        z_ref = inverted.get(int(t[0]))
        if z_ref is None:
            return None
        c_ref, motion = reference.c.expand_as(c), torch.full((len(z),), sampling.motion, device=z.device)
        gradient, _ = motion_gradient(unet, z, z_ref.expand_as(z), t, c, c_ref, fps=sampling.fps)
        return motion_push(schedule, t, gradient, motion)                   # v2 Eq. 8

    return push


# ---- LoRA: the student as a low-rank difference to its teacher ---------------------------------------------

class LoRA(nn.Module):
    """base(x) + up(down(x)), base frozen. Kernel, stride and padding sit in `down`; `up` is 1x1, zero at
    first."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base, self.on = base.requires_grad_(False), True
        at = dict(bias=False, device=base.weight.device)    # float32, whatever the base is stored in
        if isinstance(base, nn.Linear):
            r = min(rank, base.in_features, base.out_features)
            self.down, self.up = nn.Linear(base.in_features, r, **at), nn.Linear(r, base.out_features, **at)
        else:
            r = min(rank, base.in_channels, base.out_channels)
            self.down = type(base)(base.in_channels, r, base.kernel_size, base.stride, base.padding, **at)
            self.up = type(base)(r, base.out_channels, 1, **at)
        start = torch.empty(self.down.weight.shape)         # drawn on the CPU: alike for all processes
        nn.init.normal_(start, std=1 / rank)
        self.down.weight.data.copy_(start)
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
    """Freezes a network and wraps every Linear, Conv2d and Conv3d in it with LoRA. Returns the new
    parameters, the only ones that train.

    skip: names of layers to leave alone."""
    unet.requires_grad_(False)
    for name, module in list(unet.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and name not in skip:
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
    state = {}
    for name, lora in lora_layers(unet).items():
        state[f"{name}.down"] = lora.down.weight.detach()
        state[f"{name}.up"] = lora.up.weight.detach()
    return state


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
    """θ⁻: the exponential moving average of the trained weights θ, for the target of v1 Eq. 6."""

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


# ---- beyond the papers: clips on the student's own path ----------------------------------------------------

@torch.no_grad()
def on_policy(f, schedule: Schedule, z0: Tensor, step: Step, share: float, n: int,
              generators: list[torch.Generator]) -> tuple[Tensor, Step]:
    """Moves a share of the clips to where the student comes when it samples in n jumps -> z0, and the step
    with their t.

    The papers noise training clips only, and unless t is near 999 the clip can be seen in z_t. Here z_t is
    made of the student's last answer, whose mistakes L_CD and rewards can mend; DMD2 (arXiv 2405.14867) calls
    it backward simulation. Each clip's generator draws whether it moves and how many jumps it has behind it,
    0 to n - 1. f(z, t, clips) -> ẑ0 of some clips, by their numbers in the batch."""
    z0, t, times = z0.clone(), step.t.clone(), step.t.new_tensor(schedule.few_steps(n))
    jumps = {i: int(torch.randint(n, (1,), generator=generator)) for i, generator in enumerate(generators)
             if torch.rand(1, generator=generator) < share}
    for i, count in jumps.items():
        z0[i], t[i] = 0, times[count]                       # z_999 = σ_999 ε, σ_999 = 0.998

    for done, time in enumerate(times):
        moving = [i for i, count in jumps.items() if count > done]
        if moving:
            noise = torch.stack([torch.randn(z0.shape[1:], generator=generators[i]) for i in moving])
            now = time.expand(len(moving))
            z = schedule.add_noise(z0[moving], noise.to(z0.device), now)    # Eq. D
            z0[moving] = f(z, now, moving)
    return z0, replace(step, t=t)


# ---- beyond the papers: rewards at test time ---------------------------------------------------------------

def chain_gradient(f, schedule: Schedule, noises: list[Tensor], timesteps: list[int],
                   gradient_at: Callable) -> tuple[list[Tensor], Tensor, Tensor]:
    """Reward gradient through the whole few-step sampler, exact, in the memory of one jump.

    noises: of each jump (B, C, T, h, w). gradient_at(ẑ0) -> g = ∂R/∂ẑ0 and R (B,). Returns the gradient of
    each noise, the last ẑ0 and R. The sampler runs without a graph and keeps z of each jump; then g walks
    back: through f to z = α ẑ0 + σ ε, and from there to the jump's noise and to the ẑ0 before."""
    times = [torch.full((len(noises[0]),), t, device=noises[0].device) for t in timesteps]
    path = [noises[0]]                                      # z_999 is noise alone
    with torch.no_grad():
        for i, noise in enumerate(noises[1:], 1):
            path.append(schedule.add_noise(f(path[-1], times[i - 1]), noise, times[i]))     # Eq. D
        z0_hat = f(path[-1], times[-1])
    g, reward = gradient_at(z0_hat)

    gradients = []
    for z, t in zip(reversed(path), reversed(times)):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            g_z, = torch.autograd.grad(f(z, t), z, g)
        alpha, sigma = schedule.at(t)
        gradients.append(sigma * g_z)
        g = alpha * g_z
    gradients[-1] = g_z                                     # of the first noise, which is z itself
    return gradients[::-1], z0_hat, reward


def refine(f, schedule: Schedule, noises: list[Tensor], timesteps: list[int], gradient_at: Callable,
           steps: int, rate: float = 0.03, progress=iter) -> tuple[Tensor, list[Tensor]]:
    """Optimises the noises of all jumps by reward -> the ẑ0 of each clip with the highest reward, and R (B,)
    before each step and after the last (NoisEasier, 2026; ReNO, arXiv 2406.04312).

    Adam on the noises, each rescaled to its first norm afterwards, so that it stays as large as noise is."""
    noises = [noise.clone() for noise in noises]
    norms = [noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) for noise in noises]
    adam = torch.optim.Adam(noises, lr=rate, maximize=True)
    best, best_reward, rewards = None, None, []
    for i in progress(range(steps + 1)):
        gradients, z0_hat, reward = chain_gradient(f, schedule, noises, timesteps, gradient_at)
        rewards.append(reward)
        if best is None:
            best, best_reward = z0_hat, reward
        better = reward > best_reward
        best = torch.where(better.view(-1, 1, 1, 1, 1), z0_hat, best)
        best_reward = torch.where(better, reward, best_reward)

        if i < steps:
            for noise, gradient in zip(noises, gradients, strict=True):
                noise.grad = gradient
            adam.step()
            for noise, norm in zip(noises, norms, strict=True):
                noise *= norm / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    return best, rewards


def generate_refined(models, captions: list[str], seeds: list[int], size: tuple[int, int, int],
                     sampling: Sampling, terms: list[RewardTerm], steps: int, chunk: int = 1,
                     progress=iter) -> tuple[Tensor, list[Tensor]]:
    """`generate` of a student with its noises refined by rewards -> latents (B, C, T, h, w), R (B,) per step.

    Each clip is shown to the rewards by the same frames in every step."""
    device = next(models.unet.parameters()).device
    noise, schedule = Noise(seeds, models.vae.config.shape(*size), device), Schedule(sampling.grid, device)
    timesteps = sampling.jumps(schedule)
    with torch.no_grad():
        f = student_f(models.unet, schedule, models.text(captions), sampling)

    def gradient_at(z0_hat):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        g, scores = reward_gradient(z0_hat, captions, models.vae.decode, terms, generators, chunk)
        return len(captions) * g, sum(term.weight * scores[term.name] for term in terms)

    noises = [noise() for _ in timesteps]
    return refine(f, schedule, noises, timesteps, gradient_at, steps, progress=progress)
