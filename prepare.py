"""T2V-Turbo-v2, Algorithm 1: what the teacher says about each clip is computed once, before training.

    torchrun --nproc_per_node=8 train.py --preset turbo-v2 --teacher model.ckpt --prepare CACHE \\
        --data vidgen.csv --reward-data '/data/webvid/{00000..09999}.tar'

Per clip: latents z0, caption states c, and one DDIM inversion of z0 with its own caption, which serves all of
the clip's draws of (t, ε). Per draw: z_t, ε(c), ε(∅) and, where motion guidance is active, ∂G/∂z_t. Training
then needs no teacher: guidance is linear in ε(c) and ε(∅), so that ω stays random in every step.
"""
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

import data
from model import Models
from plumbing.dryrun import Work
from plumbing.run import Group, stop_signals
from solver import Schedule, ddim_invert
from turbo import Solved, motion_gradient, motion_strength, teacher_eps


class Chosen:
    """The clips that are prepared: those of --data, and with --reward-data as many of that.

    With --reward-data only its clips carry rewards: their captions are short enough for reward models, which
    read 32 to 77 tokens. Without it all clips do. `clips` of them are drawn from `seed`; None takes all.
    """

    def __init__(self, datasets: list, clips: int | None, seed: int):
        self.datasets, self.chosen = datasets, []
        share = None if clips is None else clips // len(datasets)
        for number, dataset in enumerate(datasets):
            count = len(dataset) if share is None else min(share, len(dataset))
            self.chosen += [(number, index) for index in some_of(len(dataset), count, seed + number)]

    def __len__(self) -> int:
        return len(self.chosen)

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        """A clip of its dataset, and: rewards, whether it carries them; source, source_index."""
        number, place = self.chosen[index]
        rewards = number == len(self.datasets) - 1
        clip = self.datasets[number].get(place, generator)
        return clip | dict(rewards=rewards, source=("data", "reward_data")[number], source_index=place)


def some_of(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers below `total`, each at most once, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    if count * 2 > total:
        return sorted(torch.randperm(total, generator=generator)[:count].tolist())
    found = set()
    while len(found) < count:                               # of a large set: no permutation of all of it
        found.add(int(torch.randint(total, (), generator=generator)))
    return sorted(found)


@dataclass(frozen=True)
class Plan:
    """What the samples of a cache depend on, beside teacher and clips."""
    grid: int               # N
    draws: int              # (t, ε) per clip
    inversion_steps: int    # grid of the inversion
    motion_share: float     # τ: motion guidance is active at t >= 1000 (1 - τ)
    fps: float              # told to the teacher
    seed: int
    micro: int              # clips at once; changes the last bits of sums, not the draws


def prepare(plan: Plan, models: Models, clips, writer: data.CacheWriter, group: Group) -> int | None:
    """Fills a cache with this process's share of the clips -> the signal that stopped it, or None."""
    heard = stop_signals()
    missing = writer.missing()
    with tqdm(total=len(missing), desc="clips prepared", disable=group.rank > 0) as bar:
        for indices in micro_batches(missing, plan.micro):
            if heard:
                break
            items = usable(clips, indices, writer, plan.seed)
            for sample in solve_clips(plan, models, items) if items else ():
                writer.add(sample)
            bar.update(len(indices))

    if group.any(heard):
        return (heard or [signal.SIGTERM])[0]
    if group.rank == 0:
        writer.finish()
    return None


def micro_batches(indices: list[int], size: int) -> Iterator[list[int]]:
    """A few clips at a time, all of one shard: which clips share a pass, and so the last bits of sums, does
    not depend on the number of processes."""
    for _, shard in groupby(indices, key=lambda index: index // data.PER_SHARD):
        members = list(shard)
        for start in range(0, len(members), size):
            yield members[start:start + size]


def usable(clips, indices: list[int], writer: data.CacheWriter, seed: int) -> list[dict]:
    """The clips that can be used, numbered; the others are named to the writer."""
    items = []
    for index in indices:
        try:
            clip = clips.get(index, torch.Generator().manual_seed(data.seed_of(seed, index)))
            items.append(clip | {"index": index})
        except data.BadClip as error:
            writer.skip(index, str(error))
    return items


def solve_clips(plan: Plan, models: Models, items: list[dict]) -> Iterator[dict]:
    """The samples of some clips, for a CacheWriter. What is random about a draw depends on its clip alone."""
    device, schedule = next(models.unet.parameters()).device, Schedule(plan.grid)
    generators = [torch.Generator().manual_seed(data.seed_of(plan.seed, item["index"], 1)) for item in items]
    captions = [item["caption"] for item in items]

    # clean latents and caption states
    clips = torch.stack([item["clip"] for item in items]).to(device)
    z0, c, null = encode(models, clips, captions, generators)

    # all draws of (t, ε); one inversion serves those in which motion guidance is active
    draws = [draw(schedule, z0, generators) for _ in range(plan.draws)]
    references = invert(plan, models, z0, c, [t.to(device) for t, _ in draws])

    for number, ((t, eps), z_ref) in enumerate(zip(draws, references, strict=True)):
        schedule_here = Schedule(plan.grid, device)
        solved = Solved.by(models.unet, schedule_here, z0, eps.to(device), t.to(device), z_ref, c, null,
                           plan.motion_share, fps=plan.fps)
        for i, item in enumerate(items):
            told = ("index", "caption", "reward_caption", "rewards", "source", "source_index")
            yield {name: item[name] for name in told} | dict(
                draw=number, t=int(t[i]), z_t=solved.z_t[i], eps_c=solved.eps_c[i], eps_u=solved.eps_u[i],
                gradient=solved.gradient[i], c=c[i])


@torch.no_grad()
def encode(models: Models, clips: Tensor, captions: list[str],
           generators: list[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
    """Clips uint8 (B, 3, T, H, W) -> latents z0 drawn from the VAE's posterior, and the states of their
    captions and of no caption."""
    B, _, T, H, W = clips.shape
    vae = models.vae.config
    shape = vae.latent, T, H // vae.factor, W // vae.factor
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(clips.device)
    z0 = models.vae.encode(clips / 127.5 - 1, noise).float()
    return z0, models.text(captions), models.text([""] * B)


def draw(schedule: Schedule, z0: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Timestep t (B,) of the grid and noise like z0, on the CPU, from one generator per clip."""
    place = torch.cat([torch.randint(len(schedule.grid), (1,), generator=g) for g in generators])
    eps = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in generators])
    return schedule.grid[place], eps


def invert(plan: Plan, models: Models, z0: Tensor, c: Tensor, times: list[Tensor]) -> list[Tensor]:
    """z0 inverted to the timesteps of each draw; z0 itself for draws without motion guidance."""
    wanted = [i for i, t in enumerate(times) if motion_strength(t, 1.0, plan.motion_share).any()]
    references = [z0] * len(times)
    if wanted:
        def eps_model(z, t):
            return models.unet(z, t, c, fps=plan.fps).float()

        schedule = Schedule(plan.inversion_steps, z0.device)
        inverted = ddim_invert(schedule, eps_model, z0, [times[i] for i in wanted])
        for i, z_ref in zip(wanted, inverted, strict=True):
            references[i] = z_ref
    return references


def work(plan: Plan, size: tuple[int, int, int]) -> dict[str, Work]:
    """What preparing a clip of size (T, H, W) consists of, for --dry-run 0.

    The clip is one of those that take longest: motion guidance is active, at t = 999.
    """
    (T, H, W), told = size, dict(fps=plan.fps)

    def encoded(models, made):
        clip = torch.zeros(1, 3, T, H, W, dtype=torch.uint8)
        states = encode(models, clip, ["a red circle moving right"], [torch.Generator()])
        return *states, torch.full((1,), 999)

    def inverted(models, made):
        z0, c, _, t = made["encode"]
        return models.unet(z0, t, c, **told).float()

    def predicted(models, made):
        z0, c, null, t = made["encode"]
        return teacher_eps(models.unet, z0, t, c, null, **told)

    def guided(models, made):
        z0, c, _, t = made["encode"]
        return motion_gradient(models.unet, z0, made["inversion step"], t, c, **told)

    return {"encode": Work(encoded), "inversion step": Work(inverted, plan.inversion_steps),
            "predictions": Work(predicted, plan.draws), "motion gradient": Work(guided, plan.draws)}


def teacher_identity(models: Models) -> str:
    """A teacher's fingerprint, whatever dtype it is in; without the layers that a student adds."""
    added = ("time_cond_proj", "motion_cond_proj", "combine_proj")
    state = models.unet.state_dict()
    return data.fingerprint({name: x for name, x in state.items() if not name.startswith(added)})
