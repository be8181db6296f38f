"""Plays `mmdiff train` on a host: notes how it was called, then ends as the next word of $FAKE/codes.HOST says.

A number is an exit code; `hang` runs until SIGTERM and then ends with 75; `stubborn` runs until it is killed.
"""

import json
import os
import signal
import sys
import time

FAKE = os.environ["FAKE"]


def read(path, default=""):
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return default


host = read(os.path.expanduser("~/.mmdiff_worker")).strip() or os.environ.get("SLURM_PROCID", "0")
before = read(f"{FAKE}/trainer.{host}").count("\n")
codes = read(f"{FAKE}/codes.{host}", "0").split()
end = codes[min(before, len(codes) - 1)]
if end in ("hang", "stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN if end == "stubborn" else lambda *_: sys.exit(75))

call = {"argv": sys.argv[1:], "commit": read("COMMIT").strip()}
for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES"):
    call[name] = os.environ.get(name, "")
with open(f"{FAKE}/trainer.{host}", "a") as file:
    file.write(json.dumps(call) + "\n")
print("a step", flush=True)

if end in ("hang", "stubborn"):
    time.sleep(60)
    sys.exit("nobody stopped it")
sys.exit(int(end))
