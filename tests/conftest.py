"""Several processes of `pytest -n` share the cores and the tests."""
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")           # each computes on one core

LONGEST = "fakecuda resume v2 train loading sample end_to_end model gpu shapes docs".split()


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that the processes end together."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
