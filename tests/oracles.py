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


def sizes(channels: int = 32, mult: tuple = (1,), res_blocks: int = 2, attention_levels: tuple = (0, 1, 2),
          in_channels: int = 4) -> dict:
    """Fields of a UNetConfig of this many levels, each `mult` x `channels` wide, built by a rule."""
    widths = [channels * m for m in mult]
    down, up, finer = [], [], channels
    for level, width in enumerate(widths):
        attention = f", space {width}, time {width}" * (level in attention_levels)
        coarser = widths[min(level + 1, len(widths) - 1)]

        down += [f"downsample {finer}" if level else f"conv {in_channels} {finer}"]
        down += [f"res {cin} {width}{attention}" for cin in [finer] + [width] * (res_blocks - 1)]
        skips = [width] * res_blocks + [finer]
        rising = [f"res {below}+{skip} {width}{attention}"
                  for below, skip in zip([coarser] + [width] * res_blocks, skips, strict=True)]
        up = [*rising[:-1], rising[-1] + f", upsample {width}" * (level > 0), *up]
        finer = width

    rows = [f"{left} | {right}" for left, right in zip(down, reversed(up), strict=True)]
    middle = f"res {width}, space {width}, time {width}, res {width}"
    return dict(layout="\n".join([*rows, middle]), channels=channels, in_channels=in_channels)


def compile_layers(unet: torch.nn.Module, **options) -> None:
    """torch.compile with these options, layer by layer, in place: 56 layers of 23 sizes, which share code."""
    torch._dynamo.config.recompile_limit = 100              # sizes of a class
    for layer in unet.modules():
        if type(layer).__name__ in ("ResBlock", "Transformer"):
            layer.compile(dynamic=False, **options)
