"""`mmdiff` in a process of a test: worker.py EVENT ARGUMENT...

EVENT is something that happens to this process at a moment no signal from outside could hit for certain:

    none                          nothing
    term-in-{evaluation,sampling,compilation}     it receives a SIGTERM while it is at it
    other-code                    its source files differ from the other processes'
    hang                          the data of step 3 never come
"""

import os
import signal
import sys
import threading

from absl import flags

from mmdiff.cli.main import main
from mmdiff.data.batches import Batches
from mmdiff.parallel import distributed
from mmdiff.sampling.session import Session
from mmdiff.training import loop


def terminated(function):
    """`function`, with a SIGTERM to this very process on its way in."""

    def wrapped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    return wrapped


def never(batches: Batches, step: int, members=None):
    if step == 3:
        threading.Event().wait()
    return real_batch(batches, step, members)


real_batch = Batches.batch

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    event = sys.argv[1]
    if event == "term-in-evaluation":
        loop.validate = terminated(loop.validate)
    elif event == "term-in-sampling":
        Session.run = terminated(Session.run)
    elif event == "term-in-compilation":
        loop.compile_train_step = terminated(loop.compile_train_step)
    elif event == "other-code":
        distributed.code_fingerprint = lambda: "0123456789abcdef"
    elif event == "hang":
        Batches.batch = never
    elif event != "none":
        raise SystemExit(f"unknown event {event!r}")
    sys.exit(main(sys.argv[2:]))
