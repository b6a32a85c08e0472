"""gpu.py is for machines with a GPU; here it runs with tiny networks on the CPU, so that it starts there."""
import gpu
import torch

import shapes
from plumbing import run
from shapes import pretrain


def test_the_program_for_gpus_runs(capsys):
    """Its rows, with rewards and compiled, its bounds, and its answer when they do not hold."""
    failed = gpu.main(["--tiny", "--device", "cpu", "--presets", "turbo-v2", "--repeat", "1"])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.count("|") == 8]
    rows = {row[0]: row for row in cells[2:]}
    assert list(rows) == ["UNet step, 16x16x8, vc2", "decoding, 16x16x8, vc2",
                          "clip in 4 steps, 16x16x8, vc2",
                          "UNet step, compiled, 16x16x8, vc2", "clip in 4 steps, compiled, 16x16x8, vc2",
                          "training step, turbo-v2"]
    assert failed == 0 and any(line.startswith("| compiled UNet | 0.0") for line in lines)
    assert lines[-1].startswith("compiled by aot_eager; beyond their bound: none; more than 1.15 times")
    measured, simulated = map(float, rows["training step, turbo-v2"][-2:])
    assert 0.85 < measured / simulated < 1.15


def test_more_memory_than_simulated_is_a_failure():
    assert gpu.Row("x", 1.0, 1, peak=114, simulated=100).fits() and gpu.Row("x", 1.0, 1, peak=10 ** 9).fits()
    assert not gpu.Row("x", 1.0, 1, peak=116, simulated=100).fits()


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
