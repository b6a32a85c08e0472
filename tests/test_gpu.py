"""gpu.py is for machines with a GPU; here it runs with tiny networks on the CPU, so that it starts there."""
import gpu


def test_the_program_for_gpus_runs(capsys):
    failed = gpu.main(["--tiny", "--device", "cpu", "--no-compile", "--presets", "vcm-vc2", "turbo-v2",
                       "--repeat", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.count("|") == 7]
    assert rows[2:] == ["UNet step, 16x16x4, vc2", "decoding, 16x16x4, vc2", "clip in 4 steps, 16x16x4, vc2",
                        "training step, vcm-vc2", "training step, turbo-v2"]
    assert failed == 0 and any(line.startswith("| UNet | 0.0") for line in lines)
