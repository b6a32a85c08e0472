"""A page to play with, in the browser. Its options are sample.py's but for those of lists and output.

    pip install -e ".[demo]" && python demo.py      # the toy, nothing downloaded
    python demo.py --model vc2 --reward hpsv2       # T2V-Turbo, and a reward that chooses among clips
"""
import tempfile
import time
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import sample
from model import to_clip
from plumbing import cli, video
from plumbing.errors import UserError

TOY = ["a red circle rising and a blue square falling on white", "a yellow ring moving left", "a ball"]
METHODS = [("T2V-Turbo", "turbo"), ("VCM, without rewards", "vcm"), ("the teacher", "teacher")]
ROWS, COLUMNS = 5, 8                    # of the strip: it shows about so many steps and frames


@lru_cache(maxsize=2)
def load(config: sample.Config, method: str, lora_scale: float | None) -> tuple:
    """A method's options, its networks and its rewards, where there are any; the last two stay in memory."""
    best_of = 1 if config.is_toy or config.reward else None
    own = dict(turbo=None, lora_scale=None) if method == "teacher" else dict(lora_scale=lora_scale)
    config = replace(config, prompt="any", method=method, best_of=best_of, **own)
    sample.check(config)
    models = sample.load_models(config)
    return config, models, sample.load_rewards(config, models)


def make(config: sample.Config, prompt: str, seed: int, best_of: int, method: str, steps: int,
         guidance: float, lora_scale: float) -> tuple[str, str, str]:
    """The files of a clip and of the strip with each step's ẑ0, and what there is to say of them."""
    config, models, terms = load(config, method, lora_scale)
    config = replace(config, steps=steps, guidance=guidance)
    sampling, reference = sample.sampling_of(models, config), sample.reference_of(models, config)
    caption = sample.caption_of(prompt, seed, config)
    folder, start = Path(tempfile.mkdtemp()), time.perf_counter()

    # the best of some takes, and what its steps answered
    takes = []
    for number in range(seed, seed + (best_of if terms else 1)):
        answers = []
        take, = sample.make([caption], [number], models, terms, sampling, config, reference,
                            lambda t, z0_hat, seen=answers: seen.append((t, z0_hat)))
        takes.append((take, answers))
    best, answers = max(takes, key=lambda pair: pair[0].scores["total"])
    which = f"seed {best.seed}" + f" (the best of {len(takes)})" * (len(takes) > 1)
    facts = [which, f"{sampling.steps} steps", f"{time.perf_counter() - start:.1f} s"]
    facts += [f"{term.name} {best.scores[term.name]:.3f}" for term in terms]

    # its clip, and a row of frames for each step; --refine tells no steps
    video.write_video(folder / "clip.mp4", best.clip, config.fps or models.fps)
    shown = answers[::-(len(answers) // ROWS or 1)][::-1]               # with the last, which is the clip
    stride = best.clip.shape[1] // COLUMNS or 1
    rows = [to_clip(models.vae, z0_hat[:, :, ::stride], 4)[0].cpu() for _, z0_hat in shown]
    sample.write_sheet(folder / "strip.png", rows or [best.clip[:, ::stride]])
    text = [caption, ", ".join(facts), f"rows below: from t = {[t for t, _ in shown]}"]
    return str(folder / "clip.mp4"), str(folder / "strip.png"), "\n".join(text)


def page(config: sample.Config):
    """The page, as gradio's Blocks; the networks are loaded first, so that mistakes are said at once."""
    import gradio as gr
    examples = TOY if config.is_toy else ["An astronaut riding a horse.", "Waves at sunset."]
    _, models, terms = load(config, config.method, config.lora_scale)
    has_lora = config.is_toy or "whole" not in models.header            # t2v_turbo_vc2.pt has none
    methods = [pair for pair in METHODS if pair[1] != "vcm" or config.is_toy or config.method == "vcm"]

    def sliders(method, lora):                              # with a method's own steps and guidance
        _, models, _ = load(config, method, lora)
        sampling, header = sample.sampling_of(models, config), models.header
        w_min, w_max = header.get("w_min", 0), header.get("w_max", 20)
        return (gr.Slider(1, sampling.grid, sampling.steps, step=1, label="Steps"),
                gr.Slider(w_min, w_max, sampling.guidance, step=0.5, label="Guidance"))

    def run(prompt, seed, best_of, method, steps, guidance, lora,
            progress=gr.Progress(track_tqdm=True)):         # noqa: B008 (where gradio looks for it)
        try:
            return make(config, prompt, seed or 0, best_of, method, steps, guidance, lora)
        except UserError as error:
            return None, None, str(error)

    with gr.Blocks(title="T2V-Turbo from scratch", analytics_enabled=False) as blocks:
        gr.Markdown("## T2V-Turbo from scratch: text to video in four steps")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(config.prompt or examples[0], label="Prompt")
                gr.Examples(examples, prompt)
                method = gr.Radio(methods, value=config.method, label="Method")
                with gr.Row():
                    steps, guidance = sliders(config.method, config.lora_scale)
                    lora = gr.Slider(0, 2, config.lora_scale, step=0.25, label="LoRA",
                                     visible=has_lora)
                    seed = gr.Number(config.seed, label="Seed", precision=0, minimum=0, maximum=2 ** 31)
                    best = gr.Slider(1, 16, config.best_of or 1, step=1, label="Best of", visible=bool(terms))
                button = gr.Button("Make a clip", variant="primary")
            with gr.Column():
                clip = gr.Video(label="Clip", autoplay=True, loop=True, height=360)
                notes = gr.Textbox(label="What was made", lines=4)
        gr.Markdown("The clip as it looks after each step (ẑ0): a row of frames each, the first step on top")
        strip = gr.Image(show_label=False, buttons=[], type="filepath", format="png")
        method.change(sliders, [method, lora], [steps, guidance], show_progress="hidden")
        inputs, outputs = [prompt, seed, best, method, steps, guidance, lora], [clip, strip, notes]
        gr.on([button.click, prompt.submit], run, inputs, outputs)
    return blocks


@cli.main
def main(argv=None):
    """Serves the page until Ctrl-C."""
    config = cli.parse(sample.Config, argv, __doc__, positional="prompt", defaults=dict(lora_scale=1.0))
    if not find_spec("gradio"):
        raise UserError('the page needs gradio: pip install -e ".[demo]"')
    page(replace(config, model=sample.model_of(config))).launch(show_error=True, footer_links=[])


if __name__ == "__main__":
    main()
