"""train.py's command line as people mistype it: each mistake ends in one line before anything is loaded."""
import pytest

import train

MISTAKES = {
    # options that cannot take effect
    "--data clips": "--data has no effect with --preset shapes",
    "--preset turbo-v2 --columns path=a": "--columns has no effect with --preset turbo-v2",
    "--preset turbo-v2 --ema 0.9": "--ema has no effect",
    "--reward hpsv2=HPS.pt": "--reward hpsv2=HPS.pt is not for --preset shapes",
    "--reward shapes-clip=x.pt": "--reward shapes-clip=x.pt is not for --preset shapes",
    "--preset turbo-vc2 --reward shapes-clip": "--reward shapes-clip is not for --preset turbo-vc2",
    "--lr inf": "--lr: 'inf' is not a number from 1e-12 to 1",
    "--batch -1": "--batch: '-1' is not a whole number from 1",
    "--preset shapes-v2 --motion 1e30": "--motion: '1e30' is not a number from 0 to 1000",
    "--seed 99999999999999999999": "--seed: '99999999999999999999' is not a whole number from 0 to",
    "--frames 3": "--frames 3: shapes-clip looks at 4 frames of a clip",
    "--width 128": "--width 128: the toy's clips are square; try --width 64",
    "--preset turbo-vc2 --width 328": "width 328 is not a multiple of 64; try 320 or 384",
    "--reward shapes-clip --reward shapes-clip": "--reward shapes-clip is given twice",
    # what is not there, or would be written over
    "--preset turbo-vc2": "no clips to train on; name them with --data",
    "--preset shapes-v2": "v2 trains from one cache: make it with prepare.py",
    "--teacher nowhere": "--teacher nowhere: no such file or folder",
    "--preset turbo-ms --data . --out RUN --reward hpsv2=a.pt": "--reward hpsv2: a.pt: no such file",
    "--teacher . --out .": "--out . is also --teacher; an output never replaces an input",
    "--preset vcm-vc2 --dtype float32 --data nowhere --out RUN": "no data at nowhere",
    "--out FILE/run": "FILE/run: nothing can be written there",
    "--out RUN --resume nowhere.pt": "nowhere.pt: no such file",
    "--device foo": "--device foo: no such device here; this machine has cpu:0",
    "--device mps": "--device mps: training sums in float64, which MPS lacks",
    "--unknown 1": "unknown option --unknown",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_ends_in_one_line(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    with pytest.raises(SystemExit) as ended:
        train.main(typed.split())
    message, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and MISTAKES[typed] in message


def test_processes_without_an_address_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "run")])
    assert "WORLD_SIZE=2, but not MASTER_ADDR; start several" in capsys.readouterr().err
