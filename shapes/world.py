"""The shapes world: clips drawn by a program, and an oracle that reads them. The toy's WebVid and its VBench.

Captions (grammar.py) say what happens, never where: place, size and speed are free. Clips are uint8
(3, T, 64, 64). The oracle measures pixels (hue, area, centroid, overlap with ideal shapes); no model sees it.
"""
import math
import random
from itertools import permutations

import torch
from torch import Tensor

from shapes import grammar
from shapes.grammar import BACKGROUNDS, COLOURS, PAIRS, SHAPES, Scene, Thing

SIZE, FRAMES = 64, 8
ATTRIBUTES = ("colour", "shape", "motion")
RGB = {"red": (225, 35, 35), "yellow": (225, 215, 35), "green": (35, 190, 35), "blue": (40, 60, 230)}
HUE = {"red": 0.0, "yellow": 1.0, "green": 2.0, "blue": 3.9}        # in sixths of a turn
GRAY = {"black": 16, "gray": 110, "white": 240}
RING = math.sqrt(4 / 3)                 # outer radius of the ring that has the area of a unit disc
DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
             "still": (0, 0), "growing": (0, 0)}


# ---- drawing -----------------------------------------------------------------------------------------------

def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel at (x, y) from the centre a shape covers, 0..1: a ring, a square or a triangle
    with the area of a disc of that radius."""
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


def pixel_grid(size: int) -> tuple[Tensor, Tensor]:
    """Column and row of every pixel's centre."""
    axis = torch.arange(size) + 0.5
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


def touch(path0: tuple[Tensor, ...], path1: tuple[Tensor, ...]) -> bool:
    """Do two things ever touch, or almost?"""
    (x0, y0, r0), (x1, y1, r1) = path0, path1
    return bool((torch.hypot(x0 - x1, y0 - y1) <= 1.25 * (r0 + r1) + 1).any())


def render(scene: Scene, rng: random.Random, T: int = FRAMES, size: int = SIZE) -> Tensor:
    """Scene -> clip uint8 (3, T, size, size). Paths are drawn again until things never touch."""
    paths = [draw_path(thing, rng, T, size) for thing in scene.things]
    while len(paths) == 2 and touch(*paths):
        paths = [draw_path(thing, rng, T, size) for thing in scene.things]

    clip = torch.full((3, T, size, size), float(GRAY[scene.background or rng.choice(BACKGROUNDS)]))
    column, row = pixel_grid(size)
    for thing, path in zip(scene.things, paths):
        x, y, radius = (p[:, None, None] for p in path)
        cover = coverage(thing.shape, column - x, row - y, radius)          # (T, H, W)
        clip += cover * (torch.tensor(RGB[thing.colour])[:, None, None, None] - clip)
    return clip.round().byte()


# ---- the oracle --------------------------------------------------------------------------------------------

def things_in(clip: Tensor) -> tuple[dict[str, Tensor], float | None]:
    """The masks, bool (T, H, W), of the things in a clip by colour, told by hue; the gray level of the rest.

    A colour counts as a thing when it fills at least 40 pixels (of 64 x 64) in all frames but one."""
    rgb = clip.cpu().float()
    high, low = rgb.amax(0), rgb.amin(0)
    chroma = high - low

    r, g, b = rgb                                           # hue in sixths of a turn
    span = chroma + 1e-6
    green_or_blue = torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4)
    hue = torch.where(high == r, (g - b) / span % 6, green_or_blue)

    centres = torch.tensor([HUE[colour] for colour in COLOURS])[:, None, None, None]
    distance = ((hue - centres + 3) % 6 - 3).abs()
    masks = (chroma > 85) & (distance == distance.amin(0)) & (distance < 0.6)

    enough = 40 * (clip.shape[-1] / 64) ** 2
    things = {colour: mask for colour, mask in zip(COLOURS, masks)
              if (mask.sum((1, 2)) >= enough).sum() >= len(mask) - 1}
    plain = rgb.mean(0)[chroma < 60]
    return things, plain.median().item() if len(plain) else None


def read_shape(mask: Tensor) -> tuple[str, float]:
    """The shape whose ideal picture, with the mask's area and centroid, overlaps it best; and the IoU."""
    column, row = pixel_grid(mask.shape[-1])
    x, y, radius = (p[:, None, None] for p in track(mask))
    overlaps = {}
    for shape in SHAPES:
        ideal = coverage(shape, column - x, row - y, radius) > 0.5
        overlaps[shape] = ((ideal & mask).sum((1, 2)) / (ideal | mask).sum((1, 2)).clamp(min=1)).mean().item()
    best = max(overlaps, key=overlaps.get)
    return best, overlaps[best]


def track(mask: Tensor) -> Tensor:
    """Centroid x, y and radius (of a disc of the same area) of a mask (T, H, W) per frame: (3, T), pixels."""
    column, row = pixel_grid(mask.shape[-1])
    area = mask.sum((1, 2)).float().clamp(min=1)
    x, y = ((mask * axis).sum((1, 2)) / area for axis in (column, row))
    return torch.stack([x, y, (area / math.pi).sqrt()])


def change(path: Tensor) -> list[float]:
    """Change of x, y and radius of a track (3, T) from first to last frame, by least-squares lines."""
    time = torch.linspace(-0.5, 0.5, path.shape[1])
    return ((path * time).sum(1) / (time ** 2).sum()).tolist()


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


def read(clip: Tensor) -> tuple[Scene, float]:
    """What a clip uint8 (3, T, H, W) shows, and its quality: mean IoU of things with their ideal shapes."""
    masks, level = things_in(clip)
    shapes = {colour: read_shape(mask) for colour, mask in masks.items()}
    things = tuple(Thing(colour, shapes[colour][0], read_motion(mask)) for colour, mask in masks.items())
    quality = sum(overlap for _, overlap in shapes.values()) / max(len(shapes), 1)
    near = [name for name in BACKGROUNDS if level is not None and abs(GRAY[name] - level) < 45]
    return Scene(things, near[0] if near else "none"), quality


def tracks(clip: Tensor) -> dict[str, Tensor]:
    """What captions leave free: `track` of each thing in a clip (3, T, H, W), by colour, in widths."""
    return {colour: track(mask) / clip.shape[-1] for colour, mask in things_in(clip)[0].items()}


def judge(expected: Scene, clip: Tensor) -> dict[str, float]:
    """Is a clip what was asked for? What the caption leaves unsaid (None) is right as it is.

    1 or 0 for colours, shapes, motions (whoever has them), background, and "all": together, each with the
    right thing; and the picture quality, 0..1."""
    actual, quality = read(clip)

    def fits(order: tuple[Thing, ...], names) -> bool:
        return all(getattr(thing, name) in (None, getattr(other, name))
                   for thing, other in zip(expected.things, order) for name in names)

    def right(*names) -> float:
        orders = permutations(actual.things)
        as_many = len(expected.things) == len(actual.things)
        return float(as_many and any(fits(order, names) for order in orders))

    background = float(expected.background in (None, actual.background))
    verdict = {name: right(name) for name in ATTRIBUTES} | {"background": background}
    return verdict | {"all": right(*ATTRIBUTES) * background, "quality": quality}


# ---- clips as data -----------------------------------------------------------------------------------------

class Clips:
    """Captioned clips without end, drawn when asked for, by index: a dataset for `data.loader`."""

    def __init__(self, split: str = "train", frames: int = FRAMES, size: int = SIZE, pairs: float = PAIRS):
        """split: train or held-out combinations; pairs: share of scenes with two things."""
        self.split, self.frames, self.size, self.pairs = split, frames, size, pairs

    def __len__(self) -> int:
        return 1_000_000

    def draw(self, index: int) -> tuple[Scene, str, random.Random]:
        """Scene and caption, and the generator that goes on to draw what they leave open."""
        rng = random.Random(f"{self.split} {index}")
        scene = grammar.draw_scene(rng, self.split == "held-out", self.pairs)
        return scene, grammar.describe(scene, rng), rng

    def caption(self, index: int) -> str:
        """The caption alone; nothing is rendered."""
        return self.draw(index)[1]

    def scene(self, index: int) -> tuple[Scene, str, Tensor]:
        """Scene, caption and clip (3, T, H, W)."""
        scene, caption, rng = self.draw(index)
        return scene, caption, render(scene, rng, self.frames, self.size)

    def get(self, index: int, generator=None) -> dict:
        _, caption, clip = self.scene(index)
        return dict(clip=clip, caption=caption, reward_caption=None, index=index)


def accuracy(generate, count: int = 32, pairs: float = PAIRS) -> float:
    """Share of clips that are all right, for the same captions and seeds each time, half of them held-out.

    generate(captions, seeds) -> clips uint8 (B, 3, T, H, W) on any device."""
    splits = [Clips("train", pairs=pairs), Clips("held-out", pairs=pairs)]
    captions = [split.caption(2 * 10 ** 9 + i) for i in range(count // 2) for split in splits]
    clips = generate(captions, list(range(len(captions))))
    verdicts = [judge(grammar.understand(caption), clip) for caption, clip in zip(captions, clips)]
    return sum(verdict["all"] for verdict in verdicts) / len(verdicts)
