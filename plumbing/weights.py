"""Weight files: reading and writing, the names of each public layout, and strict filling of networks.

    VideoCrafter2         model.ckpt
    ModelScopeT2V         a diffusers folder (unet/ vae/ text_encoder/), or one with its three first files
    T2V-Turbo             t2v_turbo_vc2.pt: VideoCrafter2's layout with a student's UNet in it;
                          unet_lora.pt: a list of LoRA matrices without names, in the order of the layers
    T2V-Turbo-v2          unet_mg.pt, unet_no_mg.pt: a whole UNet
    this project          *.safetensors: a LoRA or a whole UNet, and a JSON header that says what it is

Filling is strict: no tensor may be missing, left over, misshaped or not finite, and a wrong file ends in a
ValueError of one line. Networks are made without memory and filled tensor by tensor from memory-mapped files:
loading takes little more memory than the model. Files are data, never code (`weights_only`).

This module knows no network: model.py hands in a network's layers as {name: shape of the weight}, in order.
"""
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plumbing.files import atomic, read_header

State = dict[str, Tensor]                       # {name: tensor}
Pairs = dict[str, tuple[Tensor, Tensor]]        # LoRA: {layer: (up (out, r, 1, ...), down (r, in, kernel))}
Shapes = dict[str, torch.Size]                  # {layer: shape of its weight}, in the network's order
Table = list[tuple[str, str | Callable]]        # rows of (regular expression, replacement)

# ---- names of the public layouts ---------------------------------------------------------------------------

ATTENTION = [                                               # the same in VideoCrafter2 and diffusers
    (r"transformer_blocks\.0\.", ""), (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".out."),
    (r"ff\.net\.0\.proj", "ff.proj"), (r"ff\.net\.2", "ff.out")]

VIDEOCRAFTER = [
    (r"in_layers\.0", "norm1"), (r"in_layers\.2", "conv1"), (r"emb_layers\.1", "emb"),
    (r"out_layers\.0", "norm2"), (r"out_layers\.3", "conv2"), (r"skip_connection", "skip"),
    (r"temopral_conv", "temporal"),                         # the typo is in the files
    (r"input_blocks\.0\.0\.", "input_blocks.0.0.conv."), (r"\.op\.", ".conv."), *ATTENTION]

RESBLOCK = r"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[03])\."
TO_VIDEOCRAFTER = [                                         # the inverse of VIDEOCRAFTER
    (r"^input_blocks\.0\.0\.conv\.", "input_blocks.0.0."), (RESBLOCK + r"conv\.", r"\1.op."),
    (RESBLOCK + r"norm1\.", r"\1.in_layers.0."), (RESBLOCK + r"conv1\.", r"\1.in_layers.2."),
    (RESBLOCK + r"emb\.", r"\1.emb_layers.1."), (RESBLOCK + r"norm2\.", r"\1.out_layers.0."),
    (RESBLOCK + r"conv2\.", r"\1.out_layers.3."), (RESBLOCK + r"skip\.", r"\1.skip_connection."),
    (RESBLOCK + r"temporal\.", r"\1.temopral_conv."),
    (r"\.(attn\d)\.([qkv])\.", r".transformer_blocks.0.\1.to_\2."),
    (r"\.(attn\d)\.out\.", r".transformer_blocks.0.\1.to_out.0."),
    (r"\.ff\.proj\.", ".transformer_blocks.0.ff.net.0.proj."),
    (r"\.ff\.out\.", ".transformer_blocks.0.ff.net.2."),
    (r"\.(norm\d)\.", r".transformer_blocks.0.\1.")]

MODELSCOPE_ORIGINAL = [                                     # VideoCrafter2's, but for two names
    (r"input_blocks\.0\.1\.", "init_attn.0."), (r"(input_blocks\.\d+)\.op\.", r"\1.0.op."), *VIDEOCRAFTER]


def diffusers_level(name: str, blocks: list[str], attention: bool, *resampling: tuple[str, str]
                    ) -> list[tuple[str, str]]:
    """A level of diffusers' UNet: ResBlocks, temporal convolutions, transformers over space, over time."""
    kinds = [("resnets", "0"), ("temp_convs", "0.temporal")]
    kinds += [("attentions", "1"), ("temp_attentions", "2")] if attention else []
    rows = [(f"{name}.{kind}.{j}", f"{block}.{slot}")
            for kind, slot in kinds for j, block in enumerate(blocks)]
    return rows + [*resampling]


DIFFUSERS_PARTS = [                             # parts of diffusers' UNet in its order, and our names
    ("conv_in", "input_blocks.0.0.conv"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.cond_proj", "time_cond_proj"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("transformer_in", "init_attn.0"),
    *diffusers_level("down_blocks.0", ["input_blocks.1", "input_blocks.2"], True,
                     ("down_blocks.0.downsamplers.0", "input_blocks.3.0")),
    *diffusers_level("down_blocks.1", ["input_blocks.4", "input_blocks.5"], True,
                     ("down_blocks.1.downsamplers.0", "input_blocks.6.0")),
    *diffusers_level("down_blocks.2", ["input_blocks.7", "input_blocks.8"], True,
                     ("down_blocks.2.downsamplers.0", "input_blocks.9.0")),
    *diffusers_level("down_blocks.3", ["input_blocks.10", "input_blocks.11"], False),
    *diffusers_level("up_blocks.0", ["output_blocks.0", "output_blocks.1", "output_blocks.2"], False,
                     ("up_blocks.0.upsamplers.0", "output_blocks.2.1")),
    *diffusers_level("up_blocks.1", ["output_blocks.3", "output_blocks.4", "output_blocks.5"], True,
                     ("up_blocks.1.upsamplers.0", "output_blocks.5.3")),
    *diffusers_level("up_blocks.2", ["output_blocks.6", "output_blocks.7", "output_blocks.8"], True,
                     ("up_blocks.2.upsamplers.0", "output_blocks.8.3")),
    *diffusers_level("up_blocks.3", ["output_blocks.9", "output_blocks.10", "output_blocks.11"], True),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.3"),
    ("mid_block.temp_convs.0", "middle_block.0.temporal"),
    ("mid_block.temp_convs.1", "middle_block.3.temporal"),
    ("mid_block.attentions.0", "middle_block.1"), ("mid_block.temp_attentions.0", "middle_block.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
]
DIFFUSERS_TRANSFORMER = ["proj_in", "attn1", "attn2", "ff", "proj_out"]     # VideoCrafter2: ff before attn2

DIFFUSERS = [
    *((rf"^{re.escape(name)}\.", f"{ours}.") for name, ours in DIFFUSERS_PARTS),
    (r"time_emb_proj", "emb"), (r"conv_shortcut", "skip"), *ATTENTION]

DIFFUSERS_VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"), (r"to_out\.0|proj_attn", "proj_out"),              # two generations of names
    (r"attn_1\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r"attn_1.\1."),
    (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut")]

HUGGINGFACE_CLIP = [
    (r"^text_model\.", ""), (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"), (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"), (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn\.out_proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj")]


def rename(state: State, table: Table) -> State:
    """Applies the rows of a table to every name, in order."""
    for pattern, name in table:
        state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    return state


def huggingface_text(state: State) -> State:
    """transformers' CLIPTextModel -> open_clip: renamed, and q, k, v stacked into one matrix."""
    state = rename(state, HUGGINGFACE_CLIP)
    for key in [key for key in state if "self_attn.q_proj" in key]:
        stacked = key.replace("self_attn.q_proj.", "attn.in_proj_")
        state[stacked] = torch.cat([state.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"])
    return state


def to_public_names(state: State) -> State:
    """Our UNet's tensors under VideoCrafter2's names, the first transformer's projections as its Conv1d."""
    state = rename(state, TO_VIDEOCRAFTER)
    for key in ("init_attn.0.proj_in.weight", "init_attn.0.proj_out.weight"):
        state[key] = state[key][..., None]                  # (out, in) -> (out, in, 1)
    return state


def part(state: State, prefix: str) -> State:
    """What lies under a prefix, without it."""
    return {key.split(prefix, 1)[1]: tensor for key, tensor in state.items() if prefix in key}


# ---- files -------------------------------------------------------------------------------------------------

class Inert:
    """Stands in for whatever a training framework pickled beside its tensors. Does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def can_be_mapped(path: Path) -> bool:
    """Is it torch's zip format of 2020, uncompressed? Mapped, a compressed one would read as garbage."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def read_tensors(path: str | Path):
    """Whatever a .safetensors or torch file holds, memory-mapped where possible.

    Raises ValueError for other files."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb"):
            pass
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        zipped = zipfile.is_zipfile(path)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except Exception as error:                          # unpickling damaged bytes raises errors of any kind
        raise ValueError(f"{path}: not a weight file, or a truncated one ({size:,} bytes; "
                         f"{type(error).__name__})") from error


def unwrap(content):
    """A dict of tensors out of what training programs put around it; anything else as it is."""
    for wrapper in ("state_dict", "module", "model"):       # Lightning, DeepSpeed, OpenGVLab
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content


def read_named(path: str | Path) -> State:
    """{name: tensor} of a weight file, memory-mapped where possible, out of whatever it is wrapped in."""
    return named_tensors(unwrap(read_tensors(path)), path)


def named_tensors(content, path: str | Path) -> State:
    """The tensors among a file's entries. Raises ValueError where there are none."""
    if isinstance(content, list):
        raise ValueError(f"{path}: a list of LoRA matrices, not a whole model; that goes with --turbo")
    if isinstance(content, dict):
        content = {key: x for key, x in content.items() if isinstance(key, str) and isinstance(x, Tensor)}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds no named tensors; it is not a weight file")
    return content


def save_checkpoint(path: str | Path, tensors: State, header: dict) -> None:
    """Writes tensors and a JSON-able header to one .safetensors file; a crash leaves the old one."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"config": json.dumps(header)})


def read_checkpoint(path: str | Path) -> tuple[State, dict]:
    """What save_checkpoint wrote: (tensors, header)."""
    return read_tensors(path), read_header(path)


def save_merged(path: str | Path, teacher: str | Path, unet: State) -> None:
    """Writes t2v_turbo_vc2.pt's layout: model.ckpt of VideoCrafter2 with a student's UNet in it."""
    teacher, prefix = Path(teacher), "model.diffusion_model."
    teacher = teacher / "model.ckpt" if teacher.is_dir() else teacher
    rest = {key: x for key, x in read_named(teacher).items() if not key.startswith(prefix)}
    student = {prefix + key: x.detach().cpu().contiguous() for key, x in to_public_names(unet).items()}
    with atomic(path) as temporary:
        torch.save({"state_dict": student | rest}, temporary)


def one_of(folder: Path, stems: list[str]) -> Path:
    """The weight file of a diffusers folder: .safetensors before .bin, full precision before .fp16."""
    kinds = [".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"]
    names = [stem + kind for kind in kinds for stem in stems]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: none of {', '.join(names)} is there")


def download(repository: str, file: str) -> Path:
    """A file of a Hugging Face repository, downloaded on its first use."""
    import huggingface_hub
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(f"cannot download {file} of https://huggingface.co/{repository} "
                         f"({type(error).__name__}); fetch it by hand and give its path") from error


# ---- filling a network -------------------------------------------------------------------------------------

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


class NoInit(TorchFunctionMode):
    """Leaves out all that torch.nn.init does, and drawing normal values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init" or function is torch.Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks made in this block have shapes, but no memory and no values, until `fill` gives them theirs.

    On the meta device alone, the initial values of an embedding would import torch's compiler: two seconds.
    """
    with torch.device("meta"), NoInit():
        yield


@torch.no_grad()
def fill(module: nn.Module, state: State, source, device="cpu", dtype: torch.dtype | None = None,
         lora: Pairs | None = None, allow_unused: bool = False) -> nn.Module:
    """Strictly fills a module made `without_memory`, tensor by tensor, merging LoRA on the way. In eval mode.

    state: {our name: tensor}; a 1x1 convolution may come as a linear layer and vice versa.
    source: the file, for messages. dtype: None = the file's. lora: {layer: (up, down)}.
    allow_unused: tensors without a place are named on stderr, not refused.
    """
    wanted, lora, filled = module.state_dict(), dict(lora or {}), {}
    check_names(type(module).__name__, wanted, state, source, allow_unused)

    for key, like in wanted.items():
        tensor = state[key]
        if trim(tensor.shape) != trim(like.shape):
            raise ValueError(f"{source}: {key} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
            raise ValueError(f"{source}: {key} holds {tensor.layout} {tensor.dtype} numbers; "
                             "take the file as it was published, in float32, float16 or bfloat16")
        if not is_finite(tensor):
            raise ValueError(f"{source}: {key} holds NaN or infinity; the file is damaged")
        tensor = tensor.reshape(like.shape)

        layer = key.removesuffix(".weight")
        if layer in lora:
            up, down = lora.pop(layer)
            tensor = tensor.float() + (up.float().flatten(1) @ down.float().flatten(1)).view(like.shape)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim(), torch.contiguous_format)
        filled[key] = tensor.to(device, dtype or tensor.dtype, copy=True).contiguous(memory_format=last)

    assert not lora, f"LoRA for layers that do not exist: {list(lora)}"
    module.load_state_dict(filled, assign=True)
    return module.eval()


def check_names(kind: str, wanted: State, state: State, source, allow_unused: bool) -> None:
    """Raises ValueError unless a file has exactly the tensors that a network takes."""
    missing, unused = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} of {len(wanted)} tensors missing ({first_of(missing)})")
    if unused and not allow_unused:
        complaints.append(f"{len(unused)} not expected ({first_of(unused)})")
    if complaints:
        raise ValueError(f"{source}: not the weights of this {kind}, or not all: {'; '.join(complaints)}")
    if unused:
        groups = sorted({".".join(key.split(".")[:2]) for key in unused})
        print(f"{source}: {len(unused)} tensors not needed: {', '.join(groups)}", file=sys.stderr)


def first_of(names: list[str]) -> str:
    return names[0] + ", ..." * (len(names) > 1)


def is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity, nothing close to it (a flipped bit); one pass, nothing allocated."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(abs(x.item()) < 1e15 for x in tensor.aminmax())         # false for NaN, too


def trim(shape) -> list[int]:
    """A shape without the ones at its end: (C, D, 1, 1) -> (C, D)."""
    shape = list(shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


# ---- LoRA --------------------------------------------------------------------------------------------------

def lora_required(layers: Shapes, layout: str) -> list[str]:
    """The layers that a LoRA must have, in our order: all, but for VideoCrafter2 two that it has as Conv1d,
    which the released code passes over."""
    return [name for name in layers if layout != "vc2" or not name.startswith("init_attn.0.proj_")]


def lora_order(layers: Shapes, layout: str) -> list[str]:
    """The layers of a T2V-Turbo LoRA list, one per (up, down) pair. "vc2": our order; "ms": diffusers'."""
    required = lora_required(layers, layout)
    return required if layout == "vc2" else sorted(required, key=diffusers_rank)        # stable


def diffusers_rank(layer: str) -> tuple[int, int]:
    """Sorts layers as diffusers lists them: by part of the UNet, and by its order inside a transformer."""
    parts = [ours for _, ours in DIFFUSERS_PARTS]
    inside = max((ours for ours in parts if f"{layer}.".startswith(f"{ours}.")), key=len)
    step = next((i for i, name in enumerate(DIFFUSERS_TRANSFORMER) if f".{name}" in layer), 0)
    return parts.index(inside), step


def lora_from_list(tensors: list[Tensor], layers: Shapes, layout: str, source) -> Pairs:
    """[up, down, up, down, ...] -> {layer: (up, down)}, each shape checked against the layer of its place."""
    order = lora_order(layers, layout)
    if len(tensors) != 2 * len(order):
        raise ValueError(f"{source}: {len(tensors)} LoRA tensors, this UNet takes {2 * len(order)}")
    if not all(isinstance(x, Tensor) for x in tensors):
        raise ValueError(f"{source}: a list, but not of tensors; it is not a weight file")
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return check_lora(dict(zip(order, pairs, strict=True)), layers, layout, source)


def lora_from_dict(tensors: State, layers: Shapes, layout: str, source) -> Pairs:
    """Our own files' LoRA, NAME.up and NAME.down -> {layer: (up, down)}, checked."""
    names = {key.rpartition(".")[0] for key in tensors}
    if {f"{name}.{end}" for name in names for end in ("up", "down")} != tensors.keys():
        raise ValueError(f"{source}: not a LoRA file: its tensors are not pairs NAME.up, NAME.down")
    return check_lora(split_lora(tensors), layers, layout, source)


def split_lora(tensors: State) -> Pairs:
    """{layer.up: ..., layer.down: ...}, as in our own files -> {layer: (up, down)}"""
    names = [key.removesuffix(".up") for key in tensors if key.endswith(".up")]
    return {name: (tensors[f"{name}.up"], tensors[f"{name}.down"]) for name in names}


def check_lora(lora: Pairs, layers: Shapes, layout: str, source) -> Pairs:
    """Raises ValueError unless every required layer has LoRA, and all shapes are those of the layers.

    up (out, r, 1, ...) after down (r, in, kernel): their product has the shape of the layer's weight.
    """
    foreign = [name for name in lora if name not in layers]
    if foreign:
        raise ValueError(f"{source}: LoRA for {foreign[0]}, a layer that this UNet does not have")
    missing = [name for name in lora_required(layers, layout) if name not in lora]
    if missing:
        raise ValueError(f"{source}: not a LoRA of this UNet, or not all of it: "
                         f"{len(missing)} of {len(layers)} layers missing ({first_of(missing)})")

    for name, (up, down) in lora.items():
        shape, r = layers[name], down.shape[0] if down.dim() else 0
        expected = (shape[0], r, *[1] * len(shape[2:])), (r, *shape[1:])
        if (tuple(up.shape), tuple(down.shape)) != expected:
            raise ValueError(f"{source}: LoRA of {name} has shapes {tuple(up.shape)} and "
                             f"{tuple(down.shape)}, expected {expected[0]} and {expected[1]}")
        for x in (up, down):
            if x.dtype not in FLOATS or x.layout != torch.strided:
                raise ValueError(f"{source}: LoRA of {name} holds {x.layout} {x.dtype} numbers; "
                                 "take the file as it was published, in float32, float16 or bfloat16")
        if not (is_finite(up) and is_finite(down)):
            raise ValueError(f"{source}: LoRA of {name} holds NaN or infinity; the file is damaged")
    return lora


@torch.no_grad()
def scaled(lora: Pairs | None, scale: float, source) -> Pairs | None:
    """LoRA of another strength: 1 as trained, 0 the teacher. Raises ValueError where there is no LoRA."""
    if lora is None and scale != 1:
        raise ValueError(f"--lora-scale {scale:g}: {source} holds whole weights, no LoRA to scale")
    return lora and {name: (scale * up, down) for name, (up, down) in lora.items()}


def lora_to_list(lora: Pairs, layers: Shapes, layout: str) -> list[Tensor]:
    """The inverse of lora_from_list, for torch.save: what the released code reads as unet_lora.pt."""
    order = lora_order(layers, layout)
    for name in sorted(set(order) - lora.keys()):
        raise ValueError(f"there is no LoRA for {name}, which the public list must have")
    for name in sorted(lora.keys() - set(order)):
        if lora[name][0].any():
            raise ValueError(f"the public LoRA list has no place for {name}; export merged weights instead")
    return [matrix.detach().float().cpu().contiguous() for name in order for matrix in lora[name]]
