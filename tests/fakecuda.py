"""The project with fake tensors on a fake GPU: shapes, dtypes, devices are propagated, nothing is computed.

`test_fakecuda.py` runs this file in a process of its own, with fakecuda.c preloaded:

    python tests/fakecuda.py [--project DIR] [--full] [WORD ...]      # cases whose name holds each word

A line of JSON per case: what went wrong, and what was copied from the host to the device, and by whom. An
operation on two devices fails as it does on a GPU. Not shown: kernels and their strides, NCCL, torch.compile.
Networks have their published widths and fewer blocks (`shrink`); --full keeps all blocks and takes minutes.
"""
import argparse
import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from oracles import sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REWARDS = ("hpsv2", "pickscore", "clip", "imagereward", "viclip", "internvideo2")
DTYPES = ("float32", "bfloat16", "float16")
CANNOT = 3                      # exit code where this PyTorch is not like the one that this was written for
GRID_LIMIT = 65535              # blocks in the second and third dimension of a CUDA grid


# ---- a GPU that is not there -------------------------------------------------------------------------------


def install() -> None:
    """PyTorch believes in one GPU, and asks the driver nothing. Once per process; there is no way back."""
    from torch._subclasses import fake_tensor

    answers = dict(is_available=True, is_bf16_supported=True, is_initialized=True, device_count=1,
                   current_device=0, get_device_capability=(9, 0), memory_allocated=0, max_memory_allocated=0)
    silent = dict.fromkeys(("synchronize", "reset_peak_memory_stats", "set_device", "_lazy_init"))
    for name, answer in (answers | silent).items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.Stream = torch.cuda.current_stream = Stream
    torch.cuda.stream = nullcontext
    torch.utils.checkpoint.get_device_states = lambda *args: ([], [])
    torch.utils.checkpoint.set_device_states = lambda *args, **kwargs: None
    fake_tensor.FakeTensorMode.avoid_device_init = True     # torch.tensor is made on the host, then copied
    torch._C._ensureCUDADeviceGuardSet()
    torch.autograd.set_multithreading_enabled(False)        # no thread per device: there is none to wait for
    torch.nn.Module._apply = replace_tensors
    torch.Tensor.tolist = lambda x: nested(x.shape, x.dtype)
    F.scaled_dot_product_attention = fused_attention

    engine = torch.autograd.graph._engine_run_backward

    def run_backward(*args, **kwargs):
        with visible_gpus(127):                             # more than the 8 that the engine's stand-in has
            return engine(*args, **kwargs)

    torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = run_backward


class Stream:
    """There is nothing to wait for."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other) -> None:
        pass


class visible_gpus:
    """Within the block fakecuda.c says that there are so many GPUs.

    The autograd engine asks for one, and a fake operation must not find one.
    """
    now, stub = 0, None

    def __init__(self, count: int):
        self.count = count

    def __enter__(self):
        self.before = visible_gpus.now
        self.set(self.count)

    def __exit__(self, *error):
        self.set(self.before)

    @classmethod
    def set(cls, count: int) -> None:
        cls.stub = cls.stub or ctypes.CDLL(os.environ["FAKECUDA"])
        if count != cls.now:
            cls.stub.fake_devices(count)
            cls.now = count


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


def nested(shape, dtype):
    """Ones in nested lists: the contents of a tensor without contents."""
    if not shape:
        return one(dtype)
    return [nested(shape[1:], dtype) for _ in range(shape[0])]


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

    batch, heads = q.shape[0], q.shape[1]
    if q.dtype != torch.float32 and attn_mask is None and q.shape[-1] <= 256:
        assert max(batch, heads) <= GRID_LIMIT, f"flash attention over {batch} sequences of {heads} heads"
        width, pad = q.shape[-1], -q.shape[-1] % 8
        q, k, v = (F.pad(x, (0, pad)) if pad else x for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, is_causal, False)[0][..., :width]

    assert batch * heads <= GRID_LIMIT, f"memory-efficient attention over {batch} sequences of {heads} heads"
    if attn_mask is not None:
        attn_mask = q.new_zeros(attn_mask.shape).expand(*q.shape[:3], k.shape[2])
    needs_gradient = torch.is_grad_enabled() and q.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, needs_gradient, 0.0, is_causal)[0]


class Watch(TorchDispatchMode):
    """Answers what only contents can tell (a number: 1, a mask: true), and counts copies from host to device.

    `copies` are by the function that asked for them; `in_networks` those within a pass of a UNet, a VAE or a
    reward model.
    """

    def __init__(self, project: Path, networks: tuple[type, ...]):
        super().__init__()
        self.project, self.networks = str(project), networks
        self.copies, self.in_networks = collections.Counter(), collections.Counter()
        self.device_of = import_module("fakes").device_of

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False                                        # nothing is compiled here; asking costs time

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.prim.device.default:
            return self.device_of(args[0])
        aten, kwargs = torch.ops.aten, kwargs or {}
        if op is aten._local_scalar_dense.default:
            return one(args[0].dtype)
        if op in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices = [i for i in args[1] if i is not None]
            wrong = [i.device for i in indices if i.device not in (args[0].device, torch.device("cpu"))]
            assert not wrong, f"an index on {wrong[0]} of a tensor on {args[0].device}"
            if op is aten.index.Tensor and indices[0].dtype == torch.bool:
                return self.masked(args[0], *indices)
        with visible_gpus(0):
            out = op(*args, **kwargs)
        if op in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if op is aten.copy_.default else args[0]
            if (source.device.type, out.device.type) == ("cpu", "cuda"):
                self.count()
        return out

    @staticmethod
    def masked(x, mask):
        """x[mask], one mask over the first dimensions, as if all of it were true."""
        return x.reshape(-1, *x.shape[mask.ndim:])

    def count(self) -> None:
        """Notes who copies: the innermost function of the project, and whether a network is under way."""
        name, inside, frame = None, False, sys._getframe(2)
        while frame:
            code = frame.f_code
            path = code.co_filename                         # a virtual environment may lie in the folder, too
            others = "/tests/" in path or "/site-packages/" in path
            if path.startswith(self.project) and not others:
                name = name or f"{Path(code.co_filename).name}: {getattr(code, 'co_qualname', code.co_name)}"
                if code.co_name in ("forward", "decode", "score"):
                    inside |= isinstance(frame.f_locals.get("self"), self.networks)
            frame = frame.f_back
        self.copies[name] += 1
        if inside:
            self.in_networks[name] += 1


@contextmanager
def fake_gpu(watch: Watch):
    """Within the block all tensors are fake, and may be on "cuda"."""
    from fakes import Fake

    fake = Fake()
    with fake, watch:
        yield fake


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


def shallow(make, header):
    """A reward's configuration with one layer in every tower."""
    def cut(config):
        if isinstance(config, dict):
            known = {key: cut(value) if isinstance(value, dict) else value for key, value in config.items()}
            return known | ({"layers": 1} if "layers" in known else {})
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        towers = {name: cut(value) for name, value in fields.items() if dataclasses.is_dataclass(value)}
        depths = {name: 1 for name in ("layers", "text_layers") if name in fields}
        return dataclasses.replace(config, **towers, **depths)

    return cut(make(header))


def training(preset: str, *options: str, gpus: int = 1, clips: int = 1, again: bool = False,
             show: bool = False, **recipe) -> dict:
    """A step. again: another one, from the state that a file held. show: the run's sample clips."""
    import train
    from plumbing import dryrun
    from plumbing.run import Group

    batch = str(gpus * clips)
    argv = ["--preset", preset, "--batch", batch, "--micro-batch", str(clips), "--chunk", "16", *options]
    with tempfile.TemporaryDirectory() as out:
        config = train.configure([*argv, "--out", out])
        recipe |= dict(reward_every=1, grid=2 if show else config.grid)     # sample clips of two steps
        config = dataclasses.replace(config, **recipe)
        group = processes(gpus) if gpus > 1 else Group()
        trainer_class = train.CachedTrainer if config.is_v2 else train.Trainer
        models, terms = world(config, group)
        trainer = trainer_class(config, models, terms, group)
        dryrun.pick_worst(terms)                        # frames, as the dry run does
        batch = dryrun.random_batch(config, models, clips)
        with counting() as copies:
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
    return {"copies": dict(copies)}


def world(config, group):
    """Networks and reward terms of a preset, without its clips."""
    import train

    models, _, terms = train.load_world(dataclasses.replace(config, dry_run=1), group)
    return models, terms


def preparing(preset: str) -> dict:
    """What the teacher says about a clip, for v2: inversion, both predictions, gradient of the energy."""
    import model
    import prepare
    import train
    from plumbing.run import Group

    config, known = train.configure(["--preset", preset]), dict(model.FAMILIES)
    for name, family in known.items():              # the energy reads temporal attention on the way up
        model.FAMILIES[name] = dataclasses.replace(
            family, unet=dataclasses.replace(family.unet, **sizes(320, (1,), 1, attention_levels=(0,))))
    models, _ = world(config, Group())
    model.FAMILIES.update(known)
    models.unet.requires_grad_(False)
    models.unet.checkpointing = True
    recipe = SimpleNamespace(grid=config.grid, draws=1, inversion_steps=2, motion_share=1.0, fps=config.fps)
    clip = torch.zeros(3, config.frames, config.height, config.width, dtype=torch.uint8)
    tensors = prepare.prepare_clip(models, recipe, clip, "a red circle moving right", torch.Generator())
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
    def to_cpu(x):
        if isinstance(x, torch.Tensor):
            return x.cpu()
        if isinstance(x, dict):
            return {key: to_cpu(value) for key, value in x.items()}
        return [to_cpu(value) for value in x] if isinstance(x, list) else x

    with torch.no_grad():
        state = to_cpu(trainer.state({"clips_skipped": 0}))
    trainer.load_state(state)


def check_devices(trainer, device) -> None:
    """Gradients, moments and averages are where the weights are: fused kernels refuse what is elsewhere."""
    moments = [x for state in trainer.optimizer.state.values() for x in state.values()]
    states = [x for x in moments if isinstance(x, torch.Tensor)]
    averages = trainer.ema.average if trainer.ema else []
    for x in [*trainer.params, *(p.grad for p in trainer.params), *averages, *states]:
        assert x.device == device, f"{tuple(x.shape)} of the state on {x.device}, weights on {device}"


def assert_on(x, kind: str) -> None:
    assert x.device.type == kind, f"expected on {kind}: {x.device}"


def networks(family: str, method: str, dtype):
    """A family's networks on the GPU: with random weights, but the toy's, whose files are small."""
    import model
    import shapes
    from plumbing import dryrun

    student = method in ("turbo", "v2")
    if family == "shapes":
        return shapes.load("turbo" if student else None, None, "cuda", dtype)
    known = model.FAMILIES[family]
    with dryrun.build("cuda", dtype):
        unet = model.UNet3D(dataclasses.replace(known.unet, guidance=student, motion=method == "v2")).eval()
        vae, text = model.VAE(known.vae), model.TextEncoder(known.text)
    released = model.RELEASED["turbo-v2" if method == "v2" else "turbo"]
    header = model.complete(released, known) if student else {}
    return model.Models(family, unet, vae.requires_grad_(False), text.requires_grad_(False), known, header)


def sampling(family: str, method: str, dtype: str, size: tuple[int, int] | None = None) -> dict:
    """Two clips in two steps; "copies": those from the start of the second one on."""
    import model
    import turbo

    dtype = getattr(torch, dtype)
    models = networks(family, method, dtype)
    told, (T, H, W) = models.sampling, models.size[:1] + (size or models.size[1:])
    copies = []

    def watched(timesteps):
        for t in timesteps:
            copies.append(WATCH.copies.copy())
            yield t

    z = turbo.generate(models, ["a red circle moving right"] * 2, [0, 1], (T, H, W),
                       dataclasses.replace(told, steps=2), watched)
    second = WATCH.copies - copies[1]
    if method == "teacher":                                     # and its undistilled jumps
        jumps = dataclasses.replace(told, steps=1, method="jumps")
        assert_on(turbo.generate(models, ["a red circle moving right"], [0], models.size, jumps), "cuda")
    assert_on(z, "cuda")
    assert z.dtype == torch.float32, z.dtype
    assert_on(model.to_clip(models.vae, z[:1], T), "cuda")
    return {"copies": dict(second)}


def reward(name: str, dtype: str) -> dict:
    """Scores of two clips and their gradient in the pixels, recomputed, within the trainer's autocast."""
    import rewards
    from plumbing import dryrun

    video = rewards.RECIPES[name].kind == "video"
    frames = 8 if video else None
    device, dtype = torch.device("cuda", 0), getattr(torch, dtype)
    with dryrun.build(device, dtype):
        made = rewards.untrained(name, device, dtype, frames)
    made.checkpoint(True)
    clips = torch.empty(2, made.frames or 3, 3, 320, 512, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        scores = made(clips, ["a", "b"])
    assert_on(scores, "cuda")
    assert (scores.shape, scores.dtype) == ((2,), torch.float32), scores
    gradient, = torch.autograd.grad(scores.sum(), clips)
    assert_on(gradient, "cuda")
    return {}


def oracle() -> None:
    """The toy's judgement of clips that are on the GPU."""
    import shapes

    clips = torch.empty(2, 3, 8, 64, 64, dtype=torch.uint8, device="cuda")
    shapes.accuracy(lambda captions, seeds: clips, count=2)


def add_across_devices() -> None:
    torch.ones(2, device="cuda") + torch.ones(2)


def index_on_the_gpu() -> None:
    torch.ones(2)[torch.zeros(2, dtype=torch.long, device="cuda")]


def attend_to_too_many() -> None:
    q = torch.ones(1, GRID_LIMIT + 1, 16, 64, device="cuda")
    F.scaled_dot_product_attention(q, q, q)


def gradient_across_devices() -> None:
    x = torch.ones(2, device="cuda", requires_grad=True)
    torch.autograd.grad(x * 2, x, torch.ones(2))


WATCH: Watch | None = None
ATTENTION = F.scaled_dot_product_attention              # PyTorch's own


def watched(case) -> dict:
    """A case, and "peak": the most bytes that it held on the GPU."""
    from fakes import device_of

    from plumbing.dryrun import LiveBytes

    class OnTheGpu(LiveBytes):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.prim.device.default:
                return device_of(args[0])
            out = op(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.device.type == "cuda":
                    self.add(x.untyped_storage())
            return out

    with OnTheGpu() as counter:
        answer = case()
    return answer | {"peak": counter.peak}


def dry_run(command, argv: list[str]) -> int:
    """The most bytes that a --dry-run simulates, with the networks that the cases have."""
    from fakes import Fake

    from plumbing import dryrun
    dryrun.FakeTensorMode = Fake                        # it takes half of the time
    F.scaled_dot_product_attention, fused = ATTENTION, F.scaled_dot_product_attention
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return max(command(argv).peak.values())
    finally:
        F.scaled_dot_product_attention = fused


def training_budget() -> int:
    import train
    argv = "--preset turbo-vc2 --lora 4 --batch 1 --micro-batch 1 --chunk 16 --dry-run 0 --device cpu"
    return dry_run(train.main, argv.split())


def sampling_budget() -> int:
    import sample
    argv = "--model vc2 --dtype bfloat16 --batch 2 --dry-run"
    return dry_run(sample.main, ["a red circle moving right", *argv.split()])


BUDGETS = {"train turbo-vc2 --lora 4": training_budget, "sample vc2 turbo bfloat16": sampling_budget}


@contextmanager
def counting():
    """The copies to the device within the block, by function."""
    before, found = WATCH.copies.copy(), collections.Counter()
    yield found
    found.update(WATCH.copies - before)


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
WRONG = {"wrong: sum": add_across_devices, "wrong: index": index_on_the_gpu,
         "wrong: attention": attend_to_too_many}


def run(name: str, case) -> dict:
    """{"error": one line and where, or None, "seconds", "in_networks": copies there, and what it answers}"""
    start = time.process_time()
    WATCH.in_networks.clear()
    try:
        with fake_gpu(WATCH):
            answer = watched(case) if name in BUDGETS else case()
        if name in BUDGETS:
            answer["budget"] = BUDGETS[name]()
        error = None
    except Exception as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames
                 if frame.filename.startswith(WATCH.project)]
        answer, error = {}, f"{type(problem).__name__}: {problem} (in {' < '.join(reversed(lines[-4:]))})"
        if os.environ.get("TRACE"):
            traceback.print_exc()
    seconds = round(time.process_time() - start, 2)
    return {"error": error, "seconds": seconds, "in_networks": dict(WATCH.in_networks)} | (answer or {})


def main() -> None:
    global WATCH
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--project", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--full", action="store_true", help="all blocks")
    args = parser.parse_args()
    sys.path.insert(0, str(args.project))
    torch.set_num_threads(1)
    try:
        install()
        with fake_gpu(Watch(args.project, ())):
            x = torch.ones(2, device="cuda", requires_grad=True)
            torch.autograd.grad((x * x).sum(), x)
    except (AttributeError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(CANNOT)
    import safetensors.torch
    safetensors.torch.load_file = fake_load_file
    if not args.full:
        shrink()
    import model
    import rewards
    reward_models = {recipe.model for recipe in rewards.RECIPES.values()}
    WATCH = Watch(args.project, (model.UNet3D, model.VAE, *reward_models))
    for name, case in (CASES | WRONG).items():
        if all(word in name for word in args.words):
            print(json.dumps({"case": name} | run(name, case)), flush=True)


if __name__ == "__main__":
    main()
