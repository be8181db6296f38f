"""mmdiff: one transformer that reads and writes documents mixing text and raw-patch images.

The heart is `mmdiff.layout` (documents to rows), `mmdiff.training.loss` (the loss) and `mmdiff.sampling` (the sampler).
"""

from mmdiff.document import IMG, DataError, Document, Image, Text

__version__ = "0.1.0"
__all__ = ["IMG", "DataError", "Document", "Image", "Text", "load", "load_tokenizer"]


def load(workdir, **options):
    """The model of a run: newest valid checkpoint, EMA weights. See `mmdiff.sampling.generate.load` and its `Model`."""
    from mmdiff.sampling.generate import load as load_model

    return load_model(workdir, **options)


def load_tokenizer(workdir, **options):
    """The image tokenizer of a run. See `mmdiff.tokenizers.model.load_tokenizer` and its `Tokenizer`."""
    from mmdiff.tokenizers.model import load_tokenizer as load_it

    return load_it(workdir, **options)
