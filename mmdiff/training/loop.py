"""The training loop.

Order, and why:
    agree      all processes run the same code on the same data, or none starts
    restore    state of the newest valid checkpoint; its step is the index of the next batch
    each step  batch(step) -> train_step -> metrics of the step before (so that the device is never waited for)
               -> save after the update: a checkpoint's step is the next batch
               -> samples and validation with the moving average
    SIGTERM    to any process: all save the step they are at and end, also from within validation and sampling

Several processes run this file in step; every branch below depends only on what they share.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmdiff import config
from mmdiff.evaluation.sheets import reconstruction_sheet, sample_sheet
from mmdiff.layout import Rows
from mmdiff.parallel import distributed
from mmdiff.parallel.chips import peak_flops
from mmdiff.parallel.mesh import local_rows, make_mesh, place_rows
from mmdiff.sampling.generate import Model
from mmdiff.tokenizers.model import Tokenizer
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.tower import resolved
from mmdiff.training import flops, guard
from mmdiff.training.checkpoint import Checkpoints
from mmdiff.training.goodput import Goodput
from mmdiff.training.metrics import Metrics, Progress, read_metrics
from mmdiff.training.run import TOKENIZER_FILE, VOCABULARY_FILE, Run, build
from mmdiff.training.state import TrainState
from mmdiff.training.step import compile_train_step
from mmdiff.training.survival import Preempted, Stopping, Termination, Watchdog
from mmdiff.training.validate import VALIDATED, validate
from mmdiff.training.workdir import check_same, check_workdir, write_whole


def train(
    cfg: config.Config, workdir: str | Path, *, strict: bool = False, profile: tuple[int, int] | None = None
) -> dict[str, float]:
    """Train, or resume, the run in `workdir`; with several processes, called by all of them.

    Args:
      cfg: must equal the workdir's own configuration when it has one, up to the fields that training/workdir.py names.
      strict: stop at a damaged checkpoint instead of taking an older one.
      profile: write a profiler trace of the steps [first, last) to WORKDIR/profile.
    Returns:
      the last validation metrics (empty without held-out data).
    Raises:
      ConfigError, DataError, CheckpointError: with the one line to show. guard.Diverged: see training.max_skips.
      SaveError: a checkpoint could not be written. Preempted: after SIGTERM, when the state is saved.
    """
    workdir = Path(workdir)
    cfg = resolved(cfg, workdir)
    first = distributed.is_first()
    goodput = Goodput(workdir, write=first)
    check_workdir(cfg, workdir)
    mesh = make_mesh(cfg.mesh, cfg.training)
    with Termination(mesh) as termination, Watchdog(cfg.training.watchdog) as watchdog:
        run = build(cfg, workdir, mesh)
        meta = {
            "config": json.loads(cfg.to_json()),
            "data": run.train.fingerprint,
            "vocabulary": run.vocabulary.fingerprint,
        }
        shared = {"configuration": cfg.fingerprint(), "data": meta["data"], "vocabulary": meta["vocabulary"]}
        distributed.agree(shared | distributed.environment())
        if first:
            workdir.mkdir(parents=True, exist_ok=True)
            write_whole(workdir / "config.json", cfg.to_json().encode())
            write_whole(workdir / VOCABULARY_FILE, run.vocabulary.to_bytes())
            if run.tokenizer is not None:
                write_whole(workdir / TOKENIZER_FILE, run.tokenizer.to_bytes())
        checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.training.keep, keep_every=cfg.training.keep_every)
        like = run.abstract_state()
        found = checkpoints.latest_valid(like, strict=strict)
        if found is None:
            state = run.first_state()
        else:
            state, saved = found
            check_same(saved, meta, workdir)
            if first:
                print(f"resuming {workdir} at step {int(state.step)}", file=sys.stderr)
        goodput.resume(int(state.step))
        metrics = Metrics(workdir, int(state.step), write=first)
        try:
            return _Loop(run, workdir, checkpoints, meta, metrics, goodput, termination, watchdog, profile).go(state)
        finally:
            metrics.close()
            with goodput.phase("checkpoint"):
                checkpoints.close()
            goodput.write()
            if first:
                print(goodput.summary(), file=sys.stderr)


@dataclasses.dataclass
class _Loop:
    """What the loop needs at every turn, and the loop."""

    run: Run
    workdir: Path
    checkpoints: Checkpoints
    meta: dict[str, Any]
    metrics: Metrics
    goodput: Goodput
    termination: Termination
    watchdog: Watchdog
    profile: tuple[int, int] | None
    begin: float = dataclasses.field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds waited for data up to the last report
    pending: tuple[int, dict[str, jax.Array]] | None = None  # metrics not yet read, and of which step

    @property
    def settings(self) -> config.Training:
        return self.run.cfg.training

    def go(self, state: TrainState) -> dict[str, float]:
        run, settings, start = self.run, self.settings, int(state.step)
        self.waited = self.goodput.seconds["data"]  # of the sessions before, too
        self.progress = self._progress(start)
        # a run that was killed between a save and its validation makes up for it
        behind = distributed.is_first() and start > 0 and not self._validated(start)
        validation = self._measure(state, start) if distributed.from_first(behind) else {}
        compiled = None
        for step, rows in enumerate(self._batches(start), start):
            if compiled is None:
                with self.goodput.phase("compile"):
                    compiled = compile_train_step(run.network, run.cfg, run.tx, state, rows)
                    if distributed.is_first():
                        describe(run, compiled)
                if self.termination.now():
                    self._end(state, start)
            self._profile(step)
            learning_rate = None
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                learning_rate = run.schedule(step)  # of this update, up to skipped steps
            state, values = compiled(state, rows)
            stopping = self.termination.at_step()
            self._report()
            self.pending = step + 1, values | ({} if learning_rate is None else {"learning_rate": learning_rate})
            if stopping or step + 1 == settings.steps or (step + 1) % settings.checkpoint_every == 0:
                self._save(state, step + 1)
            if stopping:
                self._end(state, step + 1)
            validation = self._measure(state, step + 1) or validation
            self.watchdog.beat()
        self._report()
        self._profile(settings.steps)
        self.progress.close()
        return validation

    def _validated(self, step: int) -> bool:
        return any(record["step"] == step and VALIDATED & record.keys() for record in read_metrics(self.workdir))

    def _batches(self, start: int) -> Iterator[Rows]:
        """Global batches of the steps from `start` on; every process reads only its own rows of them."""
        run, settings = self.run, self.settings
        batches = run.train.iterate(start, settings.steps, local_rows(run.mesh, settings.batch_size))
        while True:
            with self.goodput.phase("data"):
                batch = next(batches, None)
                if batch is None:
                    return
                rows = place_rows(batch, run.mesh, settings.batch_size)
            self.goodput.enter("step")
            yield rows

    def _save(self, state: TrainState, step: int) -> None:
        self._report()  # the save waits for this step anyway, and a run resumed from it must not miss the step's line
        with self.goodput.phase("checkpoint"):
            self.checkpoints.save(step, state, self.meta)
            self.goodput.saved(step)

    def _end(self, state: TrainState, step: int) -> None:
        """All processes were told to stop and are here."""
        self._save(state, step)  # does nothing if that step is there
        with self.goodput.phase("checkpoint"):
            self.checkpoints.wait()
        self.progress.close()
        raise Preempted(f"stopped by SIGTERM; step {step} is saved in {self.workdir}")

    def _measure(self, state: TrainState, step: int) -> dict[str, float]:
        """Validate and draw samples, if it is time for them; the validation metrics, or {}."""
        try:
            with self.goodput.phase("evaluation"):
                return self._measured(state, step)
        except Stopping:
            self._end(state, step)
            raise

    def _measured(self, state: TrainState, step: int) -> dict[str, float]:
        run, settings, validation = self.run, self.settings, {}
        if _due(step, settings.validate_every, settings.steps) and run.validation is not None:
            validation = validate(run.network, run.cfg, state.ema, run.validation, settings.validation_rows, self._between)
            self.metrics.write(step, validation | {"seconds": time.monotonic() - self.begin})
        if _due(step, settings.sample_every, settings.steps):
            path = self.workdir / "samples" / f"{step:07d}.png" if distributed.is_first() else None
            self.metrics.image(step, "samples", self._sheet(state, path))
        return validation

    def _sheet(self, state: TrainState, path: Path | None) -> np.ndarray:
        run = self.run
        batches = run.validation or run.train
        if isinstance(run.network, TokenizerNetwork):
            return reconstruction_sheet(Tokenizer(run.cfg, state.ema, run.mesh), batches, path)
        model = Model(run.cfg, state.ema, run.vocabulary, run.mesh, between=self._between, tokenizer=run.tokenizer)
        return sample_sheet(model, batches, path)

    def _between(self) -> None:
        """Called between the pieces of validation and sampling."""
        self.watchdog.beat()
        if self.termination.now():
            raise Stopping

    def _report(self) -> None:
        """Read and write the metrics of the step before, if that was not done yet."""
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        guard.check_diverged(int(values["skips"]), self.settings.max_skips, step)
        if "learning_rate" not in values:
            return
        host = {name: float(np.asarray(value)) for name, value in values.items()}
        waited = self.goodput.seconds["data"]
        host["data_wait"], self.waited = waited - self.waited, waited
        self.metrics.write(step, host | {"seconds": time.monotonic() - self.begin})
        self.goodput.write()
        if distributed.is_first():
            names = ("loss", "text_loss", "image_loss") if self.run.network.vocabulary_size else ("loss",)
            self.progress.report(step, {name: host[name] for name in names}, host["data_wait"])

    def _progress(self, start: int) -> Progress:
        run, settings = self.run, self.settings
        return Progress(
            settings.steps,
            start,
            tokens_per_step=settings.batch_size * run.cfg.layout.row_length,
            flops_per_step=flops.training_flops(run.cfg, run.vocabulary.size),
            peak_flops=peak_flops(list(run.mesh.devices.flat)),
        )

    def _profile(self, step: int) -> None:
        if self.profile is not None and step == self.profile[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        if self.profile is not None and step == min(self.profile[1], self.settings.steps):
            jax.profiler.stop_trace()
            self.profile = None


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
