"""demo.py: what its button makes, without gradio; and the page in a browser."""
import re
import shutil
import tempfile
from dataclasses import replace
from importlib.util import find_spec

import imageio.v3 as iio
import pytest
import torch

import demo
import sample
from plumbing import video
from plumbing.errors import UserError
from shapes import grammar

PROMPT = "a red circle rising and a blue square falling on white"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CONFIG = replace(sample.Config(), model="shapes", lora_scale=1.0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make(prompt=PROMPT, seed=0, best_of=1, method="turbo", steps=4, guidance=2.0, lora_scale=1.0):
    clip, strip, text = demo.make(CONFIG, prompt, seed, best_of, method, steps, guidance, lora_scale)
    return video.read_clip(clip), iio.imread(strip), text.split("\n")


def test_the_clip_is_that_of_sample_py(tmp_path):
    """With the values that the page starts from, and with others."""
    other = dict(seed=3, method="vcm", steps=2, guidance=1.0, lora_scale=0.5)
    for values, options in (({}, ""), (other,
                                       "--seed 3 --method vcm --steps 2 --guidance 1 --lora-scale .5")):
        clip, _, _ = make(**values)
        sample.main([PROMPT, *options.split(), "--out", str(tmp_path / "out.mp4")])
        assert torch.equal(clip, video.read_clip(tmp_path / "out.mp4"))


def test_the_strip_ends_with_the_clip():
    """A row of 8 frames, enlarged twice, for each jump; of the teacher's 12 steps for every second one."""
    clip, strip, text = make()
    assert text[0] == PROMPT and text[-1] == "rows below: from t = [999, 624, 499, 374]"
    assert strip.shape == (12 + 4 * (128 + 12), 24 + 8 * (128 + 4) - 4, 3)
    last = torch.from_numpy(strip[-140:-12:2, 12:140:2]).permute(2, 0, 1)       # the last row's first frame
    assert (last.float() - clip[:, 0]).abs().mean() < 4                         # what mp4 loses
    assert len(make(method="teacher", steps=12)[1]) == 12 + 6 * (128 + 12)


def test_rewards_choose():
    """The best of 3 is the one whose sum, with the papers' weights, is highest."""
    totals = {}
    for seed in range(3):
        image_fact, video_fact = make(seed=seed)[2][-2].split(", ")[3:]
        totals[f"seed {seed}"] = float(image_fact.split()[1]) + 2 * float(video_fact.split()[1])
    assert make(best_of=3)[2][-2].startswith(f"{max(totals, key=totals.get)} (the best of 3), ")


def test_words_are_filled_in_or_refused():
    assert make("a very fast ball")[2][0] == grammar.fill_in("a ball", 0)
    with pytest.raises(UserError, match="(?s)did you mean circle.*(\n.*){3}"):
        make("a red circel")
    with pytest.raises(UserError, match="comes without such a student"):
        demo.load(replace(CONFIG, model="vc2"), "vcm", 1.0)


@pytest.mark.skipif(not (CHROMIUM and find_spec("playwright")), reason="no Chromium, or no playwright")
@pytest.mark.skipif(not find_spec("gradio"), reason='no gradio (pip install -e ".[demo]")')
def test_the_page_in_a_browser():
    """On a phone: a clip that plays in a loop; the teacher's own steps; a word that the toy lacks."""
    from playwright.sync_api import expect, sync_playwright
    demo_page = demo.page(CONFIG)
    _, address, _ = demo_page.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(**tools.devices["iPhone 13"])
            page.goto(address)
            button, notes = page.get_by_role("button", name="Make a clip"), page.get_by_label("What was made")
            button.click()
            page.wait_for_function("document.querySelector('video')?.readyState > 1", timeout=60_000)
            assert page.evaluate("(video => video.loop && video.autoplay)(document.querySelector('video'))")
            expect(notes).to_have_value(re.compile("rows below"), timeout=60_000)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

            page.get_by_label("the teacher").check()
            expect(page.locator("input[type=number]").first).to_have_value("50")
            page.get_by_label("Prompt").fill("a red circle, dog")
            button.click()
            expect(notes).to_have_value(re.compile("^unknown word 'dog'"))
            browser.close()
    finally:
        demo_page.close()
