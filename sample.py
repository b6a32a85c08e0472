"""Text to video in a few steps.

    python sample.py "a red circle moving right and a blue square moving up"                     # the embedded toy, no download
    python sample.py "An astronaut riding a horse." --model vc2 --teacher model.ckpt --turbo unet_lora.pt
    python sample.py --prompts prompts.txt --num 5 --model ms --out clips/                        # VBench's PROMPT-i.mp4
"""
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import imageio.v3
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import shapes
import turbo
from model import FAMILIES, Models, check_size, load, to_clip
from plumbing import cli, video, weights
from shapes import grammar
from solver import Sampling

SUFFIXES = (".mp4", ".gif", ".png", ".safetensors")


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    prompt: str = ""                    # what the clip shows
    model: Literal["shapes", "vc2", "ms"] | None = None    # toy, VideoCrafter2, ModelScopeT2V [what --turbo's header says, or shapes]
    method: Literal["turbo", "vcm", "teacher"] = "turbo"    # the student, the one distilled without rewards (shapes), or the teacher's DDIM
    steps: int | None = None            # network evaluations [turbo, vcm: 4, v2: 16; teacher: 50]
    guidance: float | None = None       # ω, 0 = none [shapes: 2; vc2, ms students: 7.5; teachers: 11 and 8, their authors' 12 and 9 less 1]
    motion: float | None = None         # λ', motion strength told to a T2V-Turbo-v2 student trained with motion guidance
    eta: float | None = None            # teacher only: fresh noise per step, 0 = none [vc2: 1, else 0]
    seed: int = 0                       # of the first clip; clip i has seed + i
    num: int = 1                        # clips per prompt
    frames: int | None = None           # [shapes: 8, else 16]
    height: int | None = None           # pixels [64, 320, 256]
    width: int | None = None            # pixels [64, 512, 256]
    fps: int | None = None              # frames per second of the file, and told to VideoCrafter2's UNet [8; vc2: 16, its teacher: 28]
    teacher: str | None = None          # model.ckpt (vc2), a folder (ms, shapes) [downloaded; shapes: embedded]
    turbo: str | None = None            # unet_lora.pt, unet_mg.pt, unet_no_mg.pt or our turbo.safetensors [downloaded; shapes: embedded]
    prompts: str | None = None          # file of prompts, one per line (.txt), or VBench's list (.json); skips clips that are there
    out: str | None = None              # .mp4, .gif, .png (frames), or a folder for PROMPT-i.mp4 [out.mp4]
    sheet: str | None = None            # .png with all clips of a prompt, a row each, frames from left to right
    latents: str | None = None          # .safetensors with the final latents, key `latents`, (B, 4, T, H/8, W/8) float32
    batch: int | None = None            # clips at once [shapes: 16, else 1]
    chunk: int | None = None            # frames the VAE decodes at once [shapes: all, else 4]
    device: str = ""                    # cuda, cpu, mps [cuda if there]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None    # of the networks [cuda: bfloat16, else float32]
    compile: bool = False               # torch.compile the UNet: slow first step, faster ones after it


def load_models(config: Config) -> Models:
    """The networks that a command line asks for, on its device."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable GPU; try --device cpu")
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    if config.model not in FAMILIES:
        student = None if config.method == "teacher" else config.turbo or config.method
        models = shapes.load(student, config.teacher, device, dtype)
    else:
        if config.method == "vcm" and not config.turbo:
            raise ValueError(f"there are no public VCM weights for {config.model}; give your own: --turbo FILE")
        student = None if config.method == "teacher" else config.turbo or f"{config.model}-turbo"
        models = load(config.model, config.teacher, student, device, dtype)
    if config.compile:
        models.unet = torch.compile(models.unet)
    return models


def sampling_of(models: Models, config: Config) -> Sampling:
    """The defaults of the networks, and over them what was typed."""
    typed = {name: getattr(config, name) for name in ("steps", "guidance", "eta", "fps", "motion")}
    if not models.unet.config.fps:
        typed["fps"] = None
    return replace(models.sampling, **{name: value for name, value in typed.items() if value is not None})


def generate(models: Models, captions: list[str], seeds: list[int], config: Config, progress=iter) -> Tensor:
    """Captions -> final latents (B, C, T, h, w), float32. Clip i depends on captions[i] and seeds[i] alone."""
    T, H, W = models.size
    size = config.frames or T, config.height or H, config.width or W
    return turbo.generate(models, captions, seeds, size, sampling_of(models, config), progress)


def decode(models: Models, z: Tensor, chunk: int | None = None) -> Tensor:
    """Latents -> clips uint8 (B, 3, T, H, W)."""
    return to_clip(models.vae, z, chunk or (None if models.name == "shapes" else 4)).cpu()


def read_prompts(path: str) -> list[str]:
    """Lines of a text file, or the prompts of VBench's json (a list of strings or of objects with "prompt_en")."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if path.endswith(".json") else text.splitlines()
        prompts = [row if isinstance(row, str) else row["prompt_en"] for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a list of prompts or of objects with \"prompt_en\": {error}") from error
    prompts = list(dict.fromkeys(p.strip() for p in prompts if p.strip()))
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return prompts


def check(config: Config) -> None:
    """Raises ValueError for what cannot be made, before anything is loaded."""
    if bool(config.prompt) == bool(config.prompts):
        raise ValueError("give one prompt, or --prompts FILE; e.g. sample.py \"a red circle moving right\"")
    if config.model not in FAMILIES and Path(config.turbo or "").suffix == ".pt":
        raise ValueError(f"{config.turbo} is no file of the toy; say what it belongs to: --model vc2 or --model ms")
    check_size(FAMILIES.get(config.model, shapes.FAMILY), height=config.height, width=config.width)
    for name in ("frames", "num", "steps", "batch", "chunk", "fps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: it takes at least 1")
    if config.out and config.prompts and Path(config.out).suffix in SUFFIXES:
        raise ValueError(f"--prompts writes many files; --out {config.out} should be a folder")


def outputs(config: Config, prompt: str) -> list[Path]:
    """The files that the clips of a prompt go to."""
    out = Path(config.out or ("clips" if config.prompts else "out.mp4"))
    if config.prompts or out.suffix not in SUFFIXES:
        return [out / f"{prompt.replace('/', ' ')[:180]}-{i}.mp4" for i in range(config.num)]
    return [out] if config.num == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(config.num)]


def write_sheet(path: str, clips: list[Tensor], zoom: int) -> None:
    """One picture: a row per clip, its frames from left to right."""
    picture = torch.cat([torch.cat([*clip.unbind(1)], 2) for clip in clips], 1)               # (3, B*H, T*W)
    picture = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    imageio.v3.imwrite(path, picture.permute(1, 2, 0).numpy())


@cli.main
def main(argv=None):
    """Prompts → clips in files; and, if asked for, a sheet of them and their latents."""
    config = cli.parse(Config, argv, __doc__, positional="prompt")
    if not config.model and config.turbo and config.turbo.endswith(".safetensors") and Path(config.turbo).exists():
        config = replace(config, model=weights.read_header(config.turbo).get("model"))
    check(config)
    prompts = read_prompts(config.prompts) if config.prompts else [config.prompt]
    if config.model not in FAMILIES:
        for prompt in prompts:
            grammar.understand(prompt)
    jobs = [(prompt, i, path) for prompt in prompts for i, path in enumerate(outputs(config, prompt))
            if not (config.prompts and path.exists())]
    models = load_models(config)
    size = config.batch or (16 if models.name == "shapes" else 1)
    latents, clips, began = [], [], time.perf_counter()
    for start in tqdm(range(0, len(jobs), size), "clips", unit_scale=size, disable=len(jobs) <= size):
        batch = jobs[start:start + size]
        captions, seeds = [prompt for prompt, _, _ in batch], [config.seed + i for _, i, _ in batch]
        z = generate(models, captions, seeds, config, partial(tqdm, desc="steps", leave=False))
        for clip, (_, _, path) in zip(decode(models, z, config.chunk), batch, strict=True):
            video.write_video(path, clip, config.fps or models.fps)
            clips += [clip] if config.sheet else []
        latents += [z.cpu()] if config.latents else []
    seconds = time.perf_counter() - began
    if config.sheet:
        write_sheet(config.sheet, clips, zoom=max(1, 64 // models.size[1]))
    if config.latents:
        save_file({"latents": torch.cat(latents)}, config.latents)
    files = [str(path) for _, _, path in jobs]
    print(f"{', '.join(files[:3])}{f' and {len(files) - 3} more' if files[3:] else ''}: {len(files)} clips in {seconds:.2f} s" if files
          else "nothing to do: all clips are there")


if __name__ == "__main__":
    main()
