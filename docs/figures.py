"""The pictures of the tutorial in README.md, each made from the embedded toy weights.

    python docs/figures.py                    # all of them, into docs/
    python docs/figures.py guidance jumps     # some
"""
import math
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import imageio.v3 as imageio
import matplotlib
import torch
from torch import Tensor

import shapes
from model import to_clip
from plumbing import cli
from shapes import grammar, world
from solver import Sampling, Schedule, ddim_step, predict_z0
from turbo import Noise, boundary, generate, guided_eps, sample, student_f

matplotlib.use("agg")
from matplotlib import pyplot

PROMPT = "a red circle moving right"
SIZE = (world.FRAMES, world.SIZE, world.SIZE)
TEACHER = Sampling(method="ddim", steps=50, guidance=2.0, on_grid=True)
STUDENT = Sampling(guidance=2.0, grid=8)


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    names: tuple[str, ...] = ()         # of figures [all]
    out: str = "docs"                   # folder that they are written to
    seed: int = 3                       # of every clip, or of the first
    student: str = "turbo"              # of the figure hacked: a file that train.py wrote


# ---- drawing -----------------------------------------------------------------------------------------------


def strips(rows: dict[str, list[Tensor]], titles: list[str] | None = None) -> "pyplot.Figure":
    """A row of pictures uint8 (3, H, W) per label, with column titles above the first one."""
    columns = max(len(pictures) for pictures in rows.values())
    figure, axes = pyplot.subplots(len(rows), columns, squeeze=False, dpi=100,
                                   figsize=(1.6 + 0.95 * columns, 0.25 + 1.0 * len(rows)))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.axis("off")

    for row, (label, pictures) in zip(axes, rows.items()):
        for axis, picture in zip(row, pictures):
            axis.axis("on")
            axis.imshow(picture.permute(1, 2, 0))
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    for axis, title in zip(axes[0], titles or []):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4, w_pad=0.2, h_pad=0.3)
    return figure


def frames(clip: Tensor, every: int = 1) -> list[Tensor]:
    """A clip (3, T, H, W) as a list of pictures."""
    return list(clip[:, ::every].unbind(1))


def as_colours(z: Tensor) -> list[Tensor]:
    """Three channels of latents (C, T, h, w) as pictures, each channel stretched to 0..255."""
    z = z[:3]
    low, high = z.amin((1, 2, 3), True), z.amax((1, 2, 3), True)
    pixels = ((z - low) / (high - low) * 255).byte()
    return frames(pixels.repeat_interleave(8, 2).repeat_interleave(8, 3))


# ---- the figures -------------------------------------------------------------------------------------------


def latents(seed: int) -> "pyplot.Figure":
    """Section 1: a clip, its latents as colours, and the clip that comes back."""
    models = shapes.load()
    clip = shapes.Clips("train").scene(seed)[2]

    z = models.vae.encode(clip[None].float() / 127.5 - 1)
    back = to_clip(models.vae, z)[0]
    return strips({"clip": frames(clip), "latents": as_colours(z[0]), "decoded": frames(back)})


def denoising(seed: int) -> "pyplot.Figure":
    """Section 2: one clip under more and more noise, and the teacher's one-step guess ẑ0 of it."""
    models, schedule = shapes.load(), Schedule()
    _, caption, clip = shapes.Clips("train").scene(seed)
    z0, c = models.vae.encode(clip[None].float() / 127.5 - 1), models.text([caption])
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed))

    noisy, guesses, titles = [], [], []
    for t in (100, 200, 400, 600, 800, 900, 999):
        t = torch.tensor([t])
        z_t = schedule.add_noise(z0, eps, t)
        z0_hat = predict_z0(z_t, models.unet(z_t, t, c), *schedule.at(t))
        noisy.append(to_clip(models.vae, z_t)[0, :, 4])
        guesses.append(to_clip(models.vae, z0_hat)[0, :, 4])
        titles.append(f"t = {t.item()}")
    return strips({"noisy $z_t$": noisy, "guess $\\hat z_0$": guesses}, titles)


def paths(seed: int) -> "pyplot.Figure":
    """Section 3: the same noise walked to a clip in 50, 8 and 4 DDIM steps."""
    models, rows = shapes.load(), {}
    for n in (50, 8, 4, 2):
        z = generate(models, [PROMPT], [seed], SIZE, replace(TEACHER, steps=n))
        rows[f"{n} steps"] = frames(to_clip(models.vae, z)[0])
    return strips(rows, [f"frame {i}" for i in range(world.FRAMES)])


def guidance(seed: int) -> "pyplot.Figure":
    """Section 4: the same noise under growing guidance."""
    models, rows = shapes.load(), {}
    for w in (0.0, 1.0, 2.0, 8.0):
        z = generate(models, [PROMPT], [seed], SIZE, replace(TEACHER, guidance=w, steps=25))
        rows[f"$\\omega$ = {w:g}"] = frames(to_clip(models.vae, z)[0])
    return strips(rows)


def boundaries(seed: int) -> "pyplot.Figure":
    """Section 5: c_skip and c_out, which make f(z, 0) = z whatever the network says."""
    t = torch.linspace(0, 2, 400)
    c_skip, c_out = boundary(t)
    figure, axis = pyplot.subplots(figsize=(5, 2), dpi=100)
    axis.plot(t, c_skip.flatten(), label="$c_{skip}$")
    axis.plot(t, c_out.flatten(), label="$c_{out}$")
    axis.set(xlabel="timestep t (the grid's first point is far to the right: 19 of 999)", ylim=(-0.05, 1.05))
    axis.legend()
    figure.tight_layout()
    return figure


def neighbours(seed: int) -> "pyplot.Figure":
    """Section 5: points on one path of the teacher, its guess at each, and the end that the student sees."""
    teacher, student = shapes.load(), shapes.load("vcm")
    schedule, c = Schedule(8), teacher.text([PROMPT])
    eps_model = guided_eps(teacher.unet, c, teacher.text([""]), TEACHER)
    f = student_f(student.unet, schedule, c, STUDENT)
    z = Noise([seed], (teacher.vae.config.latent, world.FRAMES, 8, 8))()

    guesses, ends, titles = [], [], []
    timesteps = schedule.grid.flip(0).tolist()
    for t, s in zip(timesteps, timesteps[1:] + [0]):
        titles.append(f"t = {t}")
        t, s = torch.tensor([t]), torch.tensor([s])
        with torch.no_grad():
            eps, end = eps_model(z, t), f(z, t)
        guesses.append(to_clip(teacher.vae, predict_z0(z, eps, *schedule.at(t)))[0, :, 4])
        ends.append(to_clip(teacher.vae, end)[0, :, 4])
        z = ddim_step(z, eps, schedule.at(t), schedule.at(s))
    return strips({"teacher's $\\hat z_0$": guesses, "student's $f$": ends}, titles)


def lora(seed: int) -> "pyplot.Figure":
    """Section 7: one jump from the same noise, the student's LoRA off, at half its strength, and on."""
    rows = {}
    for label, scale in (("off: the teacher", 0.0), ("half", 0.5), ("on: the student", 1.0)):
        models = shapes.load("turbo", lora_scale=scale)
        z = generate(models, [PROMPT], [seed], SIZE, replace(STUDENT, steps=1))
        rows[label] = frames(to_clip(models.vae, z)[0])
    return strips(rows)


def hacked(seed: int, student: str = "turbo") -> "pyplot.Figure":
    """Section 8: three clips of T2V-Turbo, and three of a student that climbed the picture reward alone."""
    rows, seeds = {}, [seed, seed + 1, seed + 2]
    for label, turbo in (("$\\beta_{img}$ = 1", "turbo"), ("$\\beta_{img}$ = 50", student)):
        models = shapes.load(turbo)
        clips = to_clip(models.vae, generate(models, [PROMPT] * 3, seeds, SIZE, STUDENT))
        rows |= {f"{label}, seed {number}": frames(clip) for number, clip in zip(seeds, clips)}
    return strips(rows)


def jumps(seed: int) -> "pyplot.Figure":
    """Section 9: what four jumps land on, one after the other."""
    models, seen = shapes.load("turbo"), []
    schedule, c = Schedule(8), models.text([PROMPT])
    f = student_f(models.unet, schedule, c, STUDENT)

    def watched(z, t):
        seen.append((t[0].item(), f(z, t)))
        return seen[-1][1]

    noise = Noise([seed], (models.vae.config.latent, world.FRAMES, 8, 8))
    sample(watched, schedule, noise, schedule.few_steps(4))
    rows = {}
    for number, (t, z0_hat) in enumerate(seen, 1):
        rows[f"jump {number}, from t = {t}"] = frames(to_clip(models.vae, z0_hat)[0])
    return strips(rows)


def attention(seed: int) -> "pyplot.Figure":
    """T2V-Turbo-v2: where a pixel of a noisy clip looks in each frame; of a thing that moves, and of one that
    stands still.

    White: its strongest key in the frame. The mask M of the motion energy keeps the strongest of all frames.
    """
    models, schedule, rows = shapes.load(), Schedule(8), {}
    layer, head, frame, t = -1, 1, 4, torch.tensor([624])   # this head of the last layer follows things
    for motion in ("moving right", "standing still"):
        # a noised clip, and the network's attention in it
        caption = f"a red circle {motion} on gray"
        clip = world.render(grammar.understand(caption), random.Random(seed))
        z0 = models.vae.encode(clip[None].float() / 127.5 - 1)
        eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed))
        _, maps = models.unet.with_maps(schedule.add_noise(z0, eps, t), t, models.text([caption]))

        # that of the token in the middle of the thing; the layer sees w x w tokens a frame
        T = world.FRAMES
        w = math.isqrt(maps[layer].shape[-1] // T)
        centre = world.track(world.things_in(clip)[0]["red"])[:2, frame] * w / world.SIZE
        x, y = centre.int().tolist()
        seen = maps[layer][0, head, (frame * w + y) * w + x].view(T, w, w)

        # drawn
        marked = frames(clip)
        for picture, key in zip(marked, seen.flatten(1).argmax(1).tolist()):
            outline(picture, key % w, key // w, 255, world.SIZE // w)
        outline(marked[frame], x, y, 0, world.SIZE // w)
        rows |= {motion: marked, "its attention" + " " * len(rows): as_heat(seen)}
    return strips(rows, [f"frame {i}" for i in range(T)])


def outline(picture: Tensor, x: int, y: int, level: int, side: int) -> None:
    """Draws the edge of a token, `side` wide, into a picture (3, H, W), in a gray level."""
    pixel = picture[:, y * side:(y + 1) * side, x * side:(x + 1) * side]
    inside = pixel[:, 2:-2, 2:-2].clone()
    pixel[:] = level
    pixel[:, 2:-2, 2:-2] = inside


def as_heat(seen: Tensor) -> list[Tensor]:
    """Attention (T, h, w) as pictures, the largest of all frames brightest."""
    colours = matplotlib.colormaps["magma"]((seen / seen.max()).numpy())[..., :3]      # (T, h, w, 3)
    pixels = torch.from_numpy(colours * 255).byte().permute(0, 3, 1, 2)
    side = world.SIZE // seen.shape[-1]
    return list(pixels.repeat_interleave(side, 2).repeat_interleave(side, 3))


def students(seed: int) -> "pyplot.Figure":
    """Section 11: teacher and students from the same noise."""
    rows, jumps_of_teacher = {}, replace(TEACHER, method="jumps", steps=4, grid=8)
    for name, turbo, sampling in (("teacher, 50 steps", None, TEACHER),
                                  ("teacher, 4 jumps", None, jumps_of_teacher),
                                  ("VCM, 4 jumps", "vcm", STUDENT),
                                  ("T2V-Turbo, 4 jumps", "turbo", STUDENT)):
        models = shapes.load(turbo)
        z = generate(models, [PROMPT], [seed], SIZE, sampling)
        rows[name] = frames(to_clip(models.vae, z)[0])
    return strips(rows)


def loop(out: Path, prompts: list[str], seed: int) -> None:
    """The looping picture at the top of the README: a clip per prompt, side by side, four jumps each."""
    models = shapes.load("turbo")
    seeds = list(range(seed, seed + len(prompts)))
    z = generate(models, prompts, seeds, SIZE, STUDENT)
    clips = to_clip(models.vae, z)
    clips = torch.nn.functional.pad(clips, (2, 2, 2, 2), value=128)
    wide = torch.cat(list(clips), dim=3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    pause = wide[:, -1:].expand(-1, 4, -1, -1)
    imageio.imwrite(out, torch.cat([wide, pause], 1).permute(1, 2, 3, 0).numpy(), duration=125, loop=0)


LOOP = ["a red circle moving right", "a green triangle growing", "a blue square moving up on white",
        "a yellow circle falling on black", "a red triangle moving left on gray"]
FIGURES = {figure.__name__: figure for figure in
           (latents, denoising, paths, guidance, boundaries, neighbours, lora, jumps, attention, students)}
NAMES = (*FIGURES, "loop", "hacked")       # the last one of a student that does not come with the repository


@cli.main
def main(argv=None):
    """Makes the figures that are named, or all."""
    config = cli.parse(Config, argv, __doc__, positional="names")
    unknown = [name for name in config.names if name not in NAMES]
    if unknown:
        raise ValueError(f"no figure {unknown[0]!r}; there are {', '.join(NAMES)}")

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in config.names or (*FIGURES, "loop"):
        path = out / f"{name}.{'gif' if name == 'loop' else 'png'}"
        if name == "loop":
            loop(path, LOOP, config.seed)
        else:
            draw = partial(hacked, student=config.student) if name == "hacked" else FIGURES[name]
            with torch.no_grad():
                draw(config.seed).savefig(path, facecolor="white")
        print(path)


if __name__ == "__main__":
    main()
