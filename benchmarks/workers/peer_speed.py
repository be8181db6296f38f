"""transfusion-pytorch under the stopwatch; runs in its own environment, asked by vs_transfusion_pytorch.py.

The tasks and sizes are those of mmdiff_speed.py. Where the library offers several public ways to the same result, all
are timed once and the fastest is used.
"""

import functools
import json
import sys

import torch
from common import clocked, serve, timing_handlers, versions
from loguru import logger
from torchdiffeq import odeint
from transfusion_pytorch import Transfusion

logger.remove()
SIZES = json.loads(sys.argv[1])
SIDE = SIZES["image_side"] // SIZES["patch"]
VALUES = 3 * SIZES["patch"] ** 2
BATCHES = 4


def build(euler: bool = True) -> Transfusion:
    torch.manual_seed(SIZES["seed"])
    model = Transfusion(
        num_text_tokens=256,
        dim_latent=VALUES,
        modality_default_shape=(SIDE, SIDE),
        modality_num_dim=2,
        add_pos_emb=True,
        transformer=dict(dim=SIZES["width"], depth=SIZES["attention_layers"], dim_head=64, heads=SIZES["width"] // 64),
    )
    if euler:  # one evaluation per interval, and `modality_steps` points make one interval fewer
        model.odeint_fn = functools.partial(odeint, method="euler")
    return model


def train_step():
    model, count = build().train(), SIZES["batch"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    forward = torch.compile(model) if SIZES["compile_peer"] else model
    batches = [
        [[torch.randint(0, 256, (SIZES["text_tokens"],)), torch.randn(SIDE, SIDE, VALUES)] for _ in range(count)]
        for _ in range(BATCHES)
    ]
    step, shapes = 0, []
    hook = model.transformer.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    model(batches[0])
    hook.remove()

    def call():
        nonlocal step
        loss = forward(batches[step % BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        return loss.item()

    return call, {
        "path": "forward, backward, AdamW" + (", torch.compile" if SIZES["compile_peer"] else ""),
        "parameters": sum(p.numel() for p in model.parameters()),
        "positions_per_row": shapes[0][1],
    }


def image(batch: int, prompted: bool = True):
    model = build().eval()
    prompt = torch.randint(0, 256, (SIZES["text_tokens"],))
    sampling = dict(modality_steps=SIZES["image_steps"] + 1, cfg_scale=1.0, max_length=1)
    forced = dict(force_modality_at_start=(0, (SIDE, SIDE)))
    if not prompted:
        ways = {"generate_modality_only": lambda: model.generate_modality_only(batch, modality_steps=SIZES["image_steps"] + 1)}
    else:
        ways = {"sample_many": lambda: model.sample_many([prompt.clone() for _ in range(batch)], **forced, **sampling)}
        if batch == 1:
            ways["sample_one"] = lambda: model.sample_one(prompt.clone(), **forced, **sampling)
    return fastest(ways)


def image_at_defaults():
    """What a user gets who changes nothing but the length, of one image."""
    model = build(euler=False).eval()
    prompt = torch.randint(0, 256, (SIZES["text_tokens"],))
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    def draw():
        model.sample_one(prompt.clone(), force_modality_at_start=(0, (SIDE, SIDE)), max_length=1)

    hook = model.transformer.register_forward_pre_hook(count)
    draw()
    hook.remove()
    return draw, {"path": f"sample_one, {calls} calls of its transformer"}


def text(batch: int):
    model = build().eval()
    prompt = torch.randint(0, 256, (batch, SIZES["text_tokens"]))
    total = SIZES["text_tokens"] + SIZES["new_tokens"]

    def write(cache: bool):
        assert model.generate_text_only(prompt, total, cache_kv=cache).shape == (batch, SIZES["new_tokens"])

    return fastest({"generate_text_only with cache": lambda: write(True), "without cache": lambda: write(False)})


def fastest(ways: dict):
    for call in ways.values():
        call()
    seconds = {name: min(clocked(call) for _ in range(2)) for name, call in ways.items()}
    best = min(seconds, key=seconds.get)
    return ways[best], {"path": best, "seconds_of_each_path": seconds}


TASKS = {
    "train_step": train_step,
    "image_batch_1": lambda: image(1),
    "image_batch_16": lambda: image(16),
    "unprompted_image_batch_16": lambda: image(16, prompted=False),
    "few_steps_1": image_at_defaults,
    "few_steps_2": image_at_defaults,
    "few_steps_4": image_at_defaults,
    "text_64_tokens_batch_1": lambda: text(1),
    "text_64_tokens_batch_16": lambda: text(16),
}

if __name__ == "__main__":
    about = {
        "versions": versions("torch", "transfusion-pytorch", "torchdiffeq"),
        "threads": torch.get_num_threads(),
    }
    serve(timing_handlers(TASKS, about))
