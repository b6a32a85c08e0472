"""Measuring: the papers' Section 4, and the toy's own.

    python evaluate.py shapes                                           # the toy's table, by its oracle
    python evaluate.py score CLIP... --reward hpsv2=FILE                # rewards, best clips, diversity
    python evaluate.py vbench results/vcm results/turbo --papers        # Quality, Semantic, Total of VBench
    python evaluate.py compare clips/vcm clips/turbo --out page.html    # a page that asks people, blindly
    python evaluate.py tally votes-*.json --out tally.svg               # what they said
    python evaluate.py curves runs/shapes/turbo/log.jsonl               # figures of training runs
"""
from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import shapes
from plumbing import cli, judging, plots, stats, vbench
from plumbing.cli import Count, NotNegative, Seed, Size
from plumbing.files import read_header
from shapes import grammar

if TYPE_CHECKING:                       # imported where they are needed: --help and mistakes answer at once
    import torch
    from torch import Tensor

    from rewards import Reward

# ---- python evaluate.py shapes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapesConfig:
    """The options of `evaluate.py shapes`."""
    clips: Count = 500                  # per row, of as many captions; half ask for held-out combinations
    diversity: Size = 16                # captions, with 8 seeds each, for the column `spread`; 0 = no column
    folder: str | None = None           # weights made by shapes/pretrain.py and train.py [the embedded ones]
    rows: str = ""                      # only rows whose name and steps contain this, e.g. "vcm 4,turbo 4"
    things: Literal[1, 2] | None = None    # only captions of one thing, or of two
    split: Literal["train", "held-out"] | None = None   # only of trained, or of held-out combinations
    teacher_guidance: NotNegative = 2.0    # ω of the teacher's rows
    guidance: NotNegative = 2.0         # ω of the students' rows
    batch: Count = 50                   # clips at once
    seed: Seed = grammar.TABLE          # of the first clip
    out: str | None = None              # .json of every clip's verdict; what is in it is not measured again
    dtype: Literal["bfloat16", "float32"] | None = None     # of the UNet [the faster one on the device]
    device: str = ""                    # cuda or cpu [cuda if there]


def shapes_table(config: ShapesConfig) -> list[dict]:
    """The toy's table: teacher against students, and their paired differences, as Markdown."""
    from shapes import table
    return table.make(config)


# ---- python evaluate.py score ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreConfig:
    """The options of `evaluate.py score`."""
    clips: tuple[str, ...] = ()         # .mp4, .gif, .safetensors, folders of png frames, folders of clips
    prompt: str | None = None           # of all clips [each clip's file name without its -NUMBER]
    reward: tuple[str, ...] = ()        # NAME, NAME=FILE or NAME=FILE:WEIGHT (for --best), repeatable
    student: str | None = None          # turbo.safetensors that made the clips: marks its rewards
    best: str | None = None             # folder for a copy of each prompt's best clip by the weighted rewards
    diversity: bool = False             # distance of a prompt's clips in a video reward's features
    batch: Count | None = None          # clips at once [cuda: 8, else 1]
    json: bool = False                  # prints JSON instead of tables
    device: str = ""                    # cuda, cpu or mps [cuda if there]


def score(config: ScoreConfig) -> dict:
    """Rewards of clips, their means with 95 % intervals, the best clip of each prompt, diversity."""
    if not config.clips or not config.reward:
        raise ValueError("score takes clips and at least one --reward NAME=FILE, "
                         "e.g. score out.mp4 --prompt \"a dog\" --reward hpsv2=FILE")
    files = list(dict.fromkeys(file for path in config.clips for file in clips_at(Path(path))))
    rows = [dict(clip=str(file), prompt=config.prompt or judging.prompt_of(file)) for file in files]
    groups: dict[str, list[dict]] = {}                                  # prompt -> its clips' rows
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    check_score(config, files, groups)
    trained = trained_on(config.student)

    # One reward model in memory at a time.
    from plumbing.run import pick_device
    device = pick_device(config.device)
    specs = read_rewards(config.reward, config.diversity)
    distances = {}
    for name, path, _ in specs:
        reward = load_reward(name, path, device)
        batch = config.batch or (8 if device.type == "cuda" else 1)
        features = score_clips(reward, rows, batch, config.diversity)
        if features is not None:
            distances[name] = diversity(features, rows)

    means = {name: mean_reward(name, groups) for name, _, _ in specs}
    found = dict(clips=rows, prompts=len(groups), means=means, diversity=distances)
    found["trained_on"] = sorted(trained & means.keys())
    if config.best:
        found["best"] = copy_best(groups, {name: weight for name, _, weight in specs}, Path(config.best))
    print(json.dumps(found, indent=1) if config.json else score_tables(found))
    return found


def clips_at(path: Path) -> list[Path]:
    """A clip, or the clips of a folder that is not itself one of png frames."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file() or any(path.glob("*.png")):
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in (".mp4", ".gif", ".safetensors"))
    if not found:
        raise ValueError(f"{path}: no clips (.mp4, .gif, .safetensors) and no png frames in this folder")
    return found


def check_score(config: ScoreConfig, files: list[Path], groups: dict[str, list[dict]]) -> None:
    """Raises ValueError for what cannot be told from these clips, before a reward is loaded."""
    if config.diversity and all(len(group) < 2 for group in groups.values()):
        raise ValueError("--diversity compares clips of one prompt, and no prompt has two")
    if config.best and Path(config.best).resolve() in {file.resolve().parent for file in files}:
        raise ValueError(f"--best {config.best}: the clips themselves lie there; choose another folder")
    if config.best and Path(config.best).is_file():
        raise ValueError(f"--best {config.best}: it is a file; give a folder")


def read_rewards(specs: tuple[str, ...], diversity: bool) -> list[tuple[str, str | None, float]]:
    """(name, file, weight in --best) of each --reward."""
    import rewards
    found = [rewards.parse_spec(spec) for spec in specs]
    names = [name for name, _, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"--reward: {', '.join(names)}; give each reward once")
    if diversity and not any(rewards.RECIPES[name].kind == "video" for name in names):
        raise ValueError("--diversity compares features of a video reward, e.g. --reward viclip=FILE")
    for _, path, _ in found:
        if path and not Path(path).expanduser().exists():
            raise ValueError(f"--reward: there is no file of weights at {path}")
    return [(name, path, 1.0 if weight is None else weight) for name, path, weight in found]


def trained_on(student: str | None) -> set[str]:
    """Names of the rewards in a student's header: their scores say less, because training raised them."""
    if not student:
        return set()
    header = read_header(shapes.student(student) if student in shapes.STUDENTS else student)
    if not isinstance(header.get("rewards"), list):
        raise ValueError(f"--student {student}: its header does not say which rewards it was trained on")
    return set(header["rewards"])


def load_reward(name: str, path: str | None, device: torch.device) -> Reward:
    """A reward; the toy's from its embedded files, unless others are named."""
    import rewards
    if not name.startswith("shapes"):
        return rewards.load(name, path, device)
    from shapes import world
    path = path or shapes.WEIGHTS / f"{name.removeprefix('shapes-')}.safetensors"
    return rewards.load(name, path, device, tokenizer=world.tokenize)


def score_clips(reward: Reward, rows: list[dict], batch: int, features: bool) -> Tensor | None:
    """Writes a reward's scores into the rows; returns a video reward's features (N, E) where they are wanted.

    A batch of clips is in memory at a time.
    """
    import torch
    from tqdm import tqdm

    from plumbing import video

    def fit(frame: Tensor) -> Tensor:                                   # (3, H, W) -> (3, S, S) in [0, 1]
        pixels = frame[None, None].to(reward.device).float() / 255
        return reward.view(pixels, reward.model.image_size)[0, 0]

    found = []
    for start in tqdm(range(0, len(rows), batch), reward.name, leave=False):
        part = rows[start:start + batch]
        frames = []                                                     # of each clip (1, T, 3, H, W)
        for row in part:
            frames.append(video.read_clip(row["clip"], reward.frames, fit).transpose(0, 1)[None])

        # Clips of several sizes go one by one.
        together = len({x.shape for x in frames}) == 1
        batches = [(torch.cat(frames), part)] if together else [(x, [row]) for x, row in zip(frames, part)]
        for clips, theirs in batches:
            with torch.no_grad():
                scores = reward(clips, [row["prompt"] for row in theirs])
                if features and reward.kind == "video":
                    found.append(reward.features(clips).cpu())
            for row, value in zip(theirs, scores.tolist()):
                row[reward.name] = value
    return torch.cat(found) if found else None


def mean_reward(name: str, groups: dict[str, list[dict]]) -> dict[str, float | None]:
    """Mean of a reward with its interval: over prompts, or over the clips of a single one."""
    per_prompt = [[row[name] for row in group] for group in groups.values()]
    if len(groups) == 1:
        return mean_of(per_prompt[0])
    return mean_of([sum(values) / len(values) for values in per_prompt])


def mean_of(values: list[float]) -> dict[str, float | None]:
    """Mean and half-width of its 95 % interval, None for a single value, which JSON can hold."""
    mean, half = stats.mean_interval(values)
    return dict(mean=mean, half=None if math.isnan(half) else half)


def diversity(features: Tensor, rows: list[dict]) -> dict[str, float | None]:
    """Mean distance 1 - cosine of two clips of one prompt, over prompts, with its interval.

    features (N, E), of unit length, one for each row.
    """
    prompts = [row["prompt"] for row in rows]
    distances = []
    for prompt in dict.fromkeys(prompts):
        theirs = features[[i for i, other in enumerate(prompts) if other == prompt]]
        n = len(theirs)
        if n > 1:
            cosines = theirs @ theirs.T                                 # (n, n), 1 on the diagonal
            distances.append(1 - ((cosines.sum() - cosines.trace()) / (n * (n - 1))).item())
    return mean_of(distances)


def copy_best(groups: dict[str, list[dict]], weights: dict[str, float], folder: Path) -> list[str]:
    """Copies the clip of each prompt with the largest weighted sum of rewards; returns the copies' names."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for group in groups.values():
        best = max(group, key=lambda row: sum(weight * row[name] for name, weight in weights.items()))
        source, copy = Path(best["clip"]), folder / Path(best["clip"]).name
        shutil.copytree(source, copy, dirs_exist_ok=True) if source.is_dir() else shutil.copy2(source, copy)
        copies.append(str(copy))
    return copies


def score_tables(found: dict) -> str:
    """Markdown of what `score` found: clips, means, diversity."""
    headings = [name + " (trained on)" * (name in found["trained_on"]) for name in found["means"]]
    lines = ["| clip | prompt | " + " | ".join(headings) + " |", "|---" * (len(headings) + 2) + "|"]
    for row in found["clips"]:
        cells = [f"{row[name]:.4f}" for name in found["means"]]
        lines.append(f"| {row['clip']} | {row['prompt']} | " + " | ".join(cells) + " |")

    if len(found["clips"]) > 1:
        unit = f"{found['prompts']} prompts" if found["prompts"] > 1 else "one prompt"
        cells = [with_interval(**mean) for mean in found["means"].values()]
        lines.append(f"| mean of {len(found['clips'])} clips (95 %) | {unit} | " + " | ".join(cells) + " |")
    for name, mean in found["diversity"].items():
        text = f"diversity by {name}, 1 - cosine of two clips of a prompt (95 %)"
        lines.append(f"\n{text}: {with_interval(**mean)}")
    if "best" in found:
        lines.append(f"\nbest of each prompt: {len(found['best'])} clips in {Path(found['best'][0]).parent}")
    return "\n".join(lines)


def with_interval(mean: float, half: float | None) -> str:
    """A mean and the half-width of its interval, if it has one."""
    return f"{mean:.4f}" if half is None else f"{mean:.4f} ± {half:.4f}"


# ---- python evaluate.py vbench -----------------------------------------------------------------------------


@dataclass(frozen=True)
class VBenchConfig:
    """The options of `evaluate.py vbench`."""
    results: tuple[str, ...] = ()       # result files, or a folder a model; NAME=PATH,PATH names a model
    table: bool = False                 # all dimensions, as in the papers' tables
    partial: bool = False               # prints what can be said where dimensions are missing
    papers: bool = False                # the papers' published rows beside one's own


def vbench_table(config: VBenchConfig) -> dict[str, dict[str, float]]:
    """Quality, Semantic and Total of VBench's result files, models side by side, as Markdown in percent."""
    if not config.results and not config.papers:
        raise ValueError("vbench takes VBench's result files, or folders of them, e.g. vbench results/turbo")
    models = vbench.read_models(config.results)
    if not config.partial:
        vbench.check_complete(models)
    rows = {name: vbench.with_totals(scores) for name, scores in models.items()}
    if config.papers:
        rows = vbench.published() | rows
    print(vbench.tables(rows, config.table or config.partial))
    return rows


# ---- python evaluate.py compare ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CompareConfig:
    """The options of `evaluate.py compare`."""
    folders: tuple[str, ...] = ()       # two folders of .mp4 clips of the same names; FOLDER or NAME=FOLDER
    out: str = "compare.html"           # the page; it needs no server and no network
    seed: Seed = 0                      # of the sides and of the order of the pairs
    pairs: Size = 0                     # how many pairs the page holds [all; 200 MiB at most]
    first: Size = 0                     # the first of them in the seed's order, to make several pages


def compare(config: CompareConfig) -> None:
    """A self-contained page on which people judge two models blindly, pair by pair. `tally` counts."""
    if len(config.folders) != 2:
        raise ValueError(f"compare takes two folders of clips, not {len(config.folders)}; "
                         "e.g. compare clips/vcm clips/turbo --out page.html")
    if Path(config.out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {config.out}: a page ends in .html")
    a, b = map(judging.named_folder, config.folders)
    if a[0] == b[0]:
        raise ValueError(f"both folders are called {a[0]}; tell the models apart with NAME=FOLDER")

    names, alone = judging.matching(a[1], b[1])
    clips = judging.chosen(names, config.seed, config.first, config.pairs)
    html = judging.page(a, b, clips, config.seed)
    judging.write_page(config.out, html)

    without = f"; without partner: {len(alone)} clips, e.g. {alone[0]}" if alone else ""
    print(f"{config.out}: {len(clips)} pairs, {len(html) / 2 ** 20:.1f} MiB{without}")


# ---- python evaluate.py tally ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TallyConfig:
    """The options of `evaluate.py tally`."""
    votes: tuple[str, ...] = ()         # files that the pages of `compare` saved
    out: str | None = None              # a picture of bars: .svg, .png or .pdf


def tally(config: TallyConfig) -> dict[tuple[str, str], list[judging.Result]]:
    """Win rates per question with Wilson intervals, and the judges' agreement, as Markdown and a picture."""
    if not config.votes:
        raise ValueError("tally takes files of votes, which a page of `compare` saves: tally votes-*.json")
    if config.out:
        plots.check(config.out)
    results = judging.tally(judging.read_votes(config.votes))
    print(judging.as_markdown(results))
    if config.out:
        panels = [((a, "no difference", b), {row.question: (row.a, row.same, row.b) for row in rows})
                  for (a, b), rows in results.items()]
        plots.bars(panels, config.out)
        print(f"\n{config.out}")
    return results


# ---- python evaluate.py curves -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvesConfig:
    """The options of `evaluate.py curves`."""
    logs: tuple[str, ...] = ()          # log.jsonl files of runs, or NAME=FILE
    keys: str = "loss"                  # figures to draw, comma-separated, one panel each
    smooth: Count = 10                  # running mean over this many log lines
    log_scale: bool = False             # logarithmic vertical axis
    out: str = "curves.svg"             # the picture: .svg, .png or .pdf


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl. A half-written last line, of a run that goes on or was killed, is left out."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object: {line:.40}") from error
    if not rows:
        raise ValueError(f"{path}: an empty log")
    return rows


def running_mean(points: list[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """The mean of each value with up to width - 1 before it."""
    values = [y for _, y in points]
    windows = [values[max(0, end - width):end] for end in range(1, len(values) + 1)]
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows)]


def curves(config: CurvesConfig) -> None:
    """Figures of training runs over their steps, from the logs, as a picture."""
    if not config.logs:
        raise ValueError("curves takes log files, e.g. curves a=runs/vcm/log.jsonl b=runs/turbo/log.jsonl")
    plots.check(config.out)

    runs = {}
    for argument in config.logs:
        name, _, path = ("", "", argument) if Path(argument).exists() else argument.rpartition("=")
        name = name or Path(path).resolve().parent.name
        if name in runs:
            raise ValueError(f"two logs are called {name!r}; tell them apart with NAME=FILE")
        runs[name] = read_log(Path(path))

    panels = {}
    for key in config.keys.split(","):
        lines = {name: figures(rows, key, config.log_scale) for name, rows in runs.items()}
        panels[key] = {name: running_mean(points, config.smooth) for name, points in lines.items() if points}
        if not panels[key]:
            known = sorted({name for rows in runs.values() for row in rows for name in row if name != "step"})
            raise ValueError(f"--keys {key}: nothing to draw in these logs; they have {', '.join(known)}")
    plots.curves(panels, config.out, config.log_scale)
    print(config.out)


def figures(rows: list[dict], key: str, positive: bool) -> list[tuple[float, float]]:
    """(step, value) of the rows where the key is a finite number; for a logarithmic axis, a positive one."""
    def drawable(value):
        return isinstance(value, int | float) and math.isfinite(value)

    points = [(row["step"], row[key]) for row in rows if drawable(row.get("step")) and drawable(row.get(key))]
    return [(step, value) for step, value in points if value > 0 or not positive]


# ---- commands ----------------------------------------------------------------------------------------------

COMMANDS = {                            # the word: what it calls, its options, what is typed without a flag
    "shapes": (shapes_table, ShapesConfig, None),
    "score": (score, ScoreConfig, "clips"),
    "vbench": (vbench_table, VBenchConfig, "results"),
    "compare": (compare, CompareConfig, "folders"),
    "tally": (tally, TallyConfig, "votes"),
    "curves": (curves, CurvesConfig, "logs"),
}


@cli.main
def main(argv=None):
    """The first word chooses the command, the rest are its options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] not in COMMANDS:
        raise ValueError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    command, config, positional = COMMANDS[argv[0]]
    command(cli.parse(config, argv[1:], command.__doc__, positional, prog=f"evaluate.py {argv[0]}"))


if __name__ == "__main__":
    main()
