"""Text to video in a few steps.

    python sample.py "a red circle rising and a blue square falling on white"  # the toy, nothing downloaded
    python sample.py "a red ring moving left" --best-of 16 --sheet sheet.png   # the best of 16 by two rewards
    python sample.py "An astronaut riding a horse." --model vc2                # T2V-Turbo, downloaded once
    python sample.py "An astronaut riding a horse." --model vc2 --turbo vc2-turbo-v2           # T2V-Turbo-v2
    python sample.py "A corgi and a cat." --model vc2 --refine 15 --reward hpsv2 --reward viclip=FILE:0.5
    python sample.py --prompts VBench_full_info.json --model vc2 --out clips/  # VBench's PROMPT-i.mp4
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import shapes
from plumbing import cli
from plumbing.cli import Count, File, Seed, Within
from plumbing.errors import UserError, reading
from plumbing.files import MARK, atomic, check_outputs, check_writable, read_header
from shapes import grammar

if TYPE_CHECKING:                       # imported where they are needed: --help and mistakes answer at once
    from torch import Tensor

    from model import Models
    from solver import Sampling
    from turbo import Reference, RewardTerm

SUFFIXES = (".mp4", ".gif", ".png")     # of clips
COLUMNS = ("prompt_en", "prompt", "caption", "text")        # of lists of prompts; the first that is there
VBENCH_CLIPS = {"temporal_flickering": 25, "Diversity": 20}  # of a prompt of VBench, of VBench-2.0; else 5, 3
FORBIDDEN = r"[/\r\n\t]" if os.name != "nt" else r'[<>:"/\\|?*\x00-\x1f]'      # in files' names
NAME_BYTES = 240                        # of a name; file systems take 255, and -24.mp4 comes behind it

Number = Annotated[int, Within(1, 1000)]
Pixels = Annotated[int, Within(1, 4096)]
Strength = Annotated[float, Within(0, 100)]


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    # ---- what
    prompt: str = ""                    # what the clip shows
    prompts: File | None = None         # list: .txt, .csv, .tsv, .json, .jsonl; clips that exist are skipped
    num: Number | None = None           # clips of each prompt [1; of VBench's lists as VBench has it]
    seed: Seed = 0                      # of each prompt's first clip; clip i has seed + i (--best-of: + i N)
    as_typed: bool = False              # shapes: the prompt as it is; else what it leaves unsaid is drawn

    # ---- which model
    model: Literal["shapes", "shapes-motion", "vc2", "ms"] | None = None  # whose networks [--turbo's; shapes]
    method: Literal["turbo", "vcm", "teacher"] = "turbo"  # a student, one without rewards, the teacher's DDIM
    teacher: File | None = None         # weights: model.ckpt or a folder [downloaded; shapes: embedded]
    turbo: File | None = None           # a student: FILE, vc2-turbo-v2, vc2-turbo-lora, ... [as --teacher]
    lora_scale: Strength | None = None  # strength of the student's LoRA; 0: its teacher [1, as trained]
    vae: File | None = None             # vc2, ms: a small decoder's weights (TAESD) in place of the VAE's own

    # ---- how
    steps: Number | None = None         # of sampling [students 4, v2 16; teachers 50, with --motion-from 200]
    guidance: Strength | None = None    # ω, 0 = none [students: 7.5; teachers: vc2 11, ms 8; shapes: 2]
    motion: Annotated[float, Within(0, 1000)] | None = None  # λ' of guidance [v2: 0.05; --motion-from: 1]
    motion_from: File | None = None     # teacher: a clip whose motion the new one takes, without training
    motion_prompt: str | None = None    # what the clip of --motion-from shows
    frames: Annotated[int, Within(1, 256)] | None = None  # of a clip [as trained: shapes 8, else 16]
    height: Pixels | None = None        # height of the clip in pixels [as trained: toy 64, vc2 320, ms 256]
    width: Pixels | None = None         # width of the clip in pixels [as trained: toy 64, vc2 512, ms 256]
    fps: Annotated[int, Within(1, 240)] | None = None  # frames a second [vc2 16, its teacher 28; else 8]

    # ---- rewards at test time
    best_of: Number | None = None       # takes of each clip, by seed; the one with the highest reward is kept
    refine: Number | None = None        # steps in which a student's noises climb the rewards
    reward: tuple[str, ...] = ()        # NAME[=FILE][:WEIGHT], repeatable [shapes: its two; image 1, video 2]

    # ---- output and machine
    out: File | None = None             # .mp4, .gif, .png (lossless); of a list a folder [out.mp4, clips]
    sheet: File | None = None           # .png of all frames, a row per clip; of --best-of in order of rewards
    batch: Count | None = None          # clips at once [shapes: 16, else 1]
    device: str = ""                    # cuda, cuda:1, xpu, mps, cpu [cuda if there]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of networks [GPU: half, else float32]

    @property
    def is_toy(self) -> bool:
        return (self.model or "").startswith("shapes")


# ---- mistakes, found before torch is imported --------------------------------------------------------------

def model_of(config: Config) -> str:
    """The family: as typed, else what the student's own file says, else the toy."""
    if config.model or not config.turbo:
        return config.model or "shapes"
    place = Path(config.turbo)
    file = place / "turbo.safetensors" if place.is_dir() else place
    stated = read_header(file).get("model") if file.is_file() else None
    if not stated:
        raise UserError(f"{place} is not there, or does not say whose student it is; add --model vc2 or ms")
    return stated


def check(config: Config) -> None:
    """Raises UserError for options that do not belong together, for files that are not there, and for names
    that say nothing."""
    if bool(config.prompt.strip()) == bool(config.prompts):
        raise UserError("give one prompt, or --prompts FILE; e.g. sample.py \"a red circle moving right\"")
    teacher, toy = config.method == "teacher", config.is_toy
    embedded = {"shapes": ("turbo", "vcm"), "shapes-motion": ()}.get(config.model, ("turbo",))
    belongs = [                         # options, do they take effect, what they belong to
        ("turbo lora_scale refine", not teacher, "students, not to --method teacher"),
        ("motion_from motion_prompt", teacher and config.motion_from and config.motion_prompt,
         "--method teacher, and each to the other"),
        ("motion", config.turbo or config.motion_from, "a T2V-Turbo-v2 (--turbo FILE), or to --motion-from"),
        ("reward", config.best_of or config.refine, "--best-of or --refine"),
        ("best_of refine", toy or config.reward, "--reward NAME, e.g. --reward hpsv2"),
        ("as_typed", toy, "--model shapes"),
        ("vae", not toy, "--model vc2 or ms"),
        ("method", teacher or config.turbo or config.method in embedded,
         f"--turbo FILE, as {config.model} comes without such a student; or try --method teacher"),
    ]
    for options, effective, owner in belongs:
        for option in options.split():
            if getattr(config, option) not in (None, False, ()) and not effective:
                raise UserError(f"{cli.flag_of(option)} belongs to {owner}")

    reward_files = {}
    if config.reward:
        import rewards
        reward_files = {name: path for name, path, _ in map(rewards.parse_spec, config.reward)}
        if len(reward_files) < len(config.reward):
            raise UserError(f"--reward {' '.join(config.reward)}: give each reward once")
    for path in (config.teacher, config.motion_from, config.vae, *reward_files.values()):
        if path and not Path(path).expanduser().exists():
            raise UserError(f"{path}: no such file or folder")

    out = Path(config.out or "")
    clip, other = out.suffix.lower() in SUFFIXES, out.suffix[1:2].isalpha()     # v2.0 is a folder
    if (clip if config.prompts else other and not clip) or out.name.lower() in SUFFIXES:
        raise UserError(f"--out {out}: choose a folder's name, or for one prompt one that ends in "
                        f"{', '.join(SUFFIXES)}")
    if config.sheet and Path(config.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet {config.sheet}: its name must end in .png")
    if config.sheet and cli.place()[1] > 1:
        raise UserError("--sheet shows the clips of one process; run without torchrun")


# ---- the plan: prompts, and the files of their clips -------------------------------------------------------

class Prompt(NamedTuple):
    """A row of a list."""
    text: str
    name: str                           # of its files, without -NUMBER.mp4
    count: int = 1                      # clips, unless --num says otherwise


class Job(NamedTuple):
    """One clip to make."""
    prompt: str
    seed: int
    path: Path
    scores: Path                        # .json beside a file; of a folder, which VBench reads, FOLDER-scores


def read_prompts(path: str) -> list[Prompt]:
    """Text, a prompt per line; .csv and .tsv with a header; .json and .jsonl of strings or of objects with
    one of COLUMNS, perhaps `name`, and `dimension` of VBench's lists, which tells how many clips are made."""
    from plumbing.manifests import MANIFESTS, records_of
    with reading(path, "a list of prompts in utf-8"), open(path, newline="", encoding="utf-8-sig") as file:
        is_text = Path(path).suffix.lower() in ("", ".txt")
        if not is_text and not path.lower().endswith(MANIFESTS):
            raise ValueError("its name must end in .txt, " + ", ".join(MANIFESTS))
        rows = [line for line in file if line.strip()] if is_text else records_of(path, file)[0]
        if isinstance(rows, dict | str):
            raise ValueError("it holds no list")
        rows = list(rows)
        json.dumps(rows, ensure_ascii=False).encode()       # raises for halves of characters

    prompts: dict[tuple, Prompt] = {}                       # a prompt of several dimensions of VBench is one
    for number, row in enumerate(rows, 1):
        place, row = f"{path}, entry {number}", {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or None in row:        # DictReader's key of surplus fields
            raise UserError(f"{place}: neither a text nor a row of the header's columns; quote commas")
        row = {key.strip().lower(): value for key, value in row.items()}
        text = next((row[column] for column in COLUMNS if row.get(column)), None)
        if not isinstance(text, str) or not text.strip() or "\0" in f"{text}{row.get('name')}":
            raise UserError(f"{place}: no prompt in any of {', '.join(COLUMNS)}; it has {', '.join(row):.80}")

        name, dimensions, count = row.get("name"), row.get("dimension"), 1
        name = text if name in (None, "") else str(name)
        if dimensions and isinstance(dimensions, list):
            second = dimensions[0][:1].isupper()            # VBench-2.0 writes Camera_Motion, and cuts names
            name = name[:180] if second else name
            count = max(VBENCH_CLIPS.get(dimension, 3 if second else 5) for dimension in dimensions)
        prompt = Prompt(text.strip(), file_name(name.strip()), count)
        prompts[prompt[:2]] = max(prompt, prompts.get(prompt[:2], prompt))
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    if len(prompts) < len(rows):
        print(f"{path}: {len(rows)} entries, {len(prompts)} different prompts", file=sys.stderr)
    return list(prompts.values())


def file_name(text: str) -> str:
    """The text as a file's name; one that is too long is cut, and its hash keeps it apart from others."""
    name = re.sub(FORBIDDEN, " ", text)
    if len(os.fsencode(name)) <= NAME_BYTES:
        return name
    start = os.fsencode(name)[:NAME_BYTES - 9].decode(errors="ignore")
    return f"{start} {hashlib.sha256(os.fsencode(text)).hexdigest()[:8]}"


def jobs_of(prompts: list[Prompt], out: Path, config: Config) -> list[Job]:
    """All clips, in order. Their files are OUT, or OUT-0, OUT-1, ...; in a folder VBench's PROMPT-i.mp4.
    Raises UserError where two prompts would share a file."""
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    other_case = place.parent / place.name.swapcase()
    ignores_case = other_case != place and other_case.exists() and other_case.samefile(place)
    jobs, owners = [], {}
    for prompt in prompts:
        owner = owners.setdefault(prompt.name.casefold() if ignores_case else prompt.name, prompt)
        if owner != prompt:
            raise UserError(f"the prompts {owner.text!r:.80} and {prompt.text!r:.80} would both be written "
                            f"to {out / prompt.name}-0.mp4; reword one, or give it a name of its own")

        count = config.num or prompt.count
        for i in range(count):
            path, scores = out / f"{prompt.name}-{i}.mp4", Path(f"{out}-scores", f"{prompt.name}-{i}.json")
            if out.suffix.lower() in SUFFIXES:
                path = out if count == 1 else out.with_stem(f"{out.stem}-{i}")
                scores = path.with_suffix(".json")
            jobs.append(Job(prompt.text, config.seed + i * (config.best_of or 1), path, scores))

    names = [prompt.name for prompt in prompts if prompt.name != prompt.text.replace("/", " ")]
    if names and jobs[0].path.parent == out:
        print(f"{len(names)} prompts do not name their files: see e.g. {names[0]}-0.mp4", file=sys.stderr)
    return jobs


def plan_clips(config: Config) -> list[Job]:
    """All clips of a command line that are not made yet; each of torchrun's processes gets its own. Raises
    UserError for prompts that the toy does not understand, and for places where something would be lost."""
    one = Prompt(config.prompt, file_name(config.prompt))
    prompts = read_prompts(config.prompts) if config.prompts else [one]
    for prompt in prompts if config.is_toy else ():
        grammar.understand(prompt.text)
    out = Path(config.out or ("clips" if config.prompts else "out.mp4"))
    jobs = jobs_of(prompts, out, config)

    # no file is lost, and all can be written
    places = [job.path.with_suffix("") if job.path.suffix.lower() == ".png" else job.path for job in jobs]
    places += [job.scores for job in jobs] if config.best_of or config.refine else []
    inputs = {cli.flag_of(name): getattr(config, name)
              for name in ("prompts", "teacher", "turbo", "motion_from", "vae")}
    check_outputs({"--out": [out, *places], "--sheet": config.sheet}, inputs)
    for folder in {path.parent for path in [*places, Path(config.sheet or places[0])]}:
        check_writable(folder)

    # this process's own, and what is left to do; a sheet is of all clips
    rank, world_size, _ = cli.place()
    again = config.sheet or not config.prompts
    own = jobs[rank::world_size]
    missing = [job for job in own if again or not job.path.exists()]
    if len(missing) < len(own):
        print(f"{len(own) - len(missing)} clips are there already, and stay", file=sys.stderr)
    return missing


# ---- load --------------------------------------------------------------------------------------------------

def load_models(config: Config) -> Models:
    """The networks that a command line asks for, on its device, frozen. Raises UserError for other sizes."""
    import torch

    import model
    from networks.vae import load_tiny_decoder
    from plumbing.run import pick_device
    family = (shapes.FAMILIES if config.is_toy else model.FAMILIES)[config.model]
    model.check_size(family, height=config.height, width=config.width)
    device, dtype = pick_device(config.device), config.dtype or "float32"
    if device.type in ("cuda", "xpu") and not config.dtype:
        since_ampere = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if since_ampere else "float16"

    student = None if config.method == "teacher" else config.turbo or config.method
    where = (device, getattr(torch, dtype), 1.0 if config.lora_scale is None else config.lora_scale)
    if config.is_toy:
        student = Path(config.turbo) if config.turbo else student
        models = shapes.load(student, config.teacher, *where, config.model)
    else:
        student = f"{config.model}-turbo" if student == "turbo" else student            # the released one
        models = model.load(config.model, config.teacher, student, *where)
    if config.vae:
        models.vae.decode = load_tiny_decoder(config.vae, *where[:2]).decode
    models.unet.requires_grad_(False)
    models.unet.checkpointing = not config.is_toy       # for the gradients of --refine and --motion-from
    return models


def load_rewards(config: Config, models: Models) -> list[RewardTerm]:
    """What --reward names, for --best-of and --refine; the toy's own two by default."""
    if not (config.best_of or config.refine):
        return []
    import rewards
    from turbo import RewardTerm
    device, T = next(models.unet.parameters()).device, size_of(models, config)[0]
    terms = []
    for name, path, weight in map(rewards.parse_spec, config.reward or ("shapes-clip", "shapes-viclip")):
        reward = shapes.reward(name, path, device, config.teacher, grad_checkpointing=bool(config.refine))
        if reward.frames and reward.frames > T:
            raise UserError(f"--reward {name} looks at {reward.frames} frames, the clips have {T}")
        video = reward.kind == "video"
        weight = (2.0 if video else 1.0) if weight is None else weight          # β of the papers
        terms.append(RewardTerm(reward, weight, reward.frames or min(T, 8 if video else 6), video, name))
    return terms


def sampling_of(models: Models, config: Config) -> Sampling:
    """The networks' own way of sampling, and over it what was typed. Raises UserError."""
    conditions = models.unet.config
    if config.motion is not None and not conditions.motion and not config.motion_from:
        raise UserError(f"--motion belongs to T2V-Turbo-v2 with motion guidance; {config.turbo} has none")
    names = ["steps", "guidance", "motion"] + ["fps"] * conditions.fps
    typed = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    default = dict(motion=1.0, motion_share=0.6) if config.motion_from else {}
    if config.motion_from and not config.is_toy:     # as the released motion_prior_sample.py
        default |= dict(steps=200, guidance=7.5, eta=0.0)
    sampling = replace(models.sampling, **default | typed)

    on_grid = sampling.on_grid or sampling.method == "student"
    if on_grid and sampling.steps > sampling.grid:
        raise UserError(f"--steps {sampling.steps}: this model walks on a grid of {sampling.grid}, at most")
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
    from model import to_latents
    from plumbing import video
    from turbo import Reference
    T, H, W = size_of(models, config)
    with reading(config.motion_from, "a video"):
        clip, rate = video.read_video(config.motion_from, T, config.fps or models.fps, H, W)
    if rate > (config.fps or models.fps):
        print(f"{config.motion_from} is shorter than the new clip: its motion is slowed", file=sys.stderr)
    return Reference(to_latents(models.vae, clip[None]), models.text([config.motion_prompt]))


# ---- make: noise, latents, pixels, scores, files -----------------------------------------------------------

class Take(NamedTuple):
    """A clip; of the --best-of N takes of a job the best is written."""
    seed: int
    clip: Tensor                        # uint8 (3, T, H, W)
    scores: dict                        # of each reward; their weighted "total"; "climb" of --refine's steps


def caption_of(prompt: str, seed: int, config: Config) -> str:
    """What the networks are told: the toy's captions say what a prompt leaves unsaid."""
    return grammar.fill_in(prompt, seed) if config.is_toy and not config.as_typed else prompt


def make(captions: list[str], seeds: list[int], models: Models, terms: list[RewardTerm], sampling: Sampling,
         config: Config, reference: Reference | None = None, watch: Callable | None = None) -> list[Take]:
    """Makes some clips at once. watch: see `turbo.generate`."""
    import torch
    from tqdm import tqdm

    import turbo
    from model import to_clip
    from rewards import frames_for
    common = (models, captions, seeds, size_of(models, config), sampling)
    steps, climb = partial(tqdm, leave=False), []           # climb: R (B,) in each step of --refine
    if config.refine:
        chunk = 0 if config.is_toy else 1
        z, climb = turbo.generate_refined(*common, terms, config.refine, chunk, steps)
    else:
        z = turbo.generate(*common, steps, reference, watch)
    clips = to_clip(models.vae, z, None if config.is_toy else 4).cpu()

    with torch.no_grad():
        rewards = [term.reward(frames_for(term.reward, clips), captions).tolist() for term in terms]
    takes = []
    for i, seed in enumerate(seeds):
        scores = {term.name: of_clips[i] for term, of_clips in zip(terms, rewards)}
        total = sum(term.weight * scores[term.name] for term in terms)
        takes.append(Take(seed, clips[i], scores | dict(total=total, climb=[float(R[i]) for R in climb])))
    return takes


def make_all(jobs: list[Job], models: Models, terms: list[RewardTerm], config: Config) -> None:
    """All clips in batches; of each job's takes the best is written, and all are shown by the sheet."""
    from tqdm import tqdm
    captions = [caption_of(job.prompt, job.seed, config) for job in jobs]
    for job, caption in list(zip(jobs, captions))[:8]:
        if caption != job.prompt:
            print(f"{job.path.name}: {caption}", file=sys.stderr)

    sampling, reference = sampling_of(models, config), reference_of(models, config)
    count, batch = config.best_of or 1, config.batch or (16 if config.is_toy else 1)
    to_make = [(caption, job.seed + i) for job, caption in zip(jobs, captions) for i in range(count)]
    unwritten, takes, clips = zip(jobs, captions), [], []
    for start in tqdm(range(0, len(to_make), batch), "batches", disable=len(to_make) <= batch):
        texts, seeds = map(list, zip(*to_make[start:start + batch]))
        takes += make(texts, seeds, models, terms, sampling, config, reference)
        while len(takes) >= count:                          # all of the next job are there
            ranked, takes = sorted(takes[:count], key=lambda take: -take.scores["total"]), takes[count:]
            write(*next(unwritten), ranked, config.fps or models.fps, config)
            clips += [take.clip for take in ranked] if config.sheet else []
    if config.sheet:
        write_sheet(Path(config.sheet), clips)


def write(job: Job, caption: str, ranked: list[Take], fps: float, config: Config) -> None:
    """The best of a job's takes as a clip; with rewards, first, a line and a .json with the scores of all."""
    from tqdm import tqdm

    from plumbing import video
    if config.best_of or config.refine:
        numbers = [f"{name} {score:.4f}" for name, score in ranked[0].scores.items() if name != "climb"]
        tqdm.write(f"{job.path}: {', '.join(numbers)}, seed {ranked[0].seed}")
        with atomic(job.scores) as temporary:
            scores = [dict(seed=take.seed) | take.scores for take in ranked]
            content = dict(comment=MARK, prompt=job.prompt, caption=caption, scores=scores)
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    video.write_video(job.path, ranked[0].clip, fps)


def write_sheet(path: Path, clips: list[Tensor]) -> None:
    """One picture: a row per clip, its frames from left to right with gaps, those of the toy enlarged."""
    from PIL import Image, PngImagePlugin
    _, T, H, W = clips[0].shape
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", MARK)
    zoom, gap, border = max(1, 128 // H), 4, 12
    picture = Image.new("RGB", (2 * border + T * (W * zoom + gap) - gap,
                                border + len(clips) * (H * zoom + border)), "#3a4a66")
    for row, clip in enumerate(clips):
        for t, frame in enumerate(clip.permute(1, 2, 3, 0).numpy()):
            tile = Image.fromarray(frame).resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (border + t * (W * zoom + gap), border + row * (H * zoom + border)))
    with atomic(path) as temporary:
        picture.save(temporary, format="png", pnginfo=comment)


# ---- the command -------------------------------------------------------------------------------------------

@cli.main
def main(argv=None):
    """Prompts -> clips in files; on demand the best of several, refined by rewards, and a sheet of them."""
    config = cli.parse(Config, argv, __doc__, positional="prompt")
    config = replace(config, model=model_of(config))
    check(config)
    jobs = plan_clips(config)
    if not jobs:
        return print("nothing to do: all clips are there")

    from plumbing import video
    for job in jobs:
        video.check_output(job.path, config.fps or 0)
    models = load_models(config)
    terms = load_rewards(config, models)
    start = time.perf_counter()
    make_all(jobs, models, terms, config)
    more = f" and {len(jobs) - 1} more" if jobs[1:] else ""
    print(f"{jobs[0].path}{more}: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
