"""Every stage at miniature size, by its command: pretraining, distillation, sampling, evaluation."""
import json
from pathlib import Path

import pytest

import evaluate
import sample
import train
from plumbing import video
from shapes import pretrain

ROOT = Path(__file__).parent.parent


def test_from_nothing_to_a_clip(tmp_path):
    out = str(tmp_path)
    steps = [f"--{stage}-steps=2" for stage in ("vae", "clip", "viclip", "teacher")]
    for stage in ("vae", "clip", "viclip"):                     # here, as each process needs seconds to begin
        pretrain.main(["--stage", stage, "--out", out, *steps])
    pretrain.main(["--all", "--out", out, *steps])              # goes on with the teacher, in two processes
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    pretrain.main(["--all", "--out", out, *steps])
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}, "what is done stays"

    short = "--steps 2 --batch 2 --micro 2 --sample-every 0".split()
    for name, weights in {"vcm": (0, 0), "turbo": (1, 2)}.items():
        train.main(["--preset", "shapes", "--teacher", out, "--out", f"{out}/{name}", *short,
                    "--image-weight", str(weights[0]), "--video-weight", str(weights[1])])
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2] and all(row["loss_cd"] >= 0 for row in rows)
        assert ("shapes-clip" in rows[0], "shapes-viclip" in rows[0]) == (weights[0] > 0, weights[1] > 0)
        sample.main(["a red circle rising", "--teacher", out, "--method", "turbo",
                     "--turbo", f"{out}/{name}/turbo.safetensors", "--out", f"{out}/{name}.gif"])
        assert video.read_clip(tmp_path / f"{name}.gif").shape == (3, 8, 64, 64)

    config = evaluate.ShapesConfig(clips=2, folder=out, out=f"{out}/table.json", rows=" 2")
    names = {row["name"] for row in evaluate.shapes_table(config)}
    assert names >= {"DDIM 2", "teacher, jumps 2", "VCM 2", "T2V-Turbo 2"}


def test_a_stage_that_fails_ends_the_command(tmp_path, capsys):
    (tmp_path / "clip.safetensors").touch()
    (tmp_path / "vae.ckpt").touch()                     # broken
    with pytest.raises(SystemExit):
        pretrain.main(["--all", "--out", str(tmp_path)])
    assert "vae ended early" in capsys.readouterr().err and not (tmp_path / "viclip.jsonl").exists()
