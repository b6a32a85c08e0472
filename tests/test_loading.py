"""Every public file layout, in small, into our networks; and every way in which a file can be wrong."""
import functools
import hashlib
import io
import re
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from oracles import diffusers, open_clip, peft, transformers
from test_model import (
    INPUTS,
    SMALL,
    SMALL_TEXT,
    SMALL_VAE,
    TINY,
    close,
    deterministic,
    original_shapes,
    published,
    randn,
)
from torch import nn

import sample
from model import FAMILIES, VAE, VC2, UNet3D, complete, guidance_embedding, load, lora_shapes, read_turbo
from plumbing import weights
from plumbing.errors import UserError
from plumbing.files import read_header
from plumbing.weights import fill, lora_order, save

FPS, DEEP = replace(TINY, fps=True), replace(SMALL, fps=True)
HEADER = dict(method="turbo", steps=50, w_min=2.0, w_max=9.0)


@pytest.fixture(autouse=True)
def small_families(monkeypatch):
    for name, unet in (("vc2", FPS), ("ms", SMALL)):
        small = replace(FAMILIES[name], unet=unet, height=64, width=64, vae=SMALL_VAE, text=SMALL_TEXT)
        monkeypatch.setitem(FAMILIES, name, small)


@pytest.fixture
def deep(small_families, monkeypatch):
    """VideoCrafter2 with as many blocks as are published, for numbers of the published code."""
    monkeypatch.setitem(FAMILIES, "vc2", replace(FAMILIES["vc2"], unet=DEEP))


def shapes_of(module):
    return {key: tuple(x.shape) for key, x in module.state_dict().items() if "position_ids" not in key}


def clip(vision=False):
    """A small CLIP state dict with open_clip's names: all of its text tower, or the picture's too."""
    c = SMALL_TEXT
    with torch.device("meta"):
        model = open_clip.CLIP(8, dict(image_size=32, layers=1, width=64, patch_size=16),
                               dict(width=c.width, layers=c.layers, heads=c.heads), output_dict=True)
    shapes = shapes_of(model)
    return deterministic({key: shape for key, shape in shapes.items() if vision or "visual" not in key})


def vae():
    with torch.device("meta"):
        shapes = shapes_of(VAE(SMALL_VAE))
    return deterministic({"first_stage_model." + key: shape for key, shape in shapes.items()})


def videocrafter():
    """The content of a model.ckpt."""
    return torch.load(io.BytesIO(model_ckpt(FAMILIES["vc2"].unet)), weights_only=True)


def write_teacher(folder):
    """videocrafter() as a file."""
    (folder / "model.ckpt").write_bytes(model_ckpt(FAMILIES["vc2"].unet))


@functools.cache
def model_ckpt(config):
    unet = {"model.diffusion_model." + key: x for key, x in deterministic(original_shapes(config)).items()}
    text = {"cond_stage_model.model." + key: x for key, x in clip().items()}
    file = io.BytesIO()
    torch.save(unet | vae() | text | dict(betas=torch.zeros(1000), scale_arr=torch.zeros(1400)), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory):
    """A folder as diffusers writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("modelscope")
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(32, 64, 64, 64), cross_attention_dim=24, attention_head_dim=8)
    auto = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"))
    for name, model in (("unet", unet), ("vae", auto), ("text_encoder", text)):
        model.load_state_dict(deterministic(shapes_of(model)), strict=False)
        model.eval().save_pretrained(folder / name)
    return folder, unet, auto, text


def same(a, b):
    """Two Models hold the same weights."""
    for part in ("unet", "vae", "text"):
        x, y = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        if x.keys() != y.keys() or not all(torch.equal(x[key], y[key]) for key in x):
            return False
    return True


# ---- teachers ----------------------------------------------------------------------------------------------

class Callback:
    """What a training framework pickles beside the weights."""
    patience = 3


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state},
                                  lambda state: {"state_dict": state, "callbacks": {Callback: Callback()}}])
def test_videocrafter_checkpoint(tmp_path, deep, wrap):
    torch.save(wrap(videocrafter()), tmp_path / "model.ckpt")
    models = load("vc2", tmp_path / "model.ckpt")
    with torch.no_grad():
        eps = models.unet(*INPUTS)
        assert models.vae.decode(INPUTS[0]).shape == (2, 3, 3, 128, 128)
        assert models.text(["a red circle"]).shape == (1, 77, 24)
    assert close(published(eps), torch.tensor([-.0900834, .4749277, .168649, -.2127277, -.4136356, .4136095]))
    assert not any(p.requires_grad for p in models.vae.parameters()) and not models.unet.training
    assert same(models, load("vc2", tmp_path))              # the folder will do


def test_diffusers_folder(modelscope):
    folder, unet, auto, text = modelscope
    models = load("ms", folder)
    z, t, c = INPUTS
    with torch.no_grad():
        assert close(models.unet(z, t, c), unet(z, t, encoder_hidden_states=c).sample)
        assert close(models.vae.decode(z)[1, :, 2], auto.decode(z[1:, :, 2] / 0.18215).sample[0])
        assert close(models.text(["a red circle"]), text(models.text.tokenizer(["a red circle"]))[0])


def test_other_diffusers_folders(modelscope, tmp_path):
    """.bin files, half precision, the attention names of early 2023, text models without prefix."""
    folder, *parts = modelscope
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, model in zip(("unet", "vae", "text_encoder"), parts, strict=True):
        state = model.state_dict()
        if name == "vae":
            state = {re.sub(r"to_[qkv]|to_out\.0", lambda m: names[m[0]], key): x for key, x in state.items()}
        if name == "text_encoder":
            state = {key.removeprefix("text_model."): x for key, x in state.items()}
            state["embeddings.position_ids"] = torch.arange(77)[None]
        stem = "pytorch_model" if name == "text_encoder" else "diffusion_pytorch_model"
        for kind, half in (("bin", False), ("half", True)):
            (tmp_path / kind / name).mkdir(parents=True)
            content = {key: x.half() if half and x.is_floating_point() else x for key, x in state.items()}
            torch.save(content, tmp_path / kind / name / (stem + (".fp16.bin" if half else ".bin")))
    models = load("ms", folder)
    assert same(models, load("ms", tmp_path / "bin"))
    half = load("ms", tmp_path / "half", dtype=None)
    assert half.unet.dtype == torch.float16
    for x, y in zip(half.unet.parameters(), models.unet.parameters(), strict=True):
        assert torch.equal(x, y.half())


def test_original_modelscope_files(tmp_path, deep):
    """Other names of the first transformer and of downsampling, and Conv1d in all temporal ones."""
    state = {}
    for key, x in deterministic(original_shapes(SMALL)).items():
        if re.search(r"(blocks\.\d+\.2|middle_block\.2)\.proj_(in|out)\.weight", key):
            x = x[..., None]
        state[re.sub(r"^init_attn\.0", "input_blocks.0.1", key).replace(".0.op.", ".op.")] = x
    torch.save(state, tmp_path / "text2video_pytorch_model.pth")
    auto = {"model." + key: x for key, x in vae().items()} | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": auto}, tmp_path / "VQGAN_autoencoder.pth")
    torch.save(clip(vision=True), tmp_path / "open_clip_pytorch_model.bin")
    models = load("ms", tmp_path)

    write_teacher(tmp_path)
    other = load("vc2", tmp_path / "model.ckpt")
    for part in ("unet", "vae", "text"):
        ours, theirs = getattr(models, part).state_dict(), getattr(other, part).state_dict()
        assert ours.keys() == {key for key in theirs if not key.startswith("fps_embedding")}
        assert all(torch.equal(x, theirs[key]) for key, x in ours.items())


def test_dtype_and_memory_format(tmp_path):
    write_teacher(tmp_path)
    models = load("vc2", tmp_path, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in models.unet.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("out.")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("out.")} == {torch.bfloat16}
    assert models.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    (tmp_path / "model.ckpt").write_bytes(b"")              # nothing of the file is mapped any more
    assert models.unet(*INPUTS).isfinite().all()


# ---- LoRA --------------------------------------------------------------------------------------------------

def lora_list(shapes, rank=4):
    """[up, down, ...] with the values that the published code was run with."""
    tensors = []
    for shape in shapes:
        r = min(rank, *shape[:2])
        for s in ((shape[0], r, *[1] * len(shape[2:])), (r, *shape[1:])):
            tensors.append(randn(5000 + len(tensors), *s) / torch.tensor(s[1:]).prod().sqrt() * 0.5)
    return tensors


def public_list(config, rank=4):
    shapes = lora_shapes(config)
    return lora_list([shapes[name] for name in lora_order(shapes)], rank)


def own_lora(shapes):
    """{layer: shape of its weight} -> matrices as our files hold them."""
    names = [f"{layer}.{end}" for layer in shapes for end in ("up", "down")]
    return dict(zip(names, lora_list(shapes.values()), strict=True))


def test_videocrafter_lora_as_published(tmp_path, deep):
    """The published code's output with 2 x 574 nameless matrices: a wrong order would not give it."""
    config = replace(DEEP, guidance=True)
    tensors = public_list(config)
    assert len(tensors) == 2 * 574                          # one skip convolution fewer than in full size
    write_teacher(tmp_path)
    torch.save([nn.Parameter(x) for x in tensors], tmp_path / "unet_lora.pt")
    models = load("vc2", tmp_path, tmp_path / "unet_lora.pt")
    assert models.sampling.grid == 50
    with torch.no_grad():
        eps = models.unet(*INPUTS, w=torch.tensor([7.5, 14.2]), fps=16)
    expected = torch.tensor([.1980657, .1232111, .5689927, -.2307397, -.3275306, -.0884252])
    assert close(published(eps), expected)


def test_modelscope_lora_in_diffusers_order(modelscope, tmp_path):
    """Matrices go to diffusers' own layers in its own order, and are merged there by hand."""
    folder, unet, *_ = modelscope
    theirs = diffusers.UNet3DConditionModel.from_config(unet.config, time_cond_proj_dim=256).eval()
    base = deterministic(shapes_of(unet)) | {"time_embedding.cond_proj.weight": torch.zeros(32, 256)}
    theirs.load_state_dict(base)
    layers = [m for m in theirs.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    tensors = lora_list([m.weight.shape for m in layers])
    for layer, up, down in zip(layers, tensors[::2], tensors[1::2], strict=True):
        layer.weight.data += torch.einsum("or,r...->o...", up.flatten(1), down)
    torch.save(tensors, tmp_path / "unet_lora.pt")

    models = load("ms", folder, tmp_path / "unet_lora.pt")
    w = torch.tensor([7.5, 14.2])
    z, t, c = INPUTS
    with torch.no_grad():
        expected = theirs(z, t, encoder_hidden_states=c, timestep_cond=guidance_embedding(w)).sample
        assert close(models.unet(z, t, c, w=w), expected)


def test_full_size_lora_orders():
    """Digest of the names in the order in which the published injector visited the full-size UNets."""
    for config, expected in ((VC2, "7b3c5090ba0fdfa9"), (replace(VC2, fps=False), "ba3148f91a159f3e")):
        names = lora_order(lora_shapes(replace(config, guidance=True)))
        assert len(names) == 575
        assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == expected


def test_merge_equals_peft():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Conv2d(4, 8, 3, padding=1)
            self.c = nn.Conv3d(4, 6, (3, 1, 1))

    torch.manual_seed(0)
    net = Net()
    state = {key: x.clone() for key, x in net.state_dict().items()}
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["a", "b", "c"]))
    lora = {}
    for name in "abc":
        layer = theirs.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_B["default"].weight)
        lora |= {f"{name}.up": layer.lora_B["default"].weight.detach(),
                 f"{name}.down": layer.lora_A["default"].weight.detach()}
    expected = theirs.merge_and_unload().state_dict()
    with torch.device("meta"):
        ours = Net()
    fill(ours, state, "test", lora=lora)
    for key, x in ours.state_dict().items():
        assert torch.allclose(x, expected[key], atol=1e-6), key


# ---- v2, and our own checkpoints ---------------------------------------------------------------------------

@pytest.mark.parametrize("motion", [True, False])
def test_second_version(tmp_path, deep, motion):
    """unet_mg.pt and unet_no_mg.pt: a whole UNet; VAE and text come from the teacher's file."""
    write_teacher(tmp_path)
    shapes = original_shapes(replace(DEEP, guidance=True, motion=motion))
    torch.save(deterministic(shapes), tmp_path / "unet.pt")
    models = load("vc2", tmp_path, tmp_path / "unet.pt")
    assert models.fps == 8 and models.unet.config.motion == motion
    default = FAMILIES["vc2"].sampling["turbo-v2"]          # 16 steps of the 200-step grid
    assert models.sampling == (default if motion else replace(default, motion=None))
    with torch.no_grad():
        strength = torch.tensor([0.05, 0.0]) if motion else None
        eps = models.unet(*INPUTS, w=torch.tensor([7.5, 14.2]), fps=8, motion=strength)
    assert close(published(eps), torch.tensor(
        [-.1088979, .4450589, .1715164, -.2278798, -.4524518, .4187988] if motion
        else [-.1307804, .4606087, .1881391, -.2197787, -.4324611, .4341577]))


def merged_videocrafter():
    """The content of t2v_turbo_vc2.pt: VideoCrafter2's, and the guidance projection."""
    projection = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    return {"state_dict": videocrafter() | {"model.diffusion_model.time_cond_proj.weight": projection}}


def test_merged_first_version(tmp_path):
    """t2v_turbo_vc2.pt needs no other file: a student of the 50-step grid, told 16 frames a second."""
    write_teacher(tmp_path)
    torch.save(merged_videocrafter(), tmp_path / "t2v_turbo_vc2.pt")
    models = load("vc2", turbo=tmp_path / "t2v_turbo_vc2.pt")
    teacher = load("vc2", tmp_path, guidance=True)
    projection = merged_videocrafter()["state_dict"]["model.diffusion_model.time_cond_proj.weight"]
    assert torch.equal(models.unet.time_cond_proj.weight, projection)
    models.unet.time_cond_proj.weight.data.zero_()
    assert same(models, teacher)
    assert models.sampling == FAMILIES["vc2"].sampling["turbo"]
    assert (models.sampling.grid, models.fps) == (50, 16)


def test_own_checkpoints(tmp_path):
    write_teacher(tmp_path)
    config = replace(FPS, guidance=True)
    shapes = lora_shapes(config)
    lora = own_lora(shapes)
    save(tmp_path / "lora.safetensors", lora, HEADER)
    assert read_header(tmp_path / "lora.safetensors") == HEADER
    assert read_turbo(tmp_path / "lora.safetensors", config)[2].keys() == lora.keys()

    student = load("vc2", tmp_path, tmp_path / "lora.safetensors")
    assert student.header == complete(HEADER, FAMILIES["vc2"]) and student.sampling.grid == 50
    save(tmp_path / "merged.safetensors", student.unet.state_dict(), HEADER | {"steps": 200})
    merged = load("vc2", tmp_path, tmp_path / "merged.safetensors")
    assert same(student, merged) and merged.sampling.grid == 200
    teacher = load("vc2", tmp_path, guidance=True).unet.state_dict()
    change = student.unet.state_dict()["out.2.weight"] - teacher["out.2.weight"]
    expected = torch.einsum("or,rikl->oikl", lora["out.2.up"][:, :, 0, 0], lora["out.2.down"])
    assert torch.allclose(change, expected, atol=1e-6)


# ---- what students are told --------------------------------------------------------------------------------

def student_file(path, header, motion=False):
    """A whole UNet of ours."""
    with torch.device("meta"):
        unet = UNet3D(replace(FPS, guidance=True, motion=motion))
    save(path, deterministic(shapes_of(unet)), header)


@pytest.fixture
def teacher_file(tmp_path):
    write_teacher(tmp_path)
    return tmp_path / "model.ckpt"


def test_a_students_header_says_how_it_is_sampled(tmp_path, teacher_file):
    header = dict(model="vc2", method="turbo", grid=100, w_min=1.0, w_max=4.0, fps=8, frames=24, height=128,
                  width=64)
    student_file(tmp_path / "x.safetensors", header)
    models = load("vc2", teacher_file, tmp_path / "x.safetensors")
    assert models.size == (24, 128, 64) and models.fps == 8
    assert (models.sampling.grid, models.sampling.fps, models.sampling.guidance) == (100, 8, 4.0)

    v2 = header | dict(method="turbo-v2", grid=200, w_max=15.0, motion=0.1, motion_share=0.3)
    student_file(tmp_path / "v2.safetensors", v2, motion=True)
    sampling = load("vc2", teacher_file, tmp_path / "v2.safetensors").sampling
    assert (sampling.steps, sampling.motion, sampling.motion_share) == (16, 0.1, 0.3)


def test_guidance_beyond_the_trained_range_is_said(tmp_path, teacher_file, capsys):
    torch.save(public_list(replace(FPS, guidance=True)), tmp_path / "unet_lora.pt")
    models = load("vc2", teacher_file, tmp_path / "unet_lora.pt")
    for guidance, warns in ((5, False), (15, False), (20, True), (0, True)):
        sample.sampling_of(models, sample.Config(guidance=guidance))
        warning = f"--guidance {guidance}: this student was trained with 5 to 15\n" if warns else ""
        assert capsys.readouterr().err == warning


def test_strength_of_lora(tmp_path, teacher_file):
    """0: the teacher, 1: as trained, and in between in proportion."""
    torch.save(public_list(replace(FPS, guidance=True)), tmp_path / "unet_lora.pt")
    weight = {scale: load("vc2", teacher_file, tmp_path / "unet_lora.pt", lora_scale=scale).unet.out[2].weight
              for scale in (0, 0.5, 1)}
    assert torch.equal(weight[0], load("vc2", teacher_file).unet.out[2].weight)
    torch.testing.assert_close(weight[0.5], (weight[0] + weight[1]) / 2)
    student_file(tmp_path / "x.safetensors", {})
    with pytest.raises(UserError, match="--lora-scale 0.5: .* holds whole weights, no LoRA to scale"):
        load("vc2", teacher_file, tmp_path / "x.safetensors", lora_scale=0.5)


def test_merged_weights_are_written_as_released(tmp_path, teacher_file):
    """All names and shapes of VideoCrafter2's file and one more; read back, the same student."""
    torch.save(public_list(replace(FPS, guidance=True)), tmp_path / "unet_lora.pt")
    student = load("vc2", teacher_file, tmp_path / "unet_lora.pt")
    weights.save_merged(tmp_path / "merged.pt", teacher_file, student.unet.state_dict(), {"grid": 100})
    written = torch.load(tmp_path / "merged.pt", weights_only=True)["state_dict"]
    expected = merged_videocrafter()["state_dict"]
    assert {key: x.shape for key, x in written.items()} == {key: x.shape for key, x in expected.items()}
    again = load("vc2", turbo=tmp_path / "merged.pt")
    assert same(again, student) and again.sampling == replace(student.sampling, grid=100)


def test_a_lora_of_another_model_is_refused(tmp_path, capsys, deep, teacher_file, modelscope):
    """All 575 layers of a ModelScope LoRA are layers of VideoCrafter2, too; so are any ten of its own."""
    def write(shapes, header=HEADER):
        save(tmp_path / "x.safetensors", own_lora(shapes), header)

    vc2, ms = (lora_shapes(replace(config, guidance=True)) for config in (DEEP, SMALL))
    for shapes in (ms, dict([*vc2.items()][:10])):
        write(shapes)
        with pytest.raises(UserError, match="not a LoRA of this UNet, or not all of it: .* of 576"):
            load("vc2", teacher_file, tmp_path / "x.safetensors")
    write(vc2)
    with pytest.raises(UserError, match="LoRA for fps_embedding.0, a layer that this UNet does not have"):
        load("ms", modelscope[0], tmp_path / "x.safetensors")
    write(vc2, HEADER | {"model": "ms"})
    with pytest.raises(UserError, match="x.safetensors is a student of ms, not of vc2; use --model ms"):
        load("vc2", teacher_file, tmp_path / "x.safetensors")
    for teacher, words in ((load("vc2", teacher_file).teacher, ""), ("another", "from other weights")):
        write(vc2, HEADER | {"teacher": teacher})
        load("vc2", teacher_file, tmp_path / "x.safetensors")
        assert words in (told := capsys.readouterr().err) and bool(words) == bool(told)


# ---- errors ------------------------------------------------------------------------------------------------

TEACHERS = {            # how a teacher's file is wrong -> what is said
    "missing": r"not the weights of this UNet3D.* 1 of \d+ tensors missing, 0 not expected \(out.2.bias",
    "misshaped": r"decoder.conv_in.weight has shape \(64, 3, 3, 3\), expected \(64, 4, 3, 3\)",
    "foreign": r"(\d+) of \1 tensors missing", "list": r"(\d+) of \1 tensors missing",
    "truncated": "not a weight file", "page": "not a weight file", "absent": "no such file"}


@pytest.mark.parametrize("how", TEACHERS)
def test_wrong_teachers(tmp_path, how):
    path, state = tmp_path / "model.ckpt", videocrafter()
    if how == "missing":
        del state["model.diffusion_model.out.2.bias"]
    elif how == "misshaped":
        state["first_stage_model.decoder.conv_in.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save({"foreign": {"head.weight": torch.zeros(3)}, "list": [torch.zeros(3)]}.get(how, state), path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:10000])
    elif how == "page":
        path.write_text("<html>404</html>")
    elif how == "absent":
        path.unlink()

    with pytest.raises(UserError, match=TEACHERS[how]) as error:
        load("vc2", path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 290


def test_wrong_folders(tmp_path, modelscope):
    with pytest.raises(UserError, match="no teacher: neither model.ckpt nor unet/, vae/"):
        load("ms", tmp_path)
    with pytest.raises(UserError, match=r"\(fps_embedding.0.bias, ...\)"):  # the other model's
        load("vc2", modelscope[0])


def test_wrong_lora(tmp_path):
    config, path = replace(FPS, guidance=True), tmp_path / "unet_lora.pt"
    tensors = public_list(config)
    torch.save(tensors[:-2], path)
    with pytest.raises(UserError, match=f"{len(tensors) - 2} LoRA tensors, this UNet takes {len(tensors)}"):
        read_turbo(path, config)
    torch.save(tensors[2:] + tensors[:2], path)
    with pytest.raises(UserError, match=r"LoRA of time_embed.0: down has shape \(4, 128\), expected"):
        read_turbo(path, config)


def test_public_files_are_fetched(modelscope, tmp_path, monkeypatch):
    """Without paths the hub is asked for exactly the files that are needed; here a folder plays the hub."""
    asked = []

    def hub(repository, file):
        asked.append(file)
        return str((modelscope[0] if "text-to-video" in repository else tmp_path) / file)

    write_teacher(tmp_path)
    torch.save(public_list(replace(FPS, guidance=True)), tmp_path / "unet_lora.pt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    torch.save(merged_videocrafter(), tmp_path / "t2v_turbo_vc2.pt")
    assert same(load("vc2", turbo="vc2-turbo-lora"), load("vc2", tmp_path, tmp_path / "unet_lora.pt"))
    assert sorted(asked) == ["model.ckpt", "unet_lora.pt"]
    asked.clear()
    assert same(load("vc2", turbo="vc2-turbo"), load("vc2", turbo=tmp_path / "t2v_turbo_vc2.pt"))
    assert asked == ["t2v_turbo_vc2.pt"]                    # it is the student, the VAE and the text encoder
    asked.clear()
    assert same(load("ms"), load("ms", modelscope[0]))
    assert sorted(asked) == ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
                             "vae/diffusion_pytorch_model.safetensors"]
