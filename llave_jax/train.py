"""Train an embedding model.

    python -m llave_jax.train --config NAME --workdir DIR [--config.KEY=VALUE ...]

Running the same command again continues from the latest checkpoint, to the same result as without
the interruption. WORKDIR is then a model for `evaluate`, `embed` and `Embedder.from_pretrained`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import grain
import jax

from llave_jax.common import command_line
from llave_jax.common.directories import closed_to_other_writers
from llave_jax.common.files import write_text
from llave_jax.config import Config
from llave_jax.data.pipeline import skip_limit
from llave_jax.data.skips import TooManySkips
from llave_jax.data.sources import PairSource
from llave_jax.inputs.chat import check_vocabulary
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.parallel import peers, processes, sharding, stopping
from llave_jax.training import batch_shape, run_files, setup, workdir_lock
from llave_jax.training.batch_search import BatchSearch, with_batch
from llave_jax.training.checkpoint import Checkpoints
from llave_jax.training.config_check import check_config
from llave_jax.training.evaluation import TrainingEvaluation
from llave_jax.training.finite import check_finite
from llave_jax.training.goodput import CHECKPOINT, DATA_WAIT, EVALUATION, STEPS, Clock
from llave_jax.training.metrics import MetricsWriter
from llave_jax.training.profiling import Profile
from llave_jax.training.skipped_rows import check_skipped_rows, report_skipped_rows
from llave_jax.training.state import TrainState
from llave_jax.training.train_step import TrainStep
from llave_jax.training.watch import Watch
from llave_jax.training.workdir_lock import WorkdirInUse

log = logging.getLogger(__name__)

# Exit status where another run is in WORKDIR. Launchers may try again.
IN_USE = 1


def train(config: Config, workdir: Path) -> bool:
    """Runs, or continues, the training that `config` describes.

    Args:
      config: of the run.
      workdir: where the run is kept; made if it is not there.

    Returns:
      Whether the run is complete. If not, it was told to stop and has saved.

    Raises:
      WorkdirInUse: another run is in `workdir`.
      StopRequested: the run was told to stop before its first step.
      ValueError, OSError: the config does not describe a run, data or model are not what they should
        be, or `workdir` holds another run. The message names the file or the config's key.
      FloatingPointError: the loss or the gradient of a step is not finite, or what is to be saved.
      TooManySkips: more rows cannot be used than `data.max_skip_share` allows.
    """
    check_config(config)
    run_files.check_processes(config, workdir)
    with closed_to_other_writers(), stopping.listen() as stop, workdir_lock.locked(workdir):
        clock = Clock(workdir, enabled=jax.process_index() == 0)
        try:
            complete = _train(config, workdir, stop, clock)
        except BaseException as error:
            clock.end(type(error).__name__)
            raise
        clock.end("complete" if complete else "stopped")
        return complete


@dataclasses.dataclass
class _Run:
    """A run that is set up. All but `state` and the skipped rows stay as they are."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    source: PairSource
    iterator: grain.DatasetIterator
    step: TrainStep
    checkpoints: Checkpoints
    writer: MetricsWriter
    evaluation: TrainingEvaluation
    watch: Watch
    start: int
    total_steps: int
    state: TrainState
    skipped: tuple[str, ...] = ()


def _train(config: Config, workdir: Path, stop: stopping.Stopping, clock: Clock) -> bool:
    with contextlib.ExitStack() as begins:
        # Up to the end of the first step there is nothing to save.
        begins.enter_context(stop.interruptible())
        run = _set_up(config, workdir, clock)
        complete, last_step = _make_steps(run, stop, clock, begins)
    return _finish(run, clock, complete, last_step)


def _set_up(config: Config, workdir: Path, clock: Clock) -> _Run:
    first_process = jax.process_index() == 0
    if first_process:
        workdir_lock.remove_leftovers(workdir)
        run_files.record_config(config, workdir)
    config = setup.with_local_model(config)
    mesh = setup.make_mesh(config)
    data_path, tokenizer_path = setup.locate_data(config, workdir)
    llave_config = setup.model_config(config)
    tokenizer = setup.load_tokenizer(config, tokenizer_path)
    check_vocabulary(tokenizer, llave_config.text.vocab_size)
    if first_process:
        run_files.record_model(config, llave_config, tokenizer_path, workdir)
    source, held_out = setup.open_sources(config, data_path)
    builder = SequenceBuilder(tokenizer, llave_config.input_spec)
    measure = functools.partial(setup.measure_data, config, source, builder)
    subsets = tuple(source.subsets)
    search = BatchSearch(config, llave_config, mesh, len(source), measure, subsets=subsets)
    plan = run_files.record_batch_plan(config, sharding.num_shards(mesh), search.find, workdir)
    config = with_batch(config, plan.pairs, plan.micro_batches)
    total_steps = batch_shape.total_steps(config, len(source), plan.fill)
    log.info(
        "%d pairs, %d steps of about %d", len(source), total_steps, config.batch.pairs * plan.fill
    )
    log.info("a device and micro-batch has %s", plan)

    iterator = setup.make_iterator(config, source, builder, plan, mesh, workdir)
    training = search.training(config, plan, total_steps)
    checkpoints = Checkpoints(
        workdir, keep=config.checkpoint.keep, about={"config": json.loads(config.to_json())}
    )
    state = setup.make_state(config, training, mesh, checkpoints, iterator)
    start = int(state.step)
    if start > total_steps:
        raise ValueError(
            f"{workdir} holds a run of {start} steps, and the config asks for {total_steps}; raise "
            "--config.steps or --config.data.epochs to train longer, or use another --workdir"
        )
    writer = setup.make_writer(config, workdir, start if checkpoints.latest_step else -1)
    evaluation = setup.make_evaluation(
        config, training.model, tokenizer, mesh, workdir, held_out, start
    )
    if not evaluation.has_stopped and evaluation.due(start, total_steps):
        with clock.spent(EVALUATION):
            evaluation.run(state.params, start, writer, learned=state.loss)
    watch = setup.make_watch(config, writer, training.schedule, total_steps, start, clock, workdir)
    clock.begin(start)
    return _Run(
        *(config, workdir, mesh, source, iterator, training.step, checkpoints),
        *(writer, evaluation, watch, start, total_steps, state),
    )


def _make_steps(
    run: _Run, stop: stopping.Stopping, clock: Clock, begins: contextlib.ExitStack
) -> tuple[bool, int]:
    """Trains up to the last step, or until the run is told to stop.

    Returns:
      Whether all is done and scored, and the last step done.
    """
    config, evaluation, checkpoints = run.config, run.evaluation, run.checkpoints
    last_step, told = run.start, False
    # A checkpoint that is being written is completed, also after an error.
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(Profile(config, run.workdir)) as profile,
        run.watch.progress,
    ):
        for step in range(run.start + 1, run.total_steps + 1):
            if evaluation.has_stopped:
                break
            profile.before(step)
            metrics = _make_step(run, step, stop, clock)
            last_step = step
            if step == run.start + 1:
                begins.close()
                clock.turn_to(STEPS)
            profile.after(step, metrics)
            told = stop.at(step) | checkpoints.must_stop(step)
            is_last = step == run.total_steps
            evaluates = evaluation.due(step, run.total_steps)
            if is_last or (evaluates and config.eval.patience is not None):
                # It may be the run's last line. The line of its evaluation is the sign that it is over.
                run.watch.drain()
                run.watch.write_last()
            # A step is saved before it is evaluated: an evaluation that is stopped is begun again.
            if told or is_last or evaluates or step % config.checkpoint.every == 0:
                _save(run, clock)
            if told:
                log.warning("told to stop: step %d is saved; the same command goes on", step)
                break
            if evaluates:
                try:
                    with clock.spent(EVALUATION), stop.interruptible(checkpoints.wait):
                        evaluation.run(
                            *(run.state.params, step, run.writer, checkpoints.wait),
                            learned=run.state.loss,
                        )
                except stopping.StopRequested:
                    log.warning("told to stop: step %d is saved, and not yet evaluated", step)
                    told = True
                    break
                run.watch.restart_clock()
        begins.close()
        run.watch.drain()
    is_evaluated = not (told and evaluation.due(last_step, run.total_steps))
    return (last_step == run.total_steps and is_evaluated) or evaluation.has_stopped, last_step


def _make_step(run: _Run, step: int, stop: stopping.Stopping, clock: Clock) -> dict[str, jax.Array]:
    """Reads a batch and has the devices begin a step; they may still be at it afterwards."""
    with clock.spent(DATA_WAIT), stop.waiting_for_data():
        batch = next(run.iterator)
    run.skipped = batch.skipped
    arrays = sharding.device_put_batch((batch.packed, batch.labels), run.mesh, leading_axes=1)
    run.state, metrics = run.step.run(run.state, *arrays)
    run.watch.add(step, metrics, batch)
    if step % run.config.log_every == 0 and jax.process_count() > 1:
        limit = skip_limit(run.source, run.config.data.max_skip_share)
        check_skipped_rows(run.skipped, list(run.source.subsets), limit, run.workdir)
    return metrics


def _save(run: _Run, clock: Clock) -> None:
    # Nothing is saved before its loss and all of it are known to be finite.
    run.watch.drain()
    with clock.spent(CHECKPOINT):
        check_finite(run.state)
        run.writer.sync()
        run.checkpoints.save(run.state, run.iterator)


def _finish(run: _Run, clock: Clock, complete: bool, last_step: int) -> bool:
    run.evaluation.close()
    run.writer.close()
    if waiting := len(run.iterator.get_state()["carry"]):
        log.info("%d pairs that this process has read had no room before the last step", waiting)
    report_skipped_rows(run.skipped, run.workdir)
    if complete:
        run.evaluation.report(last_step)
    done = run.watch.last_loss or "nothing to do"
    log.info("%d of %d steps done: %s", last_step, run.total_steps, done)
    if jax.process_index() == 0:
        text = clock.summary(run.evaluation.best())
        write_text(run.workdir / "summary.txt", text + "\n")
        print(f"\n{text}\n", flush=True)
    return complete


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.train", __doc__, takes_config=True)
    parser.add_argument(
        "--workdir", required=True, type=Path, help="where the run is kept; continued if it exists"
    )
    processes.add_arguments(parser)
    return parser.parse_args(argv)


def _command(args: argparse.Namespace) -> int:
    with stopping.listen() as stop:
        try:
            with stop.interruptible():
                processes.initialize(args)
            stop.join_processes()
            command_line.set_up_logging(args, first=jax.process_index() == 0, times=True)
            return 0 if train(args.config, args.workdir) else stop.status
        except stopping.StopRequested:
            log.warning("told to stop where there was nothing to save: the same command goes on")
            return stop.status
        except WorkdirInUse as error:
            print(f"error: {error}", file=sys.stderr)
            return IN_USE
        except Exception:
            stop.hold()
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    user_errors = (ValueError, OSError, FloatingPointError, TooManySkips)
    command = peers.sharing_failures(_command, user_errors)
    return command_line.run(command, parse_args(argv), user_errors)


if __name__ == "__main__":
    sys.exit(main())
