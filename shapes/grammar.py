"""Captions and scenes of the toy world: its words, what they mean, and their numbers. Needs no torch.

A scene is one or two things of different colours, each with a shape and a motion, on a plain background.
`describe` says a scene in the words that the networks were trained on. `understand` reads a caption back, in
these and in many other words ("a ball rolls left"); `token_ids` hands it to the networks in words they know,
with a colour and a shape for things that have none ("something falls").
"""
import random
import re
from dataclasses import dataclass
from itertools import product

COLOURS = ("red", "yellow", "green", "blue")
BACKGROUNDS = ("black", "gray", "white")
SHAPES = {"circle": ["circle", "ring"], "square": ["square", "box"], "triangle": ["triangle"]}
MOTIONS = {
    "left": ["moving left", "going left"], "right": ["moving right", "going right"],
    "up": ["moving up", "rising"], "down": ["moving down", "falling"],
    "still": ["standing still", "at rest"], "growing": ["growing", "getting bigger"],
}
PAIRS = 0.3                             # share of scenes with two things; of one colour, they become one
TABLE = 4_000_000_000                   # scenes and seeds from here on: evaluate.py's table, nothing else


@dataclass(frozen=True)
class Thing:
    """A colour, a shape and a motion, by their names in the tables above; None where a caption says none."""
    colour: str | None = None
    shape: str | None = None
    motion: str | None = None

    @property
    def held_out(self) -> bool:
        """One in six combinations is never trained on; every pair of attributes is seen."""
        if None in (self.colour, self.shape, self.motion):
            return False
        shape, motion = list(SHAPES).index(self.shape), list(MOTIONS).index(self.motion)
        return (COLOURS.index(self.colour) + 2 * shape + motion) % 6 == 0


@dataclass(frozen=True)
class Scene:
    """What is asked for, or seen."""
    things: tuple[Thing, ...]           # of different colours
    background: str | None = None       # None: the caption does not say


# ---- scenes and their captions -----------------------------------------------------------------------------


def draw_scene(rng: random.Random, held_out: bool = False, pairs: float = PAIRS) -> Scene:
    """A random scene, all of its things from the trained combinations, or all from the held-out ones."""
    everything = [Thing(*values) for values in product(COLOURS, SHAPES, MOTIONS)]
    things = [thing for thing in everything if thing.held_out == held_out]

    first, second = rng.choice(things), rng.choice(things)
    two = rng.random() < pairs and first.colour != second.colour
    return Scene((first, second) if two else (first,), rng.choice(BACKGROUNDS))


def describe(scene: Scene, rng: random.Random) -> str:
    """One of the scene's captions: things in any order, paraphrased, mostly with the background."""
    things = rng.sample(scene.things, len(scene.things))
    said = [f"a {t.colour} {rng.choice(SHAPES[t.shape])} {rng.choice(MOTIONS[t.motion])}" for t in things]
    caption = " and ".join(said)
    if scene.background and rng.random() < 0.8:
        caption += rng.choice([" on a {} background", " on {}"]).format(scene.background)
    return caption


# ---- words -------------------------------------------------------------------------------------------------


PHRASES = {"colours": list(COLOURS), "shapes": sum(SHAPES.values(), []), "motions": sum(MOTIONS.values(), []),
           "backgrounds": list(BACKGROUNDS)}
VOCABULARY = sorted({*" ".join(sum(PHRASES.values(), ["a and on background"])).split()})
VOCABULARY_SIZE = len(VOCABULARY) + 3   # and 0, which pads, 1, which starts, the largest, which ends
FIRST_WORD = 2                          # the id of VOCABULARY's first
CONTEXT_LENGTH = 24                     # tokens of a caption

KNOWN = "; ".join(f"{kind}: {', '.join(phrases)}" for kind, phrases in PHRASES.items())
HINT = (f"the shapes world knows {KNOWN}"
        + '; e.g. "a red circle moving right and a blue square rising on a white background"')

# What people type -> words of this world; nothing at all for words that change nothing.
ALSO = {
    "a": "an, the, some, this, something",
    "": "one, thing, object, shape, is, are, that, which, it, slowly, quickly, both",
    "and": "while, with, plus, beside, next to",
    "on": "against, over, in front of",
    "gray": "grey",
    "background": "backgrounds, backdrop",
    "circle": "circles, ball, balls, disc, discs, disk, disks, round",
    "ring": "rings, hoop, donut",
    "square": "squares",
    "box": "boxes, cube, cubes, block, blocks",
    "triangle": "triangles",
    "moving": "move, moves, slide, slides, sliding, roll, rolls, rolling, fly, flies, flying, drift, drifts, "
              "drifting, float, floats, floating, travel, travels, travelling, traveling, run, runs, "
              "running, walk, walks, walking",
    "going": "go, goes",
    "left": "to the left, leftward, leftwards",
    "right": "to the right, rightward, rightwards",
    "up": "upward, upwards",
    "down": "downward, downwards",
    "rising": "rise, rises, rises up, rising up, climb, climbs, climbing, ascends, ascending",
    "falling": "fall, falls, falls down, falling down, drop, drops, dropping, sinks, sinking, descends, "
               "descending",
    "growing": "grow, grows, expands, expanding",
    "getting": "get, gets, becomes, becoming",
    "bigger": "larger",
    "standing still": "stay, stays, staying, stays still, staying still, stays put, stand, stands, "
                      "standing, stands still, sit, sits, sitting, sits still, sitting still, stopped, "
                      "motionless, not moving",
    "at rest": "rests, resting",
}
MEANS = {phrase: means for means, phrases in ALSO.items() for phrase in phrases.split(", ")}
LONGEST_FIRST = sorted(["standing still", *MEANS], key=len, reverse=True)
MOTION_WORDS = {"left": "left", "right": "right", "up": "up", "rising": "up", "down": "down",
                "falling": "down", "still": "still", "rest": "still",
                "growing": "growing", "bigger": "growing"}
MOTION_VERBS = {"moving", "going", "getting", "standing", "at"}       # say no motion by themselves


def words(caption: str) -> list[str]:
    """A caption in words of this world: lower case, no punctuation but commas, which mean "and".

    Raises ValueError for a word that this world lacks.
    """
    plain = re.sub(r"[^\w\s]|_", " ", caption.lower().replace(",", " and "))
    said_otherwise = r"\b(" + "|".join(LONGEST_FIRST) + r")\b"
    plain = re.sub(said_otherwise, lambda found: MEANS.get(found[0], found[0]), " ".join(plain.split()))
    for word in plain.split():
        if word not in VOCABULARY:
            raise ValueError(f"unknown word {word!r:.40}: {HINT}")
    mixed = re.search(r"\b({0}) and ({0})\b".format("|".join(COLOURS)), plain)
    if mixed:
        raise ValueError(f"{mixed[0]!r}: a thing has one colour; {HINT}")
    return plain.split()


def clauses(caption: str) -> tuple[list[list[str]], list[str]]:
    """A caption's words -> those of each thing, and those of the background; without "a", "and" and "on".

    "and" and "a" begin a thing, "on" begins the background. What names neither a colour nor a shape, without
    "a", goes with the thing before it ("a red circle on white, moving left").
    """
    # Cut at "and", "on" and "a"; each part with the words that led to it
    parts, leading = [], []
    for word in words(caption):
        if word in ("and", "on", "a"):
            leading.append(word)
        elif leading or not parts:
            parts.append((leading, [word]))
            leading = []
        else:
            parts[-1][1].append(word)

    things, background = [], []
    for leading, part in parts:
        behind = "on" in leading or "background" in part
        if behind:
            background += [word for word in part if word not in {*MOTION_WORDS, *MOTION_VERBS}]
            part = [word for word in part if word in {*MOTION_WORDS, *MOTION_VERBS}]
        a_thing = "a" in leading and not behind or {*COLOURS, *PHRASES["shapes"]} & {*part}
        if things and not a_thing:
            things[-1] += part
        elif part:
            things.append(part)
    return things, background


def the_only(kind: str, found: list[str], clause: list[str]) -> str | None:
    """The one value that a clause names, or None. Raises ValueError when it names two."""
    if len(set(found)) > 1:
        raise ValueError(f"{' '.join(clause)!r:.60} names more than one {kind}: {HINT}")
    return found[0] if found else None


def read_thing(clause: list[str]) -> Thing:
    """The thing that a clause asks for. Raises ValueError when it asks for none, or for two at once."""
    for word in {*BACKGROUNDS} & {*clause}:
        raise ValueError(f"{' '.join(clause)!r:.60}: {word} is a background's colour, not a thing's; {HINT}")
    colour = the_only("colour", [word for word in clause if word in COLOURS], clause)
    shape_word = the_only("shape", [word for word in clause if word in PHRASES["shapes"]], clause)
    motion_word = the_only("motion", [word for word in clause if word in MOTION_WORDS], clause)
    if not (colour or shape_word or motion_word):
        raise ValueError(f"{' '.join(clause)!r:.60} names no colour, no shape and no motion: {HINT}")

    shape = next((name for name, texts in SHAPES.items() if shape_word in texts), None)
    return Thing(colour, shape, MOTION_WORDS.get(motion_word))


def complete(thing: Thing, taken: set[str]) -> Thing:
    """The thing with a shape, and a colour that is not `taken`. Its motion may stay unsaid."""
    colours = [thing.colour] if thing.colour else [colour for colour in COLOURS if colour not in taken]
    shapes = [thing.shape] if thing.shape else list(SHAPES)
    choices = [Thing(colour, shape, thing.motion) for colour, shape in product(colours, shapes)]
    return next((choice for choice in choices if not choice.held_out), choices[0])


def say(thing: Thing, clause: list[str]) -> str:
    """A thing in the networks' words, of which the clause chooses some: "a red ring going left"."""
    shape_word = next((word for word in SHAPES[thing.shape] if word in clause), SHAPES[thing.shape][0])
    motions = MOTIONS.get(thing.motion, [""])
    best = max(motions, key=lambda text: len({*text.split()} & {*clause}))      # of equals the first
    return f"a {thing.colour} {shape_word} {best}".strip()


def read_caption(caption: str) -> tuple[Scene, str]:
    """A caption -> the scene it asks for, and a caption for the networks, which were trained on whole things.

    Raises ValueError, with what can be said here.
    """
    thing_words, background_words = clauses(caption)
    if not thing_words:
        raise ValueError(f"{caption!r:.60} names no colour, no shape and no motion: {HINT}")
    things = tuple(read_thing(clause) for clause in thing_words)
    colours = [thing.colour for thing in things if thing.colour]
    if len(things) > 2 or len(set(colours)) < len(colours):
        raise ValueError(f"{caption!r:.60}: at most two things, of different colours; {HINT}")

    backgrounds = [word for word in background_words if word in BACKGROUNDS]
    background = the_only("background", backgrounds, background_words)
    for word in {*background_words} - {*BACKGROUNDS, "background"}:
        raise ValueError(f"{' '.join(background_words)!r:.60}: {word} is not a background; {HINT}")

    taken, said = set(colours), []
    for thing, clause in zip(things, thing_words):
        whole = complete(thing, taken)
        taken.add(whole.colour)
        said.append(say(whole, clause))
    again = " and ".join(said)
    if background:
        again += f" on a {background} background" if "background" in background_words else f" on {background}"
    return Scene(things, background), again


def understand(caption: str) -> Scene:
    """The scene that a caption asks for; None: left unsaid. Raises ValueError for anything else."""
    return read_caption(caption)[0]


def token_ids(caption: str) -> list[int]:
    """A caption, or the empty one -> CONTEXT_LENGTH numbers: 0 pads, 1 starts, the largest ends.

    Raises ValueError like `understand`.
    """
    said = read_caption(caption)[1].split() if caption else []
    known = [FIRST_WORD + VOCABULARY.index(word) for word in said][:CONTEXT_LENGTH - 2]
    ids = [1, *known, VOCABULARY_SIZE - 1]
    return ids + [0] * (CONTEXT_LENGTH - len(ids))
