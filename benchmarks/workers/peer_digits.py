"""transfusion-pytorch on digits; runs in its own environment, asked by digits.py.

2.80M parameters: width 128, 4 layers, learnt axial positions; AdamW 1e-3 (0.9, 0.99), weight decay 0.01, warm-up of 100
steps, cosine to 0, clipping at 0.5. Its weights are evaluated as they are: its moving average (decay 0.99) scores worse.
Images are drawn one by one with `sample_one` (Euler), because its batched `sample_many` leaves the positions out and draws
noise; captions come from `sample_many`, because `sample_one` writes none after an image in the prompt.
"""

import functools
import json
import math
import sys
import time

import numpy as np
import torch
from common import serve, versions
from loguru import logger
from torchdiffeq import odeint
from transfusion_pytorch import Transfusion

logger.remove()
SETTING = json.loads(sys.argv[1])  # data, steps, batch, seed
DATA = np.load(SETTING["data"])
NAMES = [torch.tensor(list(name.encode())) for name in SETTING["names"]]
WARM_UP = 100
CAPTION_GROUP = 60


def to_patches(greys: np.ndarray) -> torch.Tensor:
    """[n, 64] in 0 .. 16 to [n, 4, 4, 4] in [-1, 1]: 2x2 pixels per patch."""
    cut = torch.tensor(greys / 8 - 1, dtype=torch.float32).reshape(-1, 4, 2, 4, 2)
    return cut.movedim(2, 3).reshape(-1, 4, 4, 4)


def to_greys(patches: torch.Tensor) -> np.ndarray:
    cut = patches.clamp(-1, 1).reshape(-1, 4, 4, 2, 2).movedim(3, 2)
    return (cut.reshape(-1, 64).numpy() + 1) * 8


torch.manual_seed(SETTING["seed"])
RANDOM = np.random.default_rng(SETTING["seed"])
PATCHES = to_patches(DATA["train"])
MODEL = Transfusion(
    num_text_tokens=256,
    dim_latent=4,
    modality_default_shape=(4, 4),
    modality_num_dim=2,
    add_pos_emb=True,
    transformer=dict(dim=128, depth=4, dim_head=64, heads=2),
).train()
OPTIMIZER = torch.optim.AdamW(MODEL.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
SCHEDULE = torch.optim.lr_scheduler.LambdaLR(
    OPTIMIZER, lambda t: min(1, (t + 1) / WARM_UP) * (1 + math.cos(math.pi * t / SETTING["steps"])) / 2
)


def train(steps: int) -> dict:
    """The next steps of the training; seconds for all of them."""
    wall, cpu, loss = time.perf_counter(), time.process_time(), torch.tensor(math.nan)
    for _ in range(steps):
        chosen = RANDOM.integers(0, len(PATCHES), SETTING["batch"])
        name_first = RANDOM.random(SETTING["batch"]) < 0.5
        batch = []
        for index, first in zip(chosen, name_first, strict=True):
            pair = [NAMES[DATA["train_labels"][index]], PATCHES[index]]
            batch.append(pair if first else pair[::-1])
        loss = MODEL(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(MODEL.parameters(), 0.5)
        OPTIMIZER.step()
        SCHEDULE.step()
        OPTIMIZER.zero_grad()
    loss = loss.item()
    return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "loss": loss}


def caption() -> dict:
    """Greedy captions of the held-out images."""
    MODEL.eval()
    torch.manual_seed(SETTING["seed"])
    images, captions = to_patches(DATA["held_out"]), []
    for start in range(0, len(images), CAPTION_GROUP):
        prompts = [(0, image) for image in images[start : start + CAPTION_GROUP]]
        for sample in MODEL.sample_many(prompts, max_length=8, text_temperature=0.0):
            tokens = sample[-1].tolist() if torch.is_tensor(sample[-1]) else []
            captions.append(bytes(t for t in tokens if t < 256).decode(errors="replace"))
    return {"captions": captions}


def draw(labels: list[int], evaluations: int, guidance: float, out: str) -> dict:
    """Digits of these classes, saved as greys [n, 64]."""
    MODEL.eval()
    torch.manual_seed(SETTING["seed"] + 1)
    MODEL.odeint_fn = functools.partial(odeint, method="euler")
    drawn = []
    for label in labels:
        sample = MODEL.sample_one(
            NAMES[label],
            force_modality_at_start=(0, (4, 4)),
            max_length=1,
            modality_steps=evaluations + 1,
            cfg_scale=guidance,
        )
        drawn += [part.tensor for part in sample if not torch.is_tensor(part)]
    np.save(out, to_greys(torch.stack(drawn)))
    return {}


def describe() -> dict:
    return {
        "versions": versions("torch", "transfusion-pytorch"),
        "parameters": sum(p.numel() for p in MODEL.parameters()),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    serve({"describe": describe, "train": train, "caption": caption, "draw": draw})
