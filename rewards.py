"""Reward models R_img(x, c) and R_vid(x, c): how well does a clip x fit its caption c, how good does it look?

    reward = load("hpsv2", "HPS_v2.1_compressed.pt", device="cuda")
    scores = reward(clips, captions)

with clips (B, T, 3, H, W) in [0, 1] and B captions gives scores (B,), higher is better. The pixels carry
gradient, so that a generator can climb it; the reward's parameters and captions never do. A new reward is an
entry of the table RECIPES and a network: `text(ids)` sees captions alone, `score(frames, text)` both.

B clips, T frames, H W pixels, S side of a model's square input, N patches of a frame, L tokens, D width, E
features.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.bert import BERT, BERTConfig, WordPiece
from networks.clip import BlockStack, LayerNorm, QuickGELU, TextTower, TowerBlock, attend, bpe, say_cut
from networks.layouts import OPENCLIP_BLOCKS, PUBLIC, State, fetch, huggingface_text, rename
from plumbing.errors import UserError, reading
from plumbing.files import read_header
from plumbing.weights import fill, locate, read_tensors, weight_files, without_memory

Generators = Sequence[torch.Generator] | None           # on the CPU, one per clip: they draw its crop window
Tokenizer = Callable[[list[str]], Tensor]               # B captions -> token ids (B, L)
View = Callable[[Tensor, int, Generators], Tensor]      # clips (B, T, 3, H, W) -> (B, T, 3, S, S)


# ---- a reward ----------------------------------------------------------------------------------------------

class Reward:
    """reward(clips, captions): clips (B, T, 3, H, W) in [0, 1], any H and W, B captions -> (B,) float32.

    An image reward scores each frame with its clip's caption and averages over T; a video reward takes
    T = `frames`, or any T >= 2 where that is None."""

    def __init__(self, name: str, model: nn.Module, tokenizer: Tokenizer,
                 device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        recipe = RECIPES[name]
        self.name, self.kind, self.view, self.text_length = name, recipe.kind, recipe.view, recipe.text_length
        self.model, self.tokenizer, self.device = model, tokenizer, torch.device(device)
        self.dtype = dtype if recipe.convert else torch.float32     # differences of frames need their digits
        self.frames: int | None = model.frames
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32, device=device).view(3, 1, 1)
                               for x in recipe.pixels)
        self.cache: dict[str, Tensor] = {}                          # caption -> what model.text made of it
        self.said_cut = False

    def __call__(self, clips: Tensor, captions: list[str], generators: Generators = None) -> Tensor:
        """generators: one per clip, on the CPU, draws the crop window of a video reward; None: the centre."""
        assert not isinstance(captions, str) and len(captions) == len(clips), "one caption for each clip"
        with torch.autocast(self.device.type, enabled=False):       # not in the caller's bf16
            return self.model.score(self.normalised(clips, generators), self.text(captions))

    def features(self, clips: Tensor) -> Tensor:
        """Clips -> (B, E) float32 of unit length: what a video reward compares with the caption."""
        if not hasattr(self.model, "encode_video"):
            raise UserError(f"{self.name} has no features of a clip; take viclip or internvideo2")
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self.model.encode_video(self.normalised(clips)).float(), dim=-1)

    def normalised(self, clips: Tensor, generators: Generators = None) -> Tensor:
        """Clips -> the model's input (B, T, 3, S, S): resized, cropped, normalised, in its dtype."""
        frames = self.view(clips.to(self.device).float(), self.model.image_size, generators)
        return ((frames - self.mean) / self.std).to(self.dtype)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """What the model makes of the captions alone, computed once for each."""
        if len(self.cache) > 10_000:
            self.cache.clear()
        unread = [caption for caption in dict.fromkeys(captions) if caption not in self.cache]
        if unread:
            self.said_cut = self.said_cut or say_cut(self.name, self.tokenizer, unread, self.text_length)
            ids = self.tokenizer(unread).to(self.device)
            self.cache.update(zip(unread, self.model.text(ids), strict=True))
        return torch.stack([self.cache[caption] for caption in captions])

    def checkpoint(self, on: bool = True) -> None:
        """Gradient checkpointing: a third more time, and the memory of one block instead of all."""
        for module in self.model.modules():
            if isinstance(module, BlockStack):
                module.grad_checkpointing = on


def frames_for(reward: Reward, clips: Tensor) -> Tensor:
    """Clips uint8 (B, 3, T, H, W) -> (B, M, 3, H, W) in [0, 1]: M evenly spaced frames, as a reward takes."""
    T, M = clips.shape[2], reward.frames or clips.shape[2]
    if T < M:
        raise UserError(f"{reward.name} looks at {M} frames, the clip has {T}")
    return clips[:, :, [int((i + 0.5) * T / M) for i in range(M)]].transpose(1, 2).float() / 255


# ---- the table of rewards ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """All that makes a reward but its public file, which stands in PUBLIC under the same name."""
    kind: Literal["image", "video"]             # scores single frames, or a clip
    model: type[nn.Module]
    view: View                                  # fits clips to the model's input
    text_length: int                            # L, tokens of a caption
    pixels: tuple                               # their mean and standard deviation
    tokenizer: Callable[[Path | None, int], Tokenizer] | None = None    # (weights, L); None: given to `load`
    config: Callable[..., object] = lambda: None                # header of the file -> configuration
    convert: Callable[[State, nn.Module], State] | None = None  # public names -> ours; None: no weights
    whole: bool = True                          # the model needs all tensors of the file

    def network(self, header: dict, frames: int | None = None) -> nn.Module:
        """frames: that a video reward looks at, where its model can take another number of them."""
        config = self.config(**header)
        other = frames and getattr(config, "frames", None)
        return self.model(replace(config, frames=frames) if other else config)


CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # mean, std
IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOY_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def recipes() -> dict[str, Recipe]:
    """The table RECIPES. A function, for Python meets the networks' names further down."""
    vit_h_14 = dict(kind="image", model=CLIP, config=CLIPConfig, convert=from_clip, pixels=CLIP_PIXELS,
                    text_length=77, tokenizer=bpe)
    viclip = dict(kind="video", model=ViCLIP, convert=lambda state, model: rename(state, OPENCLIP_BLOCKS))
    return {
        "hpsv2": Recipe(**vit_h_14, view=pad),
        "pickscore": Recipe(**vit_h_14, view=squash),
        "clip": Recipe(**vit_h_14, view=squash),
        "imagereward": Recipe(
            kind="image", model=ImageReward, config=ImageRewardConfig, view=centre, whole=False,
            convert=lambda state, model: rename(state, IMAGEREWARD), pixels=CLIP_PIXELS, text_length=35,
            tokenizer=partial(wordpiece, public="bert-base")),
        "viclip": Recipe(
            **viclip, config=ViCLIPConfig, view=window, pixels=IMAGENET_PIXELS, text_length=32,
            tokenizer=bpe),
        "internvideo2": Recipe(
            kind="video", model=InternVideo2, config=InternVideo2Config, view=window, whole=False,
            convert=from_internvideo2, pixels=IMAGENET_PIXELS, text_length=40,
            tokenizer=partial(wordpiece, public="bert-large", sep=False)),
        "motion": Recipe(
            kind="video", model=Motion, view=squash, pixels=((0, 0, 0), (1, 1, 1)), text_length=1,
            tokenizer=lambda path, length: lambda captions: torch.zeros(len(captions), length)),
        "shapes-clip": Recipe(
            kind="image", model=CLIP, config=toy_clip, convert=from_clip, view=squash, pixels=TOY_PIXELS,
            text_length=24),
        "shapes-viclip": Recipe(
            **viclip, config=CLIPConfig, view=squash, pixels=TOY_PIXELS, text_length=24),
    }


def recipe_of(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"no reward {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


# ---- loading -----------------------------------------------------------------------------------------------

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
SPEC = re.compile(rf"([^=:]+)(?:=([^:].*?))?(?::({NUMBER}))?")


def parse_spec(spec: str) -> tuple[str, str | None, float | None]:
    """What follows --reward, NAME[=FILE][:WEIGHT] -> (name, path, weight)."""
    match = SPEC.fullmatch(spec)
    if not match or abs(float(match[3] or 0)) > 1e6:
        raise UserError(f"--reward {spec} is not NAME[=FILE][:WEIGHT] with a number for WEIGHT, at most 1e6; "
                        "e.g. hpsv2:0.5")
    name, path, weight = match.groups()
    recipe_of(name)
    return name, path, weight and float(weight)


def load(name: str, path: str | Path | None = None, device: str | torch.device = "cpu",
         dtype: torch.dtype | None = None, tokenizer: Tokenizer | None = None, frames: int | None = None,
         grad_checkpointing: bool = False) -> Reward:
    """A `Reward`, frozen.

    path: a file, a folder, None = the public file. dtype: None = bfloat16 where a GPU has it, else float32.
    tokenizer: which the toy's rewards need. frames: 4 or 8 for internvideo2."""
    recipe, device = recipe_of(name), torch.device(device)
    if not (tokenizer or recipe.tokenizer):
        raise UserError(f"{name} reads the toy's captions; it goes with the toy alone")
    files = find(name, path) if recipe.convert else [None]
    path, tokenizer = files[0], tokenizer or recipe.tokenizer(files[0], recipe.text_length)

    with reading(path, f"a file of {name}"), without_memory():
        model = recipe.network(read_header(path) if path else {}, frames)
    if recipe.convert:
        state = needed(read_tensors(*files))
        with reading(path, f"a file of {name}"):
            state = recipe.convert(state, model)
        fill(model, state, path, device, allow_unused=not recipe.whole)

    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = dtype or (torch.bfloat16 if has_bfloat16 else torch.float32)
    reward = Reward(name, freeze(model, device, dtype), tokenizer, device, dtype)
    reward.checkpoint(grad_checkpointing)
    return reward


def untrained(name: str, device: str | torch.device, dtype: torch.dtype, frames: int | None = None) -> Reward:
    """A reward without its weights, to count time and memory: centre crop, and one caption for all."""
    recipe = recipe_of(name)
    ids = torch.ones(1, recipe.text_length, dtype=torch.long)
    reward = Reward(name, freeze(recipe.network({}, frames), device, dtype),
                    lambda captions: ids.expand(len(captions), -1), device, dtype)
    reward.view = lambda clips, S, generators: recipe.view(clips, S)
    return reward


def find(name: str, path: str | Path | None) -> list[Path]:
    """The file of weights, or its shards: `path`, what a folder `path` holds, or (no path) the public one."""
    if not path:
        return [fetch(name)]
    public = locate(path) / (PUBLIC[name].split()[1] if name in PUBLIC else "")
    stems = "open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model"
    return [public] if public.is_file() else weight_files(path, *stems)


def freeze(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves the model; its parameters are never trained, and those of FLOAT32 layers keep their precision."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.data = p.data.to(device, torch.float32 if isinstance(module, FLOAT32) else dtype)
            p.requires_grad_(False)
    return model.eval()


def wordpiece(path: Path, length: int, public: str, sep: bool = True) -> Tokenizer:
    """BERT's tokenizer, from the `vocab.txt` beside the weights, else from the public one."""
    beside = path.parent / "vocab.txt"
    vocabulary = beside if beside.exists() else fetch(public)
    tokenizer, words = WordPiece(vocabulary, length, sep), 30522                    # of the uncased models
    if len(tokenizer.ids) != words:
        raise UserError(f"{vocabulary} does not hold {words} words; take that of {PUBLIC[public].split()[0]}")
    return tokenizer


# ---- views: clips (B, T, 3, H, W) -> (B, T, 3, S, S), float32 ----------------------------------------------

def squash(clips: Tensor, S: int, generators: Generators = None) -> Tensor:
    """The whole frame, its aspect ratio lost: PickScore, CLIPScore."""
    return resize(clips, S, S)


def pad(clips: Tensor, S: int, generators: Generators = None) -> Tensor:
    """The whole frame between black bars: HPS."""
    H, W = clips.shape[-2:]
    longer = max(H, W)
    clips = resize(clips, max(1, round(H * S / longer)), max(1, round(W * S / longer)))

    h, w = S - clips.shape[-2], S - clips.shape[-1]                 # the bars' height and width
    return F.pad(clips, (w // 2, w - w // 2, h // 2, h - h // 2))


def window(clips: Tensor, S: int, generators: Generators = None, to_int: Callable = round) -> Tensor:
    """The middle square, or one that a clip's generator draws: video rewards were trained on random crops.

    to_int: how models round the longer side."""
    H, W = clips.shape[-2:]
    shorter = min(H, W)
    clips = resize(clips, to_int(H * S / shorter), to_int(W * S / shorter))

    spare = [size - S for size in clips.shape[-2:]]                 # room of the window's corner
    if generators is None:
        corners = [[round(room / 2) for room in spare]] * len(clips)
    else:
        corners = [[int(torch.randint(room + 1, (), generator=g)) for room in spare] for g in generators]
    return torch.stack([clip[..., y:y + S, x:x + S] for clip, (y, x) in zip(clips, corners, strict=True)])


centre = partial(window, to_int=int)                        # ImageReward's


def resize(clips: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing: what torchvision does to tensors."""
    if clips.shape[-2:] == (height, width):
        return clips
    frames = F.interpolate(clips.flatten(0, 1), (height, width), mode="bicubic", antialias=True)
    return frames.unflatten(0, clips.shape[:2])


# ---- parts that the networks share -------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Float32Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


FLOAT32 = (nn.LayerNorm, RMSNorm, Float32Linear)    # keep float32 parameters in a bf16 model


class InternVideo2Block(TowerBlock):
    """With RMSNorm, also of queries and keys (over all heads at once), without qkv bias; the tanh GELU is the
    one of the fused kernel that InternVideo2 was trained with."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__(width, heads, hidden, act=partial(nn.GELU, "tanh"), norm=partial(RMSNorm, eps=1e-6))
        self.attn.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn.q_norm, self.attn.k_norm = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)


def patches(conv: nn.Conv2d, frames: Tensor) -> Tensor:
    """Frames (B, T, 3, S, S) -> tokens (B, T, N, D) of the patches that `conv` cuts and projects."""
    return conv(frames.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


# ---- CLIP (HPSv2.1, PickScore, CLIPScore, toy) and ViCLIP --------------------------------------------------

@dataclass(frozen=True)
class CLIPConfig:
    """The defaults are ViT-H/14, which HPSv2.1, PickScore and CLIPScore share."""
    image_size: int = 224
    patch: int = 14
    frames: int | None = None     # that the vision tower reads at once; None: it reads single frames
    width: int = 1280
    layers: int = 32
    heads: int = 16
    embed_dim: int = 1024         # of the features that both towers end in
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408
    tubelet: int = 1              # toy only: frames that a patch spans (ViViT, Arnab et al., 2021)


ViCLIPConfig = partial(CLIPConfig, frames=8, width=1024, layers=24, embed_dim=768, text_width=768,
                       text_layers=12, text_heads=12, context_length=32)        # ViCLIP-L


class VisionTower(nn.Module):
    """Joint attention over one class token and the N patches of a frame, or the T*N patches of a clip."""

    def __init__(self, config: CLIPConfig, act: type[nn.Module]):
        super().__init__()
        D, N = config.width, (config.image_size // config.patch) ** 2
        self.tubelet = config.tubelet
        self.conv1 = nn.Conv2d(3 * config.tubelet, D, config.patch, config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(D))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + N, D))
        if config.frames:
            times = config.frames // config.tubelet
            self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, times, D))
        self.ln_pre, self.ln_post = LayerNorm(D), LayerNorm(D)
        self.blocks = BlockStack(TowerBlock(D, config.heads, 4 * D, act) for _ in range(config.layers))
        self.proj = nn.Parameter(nn.init.normal_(torch.empty(D, config.embed_dim), std=D ** -0.5))

    def forward(self, frames: Tensor) -> Tensor:
        """Normalised frames (B, T, 3, S, S), T = 1 without `config.frames` -> features (B, E)."""
        frames = frames.unflatten(1, (-1, self.tubelet)).flatten(2, 3)              # (B, T / n, 3 * n, S, S)
        x = patches(self.conv1, frames) + self.positional_embedding[1:]             # (B, T / n, N, D)
        if hasattr(self, "temporal_positional_embedding"):
            x = x + self.temporal_positional_embedding[:, :, None]
        x = x.flatten(1, 2)

        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.blocks(self.ln_pre(torch.cat([first, x], dim=1)))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Image-text contrast (Radford et al., 2021): two towers whose features are compared."""
    act = nn.GELU                                                   # of the towers' blocks

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.image_size, self.frames = config.image_size, config.frames
        self.vision_encoder = VisionTower(config, self.act)
        self.text_encoder = TextTower(config.text_width, config.text_layers, config.text_heads,
                                      config.context_length, config.vocab_size, config.embed_dim, self.act)

    def text(self, ids: Tensor) -> Tensor:
        """Token ids (B, L), L <= context_length -> features (B, E), not of unit length."""
        return self.text_encoder.pooled(ids)

    def score(self, frames: Tensor, text: Tensor) -> Tensor:
        images = self.vision_encoder(frames.flatten(0, 1)[:, None])             # (B*T, E)
        return cosine(images.unflatten(0, frames.shape[:2]), text[:, None]).mean(dim=1)


class ViCLIP(CLIP):
    """Video-text contrast (InternVid): a CLIP whose vision tower sees the patches of all frames at once."""
    act = QuickGELU

    def encode_video(self, frames: Tensor) -> Tensor:
        """Normalised frames (B, T, 3, S, S) -> features (B, E), not of unit length."""
        assert frames.shape[1] == self.frames, f"{tuple(frames.shape)} for {self.frames} frames"
        return self.vision_encoder(frames)

    def score(self, frames: Tensor, text: Tensor) -> Tensor:
        return cosine(self.encode_video(frames), text)


# ---- motion, without weights -------------------------------------------------------------------------------

class Motion(nn.Module):
    """How fast parts of the picture move, beyond what all of it does: 0 (a still) to 1.

    Flicker and fades pay nothing: gain and offset of a whole frame, fitted by least squares, are taken off
    first. Change over gradient is then the speed in each cell of the picture, and only what exceeds twice
    that of the calmer half counts, so that a pan pays little. Violent changes pay no more than brisk motion.

    What fools it: whatever changes in one part of the picture, so blinking, trembling, noise in a corner, a
    cut every few frames. It reads no caption: take it beside rewards that do, with a small weight."""
    image_size, frames = 64, None
    cell, usual = 16, 0.25          # side of a cell in pixels; a speed in pixels per frame that scores 1/2

    def __init__(self, config: None = None):
        super().__init__()

    def text(self, ids: Tensor) -> Tensor:
        return ids

    def score(self, frames: Tensor, text: Tensor) -> Tensor:
        if frames.shape[1] < 2:
            raise UserError("motion looks at 2 frames or more, the clip has one")

        def centred(x):
            return x - x.mean((-2, -1), keepdim=True)

        def amount(x):                                              # a smooth |x| per cell, (B, T-1, cells)
            return F.avg_pool2d(((x.square() + 1e-4).sqrt() - 1e-2).mean(2), self.cell).flatten(2)

        # what gain and offset of the whole frame do not explain
        before, after = frames[:, :-1], frames[:, 1:]
        change, level = centred(after - before), centred((after + before) / 2)      # (B, T-1, 3, S, S)
        gain = (change * level).mean((-2, -1)) / (level.square().mean((-2, -1)) + 1e-4)
        change = change - gain[..., None, None] * level

        # the speed of each cell, beyond that of the calmer half
        slopes = sum(amount(slope) for slope in torch.gradient(level, dim=(-2, -1)))
        speed = (amount(change) / (slopes + 0.01)).sort().values
        calm = speed[..., :speed.shape[-1] // 2].mean(-1, keepdim=True)
        excess = (speed - 2 * calm).relu().mean(-1)
        return (excess / (excess + self.usual)).mean(1)


# ---- BLIP's ViT and ImageReward ----------------------------------------------------------------------------

@dataclass(frozen=True)
class ViTConfig:
    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    hidden: int


class ViT(nn.Module):
    """Frames (B, T, 3, S, S) -> tokens (B, 1 + T*N, D), the class token first."""

    def __init__(self, config: ViTConfig, block: Callable[[int, int, int], TowerBlock], frames: int = 1):
        super().__init__()
        D, N = config.width, (config.image_size // config.patch) ** 2
        self.patch_embed = nn.Conv2d(3, D, config.patch, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + frames * N, D))
        self.blocks = BlockStack(block(D, config.heads, config.hidden) for _ in range(config.layers))

    def forward(self, frames: Tensor) -> Tensor:
        x = patches(self.patch_embed, frames).flatten(1, 2)         # (B, T*N, D)
        first = self.cls_token.expand(len(x), -1, -1)
        return self.blocks(torch.cat([first, x], dim=1) + self.pos_embed)


@dataclass(frozen=True)
class ImageRewardConfig:
    vit: ViTConfig = ViTConfig(image_size=224, patch=16, width=1024, layers=24, heads=16, hidden=4096)
    bert: BERTConfig = BERTConfig(vocab_size=30524, width=768, layers=12, heads=12, hidden=3072,
                                  image_width=1024)


class ImageReward(nn.Module):
    """BLIP reads the caption while it attends to the image; five linear layers turn this into a score."""

    def __init__(self, config: ImageRewardConfig):
        super().__init__()
        self.image_size, self.frames = config.vit.image_size, None
        norm = partial(LayerNorm, eps=1e-6)
        self.vision, self.norm = ViT(config.vit, partial(TowerBlock, norm=norm)), norm(config.vit.width)
        self.bert = BERT(config.bert)
        drop = nn.Identity()                                        # dropout, in training
        self.mlp = nn.Sequential(
            Float32Linear(config.bert.width, 1024), drop, Float32Linear(1024, 128), drop,
            Float32Linear(128, 64), drop, Float32Linear(64, 16), Float32Linear(16, 1))

    def text(self, ids: Tensor) -> Tensor:
        return ids                                              # without an image there is nothing to compute

    def score(self, frames: Tensor, ids: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the images it was trained on. Capped at 2, as T2V-Turbo (and ReFL) does:
        a frame that good has no more gradient."""
        B, T = frames.shape[:2]
        image = self.norm(self.vision(frames.flatten(0, 1)[:, None]))       # (B*T, 1+N, D)
        state = self.bert(ids.repeat_interleave(T, dim=0), image)           # caption b for each of its frames
        score = (self.mlp(state)[:, 0] - 0.16717362830052426) / 1.0333394966054072
        return score.clamp(max=2).view(B, T).mean(dim=1)


# ---- InternVideo2, stage 2 ---------------------------------------------------------------------------------

class AttentionPool(nn.Module):
    """All tokens into one: the mean of the tokens attends to all of them."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.norm1_q, self.norm1_k, self.norm1_v = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.norm1_q(x.mean(dim=1, keepdim=True)))
        k, v = self.k(self.norm1_k(x)), self.v(self.norm1_v(x))
        return self.proj(attend(q, k, v, self.heads))[:, 0]


@dataclass(frozen=True)
class InternVideo2Config:
    vit: ViTConfig = ViTConfig(image_size=224, patch=14, width=1408, layers=40, heads=16, hidden=6144)
    bert: BERTConfig = BERTConfig(vocab_size=30522, width=1024, layers=19, heads=16, hidden=4096,
                                  token_types=2)
    pool_dim: int = 768
    embed_dim: int = 512
    frames: int = 8               # or 4, which it was trained with; `stretch` fits the position table


class InternVideo2(nn.Module):
    """A video transformer of 1 B parameters against the first 19 layers of BERT-large (the others attend to
    frames)."""

    def __init__(self, config: InternVideo2Config):
        super().__init__()
        self.image_size, self.frames = config.vit.image_size, config.frames
        self.vision = ViT(config.vit, InternVideo2Block, config.frames)
        self.pool = AttentionPool(config.vit.width, config.vit.heads, config.pool_dim)
        self.bert = BERT(config.bert)
        self.vision_proj = nn.Linear(config.pool_dim, config.embed_dim)
        self.text_proj = nn.Linear(config.bert.width, config.embed_dim)

    def text(self, ids: Tensor) -> Tensor:
        return self.text_proj(self.bert(ids))

    def encode_video(self, frames: Tensor) -> Tensor:
        """Normalised frames (B, T, 3, S, S) -> features (B, E), not of unit length."""
        return self.vision_proj(self.pool(self.vision(frames)))

    def score(self, frames: Tensor, text: Tensor) -> Tensor:
        return cosine(self.encode_video(frames), text)


def stretch(table: Tensor, frames: int, N: int) -> Tensor:
    """A position table (1, 1 + T*N, D), the class token first, interpolated linearly in time to another T."""
    grid = table[:, 1:].unflatten(1, (-1, N)).permute(0, 2, 3, 1).flatten(1, 2)         # (1, N*D, T)
    grid = F.interpolate(grid.float(), size=frames, mode="linear")                      # (1, N*D, frames)
    grid = grid.unflatten(1, (N, -1))
    return torch.cat([table[:, :1], grid.permute(0, 3, 1, 2).flatten(1, 2)], dim=1)


def toy_clip(embed_dim: int, vision_cfg: dict, text_cfg: dict, image_size: int | None = None) -> CLIPConfig:
    """The toy's header is a configuration of open_clip."""
    vision, text = vision_cfg, text_cfg
    return CLIPConfig(
        image_size=vision["image_size"], patch=vision["patch_size"], width=vision["width"],
        layers=vision["layers"], heads=vision["width"] // vision["head_width"], embed_dim=embed_dim,
        text_width=text["width"], text_layers=text["layers"], text_heads=text["heads"],
        context_length=text["context_length"], vocab_size=text["vocab_size"])


# ---- names in the public files -> ours ---------------------------------------------------------------------

OPENCLIP = [
    (r"^visual\.", "vision_encoder."),
    (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)\b", r"text_encoder.\1"),
    *OPENCLIP_BLOCKS]
HUGGINGFACE_VISION = [
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.", "visual."),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"), (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^(visual)_projection\.weight", r"\1.proj"), (r"^(text_projection)\.weight", r"\1")]
BERT_NAMES = [
    (r"^bert\.(embeddings|encoder)\.", "bert."), (r"\.layer\.", ".layers."),
    (r"attention\.(self|output)\.", "attention."), (r"\.(intermediate|output)\.dense", r".\1"),
    (r"(\.output)?\.LayerNorm", ".norm")]
IMAGEREWARD = [
    (r"^blip\.visual_encoder\.norm", "norm"), (r"^blip\.visual_encoder", "vision"),
    (r"^blip\.text_encoder", "bert"), (r"patch_embed\.proj", "patch_embed"),
    (r"^mlp\.layers", "mlp"), *BERT_NAMES]
INTERNVIDEO2 = [
    (r"^vision_encoder\.clip_projector\.(cross_attn\.)?", "pool."), (r"^pool\.([qkv])_bias", r"pool.\1.bias"),
    (r"^vision_encoder", "vision"), (r"patch_embed\.proj", "patch_embed"), (r"^text_encoder\.bert", "bert"),
    *BERT_NAMES]


def from_clip(state: State, model: CLIP) -> State:
    """open_clip's names, or those of transformers' CLIPModel, which also transposes the projections."""
    if any(key.startswith("vision_model.") for key in state):
        state = huggingface_text(rename(state, HUGGINGFACE_VISION))
        state = {key: w.T if key in ("visual.proj", "text_projection") else w for key, w in state.items()}
    return rename(state, OPENCLIP)


def needed(state: State) -> State:
    """Without temperatures of training losses and constants; with Conv3d over single frames as Conv2d."""
    unused = ("logit_scale", "temp", "position_ids", "attn_mask")
    return {key: w.squeeze(2) if w.ndim == 5 else w for key, w in state.items() if not key.endswith(unused)}


def from_internvideo2(state: State, model: InternVideo2) -> State:
    """Also stretches the position table, and multiplies LayerScale (gamma, of a residual branch's channels)
    into the branch's last layer."""
    state, key = rename(state, INTERNVIDEO2), "vision.pos_embed"
    size = model.vision.pos_embed.shape[1]
    if state[key].shape[1] != size:
        state[key] = stretch(state[key], model.frames, (size - 1) // model.frames)

    for block in (f"vision.blocks.{i}." for i in range(len(model.vision.blocks))):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = state.pop(f"{block}{scale}.gamma").float()
            state[f"{block}{layer}.weight"] = gamma[:, None] * state[f"{block}{layer}.weight"].float()
            state[f"{block}{layer}.bias"] = gamma * state[f"{block}{layer}.bias"].float()
    return state


RECIPES = recipes()
