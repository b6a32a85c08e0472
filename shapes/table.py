"""The toy's table: the teacher against its students, every clip judged by the world's oracle.

A row is a network, a sampler and a number of steps. All rows are asked the same captions with the same seeds,
so that two of them can be compared clip by clip.
"""
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import rewards
import sample
import shapes
from plumbing.errors import UserError
from plumbing.files import MARK, atomic, read_header
from plumbing.run import pick_device
from plumbing.stats import markdown, mean_interval, paired_interval, wilson
from shapes import grammar, world

BATCH = 50                              # clips sampled at once
TAKE = 1_000_000                        # between the seeds of a clip's takes


@dataclass(frozen=True)
class Row:
    """A network, how it is sampled, and in how many steps."""
    name: str
    steps: int
    student: str | None = None          # its file's name, or its folder's; None: the teacher
    model: str = "shapes"               # one of shapes.FAMILIES
    guidance: float = 2.0               # ω
    best_of: int = 1                    # takes of a clip, of which rewards choose one
    refine: int = 0                     # steps in which rewards optimise its noises
    motion: float = 0.0                 # weight of the motion reward beside the other two, for `refine`
    lora_scale: float = 1.0

    @property
    def passes(self) -> int:
        """Evaluations of the UNet for a clip, backward passes not counted; guidance costs the teacher two a
        step, and each step of `refine` runs the sampler twice."""
        once = self.steps * (1 if self.student or not self.guidance else 2)
        return once * self.best_of * (2 * self.refine + 2 if self.refine else 1)


TITLES = {"vcm": "VCM", "turbo": "T2V-Turbo", "v2": "T2V-Turbo-v2"}     # other students: by their names
TEACHERS = [Row(f"DDIM {steps}", steps) for steps in (50, 8, 4, 2)]
TEACHERS += [Row("DDIM without ω 4", 4, guidance=0.0)]
TEACHERS += [Row(f"motion teacher {steps}", steps, model="shapes-motion") for steps in (50, 8, 4)]
TEST_TIME = [
    Row("VCM best-of-16 4", 4, "vcm", best_of=16), Row("VCM refine-15 4", 4, "vcm", refine=15),
    Row("T2V-Turbo refine-15 4", 4, "turbo", refine=15),
    Row("T2V-Turbo motion-15 4", 4, "turbo", refine=15, motion=1.0)]
TEST_TIME += [Row(f"T2V-Turbo LoRA {x:g} 4", 4, "turbo", lora_scale=x) for x in (0, 0.25, 0.5, 0.75, 1.25)]

COLUMNS = ("", "passes", "right, % (95 %)", "one thing", "two things", "motions", "quality", "travel, px",
           "variety, %")


def make(config) -> list[dict]:
    """Measures, prints and stores the rows that an `evaluate.ShapesConfig` asks for; returns their means."""
    folder, device = Path(config.folder or shapes.WEIGHTS), pick_device(config.device)
    rows, scorers, measured = chosen(config.rows, folder), shapes.rewards(device, base_of(folder)), []
    print(markdown(COLUMNS, []))
    for row in rows:
        pairs = config.pairs if row.model == "shapes" else 0.0          # the other teacher saw single things
        measured.append(measure(row, config.clips, pairs, folder, device, scorers))
        *_, line = markdown(COLUMNS, [cells(measured[-1])]).split("\n")
        print(line, flush=True)
        if config.out:
            with atomic(config.out) as temporary:
                temporary.write_text(json.dumps(dict(comment=MARK, rows=measured), indent=1))
    climbs = [f"{row['name']}: reward after 0, 5, ... steps " + ", ".join(map("{:.2f}".format, row["climb"]))
              for row in measured if row["climb"]]
    captions = [[clip["caption"] for clip in row["clips"]] for row in measured]
    others = [row for row, asked in zip(measured[:-1], captions) if asked == captions[-1]]
    print("", *climbs, *(difference(measured[-1], row) for row in others), sep="\n")
    return measured


def base_of(folder: Path) -> Path:
    """Where teachers, VAE and rewards are: there, or for a folder of students alone the embedded ones."""
    own = [folder / f"{name}.safetensors" for name in ("vae", *shapes.FILES.values())]
    return folder if any(file.exists() for file in own) else shapes.WEIGHTS


def chosen(text: str, folder: Path) -> list[Row]:
    """The rows whose name contains one of the texts between commas, in the texts' order; of those whose
    weights are in the folder."""
    students = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*/turbo.safetensors")], reverse=True):
        name = path.stem if path.parent == folder else path.parent.name
        model = read_header(path).get("model")
        if any(row.student == name for row in students):
            raise UserError(f"{folder} holds two students called {name}; rename one")
        if model in shapes.FAMILIES:
            title = TITLES.get(name, name)
            students += [Row(f"{title} {steps}", steps, name, model) for steps in (1, 2, 4, 8)]
    if not students and folder != base_of(folder):
        raise UserError(f"{folder} holds no students of the toy (NAME/turbo.safetensors)")
    rows = []
    for row in (*TEACHERS, *students, *TEST_TIME):
        place = (row.student, folder) if row.student else (shapes.FILES[row.model], base_of(folder))
        rows += [row] if shapes.student(*place).exists() else []

    named = []
    for part in text.lower().split(","):
        matches = [row for row in rows if part.strip() in row.name.lower()]
        if not matches:
            names = ", ".join(row.name for row in rows)
            raise UserError(f"--rows {part.strip()!r}: no row has this in its name; there are {names}")
        named += matches
    return list(dict.fromkeys(named))


# ---- measuring ---------------------------------------------------------------------------------------------

def sampler(row: Row, folder: Path, device: torch.device, climbs: list[Tensor]) -> Callable:
    """The row as a function: captions, seeds -> clips uint8 (B, 3, T, H, W), made as sample.py makes them.
    climbs: gets the rewards (steps + 1, B) that `refine` met on its way."""
    student = str(shapes.student(row.student, folder)) if row.student else None
    motion = [f"motion:{row.motion}"] * (row.motion > 0)
    config = sample.Config(
        model=row.model, method="turbo" if student else "teacher", teacher=str(base_of(folder)),
        turbo=student, lora_scale=row.lora_scale, steps=row.steps, guidance=row.guidance, refine=row.refine,
        best_of=row.best_of if row.best_of > 1 else None, reward=("shapes-clip", "shapes-viclip", *motion),
        device=str(device), dtype="float32")
    models = sample.load_models(config)
    terms, sampling = sample.load_rewards(config, models), sample.sampling_of(models, config)

    def make(captions: list[str], seeds: list[int]) -> Tensor:
        takes = [sample.make(captions, [seed + TAKE * k for seed in seeds], models, terms, sampling, config)
                 for k in range(row.best_of)]
        best = [max(of_one, key=lambda take: take.scores["total"]) for of_one in zip(*takes)]
        climbs.append(torch.tensor([take.scores["climb"] for take in best]).T)
        return torch.stack([take.clip for take in best])

    return make


@torch.no_grad()
def measure(row: Row, count: int, pairs: float, folder: Path, device: torch.device, scorers: dict) -> dict:
    """Samples and judges `count` clips of a row, of trained and of held-out combinations in turn: of each its
    caption, how many things it asks for, the oracle's verdict (0..1 each) and both rewards."""
    clips, climbs = [], []
    make = sampler(row, folder, device, climbs)
    splits = [shapes.Clips(split, pairs=pairs) for split in ("train", "held-out")]
    asked = [(split, grammar.TABLE + i) for i in range(count) for split in splits][:count]
    for start in tqdm(range(0, count, BATCH), row.name, leave=False):
        captions = [split.caption(seed) for split, seed in asked[start:start + BATCH]]
        made = make(captions, [seed for _, seed in asked[start:start + BATCH]])
        image, video = (scorers[kind](rewards.frames_for(scorers[kind], made), captions).tolist()
                        for kind in ("image", "video"))
        for i, (caption, clip) in enumerate(zip(captions, made)):
            scene = grammar.understand(caption)
            split, seed = asked[start + i]
            clips.append(dict(
                split=split.split, seed=seed, caption=caption, things=len(scene.things),
                travel=travel(scene, clip), **world.judge(scene, clip), image=image[i], video=video[i]))
    climb = torch.cat(climbs, dim=1).mean(1)[::5].tolist() if climbs else []
    return dict(name=row.name, steps=row.steps, passes=row.passes, **means(clips), variety=variety(make),
                climb=climb, clips=clips)


def travel(scene: grammar.Scene, clip: Tensor) -> float | None:
    """How far the things go that are to move, in pixels: the toy's Dynamic Degree. None where none is to.

    The world's own things go 14 to 24. A thing that is not there goes nowhere."""
    movers = [thing.colour for thing in scene.things if any(world.DIRECTION.get(thing.motion, ()))]
    lengths = {colour: math.hypot(*world.change(path)[:2]) for colour, path in world.tracks(clip).items()}
    total = clip.shape[-1] * sum(lengths.get(colour, 0.0) for colour in movers)
    return total / len(movers) if movers else None


# ---- variety -----------------------------------------------------------------------------------------------

def variety(make: Callable, captions: int = 8, seeds: int = 8) -> float:
    """How far clips of one caption differ in place (x, y) and size, as a share of the world's own clips: √
    of variances over seeds, captions of one thing together. NaN where nothing is shown twice."""
    variances = []
    for index in range(captions):
        caption = shapes.Clips("train", pairs=0).caption(grammar.TABLE + 10 ** 6 + index)
        scene = grammar.understand(caption)
        worlds = layouts([world.render(scene, random.Random(f"{caption} {i}")) for i in range(64)])
        ours = layouts(make([caption] * seeds, [grammar.TABLE + i for i in range(seeds)]))
        if len(ours) > 1:
            variances.append(torch.stack([ours.var(0), worlds.var(0)]))
    ours, worlds = sum(variances) if variances else torch.full((2, 3), math.nan)
    return (ours / worlds).sqrt().mean().item()


def layouts(clips) -> Tensor:
    """Mean x, y and radius of the thing in each clip that shows one, (N, 3)."""
    things = [[path.mean(1) for path in world.tracks(clip).values()] for clip in clips]
    return torch.tensor([thing.tolist() for thing, *others in filter(None, things) if not others])


# ---- averaging and printing --------------------------------------------------------------------------------

def means(clips: list[dict]) -> dict:
    """Means over a row's clips, by number of things, too; Wilson's 95 % interval of `all`."""
    groups = {key: [clip[key] for clip in clips if clip[key] is not None] for key in
              ("colour", "shape", "motion", "background", "all", "quality", "travel", "image", "video")}
    for name, things in (("one", 1), ("two", 2)):
        groups[name] = [clip["all"] for clip in clips if clip["things"] == things]
    averages = {name: sum(values) / len(values) if values else math.nan for name, values in groups.items()}
    return averages | dict(interval=wilson(averages["all"], len(clips)))


def cells(row: dict) -> list[str]:
    """The printed cells of a row, as in COLUMNS."""
    low, high = row["interval"]
    right = f"{100 * row['all']:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    one, two, motion, variety = (f"{100 * row[key]:.0f}" for key in ("one", "two", "motion", "variety"))
    figures = [one, two, motion, f"{row['quality']:.3f}", f"{row['travel']:.1f}", variety]
    return [row["name"], str(row["passes"]), right, *(x.replace("nan", "-") for x in figures)]


def difference(row: dict, other: dict) -> str:
    """How a row differs from another one clip by clip in what is right, in motions and in travel, with 95 %
    intervals."""
    pairs = list(zip(row["clips"], other["clips"], strict=True))
    gained, lost = (sum(a["all"] - b["all"] == sign for a, b in pairs) for sign in (1, -1))
    low, high = paired_interval(gained, lost, len(pairs))
    text = (f"{row['name']} - {other['name']}: {100 * (gained - lost) / len(pairs):+.1f} points right "
            f"({100 * low:+.1f} to {100 * high:+.1f})")
    motions = [100 * (a["motion"] - b["motion"]) for a, b in pairs]
    text += ", {:+.1f} ± {:.1f} points of motions".format(*mean_interval(motions))
    moved = [a["travel"] - b["travel"] for a, b in pairs if a["travel"] is not None]
    return text + (", {:+.1f} ± {:.1f} px".format(*mean_interval(moved)) if len(moved) > 1 else "")
