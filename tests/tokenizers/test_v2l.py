"""Codes that are words: what is chosen, what is frozen, what passes through the decoder, and what travels with it."""

import dataclasses
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmdiff
from mmdiff.config import Config, ConfigError, Data, Layout, Model, Optimizer, Tokenizer, Tower, Training
from mmdiff.config_files import load_experiment, replaced
from mmdiff.document import IMG, DataError, Document
from mmdiff.in_context.prompts import image_words
from mmdiff.layout import ImagePiece, ImagePlan, lay_out, pack, patchify, stack
from mmdiff.parallel.mesh import make_mesh
from mmdiff.pretrained.encoder import normalised
from mmdiff.tokenizers.model import Tokenizer as Trained
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.quantizers.base import Learning
from mmdiff.tokenizers.quantizers.v2l import MAP_WEIGHT
from mmdiff.tokenizers.training import make_tokenizer_step
from mmdiff.tokenizers.v2l import expand
from mmdiff.tokenizers.v2l.words import read_words
from mmdiff.training import state as train_state
from mmdiff.training.checkpoint import restore_params
from mmdiff.training.loop import train
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.run import build
from tests.in_context.tiny import GLOBAL, TOWERS, WIDTH, experiment, language, pixels, towers, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("v2l")


def fresh(network, seed=0):
    """Parameters as a run starts with them."""
    return jax.jit(network.init)(jax.random.key(seed)) | network.given()


@pytest.fixture(scope="module")
def made(folder):
    """A tokenizer with nothing at its starting point."""
    cfg = experiment(folder)
    params = fresh(TokenizerNetwork.of(cfg))
    moved = {
        n: jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), part) for n, part in params.items()
    }
    return Trained(cfg, moved | {"codebook": params["codebook"]})


def test_ids_decode_to_what_the_image_is_reconstructed_as(made, tmp_path):
    images = pixels(3)
    ids = made.encode(images)
    assert ids.shape == (3, 4 + 16) and made.grid == (5, 4) and made.codes == 300 + GLOBAL
    assert ((ids[:, :4] >= 300) & (ids[:, :4] < 300 + GLOBAL)).all() and (ids[:, 4:] < 300).all()
    assert all(len(set(row)) == 4 for row in ids[:, :4].tolist())
    assert made.bits == pytest.approx(4 * np.log2(GLOBAL) + 16 * np.log2(300))
    np.testing.assert_array_equal(made.decode(ids), made.reconstruct(images))
    kept = dataclasses.replace(made.cfg, tokenizer=dataclasses.replace(made.cfg.tokenizer, words="a file that is gone"))
    again = Trained.from_bytes(Trained(kept, made.params).to_bytes(), "here")
    np.testing.assert_array_equal(again.encode(images), ids)
    assert made.decode((ids + 300) % 312).shape == (3, 32, 32, 3)  # any word anywhere
    with pytest.raises(DataError, match="from 0 to 311"):
        made.decode(ids + 300)


def test_global_words_are_the_nearest_to_what_the_tower_sees(made):
    images = pixels(3)
    seen = np.asarray(towers().embed_images(normalised(images, 16)))
    apart = np.square(seen[:, None] - words().global_[None]).sum(-1)
    np.testing.assert_array_equal(made.encode(images)[:, :4] - 300, np.argsort(apart, axis=-1)[:, :4])
    cosine = seen @ (words().global_ / np.linalg.norm(words().global_, axis=-1, keepdims=True)).T
    assert (np.argsort(-cosine, axis=-1)[:, :4] != np.argsort(apart, axis=-1)[:, :4]).any()  # another order


def test_local_words_are_the_nearest_after_the_map(made):
    network, images = made.network, jnp.asarray(pixels(2), jnp.float32) / 127.5 - 1
    model = network.bind(made.params)
    z = np.asarray(model.encode(images))
    found = model.quantise(jnp.asarray(z), Learning())
    own = z[:, 4:] / np.linalg.norm(z[:, 4:], axis=-1, keepdims=True)
    table = words().local @ np.asarray(made.params["quantizer"]["map"]) + np.asarray(made.params["quantizer"]["shift"])
    ids = np.square(own[..., None, :] - table).sum(-1).argmin(-1)
    np.testing.assert_array_equal(found.ids[:, 4:], ids)
    error = np.square(own - table[ids]).mean()
    np.testing.assert_allclose(found.loss, (MAP_WEIGHT + 1) * error, rtol=1e-4)
    np.testing.assert_array_equal(found.codes, model.codes(found.ids))
    first, _ = network.quantizer.given()
    start = words().local @ np.asarray(first["map"]) + np.asarray(first["shift"])
    np.testing.assert_allclose(start.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.square(start).sum(-1).mean(), 1, rtol=1e-4)


@pytest.mark.parametrize("model", ["vit", "conv"])
def test_local_codes_only_say_which_words_are_read(model, folder):
    """With all words alike, nothing else of the image passes, unless what is read is added."""
    cfg = experiment(folder, model)
    params = fresh(TokenizerNetwork.of(cfg))
    ids = np.random.default_rng(0).integers(0, 300, (2, 20)).astype(np.int32)

    def apart(residual: bool, words) -> float:
        ids[:, :4] = words
        settings = dataclasses.replace(cfg, tokenizer=dataclasses.replace(cfg.tokenizer, residual=residual))
        bound = TokenizerNetwork.of(settings).bind(params)
        one, two = jax.jit(bound.decode)(bound.codes(ids))
        return float(np.abs(one - two).max())

    assert apart(False, 305) < 1e-4 < apart(False, [300, 301, 302, 303])
    if model == "vit":
        assert apart(True, 305) > 1e-4


def test_a_step_moves_the_map_and_the_halves_and_leaves_words_and_tower(folder):
    cfg = experiment(folder)
    network = TokenizerNetwork.of(cfg)
    tx, _ = make_optimizer(dataclasses.replace(cfg.optimizer, weight_decay=0.1), 4)
    state = train_state.create(fresh(network, 1), tx, 0)
    laid = [
        lay_out([ImagePiece(patchify(image, 8), 4, 4)], [ImagePlan(False, 1)], None, cfg.layout, patch_values=192)[0]
        for image in pixels(4)
    ]
    rows = stack([pack([each], 16) for each in laid])
    step, before, found = jax.jit(make_tokenizer_step(network, cfg, tx)), state, []
    for _ in range(8):
        state, metrics = step(state, rows)
        found.append(float(metrics["image_loss"]))
    assert found[-1] < found[0] and int(metrics["skipped"]) == 0
    for tree in (state.params, state.ema):
        for a, b in zip(jax.tree.leaves(tree["codebook"]), jax.tree.leaves(before.params["codebook"]), strict=True):
            np.testing.assert_array_equal(a, b)
    moved = lambda part: jax.tree.map(lambda a, b: bool((a != b).any()), state.params[part], before.params[part])
    assert moved("quantizer") == {"map": True, "shift": True}
    assert moved("decoder")["read"]["v"]["kernel"] and moved("encoder")["patch_in"]["kernel"]


def test_a_run_starts_with_the_words_of_its_file_and_goes_on_without_it(tmp_path):
    changes = {"training.sample_every": 0, "training.validate_every": 0, "training.checkpoint_every": 1}
    cfg, run = replaced(experiment(tmp_path), changes), tmp_path / "run"
    train(cfg, run)
    once = restore_params(run / "checkpoints")[0]
    shutil.rmtree(run / "checkpoints" / "2")  # as if it had been killed before that was written
    moved = replaced(cfg, {"tokenizer.words": str(tmp_path / "elsewhere")})
    (tmp_path / "words.safetensors").unlink()
    train(moved, run)
    jax.tree.map(np.testing.assert_array_equal, restore_params(run / "checkpoints")[0], once)
    jax.tree.map(np.testing.assert_array_equal, once["codebook"], words().arrays())
    with pytest.raises(DataError, match="elsewhere: no such file of words"):
        train(moved, tmp_path / "fresh")
    more = replaced(moved, {"training.init": str(run)})  # that has the words
    state = build(more, tmp_path / "more", make_mesh(more.mesh, more.training)).first_state()
    jax.tree.map(np.testing.assert_array_equal, state.params["codebook"], once["codebook"])


def test_a_model_of_next_codes_draws_with_it(made, tmp_path, monkeypatch):
    cfg = Config(
        model=Model(width=16, depth=1, patch=8, block="attention", head_width=16, lossless=False),
        layout=Layout(row_length=96, images="next_code", max_grid=8),
        data=Data(source="shapes", size=32, max_objects=1, generator=(("draw", 1.0),), tokenizer="here", vocabulary="bytes"),
        optimizer=Optimizer(warmup=1),
        training=Training(steps=1, batch_size=2, sample_every=0, validate_every=0),
    )
    monkeypatch.setattr("mmdiff.training.run.load_tokenizer", lambda path: made)
    train(cfg, tmp_path)
    model = mmdiff.load(tmp_path)
    assert model.tokenizer.fingerprint == made.fingerprint
    (drawn,) = model.generate([Document("a", IMG)], max_tokens=0)
    assert drawn.images[0].pixels.shape == (32, 32, 3)
    assert model.vocabulary.codes == 300 + GLOBAL and model.tokenizer.grid == (5, 4)


def test_files_of_words(folder, tmp_path):
    words().save(tmp_path / "words.safetensors")
    again = read_words(tmp_path / "words.safetensors")
    assert again.local_words == words().local_words and again.tower == words().tower
    np.testing.assert_array_equal(again.global_, words().global_)
    assert set(again.tower_params) == set(words().tower_params)
    with pytest.raises(DataError, match="no such file of words"):
        read_words(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"12345678")
    with pytest.raises(DataError, match="bad is no file of words"):
        read_words(tmp_path / "bad")
    for change, what in (
        ({"codes": 299}, "codes=299"),
        ({"global_codes": 11}, "global_codes=11"),
        ({"tower": Tower(side=8, patch=4, width=16, depth=1, heads=2)}, "tower="),
    ):
        with pytest.raises(ConfigError, match=rf"tokenizer\.{what}"):
            TokenizerNetwork.of(experiment(folder, **change)).given()


def test_texts_are_cut_into_pieces_as_the_towers_folder_says(tmp_path, monkeypatch):
    here = Path(__file__).parents[1]  # where pytest finds this folder first, under the package's name
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != here])
    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = Tokenizer(models.WordLevel({"<a>": 5, "<z>": 9, "red": 3, "circle": 4, "?": 0}, unk_token="?"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(single="<a> $A <z>", special_tokens=[("<a>", 5), ("<z>", 9)])
    with pytest.raises(DataError, match=r"tokenizer\.json: not there"):
        expand.pieces_of(tmp_path, 6, 9)
    pieces.save(str(tmp_path / "tokenizer.json"))
    for end in (9, 2):  # which old files of CLIP have
        found = expand.pieces_of(tmp_path, 6, end)(["red circle", "", "red red blue circle red"])
        np.testing.assert_array_equal(found, [[5, 3, 4, 9, 9, 9], [5, 9, 9, 9, 9, 9], [5, 3, 3, 0, 4, 9]])
    with pytest.raises(DataError, match=r"ends texts with 9, and config\.json says eos_token_id=7"):
        expand.pieces_of(tmp_path, 6, 7)


def test_the_experiment_takes_its_sizes_from_the_file(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "experiments" / "lossless_vs_discrete" / "tokenizers.py"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file of words"):
        load_experiment(f"{path}:v2l")
    words().save("runs/v2l/words.safetensors")
    for name, residual in (("v2l", False), ("v2l_residual", True)):
        cfg = load_experiment(f"{path}:{name}")
        shapes = jax.eval_shape(TokenizerNetwork.of(cfg).init, jax.random.key(0))
        assert shapes["codebook"]["global"].shape == (GLOBAL, WIDTH) and cfg.tokenizer.residual == residual


def test_what_cannot_work_is_refused(folder):
    with pytest.raises(ConfigError, match=r"tokenizer\.words must name a file"):
        Tokenizer(quantizer="v2l")
    with pytest.raises(ConfigError, match=r"global_tokens=13 must be from 1 to"):
        experiment(folder, global_tokens=13)
    with pytest.raises(ConfigError, match=r"tokenizer\.residual=True has no meaning"):
        Tokenizer(residual=True)
    with pytest.raises(ConfigError, match=r"tokenizer\.latents=4"):
        experiment(folder, latents=4)
    cfg = experiment(folder)
    for network, latents in (("lavit", 0), ("seed", 0), ("seed", 8)):
        change = {"model.network": network, "tokenizer.latents": latents, "tokenizer.encoder": "clip", "training.init": "one"}
        with pytest.raises(ConfigError, match=rf"quantizer='v2l' .* model\.network='{network}'"):
            replaced(cfg, change)
    with pytest.raises(ConfigError, match=r"must be a multiple of patch"):
        experiment(folder, tower=dataclasses.replace(cfg.tokenizer.tower, side=30))
    with pytest.raises(ConfigError, match=r"model\.depth=1"):
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, depth=1))
    assert Config.from_json(cfg.to_json()) == cfg


def test_words_grow_by_the_likeliest_next_token_and_are_chosen_by_images():
    which = language()
    grown = expand.expanded(which)
    assert len(grown) == 300
    word, pair, triple = grown[which.encode("photo")[-1]]
    token = which.greedy([which.encode(f"a photo of {word}", bos=True)], 1)[0, 0]
    assert pair == which.decode([*which.encode(word), int(token)])
    token = which.greedy([which.encode(f"a photo of {pair}", bos=True)], 1)[0, 0]
    assert triple == which.decode([*which.encode(pair), int(token)])
    ids = expand.bytes_of(32, 256)
    vectors = expand.text_embeddings(towers(), ids, ["red", "blue"], ["a {}", "the {} thing"])
    one = np.asarray(towers().embed_texts(ids(["a red"])))
    two = np.asarray(towers().embed_texts(ids(["the red thing"])))
    np.testing.assert_allclose(vectors[:1], (one + two) / 2, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(vectors[0]) < 1  # not made unit again
    candidates = np.eye(4, 3, dtype=np.float32) - np.array([[0, 0, 0]] * 3 + [[1, 1, 1]])
    assert expand.named(np.array([[3, 2, 1], [1, 2, 3], [3, 1, 2]], np.float32), candidates, 2).tolist() == [2, 2, 2, 0]
    found = expand.build_words(which, towers(), TOWERS, ids, pixels(6), ["a {}"], 1)
    assert found.local.shape == (300, WIDTH) and 0 < len(found.global_words) <= 15
    assert len(set(found.global_words)) == len(found.global_words)
    assert image_words(which, found.global_words[:2])
    with pytest.raises(ConfigError, match="none of .* candidates is named so often"):
        expand.build_words(which, towers(), TOWERS, ids, pixels(2), ["a {}"], 5)
    with pytest.raises(ConfigError, match="has no"):
        expand.text_embeddings(towers(), ids, ["red"], ["a thing"])
