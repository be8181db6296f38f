"""The experiments on lossless input and discrete tokenizers: what they ask, count, keep and show."""

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "experiments" / "lossless_vs_discrete"
