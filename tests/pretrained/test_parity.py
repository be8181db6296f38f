"""Our modules with the weights of others compute what theirs do: golden files of small random networks (peers.py).

Where PyTorch and transformers are installed, other seeds are tried too.
"""

from pathlib import Path

import jax
import numpy as np
import peers
import pytest

from mmdiff.pretrained.blip2 import load_blip2_vision
from mmdiff.pretrained.clip import load_clip
from mmdiff.pretrained.llama import load_llama
from mmdiff.pretrained.t5 import load_t5_decoder

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrained"


@pytest.fixture(params=["golden", "anew"])
def made(request, tmp_path):
    """kind -> (folder with weights, what the peer computed with them)."""

    def find(kind: str) -> tuple[Path, dict[str, np.ndarray]]:
        folder = GOLDEN / kind
        if request.param == "anew":
            pytest.importorskip("transformers", reason="needs PyTorch and transformers: the extra `parity`")
            folder = tmp_path / kind
            peers.PEERS[kind](folder, 1)
        with np.load(folder / "expected.npz") as file:
            return folder, dict(file)

    return find


def close(ours: jax.Array, theirs: np.ndarray) -> bool:
    return np.abs(np.asarray(ours) - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max())


def test_clip(made):
    folder, expected = made("clip")
    with jax.default_matmul_precision("highest"):
        model = load_clip(folder)
        assert close(model.embed_texts(expected["ids"]), expected["texts"])
        assert close(model.embed_images(expected["images"]), expected["shown"])
        assert close(model.vision(expected["images"]), expected["patches"])
        assert not close(model.vision(expected["images"], layers=-1), expected["patches"])
        turned = expected["ids"][:, [1, 0, *range(2, expected["ids"].shape[1])]]
        assert not close(model.embed_texts(turned), expected["texts"])


def test_blip2(made):
    folder, expected = made("blip2")
    with jax.default_matmul_precision("highest"):
        model = load_blip2_vision(folder)
        features = model(expected["images"])
        assert close(model.norm(features), expected["normed"]) and not close(features, expected["normed"])


def test_llama(made):
    folder, expected = made("llama")
    ids = expected["ids"]
    with jax.default_matmul_precision("highest"):
        model = load_llama(folder)
        states, none = model(model.embed(ids))
        assert close(model.logits(states), expected["logits"]) and none is None
        cache, found = model.cache(len(ids), 16), []
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):  # piece after piece
            states, cache = model(model.embed(part), cache)
            found.append(model.logits(states))
        assert close(np.concatenate(found, axis=1), expected["logits"]) and cache.length == ids.shape[1]
        late = model(model.embed(ids[:, 1:]))[0]
        assert not close(model.logits(late), expected["logits"][:, 1:])  # the first token is read by all others


def test_t5(made):
    folder, expected = made("t5")
    queries, context = expected["queries"], expected["context"]
    with jax.default_matmul_precision("highest"):
        model = load_t5_decoder(folder)
        assert close(model(queries, context), expected["states"])
        assert close(model(queries[:, :7], context), expected["states"][:, :7])  # what comes later changes nothing
        assert not close(model(queries, context[:, :-1]), expected["states"])
        model.bias[...] = model.bias[...][::-1]
        assert not close(model(queries, context), expected["states"])
