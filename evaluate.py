"""Measuring: the toy's table, scores of clips, curves of a training run.

    python evaluate.py shapes [--clips 500]                       # teacher against students, judged by the shapes world's oracle
    python evaluate.py score CLIP... --prompt "..." --reward hpsv2=FILE
    python evaluate.py curves runs/shapes/turbo/log.jsonl ... --out curves.svg
"""
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import rewards
import sample as sampler
import shapes
from plumbing import cli, video
from shapes import grammar, world
from solver import Schedule, cfg, predict_z0
from turbo import Noise, sample

# ---- python evaluate.py shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapesConfig:
    """The options of `evaluate.py shapes`."""
    clips: int = 500                    # per row, each with its own caption and seed; half of them ask for held-out combinations
    folder: str | None = None           # weights made by shapes/pretrain.py and train.py [the embedded ones]
    rows: str = ""                      # only rows whose name contains this, e.g. "turbo"
    teacher_guidance: float = 2.0       # ω of the teacher's rows
    guidance: float = 2.0               # ω of the students' rows
    batch: int = 50                     # clips at once
    seed: int = 100                     # of the first clip
    out: str | None = None              # .json with all figures; a run that was interrupted goes on from it
    dtype: str = "bfloat16"             # autocast of the UNet


TEACHER_ROWS = [("teacher DDIM", "teacher", n) for n in (50, 8, 4)]
TEACHER_ROWS += [("teacher, few-step sampler", "undistilled", n) for n in (1, 2, 4, 8)]
STUDENT_ROWS = [(name, file, n) for name, file in
                (("VCM", "vcm"), ("VCM + R_img", "vcm-img"), ("VCM + R_vid", "vcm-vid"), ("T2V-Turbo", "turbo")) for n in (1, 2, 4, 8)]


def undistilled(models, captions: list[str], seeds: list[int], steps: int, guidance: float) -> Tensor:
    """What few-step sampling, at the timesteps of the students, gives without distillation: the teacher's own guided ẑ0 in place of f."""
    schedule, c, null = Schedule(8), models.text(captions), models.text([""] * len(captions))

    def z0_of(z, t):
        eps = models.unet(torch.cat([z, z]), torch.cat([t, t]), torch.cat([c, null])).float()
        return predict_z0(z, cfg(*eps.chunk(2), guidance), *schedule.at(t))

    return sample(z0_of, schedule, Noise(seeds, (models.unet.config.in_channels, models.frames, 8, 8)), steps)


def shapes_row(config: ShapesConfig, models, scorers: dict, method: str, steps: int, split: str, name: str) -> list[dict]:
    """Samples half a row's clips, of one split, and judges them: a verdict (0..1 each) and both rewards for every clip."""
    dataset, rows, count = shapes.Clips(split), [], config.clips // 2
    for start in tqdm(range(0, count, config.batch), f"{name} {steps}, {split}", leave=False):
        indices = range(10 ** 9 + start, 10 ** 9 + min(start + config.batch, count))           # beyond any training index
        scenes, captions = zip(*(dataset.scene(i)[:2] for i in indices))
        captions, seeds, began = list(captions), [config.seed + i - 10 ** 9 for i in indices], time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, config.dtype == "bfloat16"):
            if method == "undistilled":
                z = undistilled(models, captions, seeds, steps, config.teacher_guidance)
            else:
                teacher = method == "teacher"
                options = sampler.Config(method="teacher" if teacher else "turbo", steps=steps,
                                         guidance=config.teacher_guidance if teacher else config.guidance)
                z = sampler.generate(models, captions, seeds, options)
        clips = sampler.decode(models, z)
        seconds = (time.perf_counter() - began) / len(clips)
        with torch.no_grad():
            scores = {kind: scorer(frames_for(scorer, clips), captions).tolist() for kind, scorer in scorers.items()}
        for i, (scene, caption, clip) in enumerate(zip(scenes, captions, clips)):
            verdict = world.judge(grammar.Scene(scene.things, grammar.understand(caption).background), clip)
            groups = {split: verdict["all"], ("one", "two")[len(scene.things) - 1]: verdict["all"]}
            rows.append(verdict | groups | {kind: score[i] for kind, score in scores.items()} | {"seconds": seconds})
    return rows


def shapes_table(config: ShapesConfig) -> list[dict]:
    """All rows of the toy's table, printed as Markdown while they come."""
    path, done = Path(config.out) if config.out else None, {}
    if path and path.exists():
        done = {(row["name"], row["steps"]): row for row in json.loads(path.read_text())}
    scorers = shapes.rewards(folder=config.folder)
    columns = ("colour", "shape", "motion", "background", "all", "train", "held-out", "one", "two", "quality", "image", "video")
    titles = " | ".join(columns).replace("train | held-out | one | two", "all, seen | all, held-out | all, one thing | all, two things")
    print(f"| | steps | passes | clips | {titles} | s/clip |\n" + "|---" * (len(columns) + 5) + "|")
    for name, method, steps in TEACHER_ROWS + STUDENT_ROWS:
        if config.rows not in f"{name} {steps}" or method in shapes.STUDENTS and not shapes.student(method, config.folder).exists():
            continue                                                        # a student that was not trained has no row
        if (name, steps) not in done:
            models = shapes.load(None if method in ("teacher", "undistilled") else method, config.folder)
            clips = sum((shapes_row(config, models, scorers, method, steps, split, name) for split in ("train", "held-out")), [])
            found = {key: [c[key] for c in clips if key in c] for key in (*columns, "seconds")}
            means = {key: sum(values) / len(values) for key, values in found.items() if values}
            passes = steps * (2 if method in ("teacher", "undistilled") else 1)
            done[name, steps] = dict(name=name, steps=steps, passes=passes, clips=len(clips), **means)
            if path:
                path.write_text(json.dumps(list(done.values()), indent=1))
        row = done[name, steps]
        cells = ["-" if c not in row else f"{row[c]:.3f}" if c in ("quality", "image", "video") else f"{100 * row[c]:.1f}" for c in columns]
        cells[columns.index("all")] += f" ± {196 * (row['all'] * (1 - row['all']) / row['clips']) ** 0.5:.1f}"
        print(f"| {name} | {steps} | {row['passes']} | {row['clips']} | " + " | ".join(cells) + f" | {row['seconds']:.3f} |", flush=True)
    return list(done.values())


# ---- python evaluate.py score --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreConfig:
    clips: tuple[str, ...] = ()         # .mp4, .gif, .safetensors, or folders of png frames
    prompt: str | None = None           # of all clips [each clip's file name without its -NUMBER, as VBench names them]
    reward: tuple[str, ...] = ()        # NAME=FILE, repeatable: hpsv2, pickscore, clip, imagereward, viclip, internvideo2
    json: bool = False                  # print JSON instead of a table
    device: str = "cuda" if torch.cuda.is_available() else "cpu"    # cuda or cpu


def frames_for(reward, clips: Tensor) -> Tensor:
    """Clips uint8 (B, 3, T, H, W) as a reward takes them, (B, T, 3, H, W) in [0, 1]: all frames, or as many as it wants, evenly spaced."""
    pixels, T = clips.transpose(1, 2).float() / 255, clips.shape[2]
    if not reward.frames:
        return pixels
    if T < reward.frames:
        raise ValueError(f"{reward.name} looks at {reward.frames} frames, the clip has {T}")
    return pixels[:, [int((i + 0.5) * T / reward.frames) for i in range(reward.frames)]]


def score(config: ScoreConfig) -> list[dict]:
    """Every reward on every clip; one reward model in memory at a time."""
    if not config.clips or not config.reward:
        raise ValueError("score takes clips and at least one --reward NAME=FILE, e.g. score out.mp4 --prompt \"a dog\" --reward hpsv2=FILE")
    rows = [dict(clip=path, prompt=config.prompt or Path(path).stem.rpartition("-")[0] or Path(path).stem) for path in config.clips]
    clips = [video.read_clip(path) for path in config.clips]
    for spec in config.reward:
        name, path, _ = rewards.parse_spec(spec)
        if name.startswith("shapes"):
            reward = shapes.rewards(config.device)["image" if name == "shapes-clip" else "video"]
        else:
            reward = rewards.load(name, path, config.device)
        with torch.no_grad():
            for row, clip in zip(tqdm(rows, name, leave=False), clips):
                row[name] = reward(frames_for(reward, clip[None]).to(config.device), [row["prompt"]]).item()
    if config.json:
        print(json.dumps(rows, indent=1))
        return rows
    names = list(rows[0])[2:]
    print("| clip | prompt | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for row in rows:
        print(f"| {row['clip']} | {row['prompt']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |")
    return rows


# ---- python evaluate.py curves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvesConfig:
    logs: tuple[str, ...] = ()          # log.jsonl files of runs, or NAME=FILE
    keys: str = "loss"                  # figures to draw, comma-separated, one panel each
    smooth: int = 10                    # running mean over this many log lines
    log_scale: bool = False             # logarithmic vertical axis
    out: str = "curves.svg"             # the picture


def polyline(points: list[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def panel(series: dict[str, list[tuple[float, float]]], title: str, left: float, log_scale: bool) -> list[str]:
    """One set of axes, 320 x 220, with a line per run; the SVG elements."""
    transform = math.log10 if log_scale else float
    every = [(x, transform(y)) for line in series.values() for x, y in line if not log_scale or y > 0]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*every))
    y0, y1 = (y0, y1) if y1 > y0 else (y0 - 1, y1 + 1)

    def place(x, y):
        return left + 50 + 260 * (x - x0) / max(x1 - x0, 1e-9), 190 - 150 * (transform(y) - y0) / (y1 - y0)

    parts = [f'<rect x="{left + 50}" y="40" width="260" height="150" fill="none" stroke="#999"/>',
             f'<text x="{left + 180}" y="28" text-anchor="middle">{title}</text>']
    for fraction in (0, 0.5, 1):
        y = y0 + fraction * (y1 - y0)
        label = f"{10 ** y if log_scale else y:.3g}"
        parts.append(f'<text x="{left + 45}" y="{194 - 150 * fraction}" text-anchor="end">{label}</text>')
        parts.append(f'<text x="{left + 50 + 260 * fraction}" y="206" text-anchor="middle">{x0 + fraction * (x1 - x0):.0f}</text>')
    for i, (name, line) in enumerate(series.items()):
        parts.append(polyline([place(x, y) for x, y in line if not log_scale or y > 0], COLOURS[i % len(COLOURS)]))
        parts.append(f'<text x="{left + 60}" y="{54 + 13 * i}" fill="{COLOURS[i % len(COLOURS)]}">{name}</text>')
    return parts


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def curves(config: CurvesConfig) -> None:
    """Training logs → one SVG picture."""
    if not config.logs:
        raise ValueError("curves takes log files, e.g. curves vcm=runs/vcm/log.jsonl turbo=runs/turbo/log.jsonl --keys loss")
    runs = {}
    for spec in config.logs:
        name, _, path = spec.rpartition("=")
        runs[name or Path(path).parent.name] = [json.loads(line) for line in Path(path).read_text().splitlines()]
    parts, keys = [], config.keys.split(",")
    for i, key in enumerate(keys):
        series = {}
        for name, rows in runs.items():
            values = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
            windows = [values[max(0, j - config.smooth + 1):j + 1] for j in range(len(values))]
            if values:
                series[name] = [(w[-1][0], sum(y for _, y in w) / len(w)) for w in windows]
        if not series:
            raise ValueError(f"no {key!r} in these logs; they have: {', '.join(next(iter(runs.values()))[-1])}")
        parts += panel(series, key, 330 * i, config.log_scale)
    Path(config.out).write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{330 * len(keys)}" height="215" font-family="sans-serif" '
                                f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')
    print(config.out)


# ---- commands ------------------------------------------------------------------------------------------------------------------

COMMANDS = {"shapes": (shapes_table, ShapesConfig, None), "score": (score, ScoreConfig, "clips"), "curves": (curves, CurvesConfig, "logs")}


@cli.main
def main(argv=None):
    """The first word chooses the command, the rest are its options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(__doc__)
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
        return
    command, config, positional = COMMANDS[argv[0]]
    command(cli.parse(config, argv[1:], command.__doc__, positional, prog=f"evaluate.py {argv[0]}"))


if __name__ == "__main__":
    main()
