"""Trains from nothing the models that T2V-Turbo takes as given: a VAE, a CLIP (its text tower conditions the
UNet, all of it is the image reward), a video-text model (the video reward), and the teacher, a guided
text-to-video diffusion model.

    python shapes/pretrain.py --all --out runs/shapes
    torchrun --nproc_per_node=2 shapes/pretrain.py --stage teacher --out runs/shapes

The first makes all four; interrupted, the same command goes on. The second makes one on two cores or GPUs.
"""
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import rewards
import shapes
from plumbing import cli, weights
from plumbing.fast_cpu import speed_up
from plumbing.files import atomic, remove_leftovers
from plumbing.run import Group, pick_device, usual_dtype
from shapes import grammar, world
from shapes.models import TOY, TOY_VAE, UNet
from solver import Schedule
from turbo import EMA


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    stage: Literal["vae", "clip", "viclip", "teacher"] = "vae"   # what to train; it needs those before it
    all: bool = False                   # all stages; on a CPU in two processes with half of the cores each
    out: str = "runs/shapes"            # folder for weights, logs and checkpoints
    seed: cli.Seed = 0                  # of initial weights and of every batch
    vae_steps: cli.Count = 1500         # batches of 64 frames
    clip_steps: cli.Count = 1200        # batches of 64 frames and captions
    viclip_steps: cli.Count = 2000      # batches of 32 clips and captions
    teacher_steps: cli.Count = 7500     # batches of 96 frames in the first 2/15, then of 16 clips
    save_every: cli.Count = 100         # steps between checkpoints
    device: str = ""                    # cpu, cuda or cuda:NUMBER; empty: CUDA where there is a GPU


PAIRS = 0.7                             # two things more often than in the world: they teach what is whose
CLIP = dict(embed_dim=128, image_size=world.SIZE,
            vision_cfg=dict(image_size=world.SIZE, patch_size=8, width=128, layers=3, head_width=32),
            text_cfg=dict(width=128, layers=4, heads=4, context_length=grammar.CONTEXT_LENGTH,
                          vocab_size=grammar.VOCABULARY_SIZE))
VICLIP = rewards.ViCLIPConfig(
    image_size=world.SIZE, patch=8, frames=4, tubelet=4, width=128, layers=3, heads=4, embed_dim=128,
    text_width=128, text_layers=4, text_heads=4, context_length=grammar.CONTEXT_LENGTH,
    vocab_size=grammar.VOCABULARY_SIZE)


def save(path: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Weights as float16, with their configuration in the header."""
    weights.save_checkpoint(path, {key: tensor.half() for key, tensor in tensors.items()}, config)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16, where the device multiplies in it."""
    return torch.autocast(device.type, torch.bfloat16, usual_dtype(device) == "bfloat16")


# ---- the training loop of all stages -----------------------------------------------------------------------


LossOf = Callable[[random.Random, float], tuple[Tensor, dict]]


def fit(name: str, network: nn.Module, loss_of: LossOf, steps: int, config: Config, lr: float = 1e-3,
        ema: float = 0.995, group: Group | None = None, warmup: float = 0.05,
        cosines: tuple[tuple[float, float], ...] = ((0, 1),)) -> None:
    """AdamW, exact resumption. Leaves an average of the weights in the network.

    loss_of(rng, progress) -> (loss, figures to log) draws its batch from rng, which depends on the step
    alone; progress is 0..1. With a group of processes each takes its share of the batch. The learning rate
    grows during the share `warmup` of the steps, and falls by `cosines`, see learning_rate.
    """
    out, first = Path(config.out), group is None or group.rank == 0
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = EMA(params, ema)
    start = resume(out / f"{name}.ckpt", network, optimizer, average)
    log, began = Log(out / f"{name}.jsonl", start) if first else None, time.time()

    for step in (bar := tqdm(range(start, steps), name, initial=start, total=steps, disable=not first)):
        for param_group in optimizer.param_groups:
            warm = min(1, (step + 1) / (warmup * steps))
            param_group["lr"] = lr * warm * learning_rate(step / steps, cosines)

        # Gradient of this step's batch, over all processes
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss, figures = loss_of(random.Random(f"{config.seed} {name} {step}"), step / steps)
        loss.backward()
        if group is not None and group.world_size > 1:
            share_gradients(params, group)

        # Update of the weights and of their average; early averages forget the random start
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.decay = min(ema, (step + 1) / (step + 10))
        average.update()

        if log and step % 20 == 19:
            figures = {"loss": loss.item(), **{key: float(value) for key, value in figures.items()}}
            bar.set_postfix({key: f"{value:.4f}" for key, value in figures.items()}, refresh=False)
            log(dict(step=step + 1, **figures, seconds=round(time.time() - began, 1)))
        if first and ((step + 1) % config.save_every == 0 or step + 1 == steps):
            state = dict(network=network.state_dict(), optimizer=optimizer.state_dict(), ema=average.average)
            with atomic(out / f"{name}.ckpt") as temporary, open(temporary, "wb") as file:
                torch.save(state | {"step": step + 1}, file)
    average._exchange()


def learning_rate(progress: float, cosines: tuple[tuple[float, float], ...]) -> float:
    """A cosine from 1 to 2 %. Each of `cosines` is (where it begins, how long it is), in shares of all steps;
    where one begins, the one before ends."""
    start, length = [cosine for cosine in cosines if cosine[0] <= progress][-1]
    return 0.51 + 0.49 * math.cos(math.pi * (progress - start) / length)


def resume(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, average: EMA) -> int:
    """Fills all three from a checkpoint, where there is one -> the number of steps done.

    Raises ValueError, in one line, for a file that is none of this network's.
    """
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, weights_only=True, map_location=average.average[0].device)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        average.average, step = saved["ema"], saved["step"]
    except Exception as error:          # whatever a damaged file, or a foreign one, makes torch raise
        raise ValueError(f"{path}: no checkpoint of this stage, or a damaged one ({type(error).__name__}); "
                         "delete it and the stage starts over") from error
    return step


def share_gradients(params: list[nn.Parameter], group: Group) -> None:
    """Every process gets the mean of all processes' gradients, in one exchange."""
    shared = group.sum(torch.cat([p.grad.flatten() for p in params])) / group.world_size
    for p, grad in zip(params, shared.split([p.numel() for p in params])):
        p.grad.copy_(grad.view_as(p))


class Log:
    """NAME.jsonl: figures of every 20th step. Lines of steps that are made again after an interruption go."""

    def __init__(self, path: Path, start: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        with atomic(path) as temporary:
            temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= start))
        self.file = open(path, "a")

    def __call__(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


# ---- batches -----------------------------------------------------------------------------------------------


def draw(rng: random.Random, count: int, T: int, vary: str = ""
         ) -> tuple[Tensor, list[str], list[grammar.Scene]]:
    """A batch of training clips in [-1, 1] (B, 3, T, H, W), captions, scenes.

    With `vary`, every second scene differs from the one before it in one respect: who has which attribute, or
    one attribute of one thing. Contrastive models learn from such pairs what belongs to what.
    """
    scenes = []
    while len(scenes) < count:
        scenes.append(grammar.draw_scene(rng, pairs=PAIRS))
        if vary:
            scenes.append(variation(scenes[-1], rng, vary.split()))
    captions = [grammar.describe(scene, rng) for scene in scenes]
    clips = torch.stack([world.render(scene, rng, T) for scene in scenes])
    return clips.float() / 127.5 - 1, captions, scenes


def variation(scene: grammar.Scene, rng: random.Random, attributes: list[str]) -> grammar.Scene:
    """The scene with an attribute exchanged between its things, or changed in one; nothing held-out."""
    values = {"colour": grammar.COLOURS, "shape": grammar.SHAPES, "motion": grammar.MOTIONS}
    for _ in range(50):
        things, name = [vars(thing).copy() for thing in scene.things], rng.choice(attributes)
        if len(things) == 2 and rng.random() < 0.5:
            things[0][name], things[1][name] = things[1][name], things[0][name]
        else:
            rng.choice(things)[name] = rng.choice(list(values[name]))

        new = grammar.Scene(tuple(grammar.Thing(**thing) for thing in things), scene.background)
        colours_differ = len({thing.colour for thing in new.things}) == len(things)
        trained = not any(thing.held_out for thing in new.things)
        if colours_differ and trained and set(new.things) != set(scene.things):
            return new
    return grammar.draw_scene(rng)


def some_frame(clips: Tensor, rng: random.Random) -> Tensor:
    """One of the first two frames of each clip, (B, 3, H, W)."""
    return clips[torch.arange(len(clips)), :, [rng.randrange(2) for _ in clips]]


def roughen(pixels: Tensor, progress: float) -> Tensor:
    """Pixels (B, ...), in the last third of training with a little noise.

    A reward that has seen noise is not raised by patterns that nobody sees.
    """
    if progress < 2 / 3:
        return pixels
    return pixels + 0.3 * torch.rand(len(pixels), *[1] * (pixels.ndim - 1)) * torch.randn_like(pixels)


# ---- VAE ---------------------------------------------------------------------------------------------------


def vae(config: Config, group: Group) -> None:
    """Pixels <-> latents 8 times smaller: L1 + L2, four times as much on and around things, and a little KL.

    The latents are scaled to a standard deviation of 1/2, not 1: the papers' schedule ends at ᾱ = 0.0047,
    where 512 latent pixels of a flat background together still tell its colour. Sampling starts from pure
    noise, which tells nothing; the teacher must not lean on it.
    """
    network = model.VAE(TOY_VAE).to(group.device)
    speed_up(model.CPU_LAYERS, network)

    def loss_of(rng, progress):
        clips = draw(rng, 32, 2)[0].to(group.device)
        mean, logvar = network.posterior(clips)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = (network.decode(z * network.config.scale) - clips).abs()

        coloured = (clips.amax(1) - clips.amin(1) > 0.4).float()
        near_things = F.max_pool3d(coloured, (1, 5, 5), 1, (0, 2, 2))[:, None]
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        loss = ((error + error ** 2) * (1 + 3 * near_things)).mean() + 5e-5 * kl
        return loss, dict(l1=error.detach().mean(), kl=kl.detach())

    fit("vae", network, loss_of, config.vae_steps, config, lr=2e-3)
    with torch.no_grad():
        spread = network.posterior(draw(random.Random(0), 256, 2)[0].to(group.device))[0].std()
    header = asdict(network.config) | {"scale": 0.5 / spread.item()}
    save(Path(config.out) / "vae.safetensors", network.state_dict(), header)


# ---- CLIP and ViCLIP ---------------------------------------------------------------------------------------


class Namer(nn.Module):
    """Only for pretraining: reads off a feature which shape and which motion each colour has.

    Pictures and captions share it, so that both towers learn quickly which attributes belong together.
    """

    def __init__(self, width: int, attributes: dict[str, dict]):
        super().__init__()
        self.attributes = attributes
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(grammar.COLOURS) * (1 + len(values)))
                                    for name, values in attributes.items()})

    def forward(self, feature: Tensor, scenes: list[grammar.Scene]) -> dict[str, Tensor]:
        """Features (B, E) and what they should tell -> a cross-entropy per attribute."""
        losses = {}
        for name, values in self.attributes.items():
            label = torch.zeros(len(scenes), len(grammar.COLOURS), dtype=torch.long)    # 0: no such thing
            for row, scene in zip(label, scenes):
                for thing in scene.things:
                    row[grammar.COLOURS.index(thing.colour)] = 1 + list(values).index(getattr(thing, name))
            logits = self.heads[name](8 * feature).view(-1, 1 + len(values))
            losses[name] = F.cross_entropy(logits, label.flatten().to(logits.device))
        return losses


def contrast(seen: Tensor, said: Tensor, scenes: list[grammar.Scene], namer: Namer, logit_scale: Tensor
             ) -> tuple[Tensor, dict[str, Tensor]]:
    """CLIP's symmetric InfoNCE loss plus the naming of attributes; and how often the right caption wins."""
    seen, said = F.normalize(seen.float(), dim=1), F.normalize(said.float(), dim=1)
    logits = logit_scale.exp().clamp(max=100) * seen @ said.T
    target = torch.arange(len(seen), device=seen.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    names = namer(seen, scenes)
    loss = loss + sum(names.values()) + sum(namer(said, scenes).values())
    first = (logits.argmax(1) == target).float().mean()
    return loss, dict(first=first, **{name: x.detach() for name, x in names.items()})


def clip(config: Config, group: Group) -> None:
    """Image-text contrast on single frames: colours, shapes, who has which, background."""
    import open_clip  # late, as it takes four seconds; rewards.CLIP would train to other bytes

    network = open_clip.CLIP(CLIP["embed_dim"], CLIP["vision_cfg"], CLIP["text_cfg"]).to(group.device)
    network.namer = Namer(CLIP["embed_dim"], {"shape": grammar.SHAPES}).to(group.device)

    def loss_of(rng, progress):
        clips, captions, scenes = draw(rng, 64, 2, "colour shape")
        frames = roughen(some_frame(clips, rng), progress).to(group.device)
        with mixed_precision(group.device):
            images = network.encode_image(frames)
            texts = network.encode_text(world.tokenize(captions).to(group.device))
        return contrast(images, texts, scenes, network.namer, network.logit_scale)

    fit("clip", network, loss_of, config.clip_steps, config)
    del network.namer
    save(Path(config.out) / "clip.safetensors", network.state_dict(), CLIP)


def viclip_from_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's weights -> a ViCLIP's first ones: its patches span frames, each with its own weight."""
    start = rewards.from_clip(rewards.needed(state), None)
    spread = (1 + 2 * torch.randn(VICLIP.width, VICLIP.tubelet, 1, 1, 1)) / VICLIP.tubelet
    conv = start["vision_encoder.conv1.weight"][:, None] * spread
    start["vision_encoder.conv1.weight"] = (conv + 0.5 * conv.std() * torch.randn_like(conv)).flatten(1, 2)
    start["vision_encoder.temporal_positional_embedding"] = torch.zeros(1, 1, VICLIP.width)
    return start


def viclip(config: Config, group: Group) -> None:
    """Video-text contrast on four frames of each clip: also what moves where. Like the original, it starts
    from a CLIP.

    A patch spans the four frames, as in ViViT, so that motion shows in single patches. Half of the scenes
    have two things: what this model does not tell apart, neither the teacher, through the states of its text
    tower, nor the reward will.
    """
    network = rewards.ViCLIP(VICLIP).to(group.device)
    network.load_state_dict(viclip_from_clip(shapes.read(Path(config.out) / "clip.safetensors")[0]))
    attributes = {"shape": grammar.SHAPES, "motion": grammar.MOTIONS}
    network.namer = Namer(VICLIP.embed_dim, attributes).to(group.device)
    logit_scale = torch.tensor(math.log(20.0), device=group.device)

    def loss_of(rng, progress):
        clips, captions, scenes = draw(rng, 32, world.FRAMES, "colour shape motion motion")
        clips = roughen(clips[:, :, rng.randrange(2)::2], progress)     # strided, as the reward will see them
        with mixed_precision(group.device):
            videos = network.encode_video(clips.transpose(1, 2).to(group.device))
            texts = network.text(world.tokenize(captions).to(group.device))
        return contrast(videos, texts, scenes, network.namer, logit_scale)

    fit("viclip", network, loss_of, config.viclip_steps, config)
    del network.namer
    save(Path(config.out) / "viclip.safetensors", network.state_dict(), asdict(VICLIP))


# ---- the teacher -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of the teacher's training."""
    until: float                        # share of all steps at which it ends
    batch: int
    frames: int
    lesson: tuple[int, int]             # timesteps at which the lesson is decided
    uniform: int                        # one timestep in this many is any, the others are of the lesson


PHASES = (
    # colours and shapes; coherent clips; what moves how
    Phase(2 / 15, batch=96, frames=1, lesson=(200, 800), uniform=2),
    Phase(0.21, batch=16, frames=8, lesson=(700, 1000), uniform=2),
    Phase(1, batch=16, frames=8, lesson=(600, 1000), uniform=4),
)
COSINES = ((0, 0.6), (0.21, 0.39), (0.6, 0.4))      # of the learning rate: it starts over twice


def teacher(config: Config, group: Group) -> None:
    """ε-prediction with the papers' schedule; one caption in ten is empty, for guidance.

    What moves where is decided at high noise, where ‖ε - ε_θ‖² hardly shows it: there z_t is almost ε itself.
    So the error is weighted by 1/ᾱ_t = 1 + σ_t²/α_t², which makes it the sum of the errors in ε and in ẑ0.
    Like the real teachers, which start from Stable Diffusion, it learns pictures before clips: 96 frames from
    different scenes cost no more than 16 clips.
    """
    pixels, text = shapes.load_vae(config.out).to(group.device), shapes.load_text(config.out).to(group.device)
    schedule = Schedule(device=group.device)
    torch.manual_seed(config.seed)                          # whatever loading the others drew
    network = UNet(TOY).to(group.device)
    speed_up(model.CPU_LAYERS, network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data[:, :, ::2] = 0            # what a frame takes from its neighbours

    def loss_of(rng, progress):
        phase = next(phase for phase in PHASES if progress < phase.until)
        B, T = phase.batch, phase.frames
        clips, captions, _ = draw(rng, B, max(T, 2))
        if T == 1:
            clips = some_frame(clips, rng)[:, :, None]

        # Drawn for the whole batch, so that any number of processes trains on the same
        mine = slice(B * group.rank // group.world_size, B * (group.rank + 1) // group.world_size)
        c = text([caption if rng.random() > 0.1 else "" for caption in captions][mine])
        ranges = [phase.lesson if i % phase.uniform else (0, 1000) for i in range(B)]
        t = torch.tensor([rng.randrange(*each) for each in ranges], device=group.device)[mine]
        size = (pixels.config.latent, T, world.SIZE // 8, world.SIZE // 8)
        noise, eps = torch.randn(2, B, *size)[:, mine].to(group.device)

        with torch.no_grad():
            z0 = pixels.encode(clips[mine].to(group.device), noise)
        with mixed_precision(group.device):
            eps_hat = network(schedule.add_noise(z0, eps, t), t, c)
            error = (eps_hat - eps).pow(2).flatten(1).mean(1) / schedule.alpha[t] ** 2
        some = error.detach()
        return error.mean(), dict(extra=some[1::2].mean(), uniform=some[::phase.uniform].mean())

    fit("teacher", network, loss_of, config.teacher_steps, config, ema=0.997, group=group,
        warmup=0.03, cosines=COSINES)
    if group.rank == 0:
        save(Path(config.out) / "teacher.safetensors", network.state_dict(), asdict(network.config))


# ---- all stages --------------------------------------------------------------------------------------------


def every_stage(config: Config, argv: list[str], on_gpu: bool) -> None:
    """The VAE beside the CLIP, which need nothing, then ViCLIP, then the teacher, on a CPU shared by two
    processes.

    What is done stays. Raises ValueError when a stage ends early.
    """
    if "RANK" in os.environ:
        raise ValueError("--all starts its own processes; run it with python, not with torchrun")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))             # by way of `finally`
    for side_by_side in (["vae", "clip"], ["viclip"], ["teacher"] * (1 if on_gpu else 2)):
        missing = [name for name in side_by_side if not (Path(config.out) / f"{name}.safetensors").exists()]
        if not all_end_well(missing, argv):
            stages = " and ".join(dict.fromkeys(missing))
            raise ValueError(f"{stages} ended early; the same command goes on where it was")


def all_end_well(names: list[str], argv: list[str]) -> bool:
    """Runs stages side by side, those of one name as one training; all end when the caller does."""
    world_size, running = names.count("teacher") or 1, []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}     # if the caller did not set it
    try:
        for i, name in enumerate(names):
            place = dict(RANK=i % world_size, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1",
                         MASTER_PORT=port, TQDM_POSITION=i)
            environment = threads | os.environ | {key: str(value) for key, value in place.items()}
            command = [sys.executable, __file__, *argv, "--all", "false", "--stage", name]
            running.append(subprocess.Popen(command, env=environment))
        return not any([process.wait() for process in running])
    finally:
        for process in running:
            process.terminate()


def check_out(config: Config) -> None:
    """Makes the folder. Raises ValueError where it cannot be written or lacks an earlier stage."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made ({error.strerror}); choose another folder") from error
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} cannot be written; choose another folder")
    needs = {} if config.all else {"viclip": ["clip"], "teacher": ["vae", "clip", "viclip"]}
    for name in needs.get(config.stage, []):
        if not (out / f"{name}.safetensors").exists():
            raise ValueError(f"--stage {config.stage} needs {out / name}.safetensors, which is not there; "
                             f"make it first: --stage {name}, or --all")
    remove_leftovers(out)


@cli.main
def main(argv=None):
    """Trains the stage of --stage, or all of them, and leaves weights, log and checkpoint in --out."""
    argv = sys.argv[1:] if argv is None else argv
    config = cli.parse(Config, argv, __doc__)
    if cli.place()[1] > 1 and config.stage != "teacher":
        raise ValueError(f"--stage {config.stage} is for one process; torchrun is for --stage teacher")
    check_out(config)
    if config.all:
        return every_stage(config, argv, pick_device(config.device).type == "cuda")

    group = Group(config.device)                            # first: it chooses this process's GPU
    torch.manual_seed(config.seed)
    {"vae": vae, "clip": clip, "viclip": viclip, "teacher": teacher}[config.stage](config, group)
    group.close()


if __name__ == "__main__":
    main()
