"""Trains from nothing the models that T2V-Turbo takes as given: a VAE, a CLIP (its text tower conditions the UNet, the whole of it is
the image reward), a video-text model (the video reward), and the teacher, a guided text-to-video diffusion model.

    python shapes/pretrain.py --all --out runs/shapes        # all four stages; interrupted, the same command goes on where it was
    torchrun --nproc_per_node=2 shapes/pretrain.py --stage teacher --out runs/shapes         # one of them, on two cores or GPUs
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import rewards
import shapes
from plumbing import cli, weights
from plumbing.run import Group
from shapes import grammar, world
from shapes.models import SHAPES, SHAPES_VAE
from solver import Schedule
from turbo import EMA


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    stage: Literal["vae", "clip", "viclip", "teacher"] = "vae"   # which model to train; later ones need earlier ones
    all: bool = False                   # all stages; without a GPU in two processes, each with half of the cores
    out: str = "runs/shapes"            # folder for weights, logs and checkpoints
    seed: int = 0                       # of initial weights and of every batch
    vae_steps: int = 1500               # batches of 64 frames
    clip_steps: int = 1200              # batches of 64 frames and captions
    viclip_steps: int = 2000            # batches of 32 clips and captions
    teacher_steps: int = 6000           # batches of 96 frames in the first 2/9, then of 16 clips
    save_every: int = 100               # steps between checkpoints
    device: str = "cuda" if torch.cuda.is_available() else "cpu"   # cuda or cpu


PAIRS = 0.7                             # more scenes of two things than in the world: which attribute is whose is learned from these
RESTART = 0.35                          # when the teacher's learning rate starts over
CLIP = dict(embed_dim=128, image_size=world.SIZE,
            vision_cfg=dict(image_size=world.SIZE, patch_size=8, width=128, layers=3, head_width=32),
            text_cfg=dict(width=128, layers=4, heads=4, context_length=24, vocab_size=grammar.VOCABULARY_SIZE))
VICLIP = rewards.ViCLIPConfig(image_size=world.SIZE, patch=8, frames=4, tubelet=4, width=128, layers=3, heads=4, embed_dim=128,
                              text_width=128, text_layers=4, text_heads=4, context_length=24, vocab_size=grammar.VOCABULARY_SIZE)


def save(path: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Weights as float16, with their configuration in the header."""
    weights.save_checkpoint(path, {key: tensor.half() for key, tensor in tensors.items()}, config)


def fit(name: str, network: torch.nn.Module, loss_of, steps: int, config: Config, lr: float = 1e-3, ema: float = 0.995,
        group: Group | None = None, restart: float = 1.0) -> None:
    """The training loop of all stages: AdamW, warm-up (5 % of the steps) and cosine (to 2 % of lr), an average of the weights,
    exact resumption. The network is left with the averaged weights. At the share `restart` of the steps the cosine starts over.

    loss_of(rng, progress) -> (loss, figures to log) draws its batch from rng, which depends on the step alone; progress is 0..1.
    With a group of processes each takes its share of the batch.
    """
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average, start, path = EMA(params, ema), 0, Path(config.out) / f"{name}.ckpt"
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=config.device)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        average.average, start = saved["ema"], saved["step"]
    first = group is None or group.rank == 0
    log, began = open(Path(config.out) / f"{name}.jsonl" if first else os.devnull, "a"), time.time()
    bar = tqdm(range(start, steps), name, initial=start, total=steps, disable=not first)
    for step in bar:
        done = step / steps if step < restart * steps else (step / steps - restart) / (1 - restart)
        rate = lr * min(1, (step + 1) / (0.05 * steps)) * (0.51 + 0.49 * math.cos(math.pi * done))
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss, figures = loss_of(random.Random(f"{config.seed} {name} {step}"), step / steps)
        loss.backward()
        if group is not None and group.world > 1:
            shared = group.sum(torch.cat([p.grad.flatten() for p in params])) / group.world
            for p, grad in zip(params, shared.split([p.numel() for p in params])):
                p.grad.copy_(grad.view_as(p))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.decay = min(ema, (step + 1) / (step + 10))                          # early averages forget the random start
        average.update()
        if step % 20 == 19:
            figures = {"loss": loss.item(), **{k: float(v) for k, v in figures.items()}}
            bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()}, refresh=False)
            log.write(json.dumps(dict(step=step + 1, **figures, seconds=round(time.time() - began, 1))) + "\n")
            log.flush()
        if first and ((step + 1) % config.save_every == 0 or step + 1 == steps):
            state = dict(network=network.state_dict(), optimizer=optimizer.state_dict(), ema=average.average, step=step + 1)
            torch.save(state, f"{path}.part")
            os.replace(f"{path}.part", path)
    average._exchange()


def draw(rng: random.Random, count: int, T: int, vary: str = "", pairs: float = PAIRS
         ) -> tuple[Tensor, list[str], list[grammar.Scene]]:
    """A batch of training clips in [-1, 1] (B, 3, T, H, W), captions, scenes.

    With `vary`, every second scene differs from the one before it in one respect: who has which attribute, or one attribute of one
    thing. Contrastive models learn to bind from such pairs.
    """
    scenes = []
    while len(scenes) < count:
        scenes.append(grammar.draw_scene(rng, pairs=pairs))
        if vary:
            scenes.append(variation(scenes[-1], rng, vary.split()))
    captions = [grammar.describe(scene, rng) for scene in scenes]
    clips = torch.stack([world.render(scene, rng, T) for scene in scenes])
    return clips.float() / 127.5 - 1, captions, scenes


def variation(scene: grammar.Scene, rng: random.Random, attributes: list[str]) -> grammar.Scene:
    """The scene with an attribute exchanged between its two things, or changed in one of them; from trained combinations only."""
    values = {"colour": grammar.COLOURS, "shape": grammar.SHAPES, "motion": grammar.MOTIONS}
    for _ in range(50):
        things, name = [vars(t).copy() for t in scene.things], rng.choice(attributes)
        if len(things) == 2 and rng.random() < 0.5:
            things[0][name], things[1][name] = things[1][name], things[0][name]
        else:
            rng.choice(things)[name] = rng.choice(list(values[name]))
        new = grammar.Scene(tuple(grammar.Thing(**t) for t in things), scene.background)
        sound = len({t.colour for t in new.things}) == len(things) and not any(t.held_out for t in new.things)
        if sound and set(new.things) != set(scene.things):
            return new
    return grammar.draw_scene(rng)


def vae(config: Config) -> None:
    """Pixels ↔ latents 8 times smaller: L1 + L2, four times as much on and around things, + a little KL.

    The latents are scaled to a standard deviation of 1/2, not 1: the papers' schedule ends at ᾱ = 0.0047, where 512 latent pixels of a
    flat background together still tell its colour. Sampling starts from pure noise, which tells nothing; the teacher must not lean on it.
    """
    network = model.VAE(SHAPES_VAE).to(config.device)

    def loss_of(rng, progress):
        clips = draw(rng, 32, 2)[0].to(config.device)
        mean, logvar = network.posterior(clips)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = (network.decode(z * network.config.scale) - clips).abs()
        near_things = F.max_pool3d((clips.amax(1) - clips.amin(1) > 0.4).float(), (1, 5, 5), 1, (0, 2, 2))[:, None]
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return ((error + error ** 2) * (1 + 3 * near_things)).mean() + 5e-5 * kl, dict(l1=error.detach().mean(), kl=kl.detach())

    fit("vae", network, loss_of, config.vae_steps, config, lr=2e-3)
    with torch.no_grad():
        spread = network.posterior(draw(random.Random(0), 256, 2)[0].to(config.device))[0].std()
    save(Path(config.out) / "vae.safetensors", network.state_dict(), asdict(network.config) | {"scale": 0.5 / spread.item()})


def roughen(pixels: Tensor, progress: float) -> Tensor:
    """Pixels (B, ...); in the last third of training with a little noise, so that what raises a reward is not a pattern nobody sees."""
    if progress < 2 / 3:
        return pixels
    return pixels + 0.3 * torch.rand(len(pixels), *[1] * (pixels.ndim - 1)) * torch.randn_like(pixels)


class Namer(torch.nn.Module):
    """Only for pretraining: reads off a feature which shape and which motion each colour has. Pictures and captions share it, so that
    both towers learn quickly which attributes belong together."""

    def __init__(self, width: int, attributes: dict[str, dict]):
        super().__init__()
        self.attributes = attributes
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, len(grammar.COLOURS) * (1 + len(values)))
                                          for name, values in attributes.items()})

    def forward(self, feature: Tensor, scenes: list[grammar.Scene]) -> dict[str, Tensor]:
        """Features (B, E) and what they should tell -> a cross-entropy per attribute."""
        losses = {}
        for name, values in self.attributes.items():
            label = torch.zeros(len(scenes), len(grammar.COLOURS), dtype=torch.long)             # 0: no thing has this colour
            for row, scene in zip(label, scenes):
                for thing in scene.things:
                    row[list(grammar.COLOURS).index(thing.colour)] = 1 + list(values).index(getattr(thing, name))
            logits = self.heads[name](8 * feature).view(-1, 1 + len(values))
            losses[name] = F.cross_entropy(logits, label.flatten().to(logits.device))
        return losses


def contrast(seen: Tensor, said: Tensor, scenes: list[grammar.Scene], namer: Namer, logit_scale: Tensor) -> tuple[Tensor, dict]:
    """CLIP's symmetric InfoNCE loss plus the naming of attributes; and how often the right caption comes first."""
    seen, said = F.normalize(seen.float(), dim=1), F.normalize(said.float(), dim=1)
    logits, target = logit_scale.exp().clamp(max=100) * seen @ said.T, torch.arange(len(seen), device=seen.device)
    loss, names = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, namer(seen, scenes)
    loss = loss + sum(names.values()) + sum(namer(said, scenes).values())
    return loss, dict(first=(logits.argmax(1) == target).float().mean(), **{name: x.detach() for name, x in names.items()})


def clip(config: Config) -> None:
    """Image-text contrast on single frames: colours, shapes, who has which, background."""
    import open_clip  # here, for it takes seconds, and only this stage needs it
    network = open_clip.CLIP(CLIP["embed_dim"], CLIP["vision_cfg"], CLIP["text_cfg"]).to(config.device)
    network.namer = Namer(CLIP["embed_dim"], {"shape": grammar.SHAPES}).to(config.device)

    def loss_of(rng, progress):
        clips, captions, scenes = draw(rng, 64, 2, "colour shape")
        frames = roughen(clips[torch.arange(64), :, [rng.randrange(2) for _ in range(64)]], progress).to(config.device)
        with torch.autocast(config.device, torch.bfloat16):
            images, texts = network.encode_image(frames), network.encode_text(world.tokenize(captions).to(config.device))
        return contrast(images, texts, scenes, network.namer, network.logit_scale)

    fit("clip", network, loss_of, config.clip_steps, config)
    del network.namer
    save(Path(config.out) / "clip.safetensors", network.state_dict(), CLIP)


def viclip(config: Config) -> None:
    """Video-text contrast on four frames of each clip: also what moves where. Like the original, it starts from a CLIP.

    A patch spans the four frames, as in ViViT, so that motion shows in single patches. Half of the scenes have two things: what this
    model does not tell apart, neither the teacher, through the states of its text tower, nor the reward will.
    """
    network = rewards.ViCLIP(VICLIP).to(config.device)
    start = rewards.from_clip(shapes.read(Path(config.out) / "clip.safetensors")[0], None)
    conv = start["vision_encoder.conv1.weight"][:, None] * (1 + 2 * torch.randn(VICLIP.width, VICLIP.tubelet, 1, 1, 1)) / VICLIP.tubelet
    start["vision_encoder.conv1.weight"] = (conv + 0.5 * conv.std() * torch.randn_like(conv)).flatten(1, 2)
    start["vision_encoder.temporal_positional_embedding"] = torch.zeros(1, 1, VICLIP.width)
    network.load_state_dict(start)
    network.namer = Namer(VICLIP.embed_dim, {"shape": grammar.SHAPES, "motion": grammar.MOTIONS}).to(config.device)
    logit_scale = torch.tensor(math.log(20.0), device=config.device)

    def loss_of(rng, progress):
        clips, captions, scenes = draw(rng, 32, world.FRAMES, "colour shape motion motion")
        clips = roughen(clips[:, :, rng.randrange(2)::2], progress)                 # strided, as the reward will see them
        with torch.autocast(config.device, torch.bfloat16):
            videos = network.encode_video(clips.transpose(1, 2).to(config.device))
            texts = network.encode_text(world.tokenize(captions).to(config.device))
        return contrast(videos, texts, scenes, network.namer, logit_scale)

    fit("viclip", network, loss_of, config.viclip_steps, config)
    del network.namer
    save(Path(config.out) / "viclip.safetensors", network.state_dict(), asdict(VICLIP))


def teacher(config: Config) -> None:
    """ε-prediction with the papers' schedule; one caption in ten is empty, for guidance.

    What moves where is decided at high noise, where ‖ε - ε_θ‖² hardly shows it: there z_t is almost ε itself. So the error is weighted by
    1/ᾱ_t = 1 + σ_t²/α_t², which makes it the sum of the errors in ε and in ẑ0.
    Like the real teachers, which start from Stable Diffusion, it learns pictures before clips: the first 2/9 of the steps are on single
    frames, 96 from different scenes instead of 16 clips, at no higher cost. Every second timestep lies where the lesson is: shapes are
    decided in 200..800, motions at 700 or more. When the clips are coherent, motions get a fresh learning rate, and three timesteps
    in four at 600 or more. In the last third, when one thing moves as it should, half of the clips have two.
    """
    pixels, text = shapes.load_vae(config.out).to(config.device), shapes.load_text(config.out).to(config.device)
    schedule = Schedule(device=config.device)
    network, group = shapes.UNet(SHAPES).to(config.device), Group()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.weight.data[:, :, ::2] = 0            # what a frame takes from its neighbours, of which pictures have none

    def loss_of(rng, progress):
        pictures, coherent, bound = progress < 2 / 9, progress >= RESTART, progress >= 2 / 3
        B, T = (96, 1) if pictures else (16, world.FRAMES)
        clips, captions, _ = draw(rng, B, max(T, 2), pairs=PAIRS if pictures or bound else grammar.PAIRS)
        if pictures:
            clips = clips[torch.arange(B), :, [rng.randrange(2) for _ in range(B)], None]
        mine = slice(B * group.rank // group.world, B * (group.rank + 1) // group.world)          # this process's part of the batch
        context = text([caption if rng.random() > 0.1 else "" for caption in captions][mine])
        extra, every = ((200, 800), 2) if pictures else ((600, 1000), 4) if coherent else ((700, 1000), 2)
        t = torch.tensor([rng.randrange(*(extra if i % every else (0, 1000))) for i in range(B)], device=config.device)[mine]
        noise, eps = torch.randn(2, B, pixels.config.latent, T, world.SIZE // 8, world.SIZE // 8)[:, mine].to(config.device)
        with torch.no_grad():
            z0 = pixels.encode(clips[mine].to(config.device), noise)
        with torch.autocast(config.device, torch.bfloat16):
            error = (network(schedule.add_noise(z0, eps, t), t, context) - eps).pow(2).flatten(1).mean(1) / schedule.alpha[t] ** 2
        return error.mean(), dict(extra=error[1::2].detach().mean(), uniform=error[::every].detach().mean())

    fit("teacher", network, loss_of, config.teacher_steps, config, ema=0.997, group=group, restart=RESTART)
    group.leave()
    if group.rank == 0:
        save(Path(config.out) / "teacher.safetensors", network.state_dict(), asdict(network.config))


def every_stage(config: Config, argv: list[str]) -> None:
    """The VAE beside the CLIP, which need nothing, then ViCLIP, then the teacher, shared by two processes; what is done stays.

    Raises ValueError when a stage ends early.
    """
    if "RANK" in os.environ:
        raise ValueError("--all starts its own processes; run it with python, not with torchrun")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                         # by way of `finally`
    for side_by_side in (["vae", "clip"], ["viclip"], ["teacher"] * (1 if config.device == "cuda" else 2)):
        missing = [name for name in side_by_side if not (Path(config.out) / f"{name}.safetensors").exists()]
        group, running = len(missing) if "teacher" in missing else 1, []             # group: processes that train one model
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            for i, name in enumerate(missing):
                threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}              # if the caller did not set it
                place = dict(RANK=i % group, WORLD_SIZE=group, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TQDM_POSITION=i)
                running.append(subprocess.Popen([sys.executable, __file__, *argv, "--all", "false", "--stage", name],
                                                env=threads | os.environ | {key: str(value) for key, value in place.items()}))
            if any([process.wait() for process in running]):
                raise ValueError(f"{' and '.join(dict.fromkeys(missing))} ended early; the same command goes on where it was")
        finally:
            for process in running:
                process.terminate()


@cli.main
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = cli.parse(Config, argv, __doc__)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if config.all:
        return every_stage(config, argv)
    torch.manual_seed(config.seed)
    globals()[config.stage](config)


if __name__ == "__main__":
    main()
