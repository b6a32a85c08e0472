"""Weight files: reading and writing them, strict filling of networks, LoRA. Their layouts are in layouts.py.

The names of its tensors decide which layout a file has, not its own name. Filling is strict: no tensor may be
missing, left over, misshaped or of integers. Networks are made without memory, and filled tensor by tensor
from memory-mapped files: loading takes little more memory than the model. Files are data, never code.

This module knows no network: model.py hands in a network's layers as {name: shape of the weight}, in order.
"""
import json
import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plumbing.errors import UserError, reading
from plumbing.files import atomic, read_header
from plumbing.layouts import (  # noqa: F401
    DIFFUSERS,
    DIFFUSERS_VAE,
    LORA,
    PARTS,
    PUBLIC,
    TO_DIFFUSERS,
    TO_VIDEOCRAFTER,
    UNET,
    VIDEOCRAFTER,
    State,
    fetch,
    huggingface_text,
    rename,
    text_tower,
    to_public_names,
)

Pairs = dict[str, tuple[Tensor, Tensor]]        # LoRA: {layer: (up (out, r, 1, ...), down (r, in, kernel))}
Shapes = dict[str, torch.Size]                  # {layer: shape of its weight}, in the network's order

# ---- reading and writing -----------------------------------------------------------------------------------

WRAPPERS = "ema", "ema_state_dict", "state_dict", "model_state_dict", "module", "model", "unet"
PREFIXES = r"^(?:(?:module|model|_orig_mod)\.)+|\b_orig_mod\."      # DataParallel, Lightning, torch.compile
KINDS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".fp16.safetensors",
         ".safetensors.index.fp16.json", ".fp16.bin", ".bin.index.fp16.json")
HEADER = {                                                  # what a student's header may say, and its kind
    "model": str, "method": str, "train": dict, **dict.fromkeys(
        ("grid", "steps", "w_min", "w_max", "fps", "frames", "height", "width", "motion", "motion_share"),
        float)}
MODELSCOPE = "text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"


class Inert:
    """Stands in for whatever a training framework pickled beside its tensors. Does nothing."""

    def __init__(self, *args, **kwargs): ...
    __setstate__ = __init__


def is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_tensors(path: str | Path):
    """Whatever a file of safetensors or torch holds, memory-mapped where possible. Else UserError."""
    path = Path(path).expanduser()
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or a device, not a weight file")
    with reading(path, "a weight file"):
        if is_safetensors(path):
            return safetensors.torch.load_file(path)
        files = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []        # torch's format
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if files else []
        mapped = bool(files) and all(file.compress_type == zipfile.ZIP_STORED for file in files)
        try:
            with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (UnpicklingError, EOFError, OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a weight file, is truncated, or holds code, which is not run; "
                            "take the file as it was published") from error


def unwrap(content):
    """Tensors, or a list, out of what training programs put around them; where both are there, the EMA's."""
    def holds_tensors(x) -> bool:
        return isinstance(x, dict) and any(isinstance(y, Tensor) or holds_tensors(y) for y in x.values())

    while isinstance(content, dict):
        wrapper = next((name for name in WRAPPERS if holds_tensors(content.get(name))), None)
        if wrapper is None:
            break
        content = content[wrapper]
    return content


def named_tensors(content, path: str | Path) -> State:
    """The tensors among a file's entries, without prefixes. Raises UserError where there are none."""
    if isinstance(content, list):
        raise UserError(f"{path}: a list of LoRA matrices, not a whole model; that goes with --turbo")
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {key: x for key, x in entries if isinstance(key, str) and isinstance(x, Tensor)}
    state = rename(tensors, [(PREFIXES, "")])
    if not state:
        raise UserError(f"{path}: holds no named tensors; it is not a weight file")
    return state


def read_named(*paths: str | Path) -> State:
    """{name: tensor} of a weight file or of the shards of one, memory-mapped where possible."""
    state = {}
    for path in paths:
        state |= named_tensors(unwrap(read_tensors(path)), path)
    return state


def part(state: State, prefix: str) -> State:
    """What lies under a prefix, without it."""
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def locate(path: str | Path) -> Path:
    """A path, ~ expanded; in the hub's cache, for a model's folder, its snapshot `main` or the newest."""
    path = Path(path).expanduser()
    main = path / "refs" / "main"
    name = main.read_text().strip() if main.is_file() else None
    snapshots = [folder for folder in path.glob("snapshots/*") if folder.is_dir()]
    return max(snapshots, key=lambda folder: (folder.name == name, folder.stat().st_mtime), default=path)


def weight_files(path: str | Path, *stems: str) -> list[Path]:
    """A network's file, or in a folder its file or shards; .safetensors before .bin, half precision last."""
    path = locate(path)
    if not path.is_dir():
        return [path]
    files = [path / (stem + kind) for kind in KINDS for stem in stems]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{path}: no {' or '.join(stems)} there, .safetensors or .bin, whole or in shards")
    if ".index." not in file.name:
        return [file]
    with reading(file, "an index of weight files"):
        return [path / shard for shard in sorted(set(json.loads(file.read_text())["weight_map"].values()))]


def read_teacher(path: str | Path, text_layers: int) -> list[tuple[State, Path]]:
    """A teacher's file or folder -> for UNet, VAE and text encoder: tensors under our names, their file."""
    path = locate(path)
    path = path / "model.ckpt" if (path / "model.ckpt").is_file() else path

    if not path.is_dir():
        files, content = [[path]] * 3, read_named(path)
        prefixes = "diffusion_model.", "first_stage_model.", "cond_stage_model.model."
        unet, vae, text = (part(content, prefix) for prefix in prefixes)
    else:
        files = [[path / name] for name in MODELSCOPE]
        if not files[0][0].is_file():
            if not (path / "unet").is_dir():
                raise UserError(f"{path}: no teacher: neither model.ckpt nor unet/, vae/, text_encoder/")
            files = [weight_files(path / folder, "diffusion_pytorch_model") for folder in ("unet", "vae")]
            files += [weight_files(path / "text_encoder", "model", "pytorch_model")]
        unet, vae, text = (read_named(*shards) for shards in files)
        vae = part(vae, "first_stage_model.") or vae

    states = rename(unet, UNET), rename(vae, DIFFUSERS_VAE), text_tower(text, text_layers)
    return [(state, shards[0]) for state, shards in zip(states, files, strict=True)]


def read_student(path: str | Path, model: str | None) -> tuple[State | list, dict, Path]:
    """A student's file or folder -> tensors by name, or LoRA's list; its header, {} if not ours; the file.

    Raises UserError where the header is of another model, or damaged.
    """
    path = locate(path)
    path, *shards = weight_files(path / "unet" if (path / "unet").is_dir() else path,
                                 "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights", "turbo")
    content = unwrap(read_tensors(path))
    if not isinstance(content, list):
        content = named_tensors(content, path) | read_named(*shards)
        if all(key.isdigit() for key in content):           # a list that was converted to .safetensors
            content = [content[key] for key in sorted(content, key=int)]

    header = read_header(path) if is_safetensors(path) else {}
    for key, kind in HEADER.items():
        value = header.get(key)
        number = type(value) in (int, float) and 0 <= value < math.inf
        if value is not None and not (number if kind is float else isinstance(value, kind)):
            raise UserError(f"{path}: its header says {key} {value!r}; no student's file, or damaged")
    if model and header.get("model", model) != model:
        raise UserError(f"{path} is a student of {header['model']}, not of {model}; "
                        f"use --model {header['model']}")
    return content, header, path


def save_checkpoint(path: str | Path, tensors: State, header: dict) -> None:
    """Writes tensors and a JSON-able header to one .safetensors file; a crash leaves the old one."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", "config": json.dumps(header)})


def read_checkpoint(path: str | Path) -> tuple[State, dict]:
    """What save_checkpoint wrote: (tensors, header)."""
    tensors = read_tensors(path)
    check_numbers(tensors, path)
    return tensors, read_header(path)


def save_merged(path: str | Path, teacher: str | Path, unet: State) -> None:
    """Writes t2v_turbo_vc2.pt's layout: model.ckpt of VideoCrafter2 with a student's UNet in it."""
    teacher = locate(teacher)
    content = read_named(teacher / "model.ckpt" if teacher.is_dir() else teacher)
    rest = {key: x for key, x in content.items() if not key.startswith("diffusion_model.")}
    student = {f"model.diffusion_model.{key}": x.detach().cpu().contiguous()
               for key, x in to_public_names(unet).items()}
    with atomic(path) as temporary:
        torch.save({"state_dict": student | rest}, temporary)


def save_diffusers(folder: str | Path, unet: State, header: dict) -> None:
    """Writes a UNet of ModelScope's layout as a folder that diffusers' UNet3DConditionModel loads."""
    folder = Path(folder)
    config = {
        "_class_name": "UNet3DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
        "block_out_channels": [len(unet[f"input_blocks.{b}.0.conv1.weight"]) for b in (1, 4, 7, 10)],
        "cross_attention_dim": unet["input_blocks.1.1.attn2.k.weight"].shape[1],
        "attention_head_dim": len(unet["init_attn.0.proj_in.weight"]) // 8,         # it has eight heads
        "time_cond_proj_dim": 256 if "time_cond_proj.weight" in unet else None}
    save_checkpoint(folder / "diffusion_pytorch_model.safetensors", rename(unet, TO_DIFFUSERS), header)
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def fingerprint(tensors: State) -> str:
    """A cheap identity of a network: a digest of names, shapes, and 64 values of each tensor in bfloat16."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().flatten()
        places = torch.linspace(0, len(values) - 1, min(64, len(values)), dtype=torch.float64).long()
        sample = values[places.to(values.device)].bfloat16().float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {sample.tolist()}".encode())
    return digest.hexdigest()[:16]


# ---- filling a network -------------------------------------------------------------------------------------

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


class NoInit(TorchFunctionMode):
    """Draws no normal values: on the meta device they would import torch's compiler, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.normal_:
            return args[0]
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks made in this block have shapes, but no memory and no values; `fill` gives them theirs."""
    with torch.device("meta"), NoInit():
        yield


def check_numbers(tensors: State, source, finite: bool = False) -> None:
    """Raises UserError for integers, which a cast would hide, and on demand for NaN and infinity."""
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            raise UserError(f"{source}: {name} holds {x.dtype} numbers; "
                            "take the file as it was published, in float32, float16 or bfloat16")
        if finite and not x.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinity; a damaged file, or training diverged")


def first_of(names: list[str]) -> str:
    return f"{names[0]}, ..." if len(names) > 1 else names[0]


def trim(shape) -> tuple[int, ...]:
    """A shape without the ones at its end: (C, D, 1, 1) -> (C, D)."""
    return trim(shape[:-1]) if shape and shape[-1] == 1 else tuple(shape)


@torch.no_grad()
def fill(module: nn.Module, state: State, source, device="cpu", dtype: torch.dtype | None = None,
         lora: Pairs | None = None, allow_unused: bool = False) -> nn.Module:
    """Strictly fills a module made `without_memory`, tensor by tensor, merging LoRA on the way. In eval mode.

    state: {our name: tensor}; a 1x1 convolution may come as a linear layer and vice versa.
    source: the file, for messages. dtype: None = the file's. allow_unused: ignores tensors without a place.
    """
    expected, filled, name = module.state_dict(), {}, type(module).__name__
    missing, unused = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing:
        raise UserError(f"{source}: not the weights of this {name}, or not all: "
                        f"{len(missing)} of {len(expected)} tensors missing ({first_of(missing)})")
    if unused and not allow_unused:
        raise UserError(f"{source}: not the weights of this {name}, or not only: "
                        f"{len(unused)} not expected ({first_of(unused)})")
    check_numbers({key: state[key] for key in expected}, source)

    for key, like in expected.items():
        tensor, layer = state[key], key.removesuffix(".weight")
        if trim(tensor.shape) != trim(like.shape):
            raise UserError(f"{source}: {key} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        tensor = tensor.reshape(like.shape)
        if lora and layer in lora:
            up, down = lora[layer]
            tensor = tensor.float() + (up.float().flatten(1) @ down.float().flatten(1)).view(like.shape)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim(), torch.contiguous_format)
        filled[key] = tensor.to(device, dtype or tensor.dtype, copy=True).contiguous(memory_format=last)
    module.load_state_dict(filled, assign=True)
    return module.eval()


# ---- LoRA --------------------------------------------------------------------------------------------------

def lora_order(layers: Shapes) -> list[str]:
    """The layers of a T2V-Turbo LoRA list, one per (up, down) pair, which are those that a LoRA must have.

    VideoCrafter2, known by its frame rate: our order, without two layers that it has as Conv1d. ModelScope:
    diffusers' order, by part of its UNet, and inside a transformer attn2 before ff. So of `input_blocks.1.1`,
    diffusers' `down_blocks.0.attentions.0` and its part 9, attn1.q has rank (9, 1), attn2.q (9, 2), ff.proj
    (9, 3); input_blocks.1.2.proj_in, of `temp_attentions.0`, comes after all of them with (11, 0).
    """
    if "fps_embedding.0" in layers:
        return [name for name in layers if not name.startswith("init_attn.0.proj_")]
    parts = {ours: i for i, (_, ours) in enumerate(PARTS)}
    steps = ".proj_in", ".attn1", ".attn2", ".ff", ".proj_out"

    def rank(layer: str) -> tuple[int, int]:
        places = [place for place in parts if f"{layer}.".startswith(f"{place}.")]
        step = next((i for i, name in enumerate(steps) if name in layer), 0)
        return parts[max(places, key=len)] if places else -1, step

    return sorted(layers, key=rank)             # stable: within one rank our order


def lora_from_list(tensors: list[Tensor], layers: Shapes, source) -> Pairs:
    """[up, down, up, down, ...] -> {layer: (up, down)}, each shape checked against the layer of its place."""
    order = lora_order(layers)
    if len(tensors) != 2 * len(order):
        raise UserError(f"{source}: {len(tensors)} LoRA tensors, this UNet takes {2 * len(order)}")
    return check_lora(dict(zip(order, zip(tensors[::2], tensors[1::2]))), layers, source)


def is_lora(state: State) -> bool:
    """By names: LAYER.up of this project; lora_A, lora_down, lora_unet_LAYER of peft, diffusers, kohya."""
    return any(re.search(r"\.up$|lora|\.hada_|\.lokr_", key) for key in state)


def lora_from_dict(tensors: State, layers: Shapes, source) -> Pairs:
    """LoRA of this project, peft, diffusers or kohya -> {layer: (up, down)}, checked.

    Ours has all layers that it must have. The factor alpha / r of the others goes into `up`.
    """
    own = all(key.endswith((".up", ".down")) for key in tensors)
    underscores = {key[:-1].replace(".", "_"): layer for table in ([], TO_VIDEOCRAFTER, TO_DIFFUSERS)
                   for key, layer in rename({f"{layer}.": layer for layer in layers}, table).items()}
    matrices = {}
    for key, x in rename(rename(tensors, LORA), UNET).items():
        name, _, end = key.rpartition(".")
        layer = underscores.get(name.removeprefix("lora_unet_"), name)              # kohya's names
        if layer not in layers:
            raise UserError(f"{source}: LoRA for {layer}, a layer that this UNet does not have")
        if end not in ("up", "down", "alpha"):
            raise UserError(f"{source}: LoRA of a kind that is not read, with {end}; merge it first")
        matrices.setdefault(layer, {})[end] = x
    if odd := [layer for layer, ends in matrices.items() if not {"up", "down"} <= ends.keys()]:
        raise UserError(f"{source}: not a LoRA file: {odd[0]} does not have both matrices")

    lora, scale = {}, 1.0 if own else peft_scale(Path(source), tensors)
    for layer, ends in matrices.items():
        factor = ends["alpha"].item() / len(ends["down"]) if "alpha" in ends else scale
        lora[layer] = (ends["up"] if factor == 1 else factor * ends["up"], ends["down"])
    return check_lora(lora, layers, source, required=own)


def peft_scale(path: Path, tensors: State) -> float:
    """alpha / r: of peft in adapter_config.json beside the file, of diffusers in its metadata; else 1."""
    peft = any(key.startswith("base_model.") for key in tensors)
    path = path.with_name("adapter_config.json") if peft else path
    with reading(path, "a LoRA that says alpha"):
        if peft:
            config = json.loads(path.read_text())
        else:
            metadata = safetensors.safe_open(path, "np").metadata() if is_safetensors(path) else {}
            config = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
        config = {key.rpartition(".")[2]: value for key, value in config.items()}           # "unet.r" -> "r"
        if any(config.get(name) for name in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora")):
            raise UserError(f"{path}: a kind of LoRA that is not read; merge it into weights with peft first")
        return config.get("lora_alpha", 1) / config.get("r", 1)


def check_lora(lora: Pairs, layers: Shapes, source, required: bool = True) -> Pairs:
    """Raises UserError unless every required layer has LoRA, and all shapes are those of the layers.

    up (out, r, 1, ...) after down (r, in, kernel): their product has the shape of the layer's weight.
    """
    missing = [name for name in lora_order(layers) if name not in lora]
    if missing and required:
        raise UserError(f"{source}: not a LoRA of this UNet, or not all of it: "
                        f"{len(missing)} of {len(layers)} layers missing ({first_of(missing)})")
    for name, (up, down) in lora.items():
        shape, r = layers[name], len(down)
        if (trim(up.shape), trim(down.shape)) != (trim((shape[0], r)), trim((r, *shape[1:]))):
            raise UserError(f"{source}: LoRA of {name} has shapes {tuple(up.shape)} and {tuple(down.shape)}, "
                            f"expected {(shape[0], r)} and {(r, *shape[1:])}")
    for matrices in zip(*lora.values()):                # all up, and then all down
        check_numbers(dict(zip((f"LoRA of {name}" for name in lora), matrices)), source, finite=True)
    return lora


@torch.no_grad()
def scaled(lora: Pairs | None, scale: float, source) -> Pairs | None:
    """LoRA of another strength: 1 as trained, 0 the teacher. Raises UserError where there is no LoRA."""
    if lora is None and scale != 1:
        raise UserError(f"--lora-scale {scale:g}: {source} holds whole weights, no LoRA to scale")
    return lora and {name: (scale * up, down) for name, (up, down) in lora.items()}
