"""Ratios side by side in one run, and the tables of the pages on performance and training. Not a test.

    python tests/benchmark.py                   # a UNet pass and a decoded clip, 16x256x256, by diffusers'
    python tests/benchmark.py --what unet --table   # seconds and FLOP/s of our pass, by kind of operation
    python tests/benchmark.py --what clips --size 128 128   # ModelScope in 4 steps, diffusers' in 4 and 25
    python tests/benchmark.py --what toy            # a training step of the toy on threads and on processes
    python tests/benchmark.py --what checkpointing  # what recomputing saves and costs, counted for 512x320
    python tests/benchmark.py --what budgets        # what every preset and command takes, simulated: Markdown

Networks are full-size with random weights. Every measurement is a process of its own, so that its memory is
its own: resident on a CPU, allocated on a GPU. On a CPU the ratio is that of processor time, which a busy
machine distorts less. `floor` is how many times longer a pass takes than its FLOP (of fake tensors) at a
large matrix product's rate in the same process; `activations` is the peak less what was held before
the pass, `tensors` the part of it that is tensors (counted on fake ones, too: without what kernels take for
themselves). glibc keeps freed blocks of up to 32 MB; while memory is measured it gives them back, for both
networks, so that what is resident is in use.
"""
import argparse
import contextlib
import ctypes
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
import turbo  # noqa: E402
from model import CPU_LAYERS, FAMILIES, MODELSCOPE, VAE, VC2, UNet3D  # noqa: E402
from networks.fast_cpu import FORMATS, speed_up  # noqa: E402
from plumbing import cli  # noqa: E402
from plumbing.budget import CARDS, GIB, Budget, build, pick_worst, simulation  # noqa: E402
from solver import Sampling, Schedule  # noqa: E402

RATIOS = {"time": "busy", "memory": "peak", "activations": "activations", "tensors": "tensors"}
COMPARED = {"unet": ["diffusers", "ours"], "vae": ["diffusers", "ours"],    # the first is the unit
            "clips": ["diffusers, 25 steps", "diffusers, 4 steps", "ours, 4 steps"]}
BUDGETS = {             # command: options
    "train.py": ["--preset turbo-vc2", "--preset turbo-vc2 --offload", "--preset turbo-vc2 --chunk 0",
                 "--preset turbo-ms", "--preset vcm-vc2", "--preset vcm-ms", "--preset turbo-v2",
                 "--preset turbo-v2 --offload", "--preset turbo-v2 --lora 64"],
    "prepare.py": [""],
    "sample.py": ["--model vc2", "--model vc2 --method teacher", "--model ms",
                  "--model vc2 --refine 15 --reward hpsv2"]}
KINDS = {"convolution": "convolution", "mm": "linear", "attention": "attention", "norm": "norm"}


def options():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    cuda = torch.cuda.is_available()
    parser.add_argument("--what", nargs="+", choices=[*COMPARED, "toy", "checkpointing", "budgets"],
                        default=["unet", "vae"])
    parser.add_argument("--size", nargs=2, type=int, default=[256, 256], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=1, help="frames decoded at once")
    parser.add_argument("--repeat", type=int, default=20 if cuda else 1, help="timed passes, after another")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--table", action="store_true", help="only ours, by kind of operation")
    parser.add_argument("--only", default="", help="of --what budgets: commands that hold this text")
    parser.add_argument("--one", help=argparse.SUPPRESS)    # measure this one, in this process
    return parser.parse_args()


def is_ours(which) -> bool:
    return which.startswith("ours")


def network(which, what, device="meta", guidance=False):
    """ours or diffusers'; of `clips` both, our UNet a student's"""
    if what == "clips":
        return nn.ModuleDict({name: network(which, name, device, guidance=True) for name in ("unet", "vae")})
    with torch.device(device):
        if is_ours(which):
            return UNet3D(replace(MODELSCOPE, guidance=guidance)) if what == "unet" else VAE()
        import diffusers
        if what == "unet":
            return diffusers.UNet3DConditionModel(attention_head_dim=64)
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)


def one_pass(net, which, what, args):
    """A function without arguments: a UNet step of one clip, its decoding, or both in some steps."""
    T, (h, w) = args.frames, (n // 8 for n in args.size)
    make = dict(device=args.device, dtype=getattr(torch, args.dtype))
    z, c = torch.randn(1, 4, T, h, w, **make), torch.randn(1, 77, 1024, **make)
    t = torch.tensor([500], device=args.device)
    if what == "clips":
        return whole_clip(net["unet"], net["vae"], c, which, args)
    if what == "unet":
        return lambda: net(z, t, c) if is_ours(which) else net(z, t, encoder_hidden_states=c).sample
    if is_ours(which):
        return lambda: net.decode(z, args.chunk)
    return lambda: torch.cat([net.decode(part).sample for part in z[0].transpose(0, 1).split(args.chunk)])


def whole_clip(unet, vae, c, which, args):
    """A function without arguments: a clip by ModelScope's student, or by diffusers' guided pipeline."""
    steps, T, (H, W) = int(which.split()[1]), args.frames, args.size
    if is_ours(which):
        models = SimpleNamespace(unet=unet, vae=vae, text=lambda captions: c)
        sampling = Sampling(steps=steps)
        return lambda: vae.decode(turbo.generate(models, ["a"], [0], (T, H, W), sampling).to(c), args.chunk)

    from diffusers import DDIMScheduler, TextToVideoSDPipeline
    vae.enable_slicing()                                    # decodes frame by frame, as ours
    pipeline = TextToVideoSDPipeline(vae, None, None, unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(prompt_embeds=c, negative_prompt_embeds=c, num_inference_steps=steps,
                            num_frames=T, height=H, width=W, output_type="pt")


@torch.no_grad()
def count(which, what, args) -> tuple[int, int]:
    """FLOP of a pass, and bytes of the tensors that it holds at its peak."""
    simulated = argparse.Namespace(**vars(args) | dict(device="cpu"))
    with simulation() as counter:
        with build("cpu", getattr(torch, args.dtype)):
            net = network(which, what, "cpu")
        if is_ours(which) and args.device == "cpu":
            speed_up(CPU_LAYERS, net)
        run = one_pass(net, which, what, simulated)
        counter.peak = before = counter.live
        run()
    return counter.flops, counter.peak - before


class Kinds(TorchDispatchMode):
    """Seconds and FLOP by kind of operation, on a CPU."""

    def __init__(self):
        super().__init__()
        self.seconds, self.flops = Counter(), Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op.overloadpacket.__name__, kwargs or {}
        kind = next((kind for part, kind in KINDS.items() if part in name), "rest")
        if kind == "convolution":
            kind += " " + "x".join(str(n) for n in args[1].shape[2:])
        start = time.process_time()
        out = op(*args, **kwargs)
        self.seconds[kind] += time.process_time() - start
        if op.overloadpacket in flop_registry:
            self.flops[kind] += flop_registry[op.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def show(self, rate: float) -> None:
        for kind, seconds in self.seconds.most_common():
            share = f"{self.flops[kind] / seconds / rate:6.0%} of a product's rate" * bool(self.flops[kind])
            print(f"  {kind:20}{seconds:8.2f} s{self.flops[kind] / 1e12:8.3f} TFLOP{share}")


def product_rate(args) -> float:
    """FLOP per second (of the processor, on a CPU) of a large matrix product."""
    n, times = (8192, 10) if args.device == "cuda" else (2048, 4)
    a = torch.randn(n, n, device=args.device, dtype=getattr(torch, args.dtype))
    wait, clock = clocks(args)
    a @ a
    wait()
    start = clock()
    for _ in range(times):
        a @ a
    wait()
    return times * 2 * n ** 3 / (clock() - start)


def clocks(args):
    """How to wait for the device, and what measures its time."""
    if args.device == "cuda":
        return torch.cuda.synchronize, time.perf_counter
    return lambda: None, time.process_time


def held(args) -> float:
    """GiB in memory now: resident on a CPU, allocated on a GPU."""
    if args.device == "cuda":
        return torch.cuda.memory_allocated() / 2 ** 30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2 ** 30


def prepare(which, what, args):
    """A pass with random weights, ready to run."""
    torch.manual_seed(0)
    net = network(which, what).to(getattr(torch, args.dtype)).to_empty(device=args.device).eval()
    for p in net.requires_grad_(False).parameters():
        p.normal_(std=0.02)
        if is_ours(which) and p.dim() in FORMATS:           # as weights.fill leaves them
            p.data = p.data.contiguous(memory_format=FORMATS[p.dim()])
    if is_ours(which):
        speed_up(CPU_LAYERS, net)
    return one_pass(net, which, what, args)


def give_back(size: int) -> None:
    """From now on glibc gives freed blocks of so many bytes back at once. Nothing happens elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, size)                                   # M_MMAP_THRESHOLD
        mallopt(-1, size)                                   # M_TRIM_THRESHOLD


@torch.no_grad()
def measure(which, what, args):
    """{"seconds", "busy" (of the processor), "peak", "activations" (GiB) of a pass, "rate" of a product}"""
    run, wait = prepare(which, what, args), clocks(args)[0]
    rate, before = product_rate(args), held(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    give_back(2 ** 18)
    run(), wait()
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if args.device == "cuda" else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)

    give_back(2 ** 25)
    start, start_busy = time.perf_counter(), time.process_time()
    for _ in range(args.repeat):
        run()
    wait()
    seconds = (time.perf_counter() - start) / args.repeat
    busy = (time.process_time() - start_busy) / args.repeat
    return dict(seconds=seconds, busy=seconds if args.device == "cuda" else busy, peak=peak, rate=rate,
                activations=peak - before)


@torch.no_grad()
def table(what, args) -> None:
    """Prints where our pass spends its time."""
    run, rate = prepare("ours", what, args), product_rate(args)
    with Kinds() as kinds:
        run()
    rate = (rate + product_rate(args)) / 2                  # before and after: a busy machine changes it
    seconds, flops = sum(kinds.seconds.values()), sum(kinds.flops.values())
    print(f"{what}: {seconds:.1f} s, floor x{seconds * rate / flops:.2f} of {rate / 1e9:.0f} GFLOP/s")
    kinds.show(rate)


# ---- what recomputing saves and costs ----------------------------------------------------------------------

def checkpointing(args) -> None:
    """Prints what the levels of VideoCrafter2 with LoRA 64 would keep for the backward pass, one clip of
    512x320 in bf16, and the FLOP that recomputing costs instead; counted as a GPU would hold it."""
    kept, flops = Counter(), Counter()
    with simulation() as counter:
        with build("cpu", torch.bfloat16):
            unet = UNet3D(replace(VC2, guidance=True))
        turbo.inject(unet, 64)

        def run(block, h, *others):
            held, done = counter.live, counter.flops
            out = block(h, *others)
            kept[h.shape[-2:]] += counter.live - held - out.nbytes
            flops[h.shape[-2:]] += counter.flops - done
            return out

        unet.run = run
        z, c = torch.randn(1, 4, 16, 40, 64), torch.randn(1, 77, 1024)
        with torch.autocast("cpu", torch.bfloat16):
            unet(z, torch.tensor([999]), c, w=torch.tensor([7.5]), fps=16)

    for (H, W), held in kept.items():
        gib, tflop = held / 2 ** 30, flops[H, W] / 1e12
        print(f"blocks at {H}x{W}: {gib:.2f} GiB less, {tflop:.2f} TFLOP more, {gib / tflop:.2f} GiB/TFLOP")
    print(f"together {sum(kept.values()) / 2 ** 30:.2f} GiB, {sum(flops.values()) / 1e12:.2f} TFLOP")


# ---- the toy's training step -------------------------------------------------------------------------------

def toy(args) -> None:
    """Prints seconds of a step of `train.py --preset shapes` on threads and on processes of one thread each,
    with ratios to one thread."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    runs = {"1 thread": ([], "1"), "2 threads": ([], "2"), "2 processes": (torchrun, "1")}
    base = None
    for name, (launcher, threads) in runs.items():
        command = [sys.executable, *launcher, "train.py", "--preset", "shapes", "--dry-run", "10"]
        done = subprocess.run([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True, check=True,
                              cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads})
        seconds = float(re.search(r"a step takes (\S+) s", done.stdout)[1])
        base = base or seconds
        print(f"{'toy':6}{name:21}{seconds:8.2f} s a step   time x{seconds / base:.2f}", flush=True)


# ---- what everything takes, simulated ----------------------------------------------------------------------

def simulated(command: str, options: str):
    """The budget of a command."""
    from fakes import Fake

    from plumbing import budget
    budget.FakeTensorMode = Fake                            # remembers results, in half of the time
    if command == "train.py":
        import train
        with contextlib.redirect_stdout(io.StringIO()):
            return train.main([*options.split(), "--dry-run", "0", "--device", "cpu"])
    return {"prepare.py": cached_clip, "sample.py": sampled_clip}[command](options)


def sampled_clip(options: str) -> Budget:
    """What sample.py takes for a clip."""
    from rewards import parse_spec, untrained
    from sample import Config
    config = cli.parse(Config, options.split())
    dtype, B, terms = getattr(torch, config.dtype or "bfloat16"), config.batch or 1, []
    family = FAMILIES[config.model]
    sampling = family.sampling["teacher" if config.method == "teacher" else "turbo"]
    clips = (["a prompt"] * B, [0] * B, (family.frames, family.height, family.width))

    with simulation() as counter, torch.no_grad():
        part = Budget(counter)
        with part("construction"), build("cpu", dtype):
            models = model.untrained(config.model, guidance=config.method != "teacher")
            models.unet.requires_grad_(False).checkpointing = bool(config.refine)
            for name, _, _ in map(parse_spec, config.reward):
                reward = untrained(name, "cpu", dtype)
                reward.checkpoint(True)
                terms.append(turbo.RewardTerm(reward, 1.0, reward.frames or 6, reward.kind == "video", name))
        pick_worst(terms)
        part.held = counter.live
        if config.refine:
            with part("steps of --refine"), torch.enable_grad():
                z, _ = turbo.generate_refined(models, *clips, sampling, terms, 0)
            part.flops["steps of --refine"] *= config.refine + 1
        else:
            with part("captions and steps"):
                z = turbo.generate(models, *clips, replace(sampling, steps=1))
            part.flops["captions and steps"] *= sampling.steps
        with part("decode"):
            models.vae.decode(z, 4)
    return part


def cached_clip(options: str) -> Budget:
    """What prepare.py takes for a clip whose motion guides, in one draw of t and ε."""
    from train import PRESETS, Config
    recipe = Config(**PRESETS["turbo-v2"])
    with simulation() as counter, torch.no_grad():
        part = Budget(counter)
        with part("construction"), build("cpu", torch.bfloat16):
            models = model.untrained("vc2")
            models.unet.requires_grad_(False).checkpointing = True
        part.held = counter.live
        with part("encode"):
            clip = torch.zeros(1, 3, recipe.frames, recipe.height, recipe.width, dtype=torch.uint8)
            z0 = model.to_latents(models.vae, clip, [torch.Generator()])
            c, uncond = models.text(["a prompt"]), models.text([""])
        with part("inversion"):
            t = torch.full((1,), 999)
            z_ref = models.unet(z0, t, c, fps=recipe.fps).float()
        part.flops["inversion"] *= recipe.inversion_steps
        with part("draw of t and ε"):
            turbo.TeacherOutput.of(models.unet, Schedule(recipe.grid), z0, torch.randn_like(z0), t, z_ref, c,
                                   uncond, fps=recipe.fps)
    return part


def budget_row(command: str, options: str, made) -> str:
    flops = sum(made.flops.values())
    seconds = " / ".join(f"{flops / rate:.2f}" for rate in CARDS.values())
    peak = max(made.peak.values())
    return (f"| `{command} {options}".rstrip() + f"` | {made.held / GIB:.1f} | {peak / GIB:.1f} | "
            f"{flops / 1e12:.0f} | {seconds} |")


def budgets(args) -> None:
    """Prints Markdown: one row for each command, and the parts of a step of turbo-vc2."""
    cards = " / ".join(CARDS)
    print(f"| | held, GiB | peak, GiB | TFLOP | s at the peak rates of {cards} |\n" + "|---" * 5 + "|")
    parts = []
    for command, each in BUDGETS.items():
        for options in each:
            if args.only in f"{command} {options}":
                made = simulated(command, options)
                print(budget_row(command, options, made), flush=True)
                parts = parts or [(name, peak, made.flops[name]) for name, peak in made.peak.items()]
    print("\n| part of the first one | peak, GiB | TFLOP |\n|---|---|---|")
    for name, peak, flops in parts:
        print(f"| {name} | {peak / GIB:.1f} | {flops / 1e12:.0f} |")


def main():
    args = options()
    if args.one:
        return print(json.dumps(measure(*args.one.split(":"), args)))
    if {*COMPARED} & set(args.what):
        print(f"{args.frames} frames of {args.size[0]}x{args.size[1]}, {args.dtype} on {args.device}, "
              f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for what in args.what:
        if what in ("toy", "checkpointing", "budgets"):
            {"toy": toy, "checkpointing": checkpointing, "budgets": budgets}[what](args)
        elif args.table:
            table(what, args)
        else:
            compare(what, args)


def compare(what, args) -> None:
    """Prints a pass of diffusers' network, and of ours as a ratio to it."""
    base = None
    for which in COMPARED[what]:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", f"{which}:{what}"],
                              stdout=subprocess.PIPE, text=True, check=True)
        result, counted = json.loads(done.stdout.splitlines()[-1]), ""
        if what != "clips":                                 # whose scheduler needs numbers: no fake tensors
            flops, result["tensors"] = count(which, what, args)
            floor = result["busy"] * result["rate"] / flops
            counted = f"   {flops / 1e12:.2f} TFLOP, floor x{floor:.2f} of {result['rate'] / 1e9:.0f} GFLOP/s"

        base = base or result
        ratios = {name: result[key] / base[key] for name, key in RATIOS.items() if key in result}
        print(f"{what:6}{which:21}{1000 * result['seconds']:10.0f} ms{result['peak']:8.2f} GiB"
              + "".join(f"   {name} x{ratio:.2f}" for name, ratio in ratios.items()) + counted, flush=True)


if __name__ == "__main__":
    main()
