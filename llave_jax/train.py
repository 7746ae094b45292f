"""Train an embedding model: `python -m llave_jax.train --config configs/NAME.py --workdir DIR`.

Running the same command again continues from the latest checkpoint, to the same result as without
the interruption. WORKDIR is then a model for `evaluate`, `embed` and `Embedder.from_pretrained`.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from absl import app, flags
from jax.experimental import multihost_utils
from ml_collections import config_flags

from llave_jax import config as config_lib
from llave_jax.common.progress import Progress
from llave_jax.config import Config
from llave_jax.data.order import Composition
from llave_jax.data.pipeline import TrainBatch, skip_limit, train_iterator
from llave_jax.data.rows import EMPTY_SIDE
from llave_jax.data.skips import TooManySkips, by_subset, listed
from llave_jax.data.sources import (
    MMEB_TRAIN_SUBSETS,
    PairSource,
    open_source,
    split_held_out,
)
from llave_jax.digits import dataset as digits
from llave_jax.digits import tokenizer as digits_tokenizer
from llave_jax.evaluation.mmeb_data import DatasetInfo
from llave_jax.inputs.chat import check_vocabulary
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import example_batch
from llave_jax.parallel import processes, sharding
from llave_jax.training import resume, setup
from llave_jax.training.checkpoint import BEST, BestCheckpoint, Checkpoints
from llave_jax.training.evaluation import TrainingEvaluation
from llave_jax.training.metrics import MetricsWriter
from llave_jax.training.state import TrainState
from llave_jax.weights import model_dir
from llave_jax.weights.run_params import has_checkpoint

log = logging.getLogger(__name__)

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The run: configs/NAME.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; continued if it exists.")
flags.mark_flags_as_required(["config", "workdir"])

DIGITS = "digits"


def train(config: Config, workdir: Path) -> None:
    """Run, or continue, the training that `config` describes."""
    first_process = jax.process_index() == 0
    if first_process:
        workdir.mkdir(parents=True, exist_ok=True)
        resume.record_config(config, workdir)
    mesh = sharding.make_mesh(dict(config.mesh))
    log.info("mesh %s, %s", dict(mesh.shape), jax.devices()[0].device_kind)

    data_path, tokenizer_path = locate_data(config, workdir)
    llave_config = config_lib.model_config(config)
    tokenizer = load_tokenizer(config, tokenizer_path)
    check_vocabulary(tokenizer, llave_config.text.vocab_size)
    config_lib.check_budget(config, llave_config, sharding.num_shards(mesh))
    if first_process:
        record_model(config, llave_config, tokenizer_path, workdir)
    source = open_training_source(config, data_path)
    total_steps = config_lib.total_steps(config, len(source))
    log.info("%d pairs, %d steps of at most %d", len(source), total_steps, config.batch.pairs)
    if source.left_out:
        left_out = listed(source.left_out)
        log.info("skipped %d rows: %s (%s)", len(left_out), EMPTY_SIDE, by_subset(left_out))
    iterator = make_iterator(
        config, source, SequenceBuilder(tokenizer, llave_config.input_spec), mesh, workdir
    )

    training = setup.build_training(config, llave_config, mesh, total_steps)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    state = make_state(config, training, mesh, checkpoints, iterator)

    start = int(state.step)
    writer = MetricsWriter(workdir, first_step=start, enabled=first_process)
    evaluation = TrainingEvaluation(
        config.eval, training.model, tokenizer, mesh, workdir, *locate_benchmark(config, workdir)
    )
    best = make_best(config, workdir)

    def evaluate(step: int) -> None:
        scores = evaluation.run(state.params, step, writer)
        if best is not None:
            best.offer(step, state.params, scores)

    batch: TrainBatch | None = None
    if evaluation.due(start, total_steps):
        evaluate(start)
    watch = Watch(config, writer, training.schedule, total_steps, start)
    # However the loop ends, a checkpoint that is being written is completed.
    with contextlib.closing(checkpoints), watch.progress:
        for step in range(start + 1, total_steps + 1):
            batch = next(iterator)
            arrays = (batch.packed, batch.target_ids)
            state, metrics = training.step.run(
                state, *sharding.device_put_batch(arrays, mesh, leading_axes=1)
            )
            watch.add(step, metrics, batch)
            if step % config.log_every == 0 and jax.process_count() > 1:
                limit = skip_limit(source, config.data.max_skip_share)
                check_skipped_rows(batch.skipped, list(source.subsets), limit, workdir)
            stop = checkpoints.must_stop(step)
            if stop or step == total_steps or step % config.checkpoint.every == 0:
                # Nothing is saved before its loss is known to be finite.
                watch.drain()
                checkpoints.save(state, iterator)
            if stop:
                log.warning("told to stop: step %d is saved; the same command goes on", step)
                break
            if evaluation.due(step, total_steps):
                watch.drain()
                evaluate(step)
                watch.restart_clock()
    if best is not None:
        best.close()
    writer.close()
    if waiting := len(iterator.get_state()["carry"]):
        log.info("%d pairs that this process has read had no room before the last step", waiting)
    if batch is not None and batch.skipped:
        log.info(
            "this process skipped %d rows that cannot be used (%s), listed in %s",
            len(batch.skipped),
            by_subset(batch.skipped),
            skip_file(workdir, jax.process_index()),
        )
    if int(state.step) == total_steps:
        evaluation.report(total_steps)


def locate_data(config: Config, workdir: Path) -> tuple[Path, Path | None]:
    """Training data and tokenizer directory; the digits benchmark is built if it is asked for."""
    if config.data.path is None:
        raise ValueError('set config.data.path: a directory of training data, or "digits"')
    data_path, tokenizer_path = config.data.path, config.model.tokenizer
    root = workdir / DIGITS
    if DIGITS in (data_path, tokenizer_path, config.eval.benchmark):
        if jax.process_index() == 0:
            digits.build(root)
            digits_tokenizer.build_tokenizer(root / "tokenizer")
        wait_for_first_process("digits")
    data_path = root if data_path == DIGITS else Path(data_path)
    if tokenizer_path == DIGITS:
        return data_path, root / "tokenizer"
    return data_path, Path(tokenizer_path) if tokenizer_path else None


def locate_benchmark(
    config: Config, workdir: Path
) -> tuple[Path | None, Sequence[DatasetInfo] | None]:
    """Directory of what the run is scored on, and its datasets where it is not MMEB."""
    if config.eval.benchmark is None:
        return None, None
    if config.eval.benchmark == DIGITS:
        return workdir / DIGITS / "eval", digits.INFOS
    return Path(config.eval.benchmark), None


def wait_for_first_process(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def load_tokenizer(config: Config, tokenizer_path: Path | None) -> Any:
    if config.model.path is not None:
        return model_dir.load_tokenizer(config.model.path)
    if tokenizer_path is None:
        raise ValueError(
            "config.model.preset trains from scratch and needs config.model.tokenizer: a directory "
            "with a Qwen2 tokenizer"
        )
    return transformers.AutoTokenizer.from_pretrained(tokenizer_path)


def record_model(
    config: Config, llave_config: LlaveConfig, tokenizer_path: Path | None, workdir: Path
) -> None:
    """Keep with the run what makes its checkpoints a model: config, tokenizer, source files.

    Raises:
      ValueError: the run that is continued has another model or tokenizer.
    """
    kept = workdir / "model"
    tokenizer = tokenizer_path
    if config.model.path is not None:
        tokenizer = model_dir.locate(config.model.path) / model_dir.TOKENIZER
    if has_checkpoint(workdir) and model_dir.is_model_dir(kept):
        now, before = llave_config.to_dict(), model_dir.load_config(kept).to_dict()
        now, before = dict(resume.leaves(now)), dict(resume.leaves(before))
        changed = [
            f"{key}: {before[key]!r} -> {now[key]!r}" for key in now if now[key] != before[key]
        ]
        if changed:
            raise ValueError(
                f"{kept} is the model of the run; config.model describes another "
                f"({'; '.join(changed)}). Use another --workdir, or the model the run began with"
            )
        if not model_dir.same_tokenizer(tokenizer, kept / model_dir.TOKENIZER):
            raise ValueError(
                f"{kept} has the tokenizer of the run; {tokenizer} is another. Use another --workdir, or "
                "the tokenizer the run began with"
            )
        return
    model_dir.write_model_dir(
        kept, llave_config, source=config.model.path, tokenizer=tokenizer_path, overwrite=True
    )


def open_training_source(config: Config, data_path: Path) -> PairSource:
    data = config.data
    is_digits = data.path == DIGITS
    source = open_source(
        data_path / "train" if is_digits else data_path,
        subsets=data.subsets or None,
        split=data.split,
        max_rows=data.max_rows,
        image_root=data_path / "train_images" if is_digits else data.image_root,
    )
    for name, rows in source.subsets.items():
        read = len(rows) + len(source.left_out.get(name, ()))
        if data.max_rows and read >= data.max_rows and name not in MMEB_TRAIN_SUBSETS:
            log.warning(
                "%s: the first %d rows and no more, as data.max_rows says (configs/own_data.py takes all)",
                name,
                data.max_rows,
            )
    return split_held_out(source, data.held_out)[0] if data.held_out else source


def make_iterator(
    config: Config,
    source: PairSource,
    builder: SequenceBuilder,
    mesh: jax.sharding.Mesh,
    workdir: Path,
) -> grain.DatasetIterator:
    """`TrainBatch`es of this process's shards."""
    data, process = config.data, jax.process_index()
    return train_iterator(
        source,
        builder,
        config_lib.batch_budget(config, sharding.num_shards(mesh)),
        seed=config.seed,
        num_shards=len(sharding.local_shards(mesh)),
        micro_batches=config.batch.micro_batches,
        process_index=process,
        process_count=jax.process_count(),
        num_workers=data.num_workers,
        composition=Composition(data.sub_batch, dict(data.weights) or None, data.order),
        group_size=config_lib.pairs_per_group(config, sharding.num_shards(mesh)),
        on_error=data.on_error,
        skip_file=skip_file(workdir, process),
        max_skip_share=data.max_skip_share,
    )


def skip_file(workdir: Path, process: int | str) -> Path:
    """Where a process lists the rows that it skips."""
    return workdir / f"skipped_{process}.jsonl"


def check_skipped_rows(
    skipped: Sequence[str], subsets: Sequence[str], limit: int, workdir: Path
) -> None:
    """Stops all processes at the same step if they have skipped too many rows together.

    Args:
      skipped: pair ids of this process; two processes may have skipped the same row.
      subsets: names, the same in every process.
      limit: rows that all together may skip.

    Raises:
      TooManySkips: in every process.
    """
    counts = multihost_utils.process_allgather(np.int32(len(skipped)))
    if counts.sum() <= limit:
        return
    rows = np.full((counts.max(), 2), -1, np.int32)
    for place, pair_id in enumerate(skipped):
        subset, _, row = pair_id.rpartition(":")
        rows[place] = subsets.index(subset), int(row)
    everyone = np.unique(multihost_utils.process_allgather(rows).reshape(-1, 2), axis=0)
    together = [f"{subsets[subset]}:{row}" for subset, row in everyone if subset >= 0]
    if len(together) > limit:
        raise TooManySkips(together, limit, skip_file(workdir, "*"))


def make_state(
    config: Config,
    training: setup.Training,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    iterator: grain.DatasetIterator,
) -> TrainState:
    """The latest checkpoint's state; else the converted model's; else random parameters.

    Every array is made or read directly in its shards.
    """
    model, step = training.model, training.step
    if checkpoints.latest_step is not None:
        log.info("continuing from step %d", checkpoints.latest_step)
        return checkpoints.restore(step.state, iterator)
    if config.model.path is not None:
        return step.init(model_dir.load_params(config.model.path, mesh=mesh, dtype=jnp.float32))

    def from_seed(key: jax.Array) -> TrainState:
        return step.init(model.init(key, example_batch(model.config))["params"])

    places = jax.tree.map(lambda x: x.sharding, step.state)
    return jax.jit(from_seed, out_shardings=places)(jax.random.key(config.seed))


def make_best(config: Config, workdir: Path) -> BestCheckpoint | None:
    """The keeper of the best parameters, in a folder that is a model like the run's own."""
    if config.checkpoint.best_metric is None:
        return None
    if config.eval.benchmark is None:
        raise ValueError("config.checkpoint.best_metric needs config.eval.benchmark")
    if jax.process_index() == 0:
        kept, best = workdir / "model", workdir / BEST / "model"
        if not has_checkpoint(workdir) or not model_dir.is_model_dir(best):
            model_config = model_dir.load_config(kept)
            model_dir.write_model_dir(best, model_config, source=kept, overwrite=True)
    return BestCheckpoint(workdir, config.checkpoint.best_metric)


class Watch:
    """Metrics of the steps on their way: checked, written and shown one step behind the device."""

    def __init__(
        self, config: Config, writer: MetricsWriter, schedule: Any, total_steps: int, start: int
    ):
        self.progress = Progress(
            total_steps,
            "training",
            unit="steps",
            initial=start,
            enabled=jax.process_index() == 0,
        )
        self._config, self._writer, self._schedule = config, writer, schedule
        self._pending: collections.deque = collections.deque()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count pairs per second from now: what came before was not training."""
        self._pairs, self._since = 0, time.monotonic()

    def add(self, step: int, metrics: dict[str, jax.Array], batch: TrainBatch) -> None:
        self._pending.append((step, metrics, batch))
        while len(self._pending) > 1:
            self._finish(*self._pending.popleft())

    def drain(self) -> None:
        while self._pending:
            self._finish(*self._pending.popleft())

    def _finish(self, step: int, metrics: dict[str, jax.Array], batch: TrainBatch) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            rows = [row for pack in batch.ids for shard in pack for row in shard if row]
            raise FloatingPointError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the "
                f"last checkpoint is kept. Rows of this process's batch: {', '.join(rows)}"
            )
        values["epoch"] = batch.epoch
        self._pairs += int(values["pairs"])
        self.progress.update(1, f"loss {values['loss']:.4f}")
        if step % self._config.log_every == 0:
            now = time.monotonic()
            values["pairs_per_second"] = self._pairs / (now - self._since)
            values["learning_rate"] = float(self._schedule(step - 1))
            self._pairs, self._since = 0, now
            self._writer.write(step, values)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    # absl's handler is installed already; orbax and jax tell every detail.
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    processes.initialize()
    train(_CONFIG.value, Path(_WORKDIR.value))


if __name__ == "__main__":
    app.run(main)
