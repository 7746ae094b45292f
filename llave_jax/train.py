"""Train an embedding model.

    python -m llave_jax.train --config NAME --workdir DIR [--config.KEY=VALUE ...]

Running the same command again continues from the latest checkpoint, to the same result as without
the interruption. WORKDIR is then a model for `evaluate`, `embed` and `Embedder.from_pretrained`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from llave_jax.common import command_line
from llave_jax.common.directories import closed_to_other_writers
from llave_jax.common.files import write_text
from llave_jax.config import Config
from llave_jax.data.pipeline import skip_limit
from llave_jax.data.skips import TooManySkips
from llave_jax.inputs.chat import check_vocabulary
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.parallel import peers, processes, sharding, stopping
from llave_jax.training import batch_shape, run_files, setup, workdir_lock
from llave_jax.training.batch_search import BatchSearch, with_batch
from llave_jax.training.checkpoint import Checkpoints
from llave_jax.training.config_check import check_config
from llave_jax.training.finite import check_finite
from llave_jax.training.goodput import CHECKPOINT, DATA_WAIT, EVALUATION, STEPS, Clock
from llave_jax.training.profiling import Profile
from llave_jax.training.skipped_rows import check_skipped_rows, report_skipped_rows
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


def _train(config: Config, workdir: Path, stop: stopping.Stopping, clock: Clock) -> bool:
    begins = contextlib.ExitStack()
    with begins:
        # Up to the end of the first step there is nothing to save.
        begins.enter_context(stop.interruptible())
        return _steps(config, workdir, stop, clock, begins)


def _steps(
    config: Config,
    workdir: Path,
    stop: stopping.Stopping,
    clock: Clock,
    begins: contextlib.ExitStack,
) -> bool:
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
    search = BatchSearch(config, llave_config, mesh, len(source), measure)
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
            evaluation.run(state.params, start, writer)

    watch = setup.make_watch(config, writer, training.schedule, total_steps, start, clock, workdir)
    profile = Profile(config, workdir)
    clock.begin(start)
    skipped: tuple[str, ...] = ()
    last_step = start

    def save() -> None:
        # Nothing is saved before its loss and all of it are known to be finite.
        watch.drain()
        with clock.spent(CHECKPOINT):
            check_finite(state)
            writer.sync()
            checkpoints.save(state, iterator)

    # A checkpoint that is being written is completed, also after an error.
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(profile),
        watch.progress,
    ):
        told = False
        for step in range(start + 1, start + 1 if evaluation.has_stopped else total_steps + 1):
            profile.before(step)
            with clock.spent(DATA_WAIT), stop.waiting_for_data():
                batch = next(iterator)
            skipped = batch.skipped
            arrays = (batch.packed, batch.target_ids)
            state, metrics = training.step.run(
                state, *sharding.device_put_batch(arrays, mesh, leading_axes=1)
            )
            last_step = step
            if step == start + 1:
                begins.close()
                clock.turn_to(STEPS)
            watch.add(step, metrics, batch)
            profile.after(step, metrics)
            if step % config.log_every == 0 and jax.process_count() > 1:
                limit = skip_limit(source, config.data.max_skip_share)
                check_skipped_rows(skipped, list(source.subsets), limit, workdir)
            told = stop.at(step) | checkpoints.must_stop(step)
            is_last, evaluates = step == total_steps, evaluation.due(step, total_steps)
            if is_last or (evaluates and config.eval.patience is not None):
                # It may be the run's last line. The line of its evaluation is the sign that it is over.
                watch.drain()
                watch.write_last()
            # A step is saved before it is evaluated: an evaluation that is stopped is begun again.
            if told or is_last or evaluates or step % config.checkpoint.every == 0:
                save()
            if told:
                log.warning("told to stop: step %d is saved; the same command goes on", step)
                break
            if evaluates:
                try:
                    with clock.spent(EVALUATION), stop.interruptible(checkpoints.wait):
                        evaluation.run(state.params, step, writer, checkpoints.wait)
                except stopping.StopRequested:
                    log.warning("told to stop: step %d is saved, and not yet evaluated", step)
                    told = True
                    break
                watch.restart_clock()
            if evaluation.has_stopped:
                break
        begins.close()
        watch.drain()
    evaluation.close()
    writer.close()
    if waiting := len(iterator.get_state()["carry"]):
        log.info("%d pairs that this process has read had no room before the last step", waiting)
    report_skipped_rows(skipped, workdir)
    is_evaluated = not (told and evaluation.due(last_step, total_steps))
    complete = (last_step == total_steps and is_evaluated) or evaluation.has_stopped
    if complete:
        evaluation.report(last_step)
    log.info("%d of %d steps done: %s", last_step, total_steps, watch.last_loss or "nothing to do")
    if first_process:
        text = clock.summary(evaluation.best())
        write_text(workdir / "summary.txt", text + "\n")
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
