"""The networks against independent ones: diffusers, transformers, and numbers taken from the published code.

Reference numbers come from the T2V-Turbo code, run once on SMALL with the weights of `deterministic`.
"""
import argparse
import copy
import functools
import hashlib
import re
import zlib
from dataclasses import replace

import benchmark
import pytest
import torch
from oracles import diffusers, sizes, transformers

import model
import solver
from model import MODELSCOPE, VAE, VC2, TextConfig, TextEncoder, UNet3D, UNetConfig, VAEConfig
from networks import fast_cpu, layouts
from networks.fast_cpu import speed_up
from networks.layouts import DIFFUSERS_VAE, OPENCLIP_BLOCKS, UNET, huggingface_text, rename, rows
from networks.vae import load_tiny_decoder
from plumbing.weights import fill

SMALL = UNetConfig(**sizes(32, (1, 2, 2, 2)), head_dim=8, context_dim=24)
TINY = replace(SMALL, **sizes(32, (1, 2), 1, (0, 1)), groups=8)
SMALL_VAE = VAEConfig(channels=32, mult=(1, 1, 2, 2))
SMALL_TEXT = TextConfig(width=24, layers=3, heads=2)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    """Equal to 1e-5 of the largest value."""
    return (a - b).abs().max() <= tolerance * b.abs().max()


@functools.cache
def original_shapes(config):
    """{VideoCrafter2's name: shape}; test_names_and_shapes_of_the_public_files knows them independently."""
    to_public = [(r"^input_blocks\.0\.0\.conv", "input_blocks.0.0"),
                 *rows(layouts.RESBLOCK, layouts.IN_RESBLOCK, inverse=True),
                 *rows(layouts.TRANSFORMER, layouts.IN_TRANSFORMER, inverse=True)]
    with torch.device("meta"):
        state = rename(UNet3D(config).state_dict(), to_public)
    conv1d = "init_attn.0.proj_in.weight", "init_attn.0.proj_out.weight"
    return {key: (*x.shape, 1) if key in conv1d else tuple(x.shape) for key, x in state.items()}


def deterministic(shapes):
    """Weights that need no file: each tensor from a generator seeded with its name."""
    state = {}
    for key, shape in shapes.items():
        x = randn(zlib.crc32(key.encode()), *shape)
        state[key] = (
            0.1 * x + key.endswith("weight") if len(shape) == 1 else x / torch.tensor(shape[1:]).prod().sqrt()
        )
    return state


def build(network, config, state):
    with torch.device("meta"):
        module = network(config)
    return fill(module, state, "test")


def original(config):
    """Our UNet with the weights that the published code was run with."""
    return build(UNet3D, config, rename(deterministic(original_shapes(config)), UNET))


@pytest.fixture(scope="module")
def unet_pair():
    """diffusers' UNet with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = diffusers.UNet3DConditionModel(
        block_out_channels=(32, 64, 64, 64), cross_attention_dim=24, attention_head_dim=8, sample_size=8,
        down_block_types=("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3).eval()
    theirs.load_state_dict(deterministic({key: tuple(x.shape) for key, x in theirs.state_dict().items()}))
    return theirs, build(UNet3D, SMALL, rename(theirs.state_dict(), UNET))


INPUTS = randn(1, 2, 4, 3, 16, 16), torch.tensor([3, 979]), randn(2, 2, 5, 24)        # z, t, context
W = torch.tensor([7.5, 14.2])


# ---- UNet --------------------------------------------------------------------------------------------------

def published(y):
    """The six numbers noted of the published code's output."""
    y = y.flatten()
    return y[::len(y) // 6][:6]


def test_unet_equals_diffusers(unet_pair):
    theirs, ours = unet_pair
    t, z, c = torch.tensor([5, 900]), randn(3, 2, 4, 3, 16, 24), randn(4, 2, 7, 24)
    with torch.no_grad():
        assert close(ours(z, t, c), theirs(z, t, encoder_hidden_states=c).sample)


def test_gradients_equal_diffusers(unet_pair):
    """Of inputs and of every weight, in float64: in float32 correct networks differ by up to 3e-5."""
    theirs, ours = (copy.deepcopy(unet).double() for unet in unet_pair)
    t, z, c = torch.tensor([5, 900]), randn(3, 2, 4, 3, 16, 8).double(), randn(4, 2, 7, 24).double()
    z.requires_grad_(), c.requires_grad_()
    a, b = theirs(z, t, encoder_hidden_states=c).sample, ours(z, t, c)
    probe = randn(5, *a.shape)
    da, db = (torch.autograd.grad((y * probe).sum(), [z, c, *net.parameters()])
              for y, net in ((a, theirs), (b, ours)))
    assert close(db[0], da[0]) and close(db[1], da[1])
    da = rename(dict(zip((key for key, _ in theirs.named_parameters()), da[2:], strict=True)), UNET)
    for (key, _), g in zip(ours.named_parameters(), db[2:], strict=True):
        assert (g - da[key].view_as(g)).abs().max() < 1e-5 * da[key].abs().max() + 1e-12, key  # some are zero


@pytest.mark.parametrize("config, given, expected", [
    ({}, {}, [-.0900834, .4749277, .168649, -.2127277, -.4136356, .4136095]),
    ({}, dict(fps=8), [-.1048209, .44441, .1628433, -.2269125, -.4501387, .4178243]),
    ({}, dict(fps=28), [-.0952577, .4616636, .1689128, -.2338706, -.4420432, .4352682]),
    (dict(guidance=True), dict(fps=8, w=W), [-.1307804, .4606087, .1881391, -.2197787, -.4324611, .4341577]),
    (dict(guidance=True, motion=True), dict(fps=8, w=W, motion=torch.tensor([0.05, 0.0])),
     [-.1088979, .4450589, .1715164, -.2278798, -.4524518, .4187988]),
    (dict(guidance=True, motion=True), dict(fps=8, w=W),
     [-.1307804, .4606087, .1881391, -.2197787, -.4324611, .4341577])])
def test_conditions_as_published(config, given, expected):
    with torch.no_grad():
        eps = original(replace(SMALL, fps=True, **config))(*INPUTS, **given)
    assert close(published(eps), torch.tensor(expected))


def test_temporal_attention_as_published():
    unet = original(replace(SMALL, fps=True, guidance=True))
    with torch.no_grad():
        eps, maps = unet.with_maps(*INPUTS, fps=8)
        assert torch.equal(eps, unet(*INPUTS, fps=8))
    attentions = unet.motion_attentions()
    assert len(maps) == 9 and attentions == [unet.output_blocks[i][2].attn1 for i in range(3, 12)]
    assert maps[0].shape == (2, 4 * 4 * 8, 3, 3)
    for i, expected in ((0, [.2754962, .2461832, .887093, .2399107, .0817573, .1935352]),
                        (4, [.2505076, .3267309, .1773534, .2607375, .4989571, .446785]),
                        (8, [.1816156, .0950947, .169939, .3473794, .1249472, .6747102])):
        assert close(published(maps[i]), torch.tensor(expected))


def test_inversion_as_published():
    """`reverse_ddim_loop` of T2V-Turbo-v2's preprocessing on the 200-step grid, after 4 and 6 steps."""
    unet, (z, _, c) = original(replace(SMALL, fps=True)), INPUTS
    latents = solver.ddim_invert(solver.Schedule(200), lambda z, t: unet(z, t, c, fps=8), z, [19, 29])
    for t, expected in ((19, [-1.5270374, .9312716, -.2580215, -1.6858568, -1.9553465, -.0795338]),
                        (29, [-1.5256926, .9399753, -.2515402, -1.6845522, -1.9580899, -.0667636])):
        assert close(published(latents[t]), torch.tensor(expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_maps_are_differentiable(checkpointing):
    """Against a finite difference, in float64; also where blocks are recomputed, with the hooks gone."""
    unet = original(replace(SMALL, **sizes(32, (1, 2)))).double()
    z, t, c = INPUTS
    z, c, step = z.double().requires_grad_(), c.double(), 1e-6 * randn(6, *z.shape).double()

    def energy(z):
        return sum(p.square().mean() for p in unet.with_maps(z, t, c)[1])

    unet.checkpointing = checkpointing
    g = torch.autograd.grad(energy(z), z)[0]
    assert not any(m._forward_hooks for m in unet.modules())
    with torch.no_grad():
        numeric = (energy(z + step) - energy(z - step)) / 2
    assert torch.isclose((g * step).sum(), numeric, rtol=1e-5, atol=0)


def test_checkpointing_changes_nothing(unet_pair):
    _, unet = unet_pair
    grads = []
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        unet(*INPUTS).square().mean().backward()
        grads.append([p.grad.clone() for p in unet.parameters()])
    unet.checkpointing = False
    unet.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_folds_copy_nothing():
    x = torch.randn(2, 32, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    frames, tokens = model.frames_to_batch(x), model.pixels_to_tokens(x)
    pixels = model.tokens_to_pixels(tokens, 3, 4, 5)
    assert frames.data_ptr() == tokens.data_ptr() == pixels.data_ptr() == x.data_ptr()
    assert frames.is_contiguous(memory_format=torch.channels_last) and tokens.is_contiguous()
    assert torch.equal(frames[4], x[1, :, 1]) and torch.equal(pixels, x)


def test_fast_layers_equal_the_textbook(unet_pair, monkeypatch):
    """With a graph and without one: feed-forward layers take parts, SiLU works in place."""
    ours, fast = unet_pair[1], copy.deepcopy(unet_pair[1])
    speed_up(model.CPU_LAYERS, fast)
    assert list(fast.state_dict()) == list(ours.state_dict()) and isinstance(fast.out[1], fast_cpu.InPlace)
    monkeypatch.setattr(fast_cpu, "TOKENS", 48)
    assert close(fast(*INPUTS), ours(*INPUTS))
    with torch.no_grad():
        assert close(fast(*INPUTS), ours(*INPUTS))
    speed_up(model.CPU_LAYERS, fast)                        # again: nothing is left to replace
    assert type(fast.out[1]).__mro__[1:3] == (fast_cpu.InPlace, torch.nn.SiLU)


@pytest.mark.parametrize("kernel", [3, 1])
def test_convolution_along_time(kernel):
    """As an image convolution: the 3D one's result and gradient, channels-last as its input."""
    conv = torch.nn.Conv3d(24, 16, (kernel, 1, 1), padding=(kernel // 2, 0, 0))
    fast = torch.nn.Sequential(copy.deepcopy(conv))
    speed_up({}, fast)
    x = randn(0, 2, 24, 5, 4, 6).to(memory_format=torch.channels_last_3d).requires_grad_()
    y, expected = fast(x), conv(x)
    assert close(y, expected) and y.is_contiguous(memory_format=torch.channels_last_3d)

    gradients = (torch.autograd.grad(result.square().sum(), (x, *layer.parameters()))
                 for result, layer in ((y, fast), (expected, conv)))
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("what, most, theirs", [("unet", 0.5, 665), ("vae", 0.6, 204)])
def test_activations_are_smaller_than_diffusers(what, most, theirs):
    """A full-size pass without a graph, in fake tensors. theirs: MiB, as benchmark.count says."""
    args = argparse.Namespace(size=[256, 256], frames=16, chunk=1, dtype="float32", device="cpu")
    assert benchmark.count("ours", what, args)[1] / 2 ** 20 <= most * theirs


def test_half_precision(unet_pair):
    """Also by autocast, where the end stays in float32: ε's error is divided by 0.068 at t = 999."""
    _, unet = unet_pair
    dtypes = []
    with torch.no_grad():
        eps = unet(*INPUTS)
        hooks = [layer.register_forward_hook(lambda layer, x, y: dtypes.append(y.dtype))
                 for layer in (unet.middle_block, unet.out)]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = unet(*INPUTS)
        for hook in hooks:
            hook.remove()
        half = build(UNet3D, SMALL, {key: x.bfloat16() for key, x in unet.state_dict().items()})(*INPUTS)
    assert dtypes == [torch.bfloat16, torch.float32] and mixed.dtype == half.dtype == torch.float32
    assert close(mixed, eps, 0.05) and close(half, eps, 0.05)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [8, 40])
def test_attention(dtype, tolerance, length):
    """The formula among a few frames, torch's kernel among many pixels."""
    q, k, v = (randn(i, 2, 3, length, 16) for i in range(3))
    expected = torch.einsum("nhij,nhjd->nhid", torch.einsum("nhid,nhjd->nhij", q, k).div(4).softmax(-1), v)
    assert close(model.attention(q.to(dtype), k.to(dtype), v.to(dtype)).float(), expected, tolerance)


def test_embeddings():
    e = model.guidance_embedding(torch.tensor([7.5]))
    assert close(e[0, [0, 1, 128, 255]], torch.tensor([-.8512359, .8421312, -.5247833, .7316889]))
    zero, one = torch.zeros(128), torch.ones(128)
    assert torch.equal(model.guidance_embedding(zero[:1])[0], torch.cat([zero, one]))
    t, i = torch.tensor([7.0]), torch.arange(160)
    expected = torch.cat([torch.cos(t * 10000 ** (-i / 160)), torch.sin(t * 10000 ** (-i / 160))])
    assert torch.allclose(model.timestep_embedding(t, 320)[0], expected, atol=1e-5)


def test_start_of_training():
    """A new UNet predicts zero; a new student is its teacher, and learns about ω and λ at once."""
    torch.manual_seed(0)
    unet = UNet3D(replace(TINY, guidance=True, motion=True, fps=True))
    z, t, c, w = randn(1, 2, 4, 4, 8, 8), torch.tensor([3, 500]), randn(2, 2, 6, 24), torch.tensor([5.0, 9.0])
    assert not unet(z, t, c).any()
    for key, p in unet.named_parameters():                  # as after training, but for the layers of ω and λ
        if not p.any() and "cond_proj" not in key:
            torch.nn.init.normal_(p, std=0.02)
    assert torch.equal(unet(z, t, c), unet(z, t, c, w=w))
    assert torch.equal(unet(z, t, c), unet(z, t, c, w=w, motion=w))
    unet(z, t, c, w=w, motion=w).square().mean().backward()
    assert unet.time_cond_proj.weight.grad.any() and unet.motion_cond_proj.weight.grad.any()


def digest(shapes):
    """sha256 of the sorted lines "name (shape)"."""
    lines = "\n".join(sorted(f"{k} {tuple(s)}" for k, s in shapes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def test_names_and_shapes_of_the_public_files():
    """The digests are of lists made with the published code."""
    v2 = original_shapes(replace(VC2, guidance=True, motion=True))
    assert len(v2) == 1487 and digest(v2) == "5db9776692bf058e"
    new = ("time_cond_proj.weight", "motion_cond_proj.weight", "combine_proj.weight")
    assert original_shapes(VC2) == {key: shape for key, shape in v2.items() if key not in new}
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet3D(MODELSCOPE).parameters()) == 1_411_233_860
        vae, text = VAE(), TextEncoder()
    names = {"first_stage_model." + key: x.shape for key, x in vae.state_dict().items()}
    assert digest(names) == "9190c3ec1cf5cd6d"
    assert len(text.state_dict()) == 280 and sum(p.numel() for p in text.parameters()) == 340_387_840


# ---- VAE, text ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vae_pair():
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4).eval()
    theirs.load_state_dict(deterministic({key: tuple(x.shape) for key, x in theirs.state_dict().items()}))
    return theirs, build(VAE, SMALL_VAE, rename(theirs.state_dict(), DIFFUSERS_VAE))


def test_vae_encodes_as_diffusers(vae_pair):
    theirs, ours = vae_pair
    x = randn(1, 2, 3, 3, 64, 32)
    with torch.no_grad():
        posterior = theirs.encode(model.frames_to_batch(x)).latent_dist
        mean, logvar = ours.posterior(x)
        noise = randn(2, *mean.shape)
        assert close(model.frames_to_batch(mean), posterior.mean)
        assert close(model.frames_to_batch(logvar), posterior.logvar)
        sample = posterior.mean + posterior.std * model.frames_to_batch(noise)
        assert close(model.frames_to_batch(ours.encode(x, noise)), 0.18215 * sample)
        assert torch.equal(ours.encode(x), 0.18215 * mean)


@pytest.mark.parametrize("chunk", [None, 4])
def test_vae_decodes_as_diffusers(vae_pair, chunk):
    theirs, ours = vae_pair
    z = randn(1, 2, 4, 3, 8, 4).requires_grad_()
    x, expected = ours.decode(z, chunk), theirs.decode(model.frames_to_batch(z) / 0.18215).sample
    assert close(model.frames_to_batch(x), expected)
    g, dg = (torch.autograd.grad(y.square().sum(), z)[0] for y in (x, expected))
    assert close(g, dg)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_fast_vae(vae_pair, monkeypatch, dtype, tolerance):
    """Large images are taken by rows, and doubled ones are not made; with a graph as the textbook has it."""
    theirs, ours = vae_pair
    ours = copy.deepcopy(ours).to(dtype)
    speed_up(model.CPU_LAYERS, ours)
    monkeypatch.setattr(fast_cpu, "LARGE", 64 * 32 * 32)    # the finest level
    monkeypatch.setattr(fast_cpu, "ROWS", 8)
    x, z = randn(1, 2, 3, 3, 64, 32), randn(1, 2, 4, 3, 8, 4)
    shapes, by_rows = [], fast_cpu.norm_silu_conv
    monkeypatch.setattr(fast_cpu, "norm_silu_conv",
                        lambda *a, **k: shapes.append(a[2].shape) or by_rows(*a, **k))
    with torch.no_grad():
        decoded, expected = ours.decode(z).float(), theirs.decode(model.frames_to_batch(z) / 0.18215).sample
        assert close(model.frames_to_batch(decoded), expected, tolerance) and decoded.isfinite().all()
        assert close(model.frames_to_batch(ours.posterior(x)[0].float()),
                     theirs.encode(model.frames_to_batch(x)).latent_dist.mean, tolerance)
    assert shapes == [(6, 32, 64, 32)] * 2 * (3 + 2)        # blocks of the decoder, and of the encoder
    assert close(model.frames_to_batch(ours.decode(z).float()), expected, tolerance)


def test_tiny_decoder_equals_diffusers(tmp_path):
    theirs = diffusers.AutoencoderTiny().eval()
    state = deterministic({key: tuple(x.shape) for key, x in theirs.state_dict().items()})
    theirs.load_state_dict(state)
    state = {re.sub(r"^(\d+)", lambda m: str(int(m[1]) + 1), key.removeprefix("decoder.layers.")): x
             for key, x in state.items() if key.startswith("decoder.")}         # the clamp counts as a layer
    torch.save(state, tmp_path / "tiny.pth")
    ours = load_tiny_decoder(tmp_path / "tiny.pth")
    assert sum(p.numel() for p in ours.parameters()) == 1_222_531
    z = 3 * randn(1, 2, 4, 3, 8, 4)
    with torch.no_grad():
        expected = theirs.decode(model.frames_to_batch(z)).sample
        assert close(model.frames_to_batch(ours.decode(z, chunk=4)), expected)


def test_text_equals_transformers(capsys):
    config = transformers.CLIPTextConfig(hidden_size=24, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=2, hidden_act="gelu")
    theirs = transformers.CLIPTextModel(config).eval()
    state = {key: x for key, x in theirs.state_dict().items() if "position_ids" not in key}
    text = build(TextEncoder, SMALL_TEXT, rename(huggingface_text(state), OPENCLIP_BLOCKS))
    captions = ["a red circle", "", "Dogs, running; in THE park! " * 20]
    with torch.no_grad():
        assert close(text(captions), theirs(text.tokenizer(captions))[0])
        assert text(captions).shape == (3, 77, text.width)
    assert capsys.readouterr().err.count("reads 77 tokens") == 1
