"""mmdiff under the stopwatch, with the block kind given as the second argument; asked by vs_transfusion_pytorch.py.

The train step is the one of the trainer (it also keeps the moving average of the parameters, which the peer's does not).
Samples come from `Model.generate`, prompt in, document out.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from common import serve, timing_handlers, versions
from in_memory import InMemory

from mmdiff import IMG, Document, Image, config, config_files
from mmdiff.data.batches import Batches
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model
from mmdiff.training import state
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.step import compile_train_step

SIZES, BLOCK = json.loads(sys.argv[1]), sys.argv[2]
BATCHES = 4
PRINTABLE = 32, 127


def configuration() -> config.Config:
    patches = (SIZES["image_side"] // SIZES["patch"]) ** 2
    return config.Config(
        model=config.Model(
            width=SIZES["width"],
            depth=SIZES[f"{BLOCK}_layers"],
            patch=SIZES["patch"],
            block=BLOCK,
            compute="float32",
        ),
        # one document per row: [BOS] text [IMG] <rows> <cols> and one copy of the image, the peer's row
        layout=config.Layout(
            row_length=1 + SIZES["text_tokens"] + 3 + patches, trailing_context=0.0, text_drop=0.0, max_grid=8
        ),
        optimizer=config.Optimizer(learning_rate=3e-4, weight_decay=0.01, clip=0.0, b2=0.999),
        training=config.Training(batch_size=SIZES["batch"], accumulate=SIZES["pieces"], seed=SIZES["seed"]),
    )


def documents(count: int) -> list[Document]:
    """Texts of printable characters, each followed by an image of noise."""
    random, side = np.random.default_rng(SIZES["seed"]), SIZES["image_side"]
    pixels = random.integers(0, 256, (count, side, side, 3), np.uint8)
    return [Document(random_text(random), Image(p)) for p in pixels]


def random_text(random: np.random.Generator) -> str:
    return bytes(random.integers(*PRINTABLE, SIZES["text_tokens"], np.uint8)).decode()


def train_step():
    cfg, vocabulary = configuration(), Vocabulary.bytes(max_grid=8)
    batches = Batches(InMemory(documents(BATCHES * SIZES["batch"])), vocabulary, cfg)
    rows = [jax.tree.map(jnp.asarray, batches.batch(i)) for i in range(BATCHES)]
    network = Network(cfg.model, vocabulary.size)
    tx, _ = make_optimizer(cfg.optimizer, cfg.training.steps)
    current = state.create(network.init(jax.random.key(SIZES["seed"])), tx, SIZES["seed"])
    step = compile_train_step(network, cfg, tx, current, rows[0])
    parameters, done = count(current.params), 0

    def call():
        nonlocal current, done
        current, metrics = step(current, rows[done % BATCHES])
        done += 1
        return float(metrics["loss"])

    positions = int((rows[0].is_patch | (rows[0].text_weight > 0)).sum(axis=1).max()) + 1  # [BOS] has no weight
    return call, {"path": "compile_train_step", "parameters": parameters, "positions_per_row": positions}


@functools.cache
def model(few_step: bool = False) -> Model:
    """A model with random weights whose language head writes printable characters only.

    Random weights would end the text anywhere, by [EOS] or [IMG]. A character's logits here have a standard deviation of
    20, those of all other tokens are 0: that the best of 95 characters falls below 0 has a probability of 2^-95, so that
    exactly as many tokens come out as were asked for. The arithmetic is that of any other weights.
    """
    cfg, vocabulary = configuration(), Vocabulary.bytes(max_grid=8)
    if few_step:
        cfg = config_files.replaced(cfg, {"model.step_input": True, "sampling.solver": "few_step"})
    params = Network(cfg.model, vocabulary.size).init(jax.random.key(SIZES["seed"]))
    kernel = np.zeros(params["text_out"]["kernel"].shape, np.float32)
    start = vocabulary.text_range[0]
    columns = slice(start + PRINTABLE[0], start + PRINTABLE[1])
    random = np.random.default_rng(SIZES["seed"])
    kernel[:, columns] = 20 * random.normal(size=kernel[:, columns].shape) / np.sqrt(SIZES["width"])
    params["text_out"]["kernel"] = jnp.asarray(kernel)
    return Model(cfg, params, vocabulary)


def image(batch: int, prompted: bool = True):
    prompt = [random_text(np.random.default_rng(SIZES["seed"]))] if prompted else []
    prompts = [Document(*prompt, IMG) for _ in range(batch)]
    size = SIZES["image_side"], SIZES["image_side"]

    def draw():
        out = model().generate(
            prompts,
            image_size=size,
            steps=SIZES["image_steps"],
            solver="ddim",  # Euler, as the peer
            grid="uniform_u",
            guidance=1.0,
            max_tokens=0,
        )
        assert [d.images[0].pixels.shape for d in out] == [(*size, 3)] * batch

    return draw, {"path": "Model.generate"}


def few_steps(evaluations: int):
    prompt = Document(random_text(np.random.default_rng(SIZES["seed"])), IMG)
    size = SIZES["image_side"], SIZES["image_side"]

    def draw():
        (out,) = model(few_step=True).generate([prompt], image_size=size, steps=evaluations, max_tokens=0)
        assert out.images[0].pixels.shape == (*size, 3)

    return draw, {"path": "Model.generate"}


def text(batch: int):
    random = np.random.default_rng(SIZES["seed"])
    prompts = [Document(random_text(random)) for _ in range(batch)]

    def write():
        out = model().generate(prompts, max_tokens=SIZES["new_tokens"], max_images=0, temperature=1.0, min_p=0.1)
        lengths = [sum(map(len, d.texts)) for d in out]  # a printable character is one token
        assert lengths == [SIZES["text_tokens"] + SIZES["new_tokens"]] * batch, lengths

    return write, {"path": "Model.generate"}


def count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


TASKS = {
    "train_step": train_step,
    "image_batch_1": lambda: image(1),
    "image_batch_16": lambda: image(16),
    "unprompted_image_batch_16": lambda: image(16, prompted=False),
    "few_steps_1": lambda: few_steps(1),
    "few_steps_2": lambda: few_steps(2),
    "few_steps_4": lambda: few_steps(4),
    "text_64_tokens_batch_1": lambda: text(1),
    "text_64_tokens_batch_16": lambda: text(16),
}

if __name__ == "__main__":
    jax.devices()
    about = {"versions": versions("jax", "flax", "optax"), "threads": None, "device": jax.devices()[0].platform}
    serve(timing_handlers(TASKS, about))
