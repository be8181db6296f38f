"""The words of a V2L tokenizer, of a language model and a network of images and texts: one file (mmdiff/tokenizers/v2l/).

    python experiments/stand_ins/two_tower.py --out runs/stand_ins/two_tower
    python experiments/stand_ins/copying_lm.py --out runs/stand_ins/copying_lm
    python experiments/frozen_lm/words.py --language runs/stand_ins/copying_lm --towers runs/stand_ins/two_tower \\
        --out runs/v2l/words.safetensors

Images are those that the tokenizer will be trained on (experiments/lossless_vs_discrete/tokenizers.py:v2l): scenes. With a
real CLIP the folder needs its tokenizer.json, too (pip install tokenizers reads it), and --templates its own, as "a photo of
a {}."; with a real LLaMA-2 all 32,000 pieces are asked, which takes a GPU.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from mmdiff.config import ConfigError
from mmdiff.data.shapes import PLACES, Shapes
from mmdiff.document import DataError
from mmdiff.in_context.language import load_language
from mmdiff.pretrained.clip import load_clip
from mmdiff.pretrained.load import read_config
from mmdiff.tokenizers.v2l.expand import build_words, bytes_of, pieces_of

TEMPLATES = tuple(f"a {{}} at the {place}" for place in PLACES)  # in the manner of the captions that the stand-in knows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--towers", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--images", type=int, default=2000, help="training images that choose the global words")
    parser.add_argument("--least", type=int, default=2, help="a word named at most so often is none")
    parser.add_argument("--templates", nargs="+", default=list(TEMPLATES), metavar="TEXT")
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error(f"--images {arguments.images} must be at least 1.")
    try:
        language, model = load_language(arguments.language), load_clip(arguments.towers)
        sizes = read_config(arguments.towers)
        longest, end = model.text.place.shape[0], model.text.end
        ids = bytes_of(longest, end) if sizes.get("words") == "bytes" else pieces_of(arguments.towers, longest, end)
        source = Shapes(0, arguments.images, mix=(("draw", 1.0),))
        images = np.stack([source[i].images[0].pixels for i in range(arguments.images)])
        words = build_words(language, model, sizes, ids, images, arguments.templates, arguments.least)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 65
    words.save(arguments.out)
    print(f"{len(words.local_words)} local and {len(words.global_words)} global words: {arguments.out}")
    print("for example " + ", ".join(map(repr, words.global_words[:: max(1, len(words.global_words) // 12)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
