"""Batches: a function of (seed, step) and nothing else."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from mmdiff.config import Config, ConfigError, Data, Layout, Model, Training
from mmdiff.data.batches import Batches
from mmdiff.data.shapes import Shapes
from mmdiff.data.sources import GeneratorSource, open_source, open_vocabulary
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.data.words import Words
from mmdiff.document import DataError, Document, Image, Text

VOCABULARY = Vocabulary.bytes()


class Documents:
    """A source made of documents in memory."""

    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]

    def outline(self, index):
        return [(s.height, s.width, s.learn) if isinstance(s, Image) else s for s in self[index].segments]

    def where(self, index):
        return f"file:{index + 1}"


def captioned(pixels, text="ab"):
    return Document(text, Image(pixels))


def configured(seed=0, batch_size=3, row_length=512, **data) -> Config:
    return Config(
        model=Model(patch=8),
        layout=Layout(row_length=row_length),
        training=Training(seed=seed, batch_size=batch_size),
        data=Data(source="shapes", size=40, **data),
    )


def made(cfg: Config) -> Batches:
    return Batches(open_source(cfg, "train"), VOCABULARY, cfg)


def as_bytes(rows) -> bytes:
    return b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(rows))


@pytest.fixture(scope="module")
def batches():
    return made(configured(flip=True, order="both"))


@pytest.fixture(scope="module")
def expected(batches):
    return [as_bytes(batches.batch(step)) for step in range(40)]  # several epochs


def test_a_batch_does_not_depend_on_what_was_read_before(expected):
    fresh = made(configured(flip=True, order="both"))
    for step in (39, 0, 17, 39, 3, 25):
        assert as_bytes(fresh.batch(step)) == expected[step]
    assert fresh.rows_per_epoch() < 40 * 3 / 4
    assert len(set(expected)) == len(expected)  # steps differ: the comparison can fail


@pytest.mark.parametrize("start", [0, 11])
def test_iterating_equals_direct_access(expected, start):
    fresh = made(configured(flip=True, order="both"))
    assert [as_bytes(rows) for rows in fresh.iterate(start, start + 6)] == expected[start : start + 6]
    assert list(fresh.iterate(5, 5)) == []


def test_threads_read_the_same_batches(expected):
    fresh = made(configured(flip=True, order="both"))
    read = {}
    threads = [
        threading.Thread(target=lambda n=n: read.update({s: as_bytes(fresh.batch(s)) for s in range(n, 40, 4)}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read[step] for step in range(40)] == expected


def test_another_seed_gives_other_batches():
    documents = Documents([Shapes(0, 40)[i] for i in range(40)])
    first, second = (Batches(documents, VOCABULARY, configured(seed)) for seed in (0, 1))
    assert as_bytes(first.batch(0)) != as_bytes(second.batch(0))
    assert first.fingerprint != second.fingerprint


def test_rows_do_not_depend_on_the_batch_size(batches):
    wide = made(configured(batch_size=6, flip=True, order="both"))
    rows = jax.tree.map(lambda a, b: np.concatenate([a, b]), batches.batch(2), batches.batch(3))
    assert as_bytes(wide.batch(1)) == as_bytes(rows)
    assert wide.fingerprint == batches.fingerprint


def test_an_epoch_shows_every_image_once():
    pictures = [np.full((8, 8, 3), 6 * i, np.uint8) for i in range(40)]
    cfg = configured(row_length=32, batch_size=1)
    batches = Batches(Documents([captioned(p) for p in pictures]), VOCABULARY, cfg)
    count = batches.rows_per_epoch()
    seen = [rows.patches[rows.noised][:, 0] for rows in (batches.row(n) for n in range(count))]
    assert sorted(np.concatenate(seen).tolist()) == [6 * i for i in range(40)]
    assert batches.epoch(0) == 0 and batches.epoch(count) == 1 and 0 < batches.epoch(count // 2) < 1


@pytest.mark.parametrize(("generator", "row_length"), [(Shapes, 512), (Words, 448)])
def test_little_is_wasted(generator, row_length):
    cfg = Config(model=Model(patch=4), layout=Layout(row_length=row_length))
    source = GeneratorSource(generator(0, 2000), "generator")
    vocabulary = Vocabulary.train(s.text for i in range(500) for s in source.outline(i) if isinstance(s, Text))
    assert Batches(source, vocabulary, cfg).waste() < 0.1


def test_the_fingerprint_notices_every_change():
    grey = np.full((8, 8, 3), 7, np.uint8)
    documents = [captioned(grey, f"text number {i}, long enough to differ at its end") for i in range(30)]
    cfg = configured()

    def fingerprint(documents=documents, vocabulary=VOCABULARY, cfg=cfg, **options):
        return Batches(Documents(documents), vocabulary, cfg, **options).fingerprint

    original = fingerprint()
    assert fingerprint(list(documents)) == original
    changed_text = [*documents[:17], captioned(grey, documents[17].texts[0] + "!"), *documents[18:]]
    last_letter = [*documents[:17], captioned(grey, documents[17].texts[0][:-1] + "x"), *documents[18:]]
    learn = [*documents[:17], type(documents[0])(Text(documents[17].texts[0], learn=False), Image(grey)), *documents[18:]]
    size = [*documents[:17], captioned(np.full((8, 16, 3), 7, np.uint8), documents[17].texts[0]), *documents[18:]]
    pixel = [captioned(grey + np.uint8(1), documents[0].texts[0]), *documents[1:]]
    others = [fingerprint(d) for d in (changed_text, last_letter, learn, size, pixel, documents[1:], documents[::-1])]
    others.append(fingerprint(vocabulary=Vocabulary.train(["text number"] * 9, 300)))
    others.append(fingerprint(vocabulary=Vocabulary.bytes(max_grid=63)))
    others.append(fingerprint(cfg=dataclasses.replace(cfg, layout=Layout(row_length=256))))
    others.append(fingerprint(learn=False))
    assert len({original, *others}) == len(others) + 1


def test_validation_drops_and_flips_nothing():
    cfg = dataclasses.replace(configured(flip=True), layout=Layout(row_length=512, text_drop=1.0, trailing_context=0.0))
    source = open_source(cfg, "train")
    first = Batches(source, VOCABULARY, cfg, learn=False)
    plain = dataclasses.replace(configured(), layout=Layout(row_length=512, text_drop=0.0, trailing_context=0.0))
    assert as_bytes(first.batch(0)) == as_bytes(Batches(source, VOCABULARY, plain).batch(0))
    assert as_bytes(first.batch(0)) != as_bytes(Batches(source, VOCABULARY, cfg).batch(0))


def test_validation_is_the_same_for_every_seed():
    """Else runs that differ in their seed alone are measured on different images."""
    cfg = dataclasses.replace(configured(flip=True), layout=Layout(row_length=512))
    source = open_source(cfg, "train")
    seeded = lambda seed: dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, seed=seed))
    first, second = (as_bytes(Batches(source, VOCABULARY, seeded(seed), learn=False).batch(0)) for seed in (0, 1))
    assert first == second
    first, second = (as_bytes(Batches(source, VOCABULARY, seeded(seed)).batch(0)) for seed in (0, 1))
    assert first != second


def test_mistakes_name_the_file_and_line():
    good, odd = captioned(np.zeros((8, 8, 3), np.uint8)), captioned(np.zeros((12, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"^file:2: an image of 12x8 is not divisible by model\.patch=8"):
        Batches(Documents([good, odd]), VOCABULARY, configured())
    with pytest.raises(ConfigError, match=r"^file:1: an image of 2 patch columns does not fit layout\.max_grid=1"):
        wide = captioned(np.zeros((8, 16, 3), np.uint8))
        Batches(Documents([wide]), Vocabulary.bytes(max_grid=1), configured())
    with pytest.raises(DataError, match=r"^file:2 needs 108 positions but layout\.row_length=64: .* 1 of 2 documents"):
        Batches(Documents([good, captioned(good.images[0].pixels, "a" * 100)]), VOCABULARY, configured(row_length=64))
    with pytest.raises(DataError, match="holds no document"):
        Batches(Documents([]), VOCABULARY, configured())


def test_an_image_that_changes_later_is_noticed():
    documents = Documents([captioned(np.zeros((8, 8, 3), np.uint8))])
    batches = Batches(documents, VOCABULARY, configured())
    for other in ((16, 8, 3), (8, 9, 3)):  # also by less than a patch
        documents.documents[0] = captioned(np.zeros(other, np.uint8))
        with pytest.raises(DataError, match=r"^file:1: an image changed its size"):
            batches.batch(0)


def test_the_vocabulary_is_trained_on_the_data_by_default():
    cfg = configured()
    source = open_source(cfg, "train")
    assert open_vocabulary(cfg, source).fingerprint == open_vocabulary(cfg, open_source(cfg, "train")).fingerprint
    assert open_vocabulary(dataclasses.replace(cfg, data=Data(vocabulary="bytes")), source).size == VOCABULARY.size


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_are_the_batch(processes):
    """What each process reads of a batch, put together, is the batch one process reads."""
    cfg, size = configured(batch_size=8), 8
    batches = Batches(open_source(cfg, "train"), VOCABULARY, cfg)
    parts = np.array_split(np.arange(size), processes)
    whole = batches.batch(3)
    read = [batches.batch(3, part.tolist()) for part in parts]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *read)
    assert as_bytes(together) == as_bytes(whole)
    streamed = [next(iter(batches.iterate(3, 4, part.tolist()))) for part in parts]
    assert [as_bytes(rows) for rows in streamed] == [as_bytes(rows) for rows in read]
    assert as_bytes(batches.batch(3, parts[-1][::-1].tolist())) != as_bytes(read[-1])


def test_images_alone():
    """Whatever else the documents hold, rows are the noised blocks of their learnt images."""
    size = np.zeros((16, 16, 3), np.uint8)
    documents = [
        captioned(size + 1),
        Document("text alone"),
        Document(Image(size + 2, learn=False), "given", Image(size + 3)),
        Document(Image(size + 4), "and", Image(size + 5)),
    ]
    cfg = dataclasses.replace(configured(batch_size=1), layout=Layout(markers=False, row_length=16))
    batches = Batches(Documents(documents), VOCABULARY, cfg)
    assert batches.rows_per_epoch() == 1 and batches.waste() == 0
    rows = batches.batch(0)
    assert rows.noised.all() and not rows.text_weight.any() and not rows.tokens.any()
    assert sorted(rows.patches[0, ::4, 0].tolist()) == [1, 3, 4, 5]
    np.testing.assert_array_equal(rows.mask.dense(16)[0], np.kron(np.eye(4), np.ones((4, 4))) > 0)
    with pytest.raises(DataError, match="images alone"):
        Batches(Documents([Document("text")]), VOCABULARY, cfg)
