"""Weights into networks: every public file layout ends in the modules of model.py, through a table of renamed parts.

    VideoCrafter2         model.ckpt
    ModelScopeT2V         a diffusers folder (unet/ vae/ text_encoder/), or a folder with the three original files
    T2V-Turbo             unet_lora.pt: a list of LoRA matrices without names, in the order of the layers
    T2V-Turbo-v2          unet_mg.pt, unet_no_mg.pt: a whole UNet
    this project          *.safetensors: a LoRA or a whole UNet, and a JSON header that says what it is

Loading is strict: no tensor may be missing, left over or misshaped, and a wrong file ends in a ValueError of one line.
Networks are built without memory ("meta") and filled tensor by tensor from memory-mapped files, so that loading takes
little more memory than the model. Files are data, never code: pickles are read with weights_only.
"""
import json
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from model import FAMILIES, VAE, Models, TextEncoder, UNet3D, condition_layers

# --------------------------------------------------------------------------------------- rename tables

ATTENTION = [                                               # the same in VideoCrafter2 and diffusers
    (r"transformer_blocks\.0\.", ""), (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".out."),
    (r"ff\.net\.0\.proj", "ff.proj"), (r"ff\.net\.2", "ff.out")]

VIDEOCRAFTER = [
    (r"in_layers\.0", "norm1"), (r"in_layers\.2", "conv1"), (r"emb_layers\.1", "emb"),
    (r"out_layers\.0", "norm2"), (r"out_layers\.3", "conv2"), (r"skip_connection", "skip"),
    (r"temopral_conv", "temporal"),                         # the typo is in the files
    (r"input_blocks\.0\.0\.", "input_blocks.0.0.conv."), (r"\.op\.", ".conv."), *ATTENTION]

MODELSCOPE_ORIGINAL = [                                     # as above, but for two names
    (r"input_blocks\.0\.1\.", "init_attn.0."), (r"(input_blocks\.\d+)\.op\.", r"\1.0.op."), *VIDEOCRAFTER]


def diffusers_block(m):
    """up_blocks.1.attentions.2. -> output_blocks.5.1.: diffusers counts blocks per level, VideoCrafter2 counts all."""
    side, level, kind, index = m[1], int(m[2] or 0), m[3], int(m[4])
    slot = {"resnets": "0", "temp_convs": "0.temporal", "attentions": "1", "temp_attentions": "2", "downsamplers": "0",
            "upsamplers": "1" if level == 0 else "3"}[kind]             # no attention on the coarsest level
    if side == "mid":
        return f"middle_block.{slot.replace('0', str(3 * index), 1)}."
    block = 3 * level + (2 if "samplers" in kind else index)            # resampling: in the last of a level's three
    return f"input_blocks.{block + 1}.{slot}." if side == "down" else f"output_blocks.{block}.{slot}."


DIFFUSERS = [
    (r"^(down|up|mid)_blocks?(?:\.(\d))?\.(\w+)\.(\d)\.", diffusers_block),
    (r"^conv_in", "input_blocks.0.0.conv"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^time_embedding\.cond_proj", "time_cond_proj"), (r"^transformer_in\.", "init_attn.0."),
    (r"time_emb_proj", "emb"), (r"conv_shortcut", "skip"), *ATTENTION]

DIFFUSERS_VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"), (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"), (r"to_out\.0|proj_attn", "proj_out"),                   # two generations of names
    (r"attn_1\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r"attn_1.\1."),
    (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut")]

HUGGINGFACE_CLIP = [
    (r"^text_model\.", ""), (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"), (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"), (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn\.out_proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj")]

MODELSCOPE_FILES = ["text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"]
UNUSED_TEXT = r"visual\.|text_projection|logit_scale|attn_mask|embeddings\.position_ids|"


def rename(state, table):
    for pattern, name in table:
        state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    return state


def huggingface_text(state):
    """transformers' CLIPTextModel -> open_clip: renamed, and q, k, v stacked into one matrix."""
    state = rename(state, HUGGINGFACE_CLIP)
    for key in [key for key in state if "self_attn.q_proj" in key]:
        stacked = key.replace("self_attn.q_proj.", "attn.in_proj_")
        state[stacked] = torch.cat([state.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"])
    return state


def part(state, prefix):
    """What lies under a prefix, without it."""
    return {key.split(prefix, 1)[1]: tensor for key, tensor in state.items() if prefix in key}


# ---------------------------------------------------------------------------------------------- files

class Inert:
    """Stands in for whatever a training framework pickled beside its tensors. Does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_tensors(path):
    """Content of a .safetensors or torch file, memory-mapped where possible: a dict or, unet_lora.pt, a list."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        zipped = zipfile.is_zipfile(path)                   # torch's format since 2020, the one that can be mapped
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (safetensors.SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError,
            OSError) as error:
        raise ValueError(f"{path}: not a weight file, or a truncated one ({path.stat().st_size:,} bytes; "
                         f"{type(error).__name__})") from error
    return content.get("state_dict", content) if isinstance(content, dict) else content


def save_checkpoint(path, tensors, header):
    """Writes tensors and a JSON-able header to one .safetensors file, atomically: a crash leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.torch.save_file(tensors, scratch, {"config": json.dumps(header)})
    with open(scratch, "rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_header(path):
    """The JSON header of a .safetensors file of ours; {} where someone else wrote the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("config", "{}"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a weight file, or a truncated one ({error})") from error


def read_checkpoint(path):
    """What save_checkpoint wrote: (tensors, header)."""
    return read_tensors(path), read_header(path)


def fill(module, state, source, device="cpu", dtype=None, lora=None):
    """Strictly fills a module built on the meta device, tensor by tensor, merging LoRA matrices on the way.

    state: {our name: tensor}; a 1x1 convolution may come as a linear layer and vice versa. lora: {layer: (up, down)}.
    source: the file, for messages.
    """
    lora, filled, wanted = dict(lora or {}), {}, module.state_dict()
    missing, foreign = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or foreign:
        kind = type(module).__name__
        raise ValueError(f"{source}: not the weights of this {kind}, or not all: " + "; ".join(
            f"{len(keys)} {what} ({keys[0]}{', ...' if keys[1:] else ''})"
            for keys, what in ((missing, f"of {len(wanted)} tensors missing"), (foreign, "not expected")) if keys))
    for key, like in wanted.items():
        tensor, shape = state[key], trim(like.shape)
        if trim(tensor.shape) != shape:
            raise ValueError(f"{source}: {key} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        tensor = tensor.reshape(like.shape)
        if key.removesuffix(".weight") in lora:
            up, down = lora.pop(key.removesuffix(".weight"))
            tensor = tensor.float() + (up.float().flatten(1) @ down.float().flatten(1)).view(like.shape)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim(), torch.contiguous_format)
        filled[key] = tensor.to(device, dtype or tensor.dtype, copy=True).contiguous(memory_format=last)
    assert not lora, f"LoRA for layers that do not exist: {list(lora)}"
    module.load_state_dict(filled, assign=True)
    return module.eval()


def trim(shape):
    """A shape without the ones at its end: (C, D, 1, 1) -> (C, D)."""
    shape = list(shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


# ----------------------------------------------------------------------------------------------- LoRA

def lora_shapes(config):
    """{layer: shape of its weight} of all layers that take LoRA, in the order in which the UNet registers them."""
    with torch.device("meta"):
        unet = getattr(config, "network", UNet3D)(config)
    return {name: m.weight.shape for name, m in unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d, nn.Conv3d)}


def lora_order(config, layout):
    """The layers behind a T2V-Turbo LoRA list, one per (up, down) pair.

    "vc2": VideoCrafter2's order, which is ours as well, without the two layers that it has as Conv1d, a class that the
    released code passes over. "ms": diffusers' order.
    """
    names = list(lora_shapes(config))
    if layout == "vc2":
        return [name for name in names if not name.startswith("init_attn.0.proj_")]
    return sorted(names, key=lambda name: diffusers_rank(name, config))             # stable


def diffusers_rank(name, config):
    """Sorts layers as diffusers lists them: the middle after the way up; in a level, all ResBlocks, all temporal
    convolutions, all transformers over space, all over time (feed-forward after both attentions), resampling."""
    def first(patterns):
        return next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), len(patterns))

    section = first([r"^input_blocks\.0", r"^time_embed\.0", r"^time_cond", r"^time_embed\.2",
                     r"^init", r"^input", r"^output", r"^middle"])
    block = re.match(r"(in|out)put_blocks\.(\d+)", name)
    block = int(block[2]) - (block[1] == "in") if block else 0
    kind = first([r"\.[03]\.(conv[12]|emb|skip)$", r"temporal", r"\.1\.(proj|attn|ff)", r"\.[02]\.(proj|attn|ff)"])
    inside = first([r"proj_in", r"attn1", r"attn2", r"ff", r"proj_out"])
    return section, block // (config.res_blocks + 1), kind, block, inside


def layout_of(config):
    return "vc2" if config.fps else "ms"


def lora_from_list(tensors, config, source):
    """[up, down, up, down, ...] -> {layer: (up, down)}, every shape checked against the layer its place implies."""
    order = lora_order(config, layout_of(config))
    if len(tensors) != 2 * len(order):
        raise ValueError(f"{source}: {len(tensors)} LoRA tensors, this UNet takes {2 * len(order)}")
    lora = dict(zip(order, zip(tensors[::2], tensors[1::2], strict=True), strict=True))
    return check_lora(lora, config, source)


def check_lora(lora, config, source):
    """up (out, r, 1, ...) after down (r, in, kernel): their product has the shape of the layer's weight."""
    shapes = lora_shapes(config)
    for name, (up, down) in lora.items():
        if name not in shapes:
            raise ValueError(f"{source}: LoRA for {name}, a layer that this UNet does not have")
        shape, r = shapes[name], down.shape[0]
        expected = (shape[0], r, *[1] * len(shape[2:])), (r, *shape[1:])
        if (tuple(up.shape), tuple(down.shape)) != expected:
            raise ValueError(f"{source}: LoRA of {name} has shapes {tuple(up.shape)} and {tuple(down.shape)}, "
                             f"expected {expected[0]} and {expected[1]}")
    return lora


def lora_to_list(lora, config):
    """The inverse of lora_from_list, for torch.save: what the released code reads as unet_lora.pt."""
    order = lora_order(config, layout_of(config))
    for name in sorted(set(order) - lora.keys()):
        raise ValueError(f"there is no LoRA for {name}, which the public list must have")
    for name in sorted(lora.keys() - set(order)):
        if lora[name][0].any():
            raise ValueError(f"the public LoRA list has no place for {name}; export merged weights instead")
    return [matrix.detach().float().cpu().contiguous() for name in order for matrix in lora[name]]


def split_lora(tensors):
    """{layer.up: ..., layer.down: ...}, as in our own files -> {layer: (up, down)}"""
    return {key[:-3]: (tensors[key], tensors[key[:-2] + "down"]) for key in tensors if key.endswith(".up")}


def lora_from_dict(tensors, config, source):
    """Our own files' LoRA -> {layer: (up, down)}, checked."""
    if {key.rpartition(".")[0] + end for key in tensors for end in (".up", ".down")} != set(tensors):
        raise ValueError(f"{source}: not a LoRA file: its tensors are not pairs NAME.up, NAME.down")
    return check_lora(split_lora(tensors), config, source)


# -------------------------------------------------------------------------------------------- models

PUBLIC = {                                  # name: hub repository, files
    "vc2": ("VideoCrafter/VideoCrafter2", ["model.ckpt"]),
    "ms": ("ali-vilab/text-to-video-ms-1.7b", ["unet/diffusion_pytorch_model.safetensors",
                                               "vae/diffusion_pytorch_model.safetensors",
                                               "text_encoder/model.safetensors"]),
    "vc2-turbo": ("jiachenli-ucsb/T2V-Turbo-VC2", ["unet_lora.pt"]),
    "ms-turbo": ("jiachenli-ucsb/T2V-Turbo-MS", ["unet_lora.pt"]),
    "vc2-turbo-v2": ("jiachenli-ucsb/T2V-Turbo-v2", ["unet_mg.pt"]),
    "vc2-turbo-v2-no-mg": ("jiachenli-ucsb/T2V-Turbo-v2-no-MG", ["unet_no_mg.pt"]),
}


def fetch(name):
    """Path of a public file (of the first, where a model has several), downloaded on its first use."""
    import huggingface_hub
    repository, files = PUBLIC[name]
    try:
        return [huggingface_hub.hf_hub_download(repository, file) for file in files][0]
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(f"cannot download {', '.join(files)} of https://huggingface.co/{repository} "
                         f"({type(error).__name__}); fetch it by hand and give its path") from error


def read_dict(path):
    content = read_tensors(path)
    if isinstance(content, list):
        raise ValueError(f"{path}: a list of LoRA matrices, not a whole model; that goes with --turbo")
    return content


def one_of(folder, stems):
    """The weight file of a diffusers folder: .safetensors before .bin, full precision before .fp16."""
    kinds = [".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"]
    names = [stem + kind for kind in kinds for stem in stems]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: none of {', '.join(names)} is there")


def read_teacher(path, text_layers):
    """A teacher's file or folder -> three pairs: tensors of UNet, VAE, text under our names, and their file."""
    path = Path(path)
    path = path / "model.ckpt" if (path / "model.ckpt").is_file() else path
    if (path / MODELSCOPE_FILES[0]).is_file():
        files = [path / name for name in MODELSCOPE_FILES]
        unet, vae, text = map(read_dict, files)
        unet, vae = rename(unet, MODELSCOPE_ORIGINAL), part(vae, "first_stage_model.")
    elif path.is_dir():
        weights = ["diffusion_pytorch_model"]
        files = [one_of(path / "unet", weights), one_of(path / "vae", weights),
                 one_of(path / "text_encoder", ["model", "pytorch_model"])]
        unet, vae, text = map(read_dict, files)
        unet, vae, text = rename(unet, DIFFUSERS), rename(vae, DIFFUSERS_VAE), huggingface_text(text)
    else:
        files, content = [path] * 3, read_dict(path)
        unet = rename(part(content, "model.diffusion_model."), VIDEOCRAFTER)
        vae, text = part(content, "first_stage_model."), part(content, "cond_stage_model.model.")
    last = rf"transformer\.resblocks\.{text_layers - 1}\."             # the tower's last layer is not run
    text = {key: x for key, x in text.items() if not re.match(UNUSED_TEXT + last, key)}
    return list(zip((unet, vae, text), files, strict=True))


def read_turbo(path, config):
    """Turbo weights -> (config of their UNet, its whole state or None, LoRA or None, header)"""
    header = {"method": "turbo", "w_min": 5.0, "w_max": 15.0}
    if Path(path).suffix == ".safetensors":
        content, header = read_checkpoint(path)
    else:
        content = read_tensors(path)
    config = replace(config, guidance=True)
    if isinstance(content, list):
        return config, None, lora_from_list(content, config, path), header | {"steps": 50}
    if any(key.endswith(".up") for key in content):
        return config, None, lora_from_dict(content, config, path), header
    if Path(path).suffix != ".safetensors":
        content, header = rename(content, VIDEOCRAFTER), header | {"steps": 200}
    return replace(config, motion="motion_cond_proj.weight" in content), content, None, header


def load(model, teacher=None, turbo=None, device="cpu", dtype=torch.float32, **conditions):
    """The networks of "vc2" or "ms": the teacher's, or with turbo weights the student's (LoRA merged). In eval mode.

    teacher: file or folder; None = download. turbo: file, or a key of PUBLIC to download; None = the teacher alone.
    conditions: guidance=True and motion=True add the layers that a student needs, as it starts.
    """
    if model not in FAMILIES:
        raise ValueError(f"no model {model!r}; there are {', '.join(FAMILIES)}")
    family, header, state, lora = FAMILIES[model], {}, None, None
    config = replace(family.unet, **conditions)
    if turbo is not None:
        turbo = fetch(turbo) if turbo in PUBLIC else turbo
        config, state, lora, header = read_turbo(turbo, config)
    if teacher is None:
        teacher = fetch(model)
        teacher = Path(teacher).parent.parent if model == "ms" else teacher         # its folder
    parts = read_teacher(teacher, family.text.layers)
    if state is None:
        new = {f"{name}.weight": layer.weight.data for name, layer in condition_layers(config).items()}
        state, turbo = new | parts[0][0], parts[0][1]
    with torch.device("meta"):
        unet, vae, text = UNet3D(config), VAE(family.vae), TextEncoder(family.text)
    fill(unet, state, turbo, device, dtype, lora)
    fill(vae, *parts[1], device, dtype).requires_grad_(False)
    fill(text, *parts[2], device, dtype).requires_grad_(False)
    return Models(model, unet, vae, text, family.fps, family.height, family.width, family.frames, header)
