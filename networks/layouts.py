"""What is published: where the files are, and what the layers are called in them, as tables of names.

    VideoCrafter2         model.ckpt
    ModelScopeT2V         a diffusers folder (unet/ vae/ text_encoder/), or one with its three first files
    T2V-Turbo             t2v_turbo_vc2.pt: VideoCrafter2's layout with a student's UNet in it;
                          unet_lora.pt: a list of LoRA matrices without names, in the order of the layers
    T2V-Turbo-v2          unet_mg.pt, unet_no_mg.pt: a whole UNet
    this project          turbo.safetensors: a LoRA or a whole UNet, and a JSON header that says what it is
"""
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plumbing.errors import UserError

State = dict[str, Tensor]                       # {name: tensor}
Table = list[tuple[str, str | Callable]]        # rows of (regular expression, replacement)

# ---- public files ------------------------------------------------------------------------------------------

PUBLIC = {      # repository of huggingface.co, files; their sizes and licences: docs/training.md
    # teachers
    "vc2": "VideoCrafter/VideoCrafter2 model.ckpt",
    "ms": "ali-vilab/text-to-video-ms-1.7b unet/diffusion_pytorch_model.safetensors "
          "vae/diffusion_pytorch_model.safetensors text_encoder/model.safetensors",
    # students, and a small decoder
    "vc2-turbo": "jiachenli-ucsb/T2V-Turbo-VC2-Merged t2v_turbo_vc2.pt",
    "vc2-turbo-lora": "jiachenli-ucsb/T2V-Turbo-VC2 unet_lora.pt",
    "ms-turbo": "jiachenli-ucsb/T2V-Turbo-MS unet_lora.pt",
    "vc2-turbo-v2": "jiachenli-ucsb/T2V-Turbo-v2 unet_mg.pt",
    "vc2-turbo-v2-no-mg": "jiachenli-ucsb/T2V-Turbo-v2-no-MG unet_no_mg.pt",
    "taesd": "madebyollin/taesd taesd_decoder.safetensors",
    # rewards, and the word lists that two of them take
    "hpsv2": "xswu/HPSv2 HPS_v2.1_compressed.pt",
    "pickscore": "yuvalkirstain/PickScore_v1 model.safetensors",
    "clip": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K open_clip_pytorch_model.bin",
    "imagereward": "THUDM/ImageReward ImageReward.pt",
    "viclip": "OpenGVLab/ViCLIP ViClip-InternVid-10M-FLT.pth",
    "internvideo2": "OpenGVLab/InternVideo2-Stage2_1B-224p-f4 InternVideo2-stage2_1b-224p-f4.pt",
    "bert-base": "google-bert/bert-base-uncased vocab.txt",
    "bert-large": "google-bert/bert-large-uncased vocab.txt",
}


def fetch(name: str) -> Path:
    """A public file, downloaded on its first use; where there are several, the folder that holds them."""
    import huggingface_hub
    repository, *files = PUBLIC[name].split()
    for file in files:
        try:
            path = Path(huggingface_hub.hf_hub_download(repository, file))
        except Exception as error:                              # also an address that is none
            raise UserError(f"cannot download {file} of https://huggingface.co/{repository} "
                            f"({type(error).__name__}); fetch it by hand and give its path, or lay a "
                            "vocab.txt beside the weights") from error
    return path if len(files) == 1 else path.parents[file.count("/")]


# ---- names of the public layouts ---------------------------------------------------------------------------

# pairs (theirs, ours); what is inside a transformer is called the same in VideoCrafter2 and in diffusers
TRANSFORMER = [
    *((f"transformer_blocks.0.{attn}.to_{x}", f"{attn}.{x}") for attn in ("attn1", "attn2") for x in "qkv"),
    *((f"transformer_blocks.0.{attn}.to_out.0", f"{attn}.out") for attn in ("attn1", "attn2")),
    *((f"transformer_blocks.0.norm{i}", f"norm{i}") for i in (1, 2, 3)),
    ("transformer_blocks.0.ff.net.0.proj", "ff.proj"), ("transformer_blocks.0.ff.net.2", "ff.out")]
RESBLOCK = [                                                # VideoCrafter2's; the typo is in the files
    ("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "emb"), ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"), ("skip_connection", "skip"), ("temopral_conv", "temporal"), ("op", "conv")]
DIFFUSERS_RESBLOCK = [("time_emb_proj", "emb"), ("conv_shortcut", "skip")]


def diffusers_parts() -> list[tuple[str, str]]:
    """The parts of diffusers' UNet in its order, and ours: level i has our blocks 3i, 3i + 1 and 3i + 2."""
    layers = [("resnets", "0"), ("temp_convs", "0.temporal"), ("attentions", "1"), ("temp_attentions", "2")]
    parts = [("conv_in", "input_blocks.0.0.conv"), ("time_embedding.linear_1", "time_embed.0"),
             ("time_embedding.cond_proj", "time_cond_proj"), ("time_embedding.linear_2", "time_embed.2"),
             ("transformer_in", "init_attn.0")]
    for i in range(4):                                      # + 1, for our first block is conv_in
        parts += [(f"down_blocks.{i}.{name}.{j}", f"input_blocks.{3 * i + j + 1}.{place}")
                  for name, place in (layers if i < 3 else layers[:2]) for j in (0, 1)]
        parts += [(f"down_blocks.{i}.downsamplers.0", f"input_blocks.{3 * i + 3}.0")]
    for i in range(4):
        parts += [(f"up_blocks.{i}.{name}.{j}", f"output_blocks.{3 * i + j}.{place}")
                  for name, place in (layers if i > 0 else layers[:2]) for j in (0, 1, 2)]
        parts += [(f"up_blocks.{i}.upsamplers.0", f"output_blocks.{3 * i + 2}.{3 if i > 0 else 1}")]
    middle = {"resnets.0": "0", "resnets.1": "3", "temp_convs.0": "0.temporal", "temp_convs.1": "3.temporal",
              "attentions.0": "1", "temp_attentions.0": "2"}
    parts += [(f"mid_block.{name}", f"middle_block.{place}") for name, place in middle.items()]
    return parts + [("conv_norm_out", "out.0"), ("conv_out", "out.2")]


def rows(pairs: list[tuple[str, str]], place: str = "", inverse: bool = False) -> Table:
    """(theirs, ours) as rows of a table, or the inverse rows; place: what stands before the name."""
    pairs = [(ours, theirs) if inverse else (theirs, ours) for theirs, ours in pairs]
    return [(rf"({place})\.{re.escape(name)}\.", rf"\1.{other}.") for name, other in pairs]


IN_RESBLOCK = r"^(?:(?:in|out)put_blocks\.\d+\.0|middle_block\.[03])"
IN_TRANSFORMER = r"^(?:(?:in|out)put_blocks\.\d+\.[12]|middle_block\.[12]|init_attn\.0)"
PARTS = diffusers_parts()

UNET = [                                                    # any layout -> ours; our own names are kept
    *((rf"^{re.escape(name)}\.", f"{ours}.") for name, ours in PARTS),
    (r"^input_blocks\.0\.1\.", "init_attn.0."), (r"^(input_blocks\.\d+)\.op\.", r"\1.0.op."),   # ModelScope's
    (r"^input_blocks\.0\.0\.(?!conv)", "input_blocks.0.0.conv."),
    *rows(RESBLOCK), *rows(DIFFUSERS_RESBLOCK), *rows(TRANSFORMER)]
TO_DIFFUSERS = [                                            # longest parts first: temp_convs before resnets
    *rows(DIFFUSERS_RESBLOCK, IN_RESBLOCK, inverse=True), *rows(TRANSFORMER, IN_TRANSFORMER, inverse=True),
    *((rf"^{re.escape(ours)}\.", f"{name}.") for name, ours in sorted(PARTS, key=lambda row: -len(row[1])))]

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

OPENCLIP_BLOCKS = [                                         # open_clip -> networks/clip.py
    (r"transformer\.resblocks", "blocks"), (r"\.ln_(\d)", r".norm\1"), (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj", ".attn.proj"), (r"\.mlp\.c_fc", ".mlp.fc1"), (r"\.mlp\.c_proj", ".mlp.fc2")]

LORA = [                                                    # peft, diffusers, kohya -> LAYER.up, LAYER.down
    (r"^(?:base_model\.model\.|diffusion_model\.|unet\.|lora_unet_)+", ""),
    (r"\.lora(?:_linear_layer)?\.", "."),
    (r"\.(?:lora_A|lora_down|down)(?:\.default)?\.weight$", ".down"),
    (r"\.(?:lora_B|lora_up|up)(?:\.default)?\.weight$", ".up")]


def rename(state: dict, table: Table) -> dict:
    """Applies the rows of a table to every name, in order."""
    for pattern, name in table:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


def huggingface_text(state: State) -> State:
    """transformers' CLIPTextModel -> open_clip: renamed, and q, k, v stacked into one matrix."""
    state = rename(state, HUGGINGFACE_CLIP)
    for key in [key for key in state if "self_attn.q_proj" in key]:
        stacked = key.replace("self_attn.q_proj.", "attn.in_proj_")
        state[stacked] = torch.cat([state.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"])
    return state


def text_tower(state: State, layers: int) -> State:
    """CLIP's text tower by any names -> networks/clip.py's, without what `penultimate` does not run."""
    state = rename(huggingface_text(state), OPENCLIP_BLOCKS)
    unused = rf"visual\.|text_projection|logit_scale|attn_mask|embeddings\.position|blocks\.{layers - 1}\."
    return {key: x for key, x in state.items() if not re.match(unused, key)}
