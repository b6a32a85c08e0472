"""Training, on a CPU, a GPU, or many: Algorithm 1 of T2V-Turbo (arXiv 2405.18750), Algorithms 1 and 2 of
T2V-Turbo-v2 (arXiv 2410.05677).

    python train.py --preset shapes                                                 # the toy, on a laptop
    torchrun --nproc_per_node=8 train.py --preset turbo-vc2 --teacher model.ckpt --out runs/vc2 \\
        --data '/data/webvid/{00000..09999}.tar' --reward hpsv2=FILE --reward internvideo2=FILE    # the paper
    torchrun --nproc_per_node=8 train.py --preset turbo-v2 --teacher model.ckpt --prepare CACHE \\
        --data vidgen.csv --reward-data '/data/webvid/{00000..09999}.tar'       # v2: the teacher, once
    torchrun --nproc_per_node=8 train.py --preset turbo-v2 --data CACHE --out runs/v2 \\
        --reward hpsv2=FILE --reward clip=FILE --reward internvideo2=FILE       # then the student, without it

The batch of a step is fixed and split over however many processes there are, and all that is random about a
clip comes from a generator of its own, seeded by the clip's place in the run. So 1, 2 or 8 processes train
the same student, and a run that was killed and resumed is the run that was not.
"""
import copy
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import model
import rewards
import shapes
from model import (
    VAE,
    Models,
    TextEncoder,
    UNet3D,
    condition_layers,
    layout_of,
    lora_shapes,
    to_clip,
)
from plumbing import cli, dryrun, video, weights
from plumbing.files import atomic
from plumbing.folder import Lock, Log, check_room, checkpoints, open_folder, read_checkpoint
from plumbing.run import FlatAdamW, Group, Offload, Parts, has_bfloat16, listen, shielded
from prepare import Chosen, Plan, prepare, teacher_identity, work
from presets import (
    PATHS,
    Config,
    check_files,
    check_resume,
    configure,
    family_of,
    is_toy,
    is_v2,
    model_name,
    planned_rewards,
    told_motion,
)
from solver import Sampling, Schedule
from turbo import (
    EMA,
    RewardTerm,
    Step,
    TeacherOutput,
    consistency,
    distill,
    distill_cached,
    generate,
    inject,
    lora_state,
    merge,
    motion_strength,
    on_policy,
    reward_gradient,
    total_loss,
)

# ---- the trainer -------------------------------------------------------------------------------------------


def generator(seed: int, position: int) -> torch.Generator:
    """The random stream of Algorithm 1 for the clip at a position of the run.

    torch reads 32 bits of a CPU seed; the odd factor sets the streams of different seeds apart.
    """
    return torch.Generator().manual_seed((seed * 2654435761 + position) % 2 ** 32)


class Trainer:
    """Student, teacher, target, rewards and optimizer; `step` is one round of Algorithm 1."""

    def __init__(self, config: Config, models: Models, terms: list[RewardTerm], group: Group,
                 parts: Parts | None = None, to_host: Callable[[Tensor], list[float]] = Tensor.tolist):
        """to_host: brings a step's sums to the CPU; a simulation has its own, as its tensors are empty."""
        for option in ["batch", "reward_batch"] if is_v2(config) else ["batch"]:
            clips = getattr(config, option)
            split = group.world * config.sums
            if clips % split:
                up = math.ceil(clips / split) * split
                sums = f" with --sums {config.sums}" * (config.sums > 1)
                raise ValueError(f"a batch of {clips} clips cannot be split over {group.world} processes"
                                 f"{sums}; try {cli.flag_of(option)} {up}")
        self.config, self.models, self.terms, self.group = config, models, terms, group
        self.parts, self.to_host = parts or Parts(group.device), to_host
        self.schedule = Schedule(config.grid, group.device)

        # networks, and what of them is trained
        self.prepare_networks(config, group.device)
        self.named = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        self.params = list(self.named.values())
        self.offload = Offload(group.device, config.offload)
        self.optimizer = FlatAdamW(self.params, group, config.lr, self.offload)
        self.gradient = self.optimizer.gradient                     # one tensor; every p.grad is a view of it
        self.ema = EMA(self.params, config.ema) if config.ema else None
        with torch.no_grad():
            self.null = models.text([""])                           # ∅
        self.put_away()

        # counters
        self.done = 0                   # steps
        self.skipped = 0                # steps in a row without a finite gradient
        self.clips_skipped = 0          # unusable clips before this start of the run

    def prepare_networks(self, config: Config, device: torch.device) -> None:
        """Student and teacher out of one UNet: with LoRA they share it, else the teacher is a frozen copy."""
        unet = self.models.unet.eval()
        self.student = self.teacher = unet
        told = dataclasses.replace(unet.config, guidance=True, motion=told_motion(config))
        for name, layer in condition_layers(told).items():      # at zero: the student starts as its teacher
            if not hasattr(unet, name):
                unet.add_module(name, layer.to(device, unet.dtype))
        unet.config = told

        if config.lora:                     # with LoRA off the student is the teacher: one copy
            conv1d = ("init_attn.0.proj_in", "init_attn.0.proj_out")    # in VC2; not in the published LoRA
            inject(unet, config.lora, skip=conv1d if unet.config.fps else ())
        else:
            if not is_v2(config):           # whose teacher is a cache
                self.teacher = copy.deepcopy(unet).requires_grad_(False)
                for name, p in self.teacher.named_parameters():
                    precise = name.startswith("out.")                   # see UNet3D.last
                    p.data = p.data.to(torch.float32 if precise else getattr(torch, config.dtype))
            unet.requires_grad_(True)
        unet.checkpointing = config.checkpointing

        # autocast caches casts of weights, and θ and θ⁻ change places: one autocast per call
        for network in {self.student, self.teacher}:
            autocast = torch.autocast(device.type, torch.bfloat16, config.dtype == "bfloat16")
            network.forward = autocast(network.forward)

    def put_away(self) -> None:
        """--offload: all but the VAE waits in host memory; each network brings in the next one of a step."""
        self.networks = [self.student, self.teacher]
        self.judges = [term.reward.model for term in self.terms] if self.config.offload else []
        for network in dict.fromkeys([self.models.text, *self.networks, *self.judges]):
            self.offload.keep(network)
        for i, judge in enumerate(self.judges):
            self.terms[i].reward.at_work = partial(self.offload, judge, then=self.judges[i + 1:i + 2])

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pixels. With a gradient it is the rewards' last part: the UNet may come (--offload)."""
        if torch.is_grad_enabled() and self.config.chunk:
            self.offload.fetch(self.student)
        return self.models.vae.decode(z)

    def step(self, batch: dict) -> dict[str, float]:
        """One step on this process's clips of a batch -> its record in the log, the same on all processes."""
        # the gradient of its clips; each part of --sums adds up by itself, as on a process of its own
        self.gradient.zero_()
        metrics = self.gradients(batch)
        for part in range(1, self.config.sums):
            others = self.gradient.clone()
            self.gradient.zero_()
            metrics = metrics + self.gradients(batch, part)
            self.gradient += others

        # sums over all processes
        with self.parts("update"):
            self.group.sum(self.gradient)
            metrics = self.group.sum(torch.cat([metrics, metrics.new_tensor([batch["bad"]])]))
            norm = self.gradient.norm()
            values = self.to_host(torch.cat([metrics, norm[None].double()]))
            lr = learning_rate(self.config, self.done)
            self.update(norm, lr, all(map(math.isfinite, values)))
        self.done += 1

        names = ["loss", "loss_cd", *(term.name for term in self.terms), "clips_skipped", "grad_norm"]
        record = dict(zip(names, values, strict=True))
        record["clips_skipped"] = self.clips_skipped + int(record["clips_skipped"])
        return record | {"lr": lr, "steps_skipped": self.skipped}

    def gradients(self, batch: dict, part: int = 0) -> Tensor:
        """The gradient of one part of --sums of this process's clips -> its share of the metrics: loss, L_CD,
        rewards."""
        metrics = 0
        for micro_batch, positions in self.micro_batches(batch, self.config.batch, part):
            metrics = metrics + self.accumulate(micro_batch, positions)
        return metrics

    def micro_batches(self, batch: dict, total: int, part: int = 0) -> Iterator[tuple[dict, range]]:
        """A few clips at a time, with their places in the run. total: clips of a step on all processes."""
        own = total // self.group.world
        first = (self.done * self.group.world + self.group.rank) * own
        n, micro = own // self.config.sums, self.config.micro
        for start in range(part * n, (part + 1) * n, micro):
            end = min(start + micro, (part + 1) * n)
            micro_batch = {name: values[start:end] for name, values in batch.items() if name != "bad"}
            yield micro_batch, range(first + start, first + end)

    def accumulate(self, micro_batch: dict, positions: range) -> Tensor:
        """Algorithm 1 on some clips: adds their share of the gradient -> that of loss, L_CD, rewards."""
        config = self.config
        generators = [generator(config.seed, position) for position in positions]

        # clean latents and caption embeddings
        text = self.models.text
        with self.parts("encode"), torch.no_grad(), self.offload(text, then=self.networks):
            z0, c = self.encode(micro_batch, generators)

        # t, ω and ε; the teacher's step from z_t to ẑ_s; L_CD
        with self.parts("distill"), self.offload(*self.networks, then=self.judges[:1]):
            step = Step.draw(z0, self.schedule, (config.w_min, config.w_max), generators)
            if config.on_policy:
                z0, step = self.on_policy(z0, c, step, positions, generators)
            loss_cd, z0_hat = distill(self.student, self.teacher, self.ema, self.schedule, step, z0, c,
                                      self.null.expand_as(c), fps=config.fps)

        # rewards of the one-step generation ẑ0
        g, scores = None, {}
        if self.terms:
            with self.parts("rewards"):
                g, scores = reward_gradient(z0_hat, short_captions(micro_batch), self.decode,
                                            self.terms, generators, config.chunk)
                scores = {name: score.mean() for name, score in scores.items()}

        # gradient of L = L_CD - β_img J_img - β_vid J_vid
        share = len(positions) / config.batch
        with self.parts("backward"), self.offload(self.student, then=[text]):
            (share * total_loss(loss_cd, z0_hat, g)).backward()

        loss = loss_cd.detach() - sum(term.weight * scores[term.name] for term in self.terms)
        return share * torch.stack([loss, loss_cd.detach(), *scores.values()]).double()

    def on_policy(self, z0: Tensor, c: Tensor, step: Step, positions: range,
                  generators: list[torch.Generator]) -> tuple[Tensor, Step]:
        """A share of the clips goes where the student comes when it samples, after 0, 1, 2 and 3 jumps in
        turn; they are spread evenly over the run."""
        def f(z, t, i):
            return consistency(self.student, self.schedule, z, t, step.w[i:i + 1], c[i:i + 1],
                               fps=self.config.fps)

        return on_policy(f, self.schedule, z0, step, self.config.on_policy, min(4, self.config.grid), generators)

    def encode(self, micro_batch: dict, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Latents z0 (B, C, T, h, w), drawn from the VAE's posterior, and caption embeddings c."""
        x = micro_batch["clip"].to(self.group.device) / 127.5 - 1
        shape = self.latent(*x.shape[2:])
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(x.device)
        return self.models.vae.encode(x, noise).float(), self.models.text(micro_batch["caption"])

    def latent(self, T: int, H: int, W: int) -> tuple[int, int, int, int]:
        """Shape of the latents of a clip."""
        vae = self.models.vae.config
        return vae.latent, T, H // vae.factor, W // vae.factor

    def update(self, norm: Tensor, lr: float, finite: bool) -> None:
        """AdamW and EMA; neither if anything is inf or nan: the sums then are so on all processes alike."""
        if finite:
            self.skipped = 0
            self.gradient *= (self.config.clip / (norm + 1e-6)).clamp(max=1)
            self.optimizer.step(lr)
            if self.ema:
                self.ema.update()
            return
        self.skipped += 1
        if self.skipped == 10:
            raise ValueError("10 steps in a row without a finite gradient; "
                             "resume an earlier checkpoint with a lower --lr")

    def state(self, record: dict) -> dict:
        """All that the next step depends on; all processes call it, the first one gets it.

        No random state is in it: draws depend on the seed and the position alone. record: the last step's.
        """
        optimizer = self.optimizer.state_dict()
        if self.group.rank:
            return {}
        return dict(
            config=dataclasses.asdict(self.config), step=self.done, record=record,
            steps_skipped=self.skipped, clips_skipped=record["clips_skipped"],
            params={name: p.detach() for name, p in self.named.items()},
            ema=self.ema.average if self.ema else [], optimizer=optimizer)

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """The inverse of `state`. Raises ValueError where it is another network's."""
        shapes_of = {name: p.shape for name, p in self.named.items()}
        if {name: p.shape for name, p in state["params"].items()} != shapes_of:
            raise ValueError("the checkpoint is of another network; "
                             "go on with the --teacher that the run began with")
        ours = self.params + (self.ema.average if self.ema else [])
        theirs = [*state["params"].values(), *state["ema"]]
        for p, saved in zip(ours, theirs, strict=True):
            p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.skipped = state["step"], state["steps_skipped"]
        self.clips_skipped = state["clips_skipped"]


class CachedTrainer(Trainer):
    """v2 Algorithm 2: what the teacher says comes from a cache, and rewards look at clips of their own.

    A batch is {"distill": samples of the cache, "rewards": others of them, "bad": as in every batch}.
    """

    def gradients(self, batch: dict, part: int = 0) -> Tensor:
        config, metrics = self.config, 0
        with self.offload(self.student):
            for samples, positions in self.micro_batches(batch["distill"], config.batch, part):
                metrics = metrics + self.distill(samples, positions)
        if self.terms:
            for samples, positions in self.micro_batches(batch["rewards"], config.reward_batch, part):
                metrics = metrics + self.reward(samples, positions)
        return metrics

    def distill(self, samples: dict, positions: range) -> Tensor:
        """L_CD of some samples."""
        solved, w, c, motion = self.read(samples, positions, self.config.seed)
        with self.parts("distill"):
            loss_cd, _ = distill_cached(self.student, self.schedule, solved, w, c, motion,
                                        self.config.released_motion, fps=self.config.fps)
        share = len(positions) / self.config.batch
        with self.parts("backward"):
            (share * loss_cd).backward()

        metrics = torch.zeros(2 + len(self.terms), dtype=torch.float64, device=self.group.device)
        metrics[:2] = share * loss_cd.detach()
        return metrics

    def reward(self, samples: dict, positions: range) -> Tensor:
        """- β_img J_img - β_vid J_vid of the one-step generations ẑ0 of some samples."""
        solved, w, c, motion = self.read(samples, positions, self.config.seed + 1)
        generators = [generator(self.config.seed + 2, position) for position in positions]
        told = dict(fps=self.config.fps) | ({} if motion is None else {"motion": motion})
        with self.parts("distill"), self.offload(self.student, then=self.judges[:1]):
            z0_hat = consistency(self.student, self.schedule, solved.z_t, solved.t, w, c, **told)
        with self.parts("rewards"):
            g, scores = reward_gradient(z0_hat, short_captions(samples), self.decode, self.terms,
                                        generators, self.config.chunk)
            scores = {name: score.mean() for name, score in scores.items()}
        share = len(positions) / self.config.reward_batch
        with self.parts("backward"), self.offload(self.student):
            (share * total_loss(0.0, z0_hat, g)).backward()

        weighted = sum(term.weight * scores[term.name] for term in self.terms)
        return share * torch.stack([-weighted, torch.zeros_like(weighted), *scores.values()]).double()

    def read(self, samples: dict, positions: range, seed: int
             ) -> tuple[TeacherOutput, Tensor, Tensor, Tensor | None]:
        """What the cache says, on the device in float32; ω drawn anew; and λ' of each sample, or None."""
        config, device = self.config, self.group.device
        names = ("z_t", "eps_c", "eps_u", "gradient")
        t = samples["t"].to(device)
        solved = TeacherOutput(t, *(samples[name].to(device).float() for name in names))

        uniform = [torch.rand(1, generator=generator(seed, position)) for position in positions]
        w = (torch.cat(uniform) * (config.w_max - config.w_min) + config.w_min).to(device)
        motion = motion_strength(t, config.motion, config.motion_share) if told_motion(config) else None
        return solved, w, samples["c"].to(device).float(), motion


def learning_rate(config: Config, done: int) -> float:
    """Of the step after `done` ones: constant, or falling to 0 over the last share of the run."""
    left = 1 - done / config.steps
    return config.lr * min(left / config.lr_fall, 1) if config.lr_fall else config.lr


def short_captions(samples: dict) -> list[str]:
    """What rewards read: the reward caption of each clip where it has one."""
    pairs = zip(samples["reward_caption"], samples["caption"], strict=True)
    return [short or full for short, full in pairs]


# ---- what a run needs --------------------------------------------------------------------------------------


def load_world(config: Config, group: Group) -> tuple[Models, object, list[RewardTerm]]:
    """Networks, dataset of captioned clips, and reward terms."""
    device = group.device
    if is_toy(config):
        load_reward = partial(toy_reward, device=device, folder=config.teacher or None)
    else:
        load_reward = partial(rewards.load, device=device, dtype=getattr(torch, config.dtype))

    if is_v2(config):
        clips = data.Cache(config.data, expected(config))
    elif is_toy(config):
        clips = toy_clips(config)
    else:
        clips = open_clips(config, config.data, group)
    terms = reward_terms(config, load_reward)
    models = load_models(config, device)
    if is_v2(config) and clips.header["teacher"] != teacher_identity(models):
        raise ValueError(f"the cache in {config.data} was made by another teacher "
                         f"({clips.header['teacher_file']}); give that one with --teacher")
    return models, clips, terms


def load_models(config: Config, device: torch.device) -> Models:
    """The teacher, and for training the layers with which a student is told more."""
    conditions = {} if config.prepare else dict(guidance=True, motion=told_motion(config))
    if is_toy(config):
        return shapes.load(folder=config.teacher or None, device=device, **conditions)
    dtype = getattr(torch, config.dtype)
    trains_all = not config.lora and not config.prepare
    models = model.load(model_name(config), config.teacher or None, device=device,
                        dtype=torch.float32 if trains_all else dtype, **conditions)
    models.vae.to(dtype)
    models.text.to(dtype)
    return models


def toy_clips(config: Config) -> shapes.Clips:
    return shapes.Clips(frames=config.frames, size=config.height, pairs=config.pairs)


def open_clips(config: Config, spec: str, group: Group) -> data.ClipDataset:
    with group.first():                     # it indexes shards, the others read the index
        return data.open_dataset(spec, config.frames, config.fps, config.height, config.width,
                                 cache=config.prepare or config.out)


def expected(config: Config) -> dict:
    """What the header of a cache must say."""
    names = ["grid", "frames", "height", "width", "fps"] + ["motion_share"] * told_motion(config)
    return {"model": model_name(config)} | {name: getattr(config, name) for name in names}


def reward_terms(config: Config, load: Callable) -> list[RewardTerm]:
    """β_img R_img and β_vid R_vid. load(name, path, frames=) makes a reward; frames: None for images."""
    terms = []
    for planned in planned_rewards(config):
        is_video = planned.kind == "video"
        reward = load(planned.name, planned.path, frames=planned.frames if is_video else None)
        terms.append(RewardTerm(reward, planned.weight, planned.frames, is_video, planned.name))
    return terms


def toy_reward(name: str, path: str | None, frames: int | None, device: torch.device,
               folder: str | None) -> rewards.Reward:
    """One of the toy's rewards, which lie with its teacher."""
    if path:
        raise ValueError(f"--reward {name}={path}: the toy's rewards lie in the folder of --teacher; "
                         f"leave ={path} out")
    reward = shapes.rewards(device, folder)[rewards.RECIPES[name].kind]
    if frames and frames != reward.frames:
        raise ValueError(f"--video-frames {frames}: {name} takes {reward.frames}")
    return reward


# ---- the same with random weights, for --dry-run -----------------------------------------------------------


def random_world(config: Config, group: Group) -> tuple[Models, None, list[RewardTerm]]:
    """What `load_world` returns for a published model, but random, and without clips: no file is read."""
    device, dtype = group.device, getattr(torch, config.dtype)
    terms = reward_terms(config, partial(random_reward, device=device, dtype=dtype))
    return random_networks(config, device), None, terms


def random_networks(config: Config, device: torch.device) -> Models:
    """The networks that `load_models` returns, but random."""
    family, dtype = family_of(config), getattr(torch, config.dtype)
    conditions = {} if config.prepare else dict(guidance=True, motion=told_motion(config))
    with dryrun.build(device, dtype if config.lora or config.prepare else torch.float32):
        unet = UNet3D(dataclasses.replace(family.unet, **conditions))
    with dryrun.build(device, dtype):
        vae, text = VAE(family.vae).requires_grad_(False), TextEncoder(family.text).requires_grad_(False)
    return Models(model_name(config), unet, vae, text, family)


def prepare_budget(config: Config) -> dryrun.CountedParts:
    """What preparing a clip takes, simulated."""
    def networks() -> Models:
        models = random_networks(config, torch.device("cpu"))
        models.unet.requires_grad_(False)
        models.unet.checkpointing = config.checkpointing
        return models

    size = config.frames, config.height, config.width
    title = f"preparing for {config.preset}, {config.width}x{config.height}, {config.frames} frames, " \
            f"{config.draws} draw{'s' * (config.draws > 1)}"
    return dryrun.report_clip(title, networks, config.dtype, work(plan_of(config), size))


def random_reward(name: str, path: str | None, frames: int | None, device: torch.device,
                  dtype: torch.dtype) -> rewards.Reward:
    """A public reward without its weights; its path is not read."""
    with dryrun.build(device, dtype):
        return rewards.untrained(name, device, dtype, frames)


# ---- what a run leaves -------------------------------------------------------------------------------------


def save(trainer: Trainer, out: Path, record: dict) -> None:
    """OUT/checkpoint-STEP.pt. Once it is there, those of an abandoned future and all but the last K go."""
    state, path = trainer.state(record), out / f"checkpoint-{trainer.done:07d}.pt"
    if trainer.group.rank:
        return
    write(path, partial(torch.save, state))
    saved = checkpoints(out)
    past = saved[:saved.index(path) + 1]
    for old in set(saved) - set(past[-trainer.config.keep:]):
        old.unlink()


def write(path: Path, writer: Callable[[Path], None]) -> None:
    """writer(temporary path), atomically. Raises ValueError where the disk is full."""
    try:
        with atomic(path) as temporary:
            writer(temporary)
    except (RuntimeError, ValueError) as error:                     # torch.save raises RuntimeError
        reason = str(error).splitlines()[0].removeprefix(f"{path} cannot be written: ")
        raise ValueError(f"{path} cannot be written ({reason}); what was saved before is whole: "
                         "make room, then go on with --resume auto") from error


def show(trainer: Trainer, out: Path) -> dict[str, float]:
    """OUT/samples: this process's share of the prompts, from the same noise. The toy is judged, too."""
    config, models, group = trainer.config, trainer.models, trainer.group
    size = config.frames, config.height, config.width
    sampling = Sampling("student", min(4, config.grid), config.guidance, config.grid, config.fps,
                        config.motion if told_motion(config) else None, config.motion_share)

    def make(captions: list[str], seeds: list[int]) -> Tensor:
        """Clips uint8 (B, 3, T, H, W) on the CPU, as the student makes them now."""
        with trainer.offload(models.unet, models.text):
            z = generate(models, captions, seeds, size, sampling)
        return to_clip(models.vae, z, config.chunk).cpu()

    for i in range(group.rank, len(config.prompt), group.world):
        path = out / "samples" / f"step-{trainer.done:06d}-{i}.gif"
        video.write_video(path, make([config.prompt[i]], [i])[0], config.fps)
    return {"oracle": shapes.accuracy(make)} if is_toy(config) else {}


def header(trainer: Trainer) -> dict:
    """What turbo.safetensors says about itself; model.py reads it."""
    config = trainer.config
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in PATHS}
    method = "turbo" if trainer.terms else "vcm"
    return {
        "version": 2, "model": model_name(config), "method": "turbo-v2" if is_v2(config) else method,
        "steps": config.grid, "w_min": config.w_min, "w_max": config.w_max, "rank": config.lora,
        "fps": config.fps, "frames": config.frames, "height": config.height, "width": config.width,
        "motion": config.motion if told_motion(config) else None,
        "motion_share": config.motion_share if told_motion(config) else None,
        "rewards": [term.name for term in trainer.terms], "train": options}


def export(trainer: Trainer, out: Path) -> None:
    """turbo.safetensors for sample.py; on demand the released code's list, and the merged UNet."""
    config, unet = trainer.config, trainer.student
    state = lora_state(unet) if config.lora else unet.state_dict()
    small = state
    if is_toy(config):                      # the toy's weights come with the repository
        small = {name: x.half() for name, x in state.items()}
    for name, x in small.items():
        if not x.isfinite().all():
            raise ValueError(f"{out}: {name} of the student is not finite, so it is not exported; "
                             "resume an earlier checkpoint with a lower --lr")

    about = header(trainer)
    weights.save_checkpoint(out / "turbo.safetensors", small, about)
    if config.export_lora:
        matrices = weights.lora_to_list(
            weights.split_lora(state), lora_shapes(unet.config), layout_of(unet.config))
        write(out / "unet_lora.pt", partial(torch.save, matrices))
        print(f"{out}/unet_lora.pt has no place for the guidance projection, which the released code then "
              "draws at random; --merge writes weights that hold it", file=sys.stderr)
    if config.merge:
        whole = merge(unet.float()).state_dict()
        weights.save_checkpoint(out / "merged.safetensors", whole, about)
        if about["model"] == "vc2":         # for the released code and others
            teacher = config.teacher or model.fetch("vc2")
            weights.save_merged(out / "t2v_turbo_vc2.pt", teacher, whole)


def export_size(trainer: Trainer) -> int:
    """Bytes of what `export` writes, or a little more: LoRA is merged, and the toy's weights are halved."""
    config, trained = trainer.config, trainer.gradient.nbytes
    whole = 4 * sum(p.numel() for p in trainer.student.parameters())
    merged = whole * (2 if model_name(config) == "vc2" else 1)
    return trained * (1 + config.export_lora) + merged * config.merge


# ---- the run -----------------------------------------------------------------------------------------------


def resumed(config: Config, path: Path | None, group: Group) -> dict | None:
    """The content of the checkpoint that all processes go on from, memory-mapped, or None."""
    state = read_checkpoint(path) if path else None
    steps = group.all_of(state["step"] if state else 0)
    if len(set(steps)) > 1:
        raise ValueError(f"the processes go on from different steps ({', '.join(map(str, steps))}); "
                         f"all nodes must share {config.out}")
    if state:
        check_resume(config, state, path)
    return state


def tell_of_imitation(config: Config, group: Group) -> None:
    """Where steps in bfloat16 will be slow. Said before the first one, when nothing is wrong otherwise."""
    if config.dtype == "bfloat16" and not has_bfloat16(group.device) and group.rank == 0:
        print("--dtype bfloat16: this device only imitates it; float32 takes more memory, and may be faster",
              file=sys.stderr)


def run(trainer: Trainer, clips, out: Path, record: dict) -> int | None:
    """Steps until --steps or a signal -> the signal's number. record: that of the step resumed from."""
    config, group, parts = trainer.config, trainer.group, trainer.parts
    heard, stopped = listen(), False
    batches = shielded(batches_of(trainer, clips, out / "bad_clips.jsonl"))
    with Log(out, trainer.done, config.steps, group) as log:
        if record and group.any(log.last < trainer.done):   # killed after the checkpoint, before the log
            finish_step(trainer, out, log, record)
        while trainer.done < config.steps and not stopped:
            parts.seconds.clear()
            with parts("data"):
                batch = next(batches)
            record = trainer.step(batch)
            stopped = group.any(heard)
            if trainer.done % config.save_every == 0 or trainer.done == config.steps or stopped:
                save(trainer, out, record)
            finish_step(trainer, out, log, record)
    return (heard or [signal.SIGTERM])[0] if stopped else None


def batches_of(trainer: Trainer, clips, bad_file: Path) -> Iterator[dict]:
    """This process's batches from the step on that the trainer is at; v2: of two streams of the cache."""
    config, group = trainer.config, trainer.group

    def stream(dataset, total: int, seed: int) -> Iterator[dict]:
        return data.loader(dataset, total // group.world, group.rank, group.world, config.workers, seed,
                           trainer.done, bad_file)

    if not is_v2(config):
        yield from stream(clips, config.batch, config.seed)
        return
    distilled = clips.where(rewards=False) if config.rewards_on == "disjoint" else clips
    rewarded = clips if config.rewards_on == "all" else clips.where(rewards=True)
    pairs = zip(stream(distilled, config.batch, config.seed),
                stream(rewarded, config.reward_batch, config.seed + 1), strict=True)
    for first, second in pairs:
        yield {"distill": first, "rewards": second, "bad": first["bad"] + second["bad"]}


def finish_step(trainer: Trainer, out: Path, log: Log, record: dict) -> None:
    """Samples, where they are due, and the step's line in the log; both come after the checkpoint."""
    every, done = trainer.config.sample_every, trainer.done
    if every and (done % every == 0 or done == trainer.config.steps):
        record = record | show(trainer, out)
    log(done, record, trainer.parts)


def plan_of(config: Config) -> Plan:
    return Plan(config.grid, config.draws, config.inversion_steps, config.motion_share, config.fps,
                config.seed, config.micro)


def prepare_cache(config: Config, group: Group) -> None:
    """v2 Algorithm 1: what the teacher says about each clip, into the folder --prepare (see prepare.py)."""
    plan = plan_of(config)
    if is_toy(config):                      # every second clip carries rewards, as in v2's mixture of data
        clips = Chosen([toy_clips(config)] * 2, config.prepare_clips, config.seed)
    else:
        specs = [spec for spec in (config.data, config.reward_data) if spec]
        clips = Chosen([open_clips(config, spec, group) for spec in specs], config.prepare_clips, config.seed)

    models = load_models(config, group.device)
    models.unet.requires_grad_(False)
    models.unet.checkpointing = config.checkpointing
    header = {"model": model_name(config), "teacher": teacher_identity(models),
              "teacher_file": Path(config.teacher or "public").name, "clips": len(clips),
              "data": config.data, "reward_data": config.reward_data, "dtype": config.dtype,
              "frames": config.frames, "height": config.height, "width": config.width}
    header |= {name: value for name, value in dataclasses.asdict(plan).items() if name != "micro"}

    writer = data.CacheWriter(config.prepare, header, group.rank, group.world)
    stopped = prepare(plan, models, clips, writer, group)
    group.leave()
    if stopped:
        print(f"stopped by a signal; whole shards in {config.prepare} stay, and the same command goes on",
              file=sys.stderr)
        sys.exit(128 + stopped)
    if group.rank == 0:
        cache = data.Cache(config.prepare)
        print(f"{config.prepare}: {len(cache)} samples of {len(clips)} clips, "
              f"{cache.rewards.sum()} of them with rewards")


@cli.main
def main(argv: list[str] | None = None):
    """Trains until --steps or a signal; leaves log, samples, checkpoints, and at the end the weights."""
    config = configure(argv, __doc__)
    if config.dry_run is None:
        check_files(config)
    group = Group(config.device)
    torch.manual_seed(config.seed)                                  # LoRA starts alike on all processes
    if config.dry_run is not None:
        if config.prepare:
            return prepare_budget(config)
        world = load_world if is_toy(config) else random_world
        if config.dry_run:
            tell_of_imitation(config, group)
        return dryrun.report(config, group, world, CachedTrainer if is_v2(config) else Trainer)

    if config.prepare:
        return prepare_cache(config, group)
    out = Path(config.out)
    with Lock(out) if group.rank == 0 else nullcontext():
        state = resumed(config, open_folder(config, group), group)
        models, clips, terms = load_world(config, group)
        trainer = (CachedTrainer if is_v2(config) else Trainer)(config, models, terms, group)
        if state:
            trainer.load_state(state)
        record = state.get("record", {}) if state else {}
        del state                                                   # its file may be deleted from here on
        checkpoint_size = trainer.gradient.nbytes * (4 if trainer.ema else 3)
        check_room(out, checkpoint_size, config.keep, export_size(trainer))

        tell_of_imitation(config, group)
        stopped = run(trainer, clips, out, record)
        if stopped is None and group.rank == 0:
            with trainer.offload(trainer.student):
                export(trainer, out)
    group.leave()
    if stopped:
        print(f"stopped by a signal, and saved at step {trainer.done}; go on with --resume auto",
              file=sys.stderr)
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
