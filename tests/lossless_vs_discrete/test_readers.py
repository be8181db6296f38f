"""E4: what readers are shown, learn and are asked, and the photographed words among it."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest


@pytest.fixture
def readers(ran):
    return ran("readers.py")


class TokenizerOf64:
    """Halves the levels."""

    def reconstruct(self, images):
        return np.stack([image // 2 for image in images])


def words(folder):
    """Two words to learn from and one held out, wider and narrower than high."""
    lines, shown = [], (("Bread", "train", 40), ("7up", "train", 20), ("?", "train", 30), ("Tea", "test", 9))
    for number, (text, split, width) in enumerate(shown):
        pixels = np.random.default_rng(number).integers(0, 256, (20, width, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"segments": [{"image": f"{number}.png"}, {"text": text}], "split": split}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


def test_examples_hold_what_was_asked_and_what_the_tokenizer_left(readers):
    documents = readers["held_out"](readers["QUESTIONS"], 3)
    assert len(documents) == 3 * 6 + 15
    plain, through = (readers["examples"](documents, tokenizer) for tokenizer in (None, TokenizerOf64()))
    np.testing.assert_array_equal(through.images, plain.images // 2)
    for index, document in enumerate(documents):
        shown = [image.pixels for image in document.images]
        np.testing.assert_array_equal(plain.images[index], shown * (2 // len(shown)))
        signs = "".join(readers["SIGNS"][sign] for sign in plain.answer[index]).strip()
        assert signs == (document.extra["answer"] if document.extra["kind"] != "same" else document.extra["answer"][0])
    assert set(plain.size[plain.kind == 0]) >= {1, 2} and not plain.size[plain.kind > 0].any()


def test_readers_are_shown_what_stands_out(readers):
    """Against what the generator says: dots counted, an odd pixel found, the colour of a swatch taken from its middle."""
    documents = readers["held_out"](["count", "odd", "colour"], 20)
    images, answers = np.stack([d.images[0].pixels for d in documents]), [d.extra["answer"] for d in documents]
    ground = np.median(images, axis=(1, 2), keepdims=True)
    figure = jnp.asarray(np.linalg.norm(images - ground, axis=-1) / 127.5, jnp.float32)
    assert np.asarray(readers["number"](figure))[:20].tolist() == [int(answer) for answer in answers[:20]]
    top, bottom, left, right = (np.asarray(at)[20:40] for at in readers["outline"](figure))
    assert [f"{row} {col}" for row, col in zip(top, left, strict=True)] == answers[20:40]
    assert (bottom - top == 1).all() and (right - left == 1).all()
    seen, middle = readers["window"](figure, jnp.asarray(images))
    assert [bytes(pixel).hex() for pixel in np.asarray(middle)[40:]] == answers[40:]
    size = readers["WINDOW"]
    assert seen.shape == (60, size, size) and 0.95 < seen[20:40].max() <= 1
    assert seen[20:40].min() > 0.25  # the odd pixel fills its window, interpolated
    blank = readers["window"](jnp.zeros((1, 64, 64)), jnp.zeros((1, 64, 64, 3), jnp.uint8))
    assert np.isfinite(blank[0]).all() and int(readers["number"](jnp.zeros((1, 64, 64)))[0]) == 0


def test_a_reader_learns_what_stands_still_there_and_right_answers_are_counted(readers):
    source = readers["Probes"](0, 32, 64, (("ocr", 1.0),))
    data = readers["examples"]([source[i] for i in range(32)])
    readers["trained"].__globals__["BATCH"] = 16
    params = readers["trained"](data, 80, 0)
    found = readers["asked"](params, data)
    assert found["ocr"] > 0.9  # by heart
    other = data._replace(answer=data.answer[::-1])
    assert readers["asked"](params, other)["ocr"] < 0.3
    sizes = np.array([(data.size == size).mean() for size in range(1, 6)])
    np.testing.assert_allclose(sizes @ [found[f"ocr {size}"] for size in range(1, 6)], found["ocr"], rtol=1e-6)


def test_readers_are_trained_asked_and_kept(readers, monkeypatch, tmp_path, capsys):
    readers["main"].__globals__["mmdiff"] = types.SimpleNamespace(load_tokenizer=lambda path: TokenizerOf64())
    arguments = ["--workdir", str(tmp_path), "--tokenizers", "coarse", "--kinds", "ocr", "--seeds", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments, "--count", "4", "--examples", "20"])
    assert readers["main"]() == readers["main"]() == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["front_end"], r["reader"]) for r in records] == [
        ("raw patches", "fixed"),
        ("raw patches", "own"),
        ("coarse", "fixed"),
        ("coarse", "own"),
    ]
    assert all(0 <= share <= 1 for r in records for share in r["right"].values())
    told = capsys.readouterr().out
    raw_fixed, raw_own, fixed, own = (r["right"]["ocr"] for r in records)
    row = f"| ocr | {raw_own:.3f}, fixed {raw_fixed:.3f} | {own:.3f}, fixed {fixed:.3f} |"
    assert told.count("| question | raw patches | coarse |") == told.count(row) == 2
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments[:-1], "3", "--count", "4", "--examples", "20"])
    assert readers["main"]() == 0  # other steps: other readers, and what was there stays
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["steps"] for r in records] == [2] * 4 + [3] * 4 and len(list(tmp_path.glob("fixed-ocr-*.npz"))) == 2
    assert capsys.readouterr().out.count("| ocr 1 |") == 1
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments[:4], "--kinds", "letter"])
    with pytest.raises(SystemExit):
        readers["main"]()
    assert "--kinds letter needs --words FOLDER" in capsys.readouterr().err
    arguments[5:6] = ["letter", "--words", str(words(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments, "--count", "4", "--examples", "20"])
    assert readers["main"]() == 0 and "| letter | " in capsys.readouterr().out


def test_photographed_words_are_asked_for_their_first_sign(ran, tmp_path):
    photographed = ran("photographed.py")
    folder = words(tmp_path)
    (test,) = photographed["held_out"](folder)
    assert test.extra == {"kind": "letter", "answer": "t"}
    narrow = test.images[0].pixels  # its last column goes on to the right
    assert narrow.shape == (64, 64, 3) and np.abs(np.diff(narrow[:, 40:].astype(int), axis=1)).max() == 0
    learnt = photographed["examples"](folder, 50)
    assert {document.extra["answer"] for document in learnt} == {"b", "7"}  # not "?", nor what is held out
    assert all(a == b for a, b in zip(learnt, photographed["examples"](folder, 50), strict=True))
    assert len({document.images[0].pixels.tobytes() for document in learnt}) == 50


def test_alterations_keep_the_middle_and_bring_nothing_from_outside(ran):
    photographed = ran("photographed.py")
    sizes = {"TURN": 0.2, "SHEAR": 0.2, "STRETCH": 0.2, "MOVE": 0.0, "CONTRAST": 0.0}
    photographed["altered"].__globals__.update(sizes)
    plain = np.full((64, 64, 3), 200, np.uint8)
    plain[28:36, 28:36] = 90
    for seed in range(20):
        made = np.asarray(photographed["altered"](PIL.Image.fromarray(plain), np.random.default_rng(seed))).astype(int)
        edge, middle = made[0, 0, 0], made[31, 31, 0]
        assert abs(abs(edge - middle) - 110) <= 2  # moved up or down, or turned light to dark, all at once
        assert made[0].std() < 1 and made[-1].std() < 1
