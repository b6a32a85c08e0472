"""Several processes of `pytest -n` share the cores and the tests."""
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")           # each computes on one core

ORACLES = "loading model rewards end_to_end gpu".split()     # these import what takes long, see oracles.py
LONGEST = [*ORACLES, *"fakecuda resume train v2 sample docs evaluate shapes".split()]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take long come first, so that the processes end together. The tests of a file stay in one
    process; those of all files that import the oracles stay in one, too."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        name = item.path.stem.removeprefix("test_")
        item.add_marker(pytest.mark.xdist_group("oracles" if name in ORACLES else name))
