"""documents.jsonl: every mistake is one line that says where, what and the remedy."""

import json

import numpy as np
import pytest

import mmdiff
from mmdiff.document import DataError, Document, Image, Text, decode_image, parse_line, read_lines, resize

MISTAKES = {
    '{"segments": [': "d.jsonl:7: not valid JSON (Expecting value at column 15).",
    "[]": 'd.jsonl:7: a document is {"segments": [...]} with at least one segment.',
    "{}": 'd.jsonl:7: a document is {"segments": [...]} with at least one segment.',
    '{"segments": []}': 'd.jsonl:7: a document is {"segments": [...]} with at least one segment.',
    '{"segments": ["a"]}': 'd.jsonl:7: segment 1 must hold either "text" or "image".',
    '{"segments": [{"text": "a"}, {"text": "a", "image": "b"}]}': ('d.jsonl:7: segment 2 must hold either "text" or "image".'),
    '{"segments": [{"learn": true}]}': 'd.jsonl:7: segment 1 must hold either "text" or "image".',
    '{"segments": [{"text": "a", "leran": false}]}': (
        'd.jsonl:7: segment 1 has unknown key \'leran\'; allowed beside "text": "learn".'
    ),
    '{"segments": [{"text": " "}]}': "d.jsonl:7: segment 1 is an empty text; fill it in or leave the segment out.",
    '{"segments": [{"image": ""}]}': ("d.jsonl:7: segment 1 is an empty image path; fill it in or leave the segment out."),
    '{"segments": [{"text": 3}]}': "d.jsonl:7: segment 1 is an empty text; fill it in or leave the segment out.",
    '{"segments": [{"text": "a", "learn": 1}]}': 'd.jsonl:7: segment 1: "learn" must be true or false.',
    '{"segments": [{"text": "a"}], "split": 1}': 'd.jsonl:7: "split" must be a string.',
}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image(pixels).save(tmp_path / "a.png")
    return pixels


@pytest.mark.parametrize("line", MISTAKES)
def test_a_bad_line_is_one_line(line):
    with pytest.raises(DataError) as error:
        parse_line(line, "d.jsonl:7")
    assert str(error.value) == MISTAKES[line]


def test_a_good_line(tmp_path, picture):
    value = {"segments": [{"text": "猫 🎉"}, {"image": "a.png", "learn": False}], "split": "test", "id": 3}
    line = parse_line(json.dumps(value, ensure_ascii=False), "d.jsonl:1")
    assert (line.split, line.extra, line.where) == ("test", {"id": 3}, "d.jsonl:1")
    document = line.load(tmp_path)
    assert document == Document("猫 🎉", Image(picture, learn=False))
    assert (document.split, document.extra) == ("test", {"id": 3})
    assert document != Document("猫 🎉", Image(picture))  # learn counts


def test_blank_lines_are_skipped_but_counted(tmp_path):
    (tmp_path / "documents.jsonl").write_text('\n{"segments": [{"text": "a"}]}\n\n  \n{"segments": [{"text": "b"}]}\n')
    assert [line.where for line in read_lines(tmp_path / "documents.jsonl")] == [
        "documents.jsonl:2",
        "documents.jsonl:5",
    ]


def test_missing_and_corrupt_images_name_the_line(tmp_path, picture):
    with pytest.raises(DataError, match=r"^d:1: image .b\.png. not found; paths are relative to documents\.jsonl\.$"):
        parse_line('{"segments": [{"image": "b.png"}]}', "d:1").load(tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"^d:1: image .a\.png.: not a readable image"):
        parse_line('{"segments": [{"image": "a.png"}]}', "d:1").load(tmp_path)


def test_image_open(tmp_path, picture):
    assert Image.open(tmp_path / "a.png") == Image(picture)
    assert Image.open(tmp_path / "a.png", size=(3, 3)).pixels.shape == (3, 3, 3)
    with pytest.raises(DataError, match=r"image '.*nothing\.png' not found"):
        Image.open(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: not a readable image"):
        Image.open(tmp_path / "text.png")


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)])
def test_an_image_is_rgb_uint8(bad):
    with pytest.raises(DataError, match="uint8 pixels"):
        Image(bad)


def test_transparency_is_laid_on_white(tmp_path):
    import PIL.Image

    PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    PIL.Image.new("L", (2, 1), 7).save(tmp_path / "grey.png")
    assert (decode_image((tmp_path / "clear.png").read_bytes()) == 255).all()
    assert (decode_image((tmp_path / "grey.png").read_bytes()) == 7).all()


def test_resize_crops_the_centre_and_keeps_the_aspect():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200  # the central square
    assert (resize(pixels, (5, 5)) == 200).all()
    assert (resize(pixels, (10, 10)) == 200).all()
    assert resize(pixels, (10, 30)) is pixels
    assert not (resize(pixels, (5, 15)) == 200).all()  # the whole image: the check can fail
    assert resize(pixels, (7, 3)).shape == (7, 3, 3)


def test_documents_refuse_other_segments():
    with pytest.raises(DataError, match="not int"):
        Document("a", 3)
    assert repr(Document("a", mmdiff.IMG)) == "Document('a', IMG)"
    assert Document("a").segments == [Text("a")]
