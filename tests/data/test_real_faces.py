"""Real photographs through the ordinary path: an ImageFolder, prepare, rows. Needs the folder named by MMDIFF_TEST_DATA."""

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmdiff import config_files
from mmdiff.data.batches import Batches
from mmdiff.data.prepare import prepare
from mmdiff.data.sources import open_source, open_vocabulary
from mmdiff.document import Image
from mmdiff.layout import unpatchify

COUNT = 300
FACES = Path(os.environ.get("MMDIFF_TEST_DATA", "")) / "celeba10k_89x109.zip"

pytestmark = pytest.mark.skipif(
    "MMDIFF_TEST_DATA" not in os.environ or not FACES.is_file(),
    reason="set MMDIFF_TEST_DATA to the folder that holds celeba10k_89x109.zip",
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """The first faces in the ImageFolder convention, prepared at 64 x 64."""
    folder, out = tmp_path_factory.mktemp("faces"), tmp_path_factory.mktemp("out") / "prepared"
    with zipfile.ZipFile(FACES) as packed:
        lines = packed.read("meta.jsonl").decode().splitlines()[:COUNT]
        for line in lines:
            packed.extract(json.loads(line)["file"], folder)
    renamed = [json.dumps({"file_name": json.loads(line)["file"]} | json.loads(line)) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(renamed) + "\n")
    prepare(folder, out, image_size=(64, 64), caption_key="caption_en")
    return folder, out, [json.loads(line) for line in lines]


def batches(out: Path) -> Batches:
    experiment = config_files.load_experiment(Path(__file__).parents[2] / "experiments" / "faces_64.py")
    cfg = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, path=str(out)))
    source = open_source(cfg, "train")
    return Batches(source, open_vocabulary(cfg, source), cfg)


def test_every_caption_survives_and_rows_are_well_filled(faces):
    _, out, metas = faces
    made = batches(out)
    captions = [m["caption_en"] for m in metas if m["split"] == "train"]
    assert [made.source[i].texts[0] for i in range(len(made.source))] == captions
    vocabulary = made.vocabulary
    assert all(vocabulary.decode(vocabulary.encode(caption)) == caption for caption in captions)
    assert made.waste() < 0.10


def test_pixels_in_a_row_are_the_centre_of_the_photograph(faces):
    folder, out, metas = faces
    made = batches(out)
    wanted = {Image.open(folder / m["file"], (64, 64)).pixels.tobytes() for m in metas}
    row = made.row(0)
    blocks = np.flatnonzero(row.noised & (row.block_start == np.arange(len(row.tokens))))
    assert len(blocks)
    for start in blocks:
        pixels = unpatchify(row.patches[start : row.block_end[start]], 8, 8)
        assert pixels.tobytes() in wanted
    assert pixels[:, ::-1].tobytes() not in wanted  # the comparison can fail
