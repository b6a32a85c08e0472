"""The independent libraries that tests compare with, each imported where it is first used: it takes seconds,
and a process of `pytest -n` that does not need them does not spend them."""
from importlib import import_module

import torch


class Late:
    """A module that is imported when something is asked of it."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("_"):                       # pytest's, which looks whether this is a fixture
            raise AttributeError(attribute)
        with torch.device("cpu"):                           # its own tensors, where a test's are on "meta"
            return getattr(import_module(self.name), attribute)


diffusers, open_clip, peft, transformers = map(Late, ("diffusers", "open_clip", "peft", "transformers"))
torchvision = Late("torchvision.transforms.functional")
