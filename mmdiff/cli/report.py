"""`mmdiff report`: what a sweep has found, as a page and as a table."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mmdiff.cli.arguments import Parser

CANNOT_WRITE = 1
EXAMPLES = """examples:
  mmdiff report runs/block                      writes runs/block/report.html and runs/block/report.md
  mmdiff report runs/block --out docs/block

A sweep that is not finished is reported as far as it is.

exit codes: 0 done, 1 cannot write, 2 wrong usage, 65 no sweep there
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = Parser("mmdiff report", "Compare the arms of a sweep: a page (one file) and a table ready to paste.", EXAMPLES)
    parser.add_argument("workdir", help="folder of a sweep")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: WORKDIR)")
    arguments = parser.parse(argv)
    from mmdiff.sweeps.report import write_report

    out = Path(arguments.out or arguments.workdir)
    try:
        page, table = write_report(Path(arguments.workdir), out)
    except OSError as error:
        print(f"mmdiff report: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return CANNOT_WRITE
    print(table.read_text(encoding="utf-8").split("\n\n## ")[0])
    print(f"\nwrote {page} and {table}")
    return 0
