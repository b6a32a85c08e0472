"""Training: Algorithm 1 of T2V-Turbo (arXiv 2405.18750), on a CPU, a GPU, or many.

    python train.py --preset shapes                                            # the toy, on a laptop
    torchrun --nproc_per_node=8 train.py --preset turbo-vc2 --teacher model.ckpt --data '/data/webvid/{00000..09999}.tar' \\
        --reward hpsv2=FILE --reward internvideo2=FILE --out runs/vc2          # the paper

The global batch is fixed and split over however many processes there are; what is random about a clip comes from its own generator,
seeded by its place in the run. So the same command trains the same student on 1, 2 or 8 processes, and a resumed run is the same run.
"""
import copy
import dataclasses
import json
import os
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import cli
from solver import Schedule
from turbo import EMA, RewardTerm, Step, distill, inject, lora_state, reward_gradient, total_loss


@dataclass(frozen=True)
class Config:
    preset: Literal["shapes"] = "shapes"    # what to train; a preset replaces the defaults below
    out: str = "runs/shapes"                # folder of the run: turbo.safetensors, checkpoints, log.jsonl
    resume: str = ""                        # auto (the last checkpoint in OUT, if any) or a checkpoint's path
    seed: int = 0                           # of LoRA's start, the order of clips, and all that Algorithm 1 draws
    # Algorithm 1
    grid: int = 50                          # N, DDIM steps of the teacher's solver; paper, Sec. 4
    w_min: float = 5.0                      # ω ~ U[w_min, w_max]; paper, Sec. 4
    w_max: float = 15.0                     # same
    image_weight: float = 1.0               # β_img; paper, Sec. 4.1 (VC2: 1, MS: 2)
    video_weight: float = 2.0               # β_vid; paper, Sec. 4.1 (VC2: 2, MS: 3)
    image_frames: int = 6                   # M, random frames that the image reward sees; paper, Sec. 4.1
    video_frames: int = 8                   # evenly strided frames that the video reward sees; paper, Sec. 4.1
    # optimisation
    steps: int = 10000                      # paper, Sec. 4.1
    batch: int = 8                          # clips per step over all processes; paper: 1 on each of 6 to 8 GPUs
    micro: int = 1                          # clips per forward pass; trades memory for speed, never changes the result
    lr: float = 1e-5                        # paper, Sec. 4.1
    lora: int = 64                          # rank; paper: 64 for VC2, 32 for MS; 0 trains the whole UNet against a frozen second copy
    ema: float = 0.95                       # decay of the target network θ⁻; paper, Sec. 4.1; 0: the target is θ itself
    clip: float = 1.0                       # gradient norm; released code
    dtype: Literal["float32", "bfloat16"] = "bfloat16"    # of the networks under autocast; losses and trained weights are float32
    # keeping
    save_every: int = 500                   # steps between checkpoints
    keep: int = 2                           # checkpoints kept


PRESETS = {
    "shapes": dict(steps=2000, batch=16, micro=16, lr=1e-4, dtype="float32"),
}


def configure(argv=None) -> Config:
    """Command line over preset over defaults."""
    preset = cli.parse(Config, argv, __doc__).preset
    return cli.parse(Config, argv, __doc__, defaults=PRESETS[preset])


# ---- data ------------------------------------------------------------------------------------------------------------------------


def generator(seed: int, position: int) -> torch.Generator:
    """The random stream of the clip at a position of the run. (torch reads 32 bits of a CPU seed; the odd factor spreads runs apart.)"""
    return torch.Generator().manual_seed((seed * 2654435761 + position) % 2 ** 32)


class Stream(Dataset):
    """The clips of a run in order: position p is clip p mod n of the p // n-th shuffle of the n clips."""

    def __init__(self, clips, seed: int):
        self.clips, self.seed, self.epoch, self.order = clips, seed, None, None

    def __getitem__(self, position: int) -> dict:
        epoch, i = divmod(position, len(self.clips))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, torch.randperm(len(self.clips), generator=generator(self.seed, -1 - epoch))
        item = self.clips.get(self.order[i].item(), generator(self.seed, position))
        return {**item, "position": position}


# ---- the trainer -----------------------------------------------------------------------------------------------------------------


class Parts:
    """Seconds spent in each named part of a step."""

    def __init__(self, device):
        self.device, self.seconds = device, defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start


def add_guidance(unet) -> None:
    """The input for ω that a teacher lacks; its weight is zero, so the student starts as its teacher."""
    if not unet.config.guidance:
        unet.config = dataclasses.replace(unet.config, guidance=True)
        unet.time_cond_proj = nn.Linear(256, unet.config.channels, bias=False, device=unet.out[2].weight.device, dtype=unet.dtype)
        nn.init.zeros_(unet.time_cond_proj.weight)


class Trainer:
    """Student, teacher, target, rewards and optimizer; `step` is one round of Algorithm 1."""

    def __init__(self, config: Config, models, terms: list[RewardTerm], device: torch.device):
        self.config, self.models, self.terms, self.device = config, models, terms, device
        self.schedule, self.parts, self.done, self.skipped = Schedule(config.grid, device), Parts(device), 0, 0
        self.student = self.teacher = models.unet.eval()                    # no dropout: the targets would be noise
        add_guidance(self.student)
        if config.lora:
            self.params = inject(self.student, config.lora)                 # with its LoRA off, the student is the teacher
        else:
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            self.params = list(self.student.requires_grad_(True).parameters())
        self.named = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        for unet in {self.student, self.teacher}:                           # per call, so that no cast outlives a change of weights
            unet.forward = torch.autocast(device.type, torch.bfloat16, config.dtype == "bfloat16")(unet.forward)
        self.ema = EMA(self.params, config.ema) if config.ema else None
        self.optimizer = torch.optim.AdamW(self.params, config.lr, weight_decay=0, fused=True)      # betas 0.9, 0.999
        self.flat = torch.zeros(sum(p.numel() for p in self.params), device=device)     # all gradients in one tensor
        start = 0
        for p in self.params:
            p.grad = self.flat.as_strided(p.shape, p.stride(), start)
            start += p.numel()
        with torch.no_grad():
            self.null = models.text([""])

    def accumulate(self, items: list[dict]) -> dict[str, float]:
        """Algorithm 1 on some clips of the batch: adds their part of the gradient, returns their part of the losses and rewards."""
        config, draws = self.config, [generator(self.config.seed, item["position"]) for item in items]
        captions = [item["caption"] for item in items]
        with self.parts("encode"), torch.no_grad():
            x = torch.stack([item["clip"] for item in items]).to(self.device) / 127.5 - 1
            z0, c = self.models.vae.encode(x).float(), self.models.text(captions)
        with self.parts("distill"):
            step = Step.draw(z0, self.schedule, (config.w_min, config.w_max), draws)
            loss_cd, z0_hat = distill(self.student, self.teacher, self.ema, self.schedule, step, z0, c, self.null.expand_as(c))
        g, scores = None, {}
        if self.terms:
            with self.parts("rewards"):
                spoken = [item["reward_caption"] or item["caption"] for item in items]
                g, scores = reward_gradient(z0_hat, spoken, self.models.vae.decode, self.terms, draws, chunk=16 * len(items))
        share = len(items) / config.batch
        with self.parts("backward"):
            (share * total_loss(loss_cd, z0_hat, g)).backward()
        loss = loss_cd.item() - sum(term.weight * scores[term.name] for term in self.terms)
        return {name: share * value for name, value in {"loss": loss, "loss_cd": loss_cd.item(), **scores}.items()}

    def step(self, items: list[dict]) -> dict[str, float]:
        """One step on this process's clips of the batch; returns what the log says about it."""
        record, micro = defaultdict(float), self.config.micro
        self.flat.zero_()
        for i in range(0, len(items), micro):
            for name, value in self.accumulate(items[i:i + micro]).items():
                record[name] += value
        with self.parts("update"):
            norm = self.flat.norm()
            if torch.isfinite(norm):
                self.flat *= (self.config.clip / (norm + 1e-6)).clamp(max=1)
                self.optimizer.step()
                if self.ema:
                    self.ema.update()
                self.skipped = 0
            else:
                self.skipped += 1
                if self.skipped == 10:
                    raise ValueError("10 steps in a row had no finite gradient; lower --lr, or continue from an earlier checkpoint")
        self.done += 1
        return {**record, "grad_norm": norm.item(), "lr": self.config.lr, "skipped": self.skipped}

    def state(self) -> dict:
        """All that the next step depends on. No random state: every draw is a function of (seed, position in the run)."""
        return dict(config=dataclasses.asdict(self.config), step=self.done, skipped=self.skipped, optimizer=self.optimizer.state_dict(),
                    params={n: p.detach() for n, p in self.named.items()}, ema=self.ema.average if self.ema else [])

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        if list(self.named) != list(state["params"]):
            raise ValueError("this checkpoint is of another network, or of another --lora")
        self.done, self.skipped = state["step"], state["skipped"]
        self.optimizer.load_state_dict(state["optimizer"])
        average = self.ema.average if self.ema else []
        for p, q in zip([*self.params, *average], [*state["params"].values(), *state["ema"]], strict=True):
            p.copy_(q)


# ---- files -----------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write) -> None:
    """write(temporary path), to the disk, then rename: a file of that name is whole or the previous one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*.pt"))


def save(trainer: Trainer, out: Path) -> None:
    path = out / f"checkpoint-{trainer.done:07d}.pt"
    write_atomically(path, lambda temporary: torch.save(trainer.state(), temporary))
    for old in checkpoints(out)[:-trainer.config.keep]:
        old.unlink()


def export(trainer: Trainer, path: Path) -> None:
    """The result: LoRA tensors, or the full UNet; what was trained stands in the header."""
    unet, config = trainer.student, trainer.config
    state = lora_state(unet) if config.lora else unet.state_dict()
    header = {"config": json.dumps({"unet": dataclasses.asdict(unet.config), "train": dataclasses.asdict(config)})}
    write_atomically(path, lambda temporary: save_file({k: v.contiguous() for k, v in state.items()}, temporary, metadata=header))


class Log:
    """log.jsonl, one line per step, and the bar. On resume, lines of steps that are about to be repeated go."""

    def __init__(self, out: Path, start: int, steps: int):
        path = out / "log.jsonl"
        old = path.read_text().splitlines(keepends=True) if path.exists() and start else []
        write_atomically(path, lambda temporary: temporary.write_text("".join(old[:start])))
        self.file, self.bar = open(path, "a"), tqdm(total=steps, initial=start)

    def __call__(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        shown = {k: f"{v:.4g}" for k, v in record.items() if k not in ("step", "seconds", "lr", "skipped")}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()


def toy(device):
    """The embedded world: its networks, training clips and rewards."""
    import shapes
    return shapes.load(device), shapes.Clips(split="train"), shapes.rewards(device)


# ---- main ------------------------------------------------------------------------------------------------------------------------


@cli.main
def main(argv=None):
    config = configure(argv)
    device, out = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = checkpoints(out)
    if saved and not config.resume:
        raise ValueError(f"{out} already holds {saved[-1].name}; continue it with --resume auto, or choose another --out")
    torch.manual_seed(config.seed)

    models, clips, known = toy(device)
    terms = [RewardTerm(known[kind], weight, frames, kind == "video", f"{kind}_reward")
             for kind, weight, frames in (("image", config.image_weight, config.image_frames),
                                          ("video", config.video_weight, known["video"].frames or config.video_frames)) if weight]
    trainer = Trainer(config, models, terms, device)
    path = saved[-1] if config.resume == "auto" and saved else config.resume
    if path and path != "auto":
        trainer.load_state(torch.load(path, map_location=device, weights_only=True))

    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):                  # the second one ends at once
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    log = Log(out, trainer.done, config.steps)
    positions = ([*range(k * config.batch, (k + 1) * config.batch)] for k in range(trainer.done, config.steps))
    batches = iter(DataLoader(Stream(clips, config.seed), batch_sampler=positions, collate_fn=list))
    while trainer.done < config.steps and not stop:
        trainer.parts.seconds.clear()
        with trainer.parts("data"):
            items = next(batches)
        record = trainer.step(items)
        log({"step": trainer.done, **record, "seconds": {k: round(v, 4) for k, v in trainer.parts.seconds.items()}})
        if trainer.done % config.save_every == 0 or trainer.done == config.steps:
            save(trainer, out)
    if stop:
        save(trainer, out)
        print(f"stopped and saved at step {trainer.done}; continue with --resume auto", file=sys.stderr)
        sys.exit(128 + stop[0])
    export(trainer, out / "turbo.safetensors")


if __name__ == "__main__":
    main()
