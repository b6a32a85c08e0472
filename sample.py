"""Text to video in a few steps.

    python sample.py "a red circle rising and a blue square falling on white"  # the toy, nothing downloaded
    python sample.py "An astronaut riding a horse." --model vc2                # T2V-Turbo, downloaded once
    python sample.py "An astronaut riding a horse." --model vc2 --turbo vc2-turbo-v2           # T2V-Turbo-v2
    python sample.py --prompts VBench_full_info.json --model vc2 --out clips/  # VBench's PROMPT-i.mp4
    python sample.py --prompts - --model vc2                                   # a clip per line that is typed
"""
from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import shapes
from plumbing import cli, prompts
from plumbing.cli import Count, NotNegative, Seed, Share, Within
from plumbing.files import read_header
from shapes import grammar

if TYPE_CHECKING:                       # imported where they are needed: --help and mistakes answer at once
    from torch import Tensor

    from model import Models
    from plumbing.dryrun import CountedParts
    from solver import Sampling
    from turbo import Reference

Dtype = Literal["float32", "bfloat16", "float16"]
SUFFIXES = (".mp4", ".gif", ".png", ".safetensors")


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    prompt: str = ""                    # what the clip shows
    model: Literal["shapes", "vc2", "ms"] | None = None  # toy, VideoCrafter2, ModelScope [--turbo's; shapes]
    method: Literal["turbo", "vcm", "teacher"] = "turbo"  # a student, one without rewards, the teacher's DDIM
    steps: Annotated[int, Within(1, 1000)] | None = None  # network passes [turbo: 4; v2: 16; teacher: 50]
    timesteps: str | None = None        # of students' steps [shapes: 999,624,499,374, else evenly spaced]
    guidance: NotNegative | None = None  # ω, 0 = none [students: 7.5; teachers: vc2 11, ms 8; shapes: 2]
    motion: NotNegative | None = None   # λ', told to a T2V-Turbo-v2 with motion guidance [as trained: 0.05]
    motion_share: Share | None = None   # τ: λ' is told at t >= 1000 (1 - τ), and 0 below [as trained: 0.5]
    lora_scale: NotNegative | None = None  # strength of a student's LoRA, 0: its teacher [1, as trained]
    eta: Share | None = None            # teacher: share of fresh noise per step, 0 = none [vc2: 1, else 0]
    motion_from: str | None = None      # teacher: a clip whose motion the new one takes, without training
    motion_prompt: str | None = None    # what the clip of --motion-from shows
    seed: Seed = 0                      # of the first clip of each prompt; clip i has seed + i
    num: Annotated[int, Within(1, 10_000)] | None = None  # per prompt [1; VBench: 5, temporal_flickering: 25]
    frames: Annotated[int, Within(1, 256)] | None = None  # [as trained: shapes 8, else 16]
    height: Annotated[int, Within(1, 4096)] | None = None  # pixels [as trained: shapes 64, vc2 320, ms 256]
    width: Annotated[int, Within(1, 4096)] | None = None  # pixels [as trained: shapes 64, vc2 512, ms 256]
    fps: Annotated[int, Within(1, 240)] | None = None  # of the file; vc2 is told [8; vc2: 16, teacher: 28]
    teacher: str | None = None          # model.ckpt (vc2), folder (ms, shapes) [downloaded; shapes: embedded]
    turbo: str | None = None            # turbo.safetensors, t2v_turbo_vc2.pt, unet_lora.pt, unet_mg.pt [same]
    prompts: str | None = None          # .txt, one per line; VBench's .json; -: typed; skips what is there
    out: str | None = None              # .mp4, .gif, .png, .safetensors, or folder for PROMPT-i.mp4 [out.mp4]
    sheet: str | None = None            # .png with a row per clip, its frames from left to right
    latents: str | None = None          # .safetensors, key latents: final ones, (B, 4, T, H/8, W/8) float32
    batch: Count | None = None          # clips at once [shapes: 16, else 1]
    chunk: Count | None = None          # frames that the VAE decodes at once [shapes: all, else 4]
    device: str = ""                    # cuda, cuda:1, cpu, mps [cuda if there]
    dtype: Dtype | None = None          # of the networks [GPU: bfloat16, before Ampere float16; else float32]
    compile: bool = False               # torch.compile the UNet's layers: a slow first step, then faster
    dry_run: bool = False               # vc2, ms: print what a clip would take; nothing is downloaded


# ---- checks that need no network ---------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises ValueError for what cannot be made or cannot take effect, before anything is loaded."""
    if bool(config.prompt.strip()) == bool(config.prompts):
        raise ValueError("give one prompt, or --prompts FILE; e.g. sample.py \"a red circle moving right\"")
    if config.model == "shapes" and config.turbo and not config.turbo.endswith(".safetensors"):
        raise ValueError(f"{config.turbo} is no file of the toy; say whose it is: --model vc2 or --model ms")
    if config.model != "shapes" and config.method == "vcm" and not config.turbo:
        raise ValueError(f"there are no public VCM weights for {config.model}; give your own: --turbo FILE")
    check_suffixes(config)
    check_effects(config)
    check_timesteps(config)


def check_effects(config: Config) -> None:
    """An option that cannot take effect is a mistake."""
    teacher, follows = config.method == "teacher", config.motion_from is not None
    of_v2 = "a student of T2V-Turbo-v2; name its file with --turbo"
    without_effect = [                  # (where, options, what they belong to)
        (not teacher, ["eta", "motion_from", "motion_prompt"], "--method teacher"),
        (teacher, ["timesteps", "turbo", "lora_scale"], "students, not to --method teacher"),
        (teacher and not follows, ["motion", "motion_share"], "students, or to --motion-from"),
        (not teacher and not config.turbo, ["motion", "motion_share"], of_v2),
        (config.prompts == "-", ["sheet", "latents", "batch"], "a known number of clips, not to --prompts -"),
        (config.model != "vc2" and suffix_of(config.out) == ".png", ["fps"], "clips that play, not pictures"),
    ]
    for holds, options, owner in without_effect:
        for option in options if holds else []:
            if getattr(config, option) is not None:
                raise ValueError(f"{cli.flag_of(option)} belongs to {owner}")
    if follows != bool(config.motion_prompt):
        raise ValueError("--motion-from CLIP and --motion-prompt \"what it shows\" belong together")


def check_timesteps(config: Config) -> None:
    """Raises ValueError unless --timesteps falls from 999 or less to 1 or more, and is as long as --steps."""
    if config.timesteps is None:
        return
    try:
        times = timesteps_of(config)
    except ValueError:
        times = ()
    if not times or list(times) != sorted(set(times), reverse=True) or times[0] > 999 or times[-1] < 1:
        raise ValueError(f"--timesteps {config.timesteps:.60}: give falling whole numbers from 999 to 1, "
                         "with commas between; e.g. 999,624,499,374")
    if config.steps not in (None, len(times)):
        raise ValueError(f"--timesteps has {len(times)} steps, --steps says {config.steps}; leave one out")


def timesteps_of(config: Config) -> tuple[int, ...]:
    """The numbers of --timesteps, none without it. Raises ValueError where something else is in it."""
    return tuple(map(int, config.timesteps.split(","))) if config.timesteps is not None else ()


def suffix_of(path: str | None) -> str:
    """.mp4 of x.MP4, nothing of a folder."""
    return Path(path or "").suffix.lower()


def check_suffixes(config: Config) -> None:
    """Files to write say by their names what they are. Raises ValueError."""
    for option in ("teacher", "turbo", "prompts", "out", "sheet", "latents"):
        if getattr(config, option) == "":
            raise ValueError(f"--{option} is empty; name a file, or leave it out")
    out = suffix_of(config.out)
    if Path(config.out or "").name.lower() in SUFFIXES:
        raise ValueError(f"--out {config.out}: a suffix without a name; try --out clip{config.out}")
    if out and config.prompts:
        raise ValueError(f"--prompts writes many files; --out {config.out} should be a folder, no suffix")
    if out and out not in SUFFIXES:
        raise ValueError(f"--out {config.out}: choose {', '.join(SUFFIXES)}, or a folder, without a suffix")
    for option, suffix in (("sheet", ".png"), ("latents", ".safetensors")):
        path = getattr(config, option)
        if path and suffix_of(path) != suffix:
            raise ValueError(f"--{option} {path}: its name must end in {suffix}")


def model_of(config: Config) -> str:
    """The family: as typed, else what our own student's file says, else the toy."""
    ours = suffix_of(config.turbo) == ".safetensors" and config.method != "teacher"
    said = read_header(config.turbo).get("model") if ours else None
    if said and config.model and said != config.model:
        raise ValueError(f"{config.turbo} is a student of {said}, not of {config.model}; use --model {said}")
    return config.model or said or "shapes"


def check_words(prompt: str) -> None:
    """Raises ValueError where the toy does not understand a prompt."""
    try:
        grammar.understand(prompt)
    except ValueError as error:
        raise ValueError(f"{error}. For anything else there are the real models: "
                         "--model vc2, --model ms") from error


def plan_clips(config: Config) -> list[prompts.Job]:
    """All clips of a command line; each of torchrun's processes gets its share. Raises ValueError."""
    known = prompts.read_prompts(config.prompts) if config.prompts else {config.prompt: 1}
    if config.model == "shapes":
        for prompt in known:
            check_words(prompt)
    counts = {prompt: config.num or usual for prompt, usual in known.items()}
    out = Path(config.out or ("clips" if config.prompts else "out.mp4"))
    jobs = prompts.plan(counts, out, config.seed)
    if max(job.seed for job in jobs) >= 2 ** 32:
        raise ValueError(f"--seed {config.seed}: the last clip's is beyond 2**32 - 1, torch's last")

    # where they go
    others = {f"--{name}": Path(path) for name in ("sheet", "latents") if (path := getattr(config, name))}
    prompts.check_names(jobs)
    prompts.check_places(jobs, others)
    if config.prompts:
        prompts.check_folder(out, others)

    # what is left to do, and whose it is
    rank, world, _ = cli.place()
    if world > 1 and others:
        raise ValueError(f"{next(iter(others))} holds the clips of one process; run without torchrun")
    resume = config.prompts and not others          # a sheet, or latents, are of all clips
    return [job for job in jobs[rank::world] if not (resume and job.path.exists())]


# ---- making clips ------------------------------------------------------------------------------------------


def check_clips(config: Config, jobs: list[prompts.Job]) -> None:
    """Raises ValueError for sizes that the networks cannot make, or files that cannot hold the clips."""
    from model import FAMILIES, check_size
    from plumbing import video
    if config.motion_from is not None and not Path(config.motion_from).exists():
        raise ValueError(f"--motion-from {config.motion_from}: no such file")
    family = FAMILIES.get(config.model) or shapes.FAMILY
    check_size(family, height=config.height, width=config.width)
    for job in jobs[:1]:
        video.check_output(job.path, config.fps or family.fps)

    # room on the disk for all of it
    T, H, W = config.frames or family.frames, config.height or family.height, config.width or family.width
    raw, latent_pixels = 3 * T * H * W, T * (H // family.vae.factor) * (W // family.vae.factor)
    packed = {".safetensors": 1, ".png": 0.7, ".gif": 0.3}.get(suffix_of(config.out), 0.05)     # mp4: 5 %
    sizes = [(job.path, raw * packed) for job in jobs]
    if config.sheet:
        sizes.append((Path(config.sheet), raw * len(jobs) * 0.7))
    if config.latents:
        sizes.append((Path(config.latents), 4 * family.vae.latent * latent_pixels * len(jobs)))   # float32
    prompts.check_space(sizes)


def load_models(config: Config) -> Models:
    """The networks that a command line asks for, on its device."""
    import torch

    import model
    from plumbing.run import has_bfloat16, pick_device
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", cli.place()[2])
    usual = "float32"
    if device.type == "cuda":
        usual = "bfloat16" if has_bfloat16(device) else "float16"
    dtype = getattr(torch, config.dtype or usual)
    scale = 1.0 if config.lora_scale is None else config.lora_scale

    name, student = model_of(config), None if config.method == "teacher" else config.turbo or config.method
    if name == "shapes":
        models = shapes.load(student, config.teacher, device, dtype, scale)
    else:
        student = f"{name}-turbo" if student == "turbo" else student                  # the released one
        models = model.load(name, config.teacher, student, device, dtype, scale)
    if config.compile:
        model.compile_layers(models.unet)
    return models


def sampling_of(models: Models, config: Config) -> Sampling:
    """The networks' own way of sampling, and over it what was typed. Raises ValueError."""
    takes = models.unet.config
    follows = config.motion_from is not None
    if not takes.motion and not follows and (config.motion, config.motion_share) != (None, None):
        raise ValueError(f"--motion belongs to T2V-Turbo-v2 with motion guidance; {config.turbo} has none")
    names = ["steps", "guidance", "eta", "motion", "motion_share"] + (["fps"] if takes.fps else [])
    typed = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if timesteps := timesteps_of(config):
        typed |= dict(timesteps=timesteps, steps=len(timesteps))
    elif config.steps is not None:
        typed["timesteps"] = ()                                             # evenly spaced
    default = {"motion": 0.05} if follows else {}                           # v2's λ'
    sampling = replace(models.sampling, **default | typed)

    w_min, w_max = models.header.get("w_min", 0), models.header.get("w_max", float("inf"))
    if not w_min <= sampling.guidance <= w_max:
        print(f"--guidance {sampling.guidance:g}: this student was trained with {w_min:g} to {w_max:g}",
              file=sys.stderr)
    return sampling


def size_of(models: Models, config: Config) -> tuple[int, int, int]:
    """Frames, height and width of the clips."""
    T, H, W = models.size
    return config.frames or T, config.height or H, config.width or W


def reference_of(models: Models, config: Config) -> Reference | None:
    """The clip of --motion-from in latents, at the size and frame rate of the new ones, and its caption."""
    if config.motion_from is None:
        return None
    from plumbing import video
    from turbo import Reference
    T, H, W = size_of(models, config)
    clip, _ = video.read_video(config.motion_from, T, config.fps or models.fps, H, W)
    models.unet.checkpointing = True                        # the gradient of the energy needs all activations
    weight = next(models.vae.parameters())
    z0 = models.vae.encode(clip[None].to(weight.device, weight.dtype) / 127.5 - 1)
    return Reference(z0.float(), models.text([config.motion_prompt]))


def make(models: Models, sampling: Sampling, jobs: list[prompts.Job], config: Config
         ) -> tuple[Tensor, Tensor]:
    """Makes some clips at once -> latents (B, C, T, h, w), clips uint8 (B, 3, T, H, W)."""
    from tqdm import tqdm

    import turbo
    from model import to_clip
    captions, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    steps = partial(tqdm, desc="steps", leave=False)
    reference = reference_of(models, config)
    z = turbo.generate(models, captions, seeds, size_of(models, config), sampling, steps, reference)

    frames_at_once = config.chunk or (None if models.name == "shapes" else 4)
    return z.cpu(), to_clip(models.vae, z, frames_at_once).cpu()


def writers(models: Models, jobs: list[prompts.Job], clips: Tensor, config: Config) -> dict:
    """{path: what writes a clip there}"""
    from plumbing import video
    fps = config.fps or models.fps
    return {job.path: partial(video.write_video, clip=clip, fps=fps) for job, clip in zip(jobs, clips)}


def make_all(models: Models, sampling: Sampling, jobs: list[prompts.Job], config: Config) -> None:
    """All clips in batches; then the sheet and the latents, where they are asked for."""
    from tqdm import tqdm
    batch = config.batch or (16 if models.name == "shapes" else 1)
    latents, clips, began = [], [], time.perf_counter()
    for start in tqdm(range(0, len(jobs), batch), "clips", unit_scale=batch, disable=len(jobs) <= batch):
        some_jobs = jobs[start:start + batch]
        z, some = make(models, sampling, some_jobs, config)
        latents += [z] if config.latents else []
        clips += [*some] if config.sheet else []

        files = writers(models, some_jobs, some, config)
        if start + batch >= len(jobs):                      # the last ones: what holds all of them, too
            files |= {Path(config.sheet): partial(write_sheet, clips=clips)} if config.sheet else {}
            files |= {Path(config.latents): partial(write_latents, latents=latents)} if config.latents else {}
        prompts.write_all(files)
    seconds = time.perf_counter() - began

    names = ", ".join(str(job.path) for job in jobs[:3]) + (f" and {len(jobs) - 3} more" if jobs[3:] else "")
    print(f"{names}: {len(jobs)} clip{'s' * (len(jobs) > 1)} in {seconds:.2f} s")


def make_typed(models: Models, sampling: Sampling, config: Config) -> int:
    """A clip, or --num of them, per line of standard input, at once -> how many lines were wrong."""
    out, known, wrong = Path(config.out or "clips"), [], 0
    for line in sys.stdin:
        prompt = line.strip()
        try:
            jobs = prompts.plan({prompt: config.num or 1}, out, config.seed) if prompt else []
            if config.model == "shapes" and prompt:
                check_words(prompt)
            prompts.check_names(known + jobs)
            for job in jobs:
                _, clips = make(models, sampling, [job], config)
                prompts.write_all(writers(models, [job], clips, config))
                print(job.path, flush=True)
            known += jobs
        except ValueError as error:
            print(f"sample.py: {error}", file=sys.stderr, flush=True)
            wrong += 1
    return wrong


def write_sheet(path: Path, clips: list[Tensor]) -> None:
    """One picture: a row per clip, its frames from left to right, small ones enlarged."""
    import torch
    from PIL import Image

    from plumbing.files import atomic
    rows = [torch.cat([*clip.unbind(1)], 2) for clip in clips]                      # each (3, H, T*W)
    picture = torch.cat(rows, 1)                                                    # (3, B*H, T*W)
    zoom = max(1, 64 // clips[0].shape[2])
    picture = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    with atomic(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(temporary, format="png")


def write_latents(path: Path, latents: list[Tensor]) -> None:
    """Key `latents`, (B, C, T, h, w) float32."""
    import torch
    from safetensors.torch import save_file

    from plumbing.files import atomic
    with atomic(path) as temporary:
        save_file({"latents": torch.cat(latents)}, temporary)


# ---- what a clip costs -------------------------------------------------------------------------------------


def budget(config: Config) -> CountedParts:
    """--dry-run: FLOP, bytes moved and memory of a clip, without the networks' files."""
    if config.model == "shapes":
        raise ValueError("--dry-run: the toy's clip takes seconds; this is for --model vc2 and --model ms")
    import model
    import turbo
    from plumbing import dryrun
    from solver import Schedule
    family, dtype = model.FAMILIES[config.model], config.dtype or "bfloat16"
    student = config.method != "teacher"

    def networks() -> Models:
        import torch
        with dryrun.build("cpu", getattr(torch, dtype)):
            unet = model.UNet3D(replace(family.unet, guidance=student)).eval()
            vae, text = model.VAE(family.vae), model.TextEncoder(family.text)
        header = model.complete(model.RELEASED["LoRA list"], family) if student else {}
        return model.Models(config.model, unet, vae, text, family, header)

    def captions(models: Models, made: dict) -> Tensor:
        return models.text([config.prompt or "a prompt"] * (config.batch or 1))

    def step(models: Models, made: dict) -> Tensor:
        import torch
        (T, H, W), c = size_of(models, config), made["captions"]
        z = torch.zeros(len(c), family.vae.latent, T, H // family.vae.factor, W // family.vae.factor)
        t, sampling = torch.full((len(c),), 999), sampling_of(models, config)
        if student:
            return turbo.student_f(models.unet, Schedule(sampling.grid), c, sampling)(z, t)
        return turbo.guided_eps(models.unet, c, c, sampling)(z, t)

    def decode(models: Models, made: dict) -> Tensor:
        return model.to_clip(models.vae, made["one step"], config.chunk or 4)

    usual = family.sampling["turbo" if student else "teacher"]
    T, H, W = config.frames or family.frames, config.height or family.height, config.width or family.width
    steps = len(timesteps_of(config)) or config.steps or usual.steps
    title = f"{config.model} {config.method}, {config.batch or 1} x {W}x{H}, {T} frames, {steps} steps"
    work = {"captions": captions, "one step": step, "decode": decode}
    work = {name: dryrun.Work(do, steps if name == "one step" else 1) for name, do in work.items()}
    return dryrun.report_clip(title, networks, dtype, work)


# ---- the command -------------------------------------------------------------------------------------------


@cli.main
def main(argv=None):
    """Prompts -> clips in files; and, if asked for, a sheet of them and their latents."""
    config = cli.parse(Config, argv, __doc__, positional="prompt")
    config = replace(config, model=model_of(config))
    check(config)
    if config.dry_run:
        return budget(config)
    interactive = config.prompts == "-"
    jobs = [] if interactive else plan_clips(config)
    if not jobs and not interactive:
        return print("nothing to do: all clips are there")

    check_clips(config, jobs)
    models = load_models(config)
    sampling = sampling_of(models, config)
    if not interactive:
        make_all(models, sampling, jobs, config)
    elif make_typed(models, sampling, config):
        sys.exit(2)


if __name__ == "__main__":
    main()
