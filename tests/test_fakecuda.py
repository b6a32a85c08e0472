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
    """No operation on two devices."""
    assert results[case]["error"] is None


@pytest.mark.parametrize("case", fakecuda.BUDGETS)
def test_a_budget_tells_the_memory_of_a_gpu(results, case):
    """The most bytes on the device, along the way, are those that a simulation on the CPU counts."""
    assert 0.95 < results[case]["peak"] / results[case]["budget"] < 1.05


def test_mixed_devices_are_found(results):
    """The fake device is no blind one: what each of these does fails on a GPU."""
    assert all(results[case]["error"] for case in fakecuda.WRONG)
