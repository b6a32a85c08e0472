"""Weight files as people have them: wrapped, in shards, from the hub's cache, of other programs."""
import copy
import json
import math
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracles import diffusers, peft
from test_loading import (
    FPS,
    HEADER,
    SMALL,
    lora_list,
    merged_videocrafter,
    modelscope,
    same,
    small_families,
    write_teacher,
)
from test_model import INPUTS, close, deterministic, original_shapes
from torch import nn

import model
from networks import layouts
from plumbing import weights
from plumbing.errors import UserError

__all__ = ["modelscope", "small_families"]                  # fixtures
STUDENTS = {
    "t2v_turbo_vc2": lambda: merged_videocrafter()["state_dict"],
    "unet_mg": lambda: deterministic(original_shapes(replace(FPS, guidance=True, motion=True))),
    "unet_no_mg": lambda: deterministic(original_shapes(replace(FPS, guidance=True)))}
WRAPS = {
    "nothing": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "ema": lambda state: {"model": {key: 0 * x for key, x in state.items()}, "ema": state, "optimizer": {}},
    "timm": lambda state: {"model": {key: 0 * x for key, x in state.items()}, "model_ema": state},
    "module": lambda state: {"module": {f"module.{key}": x for key, x in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{key}": x for key, x in state.items()},
    "a compiled block": lambda state: {key.replace("input_blocks.1.", "input_blocks.1._orig_mod."): x
                                       for key, x in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{key}": x for key, x in state.items()}}}


@pytest.mark.parametrize("student", STUDENTS)
def test_students_in_any_wrapping(student, tmp_path):
    """The same student, whatever is around its tensors and after the dot of the file's name."""
    write_teacher(tmp_path)
    state = STUDENTS[student]()
    torch.save(state, tmp_path / "x.pt")
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    shutil.copy(tmp_path / "x.safetensors", tmp_path / "x.ckpt")
    expected = model.load("vc2", tmp_path, tmp_path / "x.pt")
    for name, wrap in WRAPS.items():
        torch.save(wrap(state), tmp_path / f"{name}.bin")
    (tmp_path / "hub/snapshots/1").mkdir(parents=True)
    shutil.copy(tmp_path / "x.pt", tmp_path / f"hub/snapshots/1/{student}.pt")
    for file in ["x.safetensors", "x.ckpt", "hub", *(f"{name}.bin" for name in WRAPS)]:
        models = model.load("vc2", tmp_path, tmp_path / file)
        assert same(models, expected) and models.sampling == expected.sampling, file
    (tmp_path / "hub/snapshots/1/unet_lora.pt").touch()
    with pytest.raises(UserError, match="holds several students: .*unet_"):
        model.load("vc2", tmp_path, tmp_path / "hub")


def test_folders_in_shards_and_in_the_hubs_cache(tmp_path, modelscope):
    folder, unet, *_ = modelscope
    expected = model.load("ms", folder)
    main, old = (tmp_path / "models--a--b" / "snapshots" / name for name in ("9" * 40, "1" * 40))
    shutil.copytree(folder, main)
    shutil.rmtree(main / "unet")
    unet.save_pretrained(main / "unet", max_shard_size="1MB")
    assert len(list((main / "unet").glob("*-of-*.safetensors"))) > 2
    old.mkdir()                                             # newer, but not what main is
    (main.parent.parent / "refs").mkdir()
    (main.parent.parent / "refs" / "main").write_text("9" * 40)
    assert same(model.load("ms", main.parent.parent), expected) and same(model.load("ms", main), expected)

    shutil.rmtree(main / "unet")
    copy.deepcopy(unet).half().save_pretrained(main / "unet", max_shard_size="1MB", variant="fp16")
    assert model.load("ms", main, dtype=None).unet.dtype == torch.float16
    next((main / "unet").glob("*-of-*")).unlink()
    with pytest.raises(UserError, match="no such file"):
        model.load("ms", main)


def test_a_list_of_lora_with_numbers_for_names(tmp_path):
    write_teacher(tmp_path)
    shapes = model.lora_shapes(replace(FPS, guidance=True))
    tensors = lora_list([shapes[name] for name in weights.lora_order(shapes)])
    torch.save(tensors, tmp_path / "x.pt")
    safetensors.torch.save_file({str(i): x for i, x in enumerate(tensors)}, tmp_path / "x.safetensors")
    assert same(*(model.load("vc2", tmp_path, tmp_path / f"x.{kind}") for kind in ("pt", "safetensors")))


def by_hand(unet, lora, scale):
    """A diffusers UNet's weights with LoRA {layer: (up, down)} added."""
    state = {key: x.clone() for key, x in unet.state_dict().items()}
    for name, (up, down) in lora.items():
        state[f"{name}.weight"] += scale * (up.flatten(1) @ down.flatten(1)).view_as(state[f"{name}.weight"])
    return layouts.rename(state, layouts.UNET)


NAMES = {"kohya": ("lora_unet_{}.lora_up.weight", "lora_unet_{}.lora_down.weight"),
         "diffusers": ("unet.{}.lora.up.weight", "unet.{}.lora.down.weight"),
         "diffusers, new": ("unet.{}.lora_B.weight", "unet.{}.lora_A.weight"),
         "peft, injected": ("{}.lora_B.weight", "{}.lora_A.weight"),
         "peft": ("base_model.model.{}.lora_B.weight", "base_model.model.{}.lora_A.weight")}


@pytest.mark.parametrize("layout", NAMES)
def test_lora_of_other_programs(layout, tmp_path, modelscope):
    """Of some layers, with alpha = 2 r where the layout can say so: as merged by hand."""
    folder, unet, *_ = modelscope
    layers = {name: m.weight.shape for name, m in unet.named_modules()
              if isinstance(m, (nn.Linear, nn.Conv3d)) and ("attn1" in name or "temp_convs" in name)}
    tensors = lora_list(layers.values())
    lora = dict(zip(layers, zip(tensors[::2], tensors[1::2], strict=True), strict=True))
    file, metadata = {}, {"lora_adapter_metadata": json.dumps(
        {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 1})}
    for name, pair in lora.items():
        for key, x in zip(NAMES[layout], pair, strict=True):
            file[key.format(name.replace(".", "_") if layout == "kohya" else name)] = x
        if layout == "kohya":
            file[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(8.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    metadata = metadata if layout == "diffusers, new" else None
    safetensors.torch.save_file(file, tmp_path / "x.safetensors", metadata)

    state = model.load("ms", folder, tmp_path / "x.safetensors").unet.state_dict()
    expected = by_hand(unet, lora, 1 if layout == "diffusers" else 2)
    assert all(torch.allclose(state[key], x.view_as(state[key]), atol=1e-5) for key, x in expected.items())


def test_lora_that_peft_wrote(tmp_path, modelscope):
    folder, unet, *_ = modelscope
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=r".*(to_q|resnets.*conv1|proj_in)")
    wrapped = peft.get_peft_model(copy.deepcopy(unet), config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = layouts.rename(wrapped.merge_and_unload().state_dict(), layouts.UNET)
    state = model.load("ms", folder, tmp_path / "adapter").unet.state_dict()
    assert all(torch.allclose(state[key], x.view_as(state[key]), atol=1e-5) for key, x in expected.items())

    about = tmp_path / "adapter/adapter_config.json"
    for change in ({"init_lora_weights": "pissa_niter_4"}, {"use_dora": True}, {"peft_type": "LOHA"}):
        about.write_text(json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"} | change))
        with pytest.raises(UserError, match="adapter_config.json: a kind of LoRA that is not read"):
            model.load("ms", folder, tmp_path / "adapter")


def student(**changes):
    return deterministic(original_shapes(replace(FPS, guidance=True))) | changes


def lora(layer, **options):
    up, down = torch.ones(4, 4, 1, 1, **options), torch.ones(4, 32, 3, 3)
    return {f"{layer}.up.weight": up, f"{layer}.down.weight": down}


REFUSED = {             # what a student's file holds -> what the message says
    "integers": (lambda: student(**{"out.2.bias": torch.ones(4).long()}), "out.2.bias holds torch.int64"),
    "booleans": (lambda: student(**{"out.2.bias": torch.ones(4).bool()}), "out.2.bias holds torch.bool"),
    "NaN": (lambda: student(**{"out.2.bias": torch.ones(4).log().log() * 0}), "out.2.bias holds NaN"),
    "8 bits": (lambda: student(**{"out.2.bias": torch.ones(4).to(torch.float8_e5m2)}), "holds torch.float8"),
    "two names": (lambda: student(**{"model.out.2.bias": torch.ones(4)}), "are there twice, with a prefix"),
    "NaN alpha": (lambda: lora("out.2.lora") | {"out.2.alpha": torch.tensor(math.nan)}, "is not one number"),
    "LoHa": (lambda: {"lora_unet_conv_out.hada_w1_a": torch.ones(4)}, "LoRA of out.2 holds hada_w1_a"),
    "another UNet": (lambda: lora("lora_unet_mid_x.lora"), "LoRA for mid_x, a layer that"),
    "a text encoder": (lambda: lora("text_encoder.q.lora"), "LoRA for text_encoder.q, a layer that"),
    "no alpha": (lambda: lora("base_model.model.out.2.lora"), "adapter_config.json: no such file"),
    "integers in LoRA": (lambda: lora("out.2.lora", dtype=torch.int32), "LoRA of out.2: up holds torch.int")}


@pytest.mark.parametrize("name", REFUSED)
def test_students_that_are_refused(name, tmp_path):
    content, message = REFUSED[name]
    write_teacher(tmp_path)
    safetensors.torch.save_file(content(), tmp_path / "x.safetensors", {"config": "configs/train.yaml"})
    with pytest.raises(UserError, match=message) as error:
        model.load("vc2", tmp_path, tmp_path / "x.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 260


def test_diffusers_loads_a_merged_student(tmp_path, modelscope):
    """save_diffusers' folder, in diffusers and here, as --turbo: equal outputs, and the student's header."""
    config = replace(SMALL, guidance=True)
    shapes = model.lora_shapes(config)
    torch.save(lora_list([shapes[name] for name in weights.lora_order(shapes)]), tmp_path / "unet_lora.pt")
    ours = model.load("ms", modelscope[0], tmp_path / "unet_lora.pt")
    weights.save_diffusers(tmp_path / "run/unet", ours.unet.state_dict(), HEADER | {"grid": 100})
    theirs = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "run/unet").eval()
    assert theirs.config.time_cond_proj_dim == 256
    (z, t, c), w = INPUTS, torch.tensor([7.5, 14.2])
    with torch.no_grad():
        sample = theirs(z, t, encoder_hidden_states=c, timestep_cond=model.guidance_embedding(w)).sample
        assert close(ours.unet(z, t, c, w=w), sample)
    again = model.load("ms", modelscope[0], tmp_path / "run")
    assert same(again, ours) and again.sampling.grid == 100


CALLS = ("os.system posix.system subprocess.Popen subprocess.call builtins.eval builtins.exec runpy.run_path "
         "importlib.import_module pty.spawn torch.load pickle.loads webbrowser.open").split()


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_pickles_run_nothing(call, new, tmp_path):
    """As a call, and in the zip and the old format: refused, or read without the call."""
    module, _, name = call.rpartition(".")
    argument = f"open('{tmp_path}/harm', 'w')" if module == "builtins" else f"touch {tmp_path}/harm"

    class Attack:
        def __reduce__(self):
            return getattr(__import__(module, fromlist=[name]), name), (argument,)

    try:
        torch.save({"state_dict": {"x": torch.ones(1)}, "hook": Attack()}, tmp_path / "x.pt",
                   _use_new_zipfile_serialization=new)
    except (pickle.PicklingError, AttributeError):
        pytest.skip("not picklable")
    try:
        assert weights.read_tensors(tmp_path / "x.pt").keys() == {"x"}
    except UserError as error:
        assert "x.pt" in str(error)
    assert not os.path.exists(tmp_path / "harm")


def test_every_public_file_has_its_facts():
    import rewards
    sources = {name for name in rewards.RECIPES if name != "motion" and not name.startswith("shapes-")}
    assert len(sources) == 6 and {*sources, "vc2", "ms"} <= layouts.PUBLIC.keys()
    page = (Path(model.__file__).parent / "docs" / "training.md").read_text(encoding="utf-8")
    for name, (repository, *files) in ((name, text.split()) for name, text in layouts.PUBLIC.items()):
        assert f"| `{name}` | [{repository}](" in page and all(f"`{file}`" in page for file in files), name
