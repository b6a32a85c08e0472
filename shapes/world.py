"""The shapes world: clips drawn by a program, and an oracle that reads them. The toy's WebVid and its VBench.

What a scene is and how captions say it: grammar.py. Where a thing is, how large it is and how fast it moves
is free: a caption says what happens, never where. Clips are uint8 (3, T, 64, 64).
The oracle measures pixels (hue, area, centroid, overlap with ideal shapes); no model ever sees it.
"""
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import torch
from torch import Tensor

from shapes.grammar import (
    BACKGROUNDS,
    COLOURS,
    PAIRS,
    SHAPES,
    Scene,
    Thing,
    describe,
    draw_scene,
    token_ids,
    understand,
)

SIZE, FRAMES = 64, 8
ATTRIBUTES = ("colour", "shape", "motion")
RGB = {"red": (225, 35, 35), "yellow": (225, 215, 35), "green": (35, 190, 35), "blue": (40, 60, 230)}
HUE = {"red": 0.0, "yellow": 1.0, "green": 2.0, "blue": 3.9}        # in sixths of a turn
GRAY = {"black": 16, "gray": 110, "white": 240}
RING = math.sqrt(4 / 3)                 # outer radius of the ring that has the area of a unit disc
DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
             "still": (0, 0), "growing": (0, 0)}


def tokenize(captions: list[str]) -> Tensor:
    """Captions -> ids (B, L). Raises ValueError for what this world cannot say."""
    return torch.tensor([token_ids(caption) for caption in captions])


# ---- drawing -----------------------------------------------------------------------------------------------


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel at (x, y) from the centre a shape covers, 0..1: ring, square or triangle.

    All shapes of one `radius` have the area of a disc of that radius.
    """
    if shape == "circle":
        distance = (x ** 2 + y ** 2).sqrt()
        outer, inner = radius * RING, radius * RING / 2
        outside = torch.maximum(distance - outer, inner - distance)
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2
    else:
        inner = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))       # of an upright equilateral triangle
        outside = torch.maximum(y, x.abs() * math.sqrt(3) / 2 - y / 2) - inner
    return (0.5 - outside).clamp(0, 1)


def pixel_grid(size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Column and row of every pixel's centre."""
    axis = torch.arange(size, device=device) + 0.5
    return axis[None, :], axis[:, None]


def draw_path(thing: Thing, rng: random.Random, T: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A free path for a thing: centre x, y and radius per frame (T,), inside the picture throughout."""
    unit = size / 64
    if thing.motion == "growing":
        start, end = rng.uniform(7, 8) * unit, rng.uniform(12, 13.5) * unit
    else:
        start = end = rng.uniform(8.5, 11.5) * unit
    dx, dy = (d * rng.uniform(14, 24) * unit for d in DIRECTION[thing.motion])

    # The outermost point stays inside.
    margin = {"circle": RING, "square": 0.89, "triangle": 1.56}[thing.shape] * end
    x = rng.uniform(margin + max(0, -dx), size - margin - max(0, dx))
    y = rng.uniform(margin + max(0, -dy), size - margin - max(0, dy))

    progress = torch.linspace(0, 1, T)
    return x + dx * progress, y + dy * progress, start + (end - start) * progress


def apart(paths: list[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Do two things never touch? One thing never does."""
    if len(paths) == 1:
        return True
    (x0, y0, r0), (x1, y1, r1) = paths
    distance = ((x0 - x1) ** 2 + (y0 - y1) ** 2).sqrt()
    return bool((distance > 1.25 * (r0 + r1) + 1).all())


def render(scene: Scene, rng: random.Random, T: int = FRAMES, size: int = SIZE) -> Tensor:
    """Scene -> clip uint8 (3, T, size, size). Paths are drawn again until things never touch."""
    paths = [draw_path(thing, rng, T, size) for thing in scene.things]
    while not apart(paths):
        paths = [draw_path(thing, rng, T, size) for thing in scene.things]

    clip = torch.full((3, T, size, size), float(GRAY[scene.background or rng.choice(BACKGROUNDS)]))
    column, row = pixel_grid(size)
    for thing, path in zip(scene.things, paths):
        x, y, radius = (p[:, None, None] for p in path)
        cover = coverage(thing.shape, column - x, row - y, radius)          # (T, H, W)
        clip += cover * (torch.tensor(RGB[thing.colour])[:, None, None, None] - clip)
    return clip.round().byte()


# ---- the oracle --------------------------------------------------------------------------------------------


def colour_masks(clip: Tensor) -> tuple[Tensor, float | None]:
    """The pixels that show each of COLOURS, bool (4, T, H, W), by hue; and the gray level of the rest."""
    rgb = clip.float()
    high, low = rgb.amax(0), rgb.amin(0)
    chroma = high - low

    # Hue in sixths of a turn
    r, g, b = rgb
    span = chroma + 1e-6
    green_or_blue = torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4)
    hue = torch.where(high == r, (g - b) / span % 6, green_or_blue)

    # Pixels of each colour
    centres = torch.tensor([HUE[colour] for colour in COLOURS], device=clip.device)[:, None, None, None]
    distance = ((hue - centres + 3) % 6 - 3).abs()
    masks = (chroma > 85) & (distance == distance.amin(0)) & (distance < 0.6)

    plain = rgb.mean(0)[chroma < 60]
    return masks, plain.median().item() if len(plain) else None


def read_background(level: float | None) -> str:
    """The background nearest to a gray level, or "none"."""
    if level is None:
        return "none"
    name = min(BACKGROUNDS, key=lambda background: abs(GRAY[background] - level))
    return name if abs(GRAY[name] - level) < 45 else "none"


def read_shape(mask: Tensor) -> tuple[str, float]:
    """The shape whose ideal picture, with the mask's area and centroid, overlaps it best; and the IoU."""
    column, row = pixel_grid(mask.shape[-1], mask.device)
    x, y, radius = (p[:, None, None] for p in track(mask))
    overlaps = {}
    for shape in SHAPES:
        ideal = coverage(shape, column - x, row - y, radius) > 0.5
        overlaps[shape] = ((ideal & mask).sum((1, 2)) / (ideal | mask).sum((1, 2)).clamp(min=1)).mean().item()
    best = max(overlaps, key=overlaps.get)
    return best, overlaps[best]


def track(mask: Tensor) -> Tensor:
    """Centroid x, y and radius (of a disc of the same area) of a mask (T, H, W) per frame: (3, T), pixels."""
    column, row = pixel_grid(mask.shape[-1], mask.device)
    area = mask.sum((1, 2)).float().clamp(min=1)
    x, y = ((mask * axis).sum((1, 2)) / area for axis in (column, row))
    return torch.stack([x, y, (area / math.pi).sqrt()])


def change(path: Tensor) -> tuple[float, float, float]:
    """Change of x, y and radius of a track (3, T) from first to last frame, by least-squares lines."""
    time = torch.linspace(-0.5, 0.5, path.shape[1], device=path.device)
    dx, dy, growth = ((path * time).sum(1) / (time ** 2).sum()).tolist()
    return dx, dy, growth


def read_motion(mask: Tensor) -> str:
    """The motion of a mask (T, H, W); "astray" (a diagonal) and "shrinking" are none of this world's."""
    dx, dy, growth = change(track(mask))
    unit = mask.shape[-1] / 64
    far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))

    if far > 7 * unit and near > 0.5 * far:
        return "astray"
    if far > 7 * unit and abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    if far > 7 * unit:
        return "down" if dy > 0 else "up"
    if abs(growth) > 2.2 * unit:
        return "growing" if growth > 0 else "shrinking"
    return "still"


def things_in(clip: Tensor) -> tuple[dict[str, Tensor], float | None]:
    """The masks, bool (T, H, W), of the things in a clip by colour, and the background's gray level.

    A colour counts as a thing when it fills at least 40 pixels (of 64 x 64) in all frames but one.
    """
    masks, level = colour_masks(clip)
    enough = 40 * (clip.shape[-1] / 64) ** 2
    found = {colour: mask for colour, mask in zip(COLOURS, masks)
             if (mask.sum((1, 2)) >= enough).sum() >= len(mask) - 1}
    return found, level


def read(clip: Tensor) -> tuple[Scene, float]:
    """What a clip uint8 (3, T, H, W) shows, and its quality: mean IoU of things with their ideal shapes."""
    masks, level = things_in(clip.cpu())
    things, overlaps = [], []
    for colour, mask in masks.items():
        shape, overlap = read_shape(mask)
        things.append(Thing(colour, shape, read_motion(mask)))
        overlaps.append(overlap)
    return Scene(tuple(things), read_background(level)), sum(overlaps) / max(len(overlaps), 1)


@dataclass(frozen=True)
class Measured:
    """What a caption leaves free: where a thing is, how large, how far it goes, in shares of the width."""
    colour: str
    x: float                            # mean centre
    y: float
    radius: float                       # mean, of a disc of the same area
    dx: float                           # from the first frame to the last
    dy: float
    growth: float                       # of the radius, from the first frame to the last


def measure(clip: Tensor) -> tuple[list[Measured], float | None]:
    """The free quantities of each thing in a clip uint8 (3, T, H, W), and the background's gray level."""
    clip = clip.cpu()
    masks, level = things_in(clip)
    size, measured = clip.shape[-1], []
    for colour, mask in masks.items():
        path = track(mask)
        figures = [*path.mean(1).tolist(), *change(path)]
        measured.append(Measured(colour, *(figure / size for figure in figures)))
    return measured, level


def fits(asked: Thing, shown: Thing, names: Sequence[str] = ATTRIBUTES) -> bool:
    """Is a thing what was asked for, where anything was?"""
    return all(getattr(asked, name) in (None, getattr(shown, name)) for name in names)


def judge(asked: Scene, clip: Tensor) -> dict[str, float]:
    """Is a clip what was asked for? What the caption leaves unsaid (None) is right as it is.

    1 or 0 for colours, shapes, motions (whoever has them), background, and "all": together, each with the
    right thing; and the picture quality, 0..1.
    """
    shown, quality = read(clip)
    same_count = len(asked.things) == len(shown.things)

    def right(question) -> float:
        orders = permutations(shown.things)
        return float(same_count and any(all(map(question, asked.things, order)) for order in orders))

    verdict = {name: right(partial(fits, names=[name])) for name in ATTRIBUTES}
    verdict["background"] = float(asked.background in (None, shown.background))
    verdict["all"] = float(right(fits) and verdict["background"])
    return {**verdict, "quality": quality}


# ---- clips as data -----------------------------------------------------------------------------------------


class Clips:
    """Captioned clips without end, drawn when asked for, by index: a dataset for `data.loader`."""

    def __init__(self, split: str = "train", frames: int = FRAMES, size: int = SIZE, pairs: float = PAIRS):
        """split: train or held-out combinations; pairs: share of scenes with two things."""
        self.split, self.frames, self.size, self.pairs = split, frames, size, pairs

    def __len__(self) -> int:
        return 1_000_000

    def scene(self, index: int) -> tuple[Scene, str, Tensor]:
        """Scene, caption and clip (3, T, H, W) number `index`."""
        scene, caption, rng = self.draw(index)
        return scene, caption, render(scene, rng, self.frames, self.size)

    def caption(self, index: int) -> str:
        """The caption alone; nothing is rendered."""
        return self.draw(index)[1]

    def draw(self, index: int) -> tuple[Scene, str, random.Random]:
        """Scene and caption, and the generator that goes on to draw what they leave open."""
        rng = random.Random(f"{self.split} {index}")
        scene = draw_scene(rng, self.split == "held-out", self.pairs)
        return scene, describe(scene, rng), rng

    def get(self, index: int, generator=None) -> dict:
        _, caption, clip = self.scene(index)
        return dict(clip=clip, caption=caption, reward_caption=None, index=index)


def accuracy(generate, count: int = 32) -> float:
    """Share of clips that are all right, for the same captions and seeds each time; half of them held-out
    combinations.

    generate(captions, seeds) -> clips uint8 (B, 3, T, H, W) on any device.
    """
    splits = [Clips("train"), Clips("held-out")]
    captions = [split.caption(2 * 10 ** 9 + i) for i in range(count // 2) for split in splits]
    clips = generate(captions, list(range(len(captions))))
    verdicts = [judge(understand(caption), clip) for caption, clip in zip(captions, clips)]
    return sum(verdict["all"] for verdict in verdicts) / len(verdicts)
