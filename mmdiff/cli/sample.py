"""`mmdiff sample`: draw, describe, continue and repaint with a trained model; writes a folder of documents."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdiff import config
from mmdiff.cli.arguments import DRAWING, Parser, add_drawing, given, image_size, weak_in_vain
from mmdiff.cli.programs import keep_programs
from mmdiff.document import IMG, DataError, Document, Image, read_lines, resize

OPTIONS = (*DRAWING, "temperature", "top_k", "top_p", "min_p", "max_tokens", "max_images")
CANNOT_WRITE = 74
EXAMPLES = """examples:
  mmdiff sample runs/quickstart --prompt "a large red circle at the top left" --images 4
  mmdiff sample runs/quickstart --image scene.png                         describe an image
  mmdiff sample runs/celeba_hq_64 --images 16
  mmdiff sample runs/quickstart --image scene.png --prompt "what colour is the circle?" --images 0
  mmdiff sample runs/quickstart --image scene.png --prompt "make the circle red"
  mmdiff sample runs/quickstart --prompt "first, a small blue cross at the top right" --images 0
                                                                          the model decides when to draw
  mmdiff sample runs/faces --inpaint face.png --mask hair.png --prompt "A woman with blond hair."
  mmdiff sample runs/quickstart --document data/mine/documents.jsonl --images 1 --out samples/mine

The folder holds index.html, sheet.png, documents.jsonl (which the trainer reads) and images/.
exit codes: 0 done, 2 wrong usage, 65 bad run, prompt or image, 74 cannot write
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse(argv)
    problem = _problem(arguments)
    if weak_in_vain(arguments):
        problem = "--weak is for --autoguidance; give its SCALE, as --autoguidance 2"
    if problem:
        parser.error(problem)
    from mmdiff.cli.evaluate import load
    from mmdiff.evaluation.pages import check_free, free_folder, write_documents

    files = arguments.document or arguments.image or arguments.inpaint
    name = arguments.prompt[0] if arguments.prompt else Path(files[0]).stem if files else "images"
    out = Path(arguments.out) if arguments.out else free_folder(Path(arguments.workdir) / "samples", name)
    check_free(out, arguments.overwrite)
    keep_programs(arguments.workdir)
    model = load(arguments.workdir, arguments.weak)
    options = given(arguments, OPTIONS)
    if arguments.guidance_interval is not None:
        options["guidance_interval"] = tuple(arguments.guidance_interval)
    try:
        model.options(**options)
    except config.ConfigError as error:
        parser.error(str(error))
    size = arguments.image_size or model.cfg.fixed_size
    made = _inpaint(model, arguments, size, options) if arguments.inpaint else _generate(model, arguments, size, options)
    try:
        told = write_documents(made, out, f"{Path(arguments.workdir).name}: {name}".removesuffix(": "))
    except OSError as error:
        print(f"mmdiff sample: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return CANNOT_WRITE
    for document, names in zip(made, told, strict=True):
        pairs = zip(document.segments, names, strict=True)
        print(" ".join(f"[{name}]" if isinstance(segment, Image) else printable(name) for segment, name in pairs))
    images = sum(len(document.images) for document in made)
    print(f"wrote {counted(len(made), 'document')} with {counted(images, 'image')} to {out}; open {out / 'index.html'}")
    return 0


def printable(text: str) -> str:
    """A text that cannot move the terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def prompts(arguments: argparse.Namespace, size: tuple[int, int] | None, patch: int) -> list[Document]:
    """Every text after every image, or either alone, or the lines of --document; IMG is added elsewhere."""
    if arguments.document:
        lines = [(Path(name), line) for name in arguments.document for line in read_lines(name)]
        loaded = [line.load(path.parent) for path, line in lines]
        return [Document(*(fitted(s, size, patch) if isinstance(s, Image) else s for s in d.segments)) for d in loaded]
    images = [fitted(Image.open(path), size, patch) for path in arguments.image or []]
    texts = [[text] if text else [] for text in arguments.prompt or []]
    if not images:
        return [Document(*text) for text in texts or [[]]]
    return [Document(image, *text) for image in images for text in texts or [[]]]


def fitted(image: Image, size: tuple[int, int] | None, patch: int) -> Image:
    """Centre-cropped and resized to `size`, or to whole patches."""
    if size is None:
        size = max(image.height // patch, 1) * patch, max(image.width // patch, 1) * patch
    if size != (image.height, image.width):
        print(f"image of {image.height}x{image.width} cropped and resized to {size[0]}x{size[1]}", file=sys.stderr)
    return Image(resize(image.pixels, size))


def _generate(model, arguments: argparse.Namespace, size, options: dict) -> list[Document]:
    asked = prompts(arguments, size, model.cfg.model.patch)
    count = arguments.images
    if count is None:
        count = 1 if arguments.prompt else 0
    if count:
        options = {"max_tokens": 0} | options
        asked = [Document(*document.segments, IMG) for document in asked for _ in range(count)]
    seeds = [arguments.seed + i % max(count, 1) for i in range(len(asked))]
    made = model.generate(asked, seed=seeds, image_size=size, **options)
    return [
        Document(*m.segments, extra={"prompt": sum(s is not IMG for s in a.segments), "seed": seed} | m.extra)
        for a, m, seed in zip(asked, made, seeds, strict=True)
    ]


def _inpaint(model, arguments: argparse.Namespace, size, options: dict) -> list[Document]:
    original, patch = Image.open(arguments.inpaint[0]), model.cfg.model.patch
    painted = Image.open(arguments.mask)
    if (painted.height, painted.width) != (original.height, original.width):
        raise DataError(
            f"--mask {arguments.mask} is {painted.height}x{painted.width} but the image is "
            f"{original.height}x{original.width} (height x width); they must agree."
        )
    image = fitted(original, size, patch)
    mask = resize(painted.pixels, (image.height, image.width)).mean(-1) > 127
    made = []
    for text in arguments.prompt or [""]:
        for variant in range(1 if arguments.images is None else arguments.images):
            seed = arguments.seed + variant
            result = model.inpaint(image, np.asarray(mask), text, seed=seed, **options)
            given_text = [text] if text else []
            made.append(Document(*given_text, result, extra={"prompt": len(given_text), "seed": seed}))
    return made


def _problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the combination of arguments, or None."""
    if arguments.inpaint:
        if not arguments.mask:
            return "--inpaint needs --mask: an image of the same size, white where to repaint"
        if arguments.image or arguments.document or arguments.image_size or arguments.images == 0:
            return "--inpaint draws over one image; leave out --image, --document, --image-size and --images 0"
        if len(arguments.inpaint) > 1:
            return "--inpaint takes one image; run the command once for each"
    elif arguments.mask:
        return "--mask needs --inpaint"
    elif not (arguments.prompt or arguments.image or arguments.document or arguments.images):
        return "give --prompt, --image, --document, --inpaint, or --images N alone to draw from nothing"
    elif arguments.document and (arguments.prompt or arguments.image):
        return "--document is a prompt by itself; leave out --prompt and --image"
    if arguments.images is not None and arguments.images < 0:
        return f"--images {arguments.images} must not be negative"
    return None


def _parser() -> Parser:
    parser = Parser("mmdiff sample", "Draw images and write texts with a trained model.", EXAMPLES)
    parser.add_argument("workdir", help="folder of a training run")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to start from; may be repeated")
    parser.add_argument("--image", action="append", metavar="FILE", help="image to start from, before the text")
    parser.add_argument("--document", action="append", metavar="FILE", help="prompts in the form of documents.jsonl")
    about = "images to draw for each prompt, seed by seed; 0 lets the model continue freely (default: 1 with --prompt, else 0)"
    parser.add_argument("--images", type=int, metavar="N", help=about)
    parser.add_argument("--inpaint", action="append", metavar="FILE", help="image to repaint where --mask is white")
    parser.add_argument("--mask", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image of each prompt (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: a new one in WORKDIR/samples)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier folder of samples")
    add_drawing(parser)
    about = "noise levels between which guidance acts"
    parser.add_argument("--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help=about)
    parser.add_argument("--image-size", type=image_size, metavar="HxW", help="default: that of the training data")
    group = parser.add_argument_group("writing (default: as the run was configured)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token (default: 1)")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="only the most likely tokens that make up P")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the likeliest")
    group.add_argument("--max-tokens", type=int, metavar="N", help="text tokens per document (default: 0 with --images)")
    group.add_argument("--max-images", type=int, metavar="N", help="images that the model may start by itself")
    return parser
