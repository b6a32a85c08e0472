"""Votes of two programs on a page of `evaluate.py compare`, to show what a tally looks like. No person voted.

    PYTHONPATH=. python tests/simulated_votes.py page.html FOLDER     # a page of the toy's clips -> two files

The oracle prefers cleaner shapes, and what has more of the caption right; the toy's two rewards prefer what
they score higher. Small differences are none.
"""
import base64
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import shapes
from plumbing import judging, video
from rewards import frames_for
from shapes import grammar, world


def clip_of(uri: str) -> Tensor:
    """An embedded mp4 as a clip."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(base64.b64decode(uri.partition(",")[2]))
        file.flush()
        return video.read_clip(file.name)


def oracle(prompt: str, clip: Tensor) -> tuple[float, float]:
    """Picture quality, and how many of the oracle's verdicts are right."""
    verdict = world.judge(grammar.understand(prompt), clip)
    quality = verdict.pop("quality")
    return quality, sum(verdict.values())


@torch.no_grad()
def rewarded(prompt: str, clip: Tensor) -> tuple[float, float]:
    """The toy's R_img and R_vid."""
    scorers = [SCORERS["image"], SCORERS["video"]]
    return tuple(scorer(frames_for(scorer, clip[None]), [prompt]).item() for scorer in scorers)


def better(left: float, right: float) -> str:
    """Which side has the larger figure."""
    return "same" if abs(left - right) < 0.01 else "left" if left > right else "right"


def vote(pair: dict, judge) -> dict:
    """A judge's three answers on a pair, as the page saves them."""
    looks, fits = zip(*(judge(pair["prompt"], clip_of(uri)) for uri in pair["clips"]))
    sides = [better(*looks), better(*fits)]
    sides.append(sides[0] if sides[1] == "same" else sides[1])
    other = {"A": "B", "B": "A"}[pair["left"]]
    answers = [{"left": pair["left"], "right": other, "same": "same"}[side] for side in sides]
    return {key: pair[key] for key in ("pair", "prompt", "left")} | dict(answers=answers)


if __name__ == "__main__":
    page, folder = map(Path, sys.argv[1:])
    content = json.loads(re.search(r'id="content">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    SCORERS = shapes.rewards()
    for name, judge in (("oracle", oracle), ("rewards", rewarded)):
        votes = [vote(pair, judge) for pair in content["pairs"]]
        saved = dict(page=content["page"], names=content["names"], judge=f"simulated: {name}",
                     pairs=len(votes), questions=judging.QUESTIONS, votes=votes)
        (folder / f"votes-simulated-{name}.json").write_text(json.dumps(saved, indent=1) + "\n")
