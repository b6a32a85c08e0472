"""Several processes of `pytest -n` share the cores: each computes on one."""
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
