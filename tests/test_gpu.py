"""gpu.py is for machines with a GPU; here it runs with tiny networks on the CPU, so that it starts there."""

import gpu
import torch

import shapes
from plumbing import run
from shapes import pretrain


def test_the_program_for_gpus_runs(capsys):
    """Every section has its rows, the checks hold, and the step's peak is the simulated one."""
    assert gpu.main(["--tiny", "--device", "cpu", "--repeat", "1", "--minutes", "60"]) == 0
    text = capsys.readouterr().out
    lines = [line.split("|") for line in text.splitlines() if line.count("|") == 8]
    rows = {cells[1].strip(): cells[-2].strip() for cells in lines[2:]}
    for name in ("error of float32 UNet against a CPU", "error of bf16 VAE", "clip in 4 steps",
                 "training step", "error of compiled UNet",
                 "clip in 4 steps, compiled; floor of its passes", "decoding, NHWC",
                 "UNet pass, without it", "attention over time, cudnn, pixels as heads",
                 "float32 UNet pass, exact",
                 "4 replays of a CUDA graph", "training step, --offload", "training step, --chunk 0"):
        assert name in rows
    assert rows["decoding, NHWC"].startswith("x") and rows["4 replays of a CUDA graph"] == "needs CUDA"
    assert 0.85 < float(rows["peak of the training step"][1:5]) < 1.15
    assert "checks that failed: none" in text and "<!-- rewards " in text


def test_pretraining_takes_the_gpu_of_its_process(tmp_path, monkeypatch):
    """The second of torchrun's processes builds its networks for cuda:1, which is chosen before all else."""
    for name in ("vae", "clip", "viclip"):
        (tmp_path / f"{name}.safetensors").symlink_to(shapes.WEIGHTS / f"{name}.safetensors")
    place = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    chosen, groups = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(run.dist, "init_process_group", lambda backend, **options: groups.append(backend))
    monkeypatch.setattr(run.Group, "close", lambda group: None)
    devices = []
    monkeypatch.setitem(pretrain.STAGES, "teacher", lambda out, group: (devices.append(group.device), {}))

    pretrain.main(["--stage", "teacher", "--out", str(tmp_path)])
    assert chosen == devices == [torch.device("cuda", 1)] and groups == ["cpu:gloo,cuda:nccl"]
