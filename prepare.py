"""T2V-Turbo-v2, Algorithm 1: what the teacher says about each clip is computed once, before training.

    torchrun --nproc_per_node=8 prepare.py --teacher model.ckpt --out CACHE --clips 24000 \\
        --data VidGen_1M_video_caption.json --reward-data '/data/webvid/{00000..09999}.tar'
    python prepare.py --preset shapes-v2 --out CACHE                                # the toy's, on a laptop

Per clip: latents z0, caption states c, and one DDIM inversion of z0 with its own caption, which serves all of
the clip's draws of (t, ε). Per draw: z_t, ε(c), ε(∅) and, where motion guidance is active, ∂G/∂z_t. Training
(`train.py --preset turbo-v2 --data CACHE`) then needs no teacher: guidance is linear in ε(c) and ε(∅), and ω
stays random in every step. Interrupted, the same command goes on.
"""
import dataclasses
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import train
from model import Models, to_latents
from plumbing import cli
from plumbing.cli import Count, File, Folder
from plumbing.errors import UserError
from plumbing.files import check_outputs
from plumbing.folder import locked
from plumbing.run import Group, stop_signals
from solver import Schedule, ddim_invert
from turbo import TeacherOutput, motion_strength


@dataclass(frozen=True)
class Config(train.Config):
    """The options of prepare.py; all else is that of the preset that will train from the cache."""
    preset: Literal["turbo-v2", "shapes-v2", "shapes-motion-v2"] = "turbo-v2"  # the recipe it is for
    teacher: File = ""                  # model.ckpt of VideoCrafter2; toy: its folder [downloaded; embedded]
    data: tuple[str, ...] = ()          # captioned clips: folder, manifest or .tar pattern; repeatable
    reward_data: tuple[str, ...] = ()   # further clips; then only these carry rewards (v2: WebVid)
    columns: str = ""                   # a manifest's columns: path=NAME,caption=NAME,reward_caption=NAME
    video_root: Folder = ""             # folder that a manifest's paths start from [the manifest's own]
    frames: Count = 16                  # frames of a clip
    height: Count = 320                 # height of the clips in pixels
    width: Count = 512                  # width of the clips in pixels
    out: Folder = "runs/cache"          # folder of the cache
    clips: Count | None = None          # how many clips of all data together [all]
    draws: Count = 1                    # timesteps and noises per clip, which share its inversion


# ---- one clip ----------------------------------------------------------------------------------------------

@torch.no_grad()
def prepare_clip(models: Models, recipe, clip: Tensor, caption: str,
                 generator: torch.Generator) -> dict[str, Tensor]:
    """All draws of a clip uint8 (3, T, H, W) -> tensors for a `data.CacheWriter`, and t (draws,)."""
    device = next(models.unet.parameters()).device
    schedule = Schedule(recipe.grid, device)

    # clean latents and caption states; t and ε of each draw
    z0 = to_latents(models.vae, clip[None], [generator])
    c, uncond = models.text([caption]), models.text([""])
    t = schedule.grid[torch.randint(recipe.grid, (recipe.draws,), generator=generator).to(device)]
    eps = torch.randn(recipe.draws, *z0.shape[1:], generator=generator).to(device)

    # the clip's own motion, at the timesteps where motion guidance is active
    guided = [time for time, on in zip(t.tolist(), motion_strength(t, 1.0, recipe.motion_share)) if on]
    inverted = ddim_invert(Schedule(recipe.inversion_steps, device),
                           lambda z, t: models.unet(z, t, c, fps=recipe.fps).float(), z0, guided)

    outputs = [TeacherOutput.of(models.unet, schedule, z0, eps[i:i + 1], t[i:i + 1], inverted.get(int(t[i])),
                                c, uncond, fps=recipe.fps)
               for i in range(recipe.draws)]
    tensors = {name: torch.cat([getattr(output, name) for output in outputs]) for name in vars(outputs[0])}
    if not guided:
        del tensors["gradient"]
    return tensors | {"c": c[0]}


# ---- all clips ---------------------------------------------------------------------------------------------

def mixture(datasets: list, count: int | None, seed: int) -> list[tuple]:
    """`count` clips, as many of each dataset (None: all of all), drawn from `seed` -> (dataset, index in it,
    does it carry rewards) of each. The last dataset's do: their captions are short enough for reward models,
    which read 32 to 77 tokens."""
    clips = []
    for number, dataset in enumerate(datasets):
        size = min(len(dataset), count // len(datasets)) if count else len(dataset)
        chosen = np.random.default_rng([seed, number]).choice(len(dataset), size, replace=False)
        clips += [(dataset, int(index), number == len(datasets) - 1) for index in sorted(chosen)]
    return clips


def prepare(config: Config, models: Models, clips: list[tuple], writer: data.CacheWriter) -> int | None:
    """Writes this process's clips of a mixture until a signal comes -> its number, or None."""
    missing, signals, bad = writer.missing(), stop_signals(), 0
    earlier = len(writer.clips) - len(missing)              # clips, before this start
    for done, index in enumerate(tqdm(missing, "clips prepared", disable=None), earlier + 1):
        if signals:
            return signals[0]
        dataset, place, rewards = clips[index]
        try:
            clip = dataset.get(place, torch.Generator().manual_seed(data.seed_of(config.seed, index)))
            generator = torch.Generator().manual_seed(data.seed_of(config.seed, index, 1))
            tensors = prepare_clip(models, config, clip["clip"], clip["caption"], generator)
            notes = dict(caption=clip["caption"], reward_caption=clip["reward_caption"], rewards=rewards)
            writer.write(index, tensors, notes | {"t": tensors.pop("t").tolist()})
        except data.BadClip as error:
            bad += 1
            data.append_rows(writer.folder / "bad_clips.jsonl", [dict(index=index, reason=str(error))])
            if bad >= 20 and bad > 0.05 * done:
                raise UserError(f"too many bad clips: {bad} of {done}; the last one: {error}") from error
    return None


def header_of(config: Config, models: Models, clips: list[tuple]) -> dict:
    """What the samples of a cache depend on; training asks for a part of it (`train.cache_header`). Of data
    the names and sizes, as a job may find them in another folder than the last one."""
    recipe = train.cache_header(config) | {name: getattr(config, name) for name in (
        "draws", "inversion_steps", "motion_share", "seed", "columns")}
    names = {option: [Path(name).name for name in getattr(config, option)]
             for option in ("data", "reward_data")}
    sizes = list({id(dataset): len(dataset) for dataset, *_ in clips}.values())
    return recipe | names | {"sizes": sizes, "clips": len(clips), "teacher": models.teacher,
                            "autoencoder": models.autoencoder}


def open_mixture(config: Config, group: Group) -> list[tuple]:
    """The clips of --data and --reward-data; of the toy half of the clips carries rewards."""
    sources = [(), ()] if config.is_toy else [specs for specs in (config.data, config.reward_data) if specs]
    if not sources:
        raise UserError("no clips to prepare; name them with --data")
    datasets = [train.open_clips(config, specs, group) for specs in sources]
    clips = mixture(datasets, config.clips, config.seed)
    if not clips:
        raise UserError(f"--clips {config.clips}: at least one of each data set, so {len(datasets)}")
    if len(clips) < (config.clips or 0) and group.rank == 0:
        print(f"{len(clips)} clips, not {config.clips}: as many of each data set, where it has them",
              file=sys.stderr)
    return clips


@cli.main
def main(argv: list[str] | None = None):
    """Makes a cache, or goes on with one."""
    preset = cli.typed(Config, argv).get("preset", Config.preset)
    toy = dict(clips=400, draws=4) if preset.startswith("shapes") else {}
    config = cli.parse(Config, argv, __doc__, defaults=train.PRESETS[preset] | toy)
    config = dataclasses.replace(config, lora=1)            # nothing is trained: the teacher is in its dtype
    train.check_options(config, set())
    if config.is_toy and (config.data or config.reward_data):
        raise UserError("--data and --reward-data belong to --preset turbo-v2; the toy draws its own clips")
    check_outputs({"--out": config.out}, {
        "--teacher": config.teacher, "--data": config.data, "--reward-data": config.reward_data})
    group = Group(config.device, timedelta(days=7))         # its processes meet when all clips are done
    torch.manual_seed(config.seed)

    # clips, teacher, cache
    clips = open_mixture(config, group)
    models = train.load_models(config, group.device)
    models.unet.requires_grad_(False)
    models.unet.checkpointing = True
    with locked(config.out) if group.rank == 0 else nullcontext():
        with group.rank0_first():
            header = header_of(config, models, clips)
            writer = data.CacheWriter(config.out, header, group.rank, group.world_size)

        received = prepare(config, models, clips, writer)
        complete = not group.any(received)
        if group.rank == 0 and complete:
            made = len(data.clip_files(writer.folder))
            if not made:
                raise UserError(f"no clip of {len(clips)} could be used; why: {config.out}/bad_clips.jsonl")
            writer.write_header(complete=True)
            print(f"{config.out}: {made} of {len(clips)} clips")
        group.close()
    if not complete:
        print(f"stopped by a signal; what is in {config.out} stays, and the same command goes on",
              file=sys.stderr)
        sys.exit(128 + (received or signal.SIGTERM))


if __name__ == "__main__":
    main()
