"""Trains from nothing the models that T2V-Turbo takes as given: a VAE, a CLIP (its text tower conditions the
UNet, all of it is the image reward), a video-text model (the video reward), and the teacher, a guided
text-to-video diffusion model.

    for stage in vae clip viclip; do python shapes/pretrain.py --stage $stage --out runs/shapes; done
    torchrun --nproc_per_node=2 shapes/pretrain.py --stage teacher --out runs/shapes

Interrupted, the same command goes on. The teacher can be trained by several processes, on cores or GPUs.
"""
import json
import math
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
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
from plumbing.cli import Folder
from plumbing.errors import UserError, reading
from plumbing.fast_cpu import speed_up
from plumbing.files import atomic, remove_leftovers
from plumbing.folder import locked, whole_lines
from plumbing.run import Group, usual_dtype
from shapes import grammar, world
from shapes.models import TOY, TOY_VAE, UNet
from solver import Schedule
from turbo import EMA


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    stage: Literal["vae", "clip", "viclip", "teacher"] = "vae"   # model to train; it needs those before it
    out: Folder = "runs/shapes"         # folder for weights, logs and checkpoints


SEED = 0                                # of initial weights and of every batch
SAVE_EVERY = 100                        # steps between checkpoints
STEPS = {"vae": 1500,                   # batches of 64 frames
         "clip": 1200,                  # of 64 frames and captions
         "viclip": 2000,                # of 32 clips and captions
         "teacher": 7500}               # of 96 frames in the first 2/15, then of 16 clips
PAIRS = 0.7                             # two things more often than in the world: they teach what is whose
CLIP = dict(embed_dim=128, image_size=world.SIZE,
            vision_cfg=dict(image_size=world.SIZE, patch_size=8, width=128, layers=3, head_width=32),
            text_cfg=dict(width=128, layers=4, heads=4, context_length=grammar.CONTEXT_LENGTH,
                          vocab_size=grammar.VOCABULARY_SIZE))
VICLIP = rewards.ViCLIPConfig(
    image_size=world.SIZE, patch=8, frames=4, tubelet=4, width=128, layers=3, heads=4, embed_dim=128,
    text_width=128, text_layers=4, text_heads=4, context_length=grammar.CONTEXT_LENGTH,
    vocab_size=grammar.VOCABULARY_SIZE)


def save(path: Path, network: nn.Module, header: dict) -> None:
    """Weights as float16, with what describes them in the header."""
    weights.save_checkpoint(path, {key: x.half() for key, x in network.state_dict().items()}, header)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16, where the device multiplies in it."""
    return torch.autocast(device.type, torch.bfloat16, usual_dtype(device) == "bfloat16")


# ---- the training loop of all stages -----------------------------------------------------------------------

def fit(name: str, network: nn.Module, loss_of: Callable, steps: int, out: Path, lr: float = 1e-3,
        ema: float = 0.995, group: Group | None = None, warmup: float = 0.05,
        cosines: tuple[tuple[float, float], ...] = ((0, 1),)) -> None:
    """AdamW, exact resumption. Leaves an average of the weights in the network.

    loss_of(rng, progress) -> (loss, figures to log) draws its batch from rng, which depends on the step
    alone; progress is 0..1. Each process of a group takes its share of the batch. The learning rate grows
    during the share `warmup` of the steps, and falls by `cosines`, see learning_rate.
    """
    rank0 = group is None or group.rank == 0
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = EMA(params, ema)
    start = resume(out / f"{name}.ckpt", network, optimizer, average)
    log, began = out / f"{name}.jsonl", time.time()
    if rank0:                                               # lines of steps that are made again go
        with atomic(log) as temporary:
            temporary.write_text("".join(line for step, line in whole_lines(log) if step <= start))

    for step in (bar := tqdm(range(start, steps), name, initial=start, total=steps, disable=not rank0)):
        for param_group in optimizer.param_groups:
            warm = min(1, (step + 1) / (warmup * steps))
            param_group["lr"] = lr * warm * learning_rate(step / steps, cosines)

        # Gradient of this step's batch, over all processes
        torch.manual_seed(SEED * 1_000_003 + step)
        loss, figures = loss_of(random.Random(f"{SEED} {name} {step}"), step / steps)
        loss.backward()
        if group is not None and group.world_size > 1:
            average_gradients(params, group)

        # Update of the weights and of their average; early averages forget the random start
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.decay = min(ema, (step + 1) / (step + 10))
        average.update()

        if rank0 and step % 20 == 19:
            figures = {"loss": loss.item(), **{key: float(value) for key, value in figures.items()}}
            bar.set_postfix({key: f"{value:.4f}" for key, value in figures.items()}, refresh=False)
            line = dict(step=step + 1, **figures, seconds=round(time.time() - began, 1))
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        if rank0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps):
            state = dict(network=network.state_dict(), optimizer=optimizer.state_dict(), ema=average.average)
            with atomic(out / f"{name}.ckpt") as temporary, open(temporary, "wb") as file:
                torch.save(state | {"step": step + 1}, file)
    average._exchange()


def learning_rate(progress: float, cosines: tuple[tuple[float, float], ...]) -> float:
    """A cosine from 1 to 2 %: of `cosines`, (start, length) in shares of all steps, the last that began."""
    start, length = [cosine for cosine in cosines if cosine[0] <= progress][-1]
    return 0.51 + 0.49 * math.cos(math.pi * (progress - start) / length)


def resume(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, average: EMA) -> int:
    """Fills network, optimizer and average from a checkpoint, if there is one -> how many steps are done."""
    if not path.exists():
        return 0
    with reading(path, "a checkpoint of this stage"):
        state = torch.load(path, weights_only=True, map_location=average.average[0].device)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average.average = state["ema"]
        return state["step"]


def average_gradients(params: list[nn.Parameter], group: Group) -> None:
    """Every process gets the mean of all processes' gradients, in one exchange."""
    mean = group.sum(torch.cat([p.grad.flatten() for p in params])) / group.world_size
    for p, grad in zip(params, mean.split([p.numel() for p in params])):
        p.grad.copy_(grad.view_as(p))


# ---- batches -----------------------------------------------------------------------------------------------


def draw(rng: random.Random, count: int, T: int, vary: str = ""
         ) -> tuple[Tensor, list[str], list[grammar.Scene]]:
    """A batch of training clips in [-1, 1] (B, 3, T, H, W), captions, scenes.

    With `vary`, every second scene differs from the one before it in one respect: contrastive models learn
    from such pairs what belongs to what.
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

        new = [grammar.Thing(**thing) for thing in things]
        colours_differ = len({thing.colour for thing in new}) == len(new)
        if colours_differ and not any(thing.held_out for thing in new) and {*new} != {*scene.things}:
            return grammar.Scene(tuple(new), scene.background)
    return grammar.draw_scene(rng)


def some_frame(clips: Tensor, rng: random.Random) -> Tensor:
    """One of the first two frames of each clip, (B, 3, H, W)."""
    return clips[torch.arange(len(clips)), :, [rng.randrange(2) for _ in clips]]


def roughen(pixels: Tensor, progress: float) -> Tensor:
    """Pixels (B, ...), in the last third of training with a little noise: a reward that has seen noise is not
    raised by patterns that nobody sees."""
    if progress < 2 / 3:
        return pixels
    return pixels + 0.3 * torch.rand(len(pixels), *[1] * (pixels.ndim - 1)) * torch.randn_like(pixels)


# ---- VAE ---------------------------------------------------------------------------------------------------


def vae(out: Path, group: Group) -> None:
    """Pixels <-> latents 8 times smaller: L1 + L2, four times as much on and around things, and a little KL.

    The latents are scaled to a standard deviation of 1/2, not 1: the papers' schedule ends at ᾱ = 0.0047,
    where 512 latent pixels of a flat background still tell its colour. The pure noise that sampling starts
    from does not, and the teacher must not lean on it.
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

    fit("vae", network, loss_of, STEPS["vae"], out, lr=2e-3)
    with torch.no_grad():
        spread = network.posterior(draw(random.Random(0), 256, 2)[0].to(group.device))[0].std()
    header = asdict(network.config) | {"scale": 0.5 / spread.item()}
    save(out / "vae.safetensors", network, header)


# ---- CLIP and ViCLIP ---------------------------------------------------------------------------------------


class Namer(nn.Module):
    """Only for pretraining: reads off a feature which shape and which motion each colour has. Pictures and
    captions share it, so that both towers learn quickly which attributes belong together."""

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


def clip(out: Path, group: Group) -> None:
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

    fit("clip", network, loss_of, STEPS["clip"], out)
    del network.namer
    save(out / "clip.safetensors", network, CLIP)


def viclip_from_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's weights -> a ViCLIP's first ones: its patches span frames, each with its own weight."""
    start = rewards.from_clip(rewards.needed(state), None)
    spread = (1 + 2 * torch.randn(VICLIP.width, VICLIP.tubelet, 1, 1, 1)) / VICLIP.tubelet
    conv = start["vision_encoder.conv1.weight"][:, None] * spread
    start["vision_encoder.conv1.weight"] = (conv + 0.5 * conv.std() * torch.randn_like(conv)).flatten(1, 2)
    start["vision_encoder.temporal_positional_embedding"] = torch.zeros(1, 1, VICLIP.width)
    return start


def viclip(out: Path, group: Group) -> None:
    """Video-text contrast on four frames of each clip: also what moves where. It starts from the CLIP.

    A patch spans the four frames, as in ViViT, so that motion shows in single patches. What this model does
    not tell apart, neither the teacher, through the states of its text tower, nor the reward will.
    """
    network = rewards.ViCLIP(VICLIP).to(group.device)
    network.load_state_dict(viclip_from_clip(shapes.read(out / "clip.safetensors")[0]))
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

    fit("viclip", network, loss_of, STEPS["viclip"], out)
    del network.namer
    save(out / "viclip.safetensors", network, asdict(VICLIP))


# ---- the teacher -------------------------------------------------------------------------------------------


# Until which share of the steps; batch, frames; timesteps of the lesson, and one in how many is any other.
PHASES = ((2 / 15, 96, 1, (200, 800), 2),           # colours and shapes
          (0.21, 16, 8, (700, 1000), 2),            # coherent clips
          (1, 16, 8, (600, 1000), 4))               # what moves how
COSINES = ((0, 0.6), (0.21, 0.39), (0.6, 0.4))      # of the learning rate: it starts over twice


def teacher(out: Path, group: Group) -> None:
    """ε-prediction with the papers' schedule; one caption in ten is empty, for guidance.

    What moves where is decided at high noise, where ‖ε - ε_θ‖² hardly shows it: there z_t is almost ε itself.
    So the error is weighted by 1/ᾱ_t = 1 + σ_t²/α_t²: the sum of the errors in ε and in ẑ0. Like the real
    teachers, it learns pictures before clips: 96 frames of different scenes cost no more than 16 clips.
    """
    pixels, text = shapes.load_vae(out).to(group.device), shapes.load_text(out).to(group.device)
    schedule = Schedule(device=group.device)
    torch.manual_seed(SEED)                                 # whatever loading the others drew
    network = UNet(TOY).to(group.device)
    speed_up(model.CPU_LAYERS, network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data[:, :, ::2] = 0            # what a frame takes from its neighbours

    def loss_of(rng, progress):
        B, T, lesson, uniform = next(phase[1:] for phase in PHASES if progress < phase[0])
        clips, captions, _ = draw(rng, B, max(T, 2))
        if T == 1:
            clips = some_frame(clips, rng)[:, :, None]

        # Drawn for the whole batch, so that any number of processes trains on the same
        own = slice(B * group.rank // group.world_size, B * (group.rank + 1) // group.world_size)
        c = text([caption if rng.random() > 0.1 else "" for caption in captions][own])
        ranges = [lesson if i % uniform else (0, 1000) for i in range(B)]
        t = torch.tensor([rng.randrange(*each) for each in ranges], device=group.device)[own]
        size = (pixels.config.latent, T, world.SIZE // 8, world.SIZE // 8)
        noise, eps = torch.randn(2, B, *size)[:, own].to(group.device)

        with torch.no_grad():
            z0 = pixels.encode(clips[own].to(group.device), noise)
        with mixed_precision(group.device):
            eps_hat = network(schedule.add_noise(z0, eps, t), t, c)
            error = (eps_hat - eps).pow(2).flatten(1).mean(1) / schedule.alpha[t] ** 2
        return error.mean(), dict(uniform=error.detach()[::uniform].mean())

    fit("teacher", network, loss_of, STEPS["teacher"], out, ema=0.997, group=group,
        warmup=0.03, cosines=COSINES)
    if group.rank == 0:
        save(out / "teacher.safetensors", network, asdict(network.config))


# ---- the command -------------------------------------------------------------------------------------------

STAGES = {"vae": (vae, ()), "clip": (clip, ()), "viclip": (viclip, ("clip",)),      # and what each needs
          "teacher": (teacher, ("vae", "clip", "viclip"))}


@cli.main
def main(argv=None):
    """Trains the stage of --stage, and leaves weights, log and checkpoint in --out."""
    config = cli.parse(Config, argv, __doc__)
    (train_stage, needs), out = STAGES[config.stage], Path(config.out)
    for name in needs:
        if not (out / f"{name}.safetensors").exists():
            raise UserError(f"--stage {config.stage} needs {out}/{name}.safetensors; make that first")
    group = Group()                                         # first: it chooses this process's GPU
    if group.world_size > 1 and config.stage != "teacher":
        raise UserError(f"--stage {config.stage} is for one process; torchrun is for --stage teacher")
    with locked(out) if group.rank == 0 else nullcontext():
        if group.rank == 0:
            remove_leftovers(out)
        torch.manual_seed(SEED)
        train_stage(out, group)
        group.close()


if __name__ == "__main__":
    main()
