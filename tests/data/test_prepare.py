"""`mmdiff prepare`: all mistakes at once, complete output or none, and a reader that gives back what was written."""

import json
import os
import shutil

import numpy as np
import pytest

from mmdiff.cli.prepare import main
from mmdiff.config import Config, ConfigError, Data
from mmdiff.data import prepare as prepare_module
from mmdiff.data.prepare import InvalidData, prepare
from mmdiff.data.sources import open_source, open_vocabulary
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Document, Image, resize


def pixels(i, size=(8, 12)):
    return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Six documents with interleaved images, odd keys and odd characters."""
    source = tmp_path / "source"
    source.mkdir()
    lines = []
    for i in range(6):
        Image(pixels(i)).save(source / f"{i}.png")
        segments = [{"text": f"猫 number {i}"}, {"image": f"{i}.png", "learn": i != 1}, {"text": "🎉", "learn": False}]
        lines.append({"segments": segments[: 2 + i % 2], "split": "test" if i == 5 else "train", "id": i, "tags": ["a"]})
    (source / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return source


def image_folder(folder, splits=("",), csv=False):
    """An ImageFolder with three captioned images in each split folder."""
    for number, split in enumerate(splits):
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(3):
            Image(pixels(10 * number + i)).save(folder / split / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": f'picture {i}, "{split}"', "mark": i})
        if csv:
            quoted = [f'{r["file_name"]},"{r["text"].replace(chr(34), chr(34) * 2)}",{r["mark"]}' for r in rows]
            (folder / split / "metadata.csv").write_text("\n".join(["file_name,text,mark", *quoted]), "utf-8-sig")
        else:
            (folder / split / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def opened(out, split="train", **data):
    return open_source(Config(data=Data(path=str(out), **data)), split)


def all_of(source):
    return [source[i] for i in range(len(source))]


def test_the_reader_equals_the_folder(folder, tmp_path):
    report = prepare(folder, tmp_path / "out", vocabulary_size=300)
    assert report.splits == {"train": 5, "test": 1} and report.image_sizes == {(8, 12): 6} and report.texts == 9
    for split, size in (("train", None), ("validation", None), ("train", (4, 4))):
        before, after = opened(folder, split, image_size=size), opened(tmp_path / "out", split, image_size=size)
        assert all_of(before) == all_of(after)
        assert [d.extra for d in all_of(before)] == [d.extra for d in all_of(after)]
        assert [before.outline(i) for i in range(len(before))] == [after.outline(i) for i in range(len(after))]
    assert opened(tmp_path / "out").where(3) == "out: documents.jsonl:4"
    # The vocabulary comes with the folder and knows the training texts only.
    cfg = Config(data=Data(path=str(tmp_path / "out")))
    texts = [text for document in all_of(opened(folder)) for text in document.texts]
    assert open_vocabulary(cfg, opened(tmp_path / "out")).fingerprint == Vocabulary.train(texts, 300).fingerprint


def test_the_same_data_gives_the_same_files(folder, tmp_path):
    for name in ("a", "b"):
        prepare(folder, tmp_path / name)
    for file in ("index.json", "vocabulary.model"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_original_files_are_kept_unless_resized(folder, tmp_path):
    import PIL.Image

    PIL.Image.fromarray(pixels(0, (16, 16))).save(folder / "0.png", "jpeg", quality=50)
    prepare(folder, tmp_path / "kept")
    assert (folder / "0.png").read_bytes() in (tmp_path / "kept/documents-00000.array_record").read_bytes()
    report = prepare(folder, tmp_path / "small", image_size=(8, 8))
    assert report.image_sizes == {(8, 8): 6}
    expected = resize(Image.open(folder / "0.png").pixels, (8, 8))
    assert np.array_equal(opened(tmp_path / "small")[0].images[0].pixels, expected)


def test_many_shards_read_as_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 800)
    prepare(folder, tmp_path / "out", vocabulary="bytes")
    assert len(list((tmp_path / "out").glob("*.array_record"))) >= 3
    assert all_of(opened(folder)) == all_of(opened(tmp_path / "out"))
    assert open_vocabulary(Config(data=Data(path=str(tmp_path / "out"))), opened(folder)).fingerprint == (
        Vocabulary.bytes().fingerprint
    )


@pytest.mark.parametrize("csv", [False, True])
def test_image_folder_with_splits(tmp_path, csv):
    source = image_folder(tmp_path / "source", ("train", "test", "val"), csv)
    report = prepare(source, tmp_path / "out", vocabulary="bytes")
    assert report.splits == {"train": 3, "validation": 3, "test": 3}
    for split, name, number in (("train", "train", 0), ("test", "test", 10), ("validation", "val", 20)):
        read = all_of(opened(tmp_path / "out", "validation", validation_split=split))
        assert read == [Document(f'picture {i}, "{name}"', Image(pixels(number + i))) for i in range(3)]
        assert [d.extra for d in read] == [{"mark": str(i) if csv else i} for i in range(3)]


def test_image_folder_lines_may_name_their_split(tmp_path):
    source = image_folder(tmp_path / "source")
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    lines[1]["split"] = "test"
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert prepare(source, tmp_path / "out", vocabulary="bytes").splits == {"train": 2, "test": 1}


def test_every_bad_line_is_reported_and_nothing_is_written(folder, tmp_path, capsys):
    lines = (folder / "documents.jsonl").read_text().split("\n")
    lines[1] = "{"
    (folder / "documents.jsonl").write_text("\n".join(lines))
    (folder / "3.png").unlink()
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:100])
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 65
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in said] == ["documents.jsonl:2", "documents.jsonl:4", "documents.jsonl:6"]
    assert 'image "3.png" not found' in said[1] and "not a readable image" in said[2]
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_many_bad_lines_are_counted(tmp_path):
    (tmp_path / "documents.jsonl").write_text("[]\n" * 30)
    with pytest.raises(InvalidData) as error:
        prepare(tmp_path, tmp_path / "out")
    assert len(error.value.problems) == 30
    assert len(str(error.value).splitlines()) == 21 and str(error.value).endswith("\n... and 10 more.")


CAPTIONS = {
    '{"file_name": "1.png", "text": " "}': ('metadata.jsonl:2: the caption "text" is empty; fill it in or remove the line.'),
    '{"file_name": "1.png", "title": "a"}': ('metadata.jsonl:2: no caption "text"; columns: title. Set --caption-key.'),
    '{"text": "a"}': 'metadata.jsonl:2: no "file_name"; each line names an image file.',
    "[": "metadata.jsonl:2: not valid JSON (Expecting value at column 2).",
    "3": 'metadata.jsonl:2: a line is {"file_name": ..., caption}.',
    '{"file_name": "1.png", "text": "a", "split": 3}': 'metadata.jsonl:2: "split" must be a string.',
    '{"file_name": "9.png", "text": "a"}': ('metadata.jsonl:2: image "9.png" not found; paths are relative to metadata.jsonl.'),
}


@pytest.mark.parametrize("line", CAPTIONS)
def test_bad_metadata_names_file_and_line(tmp_path, line):
    source = image_folder(tmp_path / "source")
    lines = (source / "metadata.jsonl").read_text().split("\n")
    (source / "metadata.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DataError) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value) == CAPTIONS[line]


def test_the_output_is_never_taken_from_somebody(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty; choose another folder or add --overwrite"):
        prepare(folder, mine)
    with pytest.raises(ConfigError, match="was not written by `mmdiff prepare`"):
        prepare(folder, mine, overwrite=True)
    with pytest.raises(ConfigError, match="would replace the source"):
        prepare(folder, tmp_path, overwrite=True)
    prepare(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        prepare(folder, tmp_path / "out")
    prepare(folder, tmp_path / "out", image_size=(4, 4), overwrite=True)
    assert opened(tmp_path / "out")[0].images[0].height == 4
    with pytest.raises(DataError, match="already written"):
        prepare(tmp_path / "out", tmp_path / "again")
    with pytest.raises(DataError, match=r"neither documents\.jsonl nor metadata\.jsonl"):
        prepare(mine, tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "source"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_leaves_what_was_there(folder, tmp_path, monkeypatch, capsys, overwrite):
    if overwrite:
        prepare(folder, tmp_path / "out")
    before = sorted(os.listdir(tmp_path))
    real, calls = prepare_module._convert, []

    def convert(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(prepare_module, "_convert", convert)
    assert main([str(folder), "--out", str(tmp_path / "out"), *["--overwrite"] * overwrite]) == 130
    assert capsys.readouterr().err == "mmdiff prepare: interrupted; nothing was written.\n"
    assert sorted(os.listdir(tmp_path)) == before
    if overwrite:
        assert len(opened(tmp_path / "out")) == 5


def test_command(folder, tmp_path, capsys):
    assert main([str(folder), "--out", str(tmp_path / "out"), "--image-size", "8x4"]) == 0
    said = capsys.readouterr().out
    for part in ("train 5, test 1", "8x4 6", "model.patch=4  median", "some image is not divisible", "--data.path"):
        assert part in said
    assert main(["--help"]) == 0
    assert "examples:" in capsys.readouterr().out
    assert main([str(folder)]) == 2
    assert main([str(folder), "--out", str(tmp_path / "b"), "--image-size", "0"]) == 2
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "b")]) == 65
    assert main([str(folder), "--out", str(tmp_path / "b"), "--vocabulary-size", "9"]) == 2
    assert "Traceback" not in capsys.readouterr().err


# Damage.


def truncate(out):
    shard = out / "documents-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-70000])


def remove(out):
    (out / "documents-00000.array_record").unlink()


def cut_index(out):
    (out / "index.json").write_text((out / "index.json").read_text()[:-9])


def new_version(out):
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(index | {"version": 99}))


def blank(out):
    shard = out / "documents-00000.array_record"
    shard.write_bytes(bytes(shard.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "array_record is damaged: .* bytes, not"),
        (remove, "array_record is missing"),
        (cut_index, "index.json is damaged"),
        (new_version, "has version 99, this mmdiff reads version 1"),
        (blank, "the shards are damaged"),
    ],
)
def test_damage_is_found_when_opened(folder, tmp_path, damage, message):
    prepare(folder, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=rf"{message}.*; write the folder again with `mmdiff prepare") as error:
        opened(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_changed_byte_is_found_when_read(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    shard = tmp_path / "out/documents-00000.array_record"
    data = bytearray(shard.read_bytes())
    at = data.index((folder / "2.png").read_bytes()) + 40
    data[at] ^= 1
    shard.write_bytes(data)
    source = opened(tmp_path / "out")
    assert source[1].texts == ["猫 number 1", "🎉"]
    with pytest.raises(DataError, match=r"^out: documents\.jsonl:3: record 2 of .* is damaged; write the folder again"):
        source[2]


def test_a_moved_folder_still_reads(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert len(all_of(opened(tmp_path / "moved"))) == 5
