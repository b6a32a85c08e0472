"""What train.py can be told: its options with their sources, the presets of both papers, and what is checked
before anything is loaded.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import rewards
import shapes
from model import FAMILIES, Family, check_size
from plumbing import cli
from plumbing.cli import Count, NotNegative, Positive, Seed, Share, Size, Within
from plumbing.run import pick_device, usual_dtype
from shapes import grammar
from solver import Schedule

Preset = Literal[
    "shapes", "shapes-vcm", "shapes-v2", "vcm-vc2", "turbo-vc2", "vcm-ms", "turbo-ms", "turbo-v2"]

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Config:
    """Defaults are T2V-Turbo (VC2)."""
    preset: Preset = "shapes"       # of defaults
    teacher: str = ""               # VC2's model.ckpt, MS's folder [downloaded; shapes: embedded]
    data: str = ""                  # folder, .csv, .jsonl, .tar pattern of captioned clips; v2: the cache
    reward: tuple[str, ...] = ("hpsv2", "internvideo2")  # NAME[=FILE][:WEIGHT], repeatable; overrides β
    out: str = ""                   # folder for weights, checkpoints, log.jsonl, samples [runs/PRESET]
    resume: str = ""                # auto (the last checkpoint in OUT, if any) or a checkpoint's path
    seed: Seed = 0                  # of LoRA's start, the order of clips, and all that Algorithm 1 draws
    device: str = ""                # cpu, cuda [cuda if there, a GPU per process]
    dry_run: Size | None = None     # N steps with random weights, then its time and memory; 0: simulated
    # the clips
    frames: Count = 16              # paper, Sec. 4: 16 frames
    height: Count = 320             # paper, Sec. 4: 512x320 (VC2), 256x256 (MS)
    width: Count = 512              # same
    fps: Annotated[int, Within(1, 240)] = 16    # of clips, told to VC2's UNet; released code: 16; MS: 8
    # Algorithm 1
    grid: Annotated[int, Within(1, 1000)] = 50  # N, the solver's steps; released code, num_ddim_timesteps
    on_policy: Share = 0.0          # of clips: z_t where the student's own 4-step sampling comes; papers: 0
    w_min: NotNegative = 5.0        # ω ~ U[w_min, w_max]; paper, Sec. 4
    w_max: NotNegative = 15.0       # same
    image_weight: NotNegative = 1.0     # β_img; paper, Sec. 4: 1 (VC2), 2 (MS); 0: VCM, or without R_img
    video_weight: NotNegative = 2.0     # β_vid; paper, Sec. 4: 2 (VC2), 3 (MS); 0: VCM, or without R_vid
    image_frames: Count = 6         # M, random frames for an image reward; paper, Sec. 4 (released code: 5)
    video_frames: Count = 8         # evenly strided frames for a video reward; paper, Sec. 4
    ema: Share = 0.95               # decay of the target network θ⁻; v1 Eq. 6; 0: θ itself (released code)
    pairs: Share = 0.3              # shapes: of clips with two things, which teach what belongs to what
    # T2V-Turbo-v2
    prepare: str = ""               # folder for the cache that v2 trains from; makes it, and does not train
    reward_data: str = ""           # --prepare: more clips, as --data; then only these carry rewards (WebVid)
    prepare_clips: Count | None = None      # --prepare: how many clips of both together [all]
    draws: Count = 1                # --prepare: timesteps and noises per clip; they share its inversion
    inversion_steps: Annotated[int, Within(1, 1000)] = 50   # --prepare: DDIM inversion; released code: 200
    motion: NotNegative = 0.05      # λ' of motion guidance; released code (the paper's λ = 500); 0: none
    motion_share: Share = 0.5       # τ: motion guidance at t >= 1000 (1 - τ); v2, Sec. 4
    released_motion: bool = False   # its factor √(1 - √ᾱ) of the released code, not √(1 - ᾱ)
    reward_batch: Count = 8         # clips per step that rewards see, all processes; released code: 1 per GPU
    rewards_on: Literal["short", "all", "disjoint"] = "short"   # clips; disjoint: L_CD on the others only
    # optimisation
    steps: Count = 10000            # paper, Sec. 4: 10K
    batch: Count = 8                # clips per step, all processes together; paper, Sec. 4: 1 per GPU
    micro: Count = 1                # clips per forward pass of a process: memory against speed
    sums: Count = 1                 # of the gradient, per process: one process with 2 adds as two do
    lr: Annotated[float, Within(0, 1, above=True)] = 1e-5  # of AdamW (0.9, 0.999); paper, Sec. 4
    lr_fall: Share = 0.0            # last share of the steps, over which it falls to 0; papers: constant
    lora: Size = 64                 # rank; paper: 64 (VC2); released weights: 32 (MS); 0: train all weights
    clip: Positive = 1.0            # largest gradient norm; released code
    dtype: Dtype | None = "bfloat16"    # of the networks, shapes: float32 where it is faster; losses: float32
    checkpointing: bool = True      # recompute the UNet's activations in the backward pass
    offload: bool = False           # what a part of a step does not need waits in host memory: for small GPUs
    chunk: Size = 2                 # frames whose decoder graph is held at a time; 0: all, decoded once
    # keeping and watching
    workers: Size = 4               # processes that decode clips, per training process; at most one a core
    save_every: Count = 500         # steps between checkpoints
    keep: Count = 2                 # checkpoints kept
    sample_every: Size = 500        # steps between sample clips; 0: never
    prompt: tuple[str, ...] = ("a corgi runs through a meadow", "waves at sunset")   # of them; repeatable
    guidance: NotNegative = 7.5     # ω of the samples; paper, Sec. 4
    merge: bool = False             # at the end: also OUT/merged.safetensors; vc2: and t2v_turbo_vc2.pt
    export_lora: bool = False       # at the end: also OUT/unet_lora.pt, the list that the released code reads


MS = dict(
    height=256, width=256, fps=8, lora=32, image_weight=2.0, video_weight=3.0, reward=("hpsv2", "viclip"))
VCM = dict(image_weight=0.0, video_weight=0.0)
SHAPES = dict(
    frames=8, height=64, width=64, fps=8,
    grid=8, w_min=0.5, w_max=3.0, reward=("shapes-clip", "shapes-viclip"), image_frames=4, video_frames=4,
    steps=200, batch=8, micro=8, lr=1e-3, lora=7, checkpointing=False, chunk=0,
    dtype=None, workers=0, save_every=50, sample_every=50, guidance=2.0,
    prompt=("a red circle moving right", "a blue square rising on white"))
SHAPES_LONGER = dict(steps=800, lr_fall=1.0, on_policy=0.5, pairs=0.7)     # without rewards it gets worse
V2 = dict(
    fps=8, grid=200, ema=0.0, image_weight=0.2, video_weight=0.5, reward=("hpsv2", "clip", "internvideo2"),
    image_frames=2, video_frames=4, steps=8000, batch=24, reward_batch=8, lora=0)
SHAPES_V2 = SHAPES | dict(
    ema=0.0, batch=6, reward_batch=2, prepare_clips=400, draws=4)
PRESETS = {
    "shapes": SHAPES | SHAPES_LONGER, "shapes-vcm": SHAPES | VCM, "shapes-v2": SHAPES_V2,
    "turbo-vc2": {}, "vcm-vc2": VCM, "turbo-ms": MS, "vcm-ms": MS | VCM, "turbo-v2": V2}

PATHS = {"teacher", "data", "reward", "out", "resume", "device"}   # of this machine, not of the student
PREPARING = {"prepare", "reward_data", "prepare_clips", "draws", "inversion_steps"}
MAY_CHANGE = PATHS | PREPARING | {                                  # when a run is resumed; nothing else may
    "dry_run", "steps", "micro", "sums", "lr", "lr_fall", "checkpointing", "offload", "chunk", "workers",
    "save_every", "keep", "sample_every", "prompt", "guidance", "merge", "export_lora"}


def is_toy(config: Config) -> bool:
    return config.preset.startswith("shapes")


def is_v2(config: Config) -> bool:
    return config.preset.endswith("v2")


def told_motion(config: Config) -> bool:
    """Is the student told λ'?"""
    return is_v2(config) and config.motion > 0


def model_name(config: Config) -> str:
    """shapes, vc2 or ms: whose teacher it is."""
    if is_toy(config):
        return "shapes"
    return "ms" if config.preset.endswith("ms") else "vc2"


def family_of(config: Config) -> Family:
    """The teacher's architecture and the clips it was trained for."""
    return shapes.FAMILY if is_toy(config) else FAMILIES[model_name(config)]


# ---- the command line --------------------------------------------------------------------------------------


def configure(argv: list[str] | None = None, description: str = "") -> Config:
    """Command line over preset over defaults. Raises ValueError for what is wrong before a file is opened."""
    preset = cli.parse(Config, argv, description).preset
    config = cli.parse(Config, argv, description, defaults={"out": f"runs/{preset}"} | PRESETS[preset])
    check_values(config)
    check_effect(config, cli.given(Config, argv))
    if config.dtype is None:
        config = dataclasses.replace(config, dtype=usual_dtype(pick_device(config.device)))
    return config


def check_values(config: Config) -> None:
    """Options that do not fit each other."""
    toy = is_toy(config)
    check_size(family_of(config), height=config.height, width=config.width)
    Schedule(config.grid)
    Schedule(config.inversion_steps)
    if toy and config.height != config.width:
        raise ValueError(f"--width {config.width}: the toy's clips are square; try --width {config.height}")
    if config.w_min > config.w_max:
        raise ValueError(f"--w-min {config.w_min} is above --w-max {config.w_max}")
    if config.prepare and config.dry_run is not None and (toy or config.dry_run):
        raise ValueError(f"--dry-run {config.dry_run} with --prepare: preparing is only simulated, and only "
                         "for --preset turbo-v2: --dry-run 0")
    if config.device.startswith("mps"):
        raise ValueError("--device mps: training sums in float64, which MPS lacks; try --device cpu")
    if toy and config.sample_every:
        check_prompts(config.prompt)
    for planned in planned_rewards(config):
        if planned.frames > config.frames:
            raise ValueError(f"--{planned.kind}-frames {planned.frames} is more than the clips have; "
                             f"choose at most --frames {config.frames}")


def check_prompts(prompts: tuple[str, ...]) -> None:
    """What the toy's samples show. Raises ValueError for what it does not understand."""
    for prompt in prompts:
        try:
            grammar.understand(prompt)
        except ValueError as error:
            raise ValueError(f"--prompt {prompt!r:.60}: {error}") from error


def check_effect(config: Config, given: set[str]) -> None:
    """Options that were typed but cannot take effect."""
    kinds = {planned.kind for planned in planned_rewards(config)}
    public = "--preset turbo-vc2, vcm-vc2, turbo-ms or vcm-ms"
    needs = (                                       # option, does it take effect, what it belongs to
        ("data", not is_toy(config) or is_v2(config) and not config.prepare,
         f"{public}; the toy draws its own clips"),
        ("image_frames", "image" in kinds, "an image reward; --image-weight is 0"),
        ("video_frames", "video" in kinds, "a video reward; --video-weight is 0"),
        ("prompt", config.sample_every, "--sample-every"),
        ("guidance", config.sample_every, "--sample-every"),
        ("merge", config.lora, "--lora; without it turbo.safetensors is the whole UNet"),
        ("export_lora", config.lora, "--lora"),
        ("resume", config.dry_run is None, "training; --dry-run begins anew"),
        ("ema", not is_v2(config), "--preset turbo-vc2 and the like; v2's target is the student itself"),
        ("on_policy", not is_v2(config), "--preset turbo-vc2 and the like; v2 draws t when it prepares"),
        ("pairs", is_toy(config) and (config.prepare or not is_v2(config)), "the toy where it draws clips"),
        ("offload", not config.prepare, "training"),
        ("sums", not config.prepare and config.dry_run is None, "training"),
        ("resume", not config.prepare, "training; preparing goes on by itself"),
    )
    v2_only = PREPARING | {"motion", "motion_share", "released_motion", "reward_batch", "rewards_on"}
    needs += tuple((name, is_v2(config), "--preset turbo-v2 or shapes-v2") for name in sorted(v2_only))
    needs += tuple((name, config.prepare, "--prepare") for name in sorted(PREPARING - {"prepare"}))
    for name, effective, owner in needs:
        if name in given and not effective:
            raise ValueError(f"{cli.flag_of(name)} has no effect here: it belongs to {owner}")
    if "reward" in given:
        for name in sorted({rewards.parse_spec(spec)[0] for spec in config.reward}):
            if name not in {planned.name for planned in planned_rewards(config)}:
                raise ValueError(f"--reward {name} has no effect here: its weight is 0; "
                                 f"set --{rewards.RECIPES[name].kind}-weight, or leave it out")


@dataclass(frozen=True)
class PlannedReward:
    """A reward before it is loaded."""
    name: str
    path: str | None                # None: downloaded
    kind: Literal["image", "video"]
    weight: float                   # β_img, β_vid, or its own
    frames: int                     # that it is shown of a clip


def planned_rewards(config: Config) -> list[PlannedReward]:
    """What --reward asks for, without rewards of weight zero, which are not loaded. Raises ValueError."""
    planned = {}
    for spec in config.reward:
        name, path, weight = rewards.parse_spec(spec)
        kind = rewards.RECIPES[name].kind
        if name.startswith("shapes-") != is_toy(config):
            raise ValueError(f"--reward {name} does not belong to --preset {config.preset}; "
                             "the toy's are shapes-clip and shapes-viclip, and no other preset takes those")
        if name in planned:
            raise ValueError(f"--reward {name} is given twice; give it once, with the sum of its weights")
        weight = getattr(config, f"{kind}_weight") if weight is None else weight
        planned[name] = PlannedReward(name, path, kind, weight, getattr(config, f"{kind}_frames"))

    for kind, example in (("image", "hpsv2"), ("video", "internvideo2")):
        weight = getattr(config, f"{kind}_weight")
        if weight and kind not in {reward.kind for reward in planned.values()}:
            raise ValueError(f"--{kind}-weight is {weight}, but no {kind} reward is given; "
                             f"add --reward {example}=FILE, or --{kind}-weight 0")
    return [reward for reward in planned.values() if reward.weight]


def check_files(config: Config) -> None:
    """Raises ValueError where a file that will be read is not there."""
    if config.teacher and not Path(config.teacher).expanduser().exists():
        raise ValueError(f"--teacher {config.teacher}: no such file or folder")
    if is_v2(config) and not config.prepare and not config.data:
        raise ValueError("v2 trains from a cache: make one with --prepare CACHE, then say --data CACHE")
    if is_toy(config):
        return
    if not config.data:
        raise ValueError("no clips to train on; name them with --data, or try --dry-run 1")
    for reward in planned_rewards(config):
        if reward.kind == "video":
            rewards.check_frames(reward.name, reward.frames)
        if reward.path and not Path(reward.path).expanduser().exists():
            raise ValueError(f"--reward {reward.name}={reward.path}: no such file")


def check_resume(config: Config, state: dict, path: Path) -> None:
    """Raises ValueError where an option that holds for the whole of a run differs from the checkpoint's."""
    said = state["config"]
    for name in sorted(said.keys() & {field.name for field in dataclasses.fields(Config)} - MAY_CHANGE):
        now = getattr(config, name)
        if said[name] != now:
            raise ValueError(f"this run began with {cli.flag_of(name)} {said[name]}, not {now}; "
                             "go on with that, or choose another --out")
    if "record" in state:                   # the first version's toy did not look at --reward
        before = reward_weights(dataclasses.replace(config, reward=tuple(said["reward"])))
        now = reward_weights(config)
        if before != now:
            raise ValueError(f"this run began with the rewards {before}, not {now}; "
                             "go on with those, or choose another --out")
    if state["step"] > config.steps:
        raise ValueError(f"{path} is at step {state['step']}, past --steps {config.steps}; "
                         "resume an earlier checkpoint, or raise --steps")


def reward_weights(config: Config) -> str:
    """The rewards of a run and their weights, in words."""
    return ", ".join(f"{reward.name} ({reward.weight:g})" for reward in planned_rewards(config)) or "none"
