"""Folders of samples, and sheets."""

import types

import numpy as np
import pytest

from mmdiff import config
from mmdiff.data.shapes import Shapes
from mmdiff.document import DataError, Document, Image, read_lines
from mmdiff.evaluation.pages import check_free, free_folder, write_documents
from mmdiff.evaluation.sheets import CELL, document_sheet, font, sample_sheet, scaled, wrap

from .oracle import Listed, Oracle

SHAPES = config.Config(data=config.Data(source="shapes"), model=config.Model(patch=8))


def stories(count=2):
    made = Shapes(0, count, 32, 2, (("story", 1.0),), "test")
    return [made[i] for i in range(count)]


def test_what_is_written_reads_back_as_documents(tmp_path):
    documents = [Document(*d.segments, extra={"prompt": 1, "seed": i}) for i, d in enumerate(stories())]
    told = write_documents(documents, tmp_path / "out", "a <title>")
    lines = list(read_lines(tmp_path / "out" / "documents.jsonl"))
    assert [line.load(tmp_path / "out") for line in lines] == documents
    assert [line.extra for line in lines] == [{"prompt": 1, "seed": 0}, {"prompt": 1, "seed": 1}]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "a &lt;title&gt;" in page and page.count("<img") == 4
    assert told[1][3] == "images/0004.png" and (tmp_path / "out" / told[1][3]).is_file()
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no scratch folder is left


def test_blank_texts_are_shown_but_not_written(tmp_path):
    write_documents([Document(" ", "words"), Document(" ")], tmp_path / "out", "")
    (line,) = read_lines(tmp_path / "out" / "documents.jsonl")
    assert line.segments == (("text", "words", True),)


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    write_documents([Document("old")], tmp_path / "out", "")
    monkeypatch.setattr("mmdiff.evaluation.pages.document_sheet", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_documents([Document("new")], tmp_path / "out", "")
    (line,) = read_lines(tmp_path / "out" / "documents.jsonl")
    assert line.segments[0][1] == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_samples_are_overwritten(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    check_free(mine, overwrite=False)
    (mine / "documents.jsonl").touch()
    for overwrite in (False, True):  # training data, perhaps
        with pytest.raises(DataError, match="mine"):
            check_free(mine, overwrite)
    write_documents([Document("x")], tmp_path / "out", "")
    with pytest.raises(DataError, match="not empty"):
        check_free(tmp_path / "out", overwrite=False)
    check_free(tmp_path / "out", overwrite=True)


def test_default_folders_never_meet(tmp_path):
    first = free_folder(tmp_path, "A red circle!")
    first.mkdir()
    assert (first.name, free_folder(tmp_path, "a red circle").name) == ("a-red-circle", "a-red-circle-2")
    assert free_folder(tmp_path, "/../..").name == "samples"


def test_sheets_show_documents_and_samples(tmp_path):
    documents = stories()
    sheet = document_sheet(documents, tmp_path / "a" / "documents.png")
    np.testing.assert_array_equal(Image.open(tmp_path / "a" / "documents.png").pixels, sheet)
    assert sheet.shape[0] > 2 * CELL and sheet.shape[1] > 5 * CELL
    captions = [Document(d.images[0], d.texts[0]) for d in documents]
    draws = [Document(d.texts[0], d.images[0]) for d in documents]
    batches = types.SimpleNamespace(source=Listed([*draws, *captions]), cfg=SHAPES)
    oracle = Oracle(SHAPES, [*draws, *captions])
    sample_sheet(oracle, batches, tmp_path / "sheet.png", count=2)
    assert [(c.get("image_size"), c.get("max_images")) for c in oracle.calls] == [((32, 32), None), (None, 0)]
    empty = types.SimpleNamespace(source=Listed([Document("text")]), cfg=SHAPES)
    assert sample_sheet(oracle, empty, tmp_path / "sheet.png").size


def test_single_images_stand_in_rows(tmp_path):
    drawn = [Document(Image(np.full((32, 32, 3), 10 * i, np.uint8))) for i in range(18)]
    sheet = document_sheet(drawn, tmp_path / "sheet.png")
    assert 4 * CELL < sheet.shape[1] < 6 * CELL and 5 * CELL < sheet.shape[0] < 6.5 * CELL  # 4 beside one another, 5 rows
    assert {10 * i for i in range(18)} <= set(np.unique(sheet).tolist())


@pytest.mark.parametrize("size", [(32, 32), (8, 200), (900, 300)])
def test_images_are_shown_whole_at_a_readable_size(size):
    image = scaled(np.zeros((*size, 3), np.uint8))
    assert max(image.size) <= 448
    assert image.width / image.height == pytest.approx(size[1] / size[0], rel=0.02)


def test_lines_fit_their_width():
    lines = wrap("a word " + "long" * 30, 100)
    assert all(font().getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == "aword" + "long" * 30
    assert wrap("  ", 100) == []
