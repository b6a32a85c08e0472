"""Training, on a CPU, a GPU, or many: Algorithm 1 of T2V-Turbo (arXiv 2405.18750) and Algorithm 2 of
T2V-Turbo-v2 (arXiv 2410.05677), whose Algorithm 1 is prepare.py.

    python train.py --preset shapes                                                 # the toy, on a laptop
    torchrun --nproc_per_node=8 train.py --preset turbo-vc2 --teacher model.ckpt --out runs/vc2 \\
        --data '/data/webvid/{00000..09999}.tar' --reward hpsv2=FILE --reward internvideo2=FILE    # the paper
    torchrun --nproc_per_node=8 train.py --preset turbo-v2 --data CACHE --out runs/v2 \\
        --reward hpsv2=FILE --reward clip=FILE --reward internvideo2=FILE       # v2, from what prepare.py made

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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

import data
import model
import rewards
import shapes
from model import FAMILIES, Family, Models, TextEncoder, UNet3D, VAE, condition_layers, to_clip
from plumbing import cli, dryrun, video, weights
from plumbing.cli import Count, File, Folder, Seed, Share, Size, Within
from plumbing.errors import UserError
from plumbing.files import check_outputs
from plumbing.folder import (
    Log,
    check_room,
    check_unchanged,
    locked,
    open_folder,
    read_checkpoint,
    save_checkpoint,
)
from plumbing.run import Group, Offload, Parts, has_bfloat16, pick_device, stop_signals, usual_dtype
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

# ---- options and presets -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What only a preset fixes. Defaults are T2V-Turbo (VC2); where nothing else is said, the paper's Sec. 4."""
    fps: float = 16             # of clips, an input of VC2's UNet; released code: 16; MS and v2: 8
    grid: int = 50              # N of the distillation grid; released code, num_ddim_timesteps
    w_min: float = 5.0          # ω ~ U[w_min, w_max]
    w_max: float = 15.0
    image_weight: float = 1.0   # β_img of an image reward; 2 (MS)
    video_weight: float = 2.0   # β_vid of a video reward; 3 (MS)
    image_frames: int = 6       # M, random frames for an image reward (released code: 5)
    video_frames: int = 8       # evenly strided frames for a video reward
    clip: float = 1.0           # largest gradient norm; released code
    checkpointing: bool = True  # recompute the UNet's activations in the backward pass
    motion_share: float = 0.5   # τ of v2: motion guidance at t >= 1000 (1 - τ)
    inversion_steps: int = 50   # prepare.py: grid of the DDIM inversion; released code: 200
    released_motion: bool = False   # motion guidance with the released code's √(1 - √ᾱ), not √(1 - ᾱ)
    reward_every: int = 3       # v2: rewards see one clip for so many that are distilled; paper: 8 of 24
    on_policy: float = 0.0      # share of clips with z_t where the student's own sampling comes; papers: none
    lr_fall: float = 0.0        # last share of the steps, over which the rate falls to 0; papers: constant
    pairs: float = 0.3          # shapes: share of clips with two things, which teach what belongs to what
    prompts: tuple[str, ...] = ("a corgi runs through a meadow", "waves at sunset")     # of sample clips
    guidance: float = 7.5       # ω of sample clips


Preset = Literal[
    "shapes", "shapes-vcm", "shapes-v2", "vcm-vc2", "turbo-vc2", "vcm-ms", "turbo-ms", "turbo-v2"]


@dataclass(frozen=True)
class Config(Recipe):
    """The options of the command line."""
    # ---- what is trained
    preset: Preset = "shapes"       # method and teacher: all defaults, see PRESETS in train.py
    teacher: File = ""               # VC2's model.ckpt, MS's folder [downloaded; shapes: embedded]
    init: File = ""                  # student's file to start from instead of from the teacher, for fine-tuning
    data: tuple[str, ...] = ()      # folder, manifest or shards of captioned clips, repeatable; v2: the cache
    columns: str = ""               # names of a manifest's columns: path=A,caption=B,reward_caption=C
    video_root: Folder = ""            # folder of a manifest's relative paths [the manifest's own]
    reward: tuple[str, ...] = ("hpsv2", "internvideo2")  # NAME[=FILE][:WEIGHT], repeatable; all that are used
    # ---- the clips
    frames: Annotated[int, Within(1, 1024)] = 16    # frames of a clip; paper, Sec. 4
    height: Annotated[int, Within(1, 8192)] = 320   # height of the clips in pixels; 256 (MS)
    width: Annotated[int, Within(1, 8192)] = 512    # width of the clips in pixels; 256 (MS)
    # ---- method
    ema: Share = 0.95               # decay of the target network θ⁻; v1 Eq. 6; 0: θ itself (released code)
    motion: Annotated[float, Within(0, 1000)] = 0.05    # v2: λ' of motion guidance; released code; 0: none
    lora: Annotated[int, Within(0, 4096)] = 64      # rank of LoRA; released: 64 (VC2), 32 (MS); 0: all weights
    # ---- optimisation
    train_steps: Count = 10000      # steps of the optimizer; paper, Sec. 4: 10K
    batch: Count = 8                # clips per step, of all processes together; paper, Sec. 4: 1 per GPU
    micro_batch: Count = 1          # clips per forward pass of a process: memory against speed
    lr: Annotated[float, Within(0, 1, above=True)] = 1e-5   # learning rate of AdamW; paper, Sec. 4
    seed: Seed = 0                  # of LoRA's start, the order of clips, and all that Algorithm 1 draws
    # ---- machine
    device: str = ""                # cpu, cuda [cuda if there, a GPU per process]
    dtype: Literal["float32", "bfloat16"] | None = "bfloat16"   # type of the networks; shapes: the faster one
    offload: bool = False           # what a part of a step does not need waits in host memory: for small GPUs
    chunk: Size = 2                 # frames whose decoder graph is held at a time; 0: all, decoded once
    workers: Size = 4               # threads that decode clips, per process
    dry_run: Size | None = None     # N steps with random weights, then their time and memory; 0: simulated
    # ---- output
    out: Folder = ""                   # folder of weights, checkpoints, log.jsonl, samples [runs/PRESET]
    resume: str = ""                # auto (the last checkpoint in OUT, if any) or a checkpoint's path
    save_every: Count = 500         # steps between checkpoints; the last two are kept
    sample_every: Size = 500        # steps between sample clips; 0: never
    merge: bool = False             # at the end also merged.safetensors; vc2: t2v_turbo_vc2.pt; ms: unet/ of diffusers


MS = dict(height=256, width=256, fps=8, lora=32, image_weight=2.0, video_weight=3.0, reward=("hpsv2", "viclip"))
VCM = dict(reward=())
V2 = dict(
    fps=8, grid=200, ema=0.0, image_weight=0.2, video_weight=0.5, reward=("hpsv2", "clip", "internvideo2"),
    image_frames=2, video_frames=4, train_steps=8000, batch=24, lora=0)
SHAPES = dict(
    frames=8, height=64, width=64, fps=8, grid=8, w_min=0.5, w_max=3.0,
    reward=("shapes-clip", "shapes-viclip"), image_frames=4, video_frames=4,
    train_steps=200, micro_batch=8, lr=1e-3, lora=7, checkpointing=False, chunk=0, dtype=None, workers=0,
    save_every=50, sample_every=50, guidance=2.0,
    prompts=("a red circle moving right", "a blue square rising on white"))
LONGER = dict(train_steps=800, lr_fall=1.0, on_policy=0.5, pairs=0.7)      # without rewards it gets worse
PRESETS = {
    "shapes": SHAPES | LONGER, "shapes-vcm": SHAPES | VCM, "shapes-v2": SHAPES | dict(ema=0.0, batch=6),
    "turbo-vc2": {}, "vcm-vc2": VCM, "turbo-ms": MS, "vcm-ms": MS | VCM, "turbo-v2": V2}

PATHS = {"teacher", "init", "data", "columns", "video_root", "reward", "out", "resume", "device"}   # of a machine
MAY_CHANGE = PATHS | {                              # when a run is resumed; nothing else may
    "dry_run", "train_steps", "micro_batch", "lr", "lr_fall", "checkpointing", "offload", "chunk", "workers",
    "save_every", "sample_every", "prompts", "guidance", "merge"}


def is_toy(config: Config) -> bool:
    return config.preset.startswith("shapes")


def is_v2(config: Config) -> bool:
    return config.preset.endswith("v2")


def has_motion(config: Config) -> bool:
    """Is λ' an input of the student?"""
    return is_v2(config) and config.motion > 0


def reward_batch(config: Config) -> int:
    """v2: clips per step that rewards see, of all processes together."""
    return math.ceil(config.batch / config.reward_every)


def model_name(config: Config) -> str:
    """shapes, vc2 or ms: whose teacher it is."""
    if is_toy(config):
        return "shapes"
    return "ms" if config.preset.endswith("ms") else "vc2"


def family_of(config: Config) -> Family:
    """The teacher's architecture and the clips it was trained for."""
    return shapes.FAMILY if is_toy(config) else FAMILIES[model_name(config)]


def configure(argv: list[str] | None = None, description: str = "") -> Config:
    """Command line over preset over defaults, checked before a file is opened."""
    preset = cli.typed(Config, argv).get("preset", Config.preset)
    config = cli.parse(Config, argv, description, defaults={"out": f"runs/{preset}"} | PRESETS[preset])
    check_options(config, cli.given(Config, argv))
    if config.dtype is None:
        config = dataclasses.replace(config, dtype=usual_dtype(pick_device(config.device)))
    return config


def check_options(config: Config, typed: set[str]) -> None:
    """Refuses options that have no effect here, or do not fit each other."""
    toy, v2, training = is_toy(config), is_v2(config), config.dry_run is None
    public = "--preset turbo-vc2 and the like"
    belongs = {                         # option -> does it take effect, what it belongs to
        "data": (v2 or not toy, f"{public}; the toy draws its own clips"),
        "columns": (not v2 and not toy, public),
        "video_root": (not v2 and not toy, public),
        "ema": (not v2, f"{public}; v2's target is the student itself"),
        "motion": (v2, "--preset turbo-v2 or shapes-v2"),
        "merge": (config.lora, "--lora; without it turbo.safetensors is the whole UNet"),
        "resume": (training, "training; --dry-run begins anew"),
        "init": (training, "training; --dry-run begins anew")}
    for name, (effective, owner) in belongs.items():
        if name in typed and not effective:
            raise UserError(f"{cli.flag_of(name)} has no effect here: it belongs to {owner}")

    model.check_size(family_of(config), height=config.height, width=config.width)
    if toy and config.height != config.width:
        raise UserError(f"--width {config.width}: the toy's clips are square; try --width {config.height}")
    if config.device.startswith("mps"):
        raise UserError("--device mps: training sums in float64, which MPS lacks; try --device cpu")
    planned_rewards(config)


def check_files(config: Config) -> None:
    """Refuses files that are not there, and an --out that is one of them, before anything is loaded."""
    if is_v2(config) and len(config.data) != 1:
        raise UserError("v2 trains from a cache: make one with prepare.py, then give it as --data CACHE")
    if not is_toy(config) and not config.data:
        raise UserError("no clips to train on; name them with --data, or try --dry-run 1")

    named = [("--teacher", config.teacher), ("--init", config.init)]
    named += [(f"--reward {reward.name}", reward.path) for reward in planned_rewards(config)]
    for option, path in named:
        if path and not Path(path).expanduser().exists():
            raise UserError(f"{option} {path}: no such file or folder")
    init = [config.init, Path(config.init).parent] if config.init else []
    check_outputs({"--out": config.out}, {"--teacher": config.teacher, "--data": config.data, "--init": init})


def check_resume(config: Config, state: dict, path: Path) -> None:
    """Refuses to go on with another method or fewer steps."""
    check_unchanged(state["config"], config, MAY_CHANGE)
    before, now = (
        ", ".join(f"{reward.name} ({reward.weight:g})" for reward in planned_rewards(each)) or "none"
        for each in (dataclasses.replace(config, reward=tuple(state["config"]["reward"])), config))
    if before != now:
        raise UserError(f"this run began with the rewards {before}, not {now}; go on with those, or choose "
                        "another --out")
    if state["step"] > config.train_steps:
        raise UserError(f"{path} is at step {state['step']}, past --train-steps {config.train_steps}; "
                        "resume an earlier checkpoint, or raise --train-steps")


@dataclass(frozen=True)
class PlannedReward:
    """A reward before it is loaded."""
    name: str
    path: str | None                # None: downloaded
    kind: Literal["image", "video"]
    weight: float                   # its own, or β of its kind
    frames: int                     # of a clip that it is shown


def planned_rewards(config: Config) -> list[PlannedReward]:
    """The rewards of --reward; those of weight zero are not loaded."""
    planned = {}
    for spec in config.reward:
        name, path, weight = rewards.parse_spec(spec)
        kind = rewards.RECIPES[name].kind
        weight = getattr(config, f"{kind}_weight") if weight is None else weight
        frames = getattr(config, f"{kind}_frames")
        if name != "motion" and name.startswith("shapes-") != is_toy(config):
            raise UserError(f"--reward {name} does not belong to --preset {config.preset}; the toy's are "
                            "shapes-clip and shapes-viclip, and no other preset takes those")
        if name in planned:
            raise UserError(f"--reward {name} is given twice; give it once, with the sum of its weights")
        if frames > config.frames:
            raise UserError(f"--frames {config.frames}: {name} looks at {frames} frames of a clip")
        planned[name] = PlannedReward(name, path, kind, weight, frames)
    return [reward for reward in planned.values() if reward.weight]


# ---- the trainer -------------------------------------------------------------------------------------------


def generator(seed: int, position: int) -> torch.Generator:
    """The random stream of Algorithm 1 for the clip at a position of the run.

    torch reads 32 bits of a CPU seed; the odd factor sets the streams of different seeds apart.
    """
    return torch.Generator().manual_seed((seed * 2654435761 + position) % 2 ** 32)


class Autocast(nn.Module):
    """A network as the trainer calls it: products in --dtype. One autocast per call, as autocast keeps its
    casts of weights, and θ and θ⁻ change places between calls."""

    def __init__(self, network: nn.Module, dtype: str):
        super().__init__()
        self.network, self.on = network, dtype == "bfloat16"

    def forward(self, z: Tensor, *args, **conditions) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, self.on):
            return self.network(z, *args, **conditions)


class Trainer:
    """Student, teacher, target, rewards and optimizer; `step` is one round of Algorithm 1."""
    fingerprint = ""                    # of the teacher

    def __init__(self, config: Config, models: Models, terms: list[RewardTerm], group: Group,
                 parts: Parts | None = None, to_host: Callable[[Tensor], list[float]] = Tensor.tolist):
        """to_host: brings a step's sums to the CPU; a simulation has its own, as its tensors are empty."""
        for clips in (config.batch, reward_batch(config) if is_v2(config) else config.batch):
            if clips % group.world_size:
                more = math.ceil(config.batch / group.world_size) * group.world_size
                more *= config.reward_every if is_v2(config) else 1
                raise UserError(f"a batch of {clips} clips cannot be split over {group.world_size} processes; "
                                f"try --batch {more}")
        self.config, self.models, self.terms, self.group = config, models, terms, group
        self.parts, self.to_host = parts or Parts(group.device), to_host
        self.schedule = Schedule(config.grid, group.device)

        # networks, and what of them is trained
        self.prepare_networks(config, group.device)
        if config.init:
            self.start_from(config.init)
        self.named = {name: p for name, p in models.unet.named_parameters() if p.requires_grad}
        self.params = list(self.named.values())
        self.ema = EMA(self.params, config.ema) if config.ema else None
        with torch.no_grad():
            self.uncond = models.text([""])                         # ∅

        # what waits in host memory
        self.offload = Offload(group.device, config.offload)
        self.judges = [term.reward.model for term in terms] if config.offload else []
        for network in dict.fromkeys([models.text, self.student, self.teacher, *self.judges]):
            self.offload.keep(network, [p for p in network.parameters() if not p.requires_grad])

        # the optimizer
        self.gradient = flat_gradient(self.params)
        self.optimizer = torch.optim.AdamW(self.params, config.lr, weight_decay=0, fused=True)

        # counters
        self.done = 0                   # steps
        self.skipped = 0                # steps in a row without a finite gradient
        self.clips_skipped = 0          # unusable clips before this start of the run

    def prepare_networks(self, config: Config, device: torch.device) -> None:
        """Student and teacher out of one UNet: with LoRA they share it, else the teacher is a frozen copy."""
        unet = self.models.unet.eval()
        unet.config = dataclasses.replace(unet.config, guidance=True, motion=has_motion(config))
        for name, layer in condition_layers(unet.config).items():   # at zero: the student starts as its teacher
            if not hasattr(unet, name):
                unet.add_module(name, layer.to(device, unet.dtype))
        unet.checkpointing = config.checkpointing
        self.student = self.teacher = Autocast(unet, config.dtype)

        if config.lora:                     # with LoRA off the student is the teacher: one copy
            conv1d = ("init_attn.0.proj_in", "init_attn.0.proj_out")    # in VC2; not in the published LoRA
            inject(unet, config.lora, skip=conv1d if unet.config.fps else ())
            return
        if not is_v2(config):               # whose teacher is a cache
            teacher = copy.deepcopy(unet).requires_grad_(False)
            for name, p in teacher.named_parameters():
                precise = name.startswith("out.")                       # see UNet3D.last
                p.data = p.data.to(torch.float32 if precise else getattr(torch, config.dtype))
            self.teacher = Autocast(teacher, config.dtype)
        unet.requires_grad_(True)

    @torch.no_grad()
    def start_from(self, path: str) -> None:
        """--init: the student starts as another student, whose LoRA or weights are copied into its own."""
        unet, rank = self.models.unet, self.config.lora
        _, state, lora, _ = model.read_turbo(path, unet.config, model_name(self.config))
        if lora is not None:
            state = {f"{name}.{end}": x for name, (up, down) in lora.items()
                     for end, x in (("up", up), ("down", down))}
        if bool(lora) != bool(rank):
            raise UserError(f"--init {path} holds " + ("LoRA: train it with --lora, its rank" if lora
                                                       else "whole weights: train them with --lora 0"))
        own = lora_state(unet) if rank else unet.state_dict()
        for name, x in state.items():
            if name not in own or x.shape != own[name].shape:
                raise UserError(f"--init {path}: {name} does not fit; its LoRA may be of another rank than "
                                f"--lora {rank}, or its UNet another one")
            own[name].copy_(x)

    @contextmanager
    def part(self, name: str, *owners):
        """A part of a step: its time is taken, and its networks are on the device (--offload)."""
        with self.parts(name), self.offload(*owners):
            yield

    def step(self, batch: dict) -> dict[str, float]:
        """One step on this process's clips of a batch -> its record in the log, the same on all processes."""
        self.gradient.zero_()
        metrics = self.gradients(batch)

        with self.part("update", self.optimizer):
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

    def gradients(self, batch: dict) -> Tensor:
        """The gradient of this process's clips -> their share of the metrics: loss, L_CD, rewards."""
        return sum(self.accumulate(*some) for some in self.micro_batches(batch, self.config.batch))

    def micro_batches(self, batch: dict, total: int) -> Iterator[tuple[dict, range]]:
        """A few clips at a time, with their places in the run. total: clips of a step on all processes."""
        own, micro = total // self.group.world_size, self.config.micro_batch
        first = (self.done * self.group.world_size + self.group.rank) * own
        for start in range(0, own, micro):
            end = min(start + micro, own)
            clips = {name: values[start:end] for name, values in batch.items() if name != "bad"}
            yield clips, range(first + start, first + end)

    def accumulate(self, clips: dict, positions: range) -> Tensor:
        """Algorithm 1 on a few clips: adds their share of the gradient -> that of loss, L_CD, rewards."""
        generators = [generator(self.config.seed, position) for position in positions]
        w_range, told = (self.config.w_min, self.config.w_max), dict(fps=self.config.fps)

        with self.part("encode", self.models.text):
            z0, c = self.encode(clips, generators)
        with self.part("distill", self.student, self.teacher):
            step = Step.draw(z0, self.schedule, w_range, generators)            # t, ω and ε of each clip
            z0, step = self.on_policy(z0, step, c, generators)
            loss_cd, z0_hat = distill(self.student, self.teacher, self.ema, self.schedule, step, z0, c,
                                      self.uncond.expand_as(c), **told)
        g, scores = self.rewards_of(z0_hat, clips, generators)
        with self.part("backward", self.student):
            share = len(positions) / self.config.batch
            (share * total_loss(loss_cd, z0_hat, g)).backward()
        return share * self.metrics(loss_cd, scores)

    @torch.no_grad()
    def encode(self, clips: dict, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Latents z0 (B, C, T, h, w), drawn from the VAE's posterior, and caption embeddings c."""
        x = clips["clip"].to(self.group.device) / 127.5 - 1
        shape = self.latent(*x.shape[2:])
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(x.device)
        return self.models.vae.encode(x, noise).float(), self.models.text(clips["caption"])

    def latent(self, T: int, H: int, W: int) -> tuple[int, int, int, int]:
        """Shape of the latents of a clip."""
        vae = self.models.vae.config
        return vae.latent, T, H // vae.factor, W // vae.factor

    def on_policy(self, z0: Tensor, step: Step, c: Tensor, generators: list[torch.Generator]
                  ) -> tuple[Tensor, Step]:
        """Beyond the papers: a share of the clips goes where the student comes when it samples."""
        if not self.config.on_policy:
            return z0, step

        def f(z, t, i):
            return consistency(self.student, self.schedule, z, t, step.w[i:i + 1], c[i:i + 1],
                               fps=self.config.fps)

        jumps = min(4, self.config.grid)
        return on_policy(f, self.schedule, z0, step, self.config.on_policy, jumps, generators)

    def rewards_of(self, z0_hat: Tensor, clips: dict, generators: list[torch.Generator]
                   ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """∂(β_img J_img + β_vid J_vid)/∂ẑ0, and the scores of each reward; None, {} without rewards."""
        if not self.terms:
            return None, {}
        with self.part("rewards", *self.judges):
            return reward_gradient(z0_hat, reward_captions(clips), self.models.vae.decode, self.terms,
                                   generators, self.config.chunk)

    def metrics(self, loss_cd: Tensor, scores: dict[str, Tensor]) -> Tensor:
        """Loss, L_CD and each reward, as the log has them."""
        means = [scores[term.name].mean() for term in self.terms]
        loss = loss_cd - sum(term.weight * mean for term, mean in zip(self.terms, means))
        return torch.stack([loss, loss_cd, *means]).detach().double()

    def update(self, norm: Tensor, lr: float, finite: bool) -> None:
        """AdamW and EMA; neither if anything is inf or nan: the sums then are so on all processes alike."""
        if not finite:
            self.skipped += 1
            if self.skipped == 10:
                raise UserError("10 steps in a row without a finite gradient; resume an earlier checkpoint "
                                "with a lower --lr")
            return
        self.skipped = 0
        self.gradient *= (self.config.clip / (norm + 1e-6)).clamp(max=1)
        first = not self.optimizer.state
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if first:
            self.keep_moments()
        if self.ema:
            self.ema.update()

    def keep_moments(self) -> None:
        """The optimizer's moments wait in host memory between the steps (--offload)."""
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        self.offload.keep(self.optimizer, moments)

    def state(self, record: dict) -> dict:
        """All that the next step depends on. record: the last step's.

        No random state is in it: draws depend on the seed and the position alone.
        """
        return dict(
            config=dataclasses.asdict(self.config), teacher=self.fingerprint, step=self.done, record=record,
            steps_skipped=self.skipped, clips_skipped=record["clips_skipped"],
            params={name: p.detach() for name, p in self.named.items()},
            ema=self.ema.average if self.ema else [], optimizer=self.optimizer.state_dict())

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        if state["teacher"] != self.fingerprint:
            raise UserError("this run began with another teacher; go on with that one (--teacher), or choose "
                            "another --out")
        for name, p in self.named.items():
            p.copy_(state["params"][name])
        for average, saved in zip(self.ema.average if self.ema else [], state["ema"], strict=True):
            average.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        for moments in self.optimizer.state.values():               # the file's own, where the device is the same
            moments.update({name: x.clone() for name, x in moments.items()})
        self.keep_moments()
        self.done, self.skipped = state["step"], state["steps_skipped"]
        self.clips_skipped = state["clips_skipped"]


class CachedTrainer(Trainer):
    """v2 Algorithm 2: what the teacher says comes from a cache, and rewards look at clips of their own.

    A batch is {"distill": samples of the cache, "rewards": others of them, "bad": as in every batch}.
    """

    def gradients(self, batch: dict) -> Tensor:
        steps = [self.distill(*some) for some in self.micro_batches(batch["distill"], self.config.batch)]
        if self.terms:
            total = reward_batch(self.config)
            steps += [self.reward(*some) for some in self.micro_batches(batch["rewards"], total)]
        return sum(steps)

    def distill(self, samples: dict, positions: range) -> Tensor:
        """L_CD of some samples."""
        cached, w, c, motion = self.read(samples, positions, self.config.seed)
        with self.part("distill", self.student):
            loss_cd, _ = distill_cached(self.student, self.schedule, cached, w, c, motion,
                                        self.config.released_motion, fps=self.config.fps)
        with self.part("backward", self.student):
            share = len(positions) / self.config.batch
            (share * loss_cd).backward()
        none = dict.fromkeys((term.name for term in self.terms), torch.zeros_like(loss_cd))
        return share * self.metrics(loss_cd, none)

    def reward(self, samples: dict, positions: range) -> Tensor:
        """- β_img J_img - β_vid J_vid of the one-step generations ẑ0 of some samples."""
        cached, w, c, motion = self.read(samples, positions, self.config.seed + 1)
        generators = [generator(self.config.seed + 2, position) for position in positions]
        told = dict(fps=self.config.fps) | ({} if motion is None else {"motion": motion})
        with self.part("distill", self.student):
            z0_hat = consistency(self.student, self.schedule, cached.z_t, cached.t, w, c, **told)
        g, scores = self.rewards_of(z0_hat, samples, generators)
        with self.part("backward", self.student):
            share = len(positions) / reward_batch(self.config)
            (share * total_loss(0.0, z0_hat, g)).backward()
        return share * self.metrics(w.new_zeros(()), scores)

    def read(self, samples: dict, positions: range, seed: int
             ) -> tuple[TeacherOutput, Tensor, Tensor, Tensor | None]:
        """What the cache says, on the device in float32; ω drawn anew; and λ' of each sample, or None."""
        config, device = self.config, self.group.device
        t, *tensors, c = (samples[name].to(device) for name in ("t", "z_t", "eps_c", "eps_u", "gradient", "c"))
        cached = TeacherOutput(t, *(x.float() for x in tensors))

        uniform = [torch.rand(1, generator=generator(seed, position)) for position in positions]
        w = (torch.cat(uniform) * (config.w_max - config.w_min) + config.w_min).to(device)
        motion = motion_strength(t, config.motion, config.motion_share) if has_motion(config) else None
        return cached, w, c.float(), motion


def flat_gradient(params: list[nn.Parameter]) -> Tensor:
    """One tensor of which every p.grad is a view: one all-reduce, one norm, one check that all is finite."""
    sizes = [p.numel() for p in params]
    flat = torch.zeros(sum(sizes), device=params[0].device)
    for p, piece in zip(params, flat.split(sizes), strict=True):
        p.grad = piece.as_strided(p.shape, p.stride())              # in the parameter's memory format
    return flat


def learning_rate(config: Config, done: int) -> float:
    """Of the step after `done` ones: constant, or falling to 0 over the last share of the run."""
    left = 1 - done / config.train_steps
    return config.lr * min(left / config.lr_fall, 1) if config.lr_fall else config.lr


def reward_captions(samples: dict) -> list[str]:
    """What rewards read: the reward caption of each clip where it has one."""
    pairs = zip(samples["reward_caption"], samples["caption"], strict=True)
    return [short or full for short, full in pairs]


# ---- what a run needs --------------------------------------------------------------------------------------


def load_world(config: Config, group: Group) -> tuple[Models, object, list[RewardTerm]]:
    """Networks, dataset of captioned clips, and reward terms."""
    if is_toy(config):
        load_reward = partial(toy_reward, device=group.device, folder=config.teacher or None)
    else:
        load_reward = partial(rewards.load, device=group.device, dtype=getattr(torch, config.dtype))
    if is_v2(config):
        clips = data.Cache(config.data[0], cache_header(config))
    else:
        clips = toy_clips(config) if is_toy(config) else open_clips(config, config.data, group)
    terms = reward_terms(config, load_reward)
    models = load_models(config, group.device)
    if is_v2(config) and clips.header["teacher"] != teacher_fingerprint(models):
        raise UserError(f"the cache in {config.data[0]} was made by another teacher; give that one with --teacher")
    return models, clips, terms


def load_models(config: Config, device: torch.device) -> Models:
    """The teacher; in float32 where all of its weights are to be trained."""
    if is_toy(config):
        return shapes.load(folder=config.teacher or None, device=device)
    dtype = getattr(torch, config.dtype)
    models = model.load(model_name(config), config.teacher or None, device=device,
                        dtype=dtype if config.lora else torch.float32)
    models.vae.to(dtype)
    models.text.to(dtype)
    return models


def teacher_fingerprint(models: Models) -> str:
    """A teacher's fingerprint, whatever dtype it is in; without the layers that a student adds."""
    added = ("time_cond_proj", "motion_cond_proj", "combine_proj")
    state = models.unet.state_dict()
    return weights.fingerprint({name: x for name, x in state.items() if not name.startswith(added)})


def toy_clips(config: Config) -> shapes.Clips:
    return shapes.Clips(frames=config.frames, size=config.height, pairs=config.pairs)


def open_clips(config: Config, specs: tuple[str, ...], group: Group) -> data.ClipDataset:
    """The captioned clips of --data."""
    manifest = {name: getattr(config, name) for name in ("columns", "video_root") if getattr(config, name)}
    with group.rank0_first():               # it indexes shards, the others read the index
        return data.open_dataset(specs, config.frames, config.fps, config.height, config.width,
                                 cache=config.out, **manifest)


def cache_header(config: Config) -> dict:
    """What the header of a cache that this run trains from must say."""
    names = ["grid", "frames", "height", "width", "fps"] + ["motion_share"] * has_motion(config)
    return {"model": model_name(config)} | {name: getattr(config, name) for name in names}


def reward_terms(config: Config, load: Callable) -> list[RewardTerm]:
    """β_img R_img and β_vid R_vid. load(name, path, frames=) makes a reward; frames: None for images."""
    terms = []
    for planned in planned_rewards(config):
        is_video = planned.kind == "video"
        reward = load(planned.name, planned.path, frames=planned.frames if is_video else None)
        for p in reward.model.parameters() if config.offload else ():
            p.data = Offload.to_host(p)         # at once, so that one reward at a time is on the device
        terms.append(RewardTerm(reward, planned.weight, planned.frames, is_video, planned.name))
    return terms


def toy_reward(name: str, path: str | None, frames: int | None, device: torch.device,
               folder: str | None) -> rewards.Reward:
    """One of the toy's rewards, which lie with its teacher, or motion, which has no file."""
    if name == "motion":
        return rewards.load(name, path, device)
    if path:
        raise UserError(f"--reward {name}={path}: the toy's rewards lie in the folder of --teacher; "
                        f"leave ={path} out")
    return shapes.rewards(device, folder)[rewards.RECIPES[name].kind]


def random_world(config: Config, group: Group) -> tuple[Models, None, list[RewardTerm]]:
    """What `load_world` returns for a published model, but random, and without clips: no file is read."""
    device, dtype, family = group.device, getattr(torch, config.dtype), family_of(config)

    def random_reward(name, path, frames):
        with dryrun.build(device, dtype):
            return rewards.untrained(name, device, dtype, frames)

    terms = reward_terms(config, random_reward)
    unet_config = dataclasses.replace(family.unet, guidance=True, motion=has_motion(config))
    with dryrun.build(device, dtype if config.lora else torch.float32):
        unet = UNet3D(unet_config)
    with dryrun.build(device, dtype):
        vae, text = VAE(family.vae).requires_grad_(False), TextEncoder(family.text).requires_grad_(False)
    return Models(model_name(config), unet, vae, text, family), None, terms


# ---- what a run leaves -------------------------------------------------------------------------------------


def show(trainer: Trainer, out: Path) -> dict[str, float]:
    """OUT/samples: this process's share of the prompts, from the same noise. The toy is judged, too."""
    config, models, group = trainer.config, trainer.models, trainer.group
    size = config.frames, config.height, config.width
    sampling = Sampling("student", min(4, config.grid), config.guidance, config.grid, config.fps,
                        config.motion if has_motion(config) else None, config.motion_share)
    student = SimpleNamespace(unet=trainer.student, vae=models.vae, text=models.text)

    def make(captions: list[str], seeds: list[int]) -> Tensor:
        """Clips uint8 (B, 3, T, H, W) on the CPU, as the student makes them now."""
        with trainer.offload(trainer.student, models.text):
            z = generate(student, captions, seeds, size, sampling)
        return to_clip(models.vae, z, config.chunk).cpu()

    for i in range(group.rank, len(config.prompts), group.world_size):
        path = out / "samples" / f"step-{trainer.done:06d}-{i}.gif"
        video.write_video(path, make([config.prompts[i]], [i])[0], config.fps)
    return {"oracle": shapes.accuracy(make)} if is_toy(config) else {}


def header(trainer: Trainer) -> dict:
    """What turbo.safetensors says about itself; model.py reads it."""
    config, method = trainer.config, "turbo" if trainer.terms else "vcm"
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in PATHS}
    return {
        "version": 2, "model": model_name(config), "method": "turbo-v2" if is_v2(config) else method,
        "teacher": trainer.fingerprint, "grid": config.grid, "steps": config.grid,     # steps: as older files say
        "w_min": config.w_min, "w_max": config.w_max, "rank": config.lora,
        "fps": config.fps, "frames": config.frames, "height": config.height, "width": config.width,
        "motion": config.motion if has_motion(config) else None,
        "motion_share": config.motion_share if has_motion(config) else None,
        "rewards": [term.name for term in trainer.terms], "train": options}


def export(trainer: Trainer, out: Path) -> None:
    """turbo.safetensors for sample.py; on demand the merged UNet."""
    config, unet, about = trainer.config, trainer.models.unet, header(trainer)
    if not trainer.optimizer.state:
        raise UserError(f"{out}: no step had a finite gradient, so there is no student to export; "
                        "start again with a lower --lr")
    state = lora_state(unet) if config.lora else unet.state_dict()
    if is_toy(config):                      # the toy's weights come with the repository
        state = {name: x.half() for name, x in state.items()}
    for name, x in state.items():
        if not x.isfinite().all():
            raise UserError(f"{out}: {name} of the student is not finite, so it is not exported; "
                            "resume an earlier checkpoint with a lower --lr")

    weights.save_checkpoint(out / "turbo.safetensors", state, about)
    if config.merge:
        whole = merge(unet.float()).state_dict()
        weights.save_checkpoint(out / "merged.safetensors", whole, about)
        if about["model"] == "vc2":         # for the released code and others
            weights.save_merged(out / "t2v_turbo_vc2.pt", config.teacher or model.fetch("vc2"), whole)
        if about["model"] == "ms":          # for diffusers
            weights.save_diffusers(out / "unet", whole, about)


def export_size(trainer: Trainer) -> int:
    """Bytes of what `export` writes, or a little more: LoRA is merged, and the toy's weights are halved."""
    whole = 4 * sum(p.numel() for p in trainer.models.unet.parameters())
    merged = whole * (1 if is_toy(trainer.config) else 2)
    return trainer.gradient.nbytes + merged * trainer.config.merge


# ---- the run -----------------------------------------------------------------------------------------------


def run(trainer: Trainer, clips, out: Path, record: dict) -> int | None:
    """Steps until --train-steps or a signal -> the signal's number. record: that of the step resumed from."""
    config, group, parts = trainer.config, trainer.group, trainer.parts
    received, stopped = stop_signals(), False
    batches = batches_of(trainer, clips, out / "bad_clips.jsonl")
    with Log(out, trainer.done, config.train_steps, group) as log:
        if record and group.any(log.last < trainer.done):   # killed after the checkpoint, before the log
            finish_step(trainer, out, log, record)
        while trainer.done < config.train_steps and not stopped:
            parts.seconds.clear()
            with parts("data"):
                batch = next(batches)
            record = trainer.step(batch)
            stopped = group.any(received)
            last = trainer.done == config.train_steps
            if group.rank == 0 and (trainer.done % config.save_every == 0 or last or stopped):
                save_checkpoint(out, trainer.done, trainer.state(record))
            finish_step(trainer, out, log, record)
    return (received or [signal.SIGTERM])[0] if stopped else None


def batches_of(trainer: Trainer, clips, bad_file: Path) -> Iterator[dict]:
    """This process's batches from the step on that the trainer is at; v2: of two streams of the cache."""
    config, group = trainer.config, trainer.group

    def stream(dataset, total: int, seed: int) -> Iterator[dict]:
        return data.loader(dataset, total // group.world_size, group.rank, group.world_size, config.workers,
                           seed, trainer.done, bad_file)

    distilled = stream(clips, config.batch, config.seed)
    if not is_v2(config):
        yield from distilled
    elif not trainer.terms:
        yield from ({"distill": first, "bad": first["bad"]} for first in distilled)
    else:                                   # rewards see clips with captions short enough for them
        rewarded = stream(data.Cache(clips.folder, only_rewards=True), reward_batch(config), config.seed + 1)
        for first, second in zip(distilled, rewarded, strict=True):
            yield {"distill": first, "rewards": second, "bad": first["bad"] + second["bad"]}


def finish_step(trainer: Trainer, out: Path, log: Log, record: dict) -> None:
    """Samples, where they are due, and the step's line in the log; both come after the checkpoint."""
    every, done = trainer.config.sample_every, trainer.done
    if every and (done % every == 0 or done == trainer.config.train_steps):
        record = record | show(trainer, out)
    log(done, record, trainer.parts)


def warn_of_imitation(config: Config, group: Group) -> None:
    """Where steps in bfloat16 will be slow. Said before the first one, when nothing is wrong otherwise."""
    if config.dtype == "bfloat16" and not has_bfloat16(group.device) and group.rank == 0:
        print("--dtype bfloat16: this device only imitates it; float32 takes more memory, and may be faster",
              file=sys.stderr)


@cli.main
def main(argv: list[str] | None = None):
    """Trains until --train-steps or a signal; leaves log, samples, checkpoints, and at the end the weights."""
    config = configure(argv, __doc__)
    trainer_class = CachedTrainer if is_v2(config) else Trainer
    if config.dry_run is None:
        check_files(config)
    group = Group(config.device)
    torch.manual_seed(config.seed)                                  # LoRA starts alike on all processes
    if config.dry_run is not None:
        if config.dry_run:
            warn_of_imitation(config, group)
        return dryrun.report(config, group, load_world if is_toy(config) else random_world, trainer_class)

    out = Path(config.out)
    with locked(out) if group.rank == 0 else nullcontext():
        # what the run goes on from
        path = group.broadcast(open_folder(config) if group.rank == 0 else None)
        state = read_checkpoint(path, group) if path else {}
        if state:
            check_resume(config, state, path)

        # networks and clips
        models, clips, terms = load_world(config, group)
        fingerprint = teacher_fingerprint(models)
        trainer = trainer_class(config, models, terms, group)
        trainer.fingerprint, record = fingerprint, state.get("record", {})
        if state:
            trainer.load_state(state)
        del state                                                   # its file may be deleted from here on
        check_room(out, trainer.gradient.nbytes * (4 if trainer.ema else 3), export_size(trainer))

        # the steps, and the student
        warn_of_imitation(config, group)
        stopped = run(trainer, clips, out, record)
        if stopped is None and group.rank == 0:
            with trainer.offload(trainer.student):
                export(trainer, out)
    group.close()
    if stopped:
        with suppress(OSError):                                     # SIGHUP: the terminal is gone
            print(f"stopped by a signal, and saved at step {trainer.done}; go on with --resume auto",
                  file=sys.stderr)
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
