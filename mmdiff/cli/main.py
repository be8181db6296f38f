"""The `mmdiff` command: one thin module per subcommand.

Exit codes: 0 done, 2 usage, 65 bad configuration or data, 70 diverged, 74 a checkpoint could not be written, 75 stopped
by SIGTERM after a save, 1 a crash or the watchdog.
"""

import glob
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from mmdiff.config import ConfigError, suggest
from mmdiff.document import DataError

COMMANDS = {
    "train": "train a model, or resume one: mmdiff train experiments/quickstart.py --workdir runs/quickstart",
    "sample": "draw and write documents: mmdiff sample runs/quickstart --prompt 'a large red circle at the top left'",
    "evaluate": "measure a model: mmdiff evaluate runs/quickstart",
    "tune-grid": "find the noise levels at which few sampling steps do best: mmdiff tune-grid runs/quickstart",
    "sweep": "train the arms of an ablation: mmdiff sweep experiments/ablations/block.py --budget 5m-per-arm --workdir DIR",
    "report": "compare the arms of a sweep: mmdiff report runs/block",
    "plan": "see whether it fits before you book: mmdiff plan experiments/transfusion_7b.py --topology v5p:4x4x8",
    "prepare": "validate a data set and write it as shards: mmdiff prepare my_images --out data/mine",
}
WORKING = ("train", "sweep", "evaluate", "tune-grid")  # commands that compute for minutes
USAGE, BAD_DATA, DIVERGED, NOT_SAVED, PREEMPTED = 2, 65, 70, 74, 75


def help_text() -> str:
    lines = ["usage: mmdiff COMMAND ...", "", "One transformer that reads and writes documents mixing text and images.", ""]
    lines += [f"  {name:<9} {what}" for name, what in COMMANDS.items()]
    return "\n".join([*lines, "", "mmdiff COMMAND --help says more."])


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE
    if arguments[0] == "--version":
        import mmdiff

        print(mmdiff.__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        print(f"mmdiff: unknown command {command!r}{suggest(command, list(COMMANDS))}", file=sys.stderr)
        return USAGE
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    leave_absent_tpu_alone()
    if argv is None and command in WORKING:
        begin_with_large_pages()
    try:
        return importlib.import_module(f"mmdiff.cli.{command.replace('-', '_')}").main(arguments[1:])
    except SystemExit as stop:  # argparse and tyro end this way
        return stop.code if isinstance(stop.code, int) else USAGE
    except (ConfigError, DataError) as error:
        print(f"mmdiff {command}: {error}", file=sys.stderr)
        return BAD_DATA
    except KeyboardInterrupt:
        print(f"mmdiff {command}: interrupted", file=sys.stderr)
        return 130


def leave_absent_tpu_alone() -> None:
    """With libtpu installed (for `mmdiff plan`) but no TPU, JAX would look for one and print pages of alarm."""
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        cuda = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if cuda and glob.glob("/dev/nvidia[0-9]*") else "cpu"


def begin_with_large_pages(pages: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> None:
    """Start this process anew with a glibc that asks for pages of 2 MiB, where Linux gives them to who asks.

    XLA takes fresh memory for the temporaries of every step and gives it back: with pages of 4 KiB a training step of small
    models spends up to two fifths of its time on getting them one by one. GLIBC_TUNABLES is read before Python begins, so it
    takes a new start; set by the user, it stays.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and pages.is_file() and "[madvise]" in pages.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, "-m", "mmdiff", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
