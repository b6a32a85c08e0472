"""Motion as a reward, on the toy's clips: what moves pays, what the whole picture does pays little."""
import random

import pytest
import torch
import torch.nn.functional as F

import rewards
from plumbing.errors import UserError
from shapes import grammar, world


def rendered(*motions, T=8):
    """Clips of the toy's world, (16, 3, T, 64, 64)."""
    named, rng = zip(("red", "blue"), motions), random.Random(0)
    things = tuple(grammar.Thing(colour, "square", motion) for colour, motion in named)
    return torch.stack([world.render(grammar.Scene(things, "gray"), rng, T) for _ in range(16)])


def motion_of(clips):
    reward = rewards.load("motion")
    return reward(rewards.frames_for(reward, clips.clamp(0, 255).byte()), [""] * len(clips))


def test_motion_pays_for_what_moves():
    assert (motion_of(rendered("still", "still")) < 1e-6).all()
    one, two = motion_of(rendered("left", "still")), motion_of(rendered("left", "up"))
    assert one.min() > 0.3 and two.mean() > one.mean() + 0.05 and two.max() < 1
    assert motion_of(rendered("growing")).min() > 0.1
    assert (motion_of(rendered("left", T=2)) > 0).all()


def test_motion_does_not_pay_for_what_the_whole_picture_does():
    still, moving = rendered("still", "still").float(), motion_of(rendered("left", "still"))
    times = torch.arange(8.)[:, None, None]
    texture = F.interpolate(torch.rand(4, 3, 12, 20), (128, 224), mode="bicubic") * 255
    pan = torch.stack([texture.roll(3 * i, -1) for i in range(8)], 2)
    calm = dict(flicker=still * (1 - 0.4 * (times % 2)), brightness=still * 0.5 + 60 * (times % 2), pan=pan,
                fade=still * (1 - times / 7), noise=still + 20 * torch.randn_like(still))
    for name, clips in calm.items():
        assert motion_of(clips).max() < moving.min() / 4, name


def test_motion_has_a_gradient():
    reward = rewards.load("motion", dtype=torch.bfloat16)           # computes in float32 all the same
    for clips in (rendered("still"), torch.full((1, 3, 8, 64, 64), 128), rendered("left")):
        x = (clips.transpose(1, 2) / 255).requires_grad_()
        score = reward(x, [""] * len(x))
        gradient, = torch.autograd.grad(score.sum(), x)
        assert score.dtype == torch.float32 and gradient.isfinite().all()
    with torch.no_grad():
        assert (reward(x + 0.05 * gradient / gradient.abs().max(), [""] * len(x)) > score).all()
    with pytest.raises(UserError, match="motion has no features"):
        reward.features(x)
