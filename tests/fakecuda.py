"""The project with fake tensors on a fake GPU: shapes, dtypes, devices are propagated, nothing is computed.

`test_fakecuda.py` runs this file in a process of its own, with fakecuda.c preloaded:

    python tests/fakecuda.py [WORD ...]         # cases whose name holds each word

A line of JSON per case: what went wrong. An operation on two devices fails as it does on a GPU. Not shown:
kernels and their strides, NCCL, torch.compile. Networks have their published widths and fewer blocks.
"""
import contextlib
import ctypes
import dataclasses
import json
import os
import sys
import tempfile
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from fakes import Fake, device_of
from oracles import sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PROJECT = Path(__file__).resolve().parent.parent
REWARDS = ("hpsv2", "pickscore", "clip", "imagereward", "viclip", "internvideo2")
DTYPES = ("float32", "bfloat16", "float16")
STUB = ctypes.CDLL(os.environ.get("FAKECUDA"))      # pytest, which reads the names of the cases, has none
CANNOT = 3                      # exit code where this PyTorch is not like the one that this was written for


# ---- a GPU that is not there -------------------------------------------------------------------------------

def install() -> None:
    """PyTorch believes in one GPU, and asks the driver nothing. Once per process; there is no way back."""
    from torch._subclasses import fake_tensor

    answers = dict(is_available=True, is_bf16_supported=True, is_initialized=True, device_count=1,
                   current_device=0, get_device_capability=(9, 0), memory_allocated=0, max_memory_allocated=0)
    silent = dict.fromkeys(("reset_peak_memory_stats", "set_device", "synchronize", "_lazy_init"))
    for name, answer in (answers | silent).items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.utils.checkpoint.get_device_states = lambda *args: ([], [])
    torch.utils.checkpoint.set_device_states = lambda *args, **kwargs: None
    fake_tensor.FakeTensorMode.avoid_device_init = True     # torch.tensor is made on the host, then copied
    torch._C._ensureCUDADeviceGuardSet()
    torch.autograd.set_multithreading_enabled(False)        # no thread per device: there is none to wait for
    torch.nn.Module._apply = replace_tensors
    torch.Tensor.tolist = tolist
    F.scaled_dot_product_attention = fused_attention

    engine = torch.autograd.graph._engine_run_backward

    def run_backward(*args, **kwargs):
        with visible_gpus(127):                             # more than the 8 that the engine's stand-in has
            return engine(*args, **kwargs)

    torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = run_backward


@contextlib.contextmanager
def visible_gpus(count: int):
    """Within the block fakecuda.c says that there are so many GPUs.

    The autograd engine asks for one, and a fake operation must not find one.
    """
    before = STUB.fake_devices(count)
    try:
        yield
    finally:
        STUB.fake_devices(before)


def replace_tensors(module, fn, recurse=True):
    """Module._apply: fake parameters cannot change their storage, so they are replaced."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(fn(p.detach()), requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fn(buffer)
    return module


def tolist(x):
    """Ones in nested lists: the contents of a tensor without contents."""
    def nested(shape):
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else one(x.dtype)

    return nested(x.shape)


def one(dtype):
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """What CUDA launches: flash attention in half precision, else the memory-efficient kernel."""
    devices = {x.device for x in (q, k, v, attn_mask) if x is not None}
    assert len(devices) == 1, f"attention on two devices: {devices}"
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype, f"attention of {q.dtype}, {k.dtype}, {v.dtype}"
    if q.device.type != "cuda":
        if attn_mask is None and is_causal:
            attn_mask = q.new_zeros(q.shape[-2], k.shape[-2])
        scores = q @ k.transpose(-1, -2)
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v

    if q.dtype != torch.float32 and attn_mask is None and q.shape[-1] <= 256:
        width, pad = q.shape[-1], -q.shape[-1] % 8
        q, k, v = (F.pad(x, (0, pad)) if pad else x for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, is_causal, False)[0][..., :width]

    if attn_mask is not None:
        attn_mask = q.new_zeros(attn_mask.shape).expand(*q.shape[:3], k.shape[2])
    needs_gradient = torch.is_grad_enabled() and q.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, needs_gradient, 0.0, is_causal)[0]


class Contents(TorchDispatchMode):
    """Answers what only contents can tell: a number is 1, a mask is true. An index is on its tensor's device,
    or on the host."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False                                        # nothing is compiled here; asking costs time

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if op is torch.ops.prim.device.default:
            return device_of(args[0])
        if op is aten._local_scalar_dense.default:
            return one(args[0].dtype)
        if op in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices = [i for i in args[1] if i is not None]
            wrong = [i.device for i in indices if i.device not in (args[0].device, torch.device("cpu"))]
            assert not wrong, f"an index on {wrong[0]} of a tensor on {args[0].device}"
            if op is aten.index.Tensor and indices[0].dtype == torch.bool:      # as if all of it were true
                return args[0].reshape(-1, *args[0].shape[indices[0].ndim:])
        with visible_gpus(0):
            return op(*args, **kwargs)


def fake_load_file(path, device="cpu"):
    """safetensors.torch.load_file, of shapes."""
    from safetensors import safe_open

    dtypes = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
    with safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        return {key: torch.empty(s.get_shape(), dtype=dtypes[s.get_dtype()], device=device)
                for key, s in slices.items()}


# ---- what is run on it -------------------------------------------------------------------------------------

def shrink() -> None:
    """Fewer blocks of the published widths: every kind of layer is left."""
    import model
    import rewards

    for name, family in list(model.FAMILIES.items()):
        unet = dataclasses.replace(family.unet, **sizes(320, (1,), 1, attention_levels=()))
        vae = dataclasses.replace(family.vae, res_blocks=1, mult=(1, 2), patch=4)       # 8 pixels a latent
        text = dataclasses.replace(family.text, layers=2)
        model.FAMILIES[name] = dataclasses.replace(family, unet=unet, vae=vae, text=text)
    for name, recipe in list(rewards.RECIPES.items()):
        if not name.startswith("shapes"):
            rewards.RECIPES[name] = dataclasses.replace(recipe, config=partial(shallow, recipe.config))


def shallow(make, **header):
    """A reward's configuration with one layer in every tower."""
    def cut(config):
        if isinstance(config, dict):
            known = {key: cut(value) if isinstance(value, dict) else value for key, value in config.items()}
            return known | ({"layers": 1} if "layers" in known else {})
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        towers = {name: cut(value) for name, value in fields.items() if dataclasses.is_dataclass(value)}
        depths = {name: 1 for name in ("layers", "text_layers") if name in fields}
        return dataclasses.replace(config, **towers, **depths)

    return cut(make(**header))


def training(preset: str, *options: str, gpus: int = 1, clips: int = 1, again: bool = False,
             show: bool = False, **recipe) -> None:
    """A step. again: another one, from the state that a file held. show: the run's sample clips."""
    import train
    from plumbing import budget
    from plumbing.run import Group

    argv = ["--preset", preset, "--batch", str(gpus * clips), "--micro-batch", str(clips), "--chunk", "16",
            "--dry-run", "1", *options]
    with tempfile.TemporaryDirectory() as out:
        config = train.configure([*argv, "--out", out])
        config = dataclasses.replace(config, reward_every=1, **({"grid": 2} if show else {}), **recipe)
        group = processes(gpus) if gpus > 1 else Group()
        trainer_class = train.CachedTrainer if config.is_v2 else train.Trainer
        models, _, terms = train.load_world(config, group)
        trainer = trainer_class(config, models, terms, group)
        budget.pick_worst(terms)                        # frames, as the dry run does
        batch = budget.random_batch(config, models, clips)
        trainer.step(batch)
        if again:
            resume(trainer)
            trainer.step(batch)
        with trainer.offload(trainer.optimizer):
            check_devices(trainer, group.device)
        if show:
            train.video.write_video = lambda path, clip, fps: assert_on(clip, "cpu")
            trainer.config = dataclasses.replace(config, prompts=config.prompts[:1])
            train.show(trainer, Path(out))


def preparing(preset: str) -> None:
    """What the teacher says about a clip, for v2: inversion, both predictions, gradient of the energy."""
    import model
    import prepare
    import train

    config = prepare.Config(**train.PRESETS[preset] | dict(
        preset=preset, inversion_steps=2, motion_share=1.0, dtype="bfloat16"))
    known = dict(model.FAMILIES)
    for name, family in known.items():              # the energy reads temporal attention on the way up
        model.FAMILIES[name] = dataclasses.replace(
            family, unet=dataclasses.replace(family.unet, **sizes(320, (1,), 1, attention_levels=(0,))))
    models = networks("shapes" if config.is_toy else "vc2", "teacher", torch.bfloat16)
    model.FAMILIES.update(known)
    models.unet.requires_grad_(False)
    models.unet.checkpointing = True
    clip = torch.zeros(3, config.frames, config.height, config.width, dtype=torch.uint8)
    tensors = prepare.prepare_clip(models, config, clip, "a red circle moving right", torch.Generator())
    assert_on(tensors["gradient"], "cuda")


def processes(count: int):
    """A group of `count` processes: this is the first one, the others are PyTorch's own fakes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from plumbing.run import Group

    group = Group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    group.world_size = count
    return group


def resume(trainer) -> None:
    """The trainer's state, read from a file on the CPU."""
    with torch.no_grad():
        state = trainer.state({"clips_skipped": 0})
        trainer.load_state(tree_map_only(torch.Tensor, torch.Tensor.cpu, state))


def check_devices(trainer, device) -> None:
    """Gradients, moments and averages are where the weights are: fused kernels refuse what is elsewhere."""
    states = tree_leaves([*trainer.optimizer.state.values()])
    averages = trainer.ema.average if trainer.ema else []
    for x in [*trainer.params, *(p.grad for p in trainer.params), *averages, *states]:
        if isinstance(x, torch.Tensor):
            assert x.device == device, f"{tuple(x.shape)} of the state on {x.device}, weights on {device}"


def assert_on(x, kind: str) -> None:
    assert x.device.type == kind, f"expected on {kind}: {x.device}"


def networks(family: str, method: str, dtype):
    """A family's networks on the GPU: with random weights, but the toy's, whose files are small."""
    import model
    import shapes
    from plumbing import budget

    student = method in ("turbo", "v2")
    if family == "shapes":
        return shapes.load("turbo" if student else None, None, "cuda", dtype)
    with budget.build("cuda", dtype):
        models = model.untrained(family, guidance=student, motion=method == "v2")
    header = {"method": "turbo-v2" if method == "v2" else "turbo"}
    return dataclasses.replace(models, header=model.complete(header, models.family) if student else {})


def sampling(family: str, method: str, dtype: str, size: tuple[int, int] | None = None) -> None:
    """Two clips in two steps."""
    import model
    import turbo

    models = networks(family, method, getattr(torch, dtype))
    T, H, W = models.size[:1] + (size or models.size[1:])
    two_steps = dataclasses.replace(models.sampling, steps=2)
    z = turbo.generate(models, ["a red circle moving right"] * 2, [0, 1], (T, H, W), two_steps)
    assert_on(z, "cuda")
    assert z.dtype == torch.float32, z.dtype
    assert_on(model.to_clip(models.vae, z[:1], T), "cuda")


def reward(name: str, dtype: str) -> None:
    """Scores of two clips and their gradient in the pixels, recomputed, within the trainer's autocast."""
    import rewards
    from plumbing import budget

    frames = 8 if rewards.RECIPES[name].kind == "video" else None
    device, dtype = torch.device("cuda", 0), getattr(torch, dtype)
    with budget.build(device, dtype):
        made = rewards.untrained(name, device, dtype, frames)
    made.checkpoint(True)
    clips = torch.empty(2, made.frames or 3, 3, 320, 512, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        scores = made(clips, ["a", "b"])
    assert_on(scores, "cuda")
    assert (scores.shape, scores.dtype) == ((2,), torch.float32), scores
    gradient, = torch.autograd.grad(scores.sum(), clips)
    assert_on(gradient, "cuda")


def oracle() -> None:
    """The toy's judgement of clips that are on the GPU."""
    import shapes

    clips = torch.empty(2, 3, 8, 64, 64, dtype=torch.uint8, device="cuda")
    shapes.accuracy(lambda captions, seeds: clips, count=2)


def budget(command: str, options: str) -> int:
    """The most bytes of a budget, simulated on the CPU, with the networks that the cases have."""
    import benchmark
    F.scaled_dot_product_attention, fused = ATTENTION, F.scaled_dot_product_attention
    try:
        return max(benchmark.simulated(command, options).peak.values())
    finally:
        F.scaled_dot_product_attention = fused


ATTENTION = F.scaled_dot_product_attention              # PyTorch's own
BUDGETS = {                                             # case: its command
    "train turbo-vc2 --lora 4": (
        "train.py", "--preset turbo-vc2 --lora 4 --batch 1 --micro-batch 1 --chunk 16"),
    "sample vc2 turbo bfloat16": ("sample.py", "--model vc2 --batch 2")}
ALL = ("vcm-vc2", "turbo-vc2", "vcm-ms", "turbo-ms", "turbo-v2")
SAMPLED = {
    "vc2 turbo": DTYPES, "vc2 v2": DTYPES, "vc2 teacher": DTYPES, "ms turbo": DTYPES, "ms teacher": DTYPES,
    "shapes turbo": DTYPES, "shapes teacher": ("bfloat16",)}
CASES = {
    **{f"train {preset} --lora 4": partial(training, preset, "--lora", "4", again=preset == "vcm-vc2")
       for preset in ("shapes", "shapes-v2", *ALL)},
    **{f"train {preset} --lora 0": partial(training, preset, "--lora", "0", again=preset == "vcm-ms")
       for preset in ("vcm-ms", "turbo-v2")},
    "train vcm-ms on policy": partial(training, "vcm-ms", clips=2, on_policy=1.0),
    "train turbo-ms --dtype float32": partial(training, "turbo-ms", "--dtype", "float32"),
    "train turbo-vc2 --offload": partial(training, "turbo-vc2", "--offload", show=True),
    "train turbo-v2 --offload": partial(training, "turbo-v2", "--offload", again=True),
    "train turbo-vc2 --lora 0 on 2 GPUs": partial(training, "turbo-vc2", "--lora", "0", gpus=2, again=True),
    **{f"prepare {preset}": partial(preparing, preset) for preset in ("turbo-v2", "shapes-v2")},
    **{f"sample {what} {dtype}": partial(sampling, *what.split(), dtype)
       for what, dtypes in SAMPLED.items() for dtype in dtypes},
    "sample vc2 turbo bfloat16 at 1024x576": partial(sampling, "vc2", "turbo", "bfloat16", (576, 1024)),
    **{f"reward {name} {dtype}": partial(reward, name, dtype)
       for name in REWARDS for dtype in ("bfloat16", "float32")},
    "oracle": oracle,
}
WRONG = {
    "wrong: sum": lambda: torch.ones(2, device="cuda") + torch.ones(2),
    "wrong: index": lambda: torch.ones(2)[torch.zeros(2, dtype=torch.long, device="cuda")]}


def run(name: str, case) -> dict:
    """{"error": one line and where, or None}; for BUDGETS also "peak" and "budget", in bytes."""
    from plumbing.budget import Counter

    try:
        with Fake(), Contents(), Counter("cuda") if name in BUDGETS else nullcontext() as counter:
            case()
        peaks = {"peak": counter.peak, "budget": budget(*BUDGETS[name])} if name in BUDGETS else {}
        return {"error": None} | peaks
    except Exception as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames
                 if frame.filename.startswith(str(PROJECT))]
        return {"error": f"{type(problem).__name__}: {problem} (in {' < '.join(reversed(lines[-4:]))})"}


def main() -> None:
    sys.path.insert(0, str(PROJECT))
    torch.set_num_threads(1)
    try:
        install()
        with Fake(), Contents():
            x = torch.ones(2, device="cuda", requires_grad=True)
            torch.autograd.grad((x * x).sum(), x)
    except (AttributeError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(CANNOT)
    import safetensors.torch
    safetensors.torch.load_file = fake_load_file
    shrink()
    for name, case in (CASES | WRONG).items():
        if all(word in name for word in sys.argv[1:]):
            print(json.dumps({"case": name} | run(name, case)), flush=True)


if __name__ == "__main__":
    main()
