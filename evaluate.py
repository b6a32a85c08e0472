"""Measuring: the papers' Section 4, and the toy's own.

    python evaluate.py shapes                                           # the toy's table, by its oracle
    python evaluate.py score CLIP... --reward hpsv2=FILE                # rewards of clips, their diversity
    python evaluate.py vbench results/vcm results/turbo --papers        # Quality, Semantic, Total of VBench
    python evaluate.py compare clips/vcm clips/turbo --out page.html    # a page that asks people, blindly
    python evaluate.py tally votes-*.json                               # what they said
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import shapes
from plumbing import cli, judging, stats, vbench
from plumbing.cli import Count, File, Folder, Size
from plumbing.errors import UserError
from plumbing.files import check_outputs, check_writable

if TYPE_CHECKING:                       # imported where they are needed: --help and mistakes answer at once
    from torch import Tensor

    from rewards import Reward

FRAMES = 16                             # of an image reward at once


def named(argument: str) -> tuple[str, Path]:
    """NAME=PATH or PATH -> name, path. Without NAME a model is called after its folder."""
    name, separator, text = argument.partition("=")
    if Path(argument).exists() or not separator:
        name, text = "", argument
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return name or (path if path.is_dir() else path.parent).resolve().name, path


# ---- python evaluate.py shapes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapesConfig:
    """The options of `evaluate.py shapes`."""
    clips: Count = 500                  # clips of a row; half ask for combinations that were never trained on
    folder: Folder | None = None        # folder of pretrain.py's weights and of students [the embedded ones]
    rows: str = ""                      # rows to measure, by parts of their names, e.g. "vcm 4,turbo 4" [all]
    out: File | None = None             # .json with every figure and every clip's verdict
    device: str = ""                    # device to compute on: cuda or cpu [cuda if there]


def shapes_table(config: ShapesConfig) -> list[dict]:
    """The toy's table: teacher against students, every clip judged by the world's oracle."""
    if config.out:
        if Path(config.out).suffix != ".json":
            raise UserError(f"--out {config.out}: the table is stored as .json")
        check_outputs({"--out": config.out}, {})
        check_writable(Path(config.out).parent)
    from shapes import table
    return table.make(config)


# ---- python evaluate.py score ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreConfig:
    """The options of `evaluate.py score`."""
    clips: tuple[File, ...] = ()        # videos, .safetensors, folders of png frames, or folders of clips
    prompt: str | None = None           # caption of all clips [each clip's file name without its -NUMBER]
    reward: tuple[str, ...] = ()        # reward to score with, NAME or NAME=FILE; repeatable
    diversity: bool = False             # distance of a prompt's clips in a video reward's features, too
    json: bool = False                  # prints JSON instead of a table
    device: str = ""                    # device to compute on: cuda, cpu or mps [cuda if there]


def score(config: ScoreConfig) -> dict:
    """Rewards of clips, their means with 95 % intervals, and diversity: how far a prompt's clips differ."""
    if not config.clips or not config.reward:
        raise UserError("score takes clips and at least one --reward NAME=FILE, "
                        "e.g. score out.mp4 --prompt \"a dog\" --reward hpsv2=FILE")
    files = list(dict.fromkeys(file for path in config.clips for file in clips_at(Path(path))))
    rows = [dict(clip=str(file), prompt=config.prompt or judging.prompt_of(file)) for file in files]
    prompts = [row["prompt"] for row in rows]
    if config.diversity and len(set(prompts)) == len(prompts):
        raise UserError("--diversity compares clips of one prompt, and no prompt has two")

    import torch

    from plumbing.run import pick_device
    device, result = pick_device(config.device), dict(clips=rows, means={}, diversity={})
    for name, path in read_rewards(config.reward, config.diversity):    # one reward in memory at a time
        reward = shapes.reward(name, path, device)
        features = score_clips(reward, rows, config.diversity and reward.kind == "video")
        result["means"][name] = mean_reward(prompts, [row[name] for row in rows])
        if features:
            result["diversity"][name] = diversity(prompts, torch.cat(features))
    print(json.dumps(result, indent=1) if config.json else score_table(result))
    return result


def clips_at(path: Path) -> list[Path]:
    """A clip, or the clips of a folder that is not itself one of png frames."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file() or any(path.glob("*.png")):
        return [path]
    from plumbing.video import READABLE
    suffixes = {*READABLE, ".gif", ".safetensors"}
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{path}: no clips (.mp4, .gif, .safetensors, ...) and no png frames in this folder")
    return files


def read_rewards(specs: tuple[str, ...], diversity: bool) -> list[tuple[str, str | None]]:
    """(name, file) of each --reward."""
    import rewards
    parsed = [rewards.parse_spec(spec)[:2] for spec in specs]
    if len(dict(parsed)) < len(parsed):
        raise UserError(f"--reward {' '.join(specs)}: give each reward once")
    if diversity and not any(rewards.RECIPES[name].kind == "video" for name in dict(parsed)):
        raise UserError("--diversity compares features of a video reward, e.g. --reward viclip=FILE")
    return parsed


def frames_of(reward: Reward, path: str) -> Tensor:
    """A clip's frames as large as the reward takes them, and as many: (1, T, 3, S, S) in [0, 1]. They are
    fitted as they are decoded: minutes of video take no more memory than small pictures do."""
    from plumbing.video import read_clip

    def fit(frame: Tensor) -> Tensor:
        pixels = frame[None, None].to(reward.device).float() / 255
        return reward.view(pixels, reward.model.image_size)[0, 0]

    return read_clip(path, reward.frames, fit).transpose(0, 1)[None]


def score_clips(reward: Reward, rows: list[dict], with_features: bool) -> list[Tensor]:
    """Writes a reward's scores into the rows -> a video reward's features (1, E) of each, where asked for."""
    import torch
    from tqdm import tqdm

    features = []
    for row in tqdm(rows, reward.name, leave=False):
        frames = frames_of(reward, row["clip"])
        parts = frames.split(FRAMES, 1) if reward.kind == "image" else [frames]
        with torch.no_grad():
            sums = [reward(part, [row["prompt"]]).item() * part.shape[1] for part in parts]
            features += [reward.features(frames).cpu()] if with_features else []
        row[reward.name] = sum(sums) / frames.shape[1]
    return features


def mean_reward(prompts: list[str], values: list[float]) -> dict[str, float | None]:
    """Mean of a reward with its interval: over prompts, or over the clips of a single one."""
    groups = [[value for value, other in zip(values, prompts) if other == prompt]
              for prompt in dict.fromkeys(prompts)]
    return mean_of(values if len(groups) == 1 else [sum(group) / len(group) for group in groups])


def mean_of(values: list[float]) -> dict[str, float | None]:
    """Mean and half-width of its 95 % interval, None for a single value, which JSON can hold."""
    mean, half = stats.mean_interval(values)
    return dict(mean=mean, half=None if math.isnan(half) else half)


def diversity(prompts: list[str], features: Tensor) -> dict[str, float | None]:
    """Mean distance 1 - cosine of two clips of one prompt, over prompts, with its interval. features (N, E):
    of unit length, one for each clip."""
    distances = []
    for prompt in dict.fromkeys(prompts):
        of_prompt = features[[i for i, other in enumerate(prompts) if other == prompt]]
        n = len(of_prompt)
        if n > 1:
            cosines = of_prompt @ of_prompt.T                           # (n, n), 1 on the diagonal
            distances.append(1 - ((cosines.sum() - cosines.trace()) / (n * (n - 1))).item())
    return mean_of(distances)


def score_table(result: dict) -> str:
    """Clips, means and diversity as Markdown."""
    def with_interval(mean: float, half: float | None) -> str:
        return f"{mean:.4f}" if half is None else f"{mean:.4f} ± {half:.4f}"

    names, rows = list(result["means"]), result["clips"]
    table = [[row["clip"], row["prompt"], *(f"{row[name]:.4f}" for name in names)] for row in rows]
    count = len({row["prompt"] for row in rows})
    for title, means in ((f"mean of {len(rows)} clips (95 %)", result["means"] if len(rows) > 1 else {}),
                         ("diversity, 1 - cosine (95 %)", result["diversity"])):
        if means:
            table.append([title, f"{count} prompt{'s' * (count > 1)}",
                          *(with_interval(**means[name]) if name in means else "-" for name in names)])
    return stats.markdown(["clip", "prompt", *names], table)


# ---- python evaluate.py vbench -----------------------------------------------------------------------------


@dataclass(frozen=True)
class VBenchConfig:
    """The options of `evaluate.py vbench`."""
    results: tuple[str, ...] = ()       # VBench's result files, or a folder a model; NAME=PATH names a model
    papers: bool = False                # the rows that papers published, too


def vbench_table(config: VBenchConfig) -> dict[str, dict[str, float]]:
    """Quality, Semantic and Total of VBench's result files, models side by side, in percent."""
    if not config.results and not config.papers:
        raise UserError("vbench takes VBench's result files, or folders of them, e.g. vbench results/turbo")
    paths: dict[str, list[Path]] = {}
    for name, path in map(named, config.results):
        paths.setdefault(name, []).append(path)
    rows = {name: vbench.with_totals(vbench.read_model(name, files)) for name, files in paths.items()}
    rows = (vbench.published() if config.papers else {}) | rows
    print(vbench.tables(rows))
    return rows


# ---- python evaluate.py compare and tally ------------------------------------------------------------------


@dataclass(frozen=True)
class CompareConfig:
    """The options of `evaluate.py compare`."""
    folders: tuple[str, ...] = ()       # two folders of .mp4 clips of the same names; FOLDER or NAME=FOLDER
    out: File = "compare.html"          # the page; it needs no server and no network
    pairs: Size = 0                     # pairs on a page; more of them make OUT-2, OUT-3, ... [all on one]


def compare(config: CompareConfig) -> None:
    """A self-contained page on which people judge two models blindly, pair by pair. `tally` counts."""
    if len(config.folders) != 2:
        raise UserError(f"compare takes two folders of clips, not {len(config.folders)}; "
                        "e.g. compare clips/vcm clips/turbo --out page.html")
    if Path(config.out).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {config.out}: a page ends in .html")
    a, b = map(named, config.folders)
    if a[0] == b[0]:
        raise UserError(f"both folders are called {a[0]}; tell the models apart with NAME=FOLDER")
    print("\n".join(judging.make_pages(a, b, Path(config.out), config.pairs)))


@dataclass(frozen=True)
class TallyConfig:
    """The options of `evaluate.py tally`."""
    votes: tuple[File, ...] = ()        # files that the pages of `compare` saved


def tally(config: TallyConfig) -> None:
    """Win rates per question with Wilson intervals, and how often judges agree, as Markdown."""
    if not config.votes:
        raise UserError("tally takes files of votes, which a page of `compare` saves: tally votes-*.json")
    votes = judging.read_votes(config.votes)
    print("\n\n".join(judging.table(names, by_pair) for names, by_pair in votes.items()))


# ---- commands ----------------------------------------------------------------------------------------------

COMMANDS = {                            # the word: what it calls, its options, what is typed without a flag
    "shapes": (shapes_table, ShapesConfig, None),
    "score": (score, ScoreConfig, "clips"),
    "vbench": (vbench_table, VBenchConfig, "results"),
    "compare": (compare, CompareConfig, "folders"),
    "tally": (tally, TallyConfig, "votes"),
}


@cli.main
def main(argv=None):
    """The first word chooses the command, the rest are its options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    command, config, positional = COMMANDS[argv[0]]
    command(cli.parse(config, argv[1:], command.__doc__, positional, prog=f"evaluate.py {argv[0]}"))


if __name__ == "__main__":
    main()
