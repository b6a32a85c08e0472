"""For whoever has a GPU for ten minutes: checks, then what every part costs beside its arithmetic floor.

    python tests/gpu.py                         # prints Markdown; exit code 1 where a check fails
    python tests/gpu.py --presets turbo-vc2     # only the training step of these
    python tests/gpu.py --tiny --device cpu     # the same program with tiny networks, to see that it runs

Networks are full-size with random weights, so that nothing is downloaded. The floor of a part is its FLOP,
counted on fake tensors by torch's formulas, over the rate of one large matrix product, measured in the same
run. Memory is compared with what the dry run simulates: more than 15 % above it is a failure, as an error of
bf16 beyond its bound is. With --tiny on the CPU all of it runs, rewards, compilation and memory too, but
compiled networks are traced and differentiated only (aot_eager): inductor's kernels would take minutes there.
"""
import argparse
import contextlib
import dataclasses
import gc
import sys
import time
from pathlib import Path

import torch
from oracles import sizes

sys.path.insert(0, str(Path(__file__).parent.parent))

import model  # noqa: E402
import rewards  # noqa: E402
import train  # noqa: E402
import turbo  # noqa: E402
from plumbing import budget  # noqa: E402
from plumbing.run import Group  # noqa: E402
from solver import Sampling  # noqa: E402

TRAINED = ("vcm-vc2", "turbo-vc2", "vcm-ms", "turbo-ms", "turbo-v2")
BOUNDS = {"UNet": 0.03, "VAE": 0.03, "compiled UNet": 0.03}     # relative error, root mean square, of bf16
MEMORY = 1.15                                                   # of the simulated peak


# ---- measuring ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A line of the table."""
    name: str
    seconds: float
    flops: int
    peak: int                           # bytes
    simulated: int | None = None        # the same by the dry run; None: not compared

    def cells(self, rate: float) -> str:
        floor = self.flops / rate
        simulated = "-" if self.simulated is None else f"{self.simulated / budget.GIB:.3g}"
        return (f"| {self.name} | {self.seconds:.3f} | {self.flops / 1e12:.2f} | {floor:.3f} | "
                f"{self.seconds / max(floor, 1e-9):.2f} | {self.peak / budget.GIB:.3g} | {simulated} |")

    def fits(self) -> bool:
        return self.simulated is None or self.peak <= MEMORY * self.simulated


class Device:
    """Time and memory on a GPU, or on the CPU."""

    def __init__(self, name: str, repeat: int):
        self.device, self.repeat = torch.device(name), repeat
        self.cuda = self.device.type == "cuda"
        self.bytes = budget.Counter(self.device.type)    # of what is made within it

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, name: str, run, flops: int, simulated: int | None = None) -> Row:
        """Runs once for the memory, then takes the mean of `repeat` runs.

        simulated: bytes of the dry run; without them, on a CPU, memory is not looked at (a compiled network
        cannot be watched there)."""
        watched = self.cuda or simulated is not None
        with self.bytes if watched else contextlib.nullcontext():
            self.bytes.reset()
            run()
            self.wait()
            peak = self.bytes.peak if watched else 0
        start = time.perf_counter()
        for _ in range(self.repeat):
            run()
        self.wait()
        seconds = (time.perf_counter() - start) / self.repeat
        return Row(name, seconds, flops, peak, simulated)

    def rate(self, size: int) -> float:
        """FLOP/s of a bf16 matrix product."""
        a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size ** 3 / self.measure("", lambda: a @ a, 0).seconds


def count(prepare, run) -> tuple[int, int]:
    """run(*prepare()), which make their own tensors, on fake ones -> FLOP of `run`, bytes held at most."""
    with budget.simulation() as counter:
        made = prepare()
        counter.reset()
        before = counter.flops
        run(*made)
        return counter.flops - before, counter.peak


# ---- networks and their parts ------------------------------------------------------------------------------


def networks(name: str, device, dtype=torch.bfloat16) -> model.Models:
    """A student of the family with random weights: last layers are not zero, so that all of it counts."""
    family = model.FAMILIES[name]
    with budget.build(device, dtype):
        unet = model.UNet3D(dataclasses.replace(family.unet, guidance=True)).eval()
        vae, text = model.VAE(family.vae).eval(), model.TextEncoder(family.text).eval()
    for p in unet.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    for network in (unet, vae, text):
        network.requires_grad_(False)
    for p in unet.out.parameters():                             # as `model.load` does
        p.data = p.data.float()
    header = model.complete({"method": "turbo"}, family)
    return model.Models(name, unet, vae, text, family, header)


def inputs(models, size: tuple[int, int, int], device, dtype=torch.bfloat16) -> tuple:
    """z, t, c of a clip."""
    T, H, W = size
    vae = models.vae.config
    z = torch.randn(1, vae.latent, T, H // vae.factor, W // vae.factor, device=device)
    c = torch.randn(1, models.text.config.context_length, models.unet.config.context_dim, device=device)
    return z, torch.tensor([499]).to(device), c.to(dtype)


def unet_step(models, z, t, c):
    with torch.no_grad():
        return models.unet(z, t, c, w=torch.full((1,), 7.5, device=z.device), fps=16)


def decoded(models, z):
    with torch.no_grad():
        return models.vae.decode(z, 4)


def clip(models, size) -> torch.Tensor:
    sampling = Sampling("student", steps=4, guidance=7.5, grid=50, fps=16)
    z = turbo.generate(models, ["a corgi runs through a meadow"], [0], size, sampling)
    return model.to_clip(models.vae, z, 4)


# ---- checks ------------------------------------------------------------------------------------------------


def error(x, exact) -> float:
    """Relative, root mean square."""
    return ((x.float() - exact.float()).norm() / exact.float().norm()).item()


def check(models, size, device) -> dict[str, float]:
    """Relative errors of bf16 against float32 with the same weights."""
    z, t, c = inputs(models, size, device)
    exact = dataclasses.replace(models, unet=wide(models.unet), vae=wide(models.vae))
    return {"UNet": error(unet_step(models, z, t, c), unet_step(exact, z, t, c.float())),
            "VAE": error(decoded(models, z[:, :, :2]), decoded(exact, z[:, :, :2]))}


def wide(network):
    """A copy in float32."""
    made = type(network)(network.config).to(next(network.parameters()).device)
    made.load_state_dict({name: x.float() for name, x in network.state_dict().items()})
    return made.eval().requires_grad_(False)


# ---- the training step -------------------------------------------------------------------------------------


def trainer_of(preset: str, device, options: list[str], counted: bool = False):
    """A trainer of one clip a step with random networks, and its batch."""
    config = train.configure(["--preset", preset, "--batch", "1", "--dry-run", "1", *options])
    group = Group("cpu" if torch.device(device).type == "cpu" else "")
    trainer_class = train.CachedTrainer if config.is_v2 else train.Trainer
    models, _, terms = train.load_world(config, group)
    to_host = (lambda sums: [0.0] * len(sums)) if counted else torch.Tensor.tolist
    trainer = trainer_class(config, models, terms, group)
    trainer.to_host = to_host
    if counted:
        budget.pick_worst(terms)
    return trainer, budget.random_batch(config, models, 1)


def training_row(preset: str, device: Device, options: list[str]) -> Row:
    def prepare():
        trainer, batch = trainer_of(preset, "cpu", options, counted=True)
        trainer.optimizer.step()                                # allocates the moments
        return trainer, batch

    flops, simulated = count(prepare, lambda trainer, batch: trainer.step(batch))
    gc.collect()                                                # the last preset's networks
    with device.bytes:
        trainer, batch = trainer_of(preset, device.device, options)
        trainer.optimizer.step()
    return device.measure(f"training step, {preset}", lambda: trainer.step(batch), flops, simulated)


# ---- the table ---------------------------------------------------------------------------------------------


def clip_rows(name: str, device: Device, backend: str | None) -> tuple[list[Row], dict[str, float]]:
    """UNet step, decoding and whole clip, without and with compilation; and the errors of `check`.

    backend: of torch.compile; None: nothing is compiled."""
    size = clip_size(name)
    with device.bytes:
        models = networks(name, device.device)
        z, t, c = inputs(models, size, device.device)
    label = f"{size[2]}x{size[1]}x{size[0]}, {name}"

    def counted(part) -> tuple[int, int]:
        def prepare():
            fake = networks(name, "cpu")
            return fake, *inputs(fake, size, "cpu")
        return count(prepare, part)

    step_flops, step_bytes = counted(unet_step)
    decode_flops, decode_bytes = counted(lambda fake, z, t, c: decoded(fake, z))
    whole, most = 4 * step_flops + decode_flops, max(step_bytes, decode_bytes)
    rows = [device.measure(f"UNet step, {label}", lambda: unet_step(models, z, t, c), step_flops, step_bytes),
            device.measure(f"decoding, {label}", lambda: decoded(models, z), decode_flops, decode_bytes),
            device.measure(f"clip in 4 steps, {label}", lambda: clip(models, size), whole, most)]

    errors = check(models, size, device.device)
    if backend:
        model.compile_layers(models.unet, fullgraph=True, backend=backend)
        errors["compiled UNet"] = check(models, size, device.device)["UNet"]
        label = f"compiled, {label}"
        rows += [device.measure(f"UNet step, {label}", lambda: unet_step(models, z, t, c), step_flops),
                 device.measure(f"clip in 4 steps, {label}", lambda: clip(models, size), whole)]
    return rows, errors


def clip_size(name: str) -> tuple[int, int, int]:
    family = model.FAMILIES[name]
    return family.frames, family.height, family.width


@contextlib.contextmanager
def tiny_families():
    """Within the block the published families are tiny."""
    known = dict(model.FAMILIES)
    unet = dict(sizes(32, (1,), 1, attention_levels=(0,)), head_dim=16, context_dim=16, init_heads=2, groups=8)
    vae = model.VAEConfig(channels=32, mult=(1, 1), res_blocks=1, patch=2)
    text = model.TextConfig(width=16, layers=2, heads=2)
    recipes = dict(rewards.RECIPES)
    towers = dict(image_size=8, patch=4, width=8, layers=1, heads=2, embed_dim=8, text_width=8, text_layers=1,
                  text_heads=2)
    vit, bert = rewards.ViTConfig(8, 4, 8, 1, 2, 8), rewards.BERTConfig(9, 8, 1, 2, 8, token_types=2)
    judges = {"hpsv2": rewards.CLIPConfig(**towers), "clip": rewards.CLIPConfig(**towers),
              "viclip": rewards.ViCLIPConfig(**towers),
              "internvideo2": rewards.InternVideo2Config(vit, bert, 8, 8)}
    try:
        for name, family in known.items():
            model.FAMILIES[name] = dataclasses.replace(
                family, unet=dataclasses.replace(family.unet, **unet), vae=vae, text=text, frames=8,
                height=16, width=16)
        for name, config in judges.items():
            rewards.RECIPES[name] = dataclasses.replace(recipes[name], config=lambda c=config: c)
        yield "--frames 8 --height 16 --width 16".split()
    finally:
        model.FAMILIES.update(known)
        rewards.RECIPES.update(recipes)


def main(argv: list[str] | None = None) -> int:
    """Prints the table and the checks -> how many of them failed."""
    cuda = torch.cuda.is_available()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--presets", nargs="*", default=TRAINED)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("gpu.py: full-size networks need a GPU; try --tiny --device cpu")

    device = Device(args.device, args.repeat)
    backend = None if args.no_compile else "inductor" if device.cuda else "aot_eager"
    with tiny_families() if args.tiny else contextlib.nullcontext([]) as options:
        rate = device.rate(256 if args.tiny else 8192)
        gpu = torch.cuda.get_device_name() if device.cuda else "CPU"
        print(f"{gpu}, torch {torch.__version__}, bf16; a matrix product makes {rate / 1e12:.1f} TFLOP/s\n")
        print("| | s | TFLOP | floor, s | times the floor | peak GiB | simulated GiB |\n" + "|---" * 7 + "|")
        rows, errors = clip_rows("vc2", device, backend)
        for row in rows:
            print(row.cells(rate), flush=True)
        for preset in args.presets:
            rows.append(training_row(preset, device, options))
            print(rows[-1].cells(rate), flush=True)

    print("\n| relative error of bf16 | | bound |\n|---|---|---|")
    for name, value in errors.items():
        print(f"| {name} | {value:.4f} | {BOUNDS[name]} |")
    wrong = [name for name, value in errors.items() if not value <= BOUNDS[name]]
    large = [row.name for row in rows if not row.fits()]
    compiling = f"compiled by {backend}" if backend else "not compiled"
    print(f"\n{compiling}; beyond their bound: {', '.join(wrong) or 'none'}; more than {MEMORY} times the "
          f"simulated memory: {', '.join(large) or 'none'}")
    return len(wrong) + len(large)


if __name__ == "__main__":
    sys.exit(main() > 0)
