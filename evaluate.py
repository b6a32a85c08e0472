"""Measuring: the papers' Section 4, and the toy's own.

    python evaluate.py shapes --rows "ddim 4,turbo 4"                   # the toy's table, by its oracle
    python evaluate.py score CLIP... --reward hpsv2=FILE                # rewards of clips, their diversity
    python evaluate.py vbench results/vcm results/turbo --papers        # Quality, Semantic, Total of VBench
"""
from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import shapes
from plumbing import cli, stats
from plumbing.cli import Count, File, Folder, Share
from plumbing.errors import UserError, reading
from plumbing.files import check_outputs, check_writable

if TYPE_CHECKING:                       # imported where they are needed: --help and mistakes answer at once
    from torch import Tensor

    from rewards import Reward


# ---- python evaluate.py shapes -----------------------------------------------------------------------------

@dataclass(frozen=True)
class ShapesConfig:
    """The options of `evaluate.py shapes`."""
    clips: Count = 500                  # clips of a row; half ask for combinations that were never trained on
    pairs: Share = 0.3                  # share of captions drawn for two things; a quarter of them get one
    folder: Folder | None = None        # folder of pretrain.py's weights and of students [the embedded ones]
    rows: str = ""                      # rows to measure, by parts of their names, e.g. "vcm 4,turbo 4" [all]
    out: File | None = None             # .json with every figure and every clip's verdict
    device: str = ""                    # device to compute on: cuda or cpu [cuda if there]


def shapes_table(config: ShapesConfig) -> list[dict]:
    """The toy's table: teacher against students, every clip judged by the world's oracle."""
    if config.out:
        check_outputs({"--out": config.out}, {})
        check_writable(Path(config.out).parent)
    from shapes import table
    return table.make(config)


# ---- python evaluate.py score ------------------------------------------------------------------------------

@dataclass(frozen=True)
class ScoreConfig:
    """The options of `evaluate.py score`."""
    clips: tuple[File, ...] = ()        # videos, folders of png frames, or folders of videos
    prompt: str | None = None           # caption of all clips [each clip's file name without its -NUMBER]
    reward: tuple[str, ...] = ()        # reward to score with, NAME or NAME=FILE; repeatable
    diversity: bool = False             # distance of a prompt's clips in a video reward's features, too
    json: bool = False                  # prints JSON instead of a table
    device: str = ""                    # device to compute on: cuda, cpu or mps [cuda if there]


def score(config: ScoreConfig) -> dict:
    """Rewards of clips, their means with 95 % intervals, and diversity: how far a prompt's clips differ."""
    if not config.clips or not config.reward:
        raise UserError("score takes clips and at least one --reward, e.g. score clips --reward hpsv2")
    files = dict.fromkeys(file for path in config.clips for file in clips_at(Path(path)))
    rows = [dict(clip=str(file), prompt=config.prompt or prompt_of(file)) for file in files]
    clips_of = {row["prompt"]: [] for row in rows}                      # {prompt: numbers of its clips}
    for number, row in enumerate(rows):
        clips_of[row["prompt"]].append(number)

    import rewards
    from plumbing.run import pick_device
    specs = list(map(rewards.parse_spec, config.reward))
    files_of = {name: path for name, path, _ in specs}
    if len(files_of) < len(specs) or any(weight is not None for *_, weight in specs):
        raise UserError(f"--reward {' '.join(config.reward)}: give each reward once, and without a :WEIGHT")
    by_video = any(rewards.RECIPES[name].kind == "video" for name in files_of)
    if config.diversity and not (by_video and len(clips_of) < len(rows)):
        raise UserError("--diversity compares clips of one prompt by a video reward, e.g. viclip=FILE")

    device, result = pick_device(config.device), dict(clips=rows, means={}, diversity={})
    for name, path in files_of.items():                                 # one reward in memory at a time
        reward = shapes.reward(name, path, device)
        features = score_clips(reward, rows, config.diversity and reward.kind == "video")
        scores = [row[name] for row in rows]
        means = [sum(scores[i] for i in numbers) / len(numbers) for numbers in clips_of.values()]
        result["means"][name] = interval(means if len(means) > 1 else scores)
        if features:
            several = [numbers for numbers in clips_of.values() if len(numbers) > 1]
            distances = [distance([features[i] for i in numbers]) for numbers in several]
            result["diversity"][name] = interval(distances)
    print(json.dumps(result, indent=1) if config.json else score_table(result))
    return result


def prompt_of(path: Path) -> str:
    """The prompt that a clip's name tells: VBench writes PROMPT-NUMBER.mp4. Raises UserError for a part."""
    name = path.name if path.is_dir() else path.stem
    prompt, _, number = name.rpartition("-")
    prompt = prompt if prompt and number.isdigit() else name
    if len(prompt.encode()) > 200 and re.search(" [0-9a-f]{8}$", prompt):       # by sample.file_name
        raise UserError(f"{path}: its name is a part of its prompt; give --prompt, and clips of one prompt")
    return prompt


def clips_at(path: Path) -> list[Path]:
    """A clip, or the clips of a folder that is not itself one of png frames."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    from plumbing.video import READABLE
    suffixes = {*READABLE, ".gif"}
    files = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in suffixes)
    if bool(files) == any(path.glob("[!.]*.png")):
        raise UserError(f"{path}: expected a clip, or a folder of clips (.mp4, .gif, ...) or of png frames")
    return files or [path]


def frames_of(reward: Reward, path: str) -> Tensor:
    """A clip's frames as large as the reward takes them, and as many: (1, T, 3, S, S) in [0, 1]. They are
    fitted as they are decoded: minutes of video take no more memory than small pictures do."""
    from plumbing.video import read_clip

    def fit(frame: Tensor) -> Tensor:
        pixels = frame[None, None].to(reward.device).float() / 255
        return reward.view(pixels, reward.model.image_size)[0, 0]

    return read_clip(path, reward.frames, fit).transpose(0, 1)[None]


def score_clips(reward: Reward, rows: list[dict], with_features: bool) -> list[Tensor]:
    """Writes a reward's scores into the rows -> a video reward's features (E,) of each, where asked for."""
    import torch
    from tqdm import tqdm

    features = []
    for row in tqdm(rows, reward.name, leave=False):
        frames = frames_of(reward, row["clip"])
        parts = frames.split(16, 1) if reward.kind == "image" else [frames]     # as many at once
        with torch.no_grad():
            sums = [reward(part, [row["prompt"]]).item() * part.shape[1] for part in parts]
            features += [reward.features(frames)[0].cpu()] if with_features else []
        row[reward.name] = sum(sums) / frames.shape[1]
    return features


def distance(features: list[Tensor]) -> float:
    """Mean 1 - cosine of two of a prompt's clips. features: of each clip (E,), of unit length."""
    distances = [1 - (a @ b).item() for a, b in combinations(features, 2)]
    return sum(distances) / len(distances)


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean and half-width of its 95 % interval, None for a single value, which JSON can hold."""
    mean, half = stats.mean_interval(values)
    return dict(mean=mean, half=half if len(values) > 1 else None)


def score_table(result: dict) -> str:
    """Clips, means and diversity as Markdown."""
    rows, names = result["clips"], list(result["means"])
    table = [[row["clip"], row["prompt"], *(f"{row[name]:.4f}" for name in names)] for row in rows]
    prompts = f"prompts: {len({row['prompt'] for row in rows})}"
    for title, key in (("mean (95 %)", "means"), ("diversity, 1 - cosine (95 %)", "diversity")):
        intervals = [result[key].get(name, {}).values() for name in names]
        cells = [" ± ".join(f"{x:.4f}" for x in interval if x is not None) for interval in intervals]
        table += [[title, prompts, *cells]] if result[key] else []
    return stats.markdown(["clip", "prompt", *names], table)


# ---- python evaluate.py vbench -----------------------------------------------------------------------------

# VBench's constants, from its scripts/constant.py and cal_final_score.py; v1, Appendix C.
# {dimension: (lower and upper end of the range that becomes 0..1, weight)}
QUALITY = {
    "subject_consistency": (0.1462, 1, 1),
    "background_consistency": (0.2615, 1, 1),
    "temporal_flickering": (0.6293, 1, 1),
    "motion_smoothness": (0.706, 0.9975, 1),
    "aesthetic_quality": (0, 1, 1),
    "dynamic_degree": (0, 1, 0.5),
    "imaging_quality": (0, 1, 1),
}
SEMANTIC = {
    "object_class": (0, 1, 1),
    "multiple_objects": (0, 1, 1),
    "human_action": (0, 1, 1),
    "color": (0, 1, 1),
    "spatial_relationship": (0, 1, 1),
    "scene": (0, 0.8222, 1),
    "appearance_style": (0.0009, 0.2855, 1),
    "temporal_style": (0, 0.364, 1),
    "overall_consistency": (0, 0.364, 1),
}
TOTALS = ("Total", "Quality", "Semantic")


@dataclass(frozen=True)
class VBenchConfig:
    """The options of `evaluate.py vbench`."""
    results: tuple[str, ...] = ()       # VBench's result files, or a folder a model; NAME=PATH names a model
    papers: bool = False                # the rows that papers published, too


def vbench_table(config: VBenchConfig) -> dict[str, dict[str, float]]:
    """Quality, Semantic and Total of VBench's result files, models side by side, in percent."""
    if not config.results and not config.papers:
        raise UserError("vbench takes VBench's result files, or folders of them, e.g. vbench results/turbo")
    rows = published() if config.papers else {}
    rows |= {name: with_totals(shares) for name, shares in read_results(config.results).items()}

    for columns in (TOTALS, QUALITY, SEMANTIC):
        cells = [[name, *(f"{100 * row[column]:.2f}" if column in row else "-" for column in columns)]
                 for name, row in rows.items() if row.keys() & {*columns}]
        titles = ["", *(column.replace("_", " ") for column in columns)]
        if cells:
            print(stats.markdown(titles, cells) + "\n")
    for name, row in rows.items():
        missing = [dimension for dimension in QUALITY | SEMANTIC if dimension not in row]
        if missing and not name.endswith(" (paper)"):
            print(f"no Total of {name}, which lacks {', '.join(missing)}")
    return rows


def published() -> dict[str, dict[str, float]]:
    """The rows that papers published, as `with_totals` returns one's own: {model: {column: share}}."""
    papers = {}
    with open(Path(__file__).parent / "docs" / "vbench.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = f"{row.pop('model')} (paper)"
            papers[name] = {column: float(percent) / 100 for column, percent in row.items() if percent}
    return papers


def with_totals(shares: dict[str, float]) -> dict[str, float]:
    """Adds Quality, Semantic and Total (four fifths of it Quality) where their dimensions are complete."""
    totals = {}
    for title, group in (("Quality", QUALITY), ("Semantic", SEMANTIC)):
        if shares.keys() >= group.keys():
            scaled = [w * (shares[name] - low) / (high - low) for name, (low, high, w) in group.items()]
            totals[title] = sum(scaled) / sum(w for *_, w in group.values())
    if len(totals) == 2:
        totals["Total"] = (4 * totals["Quality"] + totals["Semantic"]) / 5
    return totals | shares


def read_results(arguments: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """{model: {dimension: share}}. A model is called NAME, of NAME=PATH, else after its files' folder."""
    models, folders = {}, {}                                # folders: of the models that go without NAME
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if Path(argument).exists() or not separator:
            name, text = "", argument
        path = Path(text).expanduser()
        files = sorted(path.glob("[!.]*eval_results.json")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: no result files (*_eval_results.json) in this folder")
        folder = (path if path.is_dir() else path.parent).resolve()
        if not name and folders.setdefault(folder.name, folder) != folder:
            raise UserError(f"{path} and {folders[folder.name]} have one name; use NAME=PATH")
        name = name or folder.name
        if f"{name.removesuffix(' (paper)')} (paper)" in published():
            raise UserError(f"{name} is a paper's row; call your own model otherwise: NAME={path}")
        shares = models.setdefault(name, {})
        for file in files:
            with reading(file, "a VBench result"):          # {dimension: [share, [single clips]]}
                result = json.loads(file.read_text(encoding="utf-8"))
                result = {key.replace(" ", "_").lower(): value[0] for key, value in result.items()}
            for dimension, share in result.items():
                is_share = type(share) in (int, float) and abs(share) <= 1
                if not is_share or dimension not in QUALITY | SEMANTIC:
                    raise UserError(f"{file}: {dimension} is {share!r:.40}; VBench writes shares, at most "
                                    f"1, of {', '.join(QUALITY | SEMANTIC)}")
                if shares.setdefault(dimension, share) != share:
                    raise UserError(f"{file}: {dimension} is {share:g}, in another file of {name} "
                                    f"{shares[dimension]:g}; tell two models apart with NAME=FILE")
    return models


# ---- the command -------------------------------------------------------------------------------------------

COMMANDS = {                            # the word: what it calls, its options, what is typed without a flag
    "shapes": (shapes_table, ShapesConfig, None),
    "score": (score, ScoreConfig, "clips"),
    "vbench": (vbench_table, VBenchConfig, "results"),
}


@cli.main
def main(argv=None):
    """The first word chooses the command, the rest are its options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    if argv[0] not in COMMANDS:
        raise UserError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    command, config, positional = COMMANDS[argv[0]]
    command(cli.parse(config, argv[1:], command.__doc__, positional, prog=f"evaluate.py {argv[0]}"))


if __name__ == "__main__":
    main()
