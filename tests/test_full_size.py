"""sample.py with full-size files of random weights in the public layouts, on the CPU, at a small resolution.

    pytest -s -m slow tests/test_full_size.py           # 4 to 7 GB of disk at a time
"""
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracles import diffusers, open_clip, transformers
from test_loading import public_list, shapes_of
from test_model import original_shapes, randn

import sample
from model import VAE, VC2
from plumbing import video


def filler(shapes):
    """Half-precision noise of any shape, quickly: pieces of one sheet."""
    sheet = randn(0, 40_000_000).mul_(0.02).half()
    state = {}
    for key, shape in shapes.items():
        n = torch.Size(shape).numel()
        values = sheet[:n] if n <= len(sheet) else sheet.repeat(n // len(sheet) + 1)[:n]
        norm = key.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_final.weight"))
        state[key] = values.view(shape) + norm
    return state


def write_videocrafter(folder, name="model.ckpt", guidance=False):
    """VideoCrafter2's model.ckpt, or with guidance the merged student's file."""
    with torch.device("meta"):
        tower = shapes_of(open_clip.CLIP(1024, dict(image_size=224, layers=1, width=64, patch_size=14),
                                         dict(width=1024, layers=24, heads=16)))
        auto = shapes_of(VAE())
    unet = original_shapes(replace(VC2, guidance=guidance))
    shapes = {"model.diffusion_model." + key: shape for key, shape in unet.items()}
    shapes |= {"first_stage_model." + key: shape for key, shape in auto.items()}
    shapes |= {"cond_stage_model.model." + key: shape for key, shape in tower.items() if "visual" not in key}
    torch.save({"state_dict": filler(shapes)}, folder / name)


def write_modelscope(folder):
    """ModelScopeT2V as diffusers keep it."""
    clip_config = transformers.CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                                              num_attention_heads=16, hidden_act="gelu")
    with torch.device("meta"):
        unet = diffusers.UNet3DConditionModel(attention_head_dim=64)
        text = transformers.CLIPTextModel(clip_config)
        auto = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    for file, network in (("unet/diffusion_pytorch_model", unet), ("vae/diffusion_pytorch_model", auto),
                          ("text_encoder/model", text)):
        (folder / file).parent.mkdir()
        safetensors.torch.save_file(filler(shapes_of(network)), folder / f"{file}.fp16.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["vc2", "vc2-merged", "vc2-lora", "vc2-v2", "ms-lora"])
def test_a_clip_from_full_size_files(tmp_path, layout):
    """64x128, 4 frames, 4 steps; seconds are printed."""
    turbo, config = tmp_path / "turbo.pt", replace(VC2, guidance=True)
    if layout == "ms-lora":
        write_modelscope(tmp_path)
        torch.save(public_list(replace(config, fps=False), 32), turbo)
    elif layout == "vc2-merged":
        write_videocrafter(tmp_path, "turbo.pt", guidance=True)
    else:
        write_videocrafter(tmp_path)
    if layout == "vc2-lora":
        torch.save(public_list(config, 64), turbo)
    if layout == "vc2-v2":
        torch.save(filler(original_shapes(replace(config, motion=True))), turbo)

    student = ["--turbo", turbo] if turbo.exists() else ["--method", "teacher"]
    teacher = ["--teacher", next(tmp_path.glob("model.*"), tmp_path)] if layout != "vc2-merged" else []
    options = "--steps 4 --height 64 --width 128 --frames 4 --dtype bfloat16".split()
    start = time.time()
    command = [sys.executable, "sample.py", "a horse on the moon", "--model", layout[:3].strip("-"), *student,
               *teacher, *options, "--out", tmp_path / "out.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(sample.__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"\n{layout}: loaded and sampled in {time.time() - start:.0f} s")
    assert video.read_clip(tmp_path / "out.mp4").shape == (3, 4, 64, 128)
    for file in tmp_path.rglob("*.*"):
        file.unlink()
