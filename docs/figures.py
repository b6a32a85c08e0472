"""The pictures of tutorial.md and of the front page, but for first, demo and too-much-motion, made from the
embedded toy weights.

    python docs/figures.py                                  # all of them, into runs/figures/
    python docs/figures.py guidance jumps --seed 5          # some, with other noise
    python docs/figures.py curves --logs A=runs/a/log.jsonl --logs B=runs/b/log.jsonl   # of training runs
    python docs/figures.py --out docs                       # the committed ones
"""
import io
import json
import random
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch
from PIL import Image
from torch import Tensor

import shapes
import turbo
from model import to_clip
from plumbing import cli
from plumbing.cli import File, Folder, Seed
from plumbing.errors import UserError, reading
from shapes import grammar, world
from shapes.models import SAMPLING
from solver import Schedule, ddim_step, predict_z0

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

SIZE = (world.FRAMES, world.SIZE, world.SIZE)
TEACHER, STUDENT = SAMPLING["teacher"], SAMPLING["turbo"]
BLUE, ORANGE, RED, GRAY = "#2563c9", "#d97706", "#c0262d", "#6b7280"


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    names: tuple[str, ...] = ()         # of figures [all]
    out: Folder = "runs/figures"        # folder that they are written to
    seed: Seed = 3                      # of clips and of noise
    logs: tuple[File, ...] = ()         # of the figure curves: NAME=FILE of a run's log.jsonl, repeatable
    keys: tuple[str, ...] = ("loss_cd", "oracle")   # of the figure curves: numbers in the logs, repeatable


def strips(rows: dict[str, list[list[Tensor]]], titles: list[str], zoom: int = 4, below=False) -> Figure:
    """Pictures uint8 (3, 64, 64), enlarged, a labelled row for each entry, in groups that stand apart.

    titles: one for each group, or one for each picture of a row; above the first row or below the last.
    """
    # where everything goes, in pixels
    side, gap, font = world.SIZE * zoom, 2 * zoom, 6.5 * zoom
    x = left = int(0.58 * font * max(len(line) for label in rows for line in label.split("\n"))) + 4 * gap
    head = int(1.35 * font * (1 + max(title.count("\n") for title in titles))) + gap
    top, columns = gap if below else head, []
    for group in next(iter(rows.values())):
        columns.append([x + i * (side + gap) for i in range(len(group))])
        x += len(group) * (side + gap) + 3 * gap
    width, height = x - 3 * gap, head + len(rows) * (side + gap) + gap

    # pictures, and words at the same places
    canvas = torch.full((height, width, 3), 255, dtype=torch.uint8)
    figure = pyplot.figure(figsize=(width / 100, height / 100), dpi=100)

    def write(x, y, text, align):
        figure.text(x / width, 1 - y / height, text, fontsize=0.72 * font, ha=align, va="center")

    for y, (label, groups) in zip(range(top, height, side + gap), rows.items()):
        write(left - 2 * gap, y + side / 2, label, "right")
        for x, picture in zip(sum(columns, []), sum(groups, []), strict=True):
            tile = picture.permute(1, 2, 0).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
            canvas[y:y + side, x:x + side] = tile
    figure.figimage(canvas.numpy())
    spans = columns if len(titles) == len(columns) else [[x] for x in sum(columns, [])]
    for title, span in zip(titles, spans, strict=True):
        write((span[0] + span[-1] + side) / 2, height - head / 2 if below else head / 2, title, "center")
    return figure


def frames(models, z: Tensor, every: int = 2) -> list[list[Tensor]]:
    """Latents of some clips -> their pictures, every second one of them."""
    return [list(clip[:, ::every].unbind(1)) for clip in to_clip(models.vae, z)]


def encoded(index: int, seed: int):
    """The toy's networks; caption, clip and latents of one of its training clips; noise for it."""
    models = shapes.load()
    _, caption, clip = shapes.Clips().scene(index)
    z0 = models.vae.encode(clip[None].float() / 127.5 - 1)
    return models, caption, clip, z0, torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed))


# ---- samplers compared: captions, and {label: (student, how it samples, strength of its LoRA)} -------------

LEFT_UP = ["a green square moving up and a yellow triangle moving left on black",
           "a blue square moving left and a red triangle growing on white"]
STILL = ["a yellow triangle rising and a red triangle at rest on black",
         "a green box moving right and a blue triangle standing still on white"]
ONE = ["a blue square moving up on black", "a red triangle moving left on white"]
COMPARED = {
    "paths": (ONE, {f"{n} steps": (None, replace(TEACHER, steps=n), 1.0) for n in (50, 8, 4, 2)}),
    "guidance": (STILL, {f"ω = {w}": (None, replace(TEACHER, guidance=w, steps=8), 1.0) for w in (0, 4)}),
    "lora": (ONE, {label: ("turbo", replace(STUDENT, steps=1), scale) for label, scale in (
        ("0: the teacher,\nno guidance", 0.0), ("0.5", 0.5), ("1: the student", 1.0))}),
    "students": (["a green triangle falling and a blue triangle going right on black", STILL[1]], {
        "teacher,\n50 steps": (None, TEACHER, 1.0), "VCM,\n4 steps": ("vcm", STUDENT, 1.0),
        "T2V-Turbo,\n4 steps": ("turbo", STUDENT, 1.0)})}


def compared(name: str, seed: int) -> Figure:
    """Clips of the same noise, a row for each sampler."""
    (captions, samplers), rows = COMPARED[name], {}
    for label, (student, sampling, scale) in samplers.items():
        models = shapes.load(student, lora_scale=scale)
        z = turbo.generate(models, captions, [seed] * len(captions), SIZE, sampling)
        rows[label] = frames(models, z)
    return strips(rows, captions)


def latents(seed: int) -> Figure:
    """Clips, three channels of their latents as colours, each stretched to 0..255, and what comes back."""
    rows, titles = {"clip": [], "latents": [], "decoded": []}, []
    for index in (seed, seed + 9):
        models, caption, clip, z0, _ = encoded(index, seed)
        z = z0[0, :3]
        low, high = z.amin((1, 2, 3), True), z.amax((1, 2, 3), True)
        colours = ((z - low) / (high - low) * 255).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)
        for row, shown in zip(rows.values(), (clip, colours, to_clip(models.vae, z0)[0])):
            row.append(list(shown[:, ::2].unbind(1)))
        titles.append(caption)
    return strips(rows, titles)


def denoising(seed: int) -> Figure:
    """One clip under more and more noise, and the teacher's one-step guess ẑ0 of it."""
    models, caption, _, z0, eps = encoded(seed + 9, seed)
    schedule, c, noisy, guesses = Schedule(), models.text([caption]), [], []
    timesteps = (100, 200, 400, 600, 800, 900, 999)
    for t in torch.tensor(timesteps).split(1):
        z_t = schedule.add_noise(z0, eps, t)
        z0_hat = predict_z0(z_t, models.unet(z_t, t, c), *schedule.at(t))
        noisy.append(frames(models, z_t)[0][2])
        guesses.append(frames(models, z0_hat)[0][2])
    return strips({"noisy zₜ": [noisy], "guess ẑ₀": [guesses]}, [f"t = {t}" for t in timesteps])


def neighbours(seed: int) -> Figure:
    """Points on one path of the teacher, its guess at each, and the end that the student sees."""
    teacher, student, guesses, ends = shapes.load(), shapes.load("vcm"), [], []
    schedule, c = Schedule(8), teacher.text(["a green triangle moving down on white"])
    eps_model = turbo.guided_eps(teacher.unet, c, teacher.text([""]), TEACHER)
    f = turbo.student_f(student.unet, schedule, c, STUDENT)
    z = turbo.Noise([seed], (teacher.vae.config.latent, world.FRAMES, 8, 8))()

    timesteps = schedule.grid.flip(0)
    for t in timesteps.split(1):
        s, eps = schedule.previous(t), eps_model(z, t)
        guesses.append(frames(teacher, predict_z0(z, eps, *schedule.at(t)))[0][2])
        ends.append(frames(teacher, f(z, t))[0][2])
        z = ddim_step(z, eps, schedule.at(t), schedule.at(s))
    return strips({"teacher's ẑ₀": [guesses], "student's f": [ends]},
                  [f"t = {t}" for t in timesteps.tolist()])


def jumps(seed: int) -> Figure:
    """What four jumps land on, one after the other."""
    models, rows, schedule = shapes.load("turbo"), {}, Schedule(STUDENT.grid)
    f = turbo.student_f(models.unet, schedule, models.text(LEFT_UP), STUDENT)

    def watched(z, t):
        z0_hat = f(z, t)
        rows[f"jump {len(rows) + 1},\nt = {t[0].item()}"] = frames(models, z0_hat)
        return z0_hat

    noise = turbo.Noise([seed] * 2, (models.vae.config.latent, world.FRAMES, 8, 8))
    turbo.sample(watched, schedule, noise, STUDENT.jumps(schedule))
    return strips(rows, LEFT_UP)


@torch.enable_grad()
def hacked(seed: int) -> Figure:
    """The image reward climbed on the latents of a clip, for a caption that is not the clip's."""
    models, caption, _, z0, _ = encoded(seed, seed)
    term = turbo.RewardTerm(shapes.rewards()["image"], weight=1.0, frames=4)
    z, scores = z0, []
    for i in range(21):
        which = torch.Generator().manual_seed(i)
        g, score = turbo.reward_gradient(z, ["a blue circle"], models.vae.decode, [term], [which])
        scores.append(score["reward"].item())
        before, z = z, z + 2 * g / g.norm()
    rows = {f"the clip:\nscore {scores[0]:.2f}": frames(models, z0, 1),
            f"after 20 steps:\nscore {scores[-1]:.2f}": frames(models, before, 1)}
    return strips(rows, [f"{caption}; what is climbed is the score for \"a blue circle\""])


@torch.enable_grad()
def refined(seed: int) -> Figure:
    """VCM's clips as they are, and with their noises optimised by rewards in 5 and in 15 steps."""
    models, rows = shapes.load("vcm"), {}
    terms = [turbo.RewardTerm(reward, weight, 4, kind == "video", kind)
             for (kind, reward), weight in zip(shapes.rewards().items(), (1.0, 2.0))]
    for steps in (0, 5, 15):
        z, rewards = turbo.generate_refined(models, LEFT_UP, [seed] * 2, SIZE, STUDENT, terms, steps)
        scores = ", ".join(f"{best:.2f}" for best in torch.stack(rewards).amax(0).tolist())
        rows[(f"{steps} steps" if steps else "as it is") + f":\nR = {scores}"] = frames(models, z)
    return strips(rows, LEFT_UP)


def transfer(seed: int) -> Figure:
    """Two references, and the teacher's clips from one noise without and with guidance towards each."""
    models = shapes.load(name="shapes-motion")
    rows = {"reference": [], "λ' = 0": [], "λ' = 1": []}
    for direction, words in (("right", "moving right"), ("up", "moving up")):
        caption = f"a blue square {words} on black"
        clip = world.render(grammar.understand(caption), random.Random(f"reference {direction}"))
        reference = turbo.Reference(models.vae.encode(clip[None] / 127.5 - 1), models.text([caption]))
        rows["reference"].append(list(clip[:, ::2].unbind(1)))
        for motion in (0.0, 1.0):
            sampling = replace(TEACHER, motion=motion, motion_share=0.6)
            z = turbo.generate(models, ["a blue square on black"], [seed + 1], SIZE, sampling,
                               reference=reference)
            rows[f"λ' = {motion:g}"] += frames(models, z)
    return strips(rows, ["moving right", "moving up"])


HERO = ["a red square rising and a blue triangle falling on white", "a yellow triangle moving left on black",
        "a green square growing on white", "a blue box going right and a red triangle going right on black",
        "a green ring moving up on white"]


def hero(seed: int) -> list[Figure]:
    """The frames of a loop: the teacher's 50 steps above, T2V-Turbo's 4 below; seconds of one core."""
    rows = {}
    for student, sampling, passes in (None, TEACHER, 100), ("turbo", STUDENT, 4):
        models, start = shapes.load(student), time.process_time()
        clips = frames(models, turbo.generate(models, HERO, [seed] * len(HERO), SIZE, sampling), 1)
        seconds = (time.process_time() - start) / len(HERO)
        name = "T2V-Turbo" if student else "teacher"
        rows[f"{name}\n{sampling.steps} steps\n{passes} passes\n{seconds:.1f} s a clip"] = clips
    titles = [textwrap.fill(prompt, 18) for prompt in HERO]
    return [strips({label: [[clip[t]] for clip in clips] for label, clips in rows.items()}, titles, 3, True)
            for t in range(world.FRAMES)]


def diagram(height: float):
    """An empty page in inches, and functions that write and draw arrows and rectangles on it."""
    figure = pyplot.figure(figsize=(11, height), dpi=150)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 11), ylim=(0, height), autoscale_on=False)
    axis.axis("off")

    def write(x, y, text, color="black", size=11, ha="center", **options):
        axis.text(x, y, text, color=color, fontsize=size, ha=ha, va="center", **options)

    def arrow(start, end, color=GRAY, bend=0.0, lw=2, linestyle="-"):
        axis.annotate("", end, start, arrowprops=dict(
            arrowstyle="-|>", color=color, connectionstyle=f"arc3,rad={bend}", lw=lw, linestyle=linestyle))

    def box(x, y, width, height, **options):
        axis.add_patch(pyplot.Rectangle((x, y), width, height, **options))

    return figure, axis, write, arrow, box


def distillation(seed: int) -> Figure:
    """z_t, the teacher's step to its neighbour, the student's two answers, and which one is pulled."""
    models, caption, clip, z0, eps = encoded(seed + 14, seed)
    schedule, c, t = Schedule(8), models.text([caption]), torch.tensor([999])
    s, f = schedule.previous(t), turbo.student_f(shapes.load("vcm").unet, schedule, c, STUDENT)
    z_t = schedule.add_noise(z0, eps, t)
    eps = turbo.guided_eps(models.unet, c, models.text([""]), TEACHER)(z_t, t)
    z_s = ddim_step(z_t, eps, schedule.at(t), schedule.at(s))

    figure, axis, write, arrow, _ = diagram(4.6)
    shown = {(9.6, 3.0): z_t, (7.2, 3.0): z_s, (4.2, 3.4): f(z_s, s), (4.2, 1.2): f(z_t, t)}
    shown = {place: frames(models, z)[0][2] for place, z in shown.items()} | {(1.1, 3.0): clip[:, 4]}
    for place, picture in shown.items():
        image = OffsetImage(picture.permute(1, 2, 0).numpy(), zoom=0.95, interpolation="nearest")
        axis.add_artist(AnnotationBbox(image, place, pad=0.1))
    arrow((1.1, 3.65), (9.6, 3.65), bend=-0.16, linestyle="--")
    arrow((8.95, 3.0), (7.85, 3.0), ORANGE)
    arrow((6.55, 3.1), (4.85, 3.4))
    arrow((9.4, 2.0), (4.85, 1.2), BLUE, bend=-0.2)
    arrow((4.2, 1.85), (4.2, 2.75), BLUE, lw=4)
    arrow((10.6, 0.3), (0.5, 0.3), "black", lw=1)
    for x, y, color, text in (
            (1.1, 2.25, "black", "training clip $z_0$"), (9.6, 2.25, "black", "$z_t$"),
            (7.2, 2.25, "black", "$\\hat z_s$"), (0.9, 0.48, "black", "clean, t = 0"),
            (10.2, 0.48, "black", "noise, t = 999"), (8.4, 3.0, ORANGE, "teacher\n\none step"),
            (5.4, 4.42, GRAY, "add noise: $z_t = \\alpha_t z_0 + \\sigma_t \\epsilon$"),
            (5.75, 2.85, GRAY, "student $f_{\\theta^-}$"), (5.75, 3.65, RED, "no gradient (sg)"),
            (7.3, 0.7, BLUE, "student $f_\\theta$; the gradient goes back here"),
            (3.05, 2.3, BLUE, "$L_{CD}$ pulls this answer\ntowards that one")):
        write(x, y, text, color)
    write(5.7, 3.25, "×", RED, 26, weight="bold")
    return figure


def attention(seed: int) -> Figure:
    """A schematic: temporal attention of one position as a T x T table, the mask, and the energy G."""
    frame = torch.arange(6.0)
    reference = torch.softmax(-(frame[:, None] - 0.6 * frame - 1.2) ** 2, 1)
    noisy = torch.softmax(-0.35 * (frame[:, None] - frame) ** 2, 1)
    figure, axis, write, arrow, box = diagram(3.9)
    for i in range(6):                                      # frames, the first on top; red: one position
        x, y = 0.35 + 0.24 * i, 1.1 + 0.17 * i
        box(x, y, 1.1, 1.1, facecolor="#e5e7eb", edgecolor="black", zorder=9 - i)
        box(x + 0.7, y + 0.95, 0.12, 0.12, facecolor=RED, zorder=9 - i)
    write(1.5, 0.5, "one position (x, y)\nin all T frames")
    arrow((2.9, 1.9), (3.5, 1.9))
    for left, table, label in ((3.9, reference, "$A(z_t^{ref})$: the clip whose\nmotion is wanted"),
                               (7.0, noisy, "$A(z_t)$: the clip\nthat is made")):
        axis.imshow(table, extent=(left, left + 2.1, 0.95, 3.05), cmap="Blues", vmax=0.7, aspect="auto")
        for row, key in enumerate(reference.argmax(1).tolist()):
            box(left + 0.35 * key, 2.7 - 0.35 * row, 0.35, 0.35, fill=False, edgecolor=RED, lw=2)
        for x, y, text, turn in (1.05, 3.2, "T keys", 0), (-0.15, 2, "T queries", 90), (1.05, 0.5, label, 0):
            write(left + x, y, text, rotation=turn)
    write(9.3, 2.45, "red: M, the strongest\nkey of each query\nin the reference", RED, ha="left")
    write(9.3, 1.4, "G: squared\ndifference of the\nred entries", ha="left")
    return figure

MAP = {                                 # layer: its colour; {file: what it is}
    "commands": ("#dbeafe", {
        "train.py": "Algorithm 1,\npresets", "prepare.py": "v2's cache", "sample.py": "text to video",
        "evaluate.py": "table, VBench,\nrewards", "demo.py": "a page\nto play with"}),
    "the toy": ("#dcfce7", {"shapes/": "a world of moving shapes: captions, clips, judge, small networks"}),
    "the method\nand its parts": ("#fef3c7", {"turbo.py": "the two papers", "model.py": "UNet, its weights",
                                              "rewards.py": "reward models", "data.py": "clips, captions"}),
    "below": ("#f3f4f6", {"solver.py": "noise, DDIM, guidance", "networks/": "VAE, text tower, BERT",
                          "plumbing/": "options, files, video"})}


def map(seed: int) -> Figure:
    """The map of files: whatever imports, imports from below."""
    figure, _, write, arrow, box = diagram(4.6)
    for y, (layer, (color, files)) in zip((3.5, 2.4, 1.3, 0.2), MAP.items()):
        write(0.95, y + 0.48, layer, GRAY)
        width = 8.6 / len(files)
        for column, (name, text) in enumerate(files.items()):
            x = 1.9 + column * width
            box(x, y, width - 0.15, 0.95, facecolor=color, edgecolor=GRAY)
            write(x + width / 2 - 0.07, y + 0.73, name, weight="bold", family="monospace")
            write(x + width / 2 - 0.07, y + 0.31, text, size=10)
    arrow((10.6, 4.4), (10.6, 0.25))
    write(10.8, 2.3, "imports go down", GRAY, rotation=270)
    return figure


def boundaries(seed: int) -> Figure:
    """c_skip and c_out, which make f(z, 0) = z whatever the network says."""
    t = torch.linspace(0, 2, 400)
    figure, axis = pyplot.subplots(figsize=(7, 2.2), dpi=150, layout="tight")
    for factor, label in zip(turbo.boundary(t), ("$c_{skip}$", "$c_{out}$")):
        axis.plot(t, factor.flatten(), label=label)
    axis.set(xlabel="timestep t (the grid's first point is far to the right: 19 of 999)")
    axis.legend(loc="center right")
    return figure


def variety(seed: int) -> Figure:
    """Right clips against variety, in percent. variety.json: {SERIES: [[label, variety, right], ...]}."""
    figure, axis = pyplot.subplots(figsize=(7, 3.6), dpi=150, layout="tight")
    for series, points in json.loads(VARIETY.read_text(encoding="utf-8")).items():
        line, = axis.plot([x for _, x, _ in points], [y for _, _, y in points], "o-", label=series)
        for label, x, y in points:
            axis.annotate(label, (x, y), (5, 5), textcoords="offset points", color=line.get_color())
    axis.set(xlabel="variety, % of the world's own", ylabel="right clips, %")
    axis.legend()
    return figure


def curves(logs: tuple[str, ...], keys: tuple[str, ...]) -> Figure:
    """Numbers of training runs' log.jsonl over their steps, a panel each."""
    figure, axes = pyplot.subplots(1, len(keys), figsize=(5 * len(keys), 3), squeeze=False, layout="tight")
    for log in logs:
        name, _, path = log.rpartition("=")
        with reading(path, "a run's log.jsonl"):
            records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        for key, axis in zip(keys, axes[0]):
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if not points:
                raise UserError(f"{path} has no {key!r}; it has {', '.join(records[0])}")
            axis.plot(*zip(*points), label=name or Path(path).parent.name, lw=1)
            axis.set(xlabel="step", ylabel=key)
    axes[0, 0].legend()
    return figure


VARIETY = Path(__file__).with_name("variety.json")          # measured, not made here
FIGURES = {draw.__name__: draw for draw in (
    latents, denoising, boundaries, neighbours, distillation, jumps, hacked, refined, attention, transfer,
    variety, map)}
NAMES = (*FIGURES, *COMPARED, "hero", "curves")


def picture(figure: Figure, palette: Image.Image | None = None) -> Image.Image:
    """A figure as a picture of 256 colours, those of another one or its own."""
    buffer = io.BytesIO()
    figure.savefig(buffer, facecolor="white")
    pyplot.close(figure)
    return Image.open(buffer).convert("RGB").quantize(256, palette=palette, dither=Image.Dither.NONE)


@cli.main
@torch.no_grad()
def main(argv=None):
    """Makes the figures that are named, or all."""
    config = cli.parse(Config, argv, __doc__, positional="names")
    for name in {*config.names} - {*NAMES}:
        raise UserError(f"no figure {name!r}; there are {', '.join(NAMES)}")
    if ("curves" in config.names) != bool(config.logs):
        raise UserError("curves and --logs NAME=runs/NAME/log.jsonl go together")
    skipped = {"curves"} if VARIETY.exists() else {"curves", "variety"}
    Path(config.out).mkdir(parents=True, exist_ok=True)
    for name in config.names or [name for name in NAMES if name not in skipped]:
        path = Path(config.out) / f"{name}.png"
        if name == "hero":
            path, (first, *rest) = path.with_suffix(".gif"), hero(config.seed)
            first = picture(first).convert("RGB").quantize(64, Image.Quantize.FASTOCTREE)
            rest, times = [picture(figure, first) for figure in rest], [125] * len(rest) + [600]
            first.save(path, save_all=True, append_images=rest, duration=times, loop=0)
        elif name == "curves":
            picture(curves(config.logs, config.keys)).save(path)
        else:
            figure = FIGURES[name](config.seed) if name in FIGURES else compared(name, config.seed)
            picture(figure).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
