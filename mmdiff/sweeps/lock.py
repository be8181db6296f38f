"""One sweep at a time in a workdir.

The lock is the operating system's (flock), so it ends with its holder, however that ends. Runs inherit it: when a sweep is
killed but the run it had started lives on, the next sweep waits for that run instead of training in the same folder.
"""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from mmdiff.config import ConfigError

FILE = "lock"


class Lock:
    """A context manager; `descriptor` is what the runs inherit."""

    def __init__(self, workdir: Path, say: Callable[[str], None] = print, pause: float = 0.5):
        self._path, self._say, self._pause = workdir / FILE, say, pause
        self.descriptor = -1

    def __enter__(self) -> "Lock":
        """Raises ConfigError when another sweep works here, or nothing can be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"{self._path.parent} cannot be written: {error.strerror}; use another --workdir.") from error
        told = False
        while not self._take():
            holder = os.pread(self.descriptor, 32, 0).decode(errors="replace").strip()
            if holder.isdecimal() and _alive(int(holder)):
                os.close(self.descriptor)
                raise ConfigError(f"{self._path.parent} is in use by another sweep, process {holder}; wait for it, or end it.")
            if not told:
                self._say(f"waiting for a run that an earlier sweep left behind in {self._path.parent}")
                told = True
            time.sleep(self._pause)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_) -> None:
        os.close(self.descriptor)

    def _take(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Dead, but not yet waited for by its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
