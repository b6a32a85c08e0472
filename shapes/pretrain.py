"""Trains from nothing the models that T2V-Turbo takes as given: a VAE, a CLIP (its text tower conditions the
UNet, all of it is the image reward), a video-text model (the video reward), and the teacher, a guided
text-to-video diffusion model.

    for stage in vae clip viclip; do python shapes/pretrain.py --stage $stage --out runs/shapes; done
    torchrun --nproc_per_node=2 shapes/pretrain.py --stage teacher --out runs/shapes

Interrupted, the same command goes on. The teacher can be trained by several processes, on cores or GPUs.
"""
import math
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import rewards
import shapes
from networks.fast_cpu import speed_up
from plumbing import cli, folder, run, weights
from plumbing.errors import UserError
from shapes import grammar, world
from shapes.models import MOTION, TOY, TOY_VAE, tokenize
from solver import Schedule
from turbo import EMA


@dataclass(frozen=True)
class Config:
    """The options of the command line."""
    stage: Literal["vae", "clip", "viclip", "teacher", "motion"] = "vae"   # the first three come first
    out: cli.Folder = "runs/shapes"     # folder of weights; a folder in it for each stage's log, checkpoints


SAVE_EVERY = 100                        # steps between checkpoints
STEPS = {"vae": 1500,                   # batches of 64 frames
         "clip": 1200,                  # of 64 frames and captions
         "viclip": 2000,                # of 32 clips and captions
         "teacher": 7500,               # of 96 frames in the first 2/15, then of 16 clips
         "motion": 3000}                # of 96 frames in the first 1/5, then of 16 clips
CLIP = dict(embed_dim=128, image_size=world.SIZE,
            vision_cfg=dict(image_size=world.SIZE, patch_size=8, width=128, layers=3, head_width=32),
            text_cfg=dict(width=128, layers=4, heads=4, context_length=grammar.CONTEXT_LENGTH,
                          vocab_size=grammar.VOCABULARY_SIZE))
VICLIP = rewards.ViCLIPConfig(
    image_size=world.SIZE, patch=8, frames=4, tubelet=4, width=128, layers=3, heads=4, embed_dim=128,
    text_width=128, text_layers=4, text_heads=4, context_length=grammar.CONTEXT_LENGTH,
    vocab_size=grammar.VOCABULARY_SIZE)


# ---- the training loop of all stages -----------------------------------------------------------------------

def fit(network: nn.Module, loss_of: Callable, out: Path, steps: int, group: run.Group, lr: float = 1e-3,
        decay: float = 0.995, cosines: tuple[tuple[float, float], ...] = ((0, 1),)) -> None:
    """AdamW with exact resumption. Leaves log and checkpoints in OUT, averaged weights in the network.

    loss_of(rng, progress) draws its batch from rng, which depends on the step alone; progress is 0..1. Each
    process of a group takes its share of the batch. decay: of the average; cosines: see learning_rate."""
    params = [p for p in network.parameters() if p.requires_grad]
    gradient = run.flat_gradient(params)
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average, start = EMA(params, decay), 0

    if saved := folder.checkpoints(out):
        state = folder.read_checkpoint(saved[-1], group, "network")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(average.average, state["average"])
        start = state["step"]

    with folder.Log(out, start, steps, group) as log:
        for step in range(start, steps):
            optimizer.param_groups[0]["lr"] = lr * learning_rate(step / steps, cosines)

            # Gradient of this step's batch, over all processes
            torch.manual_seed(step)
            loss = loss_of(random.Random(f"0 {out.name} {step}"), step / steps)
            gradient.zero_()
            loss.backward()
            group.sum(gradient).div_(group.world_size)

            # Update of the weights and of their average; early averages forget the random start
            gradient *= (1 / (gradient.norm() + 1e-6)).clamp(max=1)
            optimizer.step()
            average.decay = min(decay, (step + 1) / (step + 10))
            average.update()

            done = step + 1
            if group.rank == 0 and (done % SAVE_EVERY == 0 or done == steps):
                folder.save_checkpoint(out, done, dict(
                    step=done, network=network.state_dict(), optimizer=optimizer.state_dict(),
                    average=average.average))
            log(done, dict(loss=loss.item()), run.Parts())
    for p, mean in zip(params, average.average):
        p.data = mean


def learning_rate(progress: float, cosines: tuple[tuple[float, float], ...]) -> float:
    """Grows in the first 4 % of the steps, times a cosine from 1 to 2 %: of `cosines`, (start, length) in
    shares of all steps, the last that began."""
    start, length = [cosine for cosine in cosines if cosine[0] <= progress][-1]
    return min(1, progress / 0.04) * (0.51 + 0.49 * math.cos(math.pi * (progress - start) / length))


# ---- batches -----------------------------------------------------------------------------------------------

def draw(rng: random.Random, count: int, T: int, vary: str = "", pairs: float = 0.7
         ) -> tuple[Tensor, list[str], list[grammar.Scene]]:
    """A batch of training clips in [-1, 1] (B, 3, T, H, W), captions, scenes.

    vary: attributes; every second scene differs from the one before it in one of them. Contrastive models
    learn from such pairs what belongs to what. pairs: share of scenes of two things."""
    scenes = []
    while len(scenes) < count:
        scenes.append(grammar.draw_scene(rng, pairs=pairs))
        if vary:
            scenes.append(variation(scenes[-1], rng, vary.split()))
    captions = [grammar.describe(scene, rng) for scene in scenes]
    clips = torch.stack([world.render(scene, rng, T) for scene in scenes])
    return clips.float() / 127.5 - 1, captions, scenes


def variation(scene: grammar.Scene, rng: random.Random, attributes: list[str]) -> grammar.Scene:
    """The scene with an attribute exchanged between its things, or changed in one; nothing held-out."""
    values = dict(colour=grammar.COLOURS, shape=grammar.SHAPES, motion=grammar.MOTIONS)
    while True:
        things, name = [vars(thing).copy() for thing in scene.things], rng.choice(attributes)
        if len(things) == 2 and rng.random() < 0.5:
            things[0][name], things[1][name] = things[1][name], things[0][name]
        else:
            rng.choice(things)[name] = rng.choice(list(values[name]))

        new = [grammar.Thing(**thing) for thing in things]
        colours_differ = len({thing.colour for thing in new}) == len(new)
        if colours_differ and not any(thing.held_out for thing in new) and {*new} != {*scene.things}:
            return grammar.Scene(tuple(new), scene.background)


def roughen(pixels: Tensor, progress: float) -> Tensor:
    """Pixels (B, ...), in the last third of training with a little noise: a reward that has seen noise is not
    raised by patterns that nobody sees."""
    if progress < 2 / 3:
        return pixels
    return pixels + 0.3 * torch.rand(len(pixels), *[1] * (pixels.ndim - 1)) * torch.randn_like(pixels)


# ---- the stages: each trains its network -> the network, and what its file says about it -------------------

def vae(out: Path, group: run.Group) -> tuple[nn.Module, dict]:
    """Pixels <-> latents 8 times smaller: L1 + L2, four times as much on and around things, and a little KL.

    The latents are scaled to a standard deviation of 1/2, not 1: the papers' schedule ends at ᾱ = 0.0047,
    where 512 latent pixels of a flat background still tell its colour. The pure noise that sampling starts
    from does not, and the teacher must not lean on it."""
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
        return ((error + error ** 2) * (1 + 3 * near_things)).mean() + 5e-5 * kl

    fit(network, loss_of, out / "vae", STEPS["vae"], group, lr=2e-3)
    with torch.no_grad():
        spread = network.posterior(draw(random.Random(0), 256, 2)[0].to(group.device))[0].std()
    return network, asdict(network.config) | {"scale": 0.5 / spread.item()}


class Contrast(nn.Module):
    """CLIP's symmetric InfoNCE loss, and how well a feature tells which shape and which motion each colour
    has. Pictures and captions share this reading, so that both towers learn quickly what belongs together."""

    def __init__(self, width: int, attributes: dict[str, dict]):
        super().__init__()
        self.attributes = attributes
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(grammar.COLOURS) * (1 + len(values)))
                                    for name, values in attributes.items()})

    def forward(self, images: Tensor, texts: Tensor, scenes: list[grammar.Scene],
                logit_scale: Tensor) -> Tensor:
        """Features of pictures and of captions, (B, E) each -> the loss."""
        images, texts = F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)
        logits = logit_scale.exp().clamp(max=100) * images @ texts.T
        target = torch.arange(len(images), device=images.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        for name, head in self.heads.items():
            values = [None, *self.attributes[name]]                 # None: no thing has this colour
            by_colour = [{thing.colour: getattr(thing, name) for thing in scene.things} for scene in scenes]
            label = torch.tensor([values.index(named.get(colour)) for named in by_colour
                                  for colour in grammar.COLOURS], device=images.device)
            for feature in (images, texts):
                loss = loss + F.cross_entropy(head(8 * feature).view(len(label), -1), label)
        return loss


def clip(out: Path, group: run.Group) -> tuple[nn.Module, dict]:
    """Image-text contrast on single frames: colours, shapes, who has which, background."""
    import open_clip  # late, as it takes four seconds; rewards.CLIP would train to other bytes

    network = open_clip.CLIP(CLIP["embed_dim"], CLIP["vision_cfg"], CLIP["text_cfg"]).to(group.device)
    network.contrast = Contrast(CLIP["embed_dim"], {"shape": grammar.SHAPES}).to(group.device)

    def loss_of(rng, progress):
        clips, captions, scenes = draw(rng, 64, 2, "colour shape")
        frames = roughen(clips[:, :, rng.randrange(2)], progress)
        images = network.encode_image(frames.to(group.device))
        texts = network.encode_text(tokenize(captions).to(group.device))
        return network.contrast(images, texts, scenes, network.logit_scale)

    fit(network, loss_of, out / "clip", STEPS["clip"], group)
    del network.contrast
    return network, CLIP


def viclip(out: Path, group: run.Group) -> tuple[nn.Module, dict]:
    """Video-text contrast on four frames of each clip: also what moves where. It starts from the CLIP.

    A patch spans the four frames, as in ViViT, so that motion shows in single patches. What this model does
    not tell apart, neither the teacher, through the states of its text tower, nor the reward will."""
    # a CLIP's weights, but that patches span frames, each with its own weight
    state = rewards.from_clip(rewards.needed(shapes.read(out / "clip.safetensors")[0]), None)
    spread = (1 + 2 * torch.randn(VICLIP.width, VICLIP.tubelet, 1, 1, 1)) / VICLIP.tubelet
    conv = state["vision_encoder.conv1.weight"][:, None] * spread
    state["vision_encoder.conv1.weight"] = (conv + 0.5 * conv.std() * torch.randn_like(conv)).flatten(1, 2)
    state["vision_encoder.temporal_positional_embedding"] = torch.zeros(1, 1, VICLIP.width)
    network = rewards.ViCLIP(VICLIP).to(group.device)
    network.load_state_dict(state)

    attributes = {"shape": grammar.SHAPES, "motion": grammar.MOTIONS}
    network.contrast = Contrast(VICLIP.embed_dim, attributes).to(group.device)
    logit_scale = torch.tensor(math.log(20.0), device=group.device)

    def loss_of(rng, progress):
        clips, captions, scenes = draw(rng, 32, world.FRAMES, "colour shape motion motion")
        clips = roughen(clips[:, :, rng.randrange(2)::2], progress)     # strided, as the reward will see them
        videos = network.encode_video(clips.transpose(1, 2).to(group.device))
        texts = network.text(tokenize(captions).to(group.device))
        return network.contrast(videos, texts, scenes, logit_scale)

    fit(network, loss_of, out / "viclip", STEPS["viclip"], group)
    del network.contrast
    return network, asdict(VICLIP)


# How the teachers learn. pairs: share of clips with two things. phases: until which share of the steps;
# batch, frames; timesteps of the lesson, and one in how many is any other. cosines: of the learning rate.
TEACHER = dict(unet=TOY, pairs=0.7, phases=(
    (2 / 15, 96, 1, (200, 800), 2),                 # colours and shapes
    (0.21, 16, 8, (700, 1000), 2),                  # coherent clips
    (1, 16, 8, (600, 1000), 4),                     # what moves how
), cosines=((0, 0.6), (0.21, 0.39), (0.6, 0.4)))    # the rate starts over twice
MOTION_TEACHER = dict(unet=MOTION, pairs=0.0, phases=(
    (0.2, 96, 1, (200, 800), 2),                    # colours and shapes
    (1, 16, 8, (500, 1000), 3),                     # clips
), cosines=((0, 1),))


def teacher(out: Path, group: run.Group, name: str, unet: model.UNetConfig, pairs: float, phases: tuple,
            cosines: tuple) -> tuple[nn.Module, dict]:
    """ε-prediction with the papers' schedule; one caption in ten is empty, for guidance.

    What moves where is decided at high noise, where ‖ε - ε_θ‖² hardly shows it: there z_t is almost ε itself.
    So the error is weighted by 1/ᾱ_t = 1 + σ_t²/α_t²: the sum of the errors in ε and in ẑ0. Like the real
    teachers, it learns pictures before clips: 96 frames of different scenes cost no more than 16 clips."""
    pixels, text = shapes.load_vae(out).to(group.device), shapes.load_text(out).to(group.device)
    schedule = Schedule(device=group.device)
    torch.manual_seed(0)                                    # whatever loading the others drew
    network = unet.network(unet).to(group.device)
    speed_up(model.CPU_LAYERS, network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data[:, :, ::2] = 0            # what a frame takes from its neighbours

    def loss_of(rng, progress):
        B, T, lesson, uniform = next(phase[1:] for phase in phases if progress < phase[0])
        clips, captions, _ = draw(rng, B, max(T, 2), pairs=pairs)
        if T == 1:
            clips = clips.unbind(2)[rng.randrange(2)][:, :, None]

        # Drawn for the whole batch, so that any number of processes trains on the same
        own = slice(B * group.rank // group.world_size, B * (group.rank + 1) // group.world_size)
        c = text([caption if rng.random() > 0.1 else "" for caption in captions][own])
        ranges = [lesson if i % uniform else (0, 1000) for i in range(B)]
        t = torch.tensor([rng.randrange(*each) for each in ranges], device=group.device)[own]
        size = (pixels.config.latent, T, world.SIZE // 8, world.SIZE // 8)
        noise, eps = torch.randn(2, B, *size)[:, own].to(group.device)

        with torch.no_grad():
            z0 = pixels.encode(clips[own].to(group.device), noise)
        eps_hat = network(schedule.add_noise(z0, eps, t), t, c)
        return ((eps_hat - eps) / schedule.alpha[t].view(-1, 1, 1, 1, 1)).pow(2).mean()

    fit(network, loss_of, out / name, STEPS[name], group, decay=0.997, cosines=cosines)
    return network, asdict(network.config)


STAGES = {"vae": vae, "clip": clip, "viclip": viclip, "teacher": partial(teacher, name="teacher", **TEACHER),
          "motion": partial(teacher, name="motion", **MOTION_TEACHER)}      # the teacher of motion guidance


@cli.main
def main(argv=None):
    """Trains the stage of --stage; leaves weights in --out, log and checkpoints in a folder there."""
    config = cli.parse(Config, argv, __doc__)
    out, stage = Path(config.out), Path(config.out) / config.stage
    if (out / f"{config.stage}.safetensors").exists() and not folder.checkpoints(stage):
        raise UserError(f"{stage} has weights, but no checkpoints to go on from; choose another --out")
    group = run.Group()                                     # first of all: it chooses this process's GPU
    with folder.locked(stage) if group.rank == 0 else nullcontext():
        torch.manual_seed(0)
        network, header = STAGES[config.stage](out, group)
        if group.rank == 0:                                 # weights as float16
            state = {name: x.half() for name, x in network.state_dict().items()}
            weights.save(out / f"{config.stage}.safetensors", state, header)
        group.close()


if __name__ == "__main__":
    main()
