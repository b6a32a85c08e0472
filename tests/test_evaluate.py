"""evaluate.py: VBench's totals, the page that asks people, the count of their votes, scores, the table."""
import base64
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import chrome
import pytest
import torch

import evaluate
import rewards
import sample
import shapes
from plumbing import judging, stats, vbench, video
from shapes import grammar, table, world
from shapes.models import SAMPLING

# ---- VBench ------------------------------------------------------------------------------------------------

# v1 (arXiv 2405.18750), Tables 1, 2, 4, 5: models whose dimensions are printed. Percent, in the tables'
# columns. Two lines a model: Total, Quality and its 7 dimensions; Semantic and its 9 dimensions.
PRINTED = """
ModelScopeT2V                | 75.75 78.05 89.87 95.29 98.28 95.79 52.06 66.39 58.57
                             | 66.54 82.25 38.98 92.40 81.72 33.68 39.26 23.39 25.37 25.67
Pika                         | 80.40 82.68 96.76 98.95 99.77 99.51 63.15 37.22 62.33
                             | 71.26 87.45 46.69 88.00 85.31 65.65 44.80 21.89 24.44 25.47
VideoCrafter2                | 80.44 82.20 96.85 98.22 98.41 97.73 63.13 42.50 67.22
                             | 73.42 92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 28.23
VCM (MS)                     | 75.84 78.80 93.06 97.30 98.51 98.00 48.99 46.11 61.98
                             | 63.98 83.18 24.85 87.20 85.72 31.57 42.44 23.20 23.30 24.18
T2V-Turbo (MS)               | 80.62 82.15 94.82 98.71 97.99 95.64 60.04 66.39 68.09
                             | 74.47 93.34 58.63 95.80 89.67 45.74 48.47 23.23 25.92 27.51
VCM (VC2)                    | 73.97 78.54 94.02 96.05 99.06 98.84 54.56 42.50 52.72
                             | 55.66 63.97 10.81 82.60 79.12 23.06 18.49 25.29 22.31 25.15
T2V-Turbo (VC2)              | 81.01 82.57 96.28 97.02 97.48 97.34 63.04 49.17 72.49
                             | 74.76 93.96 54.65 95.20 89.90 38.67 55.58 24.42 25.51 28.16
T2V-Turbo (VC2), ViCLIP      | 80.92 82.77 96.93 97.47 98.03 97.48 63.38 43.61 72.94
                             | 73.52 94.05 50.52 94.40 89.85 36.77 54.17 23.81 25.34 28.11
""".strip()


def printed_models():
    """{model: ({total: percent}, {dimension: share})} of the text above."""
    models, lines = {}, PRINTED.splitlines()
    for upper, lower in zip(lines[::2], lines[1::2]):
        name, figures = upper.split("|")
        total, quality, *first = map(float, figures.split())
        semantic, *second = map(float, lower.split("|")[1].split())
        shares = {d: percent / 100 for d, percent in zip(vbench.DIMENSIONS, first + second, strict=True)}
        models[name.strip()] = dict(Total=total, Quality=quality, Semantic=semantic), shares
    return models


MODELS = printed_models()
VCM, TURBO = (MODELS[name][1] for name in ("VCM (VC2)", "T2V-Turbo (VC2)"))


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_totals_follow_from_their_dimensions(name):
    totals, shares = MODELS[name]
    row = vbench.with_totals(shares)
    for column, value in totals.items():
        assert abs(100 * row[column] - value) <= 0.01, column


def test_published_rows_are_the_printed_ones():
    rows = {name.split(",")[0]: row for name, row in vbench.published().items()}
    for name in MODELS.keys() & rows.keys():
        totals, shares = MODELS[name]
        expected = [totals[t] / 100 for t in vbench.TOTALS] + list(shares.values())
        assert list(rows[name].values()) == pytest.approx(expected, abs=1e-9)
    assert len(MODELS.keys() & rows.keys()) == 6
    assert rows["NoisEasier (VC2)"] == pytest.approx(dict(
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
    evaluate.main(["vbench", str(tmp_path / "vcm"), str(tmp_path / "turbo")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["|  | Total | Quality | Semantic |", "| --- | --- | --- | --- |",
                         "| vcm | 73.97 | 78.54 | 55.66 |", "| turbo | 81.00 | 82.56 | 74.77 |"]
    assert lines[8] == "| turbo | 96.28 | 97.02 | 97.48 | 97.34 | 63.04 | 49.17 | 72.49 |"

    files = sorted(map(str, (tmp_path / "turbo").glob("*_eval_results.json")))
    evaluate.main(["vbench", *files])
    assert "| turbo | 81.00 | 82.56 | 74.77 |" in capsys.readouterr().out
    evaluate.main(["vbench", *("ours=" + file for file in files), "--papers"])
    printed = capsys.readouterr().out
    assert "| ours | 81.00 | 82.56 | 74.77 |" in printed
    assert "| T2V-Turbo-v2, 8 steps (paper) | 83.05 | - | - |" in printed


def test_vbench_without_all_dimensions(tmp_path, capsys):
    write_results(tmp_path / "part", {d: TURBO[d] for d in (*vbench.QUALITY, "scene")})
    evaluate.main(["vbench", str(tmp_path / "part")])
    printed = capsys.readouterr().out
    assert "| part | - | 82.56 | - |" in printed and "| part | - | - | - | - | - | 55.58 |" in printed
    assert printed.splitlines()[-1].startswith("no Total of part, which lacks object_class, multiple_obj")


# ---- intervals and agreement -------------------------------------------------------------------------------


def test_wilson_intervals():
    """Closed forms at the ends, and a value that tables print."""
    z2 = stats.Z95 ** 2
    assert stats.wilson(0, 20) == pytest.approx((0, z2 / (20 + z2)), abs=1e-12)
    assert stats.wilson(1, 20) == pytest.approx((20 / (20 + z2), 1))
    assert stats.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = stats.wilson(0.3, 50)                       # where |p - 0.3| is 1.96 deviations of p
    for p in (low, high):
        assert abs(p - 0.3) == pytest.approx(stats.Z95 * math.sqrt(p * (1 - p) / 50))


def test_mean_interval_covers():
    draw = random.Random(0)
    inside = 0
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


def test_raw_agreement():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no agree in 0.7; of four judges 3 : 1, three pairs in six."""
    assert stats.raw_agreement(["yy"] * 20 + ["yn"] * 5 + ["ny"] * 10 + ["nn"] * 15) == pytest.approx(0.7)
    assert stats.raw_agreement(["yyyn", "yy"]) == pytest.approx(0.75)


# ---- compare and tally -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of four clips of the same names, one with what HTML does not like; one clip is alone."""
    root = tmp_path_factory.mktemp("clips")
    prompts = ["a red ring", "a blue box", "<script> & \"quoted\" <b>bold", "a long prompt"]
    for name, level in (("vcm", 60), ("turbo", 190)):
        for prompt in prompts:
            clip = torch.full((3, 8, 32, 48), level, dtype=torch.uint8)
            video.write_video(root / name / f"{prompt}-0.mp4", clip, fps=16)
    video.write_video(root / "vcm" / "alone-0.mp4", torch.zeros(3, 8, 32, 48, dtype=torch.uint8), fps=16)
    return root


def content_of(page):
    """What the page embeds."""
    return json.loads(re.search(r'id="content">(.*?)</script>', page.read_text(), re.S)[1])


def test_a_page_holds_its_clips_and_hides_their_origin(folders, tmp_path, capsys):
    def make(*options):
        page = tmp_path / "page.html"
        evaluate.main(["compare", str(folders / "vcm"), str(folders / "turbo"), "--out", str(page), *options])
        return content_of(page)

    content = make()
    printed = capsys.readouterr().out
    assert "4 pairs" in printed and "without partner: 1 clips, e.g. alone-0.mp4" in printed
    for pair in content["pairs"]:
        sides = ("vcm", "turbo") if pair["left"] == "A" else ("turbo", "vcm")
        files = [(folders / name / pair["pair"]).read_bytes() for name in sides]
        assert pair["clips"] == ["data:video/mp4;base64," + base64.b64encode(file).decode() for file in files]
    html = (tmp_path / "page.html").read_text()
    assert "http" not in html and "src=" not in html and "<b>bold" not in html

    assert make() == content
    assert sorted(pair["left"] for pair in content["pairs"]) == [*"AABB"]
    pairs = make("--pairs", "3")["pairs"] + content_of(tmp_path / "page-2.html")["pairs"]
    assert [pair["pair"] for pair in pairs] == [pair["pair"] for pair in content["pairs"]]


def votes_file(path, judge, answers, names=("vcm", "turbo")):
    """A file of votes: answers {pair: three letters of A, B, = for no difference}."""
    say = {"A": "A", "B": "B", "=": "same"}
    votes = [dict(pair=pair, prompt=pair, left="A", answers=[say[c] for c in letters])
             for pair, letters in answers.items()]
    content = dict(page="x", names=names, judge=judge, pairs=4, questions=judging.QUESTIONS, votes=votes)
    path.write_text(json.dumps(content))
    return str(path)


def test_tally_counts(tmp_path, capsys):
    def tally(*files):
        evaluate.main(["tally", *files])
        return capsys.readouterr().out.splitlines()

    one = votes_file(tmp_path / "1.json", "ann", {"p": "BBA", "q": "B=A", "r": "ABA", "s": "B=A"})
    lines = tally(one, one)                                 # the same file twice is one judge
    low, high = stats.wilson(0.75, 4)
    assert lines[0].startswith("| 4 pairs, judges: 1 | vcm | no difference | turbo |")
    interval = f"75.0 ({100 * low:.1f} to {100 * high:.1f})"
    assert lines[2] == f"| {judging.QUESTIONS[0]} | 25.0 | 0.0 | 75.0 | {interval} | - |"
    assert "| 0.0 | 50.0 | 50.0 | 75.0 (" in lines[3] and "| 100.0 | 0.0 | 0.0 | 0.0 (0.0 to" in lines[4]
    assert len(lines) == 5

    two = votes_file(tmp_path / "2.json", "ben", {"p": "BBA", "q": "A=A", "r": "ABA"})
    both = tally(one, two)
    assert "| 4 pairs, judges: 2 |" in both[0]
    assert "| 37.5 | 0.0 | 62.5 | 62.5 (" in both[2]        # p for B, q half, r for A, s for B
    assert both[2].endswith("| 66.7 % of 3 |")
    swapped = votes_file(tmp_path / "4.json", "ben", {"p": "AAB", "q": "B=B", "r": "BAB"}, ("turbo", "vcm"))
    assert tally(one, swapped) == both

    answers = {"p": "ABA", "q": "A=A", "r": "BBA"}
    three = votes_file(tmp_path / "3.json", "eve", answers, names=("vcm", "teacher"))
    assert "| 3 pairs, judges: 1 | vcm | no difference | teacher |" in "\n".join(tally(one, three))


@pytest.mark.skipif(not chrome.PROGRAM, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_page_in_a_browser(folders, tmp_path):
    """Answers, reloads, goes on with a finger, takes back, and saves a file that `tally` reads."""
    path = tmp_path / "page.html"
    evaluate.main(["compare", str(folders / "vcm"), str(folders / "turbo"), "--out", str(path)])
    pairs = content_of(path)["pairs"]
    with chrome.browser(tmp_path) as page:
        page.look(1280, 800)
        page.open(path)
        assert page.run("document.getElementById('prompt').textContent") == pairs[0]["prompt"]
        text = page.run("document.body.innerText")
        assert "vcm" not in text and "turbo" not in text and "4 pairs of videos, about 2 min" in text

        plays_in_step(page)
        answers_by_keys(page)

        # A reload goes on where it was, on a phone too.
        page.look(390, 844, dark=True, phone=True)
        page.open(path)
        assert page.run("[shown, answersOf(0)]") == [1, ["left", "same", "left"]]
        assert page.run("answersOf(1)") == ["right", None, None]
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.run("judge.focus(); judge.value = 'ann'; judge.dispatchEvent(new Event('input'))")
        page.tap("fieldset:nth-of-type(2) [data-choice=same]")
        page.tap("fieldset:nth-of-type(3) [data-choice=right]")
        page.wait("shown === 2")
        page.tap("#undo")
        page.tap("fieldset:nth-of-type(3) [data-choice=left]")
        page.wait("shown === 2")
        page.tap("figure:nth-of-type(2) video")             # tapping a clip answers the current question
        assert page.run("answersOf(2)") == ["right", None, None]

        # Two pairs are finished; the third is left out of the file.
        page.tap("#save")
        page.wait("saved === state.log.length")
        assert page.run("document.getElementById('status').textContent").startswith("saved 2 of 4 pairs as ")
        files = wait_for(lambda: list(tmp_path.glob("votes-*-ann.json")))

        page.run("videos[1].src = 'data:video/mp4;base64,AAAA'")
        page.wait("document.querySelectorAll('figcaption')[1].textContent === 'this browser cannot play it'")
    (names, votes), = judging.read_votes(files).items()
    assert names == ("vcm", "turbo") and [*votes] == [pair["pair"] for pair in pairs[:2]]
    other = {"A": "B", "B": "A"}
    left = [pair["left"] for pair in pairs]
    answers = [left[0], "same", left[0]], [other[left[1]], "same", left[1]]
    assert [*votes.values()] == [{"ann": answers[0]}, {"ann": answers[1]}]


def answers_by_keys(page):
    """The next pair comes after the third answer."""
    for key in ("ArrowLeft", "ArrowRight"):
        page.press(key)
    assert page.run("answersOf(0)") == ["left", "right", None]
    page.press("Backspace")
    page.press("ArrowDown")
    page.press("ArrowLeft")
    page.wait("shown === 1")
    page.press("ArrowRight")


def plays_in_step(page):
    """Both clips play together, and again from the start."""
    page.wait("videos.every(v => v.readyState === 4 && v.currentTime > 0.1)")
    page.run("window.starts = 0; videos[0].addEventListener('seeked', () => starts++)")
    page.wait("starts >= 2")
    times = [page.run("videos.map(v => v.currentTime)") for _ in range(11)]
    assert sorted(abs(left - right) for left, right in times)[5] < 0.07


def wait_for(find):
    """What `find` returns once it is not empty."""
    end = time.monotonic() + 30
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


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
        for i, (shown, suffix) in enumerate([(caption, ".safetensors"), (other, ".mp4"), (caption, "")]):
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
    video.write_video(tmp_path / "a.safetensors", clip, fps=8)
    names = ("--reward", "shapes-clip", "--reward", "shapes-viclip")
    found = score(capsys, tmp_path, "--prompt", CAPTIONS[0], *names)
    for kind, name in (("image", "shapes-clip"), ("video", "shapes-viclip")):
        scorer = shapes.rewards()[kind]
        direct = scorer(rewards.frames_for(scorer, clip[None]), [CAPTIONS[0]]).item()
        assert found["clips"][0][name] == pytest.approx(direct, abs=1e-5)


def test_score_reads_folders_and_a_given_prompt(clips, capsys):
    one = clips / f"{CAPTIONS[0]}-0.safetensors"
    found = score(capsys, one, "--prompt", CAPTIONS[1], "--reward", "shapes-clip")
    assert found["means"]["shapes-clip"] == dict(mean=found["clips"][0]["shapes-clip"], half=None)
    right = score(capsys, clips, "--reward", f"shapes-clip={shapes.WEIGHTS / 'clip.safetensors'}")
    assert len(right["clips"]) == 4, "clips in files; png frames are folders and are named one by one"
    assert found["clips"][0]["shapes-clip"] < right["clips"][0]["shapes-clip"]
    evaluate.main(["score", str(clips), "--reward", "shapes-clip"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| clip | prompt | shapes-clip |"
    assert lines[-1].startswith("| mean of 4 clips (95 %) | 2 prompts | 0.") and " ± 0." in lines[-1]


def test_diversity(capsys, tmp_path):
    """Clips that are one clip have none; clips of two captions have more than those of one."""
    mixed = [drawn(CAPTIONS[i % 2], i) for i in range(3)]
    seeds = [drawn(CAPTIONS[0], i) for i in range(3)]
    sets = {"same": [drawn(CAPTIONS[0])] * 3, "seeds": seeds, "mixed": mixed}
    found = {}
    for name, shown in sets.items():
        for i, clip in enumerate(shown):
            video.write_video(tmp_path / name / f"{CAPTIONS[0]}-{i}.safetensors", clip, fps=8)
        scored = score(capsys, tmp_path / name, "--reward", "shapes-viclip", "--diversity")
        found[name] = scored["diversity"]["shapes-viclip"]["mean"]
    assert abs(found["same"]) < 1e-5 < 1e-3 < found["seeds"] < found["mixed"]


def test_mean_distance_by_hand():
    features = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0.6, 0.8]])
    assert evaluate.diversity([*"aaab"], features)["mean"] == pytest.approx((1 + 2 + 1) / 3)


# ---- the toy's table ---------------------------------------------------------------------------------------


@pytest.fixture
def world_for_samples(monkeypatch):
    """The world's own clips in place of samples, no network loaded: {caption: clip} may spoil VCM's."""
    shown = {}

    def sampler(row, folder, device, scorers):
        def sample(captions, seeds):
            spoiled = shown if row.name == "VCM 4" else {}
            return torch.stack([spoiled.get(caption, drawn(caption, f"other {seed}"))
                                for caption, seed in zip(captions, seeds)])
        return sample

    monkeypatch.setattr(table, "sampler", sampler)
    return shown


def test_the_table_counts_right(world_for_samples, capsys, tmp_path):
    """With the world's own clips every row is all right; two spoiled ones count, also in the difference.
    The table fits 80 columns."""
    for i in range(2):
        caption = shapes.Clips("train").caption(grammar.TABLE + i)
        world_for_samples[caption] = torch.zeros(3, 8, 64, 64, dtype=torch.uint8)
    config = evaluate.ShapesConfig(clips=60, rows="VCM 4,turbo 4,without", out=str(tmp_path / "t.json"))
    rows = {row["name"]: row for row in evaluate.shapes_table(config)}
    assert json.loads((tmp_path / "t.json").read_text())["rows"][1]["clips"][1]["split"] == "held-out"
    assert [rows[name]["passes"] for name in ("DDIM without ω 4", "VCM 4", "T2V-Turbo 4")] == [4, 4, 4]
    turbo, vcm = rows["T2V-Turbo 4"], rows["VCM 4"]
    assert turbo["all"] == turbo["one"] == turbo["two"] == 1 and turbo["quality"] > 0.98
    assert turbo["interval"] == stats.wilson(1, 60) and 14 < turbo["travel"] < 24 and turbo["variety"] > 0.8
    assert [vcm[key] for key in ("all", "train", "held-out")] == pytest.approx([58 / 60, 28 / 30, 1])

    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110 and "± 0.0" not in printed
    assert all(len(line) <= 80 for line in printed.splitlines()[:4])
    low, high = stats.paired_interval(2, 0, 60)
    assert f"T2V-Turbo 4 - VCM 4: +3.3 points right ({100 * low:+.1f} to {100 * high:+.1f}), " in printed


@pytest.mark.parametrize("row, options", [
    (table.Row("", 2, "vcm"), ["--method", "vcm", "--steps", "2"]),
    (table.Row("", 4, "turbo"), []),
    (table.Row("", 2, method="ddim"), ["--method", "teacher", "--steps", "2"]),
    (table.Row("", 2, method="ddim", guidance=0.0), "--method teacher --steps 2 --guidance 0".split())])
def test_the_table_samples_what_the_commands_sample(tmp_path, monkeypatch, row, options):
    """The real networks: a student's row and a teacher's give the clip that sample.py gives."""
    monkeypatch.setattr(table, "usual_dtype", lambda device: "float32")
    caption = shapes.Clips("train").caption(grammar.TABLE)
    clips = table.sampler(row, shapes.WEIGHTS, torch.device("cpu"), shapes.rewards())([caption], [7])
    sample.main([caption, "--as-typed", "--seed", "7", "--out", str(tmp_path / "a.safetensors"), *options])
    assert torch.equal(clips[0], video.read_clip(tmp_path / "a.safetensors"))


def test_rows_at_the_toys_own_timesteps():
    """Those of four steps, but of DDIM; and passes count guidance."""
    models = shapes.load("turbo")
    for row in table.ROWS:
        own = SAMPLING["turbo"].timesteps if row.steps == 4 and row.method != "ddim" else ()
        assert row.sampling(models).timesteps == own and row.sampling(models).steps == row.steps
    passes = {row.name: row.passes for row in table.ROWS}
    assert (passes["DDIM 50"], passes["DDIM without ω 4"], passes["teacher jumps 4"]) == (100, 4, 8)


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
    ("shapes --rows nobody", "--rows 'nobody': no row has this in its name; there are DDIM, "),
    ("shapes --folder {empty}", "{empty}/clip.safetensors: no such file"),
    ("shapes --out table.csv", "--out table.csv: the table is stored as .json"),
    ("shapes --out {color1}", "--out {color1} exists, and no such command wrote it"),
    ("score", "score takes clips and at least one --reward"),
    ("score {empty} --reward shapes-clip", "{empty}: no clips (.mp4, .gif, .safetensors, ...) and no png"),
    ("score {clips} --reward shapes-clip --reward shapes-clip", "give each reward once"),
    ("score {clips} --reward shapes-clip --diversity", "--diversity compares clips of one prompt"),
    ("score {clips} --prompt x --reward shapes-clip --diversity", "--diversity compares features"),
    ("score {short} --reward shapes-viclip", "{short}"),
    ("vbench", "vbench takes VBench's result files"),
    ("vbench nowhere.json", "nowhere.json: no such file or folder"),
    ("vbench {empty}", "{empty}: no result files"),
    ("vbench {list}", "{list} is not a VBench result"),
    ("vbench {i2v}", "{i2v}: unknown dimension 'i2v_subject'; VBench has subject_consistency"),
    ("vbench {percent}", "{percent}: color is 93.5; VBench writes shares, at most 1"),
    ("vbench {true}", "{true}: color is True; VBench writes shares, at most 1"),
    ("vbench m={color1} m={color2}", "color is 0.6, in another file of m 0.5; tell two models apart"),
    ("vbench VideoCrafter2,~50~steps={color1}", "VideoCrafter2, 50 steps is a paper's row"),
    ("compare {clips}", "compare takes two folders of clips, not 1"),
    ("compare {clips} {clips}", "both folders are called clips; tell the models apart with NAME=FOLDER"),
    ("compare {clips} {other}", "have no .mp4 clip of one name"),
    ("compare {clips} {damaged}", "a-0.mp4: not an mp4, or a damaged one, in {clips} or {damaged}"),
    ("compare a={clips} b={clips} --out {foreign}", "--out {foreign} exists, and no such command wrote it"),
    ("tally", "tally takes files of votes"),
    ("tally {unvoted}", "{unvoted}: no votes in it"),
    ("tally {misvoted}", "{misvoted} is not a file of votes"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files with something wrong in them, by name."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("clips/a-0.mp4", "clips/b-0.mp4", "other/c-0.mp4"):
        video.write_video(root / name, torch.zeros(3, 8, 64, 64, dtype=torch.uint8), fps=8)
    video.write_video(root / "short.safetensors", torch.zeros(3, 3, 64, 64, dtype=torch.uint8), fps=8)
    for name in ("empty", "damaged"):
        (root / name).mkdir()
    (root / "damaged" / "a-0.mp4").write_bytes(bytes(100))
    (root / "file").write_text("")
    (root / "foreign.html").write_text("<p>mine")
    votes = dict(names=["A", "B"], judge="ann", votes=[])
    contents = {"list": [], "i2v": {"i2v_subject": [0.5, []]}, "percent": {"color": [93.5, []]},
                "true": {"color": [True, []]},
                "color1": {"color": [0.5, []]}, "color2": {"color": [0.6, []]}, "unvoted": votes,
                "misvoted": votes | dict(votes=[dict(pair="a", answers=["A", "left", "B"])])}
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


def test_help_is_quick():
    """It imports no torch: that alone takes longer than the whole answer."""
    code = ("import sys, evaluate\ntry:\n    evaluate.main(['score', '--help'])\n"
            "finally:\n    print('torch' in sys.modules)")
    root = Path(__file__).parent.parent
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout
    assert "--diversity" in said and said.splitlines()[-1] == "False"
    evaluate.main([])
