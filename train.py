"""Training, on a CPU, a GPU, or many: Algorithm 1 of T2V-Turbo (arXiv 2405.18750) and Algorithm 2 of
T2V-Turbo-v2 (arXiv 2410.05677), whose Algorithm 1 is prepare.py.

    python train.py --preset shapes                                                 # the toy, on a laptop
    torchrun --nproc_per_node=8 train.py --preset turbo-vc2 --teacher model.ckpt --out runs/vc2 \\
        --data '/data/webvid/{00000..09999}.tar' --reward hpsv2=FILE --reward internvideo2=FILE    # the paper
    torchrun --nproc_per_node=8 train.py --preset turbo-v2 --data CACHE --out runs/v2 \\
        --reward hpsv2=FILE --reward clip=FILE --reward internvideo2=FILE       # v2: prepare.py made CACHE

A step's batch is split over however many processes there are, and each clip's random numbers come from its
place in the run: any number of processes trains the same student, as does a run that was killed and resumed.
"""
import copy
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

import data
import model
import rewards
import shapes
import turbo
from plumbing import budget, cli, files, folder, manifests, run, video, weights
from plumbing.cli import Count, File, Folder, Seed, Share, Size, Within
from plumbing.errors import UserError
from shapes import grammar
from solver import Sampling, Schedule
from turbo import EMA, RewardTerm, Step, TeacherOutput

# ---- options and presets -----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Recipe:
    """What only a preset fixes. Defaults: T2V-Turbo (VC2), Sec. 4 of its paper where nothing else is said."""
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
    inversion_steps: int = 50   # prepare.py: grid of the DDIM inversion; v2: 200
    reward_every: int = 3       # v2: rewards see one clip for so many that are distilled; paper: 8 of 24
    on_policy: float = 0.0      # share of clips with z_t where the student's own sampling comes; papers: none
    lr_fall: float = 0.0        # last share of the steps, over which the rate falls to 0; papers: constant
    pairs: float = 0.3          # shapes: share of clips with two things, which teach what belongs to what
    prompts: tuple[str, ...] = ("a corgi runs through a meadow", "waves at sunset")     # of sample clips
    guidance: float = 7.5       # ω of sample clips


Preset = Literal[
    "shapes", "shapes-vcm", "shapes-v2", "shapes-motion-v2", "vcm-vc2", "turbo-vc2", "vcm-ms", "turbo-ms",
    "turbo-v2"]


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """The options of the command line."""
    # ---- what is trained
    preset: Preset = "shapes"       # method and teacher: all defaults, see PRESETS in train.py
    teacher: File = ""              # VC2's model.ckpt, MS's folder [downloaded; shapes: embedded]
    init: File = ""                 # a student's file to start from, for fine-tuning [the teacher]
    data: tuple[str, ...] = ()      # folder, manifest or shards of captioned clips, repeatable; v2: the cache
    columns: str = ""               # names of a manifest's columns: path=A,caption=B,reward_caption=C
    video_root: Folder = ""         # folder of a manifest's relative paths [the manifest's own]
    reward: tuple[str, ...] = ("hpsv2", "internvideo2")  # NAME[=FILE][:WEIGHT], repeatable; all that are used
    # ---- the clips
    frames: Annotated[int, Within(1, 1024)] = 16    # frames of a clip; paper, Sec. 4: 16
    height: Annotated[int, Within(1, 8192)] = 320   # height of the clips in pixels; 256 (MS)
    width: Annotated[int, Within(1, 8192)] = 512    # width of the clips in pixels; 256 (MS)
    # ---- method
    ema: Share = 0.95               # decay of the target network θ⁻; v1 Eq. 6; 0: θ itself (released code)
    motion: Annotated[float, Within(0, 1000)] = 0.05    # v2: λ' of motion guidance; released code: 0.05
    lora: Annotated[int, Within(0, 4096)] = 64      # rank; released: 64 (VC2), 32 (MS); 0: trains all weights
    # ---- optimisation
    train_steps: Count = 10000      # steps of the optimizer; paper, Sec. 4: 10K
    batch: Count = 8                # clips per step, of all processes together; paper, Sec. 4: 1 per GPU
    micro_batch: Count = 1          # clips per forward pass of a process: memory against speed
    lr: Annotated[float, Within(1e-12, 1)] = 1e-5    # learning rate of AdamW; paper, Sec. 4: 1e-5
    seed: Seed = 0                  # of LoRA's start, the order of clips, and all that Algorithm 1 draws
    # ---- machine
    device: str = ""                # cpu, cuda [cuda if there, a GPU per process]
    dtype: Literal["float32", "bfloat16"] = "bfloat16"      # type of the networks; shapes: float32
    offload: bool = False           # what a part of a step does not need waits in host memory: for small GPUs
    chunk: Size = 2                 # frames whose decoder graph is held at a time; 0: all, decoded once
    workers: Size = 4               # threads that decode clips, per process
    dry_run: Size | None = None     # N steps with random weights, their time and memory; 0: simulated
    # ---- output
    out: Folder = ""                # folder of weights, checkpoints, log.jsonl and samples
    resume: str = ""                # auto (the last checkpoint in OUT, if any) or a checkpoint's path
    save_every: Count = 500         # steps between checkpoints; the last two are kept
    sample_every: Size = 500        # steps between sample clips; 0: never
    merge: bool = False             # also merged.safetensors; vc2: t2v_turbo_vc2.pt; ms: unet/ of diffusers

    @property
    def is_toy(self) -> bool:
        return self.preset.startswith("shapes")

    @property
    def is_v2(self) -> bool:
        return self.preset.endswith("v2")

    @property
    def has_motion(self) -> bool:       # is λ' an input of the student?
        return self.is_v2 and self.motion > 0

    @property
    def reward_batch(self) -> int:      # v2: clips per step that rewards see, of all processes together
        return math.ceil(self.batch / self.reward_every)

    @property
    def model(self) -> str:             # whose teacher it is
        if self.is_toy:
            return "shapes-motion" if "motion" in self.preset else "shapes"
        return "ms" if self.preset.endswith("ms") else "vc2"


MS = dict(
    height=256, width=256, fps=8, lora=32, image_weight=2.0, video_weight=3.0, reward=("hpsv2", "viclip"))
VCM = dict(reward=())
V2 = dict(
    fps=8, grid=200, inversion_steps=200, ema=0.0, train_steps=8000, batch=24, lora=0,
    reward=("hpsv2", "clip", "internvideo2"), image_weight=0.2, video_weight=0.5, image_frames=2,
    video_frames=4)
SHAPES = dict(
    frames=8, height=64, width=64, fps=8, grid=8, w_min=0.5, w_max=3.0,
    reward=("shapes-clip", "shapes-viclip"), image_frames=4, video_frames=4,
    train_steps=200, micro_batch=8, lr=1e-3, lora=7, checkpointing=False, chunk=0, dtype="float32", workers=0,
    save_every=50, sample_every=50, guidance=2.0,
    prompts=("a red circle moving right", "a blue square rising on white"))
LONGER = dict(train_steps=800, lr_fall=1.0, on_policy=0.5, pairs=0.7)      # without rewards it gets worse
MOTION_V2 = dict(
    ema=0.0, batch=8, pairs=0.0, lora=16, lr=2e-4, train_steps=300, motion=2.0)     # of single things
PRESETS = {
    "shapes": SHAPES | LONGER, "shapes-vcm": SHAPES | VCM, "shapes-v2": SHAPES | dict(ema=0.0, batch=6),
    "shapes-motion-v2": SHAPES | MOTION_V2,
    "turbo-vc2": {}, "vcm-vc2": VCM, "turbo-ms": MS, "vcm-ms": MS | VCM, "turbo-v2": V2}

PATHS = {"teacher", "init", "data", "columns", "video_root", "reward", "out", "resume", "device"}
MAY_CHANGE = PATHS | {                              # when a run is resumed; nothing else may
    "dry_run", "train_steps", "micro_batch", "lr", "lr_fall", "checkpointing", "offload", "chunk", "workers",
    "save_every", "sample_every", "prompts", "guidance", "merge"}


def configure(argv: list[str] | None = None, description: str = "") -> Config:
    """Command line over preset over defaults, checked before a file is opened."""
    typed = cli.typed(Config, argv)
    preset = typed.get("preset", Config.preset)
    config = cli.parse(Config, argv, description, defaults={"out": f"runs/{preset}"} | PRESETS[preset])
    check_options(config, set(typed))
    processes = cli.place()[1]
    unit = processes * (config.reward_every if config.is_v2 else 1)
    if processes > 1 and config.batch % unit:
        raise UserError(f"--batch {config.batch}, {processes} processes: try a multiple of {unit}")
    return config


def check_options(config: Config, typed: set[str]) -> None:
    """Refuses options that have no effect here, or do not fit each other."""
    toy, v2 = config.is_toy, config.is_v2
    useless = {"data": toy and not v2, "columns": toy or v2, "video_root": toy or v2, "ema": v2,
               "motion": not v2}
    for name in typed:
        if useless.get(name):
            raise UserError(f"{cli.flag_of(name)} has no effect with --preset {config.preset}")

    manifests.check_columns([*config.data, *getattr(config, "reward_data", ())], config)
    family = (shapes.FAMILIES if toy else model.FAMILIES)[config.model]
    model.check_size(family, height=config.height, width=config.width)
    if toy and config.height != config.width:
        raise UserError(f"--width {config.width}: the toy's clips are square; try --width {config.height}")
    if config.device.startswith("mps"):
        raise UserError("--device mps: training sums in float64, which MPS lacks; try --device cpu")
    planned_rewards(config)


def check_files(config: Config) -> None:
    """Refuses files that are not there, and an --out that is one of them, before anything is loaded."""
    if config.is_v2 and len(config.data) != 1:
        raise UserError("v2 trains from one cache: make it with prepare.py, then give it as --data CACHE")
    if not config.is_toy and not config.data:
        raise UserError("no clips to train on; name them with --data, or try --dry-run 1")
    named = [(f"--reward {term.name}:", term.reward) for term in planned_rewards(config)]
    named += [("--teacher", config.teacher), ("--init", config.init), ("--video-root", config.video_root)]
    for option, path in named:
        if path and not Path(path).expanduser().exists():
            raise UserError(f"{option} {path}: no such file or folder")
    inputs = {"--teacher": config.teacher, "--data": config.data}
    inputs["--init"] = [config.init, Path(config.init).parent] if config.init else None
    files.check_outputs({"--out": config.out}, inputs)


def planned_rewards(config: Config) -> list[RewardTerm]:
    """β R of --reward, each with R's file (None: downloaded) in R's place; none of weight zero."""
    planned = {}
    for spec in config.reward:
        name, path, weight = rewards.parse_spec(spec)
        kind = rewards.RECIPES[name].kind
        frames = getattr(config, f"{kind}_frames")
        weight = getattr(config, f"{kind}_weight") if weight is None else weight
        if name != "motion" and (name.startswith("shapes-") != config.is_toy or path and config.is_toy):
            raise UserError(f"--reward {spec} is not for --preset {config.preset}; the toy has its own two")
        if name in planned:
            raise UserError(f"--reward {name} is given twice; give it once, with the sum of its weights")
        if frames > config.frames:
            raise UserError(f"--frames {config.frames}: {name} looks at {frames} frames of a clip")
        planned[name] = RewardTerm(path, weight, frames, kind == "video", name)
    return [term for term in planned.values() if term.weight]


def settings(config: Config) -> dict:
    """What holds for the whole of a run, and may not change when it is resumed."""
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE}
    terms = " ".join(f"{term.name}:{term.weight:g}" for term in planned_rewards(config))
    return {"preset": config.preset} | fixed | {"init": Path(config.init).name, "reward": terms}


# ---- the trainer -------------------------------------------------------------------------------------------

def generator(seed: int, position: int) -> torch.Generator:
    """The random stream of the clip at a position of the run; the odd factor sets those of seeds apart."""
    return torch.Generator().manual_seed((seed * 2654435761 + position) % 2 ** 32)     # torch reads 32 bits


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
    to_host = staticmethod(Tensor.tolist)   # of a step's sums; a simulation, of empty tensors, has its own

    def __init__(self, config: Config, models: model.Models, terms: list[RewardTerm], group: run.Group):
        self.config, self.models, self.terms, self.group = config, models, terms, group
        self.schedule, self.w_range = Schedule(config.grid, group.device), (config.w_min, config.w_max)
        self.parts = run.Parts()

        # networks, and what of them is trained
        self.prepare_networks(config, group.device)
        if config.init:
            self.start_from(config.init)
        self.named = {name: p for name, p in models.unet.named_parameters() if p.requires_grad}
        self.params = list(self.named.values())
        self.ema = EMA(self.params, config.ema) if config.ema else None
        self.states_of = lru_cache(512)(lambda caption: models.text([caption]))     # small data repeats them
        with torch.no_grad():
            self.uncond = self.states_of("")                        # ∅

        # what waits in host memory
        self.offload, self.judges = run.Offload(group.device, config.offload), []
        for term in terms if config.offload else ():
            self.judges.append(term.reward.model)
            term.reward = self.offload.in_turn(term.reward, term.reward.model)
        for network in dict.fromkeys([models.text, self.student, self.teacher, *self.judges]):
            self.offload.keep(network, [p for p in network.parameters() if not p.requires_grad])

        # the optimizer
        self.gradient = run.flat_gradient(self.params)
        self.optimizer = torch.optim.AdamW(self.params, config.lr, weight_decay=0, fused=True)

        # counters
        self.done = 0                   # steps
        self.skipped = 0                # steps in a row without a finite gradient
        self.clips_skipped = 0          # unusable clips before this start of the run

    def prepare_networks(self, config: Config, device: torch.device) -> None:
        """Student and teacher out of one UNet: with LoRA they share it, else the teacher is a frozen copy."""
        unet = self.models.unet.eval()
        unet.config = dataclasses.replace(unet.config, guidance=True, motion=config.has_motion)
        for name, layer in model.condition_layers(unet.config).items():   # at zero: it is its teacher
            if not hasattr(unet, name):
                unet.add_module(name, layer.to(device, unet.dtype))
        unet.checkpointing = config.checkpointing
        self.student = self.teacher = Autocast(unet, config.dtype)

        if config.lora:                     # with LoRA off the student is the teacher: one copy
            conv1d = ("init_attn.0.proj_in", "init_attn.0.proj_out")    # in VC2; not in the published LoRA
            turbo.inject(unet, config.lora, skip=conv1d if unet.config.fps else ())
            return
        if not config.is_v2:                # whose teacher is a cache
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
        _, whole, lora, about = model.read_turbo(path, unet.config, self.config.model)
        model.check_teacher(about, self.models.teacher, path)
        if bool(lora) != bool(rank):
            raise UserError(f"--init {path} holds {'LoRA' if lora else 'all weights'}, not for --lora {rank}")
        own = turbo.lora_state(unet) if rank else unet.state_dict()
        optional = {f"{name}.weight" for name in model.condition_layers(unet.config)}
        if whole and own.keys() - whole.keys() - optional:
            raise UserError(f"--init {path} holds a part of a student's weights; give all of its files")
        for name, x in (lora or whole).items():
            if name not in own or x.shape[:2] != own[name].shape[:2] or x.numel() != own[name].numel():
                raise UserError(f"--init {path}: {name} is of another UNet, or its rank is not --lora")
            own[name].copy_(x.view_as(own[name]))

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
            remaining, fall = 1 - self.done / self.config.train_steps, self.config.lr_fall
            lr = self.config.lr * (min(remaining / fall, 1) if fall else 1)
            self.update(norm, lr, all(map(math.isfinite, values)))
        self.done += 1

        names = ["loss", "loss_cd", *(term.name for term in self.terms), "clips_skipped", "grad_norm"]
        record = dict(zip(names, values, strict=True))
        record["clips_skipped"] = self.clips_skipped + int(record["clips_skipped"])
        return record | {"lr": lr, "steps_skipped": self.skipped}

    def gradients(self, batch: dict) -> Tensor:
        """The gradient of this process's clips -> their share of the metrics: loss, L_CD, rewards."""
        micro_batches = self.micro_batches(batch, self.config.batch)
        return sum(self.accumulate(clips, positions) for clips, positions in micro_batches)

    def micro_batches(self, batch: dict, total: int) -> Iterator[tuple[dict, range]]:
        """A few clips at a time, with their places in the run. total: clips of a step on all processes."""
        own = total // self.group.world_size
        first = (self.done * self.group.world_size + self.group.rank) * own
        for start in range(0, own, self.config.micro_batch):
            places = slice(start, start + self.config.micro_batch)
            yield ({name: values[places] for name, values in batch.items() if name != "bad"},
                   range(first, first + own)[places])

    def accumulate(self, clips: dict, positions: range) -> Tensor:
        """Algorithm 1 on a few clips: adds their share of the gradient -> that of loss, L_CD, rewards."""
        generators = [generator(self.config.seed, position) for position in positions]

        with self.part("encode", self.models.text):
            z0, c = self.encode(clips, generators)
        with self.part("distill", self.student, self.teacher):
            step = Step.draw(z0, self.schedule, self.w_range, generators)       # t, ω, ε
            z0, step = self.on_policy(z0, step, c, generators)
            loss_cd, z0_hat = turbo.distill(self.student, self.teacher, self.ema, self.schedule, step, z0, c,
                                            self.uncond.expand_as(c), fps=self.config.fps)
        g, scores = self.rewards_of(z0_hat, clips, generators)
        with self.part("backward", self.student):
            share = len(positions) / self.config.batch
            (share * turbo.total_loss(loss_cd, z0_hat, g)).backward()
        return share * self.metrics(loss_cd, scores)

    def encode(self, clips: dict, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Latents z0 (B, C, T, h, w) and caption embeddings c."""
        c = torch.cat([self.states_of(caption) for caption in clips["caption"]])
        return model.to_latents(self.models.vae, clips["clip"], generators), c

    def on_policy(self, z0: Tensor, step: Step, c: Tensor, generators: list[torch.Generator]
                  ) -> tuple[Tensor, Step]:
        """Beyond the papers: a share of the clips goes where the student comes when it samples."""
        if not self.config.on_policy:
            return z0, step

        def f(z, t, clips):
            return turbo.consistency(self.student, self.schedule, z, t, step.w[clips], c[clips],
                                     fps=self.config.fps)

        jumps = min(4, self.config.grid)
        return turbo.on_policy(f, self.schedule, z0, step, self.config.on_policy, jumps, generators)

    def rewards_of(self, z0_hat: Tensor, clips: dict, generators: list[torch.Generator]
                   ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """∂(β_img J_img + β_vid J_vid)/∂ẑ0, and the scores of each reward; None, {} without rewards."""
        if not self.terms:
            return None, {}
        reward_captions = [short or full for short, full in zip(clips["reward_caption"], clips["caption"])]
        with self.part("rewards"), self.offload.turn:
            return turbo.reward_gradient(z0_hat, reward_captions, self.models.vae.decode, self.terms,
                                         generators, self.config.chunk)

    def metrics(self, loss_cd: Tensor, scores: dict[str, Tensor]) -> Tensor:
        """Loss, L_CD and each reward, as the log has them."""
        means = [scores[term.name].mean() if scores else loss_cd.new_zeros(()) for term in self.terms]
        loss = loss_cd - sum(term.weight * mean for term, mean in zip(self.terms, means))
        return torch.stack([loss, loss_cd, *means]).detach().double()

    def update(self, norm: Tensor, lr: float, finite: bool) -> None:
        """AdamW and EMA; neither if anything is inf or nan: the sums then are so on all processes alike."""
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped == 10:
            raise UserError("10 steps without a finite gradient; resume an earlier one with a lower --lr")
        if not finite:
            return
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
        states, moments = self.optimizer.state.values(), ("exp_avg", "exp_avg_sq")
        self.offload.keep(self.optimizer, [state[name] for state in states for name in moments])

    def state(self, record: dict) -> dict:
        """All that the next step depends on; draws depend on the seed and the position alone."""
        return dict(
            settings=settings(self.config), teacher=self.models.teacher, autoencoder=self.models.autoencoder,
            step=self.done, record=record, steps_skipped=self.skipped, clips_skipped=record["clips_skipped"],
            params={name: p.detach() for name, p in self.named.items()},
            ema=self.ema.average if self.ema else [], optimizer=self.optimizer.state_dict())

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        if any(state[name] != getattr(self.models, name) for name in ("teacher", "autoencoder")):
            raise UserError("this run began with another --teacher; give that one, or choose another --out")
        if state["step"] > self.config.train_steps:
            raise UserError(f"this run has made {state['step']} steps; give --train-steps as many, or more")
        for name, p in self.named.items():
            p.copy_(state["params"][name])
        for average, saved in zip(self.ema.average if self.ema else [], state["ema"], strict=True):
            average.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        for moments in self.optimizer.state.values():               # on a CPU they are the file's own
            moments.update({name: x.clone() for name, x in moments.items()})
        self.keep_moments()
        self.done, self.skipped = state["step"], state["steps_skipped"]
        self.clips_skipped = state["clips_skipped"]


class CachedTrainer(Trainer):
    """v2 Algorithm 2: a batch is {"distill": samples of a cache, "rewards": others for rewards, "bad": n}."""

    def gradients(self, batch: dict) -> Tensor:
        distilled = self.micro_batches(batch["distill"], self.config.batch)
        metrics = sum(self.distill(samples, positions) for samples, positions in distilled)
        if self.terms:
            rewarded = self.micro_batches(batch["rewards"], self.config.reward_batch)
            metrics += sum(self.reward(samples, positions) for samples, positions in rewarded)
        return metrics

    def distill(self, samples: dict, positions: range) -> Tensor:
        """L_CD of some samples."""
        cached, inputs = self.read(samples, positions, self.config.seed)
        with self.part("distill", self.student):
            loss_cd, _ = turbo.distill_cached(self.student, self.schedule, cached, **inputs)
        with self.part("backward", self.student):
            share = len(positions) / self.config.batch
            (share * loss_cd).backward()
        return share * self.metrics(loss_cd, {})

    def reward(self, samples: dict, positions: range) -> Tensor:
        """- β_img J_img - β_vid J_vid of the one-step generations ẑ0 of some samples."""
        cached, inputs = self.read(samples, positions, self.config.seed + 1)
        generators = [generator(self.config.seed + 2, position) for position in positions]
        with self.part("distill", self.student):
            z0_hat = turbo.consistency(self.student, self.schedule, cached.z_t, cached.t, **inputs)
        g, scores = self.rewards_of(z0_hat, samples, generators)
        with self.part("backward", self.student):
            share = len(positions) / self.config.reward_batch
            (share * turbo.total_loss(0.0, z0_hat, g)).backward()
        return share * self.metrics(g.new_zeros(()), scores)

    def read(self, samples: dict, positions: range, seed: int) -> tuple[TeacherOutput, dict]:
        """What the cache says, on the device in float32; and what the student is told, ω drawn anew."""
        config, device = self.config, self.group.device
        names = ("t", "z_t", "eps_c", "eps_u", "gradient", "c")
        t, *tensors, c = (samples[name].to(device) for name in names)
        uniform = torch.cat([torch.rand(1, generator=generator(seed, position)) for position in positions])
        w = (uniform * (config.w_max - config.w_min) + config.w_min).to(device)
        motion = turbo.motion_strength(t, config.motion, config.motion_share) if config.has_motion else None
        cached = TeacherOutput(t, *(x.float() for x in tensors))
        return cached, dict(w=w, c=c.float(), fps=config.fps, motion=motion)


# ---- what a run needs --------------------------------------------------------------------------------------

def load_world(config: Config, group: run.Group) -> tuple[model.Models, object, list[RewardTerm]]:
    """Networks, dataset of captioned clips, and reward terms; random ones without clips for a --dry-run."""
    device, dtype = group.device, getattr(torch, config.dtype)
    if config.dry_run is not None and not config.is_toy:
        with budget.build(device, dtype):
            untrained = partial(rewards.untrained, device=device, dtype=dtype)
            terms = reward_terms(config, lambda name, path, frames: untrained(name, frames=frames))
            models = model.untrained(config.model, guidance=True, motion=config.has_motion)
        for p in models.unet.parameters() if not config.lora else ():
            p.data = p.data.float()
        return models, None, terms

    cached = config.is_v2 and config.dry_run is None
    clips = data.Cache(config.data[0], cache_header(config)) if cached else open_clips(
        config, config.data, group)
    load = partial(shapes.reward, device=device, folder=config.teacher or None, dtype=dtype)
    terms, models = reward_terms(config, load), load_models(config, device)
    ours = {"teacher": models.teacher, "autoencoder": models.autoencoder}
    if cached and any(clips.header.get(name, value) != value for name, value in ours.items()):
        raise UserError(f"the cache {config.data[0]} was made by another teacher; give that one")
    return models, clips, terms


def load_models(config: Config, device: torch.device) -> model.Models:
    """The teacher; in float32 where all of its weights are to be trained."""
    teacher = config.teacher or None
    if config.is_toy:
        return shapes.load(folder=teacher, device=device, name=config.model)
    dtype = getattr(torch, config.dtype)
    models = model.load(config.model, teacher, device=device, dtype=dtype if config.lora else torch.float32)
    models.vae.to(dtype)
    models.text.to(dtype)
    return models


def open_clips(config: Config, specs: tuple[str, ...], group: run.Group) -> data.ClipDataset:
    """The captioned clips of --data, or the toy's."""
    if config.is_toy:
        return shapes.Clips(frames=config.frames, size=config.height, pairs=config.pairs)
    with group.rank0_first():               # it indexes shards, the others read the index
        return data.open_dataset(specs, config.frames, config.fps, config.height, config.width, config.out,
                                 config.columns, config.video_root)


def cache_header(config: Config) -> dict:
    """What the header of a cache that this run trains from must say."""
    names = ["grid", "frames", "height", "width", "fps"] + ["motion_share"] * config.has_motion
    return {"model": config.model} | {name: getattr(config, name) for name in names}


def reward_terms(config: Config, load: Callable) -> list[RewardTerm]:
    """β_img R_img and β_vid R_vid. load(name, path, frames=) makes a reward; frames: None for images."""
    terms = planned_rewards(config)
    for term in terms:
        term.reward = load(term.name, term.reward, frames=term.frames if term.video else None)
        for p in term.reward.model.parameters() if config.offload else ():
            p.data = run.Offload.to_host(p)         # at once, so that one reward at a time is on the device
    return terms


# ---- what a run leaves -------------------------------------------------------------------------------------

def show(trainer: Trainer, out: Path) -> dict[str, float]:
    """OUT/samples: this process's share of the prompts, from the same noise. The toy is judged, too."""
    config, models, group = trainer.config, trainer.models, trainer.group
    size = config.frames, config.height, config.width
    sampling = Sampling("student", min(4, config.grid), config.guidance, config.grid, config.fps,
                        config.motion if config.has_motion else None, config.motion_share)
    student = SimpleNamespace(unet=trainer.student, vae=models.vae, text=models.text)

    def make(captions: list[str], seeds: list[int]) -> Tensor:
        """Clips uint8 (B, 3, T, H, W) on the CPU, as the student makes them now."""
        with trainer.offload(trainer.student, models.text):
            z = turbo.generate(student, captions, seeds, size, sampling)
        return model.to_clip(models.vae, z, config.chunk).cpu()

    for i in range(group.rank, len(config.prompts), group.world_size):
        path = out / "samples" / f"step-{trainer.done:06d}-{i}.gif"
        video.write_video(path, make([config.prompts[i]], [i])[0], config.fps)
    return {"oracle": shapes.accuracy(make, pairs=min(config.pairs, grammar.PAIRS))} if config.is_toy else {}


def header(trainer: Trainer) -> dict:
    """What turbo.safetensors says about itself; model.py reads it."""
    config, method = trainer.config, "turbo" if trainer.terms else "vcm"
    fields = ("model", "grid", "w_min", "w_max", "fps", "frames", "height", "width")
    return {name: getattr(config, name) for name in fields} | {
        "motion": config.motion if config.has_motion else None,
        "motion_share": config.motion_share if config.has_motion else None,
        "method": "turbo-v2" if config.is_v2 else method, "teacher": trainer.models.teacher,
        "rank": config.lora, "rewards": [term.name for term in trainer.terms],
        "train": {name: value for name, value in dataclasses.asdict(config).items() if name not in PATHS}}


def export(trainer: Trainer, out: Path) -> None:
    """turbo.safetensors for sample.py; on demand the merged UNet."""
    config, unet, about = trainer.config, trainer.models.unet, header(trainer)
    if not trainer.optimizer.state:
        raise UserError("no step had a finite gradient, so there is no student to export; lower --lr")
    state = turbo.lora_state(unet) if config.lora else unet.state_dict()
    if config.is_toy:                       # the toy's weights come with the repository
        state = {name: x.half() for name, x in state.items()}
    if not all(x.isfinite().all() for x in state.values()):
        raise UserError("the student is not finite, so it is not exported; resume an earlier checkpoint")

    weights.save(out / "turbo.safetensors", state, about)
    if config.merge:
        merged = turbo.merge(unet.float()).state_dict()
        weights.save(out / "merged.safetensors", merged, about)
        if about["model"] == "vc2":         # for the released code and others
            weights.save_merged(out / "t2v_turbo_vc2.pt", config.teacher, merged, about)
        if about["model"] == "ms":          # for diffusers
            weights.save_diffusers(out / "unet", merged, about)
    elif (out / "merged.safetensors").exists():
        print(f"{out}/merged.safetensors may be of an earlier step; --resume auto --merge renews it",
              file=sys.stderr)


# ---- the run -----------------------------------------------------------------------------------------------

def loop(trainer: Trainer, clips, out: Path, record: dict) -> int | None:
    """Steps until --train-steps or a signal -> the signal's number. record: that of the step resumed from."""
    config, group, parts = trainer.config, trainer.group, trainer.parts
    received, stopped = run.stop_signals(), False
    batches = batches_of(trainer, clips, out / "bad_clips.jsonl")

    def is_due(every: int) -> bool:
        return every > 0 and (trainer.done % every == 0 or trainer.done == config.train_steps)

    def finish_step() -> None:                              # after the checkpoint
        samples = show(trainer, out) if is_due(config.sample_every) else {}
        log(trainer.done, record | samples, parts)

    with folder.Log(out, trainer.done, config.train_steps, group) as log:
        if record and group.any(log.last < trainer.done):   # killed after the checkpoint, before the log
            finish_step()
        while trainer.done < config.train_steps and not stopped:
            parts.seconds.clear()
            with parts("data"):
                batch = next(batches)
            record = trainer.step(batch)
            stopped = group.any(received)
            if group.rank == 0 and (is_due(config.save_every) or stopped):
                folder.save_checkpoint(out, trainer.done, trainer.state(record))
                folder.describe(config)
            finish_step()
    return (received or [signal.SIGTERM])[0] if stopped else None


def batches_of(trainer: Trainer, clips, bad_file: Path) -> Iterator[dict]:
    """This process's batches from the step on that the trainer is at; v2: of two streams of the cache."""
    config, group = trainer.config, trainer.group

    def stream(dataset, total: int, seed: int) -> Iterator[dict]:
        return data.loader(dataset, total // group.world_size, group.rank, group.world_size, config.workers,
                           seed, trainer.done, bad_file)

    distilled = stream(clips, config.batch, config.seed)
    if not config.is_v2:
        return distilled
    if not trainer.terms:
        return ({"distill": first, "bad": first["bad"]} for first in distilled)
    short = data.Cache(clips.folder, only_rewards=True)         # clips whose captions are short enough
    rewarded = stream(short, config.reward_batch, config.seed + 1)
    return ({"distill": first, "rewards": second, "bad": first["bad"] + second["bad"]}
            for first, second in zip(distilled, rewarded))


@cli.main
def main(argv: list[str] | None = None):
    """Trains until --train-steps or a signal; leaves log, samples, checkpoints and, at the end, weights."""
    config = configure(argv, __doc__)
    trainer_class = CachedTrainer if config.is_v2 else Trainer
    if config.dry_run is None:
        check_files(config)
    group = run.Group(config.device)
    torch.manual_seed(config.seed)                                  # LoRA starts alike on all processes
    if config.dry_run is not None:
        return budget.report_step(config, group, load_world, trainer_class)

    out = Path(config.out)
    with folder.locked(out) if group.rank == 0 else nullcontext():
        # what the run goes on from
        path = group.broadcast(folder.open_folder(config) if group.rank == 0 else None)
        state = folder.read_checkpoint(path, group) if path else {}
        if state:
            folder.check_unchanged(state["settings"], settings(config))

        models, clips, terms = load_world(config, group)
        trainer, record = trainer_class(config, models, terms, group), state.get("record", {})
        if state:
            trainer.load_state(state)
        del state                                                   # its file may be deleted from here on

        # the steps, and the student
        stopped = loop(trainer, clips, out, record)
        if stopped is None and group.rank == 0:
            with trainer.offload(trainer.student):
                export(trainer, out)
    group.close()
    if stopped:
        print(f"stopped by a signal, saved step {trainer.done}; --resume auto goes on", file=sys.stderr)
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
