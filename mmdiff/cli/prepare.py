"""`mmdiff prepare`: validate a folder of documents or captioned images and write it as ArrayRecord shards."""

import argparse
import re
import sys
from collections.abc import Sequence

from mmdiff.config import ConfigError
from mmdiff.document import DataError

EXAMPLES = """examples:
  mmdiff prepare my_documents --out data/mine                  a folder with documents.jsonl
  mmdiff prepare faces --out data/faces64 --image-size 64      an ImageFolder with metadata.jsonl; images become 64x64
  mmdiff prepare birds --out data/birds --image-size 48x64 --caption-key description
  mmdiff train experiments/own_data.py --data.path data/mine --workdir runs/mine

exit codes: 0 done, 2 wrong usage, 65 bad data (every bad line is listed; nothing is written)
"""


def _image_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 64, or HEIGHTxWIDTH as 48x64.")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mmdiff prepare",
        description="Validate a folder of data, count it, and write it as ArrayRecord shards with a vocabulary.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder with documents.jsonl, or with metadata.jsonl (metadata.csv) and images")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--image-size",
        type=_image_size,
        metavar="SIZE",
        help="centre-crop and resize; 64 or HEIGHTxWIDTH (default: keep)",
    )
    parser.add_argument("--caption-key", default="text", metavar="KEY", help="metadata: caption column (default: text)")
    parser.add_argument("--vocabulary", choices=("train", "bytes"), default="train", help="default: train on the texts")
    parser.add_argument("--vocabulary-size", type=int, default=512, metavar="N", help="pieces to train (default: 512)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder written by this command before")
    try:
        arguments = vars(parser.parse_args(argv))
    except SystemExit as stop:  # argparse has printed the help, or what is wrong
        return int(stop.code or 0)

    from mmdiff.data.prepare import prepare

    out = arguments["out"]
    try:
        report = prepare(arguments.pop("source"), arguments.pop("out"), **arguments)
    except ConfigError as error:
        print(f"mmdiff prepare: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(error, file=sys.stderr)
        return 65
    except OSError as error:
        print(f"mmdiff prepare: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 74
    except KeyboardInterrupt:
        print("mmdiff prepare: interrupted; nothing was written.", file=sys.stderr)
        return 130
    print(report.table())
    print(f"\n{out} is ready: train with --data.path {out}")
    return 0
