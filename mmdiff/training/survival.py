"""What ends a run early: a SIGTERM, heeded by all processes at the same step, and a hang, cut short by a watchdog."""

import faulthandler
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff.parallel.distributed import any_process
from mmdiff.parallel.mesh import AXES


class Preempted(Exception):
    """SIGTERM arrived; the message says what was saved."""


class Stopping(Exception):
    """Raised inside validation and sampling when the run must stop; the loop saves and turns it into Preempted."""


class Termination:
    """Turns a SIGTERM to any process into one decision of all of them. A context manager.

    Between steps nobody waits for it (`at_step`): the flags of all processes meet in a tiny program that runs beside the
    training step and is read one step later. Elsewhere `now` waits for everyone. Every process must call the same
    methods in the same order.
    """

    def __init__(self, mesh: Mesh):
        self.asked = False
        self._everywhere = NamedSharding(mesh, PartitionSpec(AXES))
        self._meet = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._met: jax.Array | None = None

    def __enter__(self):
        try:
            # after jax.distributed.initialize, whose own handler this replaces
            self._before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread: signals stay with whoever owns it
            self._before = None
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_):
        self.asked = True

    def at_step(self) -> bool:
        """Whether the run ends with the step just dispatched."""
        if jax.process_count() == 1:
            return self.asked
        before, flag = self._met, np.asarray([self.asked])
        shape = (self._everywhere.mesh.size,)
        self._met = self._meet(jax.make_array_from_callback(shape, self._everywhere, lambda _: flag))
        return before is not None and bool(np.asarray(before))

    def now(self) -> bool:
        """Whether any process was asked to stop."""
        return any_process(self.asked)


class Watchdog:
    """Ends the process with exit code 1, and the stacks of all threads on stderr, when `beat` is not called in time.

    A thread of the interpreter's own that needs no lock does the work, so that it fires in a hung collective too.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self._stream = sys.__stderr__ or sys.stderr  # the process's own, whatever stands in for it

    def __enter__(self):
        self.beat()
        return self

    def beat(self) -> None:
        """Something was done; the time starts anew."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stream)

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()
