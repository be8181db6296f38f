"""What the commands that sample share: a parser whose complaints are one line, and the sampling options."""

import argparse
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from mmdiff import config

USAGE = 2
DRAWING = ("steps", "guidance", "guidance_rescale", "autoguidance", "solver", "grid")
"""Sampling options that `add_drawing` adds."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and suggestions for misspelt options."""

    def __init__(self, prog: str, description: str, epilog: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} ({self.prog} --help)", file=sys.stderr)
        sys.exit(USAGE)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Like parse_args; an unknown option is met with the nearest known one."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}{config.suggest(unknown[0].split('=')[0], options)}")
        return known


def add_drawing(parser: Parser) -> None:
    """Options of the solver; those left out are the configuration's (`sampling`)."""
    group = parser.add_argument_group("drawing (default: as the run was configured)")
    group.add_argument("--steps", type=int, metavar="N", help="network evaluations per image")
    group.add_argument("--guidance", type=float, metavar="SCALE", help="strength of text guidance, 1 is off")
    group.add_argument("--guidance-rescale", type=float, metavar="R", help="take back the contrast that it adds, 0 to 1")
    group.add_argument("--autoguidance", type=float, metavar="SCALE", help="guidance away from a weaker model, 1 is off")
    group.add_argument("--weak", metavar="RUN[:STEP]", help="that model: another run, or an earlier checkpoint of one")
    group.add_argument("--solver", choices=_choices("solver"))
    group.add_argument("--grid", choices=_choices("grid"), help="noise levels that the solver visits")


def weak_in_vain(arguments: argparse.Namespace) -> bool:
    """Whether a weaker model was named that nothing would use."""
    return arguments.weak is not None and arguments.autoguidance in (None, 1.0)


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The named options that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def image_size(text: str) -> tuple[int, int]:
    """(height, width) from 64 or 48x64."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 64, or HEIGHTxWIDTH as 48x64.")
    return size


def _choices(field: str) -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(config.Sampling)[field])
