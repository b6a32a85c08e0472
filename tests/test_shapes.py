"""The shapes world: captions, drawing, the oracle, and pretraining at miniature size."""
import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from oracles import sizes
from safetensors.torch import load, save

import rewards
import shapes
from plumbing.errors import UserError
from plumbing.run import Group
from shapes import grammar, pretrain, world
from shapes.grammar import Scene, Thing
from shapes.models import TOY, SpaceTime, UNet, tokenize


def scenes(count, held_out):
    for i in range(count):
        rng = random.Random(f"test {held_out} {i}")
        scene = grammar.draw_scene(rng, held_out)
        yield scene, grammar.describe(scene, rng), world.render(scene, rng)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_oracle_reads_what_was_drawn(held_out):
    """On at least 99.5 % of 400 clips everything is right; the overlap with the ideal shapes is almost 1."""
    drawn = list(scenes(400, held_out))
    verdicts = [world.judge(scene, clip) for scene, _, clip in drawn]
    assert sum(v["all"] for v in verdicts) >= 0.995 * len(verdicts)
    assert sum(v["quality"] for v in verdicts) / len(verdicts) > 0.98
    for (T, size), (scene, _, _) in zip([(16, 64), (8, 96)] * 20, drawn):
        clip = world.render(scene, random.Random(0), T, size)
        assert clip.shape == (3, T, size, size) and world.judge(scene, clip)["all"]


def test_the_oracle_sees_every_kind_of_mistake():
    scene = Scene((Thing("red", "circle", "right"), Thing("blue", "square", "up")), "white")
    clip = world.render(scene, random.Random(0))
    wrong = {
        "colour": Scene((Thing("green", "circle", "right"), Thing("blue", "square", "up")), "white"),
        "shape": Scene((Thing("red", "triangle", "right"), Thing("blue", "square", "up")), "white"),
        "motion": Scene((Thing("red", "circle", "left"), Thing("blue", "square", "up")), "white"),
        "background": Scene(scene.things, "black"),
    }
    assert world.judge(scene, clip)["all"] == 1
    for name, asked in wrong.items():
        verdict = world.judge(asked, clip)
        verdict.pop("quality")
        assert verdict == {question: float(question not in (name, "all")) for question in verdict}

    # Right attributes, wrong things; one thing too many; played backwards; no background asked for
    swapped = Scene((Thing("red", "square", "right"), Thing("blue", "circle", "up")), "white")
    verdict = world.judge(swapped, clip)
    assert verdict["shape"] == 1 and verdict["all"] == 0
    assert world.judge(Scene(scene.things[:1], "white"), clip)["all"] == 0
    assert world.judge(scene, clip.flip(1))["motion"] == 0
    assert world.judge(Scene(scene.things), clip)["all"] == 1

    # Noise and a flat picture
    noise = torch.randint(0, 256, clip.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for nothing in (noise, torch.full_like(clip, 240)):
        assert world.judge(Scene((Thing("red", "circle", "right"),), "white"), nothing)["all"] == 0


def test_captions_are_understood():
    for held_out in (False, True):
        for scene, caption, _ in scenes(200, held_out):
            understood = grammar.understand(caption)
            assert set(understood.things) == set(scene.things)
            assert understood.background in (None, scene.background)
            assert all(thing.held_out == held_out for thing in scene.things)
    asked = grammar.understand("A red circle moving right, and a blue square moving up!")
    assert asked == Scene((Thing("red", "circle", "right"), Thing("blue", "square", "up")))


SAYS = {
    "a red circle": ([("red", "circle", None)], None),
    "something blue falls": ([("blue", None, "down")], None),
    "A ball rolls left, a grey backdrop.": ([(None, "circle", "left")], "gray"),
    "the green triangle stays in front of a black background": ([("green", "triangle", "still")], "black"),
    "a red circle that moves to the left while a blue cube goes upward on white":
        ([("red", "circle", "left"), ("blue", "square", "up")], "white"),
    "a red circle on a white background moving left": ([("red", "circle", "left")], "white"),
    "white background, a red circle, rising": ([("red", "circle", "up")], "white"),
    "a red circle rising, background white": ([("red", "circle", "up")], "white"),
    "red something on black going left": ([("red", None, "left")], "black"),
    "red left": ([("red", None, "left")], None),
    "boxes rise": ([(None, "square", "up")], None),
    "a red circle moving": ([("red", "circle", None)], None),
}


@pytest.mark.parametrize("caption", SAYS)
def test_what_people_type_is_understood(caption):
    things, background = SAYS[caption]
    scene, again = grammar.read_caption(caption)
    assert scene == Scene(tuple(Thing(*thing) for thing in things), background)
    told = grammar.understand(again)
    assert told.background == background
    assert all(value in (None, getattr(whole, name)) for thing, whole in zip(scene.things, told.things)
               for name, value in vars(thing).items())
    assert set(again.split()) <= set(grammar.VOCABULARY)
    assert all(thing.colour and thing.shape for thing in told.things)


@pytest.mark.parametrize("caption, complaint", [
    ("a red dog moving left", "unknown word 'dog'\n  things: red"), ("two circles", "unknown word 'two'"),
    ("a red circel rising", "'circel', did you mean circle?"), ("a red ball rigth", "did you mean right?"),
    ("a purple ring", "unknown word 'purple'\n  things: red"), ("a red ball shrinking", "'shrinking'"),
    ("a red blue circle rising", "more than one colour"), ("a red and blue circle", "one colour"),
    ("a red circle moves left and grows", "more than one motion"), ("a circle square", "more than one shape"),
    ("a red circle on black and white", "one background, black"), ("a white circle", "one background, black"),
    ("a ball on red", "things are red"), ("a and a", "names no colour"), ("", "names no colour"),
    ("a red circle rising and a red square rising", "different colours"),
    ("a red ball, a blue ball, a green ball", "at most two things")])
def test_other_captions_get_a_hint(caption, complaint):
    """Of four short lines at most."""
    with pytest.raises(UserError, match=complaint.replace("?", "[?]")) as error:
        grammar.understand(caption)
    lines = str(error.value).splitlines()
    assert len(lines) in (1, 4) and max(map(len, lines)) <= 110


def test_what_is_unsaid_is_drawn_from_the_seed():
    """All of it, nothing held-out, each value for some seed; what is said stays."""
    drawn = set()
    for seed in range(200):
        caption = grammar.fill_in("show me something red and a very big triangle falling", seed)
        scene = grammar.understand(caption)
        first, second = scene.things
        assert first.colour == "red" != second.colour
        assert (second.shape, second.motion) == ("triangle", "down")
        assert not first.held_out and not second.held_out
        assert grammar.fill_in(caption, seed + 1) == caption
        drawn |= {first.shape, first.motion, second.colour, scene.background}
    assert drawn == {*grammar.SHAPES, *grammar.MOTIONS, *grammar.BACKGROUNDS, "yellow", "green", "blue"}
    assert grammar.fill_in("a red  RING", 3) == grammar.fill_in("the red ring.", 3)


def test_networks_get_the_words_they_know():
    """Captions in the training's own words reach the networks unchanged, others in these words."""
    for held_out in (False, True):
        for _, caption, _ in scenes(100, held_out):
            assert grammar.read_caption(caption)[1] == caption
    ids = grammar.token_ids("a red circle moving left")
    assert grammar.token_ids("The red ball slides to the left.") == ids
    ids = tokenize(["a red circle rising", ""])
    assert ids.shape == (2, 24) and ids[0, 0] == ids[1, 0] == 1
    assert ids[0].argmax() == 5 and ids[1].argmax() == 1                # the end has the largest id
    assert ids.max() == grammar.VOCABULARY_SIZE - 1 and (ids[0, 6:] == 0).all()


def test_the_grammar_needs_no_torch():
    """So that an unknown word is complained about at once."""
    code = "import sys, shapes, shapes.grammar; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_what_is_unsaid_is_not_judged():
    scene = Scene((Thing("red", "circle", "right"), Thing("blue", "square", "up")), "white")
    clip = world.render(scene, random.Random(0))
    for caption, right in {
            "a red circle and a blue square": 1, "something red and something blue": 1, "a red circle": 0,
            "a ball slides right and something rises on white": 1, "a red square and a blue square": 0,
            "a ball rises and a box slides right": 0, "a red circle and a blue square on black": 0}.items():
        assert world.judge(grammar.understand(caption), clip)["all"] == right


def test_measuring_what_is_free():
    """Place, size and way of a thing as they were drawn, to half a pixel of 64."""
    for i in range(20):
        rng = random.Random(i)
        scene = grammar.draw_scene(rng, pairs=0)
        state = rng.getstate()
        x, y, radius = world.draw_path(scene.things[0], rng, 8, 64)
        rng.setstate(state)
        clip = world.render(scene, rng)
        ((colour, path),), level = world.tracks(clip).items(), world.things_in(clip)[1]

        drawn = [x.mean(), y.mean(), radius.mean(), x[-1] - x[0], y[-1] - y[0], radius[-1] - radius[0]]
        read = [*path.mean(1), *world.change(path)]
        assert colour == scene.things[0].colour and level == world.GRAY[scene.background]
        assert all(abs(a.item() - 64 * b) < 0.6 for a, b in zip(drawn, read))


def test_held_out_combinations_leave_every_pair_to_be_seen():
    values = dict(colour=grammar.COLOURS, shape=grammar.SHAPES, motion=grammar.MOTIONS)
    everything = [Thing(*combination) for combination in product(*values.values())]
    trained = [thing for thing in everything if not thing.held_out]
    assert len(trained) == len(everything) * 5 / 6
    for a, b in combinations(values, 2):
        seen = {(getattr(thing, a), getattr(thing, b)) for thing in trained}
        assert seen == {*product(values[a], values[b])}


def test_clips_are_the_same_each_time():
    clips = shapes.Clips()
    a, b, c = clips.get(5), clips.get(5), shapes.Clips("held-out").get(5)
    assert torch.equal(a["clip"], b["clip"]) and a["caption"] == b["caption"]
    assert not torch.equal(a["clip"], c["clip"])


def test_variations_differ_in_one_respect():
    for i in range(100):
        rng = random.Random(i)
        scene = grammar.draw_scene(rng)
        other = pretrain.variation(scene, rng, ["colour", "shape", "motion"])
        assert other.background == scene.background and set(other.things) != set(scene.things)
        changed = {name for name in ("colour", "shape", "motion")
                   if [getattr(t, name) for t in scene.things] != [getattr(t, name) for t in other.things]}
        assert len(changed) == 1 and not any(t.held_out for t in other.things)


def test_the_vae_keeps_what_was_drawn():
    """Through the VAE and back, clips are still all right."""
    vae, drawn = shapes.load_vae(), list(scenes(60, held_out=False))
    clips = torch.stack([clip for _, _, clip in drawn]).float() / 127.5 - 1
    with torch.no_grad():
        back = ((vae.decode(vae.encode(clips)).clamp(-1, 1) + 1) * 127.5).byte()
    right = [world.judge(scene, clip)["all"] for (scene, _, _), clip in zip(drawn, back)]
    assert sum(right) >= 0.9 * len(right)


@pytest.mark.parametrize("kind, question", [
    ("image", "colour"), ("image", "shape"), ("video", "colour"), ("video", "shape"), ("video", "motion"),
    ("video", "whose motion")])
def test_the_rewards_know_this_world(kind, question):
    """Each prefers a clip's caption to one with an attribute changed, or two things' motions exchanged."""
    reward = shapes.rewards()[kind]
    if question == "whose motion":
        pairs = [grammar.draw_scene(random.Random(i), pairs=1) for i in range(100)]
        asked = [scene for scene in pairs if len({thing.motion for thing in scene.things}) == 2]
        others = [Scene((replace(a, motion=b.motion), replace(b, motion=a.motion)), scene.background)
                  for scene in asked for a, b in [scene.things]]
    else:
        asked = [scene for scene, _, _ in scenes(60, held_out=False)]
        others = [pretrain.variation(scene, random.Random(i), [question]) for i, scene in enumerate(asked)]

    clips = torch.stack([world.render(scene, random.Random(i)) for i, scene in enumerate(asked)])
    frames = rewards.frames_for(reward, clips)
    captions, wrong_captions = ([grammar.describe(scene, random.Random(i)) for i, scene in enumerate(which)]
                                for which in (asked, others))
    right, wrong = reward(frames, captions), reward(frames, wrong_captions)
    assert (right > wrong).float().mean() >= 0.9


def test_each_thing_has_a_state_of_its_own():
    """Whatever stands beside it and wherever it stands, and so has the background; articles say nothing."""
    def states(caption):
        return text.things(tokenize([caption]))[0]

    text = shapes.load_text()
    circle, square = "a red circle moving right", "a blue square rising"
    one, other, background = states(f"{circle} and {square} on a black background")
    torch.testing.assert_close(states(f"{square} and {circle}")[:2], torch.stack([other, one]))
    torch.testing.assert_close(states(circle), torch.stack([one, 0 * one, 0 * one]))
    torch.testing.assert_close(states("a green circle on a black background")[2], background)
    assert len({tuple(x.tolist()) for x in (one, other, background)}) == 3
    assert not states("").any()

    whole = text([circle, ""])
    assert whole.shape == (2, 51, 128) and torch.equal(whole[0, -3:], states(circle))


def fitted(out, group=None, fail_at=None, steps=4):
    """The weights of a convolution after `steps` steps of pretraining, of which one may fail."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    def loss_of(rng, progress):
        if fail_at == round(progress * steps):
            raise KeyboardInterrupt
        return (layer(torch.randn(2, 3, 4, 4)).sin() - rng.random()).pow(2).mean()

    pretrain.fit(layer, loss_of, out, steps, group or Group())
    return layer.weight.detach().clone()


def test_pretraining_resumes_exactly(tmp_path, monkeypatch):
    """4 steps in one go, and 2, a crash in the third, 2 more: the same weights, bit for bit, and log."""
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    whole, parts = tmp_path / "line", tmp_path / "parts" / "line"
    with pytest.raises(KeyboardInterrupt):
        fitted(parts, fail_at=2)
    assert torch.equal(fitted(parts), fitted(whole))
    rows = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["loss"] >= 0 for row in rows)
    (parts / "checkpoint-0000004.pt").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(UserError, match="checkpoint-0000004.pt is not a whole checkpoint"):
        fitted(parts)


def test_a_group_of_processes_trains_the_same_weights(tmp_path):
    """Two processes with the same batch are one, also for weights that are channels-last in memory."""
    class Twins(Group):
        def sum(self, x):
            self.world_size = 2
            return x.mul_(2)

    assert torch.equal(fitted(tmp_path / "1" / "line"), fitted(tmp_path / "2" / "line", Twins()))


@pytest.mark.parametrize("typed, message", [
    ("--stage unet", "invalid choice"), ("--steps 5", "unknown option --steps"),
    ("--stage viclip --out {0}", "{0}/clip.safetensors: no such file"),
    ("--stage teacher --out {0}", "{0}/vae.safetensors: no such"), ("--out {0}/file/runs", "{0}/file/runs")])
def test_pretraining_complains_in_one_line(typed, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        pretrain.main(typed.format(tmp_path).split())
    lines = capsys.readouterr().err
    assert stop.value.code == 2 and message.format(tmp_path) in lines and lines.count("\n") == 1


@pytest.mark.parametrize("name, content, message", [
    ("teacher", None, "teacher.safetensors: no such file"),
    ("vae", lambda whole: (shapes.WEIGHTS / "clip.safetensors").read_bytes(), "is not the toy's VAE"),
    ("vae", lambda whole: save(load(whole)), "vae.safetensors is not the toy's VAE"),       # without a header
    ("vae", lambda whole: whole[:-100], "vae.safetensors")])
def test_wrong_toy_weights_are_named(name, content, message, tmp_path):
    for file in shapes.WEIGHTS.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / f"{name}.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if content:
        path.write_bytes(content(whole))
    with pytest.raises(UserError, match=message):
        shapes.load(folder=tmp_path)


def test_spacetime_tells_frames_apart():
    """Without it the architecture cannot: on equal frames every frame gets the same ε, but at the zero-padded
    ends. The toy is told in the first features, with the timestep and in each attention over the clip, and
    each is enough."""
    torch.manual_seed(0)
    unet = UNet(replace(TOY, **sizes(32, res_blocks=1, attention_levels=(0,)), head_dim=8, context_dim=24,
                        spacetime=16)).eval()
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    told = [m for m in unet.modules() if isinstance(m, SpaceTime)]
    voices = [m.out.weight.detach().clone() for m in told]
    z = torch.randn(1, 4, 1, 8, 8).expand(-1, -1, 40, -1, -1)
    t, c = torch.tensor([300]), torch.randn(1, 6, 24)
    with torch.no_grad():
        for heard in [None, *told]:
            for m, voice in zip(told, voices):
                m.out.weight.copy_(voice if m is heard else 0 * voice)
            eps = unet(z, t, c)
            difference = (eps[:, :, 19] - eps[:, :, 20]).abs().max()
            assert (difference <= 1e-5 * eps[:, :, 20].abs().max()) == (heard is None)
    assert unet.spacetime(c, 40, 8, 8).shape == (1, 2560, 32)
    assert unet.frametime(c, 40).shape == (1, 40, 128)


def test_the_teacher_of_motion_guidance_is_of_the_published_form():
    """Each pixel of a frame looks at its own T frames, which G reads; nothing tells it where it is."""
    models = shapes.load(name="shapes-motion")
    assert not any(isinstance(module, (UNet, SpaceTime)) for module in models.unet.modules())
    z, t, c = torch.randn(1, 8, 8, 8, 8), torch.tensor([700]), models.text(["a red ring moving left"])
    with torch.no_grad():
        eps, maps = models.unet.with_maps(z, t, c)
    assert eps.shape == z.shape and [A.shape[-2:] for A in maps] == [(8, 8)] * 4
