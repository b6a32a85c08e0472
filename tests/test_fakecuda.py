"""What a GPU would refuse, without a GPU: every preset's training step, every way to sample, every reward and
the toy's oracle run with fake tensors on a fake CUDA device (fakecuda.py), where an operation on tensors of
two devices fails as it does on a real one."""
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import fakecuda
import pytest

HERE = Path(__file__).parent
SECONDS = 900                       # of processor time, for all cases together; they take one or two minutes


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case: what it answered}, all of them from one process. Skips where the fake device cannot be had."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or not compiler:
        pytest.skip("the fake CUDA device needs Linux and a C compiler")
    stub = tmp_path_factory.mktemp("fakecuda") / "libcuda.so.1"
    library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *library, "-o", stub, HERE / "fakecuda.c"], check=True)
    told = dict(LD_PRELOAD=str(stub), FAKECUDA=str(stub), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, HERE / "fakecuda.py"], env=os.environ | told, capture_output=True,
                          text=True, preexec_fn=limit)
    if done.returncode == fakecuda.CANNOT:
        pytest.skip(f"this PyTorch has no place for a fake CUDA device: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("case", fakecuda.CASES)
def test_runs_on_a_gpu(results, case):
    """No operation on two devices, no attention beyond a CUDA grid, no copy within a network's pass."""
    assert results[case]["error"] is None
    assert results[case]["in_networks"] == {}


@pytest.mark.parametrize("case", [case for case in fakecuda.CASES if case.startswith("sample")])
def test_a_sampling_step_copies_only_its_noise(results, case):
    assert set(results[case]["copies"]) <= {"turbo.py: Noise.__call__"}


@pytest.mark.parametrize("case", [case for case in fakecuda.CASES if case.startswith("train")])
def test_a_training_step_waits_for_the_gpu_once(results, case):
    """To read its sums at the end; with --offload also for what goes back to host memory."""
    offload = {"run.py: Offload.to_host", "run.py: Offload.__call__"} if "--offload" in case else set()
    waits = results[case]["waits"]
    assert waits.pop("train.py: Trainer.step") == 1
    assert set(waits) <= offload


@pytest.mark.parametrize("case", fakecuda.BUDGETS)
def test_the_dry_run_tells_the_memory_of_a_gpu(results, case):
    """The most bytes on the device, along the way, are those that --dry-run simulates on the CPU."""
    assert 0.95 < results[case]["peak"] / results[case]["budget"] < 1.05


def test_mixed_devices_are_found(results):
    """The fake device is no blind one: what each of these does fails on a GPU."""
    assert all(results[case]["error"] for case in fakecuda.WRONG)
    assert all(sum(results[case]["waits"].values()) == 1 for case in fakecuda.WAITS)
