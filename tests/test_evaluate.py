"""evaluate.py: VBench's totals, the page that asks people and the count of what they said, scores, curves."""
import base64
import json
import math
import random
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import chrome
import pytest
import torch

import evaluate
import rewards
import sample
import shapes
from plumbing import judging, stats, vbench, video
from plumbing.weights import read_checkpoint, save_checkpoint
from shapes import grammar, table, world
from shapes.models import SAMPLING

# ---- VBench ------------------------------------------------------------------------------------------------

# v1 (arXiv 2405.18750), Tables 1, 2, 4, 5: every model whose dimensions are printed. Percent, in the tables'
# columns. Two lines a model: Total, Quality and its 7 dimensions; Semantic and its 9 dimensions.
PRINTED = """
CogVideo                     | 67.01 72.06 92.19 96.20 97.64 96.47 38.18 42.22 41.03
                             | 46.83 73.40 18.11 78.20 79.57 18.24 28.24 22.01 7.80 7.70
VideoCrafter0.9              | 73.02 74.91 86.24 92.88 97.60 91.79 44.41 89.72 57.22
                             | 65.46 87.34 25.93 93.00 78.84 36.74 43.36 21.57 25.42 25.21
ModelScopeT2V                | 75.75 78.05 89.87 95.29 98.28 95.79 52.06 66.39 58.57
                             | 66.54 82.25 38.98 92.40 81.72 33.68 39.26 23.39 25.37 25.67
Open-Sora                    | 75.91 78.82 92.09 97.39 98.41 95.61 57.76 48.61 61.51
                             | 64.28 74.98 33.64 85.00 78.15 43.95 37.33 21.58 25.46 26.18
LaVie                        | 77.08 78.78 91.41 97.47 98.30 96.38 54.94 49.72 61.90
                             | 70.31 91.82 33.32 96.80 86.39 34.09 52.69 23.56 25.93 26.41
LaVie-Interpolation          | 77.12 79.07 92.00 97.33 98.78 97.82 54.00 46.11 59.78
                             | 69.31 90.68 30.93 95.80 85.69 30.06 52.62 23.53 26.01 26.51
Show-1                       | 78.93 80.42 95.53 98.02 99.12 98.24 57.35 44.44 58.66
                             | 72.98 93.07 45.47 95.60 86.35 53.50 47.03 23.06 25.28 27.46
VideoCrafter1                | 79.72 81.59 95.10 98.04 98.93 95.67 62.67 55.00 65.46
                             | 72.22 78.18 45.66 91.60 93.32 58.86 43.75 24.41 25.54 26.76
Pika                         | 80.40 82.68 96.76 98.95 99.77 99.51 63.15 37.22 62.33
                             | 71.26 87.45 46.69 88.00 85.31 65.65 44.80 21.89 24.44 25.47
VideoCrafter2                | 80.44 82.20 96.85 98.22 98.41 97.73 63.13 42.50 67.22
                             | 73.42 92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 28.23
Gen-2                        | 80.58 82.47 97.61 97.61 99.56 99.58 66.96 18.89 67.42
                             | 73.03 90.92 55.47 89.20 89.49 66.91 48.91 19.34 24.12 26.17
VCM (MS)                     | 75.84 78.80 93.06 97.30 98.51 98.00 48.99 46.11 61.98
                             | 63.98 83.18 24.85 87.20 85.72 31.57 42.44 23.20 23.30 24.18
VCM (MS) + reward, 1st       | 77.28 78.76 93.24 97.67 98.49 97.27 51.70 55.00 56.40
                             | 71.35 91.14 45.64 94.60 86.97 39.74 48.55 22.90 25.91 26.81
VCM (MS) + reward, 2nd       | 79.51 81.81 97.64 99.59 98.46 95.83 64.69 38.33 68.86
                             | 70.32 91.30 56.10 94.80 76.45 46.04 47.56 21.30 23.47 25.98
T2V-Turbo (MS)               | 80.62 82.15 94.82 98.71 97.99 95.64 60.04 66.39 68.09
                             | 74.47 93.34 58.63 95.80 89.67 45.74 48.47 23.23 25.92 27.51
VCM (VC2)                    | 73.97 78.54 94.02 96.05 99.06 98.84 54.56 42.50 52.72
                             | 55.66 63.97 10.81 82.60 79.12 23.06 18.49 25.29 22.31 25.15
VCM (VC2) + reward, 1st      | 77.57 80.08 95.46 96.69 98.78 98.79 58.66 25.00 65.75
                             | 67.55 87.77 30.38 93.00 86.90 28.81 39.07 25.75 24.65 27.57
VCM (VC2) + reward, 2nd      | 80.42 82.59 96.52 97.31 97.50 97.29 63.08 47.50 72.91
                             | 71.70 93.13 46.20 95.00 84.12 37.78 51.34 23.65 24.62 27.75
T2V-Turbo (VC2)              | 81.01 82.57 96.28 97.02 97.48 97.34 63.04 49.17 72.49
                             | 74.76 93.96 54.65 95.20 89.90 38.67 55.58 24.42 25.51 28.16
T2V-Turbo (MS), InternVideo2 | 79.90 82.27 96.68 99.36 97.74 95.66 65.30 52.22 68.23
                             | 70.41 94.05 48.73 92.60 81.69 45.41 48.15 21.45 23.84 26.24
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
    compared = 0
    for name, row in vbench.published().items():
        if name.split(",")[0] in MODELS:
            totals, shares = MODELS[name.split(",")[0]]
            expected = [totals[t] / 100 for t in vbench.TOTALS] + list(shares.values())
            assert list(row.values()) == pytest.approx(expected, abs=1e-9)
            compared += 1
    assert compared == 6 and len(vbench.published()) == 10


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
    assert capsys.readouterr().out.splitlines() == [
        "| | Total | Quality | Semantic |", "|---|---|---|---|", "| vcm | 73.97 | 78.54 | 55.66 |",
        "| turbo | **81.00** | **82.56** | **74.77** |"]

    files = sorted(map(str, (tmp_path / "turbo").glob("*.json")))         # the prompts among them
    evaluate.main(["vbench", *files])
    assert "| turbo | 81.00 | 82.56 | 74.77 |" in capsys.readouterr().out
    evaluate.main(["vbench", "ours=" + ",".join(files), "--papers", "--table"])
    table = capsys.readouterr().out
    assert "| ours | 81.00 | 82.56 | 96.28 |" in table
    assert "| VCM (VC2), 4 steps (paper) | 55.66 | 63.97 |" in table
    assert "| T2V-Turbo-v2, 16 steps (paper) | **83.52** | **85.13** | - |" in table


def test_vbench_without_all_dimensions(tmp_path, capsys):
    write_results(tmp_path / "part", {d: TURBO[d] for d in (*vbench.QUALITY, "scene")})
    with pytest.raises(SystemExit):
        evaluate.main(["vbench", str(tmp_path / "part")])
    message = capsys.readouterr().err
    assert "part lacks object_class, multiple_objects, human_action, color, spatial_relationship, " in message
    assert "scene" not in message and "--partial" in message
    evaluate.main(["vbench", str(tmp_path / "part"), "--partial"])
    table = capsys.readouterr().out
    assert "| part | - | 82.56 | 96.28 |" in table and "| part | - | - | - | - | - | - | 55.58 |" in table


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


def test_kappas():
    """Cohen: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no is 0.4. Fleiss: 10 subjects by 14 raters is 0.210."""
    two = ["yy"] * 20 + ["yn"] * 5 + ["ny"] * 10 + ["nn"] * 15
    assert stats.raw_agreement(two) == pytest.approx(0.7) and stats.cohens_kappa(two) == pytest.approx(0.4)
    counts = ["0 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1",
              "7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2", "6 5 2 1 0", "0 2 2 3 7"]
    rows = ["".join(c * int(n) for c, n in zip("abcde", row.split())) for row in counts]
    shuffled = [random.Random(i).sample(row, 14) for i, row in enumerate(rows)]
    assert stats.fleiss_kappa(shuffled) == pytest.approx(0.210, abs=5e-4)
    assert stats.fleiss_kappa(["aa", "bbb"]) == stats.cohens_kappa(["aa", "bb", "aa"]) == 1
    assert math.isnan(stats.fleiss_kappa(["aa", "aa"])) and math.isnan(stats.cohens_kappa(["aa"]))

    # Judges who guess agree by chance, whatever their habits and however many of them saw an item.
    draw = random.Random(0)
    guesses = ["".join(draw.choices("ab", (3, 1), k=draw.randint(2, 5))) for _ in range(4000)]
    assert abs(stats.fleiss_kappa(guesses)) < 0.03
    assert abs(stats.cohens_kappa([draw.choice("ab") + draw.choice("aab") for _ in range(4000)])) < 0.03


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
    said = capsys.readouterr().out
    assert "4 pairs" in said and "without partner: 1 clips, e.g. alone-0.mp4" in said
    for pair in content["pairs"]:
        sides = ("vcm", "turbo") if pair["left"] == "A" else ("turbo", "vcm")
        files = [(folders / name / pair["pair"]).read_bytes() for name in sides]
        assert pair["clips"] == ["data:video/mp4;base64," + base64.b64encode(file).decode() for file in files]
    html = (tmp_path / "page.html").read_text()
    assert "http" not in html and "src=" not in html and "<b>bold" not in html

    assert make() == content and make("--seed", "1") != content
    sides = [pair["left"] for seed in range(40) for pair in make("--seed", str(seed))["pairs"]]
    assert 60 <= sides.count("A") <= 100                    # 160 fair coins
    parts = make("--pairs", "3", "--first", "0")["pairs"] + make("--pairs", "3", "--first", "3")["pairs"]
    names = [pair["pair"] for pair in parts]
    assert len(names) == 4 and set(names) == {pair["pair"] for pair in content["pairs"]}


def votes_file(path, judge, answers, names=("vcm", "turbo")):
    """A file of votes: answers {pair: three letters of A, B, = for no difference}."""
    say = {"A": "A", "B": "B", "=": "same"}
    votes = [dict(pair=pair, prompt=pair, left="A", answers=[say[c] for c in letters])
             for pair, letters in answers.items()]
    content = dict(page="x", names=names, judge=judge, pairs=4, questions=judging.QUESTIONS, votes=votes)
    path.write_text(json.dumps(content))
    return str(path)


def test_tally_counts(tmp_path, capsys):
    one = votes_file(tmp_path / "1.json", "ann", {"p": "BBA", "q": "B=A", "r": "ABA", "s": "B=A"})
    evaluate.main(["tally", one, one])                      # the same file twice is one judge
    table = capsys.readouterr().out.splitlines()
    low, high = stats.wilson(0.75, 4)
    assert table[0].startswith("| 4 pairs, judges: 1 | vcm | no difference | turbo |")
    interval = f"75.0 ({100 * low:.1f} to {100 * high:.1f})"
    assert table[2] == f"| {judging.QUESTIONS[0]} | 25.0 | 0.0 | 75.0 | {interval} |"
    assert "| 0.0 | 50.0 | 50.0 | 75.0 (" in table[3] and "| 100.0 | 0.0 | 0.0 | 0.0 (0.0 to" in table[4]
    assert len(table) == 5

    two = votes_file(tmp_path / "2.json", "ben", {"p": "BBA", "q": "A=A", "r": "ABA"})
    picture = tmp_path / "t.svg"
    evaluate.main(["tally", one, two, "--out", str(picture)])
    table = capsys.readouterr().out
    assert "| 4 pairs, judges: 2 |" in table
    assert "| 37.5 | 0.0 | 62.5 | 62.5 (" in table           # p for B, q half, r for A, s for B
    assert "agreement of 2 judges on 3 pairs | raw | Cohen's kappa" in table and "| 66.7 % | 0.40 |" in table
    labels = [text.text for text in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert {"vcm", "turbo", "no difference", "62", "38", *judging.QUESTIONS} <= set(labels)

    swapped = votes_file(tmp_path / "4.json", "ben", {"p": "AAB", "q": "B=B", "r": "BAB"}, ("turbo", "vcm"))
    evaluate.main(["tally", one, swapped])
    assert capsys.readouterr().out == table.rpartition("\n\n")[0] + "\n"

    few = votes_file(tmp_path / "5.json", "eve", {"s": "BBA"})
    evaluate.main(["tally", one, two, few])                 # three judges, none of whom share all pairs
    said = capsys.readouterr().out
    assert "| 4 pairs, judges: 3 |" in said and "of 3 judges on 4 pairs | raw | Fleiss' kappa" in said
    assert "| 75.0 % |" in said

    answers = {"p": "ABA", "q": "A=A", "r": "BBA"}
    three = votes_file(tmp_path / "3.json", "eve", answers, names=("vcm", "teacher"))
    evaluate.main(["tally", one, three])
    assert "| 3 pairs, judges: 1 | vcm | no difference | teacher |" in capsys.readouterr().out


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
        assert "vcm" not in text and "turbo" not in text

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
        files = wait_for(lambda: list(tmp_path.glob("votes-*-ann.json")))

        page.run("videos[1].src = 'data:video/mp4;base64,AAAA'")
        page.wait("document.querySelectorAll('figcaption')[1].textContent === 'this browser cannot play it'")
    votes = judging.read_votes(files)
    assert [vote.pair for vote in votes] == [pair["pair"] for pair in pairs[:2]]
    other = {"A": "B", "B": "A"}
    left = [pair["left"] for pair in pairs]
    assert votes[0].answers == (left[0], "same", left[0])
    assert votes[1].answers == (other[left[1]], "same", left[1])
    assert {vote.judge for vote in votes} == {"ann"} and votes[0].names == ("vcm", "turbo")


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


def test_score(clips, capsys, tmp_path):
    """Scores, in any batch, are the reward's own; means are those of prompts; the best clips are copied."""
    files = sorted(clips.iterdir())
    found = score(capsys, *files, "--reward", "shapes-clip", "--reward", "shapes-viclip:2",
                  "--best", tmp_path / "best")
    assert found["prompts"] == 2 and [row["prompt"] for row in found["clips"]] == sorted(CAPTIONS * 3)
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

    for caption in CAPTIONS:
        rows = [row for row in found["clips"] if row["prompt"] == caption]
        best = max(rows, key=lambda row: row["shapes-clip"] + 2 * row["shapes-viclip"])
        copy = tmp_path / "best" / Path(best["clip"]).name
        assert torch.equal(video.read_clip(copy), video.read_clip(best["clip"]))
    assert len(list((tmp_path / "best").iterdir())) == 2

    again = score(capsys, *files, "--reward", "shapes-clip", "--batch", 4)
    for one, other in zip(found["clips"], again["clips"], strict=True):
        assert one["shapes-clip"] == pytest.approx(other["shapes-clip"], abs=1e-5)


def test_score_reads_folders_and_a_given_prompt(clips, capsys):
    one = clips / f"{CAPTIONS[0]}-0.safetensors"
    found = score(capsys, one, "--prompt", CAPTIONS[1], "--reward", "shapes-clip")
    assert found["means"]["shapes-clip"] == dict(mean=found["clips"][0]["shapes-clip"], half=None)
    right = score(capsys, clips, "--reward", f"shapes-clip={shapes.WEIGHTS / 'clip.safetensors'}")
    assert len(right["clips"]) == 4, "clips in files; png frames are folders and are named one by one"
    assert found["clips"][0]["shapes-clip"] < right["clips"][0]["shapes-clip"]


def test_rewards_that_were_trained_on_are_marked(clips, capsys, tmp_path):
    header = {"version": 2, "rewards": ["shapes-clip"]}
    save_checkpoint(tmp_path / "turbo.safetensors", {"x": torch.zeros(1)}, header)
    evaluate.main(["score", str(clips), "--reward", "shapes-clip", "--reward", "shapes-viclip",
                   "--student", str(tmp_path / "turbo.safetensors")])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| clip | prompt | shapes-clip (trained on) | shapes-viclip |"
    assert table[-1].startswith("| mean of 4 clips (95 %) | 2 prompts | 0.") and " ± 0." in table[-1]


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
    rows = [dict(prompt=p) for p in "aaab"]
    assert evaluate.diversity(features, rows)["mean"] == pytest.approx((1 + 2 + 1) / 3)


# ---- the toy's table ---------------------------------------------------------------------------------------


@pytest.fixture
def world_for_samples(monkeypatch):
    """The world's own clips in place of samples, no network loaded: {caption: clip} may spoil some."""
    shown = {}

    def load(student, folder, device):
        return SimpleNamespace(vae=None, size=(8, 64, 64), sampling=SAMPLING["turbo"])

    def generate(models, captions, seeds, size, sampling):
        return [shown[caption] if caption in shown else drawn(caption, seed)
                for caption, seed in zip(captions, seeds)]

    monkeypatch.setattr(shapes, "load", load)
    monkeypatch.setattr(table, "generate", generate)
    monkeypatch.setattr(table, "to_clip", lambda vae, clips: torch.stack(clips))
    return shown


def test_rows_are_compared_clip_by_clip():
    def clip(seed, right, travel):
        return dict(caption="a", seed=seed, things=1 + seed, all=right, motion=right, quality=right / 4,
                    travel=travel)

    new, old = table.DIFFERENCES[0]
    rows = {new: [clip(0, 1, 20.0), clip(1, 1, None)], old: [clip(1, 0, None), clip(0, 1, 18.0)]}
    assert table.paired(rows) == [
        ["T2V-Turbo 4 - VCM 4", "2", "+50.0 ± 98.0", "+0.0", "+100.0", "+12.5 ± 24.5", "+2.0"]]


def test_students_of_one_recipe_are_averaged_clip_by_clip():
    """Two seeds of T2V-Turbo, one of them right in a clip, against one VCM, of which there is no mean."""
    def clips(*right):
        return [dict(caption="a", seed=i, things=1, all=x, motion=1, quality=x / 2, travel=None)
                for i, x in enumerate(right)]

    rows = {("T2V-Turbo", 4): clips(1, 0), ("T2V-Turbo seed 2", 4): clips(1, 1), ("VCM", 4): clips(0, 1),
            ("teacher DDIM", 50): clips(0, 1)}
    means = table.means_over_seeds(rows)
    assert means == {("T2V-Turbo, mean of seeds", 4): clips(1, 0.5)}
    printed = {cells[0]: cells[2] for cells in table.paired(rows)}
    mean, half = stats.mean_interval([1, -0.5])
    assert printed["T2V-Turbo, mean of seeds 4 - teacher DDIM 50"] == f"{100 * mean:+.1f} ± {100 * half:.1f}"
    assert "T2V-Turbo, mean of seeds 4 - VCM, mean of seeds 4" not in printed


def test_the_table_counts_right(world_for_samples, capsys, tmp_path):
    """With the world's own clips every row is all right; two spoiled ones count, also in the differences."""
    out = tmp_path / "t.json"
    config = evaluate.ShapesConfig(clips=8, diversity=0, rows="t2v-turbo 4", batch=3, out=str(out))
    rows = evaluate.shapes_table(config)
    assert rows[0]["all"] == rows[0]["train"] == rows[0]["held-out"] == 1
    assert rows[0]["quality"] > 0.98 and rows[0]["passes"] == 4 and rows[0]["clips"] == 8

    for i in range(2):
        caption = shapes.Clips("train").caption(grammar.TABLE + i)
        world_for_samples[caption] = torch.zeros(3, 8, 64, 64, dtype=torch.uint8)
    capsys.readouterr()
    rows = evaluate.shapes_table(replace(config, rows="VCM 4,turbo 4"))
    printed = capsys.readouterr().out
    by_name = {row["name"]: row for row in rows}
    assert by_name["T2V-Turbo"]["all"] == 1, "from the file, not measured again"
    assert [by_name["VCM"][key] for key in ("all", "train", "held-out")] == [6 / 8, 2 / 4, 1]
    mean, half = stats.mean_interval([1, 1, 0, 0, 0, 0, 0, 0])
    assert f"| T2V-Turbo 4 - VCM 4 | 8 | {100 * mean:+.1f} ± {100 * half:.1f} |" in printed
    assert "teacher DDIM 50" not in printed
    assert table.margin(stats.mean_interval([1])[1]) == ""              # one clip has no interval


def test_a_row_of_one_kind_of_caption(world_for_samples, tmp_path):
    """--things and --split leave out the other captions of the table, and share its file."""
    out = tmp_path / "t.json"
    config = evaluate.ShapesConfig(clips=40, diversity=0, rows="turbo 1", out=str(out))
    evaluate.shapes_table(config)
    every = json.loads(out.read_text())["rows"][0]["clips"]
    wanted = [(clip["split"], clip["seed"]) for clip in every
              if (clip["things"], clip["split"]) == (2, "train")]
    assert len(wanted) > 2

    [row] = evaluate.shapes_table(replace(config, things=2, split="train", clips=len(wanted) + 1))
    assert row["clips"] == len(wanted) + 1 and "two held-out" not in row and "one" not in row
    [more] = json.loads(out.read_text())["rows"][0]["clips"][len(every):]
    assert (more["things"], more["split"]) == (2, "train") and more["seed"] >= config.seed + len(every) // 2
    assert table.places_of(replace(config, things=2, split="train", clips=len(wanted))) == wanted


def test_rows_of_other_options_or_weights_are_not_printed_again(world_for_samples, tmp_path):
    for file in shapes.WEIGHTS.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    out = tmp_path / "t.json"
    config = evaluate.ShapesConfig(clips=2, diversity=0, rows="turbo 1", out=str(out), folder=str(tmp_path))
    evaluate.shapes_table(config)
    made = json.loads(out.read_text())["rows"]
    with pytest.raises(ValueError, match="holds rows made with --guidance 2.0, --seed 4000000000; give the"):
        evaluate.shapes_table(replace(config, guidance=3.0, seed=5))

    evaluate.shapes_table(config)
    assert json.loads(out.read_text())["rows"] == made
    tensors, header = read_checkpoint(tmp_path / "turbo.safetensors")
    (tmp_path / "turbo.safetensors").unlink()
    save_checkpoint(tmp_path / "turbo.safetensors", tensors, header | {"retrained": True})
    evaluate.shapes_table(config)
    assert json.loads(out.read_text())["rows"][0]["weights"] != made[0]["weights"]


def test_clips_of_a_row_are_kept(world_for_samples, tmp_path, monkeypatch):
    """A row that was interrupted goes on, a larger one takes over what there is, a smaller one reads it."""
    asked, generate = [], table.generate

    def interrupted(models, captions, seeds, size, sampling):
        asked.append(len(captions))
        if sum(asked) == 6:
            raise KeyboardInterrupt
        return generate(models, captions, seeds, size, sampling)

    monkeypatch.setattr(table, "generate", interrupted)
    out = tmp_path / "t.json"
    config = evaluate.ShapesConfig(clips=7, diversity=0, rows="turbo 1", batch=3, out=str(out))
    with pytest.raises(KeyboardInterrupt):
        evaluate.shapes_table(config)
    made = [evaluate.shapes_table(replace(config, clips=clips))[0] for clips in (7, 10, 4)]
    assert asked == [3, 3, 3, 1, 3] and [row["clips"] for row in made] == [7, 10, 4]

    seeds = {split: [] for split in ("train", "held-out")}
    for clip in json.loads(out.read_text())["rows"][0]["clips"]:
        seeds[clip["split"]].append(clip["seed"] - config.seed)
    assert {split: sorted(found) for split, found in seeds.items()} == dict.fromkeys(seeds, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("row, options", [
    (table.Row("", "vcm", "student", 2), ["--method", "vcm", "--steps", "2"]),
    (table.Row("", "turbo", "student", 4), []),
    (table.Row("", None, "ddim", 2), ["--method", "teacher", "--steps", "2"])])
def test_the_table_samples_what_the_commands_sample(tmp_path, row, options):
    """The real networks: a student's row and a teacher's give the clip that sample.py gives."""
    caption, models = shapes.Clips("train").caption(grammar.TABLE), shapes.load(row.student)
    z = table.generate(models, [caption], [7], models.size, row.sampling(2.0, 2.0, models))
    sample.main([caption, "--as-typed", "--seed", "7", "--out", str(tmp_path / "a.safetensors"), *options])
    assert torch.equal(table.to_clip(models.vae, z)[0], video.read_clip(tmp_path / "a.safetensors"))


def test_rows_at_the_toys_own_timesteps():
    """Those of four steps, but even ones and students of another grid."""
    models, own = shapes.load("turbo"), SAMPLING["turbo"].timesteps
    for row in table.ROWS:
        wanted = own if row.steps == 4 and "DDIM" not in row.name and not row.name.endswith("even") else ()
        assert row.sampling(2.0, 2.0, models).timesteps == wanted
    models.header["steps"] = 10
    assert table.Row("", "turbo", "student", 4).sampling(2.0, 2.0, models).timesteps == ()


def test_spread_of_the_world_and_of_one_clip():
    """The world's clips have the world's spread, clips that are all one have none, halved distances half."""
    spread = table.Spread(4)

    def of(choose):
        return spread.of(lambda captions, seeds: torch.stack([*map(choose, captions, seeds)]), 0)

    assert of(lambda caption, seed: drawn(caption, 3)) == 0
    spread.SEEDS = 64
    assert 0.9 < of(lambda caption, seed: drawn(caption, f"other {seed}")) < 1.1

    layouts = [dict(x=v, y=2 * v, size=v, speed=v, background=v) for v in range(8)]
    spread.world = [layouts] * len(spread.captions)
    half = [[{name: value / 2 for name, value in found.items()} for found in rows] for rows in spread.world]
    assert spread.share(half) == pytest.approx(0.5) and spread.share(spread.world) == pytest.approx(1)
    assert spread.share([[] for _ in spread.captions]) is None


def test_what_captions_leave_open():
    assert table.left_open("a red circle moving right") == ["x", "y", "size", "speed", "background"]
    assert table.left_open("a red circle at rest on white") == ["x", "y", "size"]
    found = table.layout(drawn("a blue square moving left on a gray background"))
    assert found["background"] == 110 and 14 / 64 - 0.02 < found["speed"] < 24 / 64 + 0.02
    assert table.layout(drawn("a red ring growing and a blue box growing")) is None
    assert table.layout(torch.zeros(3, 8, 64, 64, dtype=torch.uint8)) is None


# ---- curves ------------------------------------------------------------------------------------------------


def log_of(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(picture):
    return [element.text for element in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")]


def test_curves_are_drawn(tmp_path):
    """Names that XML does not like, values that are no numbers, half a last line; the same file each time."""
    rows = [dict(step=i, loss=1 / i, reward=math.nan if i == 7 else i) for i in range(1, 30)]
    one, two = log_of(tmp_path / "one" / "log.jsonl", rows), log_of(tmp_path / "two" / "log.jsonl", rows[:9])
    two.write_text(two.read_text() + '{"step": 10, "lo')
    command = ["curves", str(one), f"A&B <2>={two}", "--keys", "loss,reward"]
    command += ["--out", str(tmp_path / "c.svg")]
    evaluate.main(command)
    assert {"one", "A&B <2>", "loss", "reward", "step"} <= set(texts(tmp_path / "c.svg"))
    first = (tmp_path / "c.svg").read_bytes()
    evaluate.main(command)
    assert (tmp_path / "c.svg").read_bytes() == first

    for suffix, magic in ((".PNG", b"\x89PNG"), (".pdf", b"%PDF")):
        evaluate.main([*command[:-1], str(tmp_path / f"c{suffix}"), "--log-scale"])
        assert (tmp_path / f"c{suffix}").read_bytes().startswith(magic)


def test_running_mean():
    assert evaluate.running_mean([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2), (2, 3), (3, 6.5)]
    assert evaluate.running_mean([(1, 2.0), (2, 4.0)], 1) == [(1, 2), (2, 4)]


# ---- the command line --------------------------------------------------------------------------------------


def test_help_is_quick():
    """It imports no torch: that alone takes longer than the whole answer."""
    code = ("import sys, evaluate\ntry:\n    evaluate.main(['score', '--help'])\n"
            "finally:\n    print('torch' in sys.modules)")
    root = Path(__file__).parent.parent
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout
    assert "--diversity" in said and said.splitlines()[-1] == "False"
    evaluate.main([])
