"""The embedded toy: a world whose clips a program draws, and small models trained on it from scratch. No download."""
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import model
import rewards as reward_models
from plumbing import weights
from shapes import world
from solver import Schedule

WEIGHTS = Path(__file__).parent / "weights"
STUDENTS = ("vcm", "vcm-img", "vcm-vid", "turbo")


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (as float32) and configuration of one of the toy's weight files."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; make it with: python shapes/pretrain.py --all --out {path.parent}")
    tensors, config = weights.read_checkpoint(path)
    return {key: tensor.float() for key, tensor in tensors.items()}, config


class UNet(model.UNet3D):
    """The toy's denoiser: ε as seen from outside, but the network inside predicts v = α ε - σ z0 (Salimans and Ho, 2022).

    At t = 999, ε is z but for 0.5 %, and what the caption says is in that remainder. A billion weights trained for weeks copy z to the
    output precisely enough not to bury it; a small network does not. ε = σ z + α v leaves it only the part that matters.
    """

    def forward(self, z: Tensor, t: Tensor, context: Tensor, **conditions) -> Tensor:
        alpha, sigma = Schedule(device=z.device).at(t)
        return sigma * z + alpha * super().forward(z, t, context, **conditions).float()


class CaptionEncoder(nn.Module):
    """Captions → context (B, 49, 128): the states of 24 tokens in CLIP's text tower, the same in ViCLIP's, and ViCLIP's embedding of
    the whole caption.

    A tower that was trained on pictures does not say which of two things a motion belongs to; ViCLIP's, trained on clips, does.
    """

    def __init__(self, text: model.TextEncoder, viclip: reward_models.ViCLIP):
        super().__init__()
        self.text, self.viclip = text, viclip

    @property
    def width(self) -> int:
        return self.text.width

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        ids, tower = world.tokenize(captions).to(self.text.ln_final.weight.device), self.viclip.text_encoder
        states = tower.states(ids)
        whole = tower.whole(ids, states)
        whole = whole / whole.norm(dim=1, keepdim=True) * whole.shape[1] ** 0.5     # unit variance
        return torch.cat([self.text(captions), states, whole[:, None]], 1)


def load_vae(folder: Path = WEIGHTS) -> model.VAE:
    """The toy's VAE, frozen."""
    tensors, config = read(Path(folder) / "vae.safetensors")
    vae = model.VAE(model.VAEConfig(**{**config, "mult": tuple(config["mult"])}))
    vae.load_state_dict(tensors)
    return vae.eval().requires_grad_(False)


def load_text(folder: Path = WEIGHTS) -> CaptionEncoder:
    """The toy's caption encoder, frozen: parts of the CLIP and of the ViCLIP that also serve as rewards."""
    tensors, config = read(Path(folder) / "clip.safetensors")
    cfg = config["text_cfg"]
    text = model.TextEncoder(model.TextConfig(**{name: cfg[name] for name in model.TextConfig.__annotations__}), world.tokenize)
    text.load_state_dict({key: tensors[key] for key in text.state_dict()})
    tensors, config = read(Path(folder) / "viclip.safetensors")
    viclip = reward_models.ViCLIP(reward_models.ViCLIPConfig(**config))
    viclip.load_state_dict(tensors)
    return CaptionEncoder(text, viclip).eval().requires_grad_(False)


def student(name: str, folder: str | Path | None = None) -> Path:
    """The file of a student: embedded, or where `train.py --out FOLDER/NAME` wrote it."""
    places = [Path(folder or WEIGHTS) / path for path in (f"{name}.safetensors", f"{name}/turbo.safetensors")]
    return next((path for path in places if path.exists()), places[0])


def load(turbo: str | Path | None = None, folder: str | Path | None = None, device="cpu", dtype=torch.float32,
         **conditions) -> model.Models:
    """The toy's networks, like `weights.load`: the teacher's, or with turbo weights (a file, or vcm, vcm-img, vcm-vid, turbo for the
    embedded ones) a student's. folder: where pretrain.py wrote, instead of the embedded weights."""
    folder = Path(folder or WEIGHTS)
    state, config = read(folder / "teacher.safetensors")
    config = replace(model.UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}), **conditions)
    lora, header = None, {}
    if turbo is not None:
        turbo = student(turbo, folder) if str(turbo) in STUDENTS else turbo
        config, whole, lora, header = weights.read_turbo(turbo, config)
        state = whole or state
    if config.guidance and "time_cond_proj.weight" not in state:
        state["time_cond_proj.weight"] = torch.zeros(config.channels, 256)         # what LoRA adds to
    with torch.device("meta"):
        unet = UNet(config)
    weights.fill(unet, state, turbo or folder, device, dtype, lora)
    frozen = load_vae(folder).to(device, dtype), load_text(folder).to(device)       # ViCLIP's norms are float32
    return model.Models("shapes", unet, *frozen, fps=8, height=world.SIZE, width=world.SIZE, frames=world.FRAMES, header=header)


def rewards(device="cpu", folder: str | Path | None = None) -> dict[str, reward_models.Reward]:
    """R_img, the toy's CLIP, and R_vid, its ViCLIP."""
    folder = Path(folder or WEIGHTS)
    return {kind: reward_models.load(f"shapes-{name}", folder / f"{name}.safetensors", device, tokenizer=world.tokenize)
            for kind, name in (("image", "clip"), ("video", "viclip"))}


class Clips:
    """Captioned clips without end, drawn when asked for: a dataset for `data.loader`. The same index gives the same clip."""

    def __init__(self, split: str = "train", frames: int = world.FRAMES, size: int = world.SIZE):
        self.split, self.frames, self.size = split, frames, size      # split: train or held-out combinations

    def __len__(self) -> int:
        return 1_000_000

    def scene(self, index: int) -> tuple[world.Scene, str, Tensor]:
        """Scene, caption and clip (3, T, H, W) number `index`."""
        rng = random.Random(f"{self.split} {index}")
        scene = world.draw_scene(rng, self.split == "held-out")
        return scene, world.describe(scene, rng), world.render(scene, rng, self.frames, self.size)

    def get(self, index: int, generator=None) -> dict:
        _, caption, clip = self.scene(index)
        return dict(clip=clip, caption=caption, reward_caption=None, index=index)


def accuracy(generate, count: int = 32) -> float:
    """Share of clips that are all right by the oracle, for the same captions and seeds each time; half of them held-out combinations.

    generate(captions, seeds) -> clips uint8 (B, 3, T, H, W).
    """
    asked = [Clips(split).scene(2 * 10 ** 9 + i)[:2] for i in range(count // 2) for split in ("train", "held-out")]
    clips = generate([caption for _, caption in asked], list(range(len(asked))))
    return sum(world.judge(world.understand(caption), clip)["all"] for (_, caption), clip in zip(asked, clips)) / len(asked)
