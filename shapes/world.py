"""The shapes world: captioned clips drawn by a program, and an oracle that reads clips back. The toy's WebVid and its VBench.

A scene is one or two things, each with a colour, a shape and a motion, on a plain background. Where a thing is, how large it is and
how fast it moves is free: a caption says what happens, never where. Clips are uint8 (3, T, 64, 64).
The oracle measures pixels (hue, area, centroid, overlap with ideal shapes); no model ever sees it.
"""
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE, FRAMES = 64, 8
PAIRS = 0.3                             # how often two things are drawn; a quarter of these have one colour and become one

COLOURS = {"red": (225, 35, 35), "yellow": (225, 215, 35), "green": (35, 190, 35), "blue": (40, 60, 230)}      # hues 0, 60, 120, 240
BACKGROUNDS = {"black": 16, "gray": 110, "white": 240}
SHAPES = {"circle": ["circle", "ring"], "square": ["square", "box"], "triangle": ["triangle"]}
MOTIONS = {
    "left": ["moving left", "going left"], "right": ["moving right", "going right"],
    "up": ["moving up", "rising"], "down": ["moving down", "falling"],
    "still": ["standing still", "at rest"], "growing": ["growing", "getting bigger"],
}
RING = math.sqrt(4 / 3)                 # outer radius of the ring that has the area of a unit disc
DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0), "growing": (0, 0)}


@dataclass(frozen=True)
class Thing:
    """A colour, a shape and a motion, by their names in the tables above."""
    colour: str
    shape: str
    motion: str

    @property
    def held_out(self) -> bool:
        """One in six combinations is never trained on; every pair of attributes is seen."""
        index = [list(table).index(value) for table, value in zip((COLOURS, SHAPES, MOTIONS), (self.colour, self.shape, self.motion))]
        return (index[0] + 2 * index[1] + index[2]) % 6 == 0


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]           # of different colours
    background: str | None = None       # None: the caption does not say


# ---- scenes and their captions -----------------------------------------------------------------------------------------------


def draw_scene(rng: random.Random, held_out: bool = False, pairs: float = PAIRS) -> Scene:
    """A random scene, all of its things from the trained combinations, or all from the held-out ones."""
    things = [Thing(*xs) for xs in ((c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS) if Thing(*xs).held_out == held_out]
    first, second = rng.choice(things), rng.choice(things)
    chosen = (first, second) if rng.random() < pairs and first.colour != second.colour else (first,)
    return Scene(chosen, rng.choice(list(BACKGROUNDS)))


def describe(scene: Scene, rng: random.Random) -> str:
    """One of the scene's captions: things in any order, paraphrased; the background is left unsaid one time in five."""
    things = rng.sample(scene.things, len(scene.things))
    caption = " and ".join(f"a {t.colour} {rng.choice(SHAPES[t.shape])} {rng.choice(MOTIONS[t.motion])}" for t in things)
    if scene.background and rng.random() < 0.8:
        caption += rng.choice([" on a {} background", " on {}"]).format(scene.background)
    return caption


def words(caption: str) -> list[str]:
    """Lower-case words without punctuation."""
    return "".join(c if c.isalnum() else " " for c in caption.lower()).split()


PHRASES = {"colours": list(COLOURS), "shapes": sum(SHAPES.values(), []), "motions": sum(MOTIONS.values(), []),
           "backgrounds": list(BACKGROUNDS)}
VOCABULARY = sorted({w for phrase in sum(PHRASES.values(), ["a and on background"]) for w in words(phrase)})
HINT = ("the shapes world knows " + "; ".join(f"{kind}: {', '.join(phrases)}" for kind, phrases in PHRASES.items())
        + '; e.g. "a red circle moving right and a blue square rising on a white background".'
        + " For anything else there are the real models: --model vc2, --model ms")


def tokenize(captions: list[str], context_length: int = 24) -> Tensor:
    """Captions → ids (B, context_length): 0 pads, 1 starts, the largest id ends. Raises ValueError for a word this world lacks."""
    ids = torch.zeros(len(captions), context_length, dtype=torch.long)
    for row, caption in zip(ids, captions):
        unknown = [w for w in words(caption) if w not in VOCABULARY and w not in ("an", "the")]
        if unknown:
            raise ValueError(f"unknown word {unknown[0]!r}: {HINT}")
        known = [2 + VOCABULARY.index(w) for w in words(caption) if w in VOCABULARY][:context_length - 2]
        row[:len(known) + 2] = torch.tensor([1, *known, len(VOCABULARY) + 2])
    return ids


VOCABULARY_SIZE = len(VOCABULARY) + 3


def understand(caption: str) -> Scene:
    """The scene a caption asks for. Raises ValueError, with what can be said here, when it is not one of this world's captions."""
    tokenize([caption])
    parts = " ".join(words(caption)).split(" and ")
    parts[-1], _, background = parts[-1].partition(" on ")
    things = []
    for part in parts:
        found = [[name for name, texts in table.items() if any(t in part for t in texts)]
                 for table in ({c: [c] for c in COLOURS}, SHAPES, MOTIONS)]
        if any(len(names) != 1 for names in found):
            raise ValueError(f"{part!r} is not one colour, one shape and one motion: {HINT}")
        things.append(Thing(*(names[0] for names in found)))
    if len(things) > 2 or len({t.colour for t in things}) < len(things):
        raise ValueError(f"{caption!r}: at most two things, of different colours; {HINT}")
    return Scene(tuple(things), next((b for b in BACKGROUNDS if b in background), None))


# ---- drawing -----------------------------------------------------------------------------------------------------------------


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel at (x, y) from the centre the shape covers, 0..1: a ring, a full square, a full triangle.
    All shapes of one `radius` have the area of a disc of that radius."""
    if shape == "circle":
        distance = (x ** 2 + y ** 2).sqrt()
        outside = torch.maximum(distance - radius * RING, radius * RING / 2 - distance)            # the hole is half as wide
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2
    else:
        inner = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))                       # of an upright equilateral triangle
        outside = torch.maximum(y, x.abs() * math.sqrt(3) / 2 - y / 2) - inner
    return (0.5 - outside).clamp(0, 1)


def pixel_grid(size: int) -> tuple[Tensor, Tensor]:
    """Column and row of every pixel's centre."""
    axis = torch.arange(size) + 0.5
    return axis[None, :], axis[:, None]


def place(thing: Thing, rng: random.Random, T: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A free path for a thing: centre x, y and radius per frame (T,), inside the picture throughout."""
    unit = size / 64
    progress = torch.linspace(0, 1, T)
    if thing.motion == "growing":
        start, end = rng.uniform(7, 8) * unit, rng.uniform(12, 13.5) * unit
    else:
        start = end = rng.uniform(8.5, 11.5) * unit
    dx, dy = (d * rng.uniform(14, 24) * unit for d in DIRECTION[thing.motion])
    margin = {"circle": RING, "square": 0.89, "triangle": 1.56}[thing.shape] * end     # how far its outermost point lies out
    x = rng.uniform(margin + max(0, -dx), size - margin - max(0, dx))
    y = rng.uniform(margin + max(0, -dy), size - margin - max(0, dy))
    return x + dx * progress, y + dy * progress, start + (end - start) * progress


def render(scene: Scene, rng: random.Random, T: int = FRAMES, size: int = SIZE) -> Tensor:
    """Scene → clip uint8 (3, T, size, size). Things never touch: paths are drawn again until they stay apart."""
    while True:
        paths = [place(thing, rng, T, size) for thing in scene.things]
        if len(paths) == 1:
            break
        (x0, y0, r0), (x1, y1, r1) = paths
        if (((x0 - x1) ** 2 + (y0 - y1) ** 2).sqrt() > 1.25 * (r0 + r1) + 1).all():
            break
    clip = torch.full((3, T, size, size), float(BACKGROUNDS[scene.background or rng.choice(list(BACKGROUNDS))]))
    column, row = pixel_grid(size)
    for thing, path in zip(scene.things, paths):
        cx, cy, radius = (p[:, None, None] for p in path)
        cover = coverage(thing.shape, column - cx, row - cy, radius)                   # (T, H, W)
        clip += cover * (torch.tensor(COLOURS[thing.colour])[:, None, None, None] - clip)
    return clip.round().byte()


# ---- the oracle --------------------------------------------------------------------------------------------------------------


def colour_masks(clip: Tensor) -> tuple[Tensor, str]:
    """Per colour of the world, the pixels that show it, bool (4, T, H, W), by hue; and the background, by the median of the rest."""
    rgb = clip.float()
    high, low = rgb.amax(0), rgb.amin(0)
    chroma = high - low
    r, g, b = rgb
    span = chroma + 1e-6
    hue = torch.where(high == r, (g - b) / span % 6, torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4))
    centres = torch.tensor([0.0, 1.0, 2.0, 3.9])[:, None, None, None]                  # red, yellow, green, blue, in sixths of a turn
    distance = ((hue - centres + 3) % 6 - 3).abs()
    masks = (chroma > 85) & (distance == distance.amin(0)) & (distance < 0.6)
    plain = rgb.mean(0)[chroma < 60]
    level = plain.median().item() if len(plain) else -1000.0
    name = min(BACKGROUNDS, key=lambda k: abs(BACKGROUNDS[k] - level))
    return masks, name if abs(BACKGROUNDS[name] - level) < 45 else "none"


def read_shape(mask: Tensor) -> tuple[str, float]:
    """The shape whose ideal picture, of the mask's own area and centroid in each frame, overlaps it best; and that overlap (IoU)."""
    column, row = pixel_grid(mask.shape[-1])
    area = mask.sum((1, 2)).float().clamp(min=1)[:, None, None]
    x, y = column - (mask * column).sum((1, 2), True) / area, row - (mask * row).sum((1, 2), True) / area
    radius = (area / math.pi).sqrt()
    overlaps = {}
    for shape in SHAPES:
        ideal = coverage(shape, x, y, radius) > 0.5
        overlaps[shape] = ((ideal & mask).sum((1, 2)) / (ideal | mask).sum((1, 2)).clamp(min=1)).mean().item()
    best = max(overlaps, key=overlaps.get)
    return best, overlaps[best]


def read_motion(mask: Tensor) -> str:
    """The motion of a mask (T, H, W), from least-squares lines through its centroid and its radius over time."""
    T, H, W = mask.shape
    column, row = pixel_grid(W)
    area = mask.sum((1, 2)).float().clamp(min=1)
    track = torch.stack([(mask * column).sum((1, 2)) / area, (mask * row).sum((1, 2)) / area, (area / math.pi).sqrt()])
    time = torch.linspace(-0.5, 0.5, T)
    dx, dy, growth = ((track * time).sum(1) / (time ** 2).sum()).tolist()              # change from first to last frame
    unit = W / 64
    if max(abs(dx), abs(dy)) > 7 * unit:
        if min(abs(dx), abs(dy)) > 0.5 * max(abs(dx), abs(dy)):
            return "astray"                                                            # a diagonal: none of this world's motions
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    return "growing" if growth > 2.2 * unit else "shrinking" if growth < -2.2 * unit else "still"


def read(clip: Tensor) -> tuple[Scene, float]:
    """What a clip uint8 (3, T, H, W) shows, and its picture quality: mean overlap of the things found with their ideal shapes.

    A colour counts as a thing when it fills at least 40 pixels (of 64 x 64) in all frames but one.
    """
    masks, background = colour_masks(clip)
    enough = 40 * (clip.shape[-1] / 64) ** 2
    things, overlaps = [], []
    for colour, mask in zip(COLOURS, masks):
        if (mask.sum((1, 2)) >= enough).sum() >= len(mask) - 1:
            shape, overlap = read_shape(mask)
            things.append(Thing(colour, shape, read_motion(mask)))
            overlaps.append(overlap)
    return Scene(tuple(things), background), sum(overlaps) / max(len(overlaps), 1)


def judge(asked: Scene, clip: Tensor) -> dict[str, float]:
    """Is a clip what was asked for? 1 or 0 for colours, shapes, motions (as sets, whoever has them), background, and all together
    with everything bound to the right thing; and the picture quality, 0..1."""
    shown, quality = read(clip)
    same = {name: float(sorted(getattr(t, name) for t in asked.things) == sorted(getattr(t, name) for t in shown.things))
            for name in ("colour", "shape", "motion")}
    same["background"] = float(asked.background in (None, shown.background))
    same["all"] = float(set(asked.things) == set(shown.things) and same["background"])
    return {**same, "quality": quality}
