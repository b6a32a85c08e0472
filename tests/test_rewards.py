"""Rewards against transformers, open_clip, torchvision, and numbers of the original code.

The numbers come from the original models (T2V-Turbo's ViCLIP and InternVideo2, ImageReward's BLIP),
run in float64 on `weights(shapes)`, which anyone can draw again: no weight file is needed.
"""
import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import open_clip, transformers
from oracles import torchvision as tv
from safetensors.torch import save_file
from test_model import digest

import rewards
import turbo
from plumbing.errors import UserError

# ---- public names and shapes, written down independently ---------------------------------------------------

def linear(name, i, o, bias=True):
    return {f"{name}.weight": (o, i), **({f"{name}.bias": (o,)} if bias else {})}


def norm(name, D):
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def merge(*dicts):
    return {key: shape for d in dicts for key, shape in d.items()}


def clip_shapes(c):
    """open_clip's own."""
    vision = dict(image_size=c.image_size, patch_size=c.patch, width=c.width, layers=c.layers,
                  head_width=c.width // c.heads)
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size, width=c.text_width,
                heads=c.text_heads, layers=c.text_layers)
    with torch.device("meta"):
        model = open_clip.CLIP(embed_dim=c.embed_dim, vision_cfg=vision, text_cfg=text)
    return {key: tuple(p.shape) for key, p in model.state_dict().items()}


def viclip_shapes(c):
    """open_clip's names under two prefixes, and a table of times."""
    shapes = {f"text_encoder.{key}".replace("text_encoder.visual.", "vision_encoder."): shape
              for key, shape in clip_shapes(c).items() if key != "logit_scale"}
    p = "vision_encoder."
    return shapes | {"temp": (), p + "temporal_positional_embedding": (1, c.frames, c.width),
                     p + "conv1.weight": (c.width, 3, 1, c.patch, c.patch)}


def bert_attention(p, D, source):
    return merge(linear(p + "self.query", D, D), linear(p + "self.key", source, D),
                 linear(p + "self.value", source, D), linear(p + "output.dense", D, D),
                 norm(p + "output.LayerNorm", D))


def bert_shapes(p, c, layers=None, fusion=0):
    """With cross-attention from layer `fusion` on."""
    D, e = c.width, p + "embeddings."
    shapes = merge({e + "position_ids": (1, 512), e + "word_embeddings.weight": (c.vocab_size, D),
                    e + "position_embeddings.weight": (512, D)}, norm(e + "LayerNorm", D),
                   {e + "token_type_embeddings.weight": (2, D)} if c.token_types else {})
    for i in range(layers or c.layers):
        r = f"{p}encoder.layer.{i}."
        fused = i >= fusion and c.image_width
        cross = bert_attention(r + "crossattention.", D, c.image_width) if fused else {}
        shapes |= merge(bert_attention(r + "attention.", D, D), linear(r + "intermediate.dense", D, c.hidden),
                        linear(r + "output.dense", c.hidden, D), norm(r + "output.LayerNorm", D), cross)
    return shapes


def imagereward_shapes(c):
    v, p = c.vit, "blip.visual_encoder."
    D, N = v.width, (v.image_size // v.patch) ** 2
    shapes = merge({p + "cls_token": (1, 1, D), p + "pos_embed": (1, 1 + N, D),
                    p + "patch_embed.proj.bias": (D,),
                    p + "patch_embed.proj.weight": (D, 3, v.patch, v.patch)}, norm(p + "norm", D),
                   bert_shapes("blip.text_encoder.", c.bert),
                   linear("blip.vision_proj", D, 256), linear("blip.text_proj", c.bert.width, 256))
    for i in range(v.layers):
        r = f"{p}blocks.{i}."
        shapes |= merge(norm(r + "norm1", D), norm(r + "norm2", D), linear(r + "attn.qkv", D, 3 * D),
                        linear(r + "attn.proj", D, D),
                        linear(r + "mlp.fc1", D, v.hidden), linear(r + "mlp.fc2", v.hidden, D))
    sizes = [c.bert.width, 1024, 128, 64, 16, 1]
    layers = zip((0, 2, 4, 6, 7), sizes, sizes[1:])
    return merge(shapes, *(linear(f"mlp.layers.{number}", i, o) for number, i, o in layers))


def internvideo2_shapes(c, frames=4, extra_layers=1):
    """What is used, and of what is not: BERT's last layers and one other."""
    v, p = c.vit, "vision_encoder."
    D, N, q = v.width, (v.image_size // v.patch) ** 2, p + "clip_projector."
    shapes = {p + "cls_token": (1, 1, D), p + "pos_embed": (1, 1 + frames * N, D),
              p + "img_pos_embed": (1, 1 + N, D),
              p + "patch_embed.proj.weight": (D, 3, 1, v.patch, v.patch), p + "patch_embed.proj.bias": (D,)}
    for i in range(v.layers):
        r = f"{p}blocks.{i}."
        shapes |= merge({r + name: (D,) for name in ("norm1.weight", "norm2.weight", "attn.q_norm.weight",
                                                     "attn.k_norm.weight", "ls1.gamma", "ls2.gamma")},
                        linear(r + "attn.qkv", D, 3 * D, bias=False), linear(r + "attn.proj", D, D),
                        linear(r + "mlp.fc1", D, v.hidden), linear(r + "mlp.fc2", v.hidden, D))
    shapes |= merge(*(norm(f"{q}norm1_{x}", D) for x in "qkv"),
                    {f"{q}cross_attn.{x}_bias": (D,) for x in "qkv"},
                    *(linear(f"{q}cross_attn.{x}", D, D, bias=False) for x in "qkv"),
                    linear(q + "cross_attn.proj", D, c.pool_dim))
    bert = replace(c.bert, image_width=D)
    layers = c.bert.layers + extra_layers
    return merge(shapes, bert_shapes("text_encoder.bert.", bert, layers, fusion=c.bert.layers),
                 linear("vision_proj", c.pool_dim, c.embed_dim),
                 linear("text_proj", c.bert.width, c.embed_dim), {"temp": ()})


def weights(shapes, seed=0):
    """Random weights at which every part of a model matters, in order of the names: norms near one, the rest
    of variance 1 / fan-in."""
    generator, out = np.random.default_rng(seed), {}
    for key in sorted(shapes):
        w = generator.standard_normal(shapes[key])
        if len(shapes[key]) < 2:
            near_one = ("norm" in key.lower() or "ln_" in key or "gamma" in key) and not key.endswith("bias")
            w = near_one + 0.2 * w
        elif "embed" not in key:
            w = w * np.prod(shapes[key][1:]) ** -0.5
        out[key] = torch.tensor(w, dtype=torch.float32)
    return out


# ---- small models ------------------------------------------------------------------------------------------

VICLIP = rewards.ViCLIPConfig(image_size=28, patch=14, frames=8, width=64, layers=2, heads=4, embed_dim=24,
                              text_width=32, text_layers=2, text_heads=2, context_length=12, vocab_size=50)
CLIP = rewards.CLIPConfig(image_size=28, patch=14, width=64, layers=2, heads=4, embed_dim=24,
                          text_width=32, text_layers=2, text_heads=2, context_length=12, vocab_size=50)
OPEN_CLIP = {                                                                   # the same for open_clip
    "embed_dim": 24, "vision_cfg": dict(image_size=28, patch_size=14, width=64, layers=2, head_width=16),
    "text_cfg": dict(context_length=12, vocab_size=50, width=32, heads=2, layers=2)}
VIT = rewards.ViTConfig(image_size=28, patch=14, width=64, layers=2, heads=4, hidden=160)
IMAGEREWARD = rewards.ImageRewardConfig(VIT, rewards.BERTConfig(60, 32, 2, 4, 80, image_width=64))
INTERNVIDEO2 = rewards.InternVideo2Config(VIT, rewards.BERTConfig(60, 32, 3, 4, 80, token_types=2), 48, 24)
CAPTIONS = ["a red square", "two blue circles that move apart"]


def clips(T=8, H=40, W=64, B=2):
    return torch.tensor(np.random.default_rng(1).random((B, T, 3, H, W)), dtype=torch.float32)


def clip_ids(captions):
    """As CLIP's tokenizer lays them out: start 1, words, end = the highest id, zeros."""
    ids = torch.tensor([[1, 5, 9, 17, 49, 0, 0, 0, 0, 0, 0, 0], [1, 33, 12, 8, 4, 21, 7, 49, 0, 0, 0, 0]])
    return ids[[CAPTIONS.index(caption) for caption in captions]]


def bert_ids(captions):
    ids = torch.tensor([[2, 15, 41, 7, 3, 0, 0, 0, 0], [2, 22, 8, 9, 30, 31, 59, 3, 0]])
    return ids[[CAPTIONS.index(caption) for caption in captions]]


# ---- their files -------------------------------------------------------------------------------------------

CONTAINERS = {      # name: (configuration, shapes, what the public file wraps its tensors in, tokenizer)
    "hpsv2": (CLIP, clip_shapes,
              lambda w: {"epoch": 1, "state_dict": {f"module.{k}": p for k, p in w.items()}}, clip_ids),
    "clip": (CLIP, clip_shapes, lambda w: w, clip_ids),
    "imagereward": (IMAGEREWARD, imagereward_shapes, lambda w: w, bert_ids),
    "viclip": (VICLIP, viclip_shapes, lambda w: {"model": w}, clip_ids),
    "internvideo2": (INTERNVIDEO2, internvideo2_shapes,
                     lambda w: {"module": w, "ds_config": argparse.Namespace(stage=1)}, bert_ids)}


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    for name, (config, *_) in (CONTAINERS | {"pickscore": CONTAINERS["clip"]}).items():
        small = replace(rewards.RECIPES[name], config=lambda config=config: config)
        monkeypatch.setitem(rewards.RECIPES, name, small)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(name, **options): a small reward out of a public container."""
    folder = tmp_path_factory.mktemp("rewards")

    def load(name, **options):
        config, shapes, wrap, tokenizer = CONTAINERS[name]
        path = folder / f"{name}.pt"
        if not path.exists():
            torch.save(wrap(weights(shapes(config))), path)
        return rewards.load(name, path, tokenizer=tokenizer, **options)
    return load


def score_and_gradient(reward, x, captions=CAPTIONS):
    x = x.clone().requires_grad_()
    score = reward(x, captions)
    return score.detach(), torch.autograd.grad(score.sum(), x)[0]


def close(ours, theirs, rtol=1e-5):
    """To `rtol` of the largest element."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=rtol * float(theirs.abs().max()))


# ---- the original code's numbers ---------------------------------------------------------------------------

REFERENCE = {   # (name, frames): scores of two clips; their sum's gradient at [:, ::3, 1, 20, 30]; its norm
    ("viclip", 8): ([-0.06269718313, -0.1390922172], [0.0003793927818, 0.0002436946477, -2.632559925e-05,
                    0.0001404695454, -1.971720097e-05, 0.000278374092], 0.09804530193),
    ("imagereward", 8): ([-1.156924749, -0.6765835377], [-0.001204208423, -0.001287735312, -0.0007726507715,
                         -0.003403357582, -0.002245642109, -0.003706315536], 0.7087854433),
    ("internvideo2", 8): ([0.2553976606, 0.2822592445], [-0.003752977194, -0.001394125006, -0.00048465021,
                          -0.0008097755599, 0.001422763965, -0.0007325530688], 0.6304153019),
    ("internvideo2", 4): ([0.3830673407, -0.03503385646], [-0.008638080269, -0.003268915968, -0.003786213548,
                          -0.00436756971], 0.8062115892)}


@pytest.mark.parametrize("name, frames", REFERENCE)
def test_the_original_code(load, name, frames):
    scores, gradients, size = REFERENCE[name, frames]
    reward = load(name, frames=frames if name == "internvideo2" else None)
    score, gradient = score_and_gradient(reward, clips(frames))
    close(score, scores)
    some = gradient[:, ::3, 1, 20, 30].flatten().double()
    torch.testing.assert_close(some, torch.tensor(gradients).double(),
                               rtol=0, atol=1e-5 * gradient.abs().max().item())
    close(gradient.norm(), size)


# ---- transformers ------------------------------------------------------------------------------------------

def test_clip_is_transformers_clip(tmp_path):
    """The folder of a CLIPModel, as PickScore's: names, projections, pairs of frame and caption, gradient."""
    common = dict(num_hidden_layers=2, hidden_act="gelu", projection_dim=24)
    config = transformers.CLIPConfig(
        text_config=dict(common, hidden_size=32, intermediate_size=128, num_attention_heads=2, vocab_size=50,
                         max_position_embeddings=12, eos_token_id=49, bos_token_id=1, pad_token_id=0),
        vision_config=dict(common, hidden_size=64, intermediate_size=256, num_attention_heads=4,
                           image_size=28, patch_size=14), projection_dim=24)
    hf = transformers.CLIPModel(config).eval()
    shapes = {key: tuple(p.shape) for key, p in hf.state_dict().items()}
    hf.load_state_dict({**hf.state_dict(), **weights(shapes)})
    hf.save_pretrained(tmp_path)

    reward = rewards.load("pickscore", tmp_path, tokenizer=clip_ids)
    x = clips(T=3)
    score, gradient = score_and_gradient(reward, x)
    x.requires_grad_()
    pixels = F.interpolate(x.flatten(0, 1), (28, 28), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in rewards.CLIP_PIXELS)
    ids = clip_ids(CAPTIONS)
    out = hf(input_ids=ids, pixel_values=(pixels - mean) / std)
    pairs = (out.image_embeds.view(2, 3, -1) * out.text_embeds[:, None]).sum(-1)        # both of unit length
    close(score, pairs.mean(1).detach())
    close(gradient, torch.autograd.grad(pairs.mean(1).sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_is_open_clips(load, dtype):
    """Both towers, the states before the last block, the gradient; in bf16, too, norms are in float32."""
    reward, x, ids = load("clip", dtype=dtype), clips(T=3, H=28, W=28), clip_ids(CAPTIONS)
    cast = dtype if dtype == torch.bfloat16 else None
    theirs = open_clip.CLIP(**OPEN_CLIP, cast_dtype=cast).eval()
    theirs.load_state_dict(weights(clip_shapes(CLIP)))
    if cast:
        open_clip.convert_weights_to_lp(theirs, cast)
        for name in ("class_embedding", "positional_embedding"):
            theirs.visual.get_parameter(name).data = theirs.visual.get_parameter(name).data.to(cast)
    score, gradient = score_and_gradient(reward, x)

    pixels = x.clone().requires_grad_()
    mean, std = (torch.tensor(v)[:, None, None] for v in rewards.CLIP_PIXELS)
    images = theirs.encode_image(((pixels.flatten(0, 1) - mean) / std).to(dtype)).unflatten(0, (2, 3)).float()
    texts = theirs.encode_text(ids).float()
    expected = F.cosine_similarity(images, texts[:, None], dim=-1).mean(1)
    rtol = 1e-5 if dtype == torch.float32 else 0.02
    close(score, expected.detach(), rtol)
    close(gradient, torch.autograd.grad(expected.sum(), pixels)[0], rtol)
    close(reward.text(CAPTIONS), texts.detach(), rtol)

    x = theirs.token_embedding(ids).to(dtype) + theirs.positional_embedding.to(dtype)
    for block in theirs.transformer.resblocks[:-1]:
        x = block(x, attn_mask=theirs.attn_mask)
    close(reward.model.text_encoder.penultimate(ids).detach(), theirs.ln_final(x).detach(), rtol)


def test_the_public_clip_is_vit_h_14():
    assert rewards.toy_clip(**open_clip.get_model_config("ViT-H-14")) == rewards.CLIPConfig()


@pytest.mark.parametrize("cross", [False, True])
def test_bert_is_transformers_bert(cross):
    config = rewards.BERTConfig(60, 32, 3, 4, 80, token_types=2, image_width=32 if cross else 0)
    hf = transformers.BertModel(transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
        is_decoder=cross, add_cross_attention=cross), add_pooling_layer=False).eval()
    shapes = {key: tuple(p.shape) for key, p in hf.state_dict().items()}
    w = weights(shapes)
    hf.load_state_dict(w)
    renamed = rewards.rename({f"bert.{key}": p for key, p in w.items()}, rewards.BERT_NAMES)
    ours = rewards.BERT(config)
    ours.load_state_dict({key.removeprefix("bert."): p for key, p in renamed.items()})
    ids = bert_ids(CAPTIONS)
    noise = np.random.default_rng(3).standard_normal((2, 5, 32))
    image = torch.tensor(noise, dtype=torch.float32) if cross else None
    mask = (ids != 0).long()
    if cross:   # transformers' cross-attention needs a decoder, and that a causal mask; a 3-D mask undoes it
        mask = (1 - mask)[:, None, None].float().expand(-1, 1, ids.shape[1], -1) * -1e9
    theirs = hf(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state[:, 0]
    close(ours(ids, image).detach(), theirs.detach())


def test_blip_is_transformers_blip():
    """The ViT of ImageReward against BLIP's vision model."""
    hf = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, image_size=28,
        patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6)).eval()
    w = weights({key: tuple(p.shape) for key, p in hf.state_dict().items()})
    hf.load_state_dict(w)
    table = [(r"^embeddings\.class_embedding", "vision.cls_token"), (r"^encoder\.layers", "vision.blocks"),
             (r"^embeddings\.position_embedding", "vision.pos_embed"),
             (r"^embeddings\.patch_embedding", "vision.patch_embed"),
             (r"self_attn\.qkv", "attn.qkv"), (r"self_attn\.projection", "attn.proj"),
             (r"layer_norm", "norm"),
             (r"^post_layernorm", "norm")]
    model = rewards.ImageReward(IMAGEREWARD)
    missing = model.load_state_dict(rewards.rename(w, table), strict=False)
    assert not missing.unexpected_keys
    assert not any(key.startswith(("vision", "norm")) for key in missing.missing_keys)
    x = clips(T=1, H=28, W=28)
    close(model.norm(model.vision(x)).detach(), hf(pixel_values=x[:, 0]).last_hidden_state.detach())


def vocabulary():
    """Words, beginnings, continuations, marks, and letters that are not known in every place."""
    words = ("the a an red green blue circle square move run play jump cat dog on in of over sky naive cafe "
             "uber running")
    parts = "ing ed er s es ly un re # able ness ful 1 2 3 10 20 2024 th"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789αβγδабвгдеあいうかアイ中文字국한ßøłæđ"
    marks = "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~。、「」–—…“”‘’«»¿¡€£°·§"
    out = ["[PAD]", *(f"[unused{i}]" for i in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    out += [*words.split(), *parts.split(), *letters, *marks]
    out += [f"##{x}" for x in [*words.split()[:12], *parts.split(), *letters]]
    return list(dict.fromkeys(out))


def whole_vocabulary():
    """The same, and placeholders, as many as BERT's."""
    words = vocabulary()
    return "\n".join([*words, *(f"[unused{i}]" for i in range(5, 5 + 30522 - len(words)))])


def strings():
    fixed = [
        "", " ", "\t", "a", "A red circle.", "Naïve café über", "don't stop-running!", "x" * 100, "x" * 101,
        "word " * 60, "the " * 200, "café" * 30, "unrunningly", "RE-PLAYable", "``code``", "a|b~c^d",
        "#hash @at", "中文字 and 中", "한국", "あいうアイ", "\U00020000 \uf900", "\ud7a3", "İstanbul ŁØß Æ",
        "ẞ ǆ ŉ", "ﬁne ligature",
        "e\u0301 u\u0308ber", "a\u0300\u0301\u0302", "naïve-café/über", "ΑΒΓ Σας", "Дети", "𝒜 math",
        "tab\tnew\nline\r", "zero\u200bwidth", "bell\x07bell", "nul\x00nul", "\ufffdreplacement",
        "soft\u00adhyphen", "no\u00a0break\u2003space", "\u2028separator", "\u0085next", "100% $5 + 3 = ~8",
        "1st 2nd 2024", "__init__", "[unused1] [cls]", "👍🏽 emoji 😀", "«quotes» “curly” ‘single’ … – —",
        "ａｂｃ ｆｕｌｌ", "¿qué? ¡sí!", "।॥ ؟،", "नमस्ते", "สวัสดี", "ﷺ"]
    rng = np.random.default_rng(4)
    pool = list("abcdefgh aeiou  REDCAT.,'!?-#é̈üñçßИи中文あ가ａ😀\t\u00a0\u200b123[]$")
    pool += ["the ", "running", " red", "##", "un"]
    return fixed + ["".join(rng.choice(pool, rng.integers(1, 60))) for _ in range(400)]


def test_wordpiece_is_transformers_tokenizer(tmp_path):
    words = vocabulary()
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    for length in (6, 35):
        ours = rewards.WordPiece(tmp_path / "vocab.txt", length)
        for text in strings():
            expected = theirs(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
            assert ours([text])[0].tolist() == expected, repr(text)

    cls, red = (words.index(word) for word in ("[CLS]", "red"))
    ours = rewards.WordPiece(tmp_path / "vocab.txt", 4, sep=False)              # InternVideo2's
    assert ours(["Red", "red red red red red"]).tolist() == [[cls, red, 0, 0], [cls, red, red, red]]


def test_clip_tokens_of_viclip_are_cut_to_32():
    ids = rewards.bpe(Path("file"), 32)(["a red circle " * 20, "a"])
    assert ids.shape == (2, 32) and ids[0, -1] == 49407 and ids[1, :4].tolist() == [49406, 320, 49407, 0]


# ---- pixels ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(320, 512), (256, 256), (65, 31), (28, 28), (40, 28), (5, 97)])
def test_views_are_torchvisions(H, W):
    """What the original code does to frames."""
    clip, S, bicubic = clips(T=2, H=H, W=W), 28, tv.InterpolationMode.BICUBIC
    x = clip.flatten(0, 1)
    side = [max(1, round(n * S / max(H, W))) for n in (H, W)]
    h, w = S - side[0], S - side[1]
    bars = tv.pad(tv.resize(x, side, bicubic), [w // 2, h // 2, w - w // 2, h - h // 2])
    shorter = tv.resize(x, [round(n * S / min(H, W)) for n in (H, W)], bicubic)
    views = {rewards.pad: bars, rewards.squash: tv.resize(x, [S, S], bicubic),
             rewards.window: tv.center_crop(shorter, [S, S]),
             rewards.centre: tv.center_crop(tv.resize(x, S, bicubic), [S, S])}
    for view, expected in views.items():
        assert view(clip, S).shape == (2, 2, 3, S, S)
        torch.testing.assert_close(view(clip, S).flatten(0, 1), expected, rtol=1e-5, atol=1e-6)


def test_one_window_per_clip():
    """All frames of a clip share it; clips differ; every place comes up; a seed repeats it, in any batch."""
    y, x = torch.meshgrid(torch.arange(28.), torch.arange(40.), indexing="ij")
    place = torch.stack([y, x, x]).expand(64, 3, 3, 28, 40)

    def draw(seeds):
        return rewards.window(place[:len(seeds)], 28, [torch.Generator().manual_seed(seed) for seed in seeds])

    first, again = draw(range(64)), torch.cat([draw([seed]) for seed in range(64)])
    assert torch.equal(first, again)
    assert (first == first[:, :1]).all()
    assert set(first[:, 0, 1, 0, 0].tolist()) == set(range(13))
    assert (rewards.window(place, 28)[:, 0, 1, 0, 0] == 6).all()


@pytest.mark.parametrize("name", ["viclip", "internvideo2"])
def test_the_gradient_of_a_clip_does_not_depend_on_its_batch(load, name):
    """A clip's own generator draws its frames and its window: --micro changes nothing."""
    reward = load(name)
    terms = [turbo.RewardTerm(reward, 2.0, 8, video=True, name=name)]
    z0_hat = torch.randn(2, 3, 9, 40, 64, generator=torch.Generator().manual_seed(0))

    def gradient(*clips):
        generators = [torch.Generator().manual_seed((3, 11)[clip]) for clip in clips]
        captions = [CAPTIONS[clip] for clip in clips]
        return turbo.reward_gradient(z0_hat[list(clips)], captions, torch.tanh, terms, generators)[0]

    both, first, second = gradient(0, 1), gradient(0), gradient(1)
    close(2 * both, torch.cat([first, second]))                     # of the mean over the batch
    seen = [g.abs().sum((0, 1, 2)) > 0 for g in (first, second)]
    assert not torch.equal(*seen)                                   # another window


# ---- what every reward promises ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", CONTAINERS)
def test_each_clip_meets_its_own_caption(load, name):
    reward, x = load(name), clips()
    video = name in ("viclip", "internvideo2")
    assert (reward.kind, reward.frames) == (("video", 8) if video else ("image", None))
    both = reward(x, CAPTIONS)
    reward.tokenizer = None                                         # cached: no caption is read twice
    alone = torch.cat([reward(x[b:b + 1], CAPTIONS[b:b + 1]) for b in (0, 1)])
    close(both, alone)
    swapped = reward(x, CAPTIONS[::-1])
    assert (swapped - both).abs().min() > 1e-4
    assert both.dtype == torch.float32 and not both.requires_grad and not reward.model.training
    assert not any(p.requires_grad for p in reward.model.parameters())
    if video:
        features, text = reward.features(x), F.normalize(reward.text(CAPTIONS).float(), dim=1)
        close((features * text).sum(1), both)
    else:
        close(both, torch.stack([reward(x[:, t:t + 1], CAPTIONS) for t in range(8)]).mean(0))


@pytest.mark.parametrize("name", CONTAINERS)
def test_checkpointing_changes_nothing(load, name):
    plain, saving = load(name), load(name, grad_checkpointing=True)
    calls, stacks = [], [m for m in saving.model.modules() if isinstance(m, rewards.BlockStack)]
    for block in (block for stack in stacks for block in stack):
        block.register_forward_pre_hook(lambda *args: calls.append(1))
    score, gradient = score_and_gradient(saving, clips())
    assert len(calls) > sum(map(len, stacks))                       # the vision blocks run twice
    expected = score_and_gradient(plain, clips())
    close(score, expected[0])
    close(gradient, expected[1])


@pytest.mark.parametrize("name", CONTAINERS)
def test_bfloat16(load, name):
    """Norms stay in float32, the pixels' gradient too; inside someone's autocast as well."""
    reward, exact = load(name, dtype=torch.bfloat16), load(name)
    kept = [p.dtype for m in reward.model.modules() if isinstance(m, rewards.FLOAT32) for p in m.parameters()]
    assert kept and set(kept) == {torch.float32} and reward.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        score, gradient = score_and_gradient(reward, clips())
        inside = exact(clips(), CAPTIONS)
    expected, slope = score_and_gradient(exact, clips())
    assert (score - expected).abs().max() < 0.05 and gradient.dtype == torch.float32
    assert F.cosine_similarity(gradient.flatten(), slope.flatten(), dim=0) > 0.98
    close(inside, expected)


def test_imagereward_is_capped_at_two(load):
    reward = load("imagereward")
    reward.model.mlp[7].bias.data += 100
    score, gradient = score_and_gradient(reward, clips())
    assert (score == 2).all() and (gradient == 0).all()


# ---- the toy's pair ----------------------------------------------------------------------------------------

def test_toy_files(tmp_path):
    """Their configuration stands in the header; pixels are squashed where they must be."""
    clip, viclip = open_clip.CLIP(**OPEN_CLIP).eval(), rewards.ViCLIP(VICLIP)
    headers = {"clip": {**OPEN_CLIP, "image_size": 28}, "viclip": asdict(VICLIP)}
    for name, model in (("clip", clip), ("viclip", viclip)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors", {"config": json.dumps(headers[name])})
    image, video = (rewards.load(f"shapes-{name}", tmp_path / f"{name}.safetensors", tokenizer=clip_ids)
                    for name in ("clip", "viclip"))
    ids = clip_ids(CAPTIONS)
    with torch.no_grad():
        for x in (clips(H=28, W=28), clips(H=40, W=64)):
            pixels = 2 * rewards.squash(x, 28) - 1
            frames = clip.encode_image(pixels.flatten(0, 1)).view(2, 8, -1)
            texts = clip.encode_text(ids)[:, None]
            close(image(x, CAPTIONS), F.cosine_similarity(frames, texts, dim=-1).mean(1))
            close(video(x, CAPTIONS),
                  F.cosine_similarity(viclip.encode_video(pixels), viclip.text(ids)))
    with pytest.raises(ValueError, match="reads the toy's captions"):
        rewards.load("shapes-clip", tmp_path / "clip.safetensors")
    for name, other in (("shapes-clip", "viclip"), ("shapes-viclip", "clip")):
        with pytest.raises(ValueError, match="is not a file of"):
            rewards.load(name, tmp_path / f"{other}.safetensors", tokenizer=clip_ids)


def test_a_tubelet_is_a_convolution_over_frames():
    torch.manual_seed(0)
    config = rewards.CLIPConfig(image_size=16, patch=8, frames=4, tubelet=2, width=24, layers=1, heads=2,
                                  embed_dim=8)
    tower = rewards.VisionTower(config, torch.nn.GELU)
    heard = []
    tower.conv1.register_forward_hook(lambda module, args, out: heard.append(out))
    frames = torch.randn(2, 4, 3, 16, 16)
    tower(frames)
    weight = tower.conv1.weight.unflatten(1, (2, 3)).transpose(1, 2)                    # (D, 3, 2, 8, 8)
    expected = F.conv3d(frames.transpose(1, 2), weight, stride=(2, 8, 8))               # (B, D, 2, 2, 2)
    torch.testing.assert_close(heard[0].unflatten(0, (2, 2)).transpose(1, 2), expected)


# ---- files and their errors --------------------------------------------------------------------------------

def test_clip_containers(tmp_path, load):
    """HPS with and without the data-parallel prefix, a .safetensors, a folder: the same weights."""
    w = weights(clip_shapes(CLIP))
    torch.save({"state_dict": w}, tmp_path / "hps.pt")
    save_file(w, tmp_path / "clip.safetensors")
    (tmp_path / "folder").mkdir()
    torch.save(w, tmp_path / "folder/open_clip_pytorch_model.bin", _use_new_zipfile_serialization=False)
    expected = load("clip")(clips(), CAPTIONS)
    for name in ("hps.pt", "clip.safetensors", "folder"):
        reward = rewards.load("clip", tmp_path / name, tokenizer=clip_ids)
        assert torch.equal(reward(clips(), CAPTIONS), expected)
    x = clips(H=28, W=28)
    close(load("hpsv2")(x, CAPTIONS), load("clip")(x, CAPTIONS))    # prefixed; equal where nothing is fitted


def test_frames_of_internvideo2_are_interpolated_in_time():
    table = torch.arange(4.).repeat_interleave(4)[None, :, None]                    # 4 frames of 4 patches
    longer = rewards.stretch(torch.cat([torch.full((1, 1, 1), 9.), table], 1), 8, 4)
    expected = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert longer[0, 0, 0] == 9 and longer[0, 1:, 0].view(8, 4)[:, 0].tolist() == expected


def test_wrong_files_end_in_one_line(tmp_path):
    for name, (config, shapes, _, tokenizer) in CONTAINERS.items():             # another reward's file
        torch.save(weights(shapes(config)), tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=f"{name}.pt"):
            other = "clip" if name == "viclip" else "viclip"
            rewards.load(other, tmp_path / f"{name}.pt", tokenizer=tokenizer)
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere.pt", "no such file"), ("empty", "no open_clip_model or ")):
        with pytest.raises(UserError, match=message):
            rewards.load("clip", tmp_path / name, tokenizer=clip_ids)


def test_lists_of_words(tmp_path, monkeypatch):
    """The one beside the weights, else the public one; of BERT's length."""
    def offline(*args):
        raise OSError("no route")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(UserError, match="cannot download HPS_v2.1_compressed.pt of .*/xswu/HPSv2"):
        rewards.load("hpsv2")
    for name, length in (("internvideo2", 40), ("imagereward", 35)):
        tokenizer, vocabulary_file = rewards.RECIPES[name].tokenizer, tmp_path / name / "vocab.txt"
        with pytest.raises(UserError, match="cannot download vocab.txt.*google-bert.*beside the weights"):
            tokenizer(tmp_path / name / "weights.pt", length)
        vocabulary_file.parent.mkdir()
        vocabulary_file.write_text(whole_vocabulary(), encoding="utf-8")
        assert rewards.RECIPES[name].text_length == length
        assert tokenizer(tmp_path / name / "weights.pt", length)(["red"]).shape == (1, length)
        vocabulary_file.write_text("\n".join(vocabulary()), encoding="utf-8")
        with pytest.raises(UserError, match="does not hold 30522 words; take that of google-bert"):
            tokenizer(tmp_path / name / "weights.pt", length)


SPECS = {"hpsv2": ("hpsv2", None, None), "hpsv2:0.2": ("hpsv2", None, 0.2),
         "motion:1e-1": ("motion", None, 0.1),
         "viclip=/a/b.pth": ("viclip", "/a/b.pth", None), "viclip=C:/a.pth": ("viclip", "C:/a.pth", None),
         "viclip=C:/a=b.pth:2": ("viclip", "C:/a=b.pth", 2.0), "clip=a:b:-.5": ("clip", "a:b", -0.5)}


def test_parse_spec():
    for spec, parts in SPECS.items():
        assert rewards.parse_spec(spec) == parts
    for spec in ("clip:nan", "clip:", "clip=", "clip=:2", "=x", ""):
        with pytest.raises(UserError, match=r"is not NAME\[=FILE\]"):
            rewards.parse_spec(spec)
    with pytest.raises(UserError, match="no reward 'hpsv3'; there are hpsv2, pickscore"):
        rewards.parse_spec("hpsv3=FILE")


# ---- captions that are cut ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name, tokens", [("clip", 77), ("viclip", 32), ("internvideo2", 40),
                                          ("imagereward", 35)])
def test_cut_captions_are_said_once(load, tmp_path, capsys, name, tokens):
    (tmp_path / "vocab.txt").write_text(whole_vocabulary(), encoding="utf-8")
    tokenizer = rewards.RECIPES[name].tokenizer(tmp_path / "file", tokens)
    reward = load(name)
    reward.tokenizer, reward.model.text = tokenizer, torch.Tensor.float
    capsys.readouterr()
    room = tokens - (1 if name == "internvideo2" else 2)
    reward.text(["red " * room])
    assert not capsys.readouterr().err
    reward.text(["red " * (room + 1), "blue"])
    reward.text(["green " * 99])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"{name} reads {tokens} tokens")
    assert line.endswith(f"of {tokens + 1}\n")


# ---- full size ---------------------------------------------------------------------------------------------

FULL = {        # configuration, names in the public file, their digest, weights that the network has of them
    "clip": (rewards.CLIPConfig(), clip_shapes, "e8c4c7fb33610e2f", 986_109_440),
    "viclip": (rewards.ViCLIPConfig(), viclip_shapes, "5ca3c8b145c3e635", 427_590_144),
    "imagereward": (rewards.ImageRewardConfig(), imagereward_shapes, "d8f54ba359bd353a", 446_206_689),
    "internvideo2": (rewards.InternVideo2Config(), partial(internvideo2_shapes, extra_layers=5),
                     "d65a652fcfdfd9aa", 1_292_625_664)}


@pytest.mark.parametrize("name", FULL)
def test_full_size_files_hold_what_the_networks_need(name):
    """The digests are of lists made with the published code."""
    (config, shapes, expected, size), recipe = FULL[name], rewards.RECIPES[name]
    assert digest(shapes(config)) == expected
    with torch.device("meta"):
        network = recipe.model(config)
        state = rewards.needed({key: torch.empty(shape) for key, shape in shapes(config).items()})
        state = recipe.convert(state, network)
    ours = {key: x.shape for key, x in network.state_dict().items()}
    assert ours.items() <= {key: x.shape for key, x in state.items()}.items()
    assert len(ours) == len(state) or not recipe.whole
    assert sum(p.numel() for p in network.parameters()) == size
