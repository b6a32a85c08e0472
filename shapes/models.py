"""The toy's networks, and how they are loaded: what a small model needs that the published ones do without.

Names of parts are those of the shipped files.
"""
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model
import rewards as reward_models
from networks.fast_cpu import speed_up
from plumbing import weights
from plumbing.errors import reading
from plumbing.files import read_header
from shapes import STUDENTS, WEIGHTS, grammar, student, world
from solver import Sampling, Schedule

LAYOUT = """
    conv 8 32                     | res 64+32 64
    res 32 64                     | res 96+64 64
    downsample 64                 | res 96+64 96, space 96, time 96, upsample 96
    res 64 96, space 96, time 96  | res 96+96 96, space 96, time 96
                  res 96, space 96, time 96, res 96
"""                                         # to be read as model.LAYOUT


@dataclass(frozen=True)
class Config(model.UNetConfig):
    """Sizes of the toy's UNets."""
    layout: str = LAYOUT
    spacetime: int = 128                    # width of SpaceTime; 0: a UNet of the published form

    @property
    def network(self) -> type:
        return UNet if self.spacetime else VelocityUNet


TOY = Config(in_channels=8, channels=32, head_dim=32, context_dim=128, init_heads=1, groups=8)


# The teacher of motion guidance is of the published form, and not told places. It shows things as asked, and
# hardly moves them: what VideoCrafter2 lacks, too (v2, Sec. 3.3).
MOTION_LAYOUT = """
    conv 8 48                     | res 48+48 48, space 48, time 48
    res 48, space 48, time 48     | res 96+48 48, space 48, time 48
    downsample 48                 | res 96+48 96, space 96, time 96, upsample 96
    res 48 96, space 96, time 96  | res 96+96 96, space 96, time 96
                  res 96, space 96, time 96, res 96
"""
MOTION = Config(MOTION_LAYOUT, in_channels=8, channels=48, head_dim=24, context_dim=128, init_heads=2,
                groups=8, spacetime=0)
TOY_VAE = model.VAEConfig(channels=48, mult=(1, 1), res_blocks=1, latent=8, groups=8, patch=4)
TIMESTEPS = (999, 624, 499, 374)        # where most is decided; evenly spaced: 999, 749, 499, 249
SAMPLING = {                            # how clips are made, unless the command line says otherwise
    "turbo": Sampling("student", steps=4, guidance=2.0, grid=8, timesteps=TIMESTEPS),
    "teacher": Sampling("ddim", steps=50, guidance=2.0, grid=50, on_grid=True),
}
FAMILY = model.Family(TOY, world.SIZE, world.SIZE, fps=8, sampling=SAMPLING, frames=world.FRAMES, vae=TOY_VAE)
FAMILIES = {"shapes": FAMILY, "shapes-motion": replace(FAMILY, unet=MOTION)}
FILES = {"shapes": "teacher", "shapes-motion": "motion"}            # of the teachers' weights


STATES = 3                              # the last tokens of c: first thing, second thing, background


class SpaceTime(nn.Module):
    """Tells the toy where and when: functions of (t, y, x), one modulated by each thing that the caption
    names and one by the background, added to the first features and to what each attention over the clip
    sees; and functions of t alone, added to the timestep embedding of every frame. Normalised, so that they
    are as large as the features they join. Tokens of an attention choose whose function they read: what is
    red moves as the red thing moves. Elsewhere their mean is read.

    The published UNets know neither place (only what zero padding leaks) nor time (their temporal attention
    has no positions). A billion weights cope with that; a small network that must move a shape does not."""

    octaves = 4

    def __init__(self, axes: int, width: int, context_dim: int, channels: int, choose: bool = False):
        super().__init__()
        self.features = nn.Linear(axes * (1 + 2 * self.octaves), width)
        self.modulation = nn.Linear(context_dim, 2 * width)
        self.hidden = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width, channels)
        if choose:
            self.norm = nn.LayerNorm(channels)
            self.query, self.key = nn.Linear(channels, 64), nn.Linear(context_dim, 64)

    def forward(self, c: Tensor, *sizes: int, tokens: Tensor | None = None) -> Tensor:
        """c (B, L, D); sizes T or T, H, W; tokens (B, THW, channels), which choose -> (B, THW, channels)"""
        # positions and their sinusoids
        axes = [torch.linspace(-1, 1, n, device=c.device) for n in sizes]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)    # (THW, axes)
        waves = [f(math.pi * 2 ** k * place) for k in range(self.octaves) for f in (torch.sin, torch.cos)]
        h = self.norm1(self.features(torch.cat([place, *waves], dim=-1).to(c.dtype)))       # (THW, D)

        # one function for each state
        states = c[:, -STATES:]
        scale, shift = self.modulation(states)[:, :, None].chunk(2, dim=-1)                 # (B, K, 1, D)
        h = F.silu(h * (1 + scale) + shift)                                                 # (B, K, THW, D)
        h = self.norm2(F.silu(self.hidden(h)))
        if tokens is None:
            return self.out(h.mean(1))

        # each token chooses
        likeness = self.query(self.norm(tokens)) @ self.key(states).transpose(1, 2) / 8     # (B, THW, K)
        share = likeness.softmax(-1).transpose(1, 2)[..., None]                             # (B, K, THW, 1)
        return self.out((share * h).sum(1))


class ClipTransformer(model.Transformer):
    """The toy's temporal transformer: both of its attentions see all pixels of all frames, and know their
    places. In 64 latent pixels things move past each other: a pixel's own frames do not tell what moved."""

    def __init__(self, channels: int, config: Config):
        place = SpaceTime(3, config.spacetime, config.context_dim, channels, choose=True)
        heads = channels // config.head_dim
        super().__init__(channels, heads, config.head_dim, "all", config.context_dim, config.groups)
        self._modules = {"place": place, **self._modules}   # optimizer states and LoRA go by this order

    def tokens(self, x, c):
        tokens = super().tokens(x, c)
        return tokens + self.place(c, *x.shape[2:], tokens=tokens)


class VelocityUNet(model.UNet3D):
    """A UNet3D that gives ε as seen from outside, while the network inside predicts v = α ε - σ z0 (Salimans
    and Ho, 2022).

    At t = 999, ε is z but for 0.5 %, and what the caption says is in that remainder. A billion weights copy z
    to the output precisely enough not to bury it; ε = σ z + α v leaves a small network only what matters."""

    schedule: Schedule | None = None            # made in the first pass, where the latents are

    def forward(self, z: Tensor, t: Tensor, c: Tensor, **conditions) -> Tensor:
        if self.schedule is None or self.schedule.alpha.device.type != z.device.type:
            self.schedule = Schedule(device=z.device)
        alpha, sigma = self.schedule.at(t)
        return sigma * z + alpha * super().forward(z, t, c, **conditions).float()


class UNet(VelocityUNet):
    """The toy's denoiser: told place and time, with attention over the whole clip."""

    def conditions(self) -> dict[str, nn.Module]:
        config, layers = self.config, super().conditions()
        layers["spacetime"] = SpaceTime(3, config.spacetime, config.context_dim, config.channels)
        layers["frametime"] = SpaceTime(1, config.spacetime, config.context_dim, 4 * config.channels)
        return layers

    def layer(self, kind: str, cin: int, cout: int) -> nn.Module:
        return ClipTransformer(cin, self.config) if kind == "time" else super().layer(kind, cin, cout)

    def embed(self, z, t, c, *conditions):
        return super().embed(z, t, c, *conditions) + self.frametime(c, z.shape[2])      # (B, T, 4 channels)

    def first(self, z, emb, c):
        h = self.run(self.input_blocks[0], z, emb, c)
        h = h + self.spacetime(c, *h.shape[2:]).transpose(1, 2).unflatten(2, h.shape[2:])
        return self.run(self.init_attn, h, emb, c)

    def motion_attentions(self) -> list[model.Attention]:
        """The first attention over the clip of every block on the way up that has one: where in all frames a
        pixel finds what it shows."""
        return [m.attn1 for m in self.output_blocks.modules() if isinstance(m, ClipTransformer)]


def tokenize(captions: list[str]) -> Tensor:
    """Captions -> ids (B, L)."""
    return torch.tensor([grammar.token_ids(caption) for caption in captions])


class CaptionEncoder(nn.Module):
    """Captions -> c (B, 51, 128): the states of 24 tokens in CLIP's text tower, the same in ViCLIP's, and one
    for each thing and for the background: small text towers blur whose motion is whose."""

    def __init__(self, clip: reward_models.CLIP, viclip: reward_models.ViCLIP):
        super().__init__()
        self.clip, self.viclip = clip.text_encoder, viclip.text_encoder

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        ids = tokenize(captions).to(self.clip.ln_final.weight.device)
        return torch.cat([self.clip.penultimate(ids), self.viclip.states(ids), self.things(ids)], 1)

    def things(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, STATES, D): the sum of ViCLIP's embeddings of the words that describe each
        thing, and of those that describe the background; 0 where there is none."""
        first, count = grammar.FIRST_WORD, len(grammar.VOCABULARY)
        embedding = self.viclip.token_embedding.weight[first:first + count]
        embedding = (embedding - embedding.mean(0)) / embedding.std() / 2

        # which words say something, and of what: the second thing follows "and", the background "on"
        number = {word: first + i for i, word in enumerate(grammar.VOCABULARY)}
        silent = torch.tensor([number[word] for word in ("a", "and", "on", "background")], device=ids.device)
        describes = (ids >= first) & (ids < first + count) & ~torch.isin(ids, silent)
        whose = (ids == number["and"]).cumsum(1)
        whose = torch.where((ids == number["on"]).cumsum(1) > 0, STATES - 1, whose)

        vectors = embedding[(ids - first).clamp(0, count - 1)]
        states = [(vectors * (describes & (whose == k))[..., None]).sum(1) for k in range(STATES)]
        return torch.stack(states, 1)


# ---- loading -----------------------------------------------------------------------------------------------

def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (as float32) and header of one of the toy's weight files."""
    tensors = weights.read_tensors(path)
    weights.check_numbers(tensors, path)
    return {key: tensor.float() for key, tensor in tensors.items()}, read_header(path)


def load_vae(folder: str | Path = WEIGHTS) -> model.VAE:
    """The toy's VAE, frozen."""
    path = Path(folder) / "vae.safetensors"
    tensors, header = read(path)
    with reading(path, "the toy's VAE"):
        network = model.VAE(replace(TOY_VAE, scale=header["scale"]))
    return weights.fill(network, tensors, path).requires_grad_(False)


def load_text(folder: str | Path = WEIGHTS) -> CaptionEncoder:
    """The toy's caption encoder, frozen: parts of the CLIP and of the ViCLIP that also serve as rewards."""
    return CaptionEncoder(*(reward.model for reward in rewards(folder=folder).values()))


def load(turbo: str | Path | None = None, folder: str | Path | None = None,
         device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, lora_scale: float = 1.0,
         name: str = "shapes", **conditions) -> model.Models:
    """The toy's networks: the teacher's, or with `turbo` (a Path, or one of STUDENTS) a student's.

    name: whose teacher, one of FAMILIES. folder: where pretrain.py wrote, instead of the embedded weights."""
    # Two threads gain a third on an idle machine; on a busy one they mostly wait for each other.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    folder = Path(folder or WEIGHTS)
    family, (teacher, _) = FAMILIES[name], read(folder / f"{FILES[name]}.safetensors")
    config, whole, lora, header = replace(family.unet, **conditions), None, None, {}
    if turbo is not None:
        turbo = student(turbo, folder) if turbo in STUDENTS else turbo
        config, whole, lora, header = model.read_turbo(turbo, config, name, lora_scale)
        header = model.complete(header, family)
    layers = model.condition_layers(config).items()
    state = whole or {f"{name}.weight": layer.weight.data for name, layer in layers} | teacher

    with weights.without_memory():
        unet = config.network(config)
    fingerprint = weights.fingerprint(teacher, unet)
    if lora:
        model.check_teacher(header, fingerprint, turbo)
    weights.fill(unet, state, turbo or folder, device, dtype, lora).out.float()          # see UNet3D.last
    vae, text = load_vae(folder), load_text(folder).to(device)      # text stays in float32
    autoencoder = weights.fingerprint(vae.state_dict(), vae)
    speed_up(model.CPU_LAYERS, unet, vae.to(device, dtype))
    return model.Models(name, unet, vae, text, family, header, fingerprint, autoencoder)


def reward(name: str, path: str | Path | None, device: torch.device | str, folder: str | Path | None = None,
           **options) -> reward_models.Reward:
    """A reward by its name; the toy's own from its file, else from the folder, else the embedded one."""
    if not name.startswith("shapes-"):
        return reward_models.load(name, path, device, **options)
    path = path or Path(folder or WEIGHTS) / f"{name.removeprefix('shapes-')}.safetensors"
    return reward_models.load(name, path, device, tokenizer=tokenize)


def rewards(device: torch.device | str = "cpu", folder: str | Path | None = None
            ) -> dict[str, reward_models.Reward]:
    """R_img, the toy's CLIP, and R_vid, its ViCLIP."""
    return {"image": reward("shapes-clip", None, device, folder),
            "video": reward("shapes-viclip", None, device, folder)}
