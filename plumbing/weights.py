"""Weight files: reading and writing them, strict filling of networks, LoRA (layouts: networks/layouts.py).

The names of its tensors decide which layout a file has, not its own name. Networks are made without memory,
and filled tensor by tensor from memory-mapped files. Files are data, never code.
"""
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from pickle import UnpicklingError
from unittest.mock import patch

import safetensors.torch
import torch
from torch import Tensor, nn

from networks import layouts
from networks.layouts import State, rename
from plumbing.errors import UserError, reading
from plumbing.files import atomic, is_safetensors, read_header

Shapes = dict[str, torch.Size]                  # {layer: shape of its weight}, in the network's order

# ---- reading and writing -----------------------------------------------------------------------------------

WRAPPERS = ("ema", "ema_state_dict", "model_ema", "params_ema", "state_dict", "model_state_dict", "module",
            "model", "unet")
PREFIXES = r"^(?:(?:module|model|_orig_mod)\.)+|\b_orig_mod\."      # DataParallel, Lightning, torch.compile
KINDS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".fp16.safetensors",
         ".safetensors.index.fp16.json", ".fp16.bin", ".bin.index.fp16.json", ".pt")
STUDENTS = ("turbo", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights", "t2v_turbo_vc2",
            "unet_lora", "unet_mg", "unet_no_mg")           # names of files, a run's own first
HEADER = "t2v_turbo"                                        # beside state_dict in a merged file of ours
MODELSCOPE = "text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"


class Inert:
    """Stands in for whatever a training framework pickled beside its tensors. Does nothing."""

    def __init__(self, *args, **kwargs): ...
    __setstate__ = __init__


def read_tensors(*paths: str | Path) -> State:
    """{name: tensor} of a weight file or its shards, memory-mapped where possible, without wrappers and
    prefixes. The names in a list are its numbers, as in a list that was converted to .safetensors."""
    state = {}
    for path in (Path(path).expanduser() for path in paths):
        with reading(path, "a weight file"):
            content = unwrap(read_file(path))
            entries = content.items() if isinstance(content, dict) else enumerate(content)
            tensors = {str(key): x for key, x in entries if isinstance(x, Tensor)}
        if not tensors:
            raise UserError(f"{path}: holds no named tensors; it is not a weight file")
        renamed = rename(tensors, [(PREFIXES, "")])
        if len(renamed) < len(tensors):
            raise UserError(f"{path}: some of its weights are there twice, with a prefix and without it")
        state |= renamed
    return state


def read_file(path: Path):
    """Whatever a file of safetensors or torch holds; of what is no tensor nothing runs."""
    if is_safetensors(path):
        return safetensors.torch.load_file(path)
    zipped = zipfile.is_zipfile(path)                       # torch's format since 1.6
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else ()
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (UnpicklingError, OSError) as error:             # whose texts advise to run the code, or nothing
        raise UserError(f"{path} is not a weight file, is truncated, or holds code, which is not run; "
                        "take the file as it was published") from error


def unwrap(content):
    """Tensors, or a list, out of what training programs put around them; where both are there, the EMA's."""
    for name in WRAPPERS if isinstance(content, dict) else ():
        inner = content.get(name)
        if isinstance(inner, dict) and any(isinstance(x, (Tensor, dict)) for x in inner.values()):
            return unwrap(inner)
    return content


def under(state: State, prefix: str) -> State:
    """What lies under a prefix."""
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def locate(path: str | Path) -> Path:
    """A path, ~ expanded; in the hub's cache, for a model's folder, its snapshot `main` or the newest."""
    path = Path(path).expanduser()
    main = path / "refs" / "main"
    name = main.read_text().strip() if main.is_file() else "*"
    return max(path.glob(f"snapshots/{name}"), key=os.path.getmtime, default=path)


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


def read_teacher(path: str | Path, text_layers: int) -> tuple[State, State, State]:
    """A teacher's file or folder -> tensors of UNet, VAE and text encoder under our names."""
    path = locate(path)
    path = path / "model.ckpt" if (path / "model.ckpt").is_file() else path

    if not path.is_dir():
        content = read_tensors(path)
        prefixes = "diffusion_model.", "first_stage_model.", "cond_stage_model.model."
        unet, vae, text = (under(content, prefix) for prefix in prefixes)
    elif (path / MODELSCOPE[0]).is_file():
        unet, vae, text = (read_tensors(path / name) for name in MODELSCOPE)
        vae = under(vae, "first_stage_model.") or vae
    elif (path / "unet").is_dir():
        unet, vae = (read_tensors(*weight_files(path / folder, "diffusion_pytorch_model"))
                     for folder in ("unet", "vae"))
        text = read_tensors(*weight_files(path / "text_encoder", "model", "pytorch_model"))
    else:
        raise UserError(f"{path}: no teacher: neither model.ckpt nor unet/, vae/, text_encoder/")
    return (rename(unet, layouts.UNET), rename(vae, layouts.DIFFUSERS_VAE),
            layouts.text_tower(text, text_layers))


def read_student(path: str | Path, model: str | None) -> tuple[State, dict, Path]:
    """A student's file or folder -> tensors by name; its header, {} if not ours; the file. Raises UserError
    where the header is of another model."""
    path = locate(path)
    kinds = [stem for stem in STUDENTS if any((path / (stem + kind)).is_file() for kind in KINDS)]
    kinds += ["unet"] if (path / "unet").is_dir() else []
    if len(kinds) > 1 and kinds[0] != "turbo":              # beside it are the same student's other layouts
        raise UserError(f"{path} holds several students: {', '.join(kinds)}; name one file or folder of them")
    folder, stems = (path / "unet", STUDENTS) if kinds == ["unet"] else (path, kinds[:1] or STUDENTS)
    file, *shards = weight_files(folder, *stems)

    tensors, header = read_tensors(file, *shards), read_header(file)
    if not is_safetensors(file) and isinstance(content := read_file(file), dict):
        header = content.get(HEADER, {})                    # of `save_merged`
    if model and header.get("model", model) != model:
        raise UserError(f"{path} is a student of {header['model']}, not of {model}; "
                        f"use --model {header['model']}")
    return tensors, header, file


def save(path: str | Path, tensors: State, header: dict) -> None:
    """Writes tensors and a JSON-able header to one .safetensors file; a crash leaves the old one."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"config": json.dumps(header)})


def save_merged(path: str | Path, teacher: str | Path | None, unet: State, header: dict) -> None:
    """Writes t2v_turbo_vc2.pt's layout: model.ckpt of VideoCrafter2 (teacher: that file, or its folder; None:
    the public one) with a student's UNet in it, and beside the weights the student's header."""
    teacher = locate(teacher or layouts.fetch("vc2"))
    published = read_tensors(teacher / "model.ckpt" if teacher.is_dir() else teacher)
    names = rename({key: key for key in under(published, "diffusion_model.")}, layouts.UNET)  # {ours: theirs}
    content = {key: x for key, x in published.items() if not key.startswith("diffusion_model.")}
    for key, x in unet.items():
        name = f"diffusion_model.{names.get(key, key)}"     # what only students have is called the same
        shape = published.get(name, x).shape                # of a linear layer perhaps (out, in, 1)
        content[f"model.{name}"] = x.detach().cpu().reshape(shape).contiguous()
    with atomic(path) as temporary:
        torch.save({"state_dict": content, HEADER: header}, temporary)


def save_diffusers(folder: str | Path, unet: State, header: dict) -> None:
    """Writes a student of ModelScope as a folder that diffusers' UNet3DConditionModel loads."""
    folder = Path(folder)
    config = {                                              # besides diffusers' defaults
        "_class_name": "UNet3DConditionModel", "time_cond_proj_dim": 256,
        "block_out_channels": [len(unet[f"input_blocks.{b}.0.conv1.weight"]) for b in (1, 4, 7, 10)],
        "cross_attention_dim": unet["input_blocks.1.1.attn2.k.weight"].shape[1],
        "attention_head_dim": len(unet["init_attn.0.proj_in.weight"]) // 8}         # it has eight heads
    save(folder / "diffusion_pytorch_model.safetensors", rename(unet, layouts.TO_DIFFUSERS), header)
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def fingerprint(tensors: State, network: nn.Module) -> str:
    """A cheap identity of a network's weights: a digest of names, shapes, and 64 values of each in bfloat16.
    Layers of the network that the tensors lack do not count."""
    digest = sha256()
    for name, like in sorted(network.state_dict().items()):
        if name in tensors:
            x = tensors[name].flatten()
            places = torch.linspace(0, x.numel() - 1, min(64, x.numel()), dtype=torch.float64).long()
            digest.update(f"{name} {tuple(like.shape)} {x[places].bfloat16().tolist()}".encode())
    return digest.hexdigest()[:16]


# ---- filling a network -------------------------------------------------------------------------------------

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}       # of weights, by their dimensions


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks made in this block have shapes, but no memory and no values; `fill` gives them theirs.

    Drawing normal values on the meta device would import torch's compiler, which takes a second."""
    with torch.device("meta"), patch.object(nn.init, "normal_", lambda x, **options: x):
        yield


def check_numbers(tensors: State, source, finite: bool = False) -> None:
    """Raises UserError for integers and floats of 8 bits, which a cast would hide, and on demand for NaN and
    infinity."""
    for name, x in tensors.items():
        if not x.is_floating_point() or x.itemsize < 2:
            raise UserError(f"{source}: {name} holds {x.dtype} numbers; "
                            "take the file as it was published, in float32, float16 or bfloat16")
        if finite and not x.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinity; a damaged file, or training diverged")


def check_shape(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises UserError for another shape but for ones at its end: a linear layer may be a 1x1 convolution."""
    if any(a != b for a, b in zip_longest(x.shape, shape, fillvalue=1)):
        raise UserError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


@torch.no_grad()
def fill(module: nn.Module, state: State, source, device="cpu", dtype: torch.dtype | None = None,
         lora: State | None = None, allow_unused: bool = False) -> nn.Module:
    """Strictly fills a module made `without_memory`, tensor by tensor, merging LoRA on the way. In eval mode.

    source: the file, for messages. dtype: None = the file's. allow_unused: skips tensors without a place."""
    expected, filled = module.state_dict(), {}
    missing, unused = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unused and not allow_unused:
        raise UserError(f"{source}: not the weights of this {type(module).__name__}, or not all: "
                        f"{len(missing)} of {len(expected)} tensors missing, {len(unused)} not expected "
                        f"({(missing + unused)[0]}, ...)")
    check_numbers({key: state[key] for key in expected}, source)

    for key, like in expected.items():
        tensor, layer = state[key], key.removesuffix(".weight")
        check_shape(tensor, like.shape, f"{source}: {key}")
        tensor = tensor.reshape(like.shape)
        if lora and f"{layer}.up" in lora:
            up, down = (lora[f"{layer}.{end}"].float().flatten(1) for end in ("up", "down"))
            tensor = tensor.float() + (up @ down).view(like.shape)
        order = FORMATS.get(like.dim(), torch.contiguous_format)
        filled[key] = tensor.to(device, dtype or tensor.dtype, copy=True).contiguous(memory_format=order)
    module.load_state_dict(filled, assign=True)
    return module.eval()


# ---- LoRA --------------------------------------------------------------------------------------------------

def lora_order(layers: Shapes) -> list[str]:
    """The layers of a T2V-Turbo LoRA list, one per (up, down) pair, which are those that a LoRA must have.

    VideoCrafter2, known by its frame rate: our order, without two layers that it has as Conv1d. ModelScope:
    diffusers' order, by part of its UNet, and inside a transformer attn2 before ff."""
    if "fps_embedding.0" in layers:
        return [name for name in layers if not name.startswith("init_attn.0.proj_")]
    parts = {ours: i for i, (_, ours) in enumerate(layouts.PARTS)}
    steps = ".proj_in", ".attn1", ".attn2", ".ff", ".proj_out"

    def rank(layer: str) -> tuple[int, int]:
        places = [place for place in parts if f"{layer}.".startswith(f"{place}.")]
        step = next((i for i, name in enumerate(steps) if name in layer), 0)
        return parts[max(places, key=len)] if places else -1, step

    return sorted(layers, key=rank)             # stable: within one rank our order


def is_lora(state: State) -> bool:
    """By names: T2V-Turbo's numbers; LAYER.up of this project; lora_A, lora_down, lora_unet_LAYER of peft,
    diffusers, kohya."""
    return any(re.search(r"^\d+$|\.up$|lora|\.hada_|\.lokr_", key) for key in state)


def read_lora(tensors: State, layers: Shapes, source, strength: float = 1.0) -> State:
    """LoRA by any names -> {LAYER.up: (out, r, 1, ...), LAYER.down: (r, in, kernel)}. Its alpha / r and the
    strength (1 as trained, 0 the teacher) go into `up`."""
    if all(key.isdigit() for key in tensors):
        names = [f"{layer}.{end}" for layer in lora_order(layers) for end in ("up", "down")]
        if len(tensors) != len(names):
            raise UserError(f"{source}: {len(tensors)} LoRA tensors, this UNet takes {len(names)}")
        tensors = {name: tensors[str(i)] for i, name in enumerate(names)}

    # T2V-Turbo's list and our own files hold all layers, other programs' those that they were told
    lora_of, scale = by_layer(tensors, layers, source), peft_scale(Path(source), tensors)
    missing = [layer for layer in lora_order(layers) if layer not in lora_of]
    if missing and all(key.endswith((".up", ".down")) for key in tensors):
        raise UserError(f"{source}: not a LoRA of this UNet, or not all of it: "
                        f"{len(missing)} of {len(layers)} layers missing ({missing[0]}, ...)")

    # two matrices that fit the layer
    lora = {}
    for layer, matrices in lora_of.items():
        what, alpha = f"{source}: LoRA of {layer}", matrices.pop("alpha", None)
        if matrices.keys() != {"up", "down"}:
            raise UserError(f"{what} holds {', '.join(sorted(matrices))}; it takes up and down, and other "
                            "kinds are merged into weights first")
        check_numbers(matrices, what, finite=True)
        (out, *rest), r = layers[layer], len(matrices["down"])
        check_shape(matrices["up"], (out, r), f"{what}: up")
        check_shape(matrices["down"], (r, *rest), f"{what}: down")

        if alpha is not None and (alpha.numel() > 1 or not alpha.isfinite()):
            raise UserError(f"{what}: its alpha is not one number")
        factor = strength * (scale if alpha is None else alpha.item() / r)
        lora |= {f"{layer}.up": factor * matrices["up"].float(), f"{layer}.down": matrices["down"]}
    return lora


def by_layer(tensors: State, layers: Shapes, source) -> dict[str, State]:
    """LoRA of this project, peft, diffusers or kohya -> {layer: {"up", "down", perhaps "alpha": tensor}}."""
    # kohya's names of layers: diffusers', with underscores for dots
    names = rename({f"{layer}.": layer for layer in layers}, layouts.TO_DIFFUSERS)
    kohya = {name[:-1].replace(".", "_"): layer for name, layer in names.items()}

    matrices = {}
    for key, x in rename(tensors, layouts.LORA + layouts.UNET).items():
        name, _, end = key.rpartition(".")
        layer = kohya.get(name, name)
        if layer not in layers:
            raise UserError(f"{source}: LoRA for {layer}, a layer that this UNet does not have")
        matrices.setdefault(layer, {})[end] = x
    return matrices


def peft_scale(path: Path, tensors: State) -> float:
    """alpha / r: of diffusers in the file's metadata, of peft in adapter_config.json beside it; else 1."""
    names, config = " ".join(tensors), read_header(path, "lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if "base_model." in names or not config and ".lora_A." in names and beside.is_file():
        path, config = beside, None
    with reading(path, "a LoRA that says alpha"):
        config = json.loads(path.read_text()) if config is None else config
        config = {key.removeprefix("unet."): value for key, value in config.items() if "encoder" not in key}
        kinds = "alpha_pattern", "rank_pattern", "use_dora", "use_rslora", "fan_in_fan_out"
        start = str(config.get("init_lora_weights")).lower()
        of_residual = start.startswith(("pissa", "olora", "corda", "loftq"))    # not of the weight itself
        if config.get("peft_type", "LORA") != "LORA" or of_residual or any(map(config.get, kinds)):
            raise UserError(f"{path}: a kind of LoRA that is not read; merge it into weights with peft first")
        return config["lora_alpha"] / config["r"] if config else 1.0
