"""Several processes of `pytest -n` share the cores and the tests, file by file."""
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")           # each computes on one core

LONGEST = "end_to_end gpu fakecuda v2 train resume sample loading model docs shapes evaluate".split()


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that the processes end together; before all, those of few and long
    tests, as a process books its next file two tests ahead."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def quick_simulation(monkeypatch):
    """Simulations with fake tensors whose results are remembered, in half of the time (test_train.py has one
    without)."""
    from fakes import Fake

    from plumbing import budget
    monkeypatch.setattr(budget, "FakeTensorMode", Fake)
