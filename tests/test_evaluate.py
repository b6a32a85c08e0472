"""evaluate.py: VBench's totals, scores of clips, the toy's table."""
import json
import math
import random

import pytest
import torch

import evaluate
import rewards
import sample
import shapes
from evaluate import QUALITY, SEMANTIC, TOTALS
from plumbing import stats, video
from plumbing.errors import UserError
from shapes import grammar, table, world

# ---- VBench ------------------------------------------------------------------------------------------------

# v1 (arXiv 2405.18750): further models whose dimensions are printed, in percent.
COLUMNS = (*TOTALS, *QUALITY, *SEMANTIC)
PRINTED = {name.removesuffix(" (paper)"): [100 * row[column] for column in COLUMNS]
           for name, row in evaluate.published().items() if row.keys() == {*COLUMNS}} | {
    "Pika": (80.40, 82.68, 71.26, 96.76, 98.95, 99.77, 99.51, 63.15, 37.22, 62.33,
             87.45, 46.69, 88.00, 85.31, 65.65, 44.80, 21.89, 24.44, 25.47),
    "T2V-Turbo (VC2), ViCLIP": (80.92, 82.77, 73.52, 96.93, 97.47, 98.03, 97.48, 63.38, 43.61, 72.94,
                                94.05, 50.52, 94.40, 89.85, 36.77, 54.17, 23.81, 25.34, 28.11)}


def shares_of(name):
    return {key: percent / 100 for key, percent in zip((*QUALITY, *SEMANTIC), PRINTED[name][3:], strict=True)}


VCM, TURBO = map(shares_of, ("VCM (VC2), 4 steps", "T2V-Turbo (VC2), 4 steps"))


def test_the_papers_totals_follow_from_their_dimensions():
    assert len(PRINTED) == 8
    for name, row in PRINTED.items():
        totals = evaluate.with_totals(shares_of(name))
        assert [100 * totals[key] for key in TOTALS] == pytest.approx(row[:3], abs=0.01), name
    assert evaluate.published()["NoisEasier (VC2), 4 steps (paper)"] == pytest.approx(dict(
        dynamic_degree=0.5917, multiple_objects=0.7918, color=0.9363, spatial_relationship=0.5261,
        overall_consistency=0.3195))


def write_results(folder, shares, split=1):
    """Result files as VBench writes them: per dimension a score and its clips; and files of prompts."""
    folder.mkdir()
    for index in range(split):
        part = {}
        for dimension, share in list(shares.items())[index::split]:
            part[dimension] = [share, [dict(video_path="a-0.mp4", video_results=share)]]
        (folder / f"results_{index}_eval_results.json").write_text(json.dumps(part))
        info = folder / f"results_{index}_full_info.json"
        info.write_text('[{"prompt_en": "a", "dimension": ["color"]}]')


def test_vbench_reads_folders_and_files(tmp_path, capsys):
    for name, shares in (("vcm", VCM), ("turbo", TURBO)):
        write_results(tmp_path / name, shares, split=4)
    write_results(tmp_path / "part", {key: TURBO[key] for key in (*QUALITY, "scene")})
    evaluate.main(["vbench", *(str(tmp_path / name) for name in ("vcm", "turbo", "part"))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["|  | Total | Quality | Semantic |", "| --- | --- | --- | --- |",
                         "| vcm | 73.97 | 78.54 | 55.66 |", "| turbo | 81.00 | 82.56 | 74.77 |",
                         "| part | - | 82.56 | - |"]
    assert lines[9] == "| turbo | 96.28 | 97.02 | 97.48 | 97.34 | 63.04 | 49.17 | 72.49 |"
    assert lines[-1].startswith("no Total of part, which lacks object_class, multiple_obj")

    files = sorted(map(str, (tmp_path / "turbo").glob("*_eval_results.json")))
    evaluate.main(["vbench", *("ours=" + file for file in files), "--papers"])
    printed = capsys.readouterr().out
    assert "| ours | 81.00 | 82.56 | 74.77 |" in printed
    assert "| T2V-Turbo-v2, 8 steps (paper) | 83.05 | - | - |" in printed


# ---- intervals ---------------------------------------------------------------------------------------------

def test_wilson_intervals():
    z2 = stats.Z95 ** 2
    assert stats.wilson(0, 20) == pytest.approx((0, z2 / (20 + z2)), abs=1e-12)
    assert stats.wilson(1, 20) == pytest.approx((20 / (20 + z2), 1))
    low, high = stats.wilson(0.3, 50)                       # where |p - 0.3| is 1.96 deviations of p
    for p in (low, high):
        assert abs(p - 0.3) == pytest.approx(stats.Z95 * math.sqrt(p * (1 - p) / 50))


def test_mean_interval_covers():
    draw, inside = random.Random(0), 0
    for _ in range(400):
        mean, half = stats.mean_interval([draw.gauss(5, 2) for _ in range(50)])
        inside += abs(mean - 5) <= half
    assert 0.92 < inside / 400 < 0.98
    assert stats.mean_interval([3.0])[0] == 3 and math.isnan(stats.mean_interval([3.0])[1])


def test_intervals_of_paired_differences_cover():
    """Also where every clip is right in both rows: no interval is of no width."""
    assert stats.paired_interval(0, 0, 20) == pytest.approx((-1.96 / 22, 1.96 / 22))
    draw, inside = random.Random(0), 0
    for _ in range(400):
        pairs = [draw.choices(((1, 1), (1, 0), (0, 1), (0, 0)), (80, 15, 3, 2))[0] for _ in range(60)]
        low, high = stats.paired_interval(pairs.count((1, 0)), pairs.count((0, 1)), 60)
        inside += low <= 0.12 <= high
    assert 0.92 < inside / 400 <= 0.99


# ---- score -------------------------------------------------------------------------------------------------

CAPTIONS = ["a red circle moving right", "a green triangle at rest on a white background"]


def drawn(caption, number=0):
    """A clip of the shapes world for a caption."""
    return world.render(grammar.understand(caption), random.Random(number))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips of each caption, two of what it says and one of the other's; some are png frames."""
    folder = tmp_path_factory.mktemp("score")
    for caption, other in (CAPTIONS, CAPTIONS[::-1]):
        for i, (shown, suffix) in enumerate([(caption, ".mp4"), (other, ".mp4"), (caption, ".png")]):
            video.write_video(folder / f"{caption}-{i}{suffix}", drawn(shown, i), fps=8)
    return folder


def score(capsys, *args):
    evaluate.main(["score", *map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)


def test_score(clips, capsys):
    """Scores are the reward's own, of frames that are fitted one by one; means are those of prompts."""
    files = sorted(clips.iterdir())
    found = score(capsys, *files, "--reward", "shapes-clip", "--reward", "shapes-viclip")
    assert [row["prompt"] for row in found["clips"]] == sorted(CAPTIONS * 3)
    scorers = shapes.rewards()
    for row in found["clips"]:
        clip = video.read_clip(row["clip"])[None]
        for name, kind in (("shapes-clip", "image"), ("shapes-viclip", "video")):
            frames = rewards.frames_for(scorers[kind], clip)
            assert row[name] == pytest.approx(scorers[kind](frames, [row["prompt"]]).item(), abs=1e-5)
        assert (row["shapes-viclip"] > 0.6) == ("-1." not in row["clip"])
    for name in ("shapes-clip", "shapes-viclip"):
        means = [sum(row[name] for row in found["clips"] if row["prompt"] == p) / 3 for p in CAPTIONS]
        assert tuple(found["means"][name].values()) == pytest.approx(stats.mean_interval(means))


def test_frames_are_fitted_as_the_reward_fits_them(tmp_path, capsys):
    """A wide clip of 20 frames, at twice the size: more frames than go through an image reward at once."""
    clip = world.render(grammar.understand(CAPTIONS[0]), random.Random(0), 20, 128)[..., 16:112, :]
    video.write_video(tmp_path / "a.png", clip, fps=8)
    names = ("--reward", "shapes-clip", "--reward", "shapes-viclip")
    found = score(capsys, tmp_path / "a", "--prompt", CAPTIONS[0], *names)
    for kind, name in (("image", "shapes-clip"), ("video", "shapes-viclip")):
        scorer = shapes.rewards()[kind]
        direct = scorer(rewards.frames_for(scorer, clip[None]), [CAPTIONS[0]]).item()
        assert found["clips"][0][name] == pytest.approx(direct, abs=1e-5)


def test_score_reads_folders_and_a_given_prompt(clips, capsys):
    one = clips / f"{CAPTIONS[0]}-0.mp4"
    found = score(capsys, one, "--prompt", CAPTIONS[1], "--reward", "shapes-clip")
    assert found["means"]["shapes-clip"] == dict(mean=found["clips"][0]["shapes-clip"], half=None)
    right = score(capsys, clips, "--reward", f"shapes-clip={shapes.WEIGHTS / 'clip.safetensors'}")
    assert len(right["clips"]) == 4, "clips in files; png frames are folders and are named one by one"
    assert found["clips"][0]["shapes-clip"] < right["clips"][0]["shapes-clip"]
    evaluate.main(["score", str(clips), "--reward", "shapes-clip"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| clip | prompt | shapes-clip |"
    assert lines[-1].startswith("| mean (95 %) | prompts: 2 | 0.") and " ± 0." in lines[-1]


def test_diversity(capsys, tmp_path):
    """Clips that are one clip have none; clips of two captions have more than those of one."""
    mixed = [drawn(CAPTIONS[i % 2], i) for i in range(3)]
    seeds = [drawn(CAPTIONS[0], i) for i in range(3)]
    sets = {"same": [drawn(CAPTIONS[0])] * 3, "seeds": seeds, "mixed": mixed}
    found = {}
    for name, shown in sets.items():
        for i, clip in enumerate(shown):
            video.write_video(tmp_path / name / f"{CAPTIONS[0]}-{i}.mp4", clip, fps=8)
        scored = score(capsys, tmp_path / name, "--reward", "shapes-viclip", "--diversity")
        found[name] = scored["diversity"]["shapes-viclip"]["mean"]
    assert abs(found["same"]) < 1e-5 < 1e-3 < found["seeds"] < found["mixed"]
    east, north, west = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    assert evaluate.distance([east, north, west]) == pytest.approx((1 + 2 + 1) / 3)


# ---- the toy's table ---------------------------------------------------------------------------------------

@pytest.fixture
def world_for_samples(monkeypatch):
    """The world's own clips in place of samples, no network loaded: {caption: clip} may spoil VCM's."""
    shown = {}

    def sampler(row, folder, device, climbs):
        def make(captions, seeds):
            spoiled = shown if row.name == "VCM 4" else {}
            return torch.stack([spoiled.get(caption, drawn(caption, f"other {seed}"))
                                for caption, seed in zip(captions, seeds)])
        return make

    monkeypatch.setattr(table, "sampler", sampler)
    return shown


def test_the_table_counts_right(world_for_samples, capsys, tmp_path):
    """With the world's own clips every row is all right; two spoiled ones count, also in the difference.
    It is compared with the rows above it."""
    for i in range(2):
        caption = shapes.Clips("train").caption(grammar.TABLE + i)
        world_for_samples[caption] = torch.zeros(3, 8, 64, 64, dtype=torch.uint8)
    config = evaluate.ShapesConfig(clips=60, rows="VCM 4,turbo 4", out=str(tmp_path / "t.json"))
    rows = {row["name"]: row for row in evaluate.shapes_table(config)}
    assert json.loads((tmp_path / "t.json").read_text())["rows"][1]["clips"][1]["split"] == "held-out"
    turbo, vcm = rows["T2V-Turbo 4"], rows["VCM 4"]
    assert turbo["all"] == turbo["one"] == turbo["two"] == 1 and turbo["quality"] > 0.98
    assert turbo["interval"] == stats.wilson(1, 60) and 14 < turbo["travel"] < 24 and turbo["variety"] > 0.8
    assert vcm["all"] == pytest.approx(58 / 60)

    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110 and "± 0.0" not in printed
    low, high = stats.paired_interval(2, 0, 60)
    assert f"T2V-Turbo 4 - VCM 4: +3.3 points right ({100 * low:+.1f} to {100 * high:+.1f}), " in printed


@pytest.mark.parametrize("row, options", [
    (table.Row("", 2, "vcm"), ["--method", "vcm", "--steps", "2"]),
    (table.Row("", 4, "turbo"), []),
    (table.Row("", 2), ["--method", "teacher", "--steps", "2"]),
    (table.Row("", 2, guidance=0.0), "--method teacher --steps 2 --guidance 0".split())])
def test_the_table_samples_what_the_commands_sample(tmp_path, row, options):
    """The real networks: a student's row and a teacher's give the clip that sample.py gives."""
    caption = shapes.Clips("train").caption(grammar.TABLE)
    clips = table.sampler(row, shapes.WEIGHTS, torch.device("cpu"), [])([caption], [7])
    sample.main([caption, "--as-typed", "--seed", "7", "--out", str(tmp_path / "a.png"), *options])
    assert torch.equal(clips[0], video.read_clip(tmp_path / "a.png"))


def test_rows_are_of_the_weights_in_a_folder(tmp_path):
    """Students by their files' or their folders' names, in the order asked for; passes count guidance."""
    (tmp_path / "mine").mkdir()
    for name, file in {"teacher": "teacher.safetensors", "turbo": "mine/turbo.safetensors"}.items():
        (tmp_path / file).symlink_to(shapes.WEIGHTS / f"{name}.safetensors")
    passes = {row.name: row.passes for row in table.chosen("mine 4,ddim", tmp_path)}
    assert [*passes.values()] == [4, 100, 16, 8, 4, 4] and "mine 4" in passes
    (tmp_path / "mine.safetensors").symlink_to(shapes.WEIGHTS / "vcm.safetensors")
    with pytest.raises(UserError, match="two students called mine; rename one"):
        table.chosen("", tmp_path)


def test_variety_of_the_world_and_of_one_clip():
    """The world's clips have the world's, clips that are all one have none, empty ones say nothing."""
    def of(choose):
        return table.variety(lambda captions, seeds: torch.stack([*map(choose, captions, seeds)]), 4, 48)

    assert of(lambda caption, seed: drawn(caption, 3)) == 0
    assert 0.85 < of(lambda caption, seed: drawn(caption, f"other {seed}")) < 1.15
    assert math.isnan(of(lambda caption, seed: torch.zeros(3, 8, 64, 64, dtype=torch.uint8)))


# ---- the command line --------------------------------------------------------------------------------------

MISTAKES = [                            # what is typed behind evaluate.py -> what the message says
    ("shape", "no command 'shape'; there are shapes, score, vbench"),
    ("shapes --rows nobody", "--rows 'nobody': no row has this in its name; there are DDIM 50, "),
    ("shapes --folder {empty}", "{empty} holds no students of the toy"),
    ("shapes --out {color1}", "--out {color1} exists, and was not made by this program"),
    ("score", "score takes clips and at least one --reward"),
    ("score {empty} --reward shapes-clip", "{empty}: expected a clip, or a folder of clips (.mp4, "),
    ("score nowhere.mp4 --reward shapes-clip", "nowhere.mp4: no such file or folder"),
    ("score {clips} --reward shapes-clip --reward shapes-clip", "give each reward once"),
    ("score {clips} --reward shapes-clip:2", "give each reward once, and without a :WEIGHT"),
    ("score {clips} --reward shapes-viclip --diversity", "--diversity compares clips of one prompt"),
    ("score {clips} --prompt x --reward shapes-clip --diversity", "--diversity compares clips of one prompt"),
    ("score {short} --reward shapes-viclip", "{short}"),
    ("score {cut} --reward shapes-clip", "-0.mp4: its name is a part of its prompt; give --prompt"),
    ("vbench", "vbench takes VBench's result files"),
    ("vbench nowhere.json", "nowhere.json: no such file"),
    ("vbench {empty}", "{empty}: no result files"),
    ("vbench {list}", "{list} is not a VBench result"),
    ("vbench {i2v}", "{i2v}: i2v_subject is 0.5; VBench writes shares, at most 1, of subject_consistency"),
    ("vbench {percent}", "{percent}: color is 93.5; VBench writes shares, at most 1"),
    ("vbench {true}", "{true}: color is True; VBench writes shares, at most 1"),
    ("vbench VideoCrafter2,~50~steps={color1}", "VideoCrafter2, 50 steps is a paper's row"),
    ("vbench m={color1} m={color2}", "color is 0.6, in another file of m 0.5; tell two models apart"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files with something wrong in them, by name."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("a-0", "b-0"):
        video.write_video(root / f"clips/{name}.mp4", torch.zeros(3, 8, 64, 64, dtype=torch.uint8), fps=8)
    video.write_video(root / "short.mp4", torch.zeros(3, 3, 64, 64, dtype=torch.uint8), fps=8)
    (root / "cut").mkdir()
    (root / "cut" / f"{sample.file_name('a red circle ' * 40)}-0.mp4").touch()
    (root / "empty").mkdir()
    contents = {"list": [], "i2v": {"i2v_subject": [0.5, []]}, "percent": {"color": [93.5, []]},
                "true": {"color": [True, []]}, "color1": {"color": [0.5, []]}, "color2": {"color": [0.6, []]}}
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return {path.stem: path for path in root.iterdir()}


@pytest.mark.parametrize("typed, message", MISTAKES)
def test_mistakes_end_in_one_line(typed, message, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    contents = {path: path.read_bytes() for path in places.values() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        evaluate.main([word.replace("~", " ").format(**places) for word in typed.split()])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message.format(**places) in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir()) and all(path.read_bytes() == old for path, old in contents.items())
