"""Sources: everything wrong with the data is found when it is opened, in one line."""

import json
import sys

import numpy as np
import pytest

from mmdiff.config import Config, ConfigError, Data, Model
from mmdiff.data import sources
from mmdiff.data.batches import Batches
from mmdiff.data.sources import open_source, open_vocabulary
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Document, Image, Text


def write_folder(folder, count=4, size=(8, 8), split=None):
    """`count` documents of a text and an image, one per line."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        Image(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"images/{i}.png")
        line = {"segments": [{"text": f"picture {i}"}, {"image": f"images/{i}.png"}]}
        lines.append(line | ({"split": split(i)} if split else {}))
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def configured(folder, **data) -> Config:
    return Config(data=Data(path=str(folder), **data))


def test_a_folder(tmp_path):
    cfg = configured(write_folder(tmp_path / "set", split=lambda i: "test" if i == 2 else "train"))
    train, validation = open_source(cfg, "train"), open_source(cfg, "validation")
    assert [train[i].texts for i in range(len(train))] == [["picture 0"], ["picture 1"], ["picture 3"]]
    assert len(validation) == 1 and validation[0].texts == ["picture 2"]
    assert train.outline(2) == [Text("picture 3"), (8, 8, True)]
    assert train.where(2) == "documents.jsonl:4" and validation.where(0) == "documents.jsonl:3"
    pixels = Image.open(tmp_path / "set/images/3.png")
    assert train[2] == Document("picture 3", pixels)


def test_images_are_resized_on_request(tmp_path):
    train = open_source(configured(write_folder(tmp_path / "set", size=(9, 13)), image_size=(4, 8)), "train")
    assert train.outline(0)[1] == (4, 8, True)
    assert train[0].images[0].pixels.shape == (4, 8, 3)


def test_a_size_that_does_not_divide_names_the_line(tmp_path):
    cfg = configured(write_folder(tmp_path / "set", size=(8, 10)))
    with pytest.raises(ConfigError, match=r"^documents\.jsonl:1: an image of 8x10 is not divisible by model\.patch=4"):
        Batches(open_source(cfg, "train"), Vocabulary.bytes(), cfg)


def break_missing(folder):
    (folder / "images/1.png").unlink()


def break_image(folder):
    (folder / "images/1.png").write_bytes((folder / "images/1.png").read_bytes()[:60])


def replace_line(text):
    def change(folder):
        lines = (folder / "documents.jsonl").read_bytes().split(b"\n")
        (folder / "documents.jsonl").write_bytes(b"\n".join([lines[0], text, *lines[2:]]))

    return change


BROKEN = {
    "missing": (break_missing, r'image "images/1\.png" not found; paths are relative to documents\.jsonl\.'),
    "corrupt": (break_image, r'image "images/1\.png" is not a readable image'),
    "json": (replace_line(b"{"), r"not valid JSON"),
    "utf8": (replace_line(b'{"segments": [{"text": "\xff"}]}'), r"not valid UTF-8 at byte 25; save the file as UTF-8"),
    "empty": (replace_line(b'{"segments": [{"text": ""}]}'), r"segment 1 is an empty text"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_line_stops_at_the_start(tmp_path, kind):
    change, message = BROKEN[kind]
    cfg = configured(write_folder(tmp_path / "set"))
    open_source(cfg, "train")
    change(tmp_path / "set")
    with pytest.raises(DataError, match=rf"^documents\.jsonl:2: {message}") as error:
        open_source(cfg, "train")
    assert "\n" not in str(error.value)


def test_no_data(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        open_source(configured(""), "train")
    with pytest.raises(DataError, match=r"documents\.jsonl not found"):
        open_source(configured(tmp_path), "train")
    (tmp_path / "documents.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        open_source(configured(tmp_path), "train")
    write_folder(tmp_path / "set", split=lambda i: "dev")
    with pytest.raises(DataError, match=r"no document has data\.split='train'; the data has 'dev' \(4\)"):
        open_source(configured(tmp_path / "set"), "train")


def test_every_twentieth_document_is_held_out(tmp_path, capsys):
    sources._say.cache_clear()
    cfg = configured(write_folder(tmp_path / "set", count=41))
    train, validation = open_source(cfg, "train"), open_source(cfg, "validation")
    assert [validation.where(i) for i in range(len(validation))] == ["documents.jsonl:20", "documents.jsonl:40"]
    assert len(train) == 39
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "holding out every 20th of split 'train' (2 of 41)" in said
    few = configured(write_folder(tmp_path / "few", count=19))
    assert (len(open_source(few, "train")), len(open_source(few, "validation"))) == (19, 0)


@pytest.mark.parametrize("name", ["shapes", "words"])
def test_generators(name):
    cfg = Config(data=Data(source=name, size=30))
    train, validation = open_source(cfg, "train"), open_source(cfg, "validation")
    assert len(train) == len(validation) == 30
    for source in (train, validation):
        for i in range(30):
            segments = [(s.height, s.width, s.learn) if isinstance(s, Image) else s for s in source[i].segments]
            assert source.outline(i) == segments
    assert {train[i].split for i in range(30)} == {"train"} and validation[0].split == "test"
    with pytest.raises(ConfigError, match="no split"):
        open_source(Config(data=Data(source=name, split="tets")), "train")


def test_a_generator_mix():
    source = open_source(Config(data=Data(source="words", size=9, generator=(("read", 1.0),))), "train")
    assert all(isinstance(source[i].segments[0], Image) for i in range(9))


def test_vocabulary_choices(tmp_path):
    cfg = configured(write_folder(tmp_path / "set"), vocabulary_size=300)
    source = open_source(cfg, "train")
    trained = open_vocabulary(cfg, source)
    assert trained.fingerprint == Vocabulary.train([f"picture {i}" for i in range(4)], 300).fingerprint
    assert open_vocabulary(configured("", vocabulary="bytes"), source).fingerprint == Vocabulary.bytes().fingerprint
    trained.save(tmp_path / "own.model")
    named = configured("", vocabulary=str(tmp_path / "own.model"))
    assert open_vocabulary(named, source).fingerprint == trained.fingerprint


# TensorFlow Datasets.


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A tiny data set in array_record form, made without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    for i in range(40):
        Image(np.full((10, 16, 3), 3 * i, np.uint8)).save(folder / f"{i}.png")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="png"),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["black_cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(40):
                yield i, {"image": str(folder / f"{i}.png"), "caption": f"grey {3 * i}", "label": i % 2}

    builder = TinyPictures(data_dir=str(folder / "data"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_tfds_without_tensorflow(tfds_folder):
    cfg = configured(tfds_folder, source="tfds", caption_key="caption", image_size=(8, 8))
    train, validation = open_source(cfg, "train"), open_source(cfg, "validation")
    assert (len(train), len(validation)) == (38, 2)
    greys = []
    for source in (train, validation):
        for i in range(len(source)):
            grey = int(source[i].images[0].pixels[0, 0, 0])
            assert source[i] == Document(f"grey {grey}", Image(np.full((8, 8, 3), grey, np.uint8)))
            assert source.outline(i) == [Text(f"grey {grey}"), (8, 8, True)]
            greys.append(grey)
    assert sorted(greys) == [3 * i for i in range(40)]
    labelled = open_source(configured(tfds_folder, source="tfds", caption_key="label", image_size=(8, 8)), "train")
    assert {labelled[i].texts[0] for i in range(9)} == {"black cat", "dog"}
    bare = open_source(configured(tfds_folder, source="tfds", caption_key="", image_size=(8, 8)), "train")
    assert bare[0].texts == [] and bare.outline(0) == [(8, 8, True)]
    part = configured(tfds_folder, source="tfds", split="train[:50%]", validation_split="train[50%:]", caption_key="")
    part = Config(data=Data(**{**vars(part.data), "image_size": (8, 8)}))
    assert len(open_source(part, "train")) == len(open_source(part, "validation")) == 20
    assert "tensorflow" not in sys.modules
    assert Batches(train, Vocabulary.bytes(), Config(model=Model(patch=4), data=cfg.data)).batch(0).tokens.any()


def test_tfds_mistakes(tfds_folder, monkeypatch, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ConfigError, match=r"needs data\.image_size"):
        open_source(configured(tfds_folder, source="tfds"), "train")
    with pytest.raises(ConfigError, match=r"data\.caption_key='text' is no feature of .*; it has caption, label\."):
        open_source(configured(tfds_folder, source="tfds", image_size=(8, 8)), "train")
    with pytest.raises(DataError, match=r"cannot read split 'trian' .*; it has splits train"):
        open_source(configured(tfds_folder, source="tfds", image_size=(8, 8), caption_key="", split="trian"), "train")
    with pytest.raises(DataError, match=r"TFDS cannot open it \(Dataset no_such_data_set not found"):
        open_source(configured("no_such_data_set", source="tfds", image_size=(8, 8)), "train")
    with pytest.raises(DataError, match=r"cannot open it"):
        open_source(configured(tmp_path, source="tfds", image_size=(8, 8)), "train")
    # Known to TFDS, but not on this machine.
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="is not prepared; run `tfds build mnist --file_format=array_record`"):
        open_source(configured("mnist", source="tfds", image_size=(8, 8)), "train")
