"""The embedded toy: a world whose clips a program draws, and small models trained on it from scratch. No download."""
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import model
import rewards as reward_models
from plumbing import weights
from shapes import world
from shapes.models import CaptionEncoder, Config, UNet

WEIGHTS = Path(__file__).parent / "weights"
STUDENTS = ("vcm", "vcm-img", "vcm-vid", "turbo")


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (as float32) and configuration of one of the toy's weight files."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; make it with: python shapes/pretrain.py --all --out {path.parent}")
    tensors, config = weights.read_checkpoint(path)
    return {key: tensor.float() for key, tensor in tensors.items()}, config


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
    config.pop("dropout", None)                                                     # in the headers of older files; it was 0
    config = replace(Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}), **conditions)
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
