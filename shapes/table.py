"""The toy's table: the teacher against its students, every clip judged by the world's oracle.

A row is a network, a sampler and a number of steps. All rows are asked the same captions with the same seeds,
so that two of them can be compared clip by clip.
"""
import functools
import hashlib
import itertools
import json
import math
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import rewards
import shapes
from model import Models, to_clip
from plumbing import stats
from plumbing.files import atomic
from plumbing.run import pick_device, usual_dtype
from shapes import grammar, world
from shapes.models import SAMPLING, TIMESTEPS
from solver import Sampling
from turbo import generate


@dataclass(frozen=True)
class Row:
    """A network, how it is sampled, and in how many steps."""
    name: str
    student: str | None                 # its file; None: the teacher
    method: str                         # as in solver.Sampling
    steps: int
    even: bool = False                  # evenly spaced timesteps instead of the toy's own four

    @property
    def passes(self) -> int:
        """Evaluations of the UNet for a clip; guidance costs the teacher two a step."""
        return self.steps if self.student else 2 * self.steps

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Of few-step sampling: the toy's own where there are four; (): evenly spaced."""
        own = self.method != "ddim" and self.steps == len(TIMESTEPS) and not self.even
        return TIMESTEPS if own else ()

    def sampling(self, guidance: float, teacher_guidance: float, models: Models) -> Sampling:
        """The row's `solver.Sampling`. A student of another grid than the toy's is sampled evenly."""
        if self.student:
            timesteps = self.timesteps if models.sampling.timesteps else ()
            return replace(models.sampling, steps=self.steps, guidance=guidance, timesteps=timesteps)
        teacher = replace(SAMPLING["teacher"], steps=self.steps, guidance=teacher_guidance)
        if self.method == "jumps":                          # as a student
            return replace(teacher, method="jumps", timesteps=self.timesteps, grid=SAMPLING["turbo"].grid)
        return teacher


ROWS = [Row("teacher DDIM", None, "ddim", steps) for steps in (50, 8, 4)]
ROWS += [Row("teacher, few-step sampler", None, "jumps", steps) for steps in (1, 2, 4, 8)]
ROWS += [Row(name, student, "student", steps) for name, student in
         (("VCM", "vcm"), ("VCM seed 1", "vcm-1"), ("VCM seed 2", "vcm-2"),
          ("VCM longer", "vcm-longer"), ("VCM longer seed 1", "vcm-longer-1"),
          ("VCM longer seed 2", "vcm-longer-2"),
          ("VCM + R_img", "vcm-img"), ("VCM + R_vid", "vcm-vid"), ("VCM + both", "vcm-both"),
          ("T2V-Turbo", "turbo"), ("T2V-Turbo seed 1", "turbo-1"), ("T2V-Turbo seed 2", "turbo-2"),
          ("T2V-Turbo-v2", "v2"), ("v2 without motion guidance", "v2-no-mg"),
          ("v2 without rewards", "v2-vcm"), ("v2 + R_img", "v2-img"), ("v2 + R_vid", "v2-vid"),
          ("v2 rewards on all", "v2-all"), ("v2 disjoint", "v2-disjoint"))
         for steps in (1, 2, 4, 8)]
ROWS += [Row(f"{name} even", student, method, 4, even=True) for name, student, method in
         (("teacher, few-step sampler", None, "jumps"), ("VCM", "vcm", "student"),
          ("T2V-Turbo", "turbo", "student"))]

SEEDS = {name: (name, f"{name} seed 1", f"{name} seed 2") for name in ("VCM", "VCM longer", "T2V-Turbo")}
DIFFERENCES = [                         # compared clip by clip: (name, steps) minus (name, steps)
    (("T2V-Turbo", 4), ("VCM", 4)),
    (("T2V-Turbo", 4), ("teacher DDIM", 50)),
    (("VCM", 4), ("teacher DDIM", 50)),
    (("T2V-Turbo", 1), ("VCM", 1)),
    (("T2V-Turbo", 8), ("teacher DDIM", 50)),
    (("T2V-Turbo, mean of seeds", 4), ("VCM, mean of seeds", 4)),
    (("T2V-Turbo, mean of seeds", 4), ("teacher DDIM", 50)),
    (("T2V-Turbo", 4), ("VCM, mean of seeds", 4)),
    (("T2V-Turbo, mean of seeds", 4), ("VCM longer, mean of seeds", 4)),
    (("T2V-Turbo", 4), ("VCM longer, mean of seeds", 4)),
    (("T2V-Turbo", 4), ("VCM longer", 4)),
    (("T2V-Turbo even", 4), ("VCM even", 4)),
    (("T2V-Turbo even", 4), ("teacher DDIM", 50)),
    (("T2V-Turbo", 4), ("T2V-Turbo even", 4)),
    (("VCM", 4), ("VCM even", 4)),
    (("VCM + R_img", 4), ("VCM", 4)),
    (("VCM + R_vid", 4), ("VCM", 4)),
    (("VCM + both", 4), ("VCM", 4)),
    (("T2V-Turbo", 4), ("VCM + both", 4)),
    (("T2V-Turbo-v2", 4), ("v2 without motion guidance", 4)),
    (("T2V-Turbo-v2", 4), ("v2 without rewards", 4)),
    (("v2 + R_img", 4), ("v2 without rewards", 4)),
    (("v2 + R_vid", 4), ("v2 without rewards", 4)),
    (("v2 rewards on all", 4), ("T2V-Turbo-v2", 4)),
    (("v2 disjoint", 4), ("T2V-Turbo-v2", 4)),
]

COMPARED = {                            # heading: figure of a clip, of clips with so many things, its unit
    "all right, points": ("all", (1, 2), 100), "motion, one thing": ("motion", (1,), 100),
    "motion, two things": ("motion", (2,), 100), "quality, hundredths": ("quality", (1, 2), 100),
    "travel, px": ("travel", (1, 2), 1),
}

PERCENT = {                             # a clip's verdicts, or a share of right clips: heading
    "colour": "colour", "shape": "shape", "motion": "motion", "motion one": "motion, one thing",
    "motion two": "motion, two things", "background": "background", "all": "all",
    "train": "all, seen", "held-out": "all, held-out", "one": "all, one thing",
    "two train": "all, two things, seen", "two held-out": "all, two things, held-out",
}
SCORES = {"quality": "quality", "image": "image", "video": "video"}


def make(config) -> list[dict]:
    """Measures, prints and stores the rows that an `evaluate.ShapesConfig` asks for; returns their means."""
    if not (Path(config.folder or shapes.WEIGHTS) / "teacher.safetensors").is_file():
        raise ValueError(f"--folder {config.folder}: no teacher.safetensors of the toy in it")
    rows = chosen(config.rows, config.folder)
    device = pick_device(config.device)
    config = replace(config, dtype=config.dtype or usual_dtype(device))
    stored = Stored(config)
    scorers = shapes.rewards(device, config.folder)
    spread = Spread(config.diversity) if config.diversity else None

    titles = [*PERCENT.values(), *SCORES.values(), "travel"] + ["spread"] * bool(spread)
    print("| | steps | passes | clips | " + " | ".join(titles) + " | s/clip |")
    print("|---" * (len(titles) + 5) + "|")
    means, clips = [], {}
    for row in rows:
        measured = measure(row, config, device, scorers, spread, stored)
        clips[row.name, row.steps] = measured["clips"]
        means.append(average(row, measured))
        print(line(means[-1], bool(spread)), flush=True)

    differences = paired(clips)
    if differences:
        titles = ["same captions and seeds", "clips", *COMPARED]
        print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for cells in differences:
        print("| " + " | ".join(cells) + " |")
    return means


def chosen(text: str, folder: str | None) -> list[Row]:
    """The rows whose name and steps contain one of the texts between commas, in any case.

    A student that was not trained has no row.
    """
    there = [row for row in ROWS if not row.student or shapes.student(row.student, folder).exists()]
    found = set()
    for part in text.split(","):
        matching = {row for row in there if part.lower() in f"{row.name} {row.steps}".lower()}
        if not matching:
            names = ", ".join(dict.fromkeys(row.name for row in there))
            raise ValueError(f"--rows {part!r}: no row's name and steps contain this; there are {names}, "
                             "each with its steps behind it, e.g. \"VCM 4\"")
        found |= matching
    return [row for row in there if row in found]


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(row: Row, config, device: torch.device, scorers: dict, spread: "Spread | None",
            stored: "Stored") -> dict:
    """Samples and judges those of a row's clips that are not stored yet, and stores them as they come.

    -> {"clips": [figures of a clip, ...], "spread": share or None}
    """
    @functools.cache
    def models() -> Models:
        return shapes.load(row.student, config.folder, device)

    def sample(captions: list[str], seeds: list[int]) -> Tensor:
        sampling = row.sampling(config.guidance, config.teacher_guidance, models())
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, config.dtype == "bfloat16"):
            z = generate(models(), captions, seeds, models().size, sampling)
        return to_clip(models().vae, z).cpu()

    # what is asked for, and what there is of it
    wanted = places_of(config)
    kept = stored.row(row)
    there = {(clip["split"], clip["seed"]): clip for clip in kept["clips"]}
    missing = [place for place in wanted if place not in there]

    for start in tqdm(range(0, len(missing), config.batch), f"{row.name} {row.steps}", leave=False):
        places = missing[start:start + config.batch]
        captions = [caption_of(split, seed, config) for split, seed in places]
        began = time.perf_counter()
        shown = sample(captions, [seed for _, seed in places])
        seconds = (time.perf_counter() - began) / len(shown)
        for (split, seed), record in zip(places, judge(captions, shown, scorers), strict=True):
            there[split, seed] = dict(split=split, seed=seed, **record, seconds=seconds)
        kept["clips"] = list(there.values())
        stored.write()

    if spread and kept.get("diversity") != config.diversity:
        kept |= dict(spread=spread.of(sample, config.seed), diversity=config.diversity)
        stored.write()
    return dict(kept, clips=[there[place] for place in wanted])


def places_of(config) -> list[tuple[str, int]]:
    """(split, seed) of each clip, in order: of both splits in turn, those that --split and --things leave."""
    splits = (config.split,) if config.split else ("train", "held-out")
    places = ((split, config.seed + index) for index in itertools.count() for split in splits)
    if config.things:
        places = (place for place in places if things_asked(caption_of(*place, config)) == config.things)
    return list(itertools.islice(places, config.clips))


def caption_of(split: str, seed: int, config) -> str:
    """The caption of a clip: one of the table's."""
    return shapes.Clips(split).caption(grammar.TABLE + seed - config.seed)


def things_asked(caption: str) -> int:
    """How many things a caption asks for."""
    return len(grammar.understand(caption).things)


@torch.no_grad()
def judge(captions: list[str], clips: Tensor, scorers: dict) -> list[dict]:
    """A clip's caption, how many things it asks for, the oracle's verdict (0..1 each) and both rewards."""
    scores = {kind: scorer(rewards.frames_for(scorer, clips), captions).tolist()
              for kind, scorer in scorers.items()}
    records = []
    for i, caption in enumerate(captions):
        asked = grammar.understand(caption)
        verdict = world.judge(asked, clips[i])
        rewarded = {kind: values[i] for kind, values in scores.items()}
        records.append(dict(caption=caption, things=len(asked.things), travel=travel(asked, clips[i]),
                            **verdict, **rewarded))
    return records


def travel(asked: grammar.Scene, clip: Tensor) -> float | None:
    """How far the things go that are to move, in pixels: the toy's Dynamic Degree. None where none is to.

    The world's own things go 14 to 24. A thing that is not there goes nowhere.
    """
    movers = [thing for thing in asked.things if world.DIRECTION.get(thing.motion, (0, 0)) != (0, 0)]
    shown = {thing.colour: math.hypot(thing.dx, thing.dy) for thing in world.measure(clip)[0]}
    if not movers:
        return None
    return clip.shape[-1] * sum(shown.get(thing.colour, 0.0) for thing in movers) / len(movers)


# ---- what the caption leaves open --------------------------------------------------------------------------


class Spread:
    """Diversity: how far clips of one caption differ in what it leaves open, as a share of the world's own.

    Place (x, y), size, speed and, where it is not said, the background's gray: √ of their variance over
    seeds, all captions together. The figure is the mean of the five shares; 1 is the world's own spread.
    """
    SEEDS, DRAWN = 8, 64                # clips a caption of the network, and of the world

    def __init__(self, prompts: int):
        self.captions = self.one_thing(prompts)
        self.world = [[layout(self.draw(caption, i)) for i in range(self.DRAWN)] for caption in self.captions]

    @staticmethod
    def one_thing(count: int) -> list[str]:
        """Captions that ask for one thing, behind those of the table."""
        index, captions, asked = grammar.TABLE + 10 ** 6, [], shapes.Clips("train")
        while len(captions) < count:
            caption = asked.caption(index)
            if things_asked(caption) == 1 and caption not in captions:
                captions.append(caption)
            index += 1
        return captions

    @staticmethod
    def draw(caption: str, number: int) -> Tensor:
        """One of the clips that the world draws for a caption."""
        return world.render(grammar.understand(caption), random.Random(f"spread {caption} {number}"))

    def of(self, sample, seed: int) -> float | None:
        """The share, for sample(captions, seeds) -> clips."""
        shown = []
        for caption in self.captions:
            clips = sample([caption] * self.SEEDS, [seed + i for i in range(self.SEEDS)])
            shown.append([found for found in map(layout, clips) if found])
        return self.share(shown)

    def share(self, shown: list[list[dict]]) -> float | None:
        """Mean of the shares of what is open; shown: layouts per caption. None where no caption has two."""
        sums: dict[str, list[float]] = {}                   # quantity -> variances, ours and the world's
        for caption, theirs, ours in zip(self.captions, self.world, shown):
            if len(ours) < 2:
                continue
            for name in left_open(caption):
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += statistics.variance(found[name] for found in ours)
                total[1] += statistics.variance(found[name] for found in theirs)
        shares = [(ours / theirs) ** 0.5 for ours, theirs in sums.values()]
        return sum(shares) / len(shares) if shares else None


def left_open(caption: str) -> list[str]:
    """What the caption of one thing does not say."""
    asked = grammar.understand(caption)
    moves = world.DIRECTION[asked.things[0].motion] != (0, 0)
    return ["x", "y", "size"] + ["speed"] * moves + ["background"] * (asked.background is None)


def layout(clip: Tensor) -> dict[str, float] | None:
    """Place, size, speed (shares of the width) and background of a clip of one thing; None for others."""
    things, background = world.measure(clip)
    if len(things) != 1 or background is None:
        return None
    thing = things[0]
    speed = math.hypot(thing.dx, thing.dy)
    return dict(x=thing.x, y=thing.y, size=thing.radius, speed=speed, background=background)


# ---- averaging and printing --------------------------------------------------------------------------------


def average(row: Row, measured: dict) -> dict:
    """Means over a row's clips; of the right ones also by split and by number of things; 95 % interval."""
    clips = measured["clips"]

    def right(**wanted):
        return [clip["all"] for clip in clips if all(clip[name] == value for name, value in wanted.items())]

    groups = {"train": right(split="train"), "held-out": right(split="held-out"), "one": right(things=1)}
    for things, name in ((1, "one"), (2, "two")):
        groups[f"motion {name}"] = [clip["motion"] for clip in clips if clip["things"] == things]
    groups["travel"] = [clip["travel"] for clip in clips if clip["travel"] is not None]
    for split in ("train", "held-out"):
        groups[f"two {split}"] = right(things=2, split=split)
    for key in ("colour", "shape", "motion", "background", "all", *SCORES, "seconds"):
        groups[key] = [clip[key] for clip in clips]

    means = {key: sum(values) / len(values) for key, values in groups.items() if values}
    half = stats.mean_interval(groups["all"])[1]
    return dict(name=row.name, steps=row.steps, passes=row.passes, clips=len(clips), half=half,
                spread=measured.get("spread"), **means)


def line(mean: dict, spread: bool) -> str:
    """A row of the Markdown table."""
    cells = [f"{100 * mean[key]:.1f}" if key in mean else "-" for key in PERCENT]
    cells[list(PERCENT).index("all")] += margin(mean["half"])
    cells += [f"{mean[key]:.3f}" for key in SCORES]
    cells.append(f"{mean['travel']:.1f}" if "travel" in mean else "-")
    if spread:
        cells.append("-" if mean["spread"] is None else f"{100 * mean['spread']:.0f}")
    first = [mean["name"], str(mean["steps"]), str(mean["passes"]), str(mean["clips"])]
    return "| " + " | ".join(first + cells) + f" | {mean['seconds']:.3f} |"


def margin(half: float, unit: float = 100, digits: int = 1) -> str:
    """Half of a 95 % interval, in percent or another unit; nothing for a single clip."""
    return "" if math.isnan(half) else f" ± {unit * half:.{digits}f}"


def paired(clips: dict[tuple[str, int], list[dict]]) -> list[list[str]]:
    """What is compared, how many clips, and the mean difference of each of COMPARED, clip by clip, with its
    95 % interval; of the rows that there are."""
    found, clips = [], clips | means_over_seeds(clips)
    for a, b in DIFFERENCES:
        if a not in clips or b not in clips:
            continue
        before = {(clip["caption"], clip["seed"]): clip for clip in clips[b]}
        pairs = [(clip, before[clip["caption"], clip["seed"]]) for clip in clips[a]]
        cells = [f"{a[0]} {a[1]} - {b[0]} {b[1]}", str(len(pairs))]
        for key, things, unit in COMPARED.values():
            gains = [new[key] - old[key] for new, old in pairs
                     if new["things"] in things and new[key] is not None]
            mean, half = stats.mean_interval(gains or [math.nan])
            cells.append(f"{unit * mean:+.1f}{margin(half, unit)}" if gains else "-")
        found.append(cells)
    return found


def means_over_seeds(clips: dict[tuple[str, int], list[dict]]) -> dict[tuple[str, int], list[dict]]:
    """Rows ("NAME, mean of seeds", steps): each figure of COMPARED, of each clip, is the mean over the
    students of one recipe. Of recipes of which at least two students were measured."""
    means = {}
    for name, rows in SEEDS.items():
        for steps in sorted({steps for row, steps in clips if row in rows}):
            measured = [clips[row, steps] for row in rows if (row, steps) in clips]
            if len(measured) > 1:
                same_clip = list(zip(*measured, strict=True))           # as all rows have the same captions
                means[f"{name}, mean of seeds", steps] = [mean_clip(group) for group in same_clip]
    return means


def mean_clip(group: tuple[dict, ...]) -> dict:
    """Means of the figures of a clip that several students made. A figure that the caption leaves out is
    None for all of them."""
    first, figures = group[0], [figure for figure, _, _ in COMPARED.values()]
    assert all((clip["caption"], clip["seed"]) == (first["caption"], first["seed"]) for clip in group)
    means = {key: None if first[key] is None else statistics.mean(clip[key] for clip in group)
             for key in figures}
    return first | means


# ---- the file of rows --------------------------------------------------------------------------------------


class Stored:
    """The measured clips of all rows, in memory and in --out. They count for the options and weights that
    made them; --clips and --diversity may grow."""
    OPTIONS = ("teacher_guidance", "guidance", "seed", "dtype")

    def __init__(self, config):
        if config.out and Path(config.out).suffix != ".json":
            raise ValueError(f"--out {config.out}: rows are stored as .json")
        self.path = Path(config.out) if config.out else None
        self.folder = Path(config.folder or shapes.WEIGHTS)
        self.options = {name: value for name, value in asdict(config).items() if name in self.OPTIONS}
        self.rows: dict[tuple[str, int], dict] = {}
        if self.path and self.path.exists():
            self.read()
        self.write()                                        # a place that cannot be written is found out now

    def read(self) -> None:
        """Takes over the rows of the file, if they were made with these options."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            options, rows = content["options"], {(row["name"], row["steps"]): row for row in content["rows"]}
        except (ValueError, KeyError, TypeError) as error:
            wanted = "rows that `evaluate.py shapes` measured"
            raise ValueError(f"--out {self.path}: holds something else than {wanted}; delete it") from error
        other = [f"--{name.replace('_', '-')} {options.get(name)}" for name, value in self.options.items()
                 if options.get(name) != value]
        if other:
            raise ValueError(f"{self.path} holds rows made with {', '.join(other)}; "
                             "give the same, or another --out")
        self.rows = rows

    def row(self, row: Row) -> dict:
        """What is known of a row, to be added to: nothing, or figures from the very weights of now."""
        weights = self.weights(row)
        known = self.rows.get((row.name, row.steps))
        if not known or known["weights"] != weights:
            known = dict(name=row.name, steps=row.steps, weights=weights, clips=[])
            self.rows[row.name, row.steps] = known
        return known

    def write(self) -> None:
        """Writes the file, if there is to be one."""
        if self.path:
            content = dict(options=self.options, rows=list(self.rows.values()))
            with atomic(self.path) as temporary:
                temporary.write_text(json.dumps(content, indent=1))

    def weights(self, row: Row) -> str:
        """A fingerprint of the files that a row is made from, and of timesteps of its own."""
        files = [self.folder / f"{name}.safetensors" for name in ("teacher", "vae", "clip", "viclip")]
        files += [shapes.student(row.student, self.folder)] if row.student else []
        hashes = [hashlib.sha256(file.read_bytes()).digest() for file in files]
        hashes += [repr(row.timesteps).encode()] if row.timesteps else []
        return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]
