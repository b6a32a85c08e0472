"""Every stage at miniature size, by its command: pretraining, distillation, sampling, evaluation."""
import json
from pathlib import Path

import evaluate
import sample
import train
from plumbing import video
from shapes import pretrain

ROOT = Path(__file__).parent.parent


def test_from_nothing_to_a_clip(tmp_path, monkeypatch):
    out = str(tmp_path)
    for stage in ("vae", "clip", "viclip", "teacher"):
        monkeypatch.setitem(pretrain.STEPS, stage, 2)
        pretrain.main(["--stage", stage, "--out", out])

    short = "--train-steps 2 --batch 2 --micro-batch 2 --sample-every 0".split()
    for name, preset in {"vcm": "shapes-vcm", "turbo": "shapes"}.items():
        train.main(["--preset", preset, "--teacher", out, "--out", f"{out}/{name}", *short])
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2] and all(row["loss_cd"] >= 0 for row in rows)
        assert ("shapes-clip" in rows[0], "shapes-viclip" in rows[0]) == (name == "turbo", name == "turbo")
        sample.main(["a red circle rising", "--teacher", out, "--method", "turbo",
                     "--turbo", f"{out}/{name}/turbo.safetensors", "--out", f"{out}/{name}.gif"])
        assert video.read_clip(tmp_path / f"{name}.gif").shape == (3, 8, 64, 64)

    rows = "DDIM 2,vcm 2,turbo 2"
    config = evaluate.ShapesConfig(clips=2, folder=out, out=f"{out}/table.json", rows=rows)
    names = {row["name"] for row in evaluate.shapes_table(config)}
    assert names == {"DDIM 2", "VCM 2", "T2V-Turbo 2"}
