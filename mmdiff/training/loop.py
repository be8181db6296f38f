"""The training loop.

Order, and why:
    restore    state of the newest valid checkpoint; its step is the index of the next batch
    each step  batch(step) -> train_step -> metrics of the step before (so that the device is never waited for)
               -> save after the update: a checkpoint's step is the next batch
               -> samples and validation with the moving average
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.evaluation.sheets import sample_sheet
from mmdiff.parallel.mesh import make_mesh, place_rows, replicated
from mmdiff.sampling.generate import Model
from mmdiff.training import flops, guard
from mmdiff.training.checkpoint import Checkpoints
from mmdiff.training.metrics import Metrics, Progress, read_metrics
from mmdiff.training.run import VOCABULARY_FILE, Run, build
from mmdiff.training.state import TrainState
from mmdiff.training.step import compile_train_step
from mmdiff.training.validate import validate


def train(cfg: config.Config, workdir: str | Path, *, strict: bool = False) -> dict[str, float]:
    """Train, or resume, the run in `workdir`.

    Args:
      cfg: must equal the workdir's own configuration when it has one, up to how often it logs, saves, samples and validates.
      strict: stop at a damaged checkpoint instead of taking an older one.
    Returns:
      the last validation metrics (empty without held-out data).
    Raises:
      ConfigError, DataError, CheckpointError: with the one line to show. guard.Diverged: see training.max_skips.
      Preempted: after SIGTERM, when the state is saved.
    """
    workdir = Path(workdir)
    mesh = make_mesh(cfg.training.batch_size)
    check_workdir(cfg, workdir)
    run = build(cfg, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(workdir / "config.json", cfg.to_json().encode())
    write_whole(workdir / VOCABULARY_FILE, run.vocabulary.to_bytes())
    checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.training.keep, every=cfg.training.checkpoint_every)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)), jax.eval_shape(run.new_state)
    )
    meta = {
        "config": json.loads(cfg.to_json()),
        "data": run.train.fingerprint,
        "vocabulary": run.vocabulary.fingerprint,
    }
    found = checkpoints.latest_valid(like, strict=strict)
    if found is None:
        state = jax.jit(run.new_state, out_shardings=replicated(mesh))()
    else:
        state, saved = found
        _check_same(saved, meta, workdir)
        print(f"resuming {workdir} at step {int(state.step)}", file=sys.stderr)
    try:
        with _Terminate() as terminate:
            return _loop(run, state, workdir, checkpoints, meta, mesh, terminate)
    finally:
        checkpoints.close()


class Preempted(Exception):
    """SIGTERM arrived; the state of the current step was saved."""


def _loop(run: Run, state: TrainState, workdir: Path, checkpoints: Checkpoints, meta, mesh, terminate) -> dict[str, float]:
    settings = run.cfg.training
    start = int(state.step)
    metrics = Metrics(workdir, start, write=jax.process_index() == 0)
    positions = settings.batch_size * run.cfg.layout.row_length
    progress = Progress(
        settings.steps,
        start,
        tokens_per_step=positions,
        flops_per_step=flops.training_flops(run.cfg, run.vocabulary.size),
        peak_flops=flops.peak_flops(jax.devices()),
    )
    begin = time.monotonic()
    # a run that was killed between a save and its validation makes up for it
    behind = start > 0 and not any(r["step"] == start and "x_error" in r for r in read_metrics(workdir))
    validation = _measure(run, state, start, workdir, metrics, begin) if behind else {}
    pending: tuple[int, dict[str, jax.Array], float] | None = None
    compiled = None
    for step, batch in enumerate(run.train.iterate(start, settings.steps), start):
        rows = place_rows(batch, mesh)
        if compiled is None:
            compiled = compile_train_step(run.network, run.cfg, run.tx, state, rows)
            describe(run, compiled)
        learning_rate = None
        if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
            learning_rate = run.schedule(step)  # of this update, up to skipped steps
        state, values = compiled(state, rows)
        if pending is not None:
            _report(*pending, settings, metrics, progress)
        pending = (step + 1, values | ({} if learning_rate is None else {"learning_rate": learning_rate}), begin)
        last, stopping = step + 1 == settings.steps, terminate.asked
        if last or stopping or (step + 1) % settings.checkpoint_every == 0:
            # before the save, which waits for this step anyway: a run resumed from it must not miss the step's line
            _report(*pending, settings, metrics, progress)
            pending = None
            checkpoints.save(step + 1, state, meta, force=True)
        if stopping:
            raise Preempted(f"stopped by SIGTERM; step {step + 1} is saved in {workdir}")
        validation = _measure(run, state, step + 1, workdir, metrics, begin) or validation
    if pending is not None:
        _report(*pending, settings, metrics, progress)
    progress.close()
    metrics.close()
    return validation


def _measure(run: Run, state: TrainState, step: int, workdir: Path, metrics: Metrics, begin: float) -> dict[str, float]:
    """Validate and draw samples, if it is time for them; the validation metrics, or {}."""
    settings, validation = run.cfg.training, {}
    if _due(step, settings.validate_every, settings.steps) and run.validation is not None:
        validation = validate(run.network, run.cfg, state.ema, run.validation, settings.validation_rows)
        metrics.write(step, validation | {"seconds": time.monotonic() - begin})
    path = workdir / "samples" / f"{step:07d}.png"
    if _due(step, settings.sample_every, settings.steps) and jax.process_index() == 0:
        model = Model(run.cfg, state.ema, run.vocabulary)
        metrics.image(step, "samples", sample_sheet(model, run.validation or run.train, path))
    return validation


def _report(step: int, values: dict[str, Any], begin: float, settings, metrics: Metrics, progress: Progress) -> None:
    """Write the metrics of a step that is already followed by the next one."""
    guard.check_diverged(int(values["skips"]), settings.max_skips, step)
    if "learning_rate" not in values:
        return
    host = {name: float(np.asarray(value)) for name, value in values.items()}
    metrics.write(step, host | {"seconds": time.monotonic() - begin})
    progress.report(step, {k: host[k] for k in ("loss", "text_loss", "image_loss")})


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def describe(run: Run, compiled) -> None:
    """Print the parameter table, what a step costs, and how well the rows are filled."""
    params = jax.eval_shape(lambda: run.new_state().params)
    try:
        from clu import parameter_overview

        print(parameter_overview.get_parameter_overview(params, include_stats=False), file=sys.stderr)
    except ImportError:
        print("parameter table: not shown, clu is not installed", file=sys.stderr)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    print(
        f"{count / 1e6:.2f}M parameters; one step: {flops.training_flops(run.cfg, run.vocabulary.size) / 1e9:.1f} GFLOP, "
        f"{run.cfg.training.batch_size} rows of {run.cfg.layout.row_length} positions, "
        f"{memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries; "
        f"{len(run.train.source)} documents, {run.train.rows_per_epoch()} rows an epoch, "
        f"{100 * run.train.waste():.1f}% padding",
        file=sys.stderr,
    )


def check_workdir(cfg: config.Config, workdir: Path) -> None:
    """Refuse to go on with another configuration than the workdir's.

    Raises:
      ConfigError: names the first field that differs.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return
    old = config.Config.from_json(path.read_text())
    free = {f"training.{name}" for name in ("log_every", "checkpoint_every", "keep", "sample_every", "validate_every")}
    before, after = _flat(json.loads(old.to_json())), _flat(json.loads(cfg.to_json()))
    for name, value in after.items():
        if name in free or name.startswith("sampling.") or before.get(name) == value:
            continue
        raise config.ConfigError(
            f"{workdir} was started with {name}={before.get(name)!r}, not {value!r}; use another --workdir, or the old value."
        )


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _check_same(saved: dict, now: dict, workdir: Path) -> None:
    for what, remedy in (("vocabulary", "restore the run's vocabulary.model"), ("data", "use the data it was started with")):
        if saved[what] != now[what]:
            raise DataError(f"{workdir}: the {what} has changed since the checkpoint ({saved[what]} -> {now[what]}); {remedy}.")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    if path.is_file() and path.read_bytes() == data:
        return
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


class _Terminate:
    """Turns SIGTERM into a flag that the loop reads between steps."""

    def __enter__(self):
        self.asked = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread: signals stay with whoever owns it
            self._before = None
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_):
        self.asked = True
