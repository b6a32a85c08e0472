"""Training: Algorithm 1 of T2V-Turbo (arXiv 2405.18750), on a CPU, a GPU, or many.

    python train.py --preset shapes                                            # the toy, on a laptop
    torchrun --nproc_per_node=8 train.py --preset turbo-vc2 --teacher model.ckpt --data '/data/webvid/{00000..09999}.tar' \\
        --reward hpsv2=FILE --reward internvideo2=FILE --out runs/vc2          # the paper

The batch of a step is fixed and split over however many processes there are, and all that is random about a clip comes
from a generator of its own, seeded by the clip's place in the run. So 1, 2 or 8 processes train the same student, and a
run that was killed and resumed is the run that was not.
"""
import copy
import dataclasses
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

import data
import model
import rewards
import shapes
from model import (
    FAMILIES,
    VAE,
    Models,
    TextEncoder,
    UNet3D,
    check_size,
    condition_layers,
    layout_of,
    lora_shapes,
)
from plumbing import cli, dryrun, video, weights
from plumbing.run import Group, Log, Parts, check_room, checkpoints, listen, open_folder, shielded, write
from solver import Schedule
from turbo import (
    EMA,
    Noise,
    RewardTerm,
    Step,
    consistency,
    distill,
    inject,
    lora_state,
    merge,
    reward_gradient,
    sample,
    total_loss,
)


@dataclass(frozen=True)
class Config:
    """Defaults are T2V-Turbo (VC2)."""
    preset: Literal["shapes", "vcm-vc2", "turbo-vc2", "vcm-ms", "turbo-ms"] = "shapes"  # replaces the defaults below
    teacher: str = ""               # VideoCrafter2's model.ckpt or ModelScopeT2V's folder [downloaded; shapes: embedded]
    data: str = ""                  # folder, .csv, .jsonl or .tar pattern of captioned clips, see data.py; paper: WebVid-10M
    reward: tuple[str, ...] = ("hpsv2", "internvideo2")  # NAME[=FILE][:WEIGHT], repeatable; no FILE: download; WEIGHT: not β
    out: str = ""                   # folder of the run: turbo.safetensors, checkpoints, log.jsonl, samples [runs/PRESET]
    resume: str = ""                # auto (the last checkpoint in OUT, if any) or a checkpoint's path
    seed: int = 0                   # of LoRA's start, the order of clips, and all that Algorithm 1 draws
    dry_run: int | None = None      # N steps with random weights and clips, then a table of time and memory; 0: simulated
    # the clips
    frames: int = 16                # paper, Sec. 4: 16 frames
    height: int = 320               # paper, Sec. 4: 512x320 (VC2), 256x256 (MS)
    width: int = 512                # same
    fps: int = 16                   # of the clips, and what VC2's UNet is told; released code: 16; ModelScopeT2V: 8
    # Algorithm 1
    grid: int = 50                  # N, DDIM steps of the teacher's solver; released code, num_ddim_timesteps
    w_min: float = 5.0              # ω ~ U[w_min, w_max]; paper, Sec. 4
    w_max: float = 15.0             # same
    image_weight: float = 1.0       # β_img; paper, Sec. 4: 1 (VC2), 2 (MS); 0: VCM, or the ablation without R_img
    video_weight: float = 2.0       # β_vid; paper, Sec. 4: 2 (VC2), 3 (MS); 0: VCM, or the ablation without R_vid
    image_frames: int = 6           # M, random frames that an image reward sees; paper, Sec. 4 (released code: 5)
    video_frames: int = 8           # evenly strided frames that a video reward sees; paper, Sec. 4
    ema: float = 0.95               # decay of the target network θ⁻; paper, Eq. 6; 0: θ itself, as in the released code
    # optimisation
    steps: int = 10000              # paper, Sec. 4: 10K
    batch: int = 8                  # clips per step over all processes; paper, Sec. 4: 1 on each of 6 to 8 GPUs
    micro: int = 1                  # clips per forward pass of a process: memory against speed
    lr: float = 1e-5                # of AdamW (0.9, 0.999), constant; paper, Sec. 4
    lora: int = 64                  # rank; paper: 64 (VC2); released weights: 32 (MS); 0: train all weights
    clip: float = 1.0               # largest gradient norm; released code
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the networks; losses, LoRA, EMA: float32; released code
    checkpointing: bool = True      # recompute the UNet's activations in the backward pass
    chunk: int = 2                  # frames that the decoder's backward pass holds at a time
    # keeping and watching
    workers: int = 4                # processes that decode clips, per training process
    save_every: int = 500           # steps between checkpoints
    keep: int = 2                   # checkpoints kept
    sample_every: int = 500         # steps between sample clips; 0: never
    prompt: tuple[str, ...] = ("a corgi runs through a meadow", "waves at sunset, aerial view")  # of them; repeatable
    guidance: float = 7.5           # ω of the samples; paper, Sec. 4
    merge: bool = False             # at the end: also OUT/merged.safetensors, the whole UNet with LoRA merged
    export_lora: bool = False       # at the end: also OUT/unet_lora.pt, the list that the released code reads


MS = dict(height=256, width=256, fps=8, lora=32, image_weight=2.0, video_weight=3.0, reward=("hpsv2", "viclip"))
VCM = dict(image_weight=0.0, video_weight=0.0)
PRESETS = {
    "shapes": dict(frames=8, height=64, width=64, fps=8, batch=8, micro=8, lr=1e-3, grid=8, steps=200, lora=7, image_frames=4,
                   video_frames=4, w_min=0.5, w_max=3.0, guidance=2.0, chunk=1000, checkpointing=False, workers=0, save_every=50,
                   sample_every=50, prompt=("a red circle moving right", "a blue square rising on white")),
    "turbo-vc2": {}, "vcm-vc2": VCM, "turbo-ms": MS, "vcm-ms": MS | VCM,
}
PATHS = ("teacher", "data", "reward", "out", "resume")                                    # nobody else's business
FIXED = ("preset", "seed", "batch", "lora", "ema", "grid", "frames", "height", "width")  # for the whole of a run


def configure(argv=None) -> Config:
    """Command line over preset over defaults."""
    preset = cli.parse(Config, argv, __doc__).preset
    config = cli.parse(Config, argv, __doc__, defaults={"out": f"runs/{preset}"} | PRESETS[preset])
    family = shapes.FAMILY if preset == "shapes" else FAMILIES[preset.split("-")[-1]]
    check_size(family, height=config.height, width=config.width)
    for name in ("batch", "micro", "keep", "save_every", "chunk"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}; it must be at least 1")
    return config


# ---- the trainer -----------------------------------------------------------------------------------------------


def generator(seed: int, position: int) -> torch.Generator:
    """The random stream of Algorithm 1 for the clip at a position of the run.

    torch reads 32 bits of a CPU seed; the odd factor sets the streams of different seeds apart.
    """
    return torch.Generator().manual_seed((seed * 2654435761 + position) % 2 ** 32)


class Trainer:
    """Student, teacher, target, rewards and optimizer; `step` is one round of Algorithm 1."""

    def __init__(self, config: Config, models, terms: list[RewardTerm], group: Group, parts: Parts | None = None,
                 to_host: Callable[[Tensor], list[float]] = Tensor.tolist):
        """to_host: brings a step's sums to the CPU; a simulation, whose tensors have no contents, hands in its own."""
        if config.batch % group.world:
            raise ValueError(f"a batch of {config.batch} clips cannot be split over {group.world} processes; "
                             f"try --batch {-(-config.batch // group.world) * group.world}")
        self.config, self.models, self.terms, self.group, device = config, models, terms, group, group.device
        self.to_host = to_host
        self.schedule, self.parts = Schedule(config.grid, device), parts or Parts(device)
        self.done = self.skipped = self.clips_skipped = 0       # steps; skipped ones in a row; clips that were no good
        self.names = ["loss", "loss_cd", *(term.name for term in terms), "clips_skipped", "grad_norm"]
        self.prepare_networks(config, device)
        self.named = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        self.params = list(self.named.values())
        self.ema = EMA(self.params, config.ema) if config.ema else None
        sizes = [p.numel() for p in self.params]
        self.gradient = torch.zeros(sum(sizes), device=device)                          # one tensor; p.grad are its parts
        for p, g in zip(self.params, self.gradient.split(sizes), strict=True):
            p.grad = g.as_strided(p.shape, p.stride())
        adam = dict(lr=config.lr, weight_decay=0, fused=True)                           # betas 0.9, 0.999
        self.sharded = group.world > 1 and not config.lora                              # 11 GB of moments for 1.4 B weights
        self.optimizer = (ZeroRedundancyOptimizer(self.params, torch.optim.AdamW, **adam) if self.sharded
                          else torch.optim.AdamW(self.params, **adam))
        with torch.no_grad():
            self.null = models.text([""])

    def prepare_networks(self, config: Config, device: torch.device) -> None:
        """Student and teacher out of one UNet: with LoRA they share it, without it the teacher is a frozen copy."""
        unet = self.student = self.teacher = self.models.unet.eval()    # eval: dropout would make the targets noisy
        if not unet.config.guidance:                                    # starts at zero: the student as its teacher
            unet.config = dataclasses.replace(unet.config, guidance=True)
            unet.add_module("time_cond_proj", condition_layers(unet.config)["time_cond_proj"].to(device, unet.dtype))
        if config.lora:                                                 # with LoRA off it is the teacher: one copy
            conv1d = ("init_attn.0.proj_in", "init_attn.0.proj_out")    # in VC2, and so not in the published LoRA
            inject(unet, config.lora, skip=conv1d if unet.config.fps else ())
        else:
            self.teacher = copy.deepcopy(unet).requires_grad_(False)
            for p in self.teacher.parameters():
                p.data = p.data.to(getattr(torch, config.dtype))
            unet.requires_grad_(True)
        unet.checkpointing = config.checkpointing
        for network in {self.student, self.teacher}:    # autocast caches casts, and θ and θ⁻ change places: so per call
            autocast = torch.autocast(device.type, torch.bfloat16, config.dtype == "bfloat16")
            network.forward = autocast(network.forward)

    def accumulate(self, batch: dict, positions: range) -> Tensor:
        """Algorithm 1 on some clips: adds their share of the gradient, returns that of loss, L_CD and rewards."""
        config, models, device = self.config, self.models, self.group.device
        draws = [generator(config.seed, position) for position in positions]
        with self.parts("encode"), torch.no_grad():
            x = batch["clip"].to(device) / 127.5 - 1
            noise = torch.stack([torch.randn(self.latent(*x.shape[2:]), generator=g) for g in draws]).to(device)
            z0, c = models.vae.encode(x, noise).float(), models.text(batch["caption"])
        with self.parts("distill"):
            step = Step.draw(z0, self.schedule, (config.w_min, config.w_max), draws)
            loss_cd, z0_hat = distill(self.student, self.teacher, self.ema, self.schedule, step, z0, c,
                                      self.null.expand_as(c), fps=config.fps)
        g, scores = None, {}
        if self.terms:
            with self.parts("rewards"):
                captions = [short or full for short, full in zip(batch["reward_caption"], batch["caption"], strict=True)]
                g, scores = reward_gradient(z0_hat, captions, models.vae.decode, self.terms, draws, config.chunk)
        share = len(positions) / config.batch
        with self.parts("backward"):
            (share * total_loss(loss_cd, z0_hat, g)).backward()
        loss = loss_cd.detach() - sum(term.weight * scores[term.name] for term in self.terms)
        return share * torch.stack([loss, loss_cd.detach(), *scores.values()]).double()

    def latent(self, T: int, H: int, W: int) -> tuple[int, int, int, int]:
        """Shape of the latents of a clip."""
        vae = self.models.vae.config
        return vae.latent, T, H // vae.factor, W // vae.factor

    def step(self, batch: dict) -> dict[str, float]:
        """One step on this process's clips of the batch -> what the log says about it, the same on all processes."""
        n, micro = self.config.batch // self.group.world, self.config.micro
        first, told = (self.done * self.group.world + self.group.rank) * n, 0
        self.gradient.zero_()
        for i in range(0, n, micro):
            some = {name: batch[name][i:i + micro] for name in ("clip", "caption", "reward_caption")}
            told = told + self.accumulate(some, range(first + i, first + min(i + micro, n)))
        with self.parts("update"):
            self.group.sum(self.gradient)
            norm = self.gradient.norm()
            told = self.group.sum(torch.cat([told, told.new_tensor([batch["bad"]])]))
            values = self.to_host(torch.cat([told, norm[None].double()]))
            self.update(norm, all(map(math.isfinite, values)))
        self.done += 1
        record = dict(zip(self.names, values, strict=True))
        record["clips_skipped"] = self.clips_skipped + int(record["clips_skipped"])
        return record | {"lr": self.config.lr, "steps_skipped": self.skipped}

    def update(self, norm: Tensor, finite: bool) -> None:
        """AdamW and EMA; neither if anything is inf or nan, which the sums then are on all processes alike."""
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            self.gradient *= (self.config.clip / (norm + 1e-6)).clamp(max=1)
            self.optimizer.step()
            if self.ema:
                self.ema.update()
        elif self.skipped == 10:
            raise ValueError("10 steps in a row without a finite gradient; resume an earlier checkpoint with a lower --lr")

    def state(self, clips_skipped: int) -> dict:
        """All that the next step depends on; all processes call it, the first one gets it.

        No random state is in it: draws depend on the seed and the position alone.
        """
        if self.sharded:
            self.optimizer.consolidate_state_dict()
        return {} if self.group.rank else dict(
            config=dataclasses.asdict(self.config), step=self.done, steps_skipped=self.skipped,
            clips_skipped=clips_skipped, params={name: p.detach() for name, p in self.named.items()},
            ema=self.ema.average if self.ema else [], optimizer=self.optimizer.state_dict())

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """The inverse of `state`. Raises ValueError where what is fixed for the whole of a run differs."""
        for name in FIXED:
            if state["config"][name] != getattr(self.config, name):
                raise ValueError(f"this run began with --{name} {state['config'][name]}, not {getattr(self.config, name)}; "
                                 "go on with that, or choose another --out")
        assert list(state["params"]) == list(self.named), "a checkpoint of another network"
        self.done, self.skipped, self.clips_skipped = state["step"], state["steps_skipped"], state["clips_skipped"]
        ours = self.params + (self.ema.average if self.ema else [])
        for p, q in zip(ours, [*state["params"].values(), *state["ema"]], strict=True):
            p.copy_(q)
        self.optimizer.load_state_dict(state["optimizer"])
        for options in self.optimizer.param_groups:
            options["lr"] = self.config.lr

    @torch.no_grad()
    def generate(self, captions: list[str], seeds: list[int]) -> Tensor:
        """Clips uint8 (B, 3, T, H, W) as the student makes them now, in 4 steps."""
        config, w = self.config, torch.full((len(seeds),), self.config.guidance, device=self.group.device)
        f = partial(consistency, self.student, self.schedule, w=w, c=self.models.text(captions), fps=config.fps)
        noise = Noise(seeds, self.latent(config.frames, config.height, config.width), self.group.device)
        x = self.models.vae.decode(sample(f, self.schedule, noise, 4), config.chunk).float()
        return (x.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)

    def show(self, out: Path) -> dict[str, float]:
        """Writes OUT/samples: this process's share of the prompts, always from the same noise. The toy is judged, too."""
        for i in range(self.group.rank, len(self.config.prompt), self.group.world):
            clip = self.generate([self.config.prompt[i]], [i])[0]
            video.write_video(out / "samples" / f"step-{self.done:06d}-{i}.gif", clip, self.config.fps)
        return {"oracle": shapes.accuracy(self.generate)} if self.config.preset == "shapes" else {}


# ---- what a run needs, and what it leaves ------------------------------------------------------------------------


def load_world(config: Config, device: torch.device):
    """Networks, dataset of captioned clips, and reward terms."""
    if config.preset == "shapes":
        known = shapes.rewards(device, config.teacher or None)
        loaders = {reward.name: (kind == "video", None, lambda reward=reward: reward) for kind, reward in known.items()}
        models = shapes.load(folder=config.teacher or None, device=device, guidance=True)
        return models, shapes.Clips(frames=config.frames, size=config.height), reward_terms(config, loaders)
    if not config.data:
        raise ValueError("no clips to train on; name them with --data, or try --dry-run 1")
    clips = data.open_dataset(config.data, config.frames, config.fps, config.height, config.width, cache=config.out)
    dtype = getattr(torch, config.dtype)
    terms = public_terms(config, partial(rewards.load, device=device, dtype=dtype))
    models = model.load(config.preset.split("-")[1], config.teacher or None, device=device, guidance=True,
                        dtype=dtype if config.lora else torch.float32)
    models.vae.to(dtype), models.text.to(dtype)
    return models, clips, terms


def public_terms(config: Config, load) -> list[RewardTerm]:
    """The terms that --reward names; load(name, path, frames=) makes a reward."""
    loaders = {}
    for name, path, weight in map(rewards.parse_spec, config.reward):
        is_video = rewards.RECIPES[name].kind == "video"
        loaders[name] = is_video, weight, partial(load, name, path, frames=config.video_frames if is_video else None)
    return reward_terms(config, loaders)


def reward_terms(config: Config, loaders: dict) -> list[RewardTerm]:
    """{name: (is a video reward, weight or None = β, loader)} -> terms. A reward of weight zero is not even loaded."""
    terms = []
    for name, (is_video, weight, load) in loaders.items():
        weight = (config.video_weight if is_video else config.image_weight) if weight is None else weight
        if weight:
            terms.append(RewardTerm(load(), weight, config.video_frames if is_video else config.image_frames, is_video, name))
    for is_video, kind, example in ((False, "image", "hpsv2"), (True, "video", "internvideo2")):
        if getattr(config, f"{kind}_weight") and all(is_video != entry[0] for entry in loaders.values()):
            raise ValueError(f"--{kind}-weight is {getattr(config, f'{kind}_weight')}, but no {kind} reward is given; "
                             f"add --reward {example}=FILE, or --{kind}-weight 0")
    return terms


# ---- the same with random weights, for --dry-run -----------------------------------------------------------------


def random_world(config: Config, device: torch.device) -> tuple[Models, "NoiseClips", list[RewardTerm]]:
    """What `load_world` returns for a published model, but random: no file is read."""
    name, dtype = config.preset.split("-")[1], getattr(torch, config.dtype)
    family = FAMILIES[name]
    with dryrun.build(device, dtype if config.lora else torch.float32):
        unet = UNet3D(dataclasses.replace(family.unet, guidance=True))
    with dryrun.build(device, dtype):
        vae, text = VAE(family.vae).requires_grad_(False), TextEncoder(family.text).requires_grad_(False)
    models = Models(name, unet, vae, text, family)
    return models, NoiseClips(config), public_terms(config, partial(random_reward, device=device, dtype=dtype))


def random_reward(name: str, path: str | None, frames: int | None, device: torch.device, dtype: torch.dtype):
    with dryrun.build(device, dtype):
        return rewards.untrained(name, device, dtype, frames)


class NoiseClips:
    """Noise of the size that training asks for, with one caption."""

    def __init__(self, config: Config):
        self.shape = 3, config.frames, config.height, config.width

    def get(self, index: int, generator=None) -> dict:
        clip = torch.randint(0, 256, self.shape, dtype=torch.uint8)
        return dict(clip=clip, caption="noise", reward_caption=None, index=index)


# ---- results -------------------------------------------------------------------------------------------------------


def save(trainer: Trainer, out: Path, clips_skipped: int) -> None:
    """OUT/checkpoint-STEP.pt. Once it is there, those of an abandoned future and all but the last K go."""
    state, path = trainer.state(clips_skipped), out / f"checkpoint-{trainer.done:07d}.pt"
    if trainer.group.rank == 0:
        write(path, partial(torch.save, state))
        past = [old for old in checkpoints(out) if old <= path]
        for old in set(checkpoints(out)) - set(past[-trainer.config.keep:]):
            old.unlink()


def export(trainer: Trainer, out: Path) -> None:
    """turbo.safetensors for sample.py; on demand the released code's list, and the merged UNet."""
    config, unet = trainer.config, trainer.student
    state = lora_state(unet) if config.lora else unet.state_dict()
    header = {"version": 1, "model": config.preset.split("-")[-1], "method": "turbo" if trainer.terms else "vcm", "steps": config.grid,
              "w_min": config.w_min, "w_max": config.w_max, "rank": config.lora,
              "train": {k: v for k, v in dataclasses.asdict(config).items() if k not in PATHS}}
    half = config.preset == "shapes"                                        # the toy's weights come with the repository
    weights.save_checkpoint(out / "turbo.safetensors", {k: x.half() for k, x in state.items()} if half else state, header)
    if config.export_lora:
        write(out / "unet_lora.pt", partial(torch.save, weights.lora_to_list(
            weights.split_lora(state), lora_shapes(unet.config), layout_of(unet.config))))
    if config.merge:
        weights.save_checkpoint(out / "merged.safetensors", merge(unet.float()).state_dict(), header)


@cli.main
def main(argv=None):
    """Trains until --steps or a signal, and leaves OUT: log, samples, checkpoints, and at the end the student's weights."""
    config, group = configure(argv), Group()
    torch.manual_seed(config.seed)                                      # LoRA starts alike on all processes
    if config.dry_run is not None:
        world = load_world if config.preset == "shapes" else random_world
        return dryrun.report(config, group, world, Trainer)
    out, path = Path(config.out), open_folder(config, group)
    models, clips, terms = load_world(config, group.device)
    trainer = Trainer(config, models, terms, group)
    if path:
        trainer.load_state(torch.load(path, map_location="cpu", weights_only=True))
    if group.any(trainer.done) and not trainer.done:
        raise ValueError(f"other processes found a checkpoint in {out}, this one did not; all nodes must share that folder")
    check_room(out, trainer.gradient.nbytes * (4 if trainer.ema else 3), config.keep)
    log, heard, stopped, record = Log(out, trainer.done, config.steps, group), listen(), False, {}
    batches = shielded(data.loader(clips, config.batch // group.world, group.rank, group.world, config.workers,
                                   config.seed, trainer.done, out / "bad_clips.jsonl"))
    while trainer.done < config.steps and not stopped:
        trainer.parts.seconds.clear()
        with trainer.parts("data"):
            batch = next(batches)
        record = trainer.step(batch)
        last = trainer.done == config.steps
        if config.sample_every and (trainer.done % config.sample_every == 0 or last):
            record |= trainer.show(out)
        log(trainer.done, record, trainer.parts)
        stopped = group.any(heard)
        if trainer.done % config.save_every == 0 or last or stopped:
            save(trainer, out, record["clips_skipped"])
    if trainer.done >= config.steps and group.rank == 0:
        export(trainer, out)
    group.leave()
    if stopped:
        print(f"stopped by a signal, and saved at step {trainer.done}; go on with --resume auto", file=sys.stderr)
        sys.exit(128 + (heard or [signal.SIGTERM])[0])


if __name__ == "__main__":
    main()
