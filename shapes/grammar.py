"""Captions and scenes of the toy world: its words, what they mean, and their numbers. Needs no torch.

A scene is one or two things of different colours, each with a shape and a motion, on a plain background.
`describe` says a scene in the words that the networks were trained on. `understand` reads a caption back, in
these and in many other words ("a ball rolls left"); `fill_in` adds what a caption leaves unsaid; `token_ids`
hands it to the networks in words they know.
"""
import random
import re
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product

from plumbing.errors import UserError

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
        shape, motion = [*SHAPES].index(self.shape), [*MOTIONS].index(self.motion)
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
    phrases = [f"a {thing.colour} {rng.choice(SHAPES[thing.shape])} {rng.choice(MOTIONS[thing.motion])}"
               for thing in things]
    caption = " and ".join(phrases)
    if scene.background and rng.random() < 0.8:
        caption += rng.choice([" on a {} background", " on {}"]).format(scene.background)
    return caption


# ---- words -------------------------------------------------------------------------------------------------

SHAPE_WORDS = sum(SHAPES.values(), [])
VOCABULARY = sorted({*" ".join([*COLOURS, *BACKGROUNDS, *SHAPE_WORDS, *sum(MOTIONS.values(), []),
                                "a and on background"]).split()})
VOCABULARY_SIZE = len(VOCABULARY) + 3   # and 0, which pads, 1, which starts, the largest, which ends
FIRST_WORD = 2                          # the id of VOCABULARY's first
CONTEXT_LENGTH = 24                     # tokens of a caption

HINT = """
  things: red, yellow, green or blue circles (ring, ball, disc), squares (box, cube), triangles; one or two
  motions: moving left, right, up (rising) or down (falling), standing still, growing
  backgrounds: black, gray, white; e.g. "a red circle moving right and a blue square rising on white\""""

# What people type -> words of this world; nothing at all for words that change nothing.
ALSO = {
    "a": "an, the, some, this, something",
    "": "one, thing, object, shape, is, are, that, which, it, its, s, both, please, show me, show, make, "
        "create, generate, video of, clip of, animation of, very, really, big, large, small, little, tiny, "
        "fast, slow, quickly, slowly, bright, dark, light, simple, beautiful, colourful, colorful, "
        "cinematic, realistic, highly detailed, high quality, hd, 4k, 3d",
    "and": "while, with, plus, beside, next to",
    "on": "against, over, in front of",
    "gray": "grey", "background": "backgrounds, backdrop",
    "circle": "circles, ball, balls, disc, discs, disk, disks, round",
    "ring": "rings, hoop, donut",
    "square": "squares", "box": "boxes, cube, cubes, block, blocks", "triangle": "triangles",
    "moving": "move, moves, slide, slides, sliding, roll, rolls, rolling, fly, flies, flying, float, floats",
    "going": "go, goes", "bigger": "larger",
    "left": "to the left, leftward, leftwards, from right to left",
    "right": "to the right, rightward, rightwards, from left to right",
    "up": "upward, upwards, from bottom to top",
    "down": "downward, downwards, from top to bottom",
    "rising": "rise, rises, rises up, rising up, climb, climbs, climbing",
    "falling": "fall, falls, falls down, falling down, drop, drops, dropping, sinks, sinking",
    "growing": "grow, grows, expands, expanding", "getting": "get, gets, becomes, becoming",
    "standing still": "stay, stays, staying, stand, stands, standing, rests, resting, motionless, not moving",
}
MEANS = {phrase: means for means, phrases in ALSO.items() for phrase in phrases.split(", ")}
PHRASES = re.compile(r"\b(" + "|".join(sorted(MEANS, key=len, reverse=True)) + r")\b")
KNOWN = {                               # attribute -> {word: value}
    "colour": {colour: colour for colour in COLOURS},
    "shape": {word: shape for shape, words in SHAPES.items() for word in words},
    "motion": {motion: motion for motion in MOTIONS} | {
        "rising": "up", "falling": "down", "rest": "still", "bigger": "growing"}}
# "a white background", "background white", "on white", "on a white background"; but not "on a white circle"
BACKGROUND = re.compile(
    r"\b(?:on )?(?:a )?({0}) background\b|\bbackground ({0})\b|\bon (?:a )?({0})\b(?! (?:{1}))".format(
        "|".join(BACKGROUNDS), "|".join(SHAPE_WORDS)))


def in_known_words(caption: str) -> str:
    """A caption in words of this world, without punctuation but commas, which mean "and". Raises UserError
    for a word that this world lacks."""
    plain = " ".join(re.sub(r"[^\w\s]|_", " ", caption.lower().replace(",", " and ")).split())
    plain = " ".join(PHRASES.sub(lambda match: MEANS[match[0]], plain).split())
    for word in plain.split():
        if word not in VOCABULARY:
            near = get_close_matches(word, {*VOCABULARY, *MEANS}, 1, 0.7)
            meant = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown word {word!r:.40}{meant}{HINT}")
    mixed = re.search(r"\b({0}) and ({0})\b".format("|".join(COLOURS)), plain)
    if mixed:
        raise UserError(f"{mixed[0]!r}: a thing has one colour")
    return plain


def clauses(text: str) -> list[list[str]]:
    """A caption without its background -> the words of each thing.

    "a" begins a thing, and so does "and" before a colour or a shape; what else follows "and" goes with the
    thing before it ("a red circle on white, moving left")."""
    things, text = [], re.sub(r"\b({}) a\b".format("|".join(COLOURS)), r"\1", text)     # "red something"
    for part in re.split(r"\b(?=a\b)|\band\b", text):
        words = part.split()
        if things and not {"a", *COLOURS, *SHAPE_WORDS} & {*words}:
            things[-1] += words
        elif words not in ([], ["a"]):
            things.append(words)
    return things


def read_thing(clause: list[str]) -> Thing:
    """The thing that a clause asks for. Raises UserError when it asks for none, or for two at once."""
    if {"on", "background", *BACKGROUNDS} & {*clause}:
        raise UserError(f"{' '.join(clause)!r}: things are {', '.join(COLOURS)}; there is one background, "
                        f"{' or '.join(BACKGROUNDS)}")
    values = {}
    for attribute, known in KNOWN.items():
        named = {known[word] for word in clause if word in known}
        if len(named) > 1:
            raise UserError(f"{' '.join(clause)!r} names more than one {attribute}")
        values[attribute] = named.pop() if named else None
    if not any(values.values()):
        raise UserError(f"{' '.join(clause)!r} names no colour, no shape and no motion" + HINT)
    return Thing(**values)


def complete(thing: Thing, taken: set[str], rng: random.Random | None) -> Thing:
    """The thing with a shape, a colour that is not `taken`, and a motion, drawn by rng from the combinations
    that were trained on; without rng the first of them, and its motion may stay unsaid."""
    colours = [thing.colour] if thing.colour else [colour for colour in COLOURS if colour not in taken]
    shapes = [thing.shape] if thing.shape else list(SHAPES)
    motions = [thing.motion] if thing.motion or not rng else list(MOTIONS)
    choices = [Thing(*values) for values in product(colours, shapes, motions)]
    choices = [choice for choice in choices if not choice.held_out] or choices
    return rng.choice(choices) if rng else choices[0]


def say(thing: Thing, clause: list[str]) -> str:
    """A thing in the networks' words, of which the clause chooses some: "a red ring going left"."""
    shape_word = next((word for word in SHAPES[thing.shape] if word in clause), SHAPES[thing.shape][0])
    motions = MOTIONS.get(thing.motion, [""])
    best = max(motions, key=lambda text: len({*text.split()} & {*clause}))      # of equals the first
    return f"a {thing.colour} {shape_word} {best}".strip()


def read_caption(caption: str, rng: random.Random | None = None) -> tuple[Scene, str]:
    """A caption -> the scene it asks for; and a caption for the networks, which were trained on whole things,
    with what is unsaid drawn by rng. Raises UserError for others."""
    text = in_known_words(caption)
    ending = BACKGROUND.search(text)
    background = ending and ending[ending.lastindex]
    thing_words = clauses(BACKGROUND.sub("", text, 1)) or [[]]
    things = tuple(read_thing(clause) for clause in thing_words)
    colours = [thing.colour for thing in things if thing.colour]
    if len(things) > 2 or len(set(colours)) < len(colours):
        raise UserError(f"{'; '.join(map(' '.join, thing_words))}: at most two things, of different colours")

    # whole things for the networks
    taken, phrases = set(colours), []
    for thing, clause in zip(things, thing_words):
        whole = complete(thing, taken, rng)
        taken.add(whole.colour)
        phrases.append(say(whole, clause))
    whole_caption, shown = " and ".join(phrases), background or (rng and rng.choice(BACKGROUNDS))
    if shown:
        long = not background or "background" in ending[0]
        whole_caption += f" on a {shown} background" if long else f" on {shown}"
    return Scene(things, background), whole_caption


def understand(caption: str) -> Scene:
    """The scene that a caption asks for. Raises UserError for anything else."""
    return read_caption(caption)[0]


def fill_in(caption: str, seed: int) -> str:
    """The caption in the networks' words, with what it leaves unsaid drawn from the seed. Raises UserError
    like `understand`."""
    return read_caption(caption, random.Random(f"unsaid {seed} {read_caption(caption)[1]}"))[1]


def token_ids(caption: str) -> list[int]:
    """A caption, or the empty one -> CONTEXT_LENGTH numbers: 0 pads, 1 starts, the largest ends."""
    network_words = read_caption(caption)[1].split() if caption else []
    known = [FIRST_WORD + VOCABULARY.index(word) for word in network_words][:CONTEXT_LENGTH - 2]
    return [1, *known, VOCABULARY_SIZE - 1] + [0] * (CONTEXT_LENGTH - 2 - len(known))
