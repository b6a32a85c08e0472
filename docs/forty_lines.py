"""T2V-Turbo in forty lines: distil the toy's 50-step teacher into a 4-step student, with two rewards."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import shapes
from model import to_clip
from plumbing.video import write_video
from solver import Schedule
from turbo import EMA, RewardTerm, Step, distill, generate, inject, reward_gradient, total_loss


def train(steps: int, lr: float = 1e-3):
    torch.manual_seed(0)
    models, schedule = shapes.load(guidance=True), Schedule(8)  # real: model.load("vc2", FILE, guidance=True)
    params = inject(models.unet, rank=7)                        # the student is its teacher, plus LoRA
    optimizer, ema = torch.optim.AdamW(params, lr, weight_decay=0), EMA(params)
    image, video = shapes.rewards().values()
    terms = [RewardTerm(image, 1.0, 4, name="image"), RewardTerm(video, 2.0, 4, video=True, name="video")]
    clips, uncond = shapes.Clips(), models.text([""])

    for n in range(steps):
        generator = torch.Generator().manual_seed(n)
        item = clips.get(n, generator)
        x, caption = item["clip"][None] / 127.5 - 1, [item["caption"]]

        z0, c = models.vae.encode(x), models.text(caption)
        step = Step.draw(z0, schedule, (0.5, 3.0), [generator])     # t, ω and ε
        loss, z0_hat = distill(models.unet, models.unet, ema, schedule, step, z0, c, uncond)
        g, scores = reward_gradient(z0_hat, caption, models.vae.decode, terms, [generator])
        optimizer.zero_grad()
        total_loss(loss, z0_hat, g).backward()                      # L_CD - β_img J_img - β_vid J_vid
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        ema.update()
        print(n, f"{loss.item():.4f}", {name: round(score.item(), 3) for name, score in scores.items()})
    return models


if __name__ == "__main__":
    models = train(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
    z = generate(models, ["a red circle moving right on black"], [0], (8, 64, 64), shapes.SAMPLING["turbo"])
    write_video("forty.mp4", to_clip(models.vae, z)[0], fps=8)
