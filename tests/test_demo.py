"""demo.py: what its button makes, without gradio; and the page in a browser."""
import tempfile
from dataclasses import replace
from importlib.util import find_spec

import chrome
import imageio.v3 as iio
import pytest
import torch

import demo
import sample
from plumbing import video
from plumbing.errors import UserError
from shapes import grammar

PROMPT = "a red circle rising and a blue square falling on white"
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


@pytest.mark.skipif(not chrome.PROGRAM, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.skipif(not find_spec("gradio"), reason='no gradio (pip install -e ".[demo]")')
def test_the_page_in_a_browser(tmp_path):
    """On a phone: a clip that plays in a loop; the teacher's own steps; a word that the toy lacks."""
    page, last_text = demo.page(CONFIG), "[...document.querySelectorAll('textarea')].at(-1).value"
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        with chrome.browser(tmp_path) as browser:
            browser.open(address)
            browser.wait("!!document.querySelector('button.primary')")
            browser.run("document.querySelector('button.primary').click()")
            browser.wait("document.querySelector('video')?.readyState > 1")
            assert browser.run("(video => video.loop && video.autoplay)(document.querySelector('video'))")
            browser.wait(f"{last_text}.includes('rows below') && document.images.length")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")

            browser.run("document.querySelectorAll('input[type=radio]')[2].click()")
            browser.wait("document.querySelector('input[type=number]').value === '50'")
            browser.run("document.querySelector('textarea').focus()")
            browser.call("Input.insertText", text=" dog")
            browser.run("document.querySelector('button.primary').click()")
            browser.wait(f"{last_text}.startsWith('unknown word')")
    finally:
        page.close()
