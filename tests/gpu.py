"""The first ten minutes on a GPU: one run of at most nine, most valuable first, each row printed as it comes.

    python tests/gpu.py                         # prints Markdown; exit code 1 where a check fails
    python tests/gpu.py --only step --options --preset turbo-v2
    python tests/gpu.py --tiny --device cpu     # the same program with tiny networks, to see that it runs

Networks are full-size with random weights, so that nothing is downloaded. The floor of a row is its FLOP,
counted in its first run by torch's formulas, over the rate of one large matrix product in bf16, measured at
the start (790 TFLOP/s, a good H100: 16 ms for a UNet pass of 12.5 TFLOP, 95 ms for a clip of 75, 0.25 s for a
training step of 178). Checks: float32 on the GPU against the CPU, bf16 against float32, compiled against
eager, and the peak of the training step against the dry run's. What is asked below them is answered by two
rows, the second with its ratio to the first. With --tiny on the CPU compiled networks are traced and
differentiated only (aot_eager): inductor's kernels would take minutes there.
"""
import argparse
import contextlib
import dataclasses
import gc
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from oracles import compile_layers, sizes
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

import model  # noqa: E402
import rewards  # noqa: E402
import train  # noqa: E402
import turbo  # noqa: E402
from networks import fast_cpu  # noqa: E402
from plumbing import budget  # noqa: E402
from solver import Sampling  # noqa: E402

BOUNDS = {"float32": 1e-4, "bf16": 0.03, "compiled": 0.03}      # relative error, root mean square
MEMORY = 1.15                                                   # of the simulated peak
STEP = ["--preset", "turbo-vc2", "--batch", "1"]                # with both rewards, HPSv2.1 and InternVideo2


# ---- measuring ---------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Row:
    """A line of the table."""
    name: str
    seconds: float = 0.0
    flops: int = 0
    peak: int = 0                       # bytes
    note: str = ""
    good: bool = True                   # a check that holds

    def cells(self, rate: float) -> str:
        floor = self.flops / rate
        times = f"{self.seconds / floor:.2f}" if floor else "-"
        return (f"| {self.name} | {1000 * self.seconds:.2f} | {self.flops / 1e12:.2f} | {1000 * floor:.2f} | "
                f"{times} | {self.peak / budget.GIB:.2f} | {self.note} |")

    def beside(self, base: "Row") -> "Row":
        return dataclasses.replace(self, note=f"x{self.seconds / base.seconds:.3f}")


class Bench:
    """A device, networks on it, and what measures them."""

    def __init__(self, device: str, repeat: int, tiny: bool, options: list[str]):
        self.device, self.repeat, self.tiny, self.options = torch.device(device), repeat, tiny, options
        self.cuda = self.device.type == "cuda"
        self.peak = 0                       # of the training step
        family = model.FAMILIES["vc2"]
        self.size = family.frames, family.height, family.width
        with budget.build(self.device, torch.bfloat16):
            self.models = model.untrained("vc2", guidance=True)
        for p in self.models.unet.requires_grad_(False).parameters():
            if p.ndim > 1:                                      # last layers are not zero: all of it counts
                torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
        self.models.unet.out.float()                            # as `model.load` has it

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, name: str, run: Callable, flops: int | None = None) -> Row:
        """FLOP and memory of a first run, and the mean time of `repeat` others after a second one.

        flops: those of a compiled or captured run, which cannot be counted."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        with budget.Counter(self.device.type) if flops is None else nullcontext() as counter:
            run()
        self.wait()
        peak = torch.cuda.max_memory_allocated() if self.cuda else counter.peak if counter else 0
        run()
        self.wait()
        start = time.perf_counter()
        for _ in range(self.repeat):
            run()
        self.wait()
        seconds = (time.perf_counter() - start) / self.repeat
        return Row(name, seconds, counter.flops if counter else flops, peak)

    def pair(self, first: tuple[str, Callable], *others: tuple[str, Callable]) -> Iterator[Row]:
        """The first row, and others with their time as a ratio to it."""
        base = self.measure(*first)
        yield base
        for name, run in others:
            yield self.measure(name, run).beside(base)

    def inputs(self, size: tuple[int, int, int]) -> tuple:
        """z, t, c of a clip."""
        device = self.device
        z = torch.randn(1, *self.models.vae.config.shape(*size), device=device)
        c = torch.randn(1, self.models.text.config.context_length, self.models.unet.config.context_dim)
        return z, torch.tensor([499], device=device), c.to(device, torch.bfloat16)


@torch.no_grad()
def unet_pass(unet, z, t, c):
    return unet(z, t, c, w=torch.full((1,), 7.5, device=z.device), fps=16)


@torch.no_grad()
def decoded(vae, z):
    return vae.decode(z, 4)


def clip(models, size) -> torch.Tensor:
    sampling = Sampling("student", steps=4, guidance=7.5, grid=50, fps=16)
    return model.to_clip(models.vae, turbo.generate(models, ["a corgi"], [0], size, sampling), 4)


def wide(network, device):
    """A copy in float32."""
    made = type(network)(network.config).to(device)
    made.load_state_dict({name: x.float() for name, x in network.state_dict().items()})
    return made.requires_grad_(False)


def check(name: str, x, exact) -> Row:
    """Relative error, root mean square, and whether it is within its bound."""
    error = ((x.float().cpu() - exact.float().cpu()).norm() / exact.float().cpu().norm()).item()
    bound = BOUNDS[name.split()[0]]
    return Row(f"error of {name}", note=f"{error:.2g} of {bound}", good=error <= bound)


# ---- sections, most valuable first -------------------------------------------------------------------------

def exactness(bench: Bench) -> Iterator[Row]:
    """A short clip in float32 on the CPU, in float32 here, in bf16 here."""
    z, t, c = bench.inputs((2, *bench.size[1:]) if bench.tiny else (2, 64, 128))
    for name, network, args, run in (("UNet", bench.models.unet, (z, t, c), unet_pass),
                                     ("VAE", bench.models.vae, (z,), decoded)):
        plain = [x.float() if x.is_floating_point() else x for x in args]
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        exact = run(wide(network, bench.device), *plain)
        on_cpu = run(wide(network, "cpu"), *(x.cpu() for x in plain))
        yield check(f"float32 {name} against a CPU", exact, on_cpu)
        yield check(f"bf16 {name}", run(network, *args), exact)


def eager(bench: Bench) -> Iterator[Row]:
    """A clip and its parts."""
    z, t, c = bench.inputs(bench.size)
    models = bench.models
    yield bench.measure("UNet pass", lambda: unet_pass(models.unet, z, t, c))
    yield bench.measure("decoding", lambda: decoded(models.vae, z))
    yield bench.measure("clip in 4 steps", lambda: clip(models, bench.size))


def training(bench: Bench, name: str = "training step", options: tuple = ()) -> Iterator[Row]:
    """The program's own --dry-run N: its table of parts, and a row."""
    gc.collect()
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if bench.cuda else 0     # this program's own networks
    table, n = io.StringIO(), str(bench.repeat)
    with contextlib.redirect_stdout(table):
        made = train.main([*STEP, *bench.options, "--device", bench.device.type, "--dry-run", n, *options])
    if not options:
        print("\n".join(f"<!-- {line} -->" for line in table.getvalue().splitlines() if line))
    peak = torch.cuda.max_memory_allocated() - before if bench.cuda else max(made.peak.values())
    bench.peak = bench.peak or peak
    yield Row(name, sum(made.seconds.values()) / bench.repeat, sum(made.flops.values()), peak)


def compiled(bench: Bench) -> Iterator[Row]:
    z, t, c = bench.inputs(bench.size)
    unet, eager_eps = bench.models.unet, unet_pass(bench.models.unet, z, t, c)
    with budget.Counter(bench.device.type) as counter:
        unet_pass(unet, z, t, c)
    compile_layers(unet, fullgraph=True, backend="inductor" if bench.cuda else "aot_eager")
    yield check("compiled UNet", unet_pass(unet, z, t, c), eager_eps)
    yield bench.measure("UNet pass, compiled", lambda: unet_pass(unet, z, t, c), counter.flops)
    yield bench.measure("clip in 4 steps, compiled; floor of its passes",
                        lambda: clip(bench.models, bench.size), 4 * counter.flops)
    for layer in unet.modules():
        layer._compiled_call_impl = None                        # not compiled any more


def layouts(bench: Bench) -> Iterator[Row]:
    """NCHW against NHWC: torch's GroupNorm returns NCHW on CUDA."""
    z, t, c = bench.inputs(bench.size)

    def in_layout(network, formats, run):
        for p in network.parameters():
            if p.dim() in fast_cpu.FORMATS:
                p.data = p.data.contiguous(memory_format=formats.get(p.dim(), torch.contiguous_format))
        return run

    unet, vae = bench.models.unet, bench.models.vae
    for name, network, run in (("UNet pass", unet, lambda: unet_pass(unet, z, t, c)),
                               ("decoding", vae, lambda: decoded(vae, z))):
        yield (base := bench.measure(f"{name}, NCHW", in_layout(network, {}, run)))
        yield bench.measure(f"{name}, NHWC", in_layout(network, fast_cpu.FORMATS, run)).beside(base)
        in_layout(network, {}, run)


def attention(bench: Bench) -> Iterator[Row]:
    """Attention over time at 40x64: the formula against torch's kernels, which may refuse."""
    T, H, W = bench.size
    make = dict(device=bench.device, dtype=torch.bfloat16)
    q, k, v = torch.randn(3, 1, H * W // bench.models.vae.config.factor ** 2 * 5, T, 64, **make)
    yield (base := bench.measure("attention over time, formula", lambda: model.attention(q, k, v)))
    shapes = {"heads": (q, k, v), "a batch": [x.transpose(0, 1) for x in (q, k, v)]}
    for backend, (shape, inputs) in product(("FLASH", "EFFICIENT", "CUDNN"), shapes.items()):
        name = f"attention over time, {backend.lower()}, pixels as {shape}"
        try:
            with sdpa_kernel(getattr(SDPBackend, f"{backend}_ATTENTION")):
                run = partial(F.scaled_dot_product_attention, *inputs)
                yield bench.measure(name, run, base.flops).beside(base)
        except RuntimeError as error:
            yield Row(name, note=f"refused: {str(error).splitlines()[0][:60]}")


def switches(bench: Bench) -> Iterator[Row]:
    """cudnn.benchmark, norms in float32 (training's autocast), TF32 of float32 networks."""
    z, t, c = bench.inputs(bench.size)
    unet = bench.models.unet

    def run(network=unet, c=c, search=True, autocast=False, precision="high"):
        torch.backends.cudnn.benchmark = search
        torch.backends.cudnn.allow_tf32 = precision == "high"
        torch.set_float32_matmul_precision(precision)
        with torch.autocast(bench.device.type, torch.bfloat16, autocast):
            return unet_pass(network, z, t, c)

    yield from bench.pair(("UNet pass, cudnn.benchmark", run),
                          ("UNet pass, without it", lambda: run(search=False)),
                          ("UNet pass in autocast, norms in float32", lambda: run(autocast=True)))
    exact = wide(unet, bench.device)
    yield from bench.pair(("float32 UNet pass, TF32", lambda: run(exact, c.float())),
                          ("float32 UNet pass, exact", lambda: run(exact, c.float(), precision="highest")))


def graphs(bench: Bench) -> Iterator[Row]:
    """The four jumps as launches, and as replays of one captured pass."""
    z, t, c = bench.inputs(bench.size)
    unet = bench.models.unet
    yield (base := bench.measure("4 UNet passes", lambda: [unet_pass(unet, z, t, c) for _ in range(4)]))
    if not bench.cuda:
        return (yield Row("4 replays of a CUDA graph", note="needs CUDA"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unet_pass(unet, z, t, c)
    yield bench.measure("4 replays of a CUDA graph", lambda: [graph.replay() for _ in range(4)],
                        base.flops).beside(base)


def memory(bench: Bench) -> Iterator[Row]:
    """What memory costs in time: --offload, --chunk; and the peak of the step beside the simulated one."""
    for options in (("--offload",), ("--chunk", "4"), ("--chunk", "0")):
        yield from training(bench, f"training step, {' '.join(options)}", options)
    with contextlib.redirect_stdout(io.StringIO()):
        simulated = train.main([*STEP, *bench.options, "--device", "cpu", "--dry-run", "0"])
    ratio = bench.peak / max(simulated.peak.values())           # 0 where the training step was left out
    yield Row("peak of the training step", peak=bench.peak, note=f"x{ratio:.2f} of the simulated",
              good=ratio <= MEMORY)


SECTIONS = {"exact": exactness, "eager": eager, "step": training, "compiled": compiled, "layouts": layouts,
            "attention": attention, "switches": switches, "graphs": graphs, "memory": memory}


@contextlib.contextmanager
def tiny_families():
    """Within the block the published families are tiny; -> the options of a training step in them."""
    known, recipes = dict(model.FAMILIES), dict(rewards.RECIPES)
    small = dict(head_dim=16, context_dim=16, init_heads=2, groups=8)
    unet = sizes(32, (1,), 1, attention_levels=(0,)) | small
    vae = model.VAEConfig(channels=32, mult=(1, 1), res_blocks=1, patch=2)
    text = model.TextConfig(width=16, layers=2, heads=2)
    towers = dict(image_size=8, patch=4, width=8, layers=1, heads=2, embed_dim=8, text_width=8, text_layers=1,
                  text_heads=2)
    vit, bert = rewards.ViTConfig(8, 4, 8, 1, 2, 8), rewards.BERTConfig(9, 8, 1, 2, 8, token_types=2)
    judges = {"hpsv2": rewards.CLIPConfig(**towers), "clip": rewards.CLIPConfig(**towers),
              "internvideo2": rewards.InternVideo2Config(vit, bert, 8, 8)}
    try:
        for name, family in known.items():
            made = dataclasses.replace(family.unet, **unet)
            model.FAMILIES[name] = dataclasses.replace(family, unet=made, vae=vae, text=text, frames=8,
                                                       height=16, width=16)
        for name, config in judges.items():
            rewards.RECIPES[name] = dataclasses.replace(recipes[name], config=lambda c=config: c)
        yield "--frames 8 --height 16 --width 16".split()
    finally:
        model.FAMILIES.update(known)
        rewards.RECIPES.update(recipes)


def main(argv: list[str] | None = None) -> int:
    """Prints the rows -> how many checks failed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9, help="no section begins after 4/5 of them")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of train.py")
    args, start = parser.parse_args(argv), time.perf_counter()
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("gpu.py: full-size networks need a GPU; try --tiny --device cpu")

    failed = []
    with tiny_families() if args.tiny else nullcontext([]) as options:
        bench = Bench(args.device, args.repeat, args.tiny, [*options, *args.options])
        n = 256 if args.tiny else 8192                          # of the product that gives the rate
        a = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
        rate = 2 * n ** 3 / bench.measure("", lambda: a @ a).seconds
        name = torch.cuda.get_device_name() if bench.cuda else "CPU"
        print(f"{name}, torch {torch.__version__}, VC2 in bf16, "
              f"{'x'.join(map(str, bench.size))}; a matrix product makes {rate / 1e12:.1f} TFLOP/s\n\n"
              "| | ms | TFLOP | floor, ms | times the floor | peak GiB | |\n" + "|---" * 7 + "|", flush=True)
        for name in args.only:
            if time.perf_counter() - start > 48 * args.minutes:
                print(f"| {name}: no time left | | | | | | |")
                continue
            try:
                for row in SECTIONS[name](bench):
                    print(row.cells(rate), flush=True)
                    failed += [] if row.good else [row.name]
            except Exception as error:                      # the sections after it are worth their minutes
                failed.append(name)
                print(f"| {name} failed: {error!r:.300} | | | | | | |", flush=True)
    print(f"\nchecks that failed: {', '.join(failed) or 'none'}; {time.perf_counter() - start:.0f} s")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main() > 0)
