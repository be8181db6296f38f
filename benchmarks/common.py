"""What the benchmarks share: workers that are measured in turn, the peer's own environment, the machine in words.

A worker is a process that stays alive and answers one request at a time, one JSON object per line:

    driver -> worker           {"do": "time", "task": "train_step", "calls": 3}
    worker -> driver   answer: {"wall_seconds": 1.2, "cpu_seconds": 2.3, "idle_cpu_seconds": 0.0}

Between requests it waits for its next line of input and does nothing, so what the others do is measured alone;
`idle_cpu_seconds` (the CPU time it used since its last answer) shows that this holds. Only the standard library is
imported here, because workers run in environments of their own.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER = "transfusion-pytorch==0.20.0"
PEER_VENV = HERE.parent / ".venv-transfusion-pytorch"
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWER = "answer: "  # starts an answer; what a library prints is ignored
SETTLE_SECONDS = 0.2  # thread pools spin for a moment after their last work


class BenchmarkError(RuntimeError):
    """What went wrong, in one line for the user."""


# The worker's side.


def serve(handlers: dict[str, Callable[..., dict]]) -> None:
    """Answer requests until the input closes; `handlers[do](**rest of the request)` gives the answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed from here on goes to the log
    busy_until = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - busy_until
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        busy_until = time.process_time()
        print(ANSWER + json.dumps(answer | {"idle_cpu_seconds": idle}), file=answers, flush=True)


def timing_handlers(tasks: dict[str, Callable[[], tuple[Callable[[], Any], dict]]], about: dict) -> dict[str, Callable]:
    """Handlers `describe`, `warm`, `time` and `memory` for named tasks.

    Args:
      tasks: a task is made once, by a function that returns what to call and what to say about it.
      about: the answer to `describe`.
    """
    imported = peak_megabytes()
    made: dict[str, tuple[Callable[[], Any], dict]] = {}

    def warm(task: str, calls: int) -> dict:
        """Make the task, compile it, let tuners settle; tells how long one call takes afterwards."""
        if task not in made:
            made[task] = tasks[task]()
        call, note = made[task]
        seconds = [clocked(call) for _ in range(calls)]
        return {"seconds": min(seconds), "first_seconds": seconds[0], "note": note}

    def timed(task: str, calls: int) -> dict:
        call = made[task][0]
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

    def memory(task: str, calls: int) -> dict:
        """Peak of this process so far, and before it made anything; ask a fresh worker."""
        call, _ = tasks[task]()
        for _ in range(calls):
            call()
        return {"peak_megabytes": peak_megabytes(), "imported_megabytes": imported}

    return {"describe": lambda: about, "warm": warm, "time": timed, "memory": memory}


def clocked(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_megabytes() -> float:
    """Largest resident set of this process so far, 2^20 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# The driver's side.


class Worker:
    """A process running a script that calls `serve`."""

    def __init__(self, name: str, python: str | Path, script: str | Path, *arguments: str):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        # quiet progress bars; the scripts import this module
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]), TQDM_DISABLE="1")
        self.process = subprocess.Popen(
            [str(python), "-u", str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.idle_cpu_seconds = 0.0

    def ask(self, do: str, **request) -> dict:
        """One request, one answer.

        Raises:
          BenchmarkError: the worker reports an error or is gone; its last words are in the message.
        """
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = next((line for line in self.process.stdout if line.startswith(ANSWER)), "")
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            code = self.process.returncode
            raise BenchmarkError(f"the worker {self.name!r} ended with exit code {code}:\n{self.last_words()}")
        answer = json.loads(line.removeprefix(ANSWER))
        if "error" in answer:
            raise BenchmarkError(f"the worker {self.name!r} cannot {do}: {answer['error']}\n{self.last_words()}")
        self.idle_cpu_seconds += answer.pop("idle_cpu_seconds", 0.0)
        return answer

    def last_words(self, lines: int = 6) -> str:
        self.log.seek(0)
        return "\n".join("    " + line for line in self.log.read().splitlines()[-lines:])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.process.kill()
        self.close()


def rounds_in_turn(workers: list[Worker], task: str, calls: dict[str, int], rounds: int) -> Iterator[dict[str, dict]]:
    """Per round, each worker's seconds per call; who goes first rotates."""
    for number in range(rounds):
        shift = number % len(workers)
        measured = {}
        for worker in workers[shift:] + workers[:shift]:
            time.sleep(SETTLE_SECONDS)
            busy = busy_cpu_seconds()
            answer = worker.ask("time", task=task, calls=calls[worker.name])
            others = (busy_cpu_seconds() - busy - answer["cpu_seconds"]) / answer["wall_seconds"]
            measured[worker.name] = {key: value / calls[worker.name] for key, value in answer.items()}
            measured[worker.name]["cores_used_by_others"] = max(0.0, others)
        yield measured


def busy_cpu_seconds() -> float:
    """CPU time that all processes together have used since the machine started; 0 where the system does not tell."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def compare(rounds: list[dict[str, dict]], ours: str, peer: str) -> dict[str, float]:
    """Medians over the rounds; a speedup is the median of the per-round ratios peer / ours."""
    wall = [r[peer]["wall_seconds"] / r[ours]["wall_seconds"] for r in rounds]
    cpu = [r[peer]["cpu_seconds"] / r[ours]["cpu_seconds"] for r in rounds]
    return {
        "speedup": statistics.median(wall),
        "speedup_lowest": min(wall),
        "speedup_highest": max(wall),
        "cpu_seconds_ratio": statistics.median(cpu),
    }


def median_seconds(rounds: list[dict[str, dict]], name: str, clock: str = "wall_seconds") -> float:
    return statistics.median(r[name][clock] for r in rounds)


def peer_python(venv: Path = PEER_VENV) -> Path:
    """The interpreter of the peer's environment; makes the environment and installs the peer if it is missing.

    Raises:
      BenchmarkError: an installation failed.
    """
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    check = [str(python), "-c", "import torch, transfusion_pytorch"]
    if python.exists() and subprocess.run(check, capture_output=True).returncode == 0:
        return python
    say(f"installing {PEER} and {TORCH} (CPU) into {venv} ...")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # the CPU build first: the one on PyPI brings gigabytes of CUDA libraries on Linux
    torch = [[TORCH, "--index-url", TORCH_CPU_INDEX, "--retries", "0"], [TORCH], ["torch"]]
    _run([sys.executable, "-m", "venv", str(venv)])
    for attempt in torch:
        if subprocess.run([*pip, *attempt], capture_output=True).returncode == 0:
            break
        say(f"pip install {' '.join(attempt)} failed, trying the next source")
    else:
        raise BenchmarkError(f"torch cannot be installed into {venv}; install it there by hand and run again.")
    _run([*pip, PEER])
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{done.stderr[-1500:]}")


def machine() -> dict[str, Any]:
    """Hardware, system, date and how busy the machine is."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gigabytes": round(pages / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def warn_if_busy(load_average: float) -> None:
    """Neither seconds nor ratios survive other work: threads that spin while they wait for each other lose most."""
    if load_average > 0.5:
        say(f"warning: the machine is busy (load average {load_average:.1f}): the figures are not to be trusted")


def say(line: str) -> None:
    """Progress goes to stderr, so that stdout holds results only."""
    print(line, file=sys.stderr, flush=True)


def versions(*packages: str) -> dict[str, str]:
    import importlib.metadata

    return {package: importlib.metadata.version(package) for package in packages}
