"""Does the toy's motion gradient point along the true motion, and does motion transfer follow a clip? Two
tables; minutes on one core.

    python tests/motion.py --clips 12
    python tests/motion.py --clips 12 --model shapes    # the large toy, which is told places

Each clip shows one thing that goes somewhere. It has two twins that differ in motion alone: itself backwards,
and its middle frame throughout. The energy's reference is the clip itself, inverted, as in training.
    G                       energy of the noised clip, and of its twins under the same noise
    nearer                  share of clips whose energy is lower than that of the one played backwards
    towards the true clip   cosine of -∂G/∂z, taken at a noised twin, with the direction from there to the
                            true clip; and as a control with that of another pair of clips
    guided walk             of the teacher from the noised clip to the end, guided with λ' by the clip's own
                            attention while t >= 500: how many things move as asked, and how far

Motion transfer: "a blue square on black", of which no motion is said, from `transfers` seeds for each clip
that goes right, left, up or down; how many follow it, by the oracle, with each λ'.
"""
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import shapes
from model import to_clip
from plumbing import cli, stats
from plumbing.cli import Count, Within
from shapes import grammar, world
from shapes.table import travel
from solver import Sampling, Schedule, ddim_invert
from turbo import Reference, generate, motion_gradient, motion_push, solve, teacher_eps

Strength = Annotated[float, Within(0, 1000)]


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    clips: Count = 12                               # of one moving thing
    inversion_steps: Count = 50                     # of the reference
    motion: tuple[Strength, ...] = (0.0, 1.0)       # λ' of guided walks and of transfer; repeatable
    guidance: Strength = 2.0                        # ω
    grid: Annotated[int, Within(2, 1000)] = 8       # of the teacher's walk; a row for each t >= 500
    transfers: Annotated[int, Within(0, 1000)] = 12     # clips that are to follow each of four directions
    steps: Count = 50                               # of motion transfer
    model: Literal["shapes", "shapes-motion"] = "shapes-motion"     # whose teacher
    folder: str = ""                                # of its weights [the embedded ones]


def moving_clips(count: int) -> tuple[list[grammar.Scene], list[str], Tensor]:
    """Scenes of one thing that goes somewhere, none of the table; captions; clips (B, 3, ...)."""
    scenes, captions, clips, index = [], [], [], grammar.TABLE + 2 * 10 ** 6
    while len(clips) < count:
        scene, caption, clip = shapes.Clips("train").scene(index)
        index += 1
        if len(scene.things) == 1 and world.DIRECTION[scene.things[0].motion] != (0, 0):
            scenes.append(scene)
            captions.append(caption)
            clips.append(clip)
    return scenes, captions, torch.stack(clips)


def cosine(a: Tensor, b: Tensor) -> str:
    """Mean over clips and its 95 % interval."""
    mean, half = stats.mean_interval(torch.cosine_similarity(a.flatten(1), b.flatten(1)).tolist())
    return f"{mean:+.3f} ± {half:.3f}"


class Check:
    """Clips, their latents, references and networks; `row` measures at one timestep."""

    def __init__(self, config: Config):
        self.config, self.schedule = config, Schedule(config.grid)
        self.models = shapes.load(folder=config.folder or None, name=config.model)
        self.models.unet.requires_grad_(False)
        self.scenes, captions, clips = moving_clips(config.clips)
        self.c, self.uncond = self.models.text(captions), self.models.text([""] * len(captions))

        x = clips.float() / 127.5 - 1
        twins = {"true": x, "backwards": x.flip(2), "still": x[:, :, 4:5].expand_as(x)}
        self.z0 = {name: self.models.vae.encode(twin) for name, twin in twins.items()}
        self.eps = torch.randn(self.z0["true"].shape, generator=torch.Generator().manual_seed(0))

        self.grid = [torch.full((len(x),), t) for t in self.schedule.grid.tolist()]
        self.references = ddim_invert(                      # the true clips at each t of the grid
            Schedule(config.inversion_steps), lambda z, t: self.models.unet(z, t, self.c), self.z0["true"],
            self.schedule.grid.tolist())

    def gradient(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return motion_gradient(self.models.unet, z, self.references[t[0].item()], t, self.c)

    def travel(self, z0: Tensor) -> float:
        """Mean, in pixels."""
        clips = to_clip(self.models.vae, z0)
        return sum(travel(scene, clip) for scene, clip in zip(self.scenes, clips)) / len(clips)

    def row(self, t: Tensor) -> list[str]:
        """The cells at t (B,)."""
        z_t = {name: self.schedule.add_noise(z0, self.eps, t) for name, z0 in self.z0.items()}
        gradients = {name: self.gradient(z, t) for name, z in z_t.items()}
        energies = {name: energy for name, (_, energy) in gradients.items()}
        nearer = (energies["true"] < energies["backwards"]).float().mean()
        cells = [str(t[0].item()), *(f"{energy.mean():.1f}" for energy in energies.values()), f"{nearer:.0%}"]

        # towards the true clip, and as a control towards another one
        for name in ("backwards", "still"):
            towards = self.z0["true"] - self.z0[name]
            cells += [cosine(-gradients[name][0], towards), cosine(-gradients[name][0], towards.roll(1, 0))]
        return cells + self.guided_walks(z_t["true"], t)

    def guided_walks(self, z_t: Tensor, t: Tensor) -> list[str]:
        """Of the walk from z_t to the end, guided while t >= 500: share of motions as asked, and travel."""
        w, cells = torch.full((len(t),), self.config.guidance), []
        for motion in self.config.motion:
            z, strength = z_t, torch.full((len(t),), motion)
            for now in (now for now in reversed(self.grid) if now[0] <= t[0]):
                push = None
                if motion and now[0] >= 500:
                    push = motion_push(self.schedule, now, self.gradient(z, now)[0], strength)
                eps = teacher_eps(self.models.unet, z, now, self.c, self.uncond)
                z = solve(self.schedule, z, now, self.schedule.previous(now), w, *eps, push)

            clips = to_clip(self.models.vae, z)
            right = sum(world.judge(scene, clip)["motion"] for scene, clip in zip(self.scenes, clips))
            cells.append(f"{right / len(t):.0%}, {self.travel(z):.1f} px")
        return cells


def follow(config: Config, models, motion: float) -> str:
    """Of all clips that motion transfer makes with strength λ', how many go where their reference goes, and
    how many show the thing that was asked for."""
    sampling = Sampling("ddim", config.steps, config.guidance, grid=config.steps, motion=motion,
                        motion_share=0.6, on_grid=True)
    asked = grammar.Thing("blue", "square")
    prompts, seeds = ["a blue square on black"] * config.transfers, list(range(config.transfers))
    following, shown = 0, 0
    for direction in ("right", "left", "up", "down"):
        scene = grammar.Scene((replace(asked, motion=direction),), "black")
        clip = world.render(scene, random.Random(f"reference {direction}"))
        reference = Reference(models.vae.encode(clip[None] / 127.5 - 1), models.text(
            [f"a blue square {grammar.MOTIONS[direction][0]} on black"]))
        z = generate(models, prompts, seeds, models.size, sampling, reference=reference)
        for made in to_clip(models.vae, z):
            following += int(world.judge(scene, made)["motion"])
            shown += int(world.judge(grammar.Scene((asked,), "black"), made)["all"])
    return f"| {motion:g} | {following} | {shown} | {4 * config.transfers} |"


@cli.main
def main(argv=None):
    """Prints the table."""
    config = cli.parse(Config, argv, __doc__)
    titles = ["t", "G, true", "G, backwards", "G, still", "nearer", "from backwards towards the true clip",
              "control", "from still towards the true clip", "control",
              *(f"guided walk, λ' = {motion:g}" for motion in config.motion)]
    with torch.no_grad():
        check = Check(config)
        print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        for t in reversed(check.grid):
            if t[0] >= 500:                                         # where guidance is active
                print("| " + " | ".join(check.row(t)) + " |", flush=True)
        print(f"\nThings go {check.travel(check.z0['true']):.1f} px in these clips.")
        if config.transfers:
            print("\n| λ' of motion transfer | follow | blue squares | of |\n|---|---|---|---|")
            for motion in config.motion:
                print(follow(config, check.models, motion), flush=True)


if __name__ == "__main__":
    main()
