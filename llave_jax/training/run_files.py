"""The files of a run in WORKDIR beside checkpoints, metrics and scores.

config.json             the config, which decides whether the run may be continued (`resume.py`)
batch_plan.json         the shape of batches: what was set by hand, and what was planned
model/                  model config and tokenizer, which make the run's checkpoints a model
best/model/             the same for the best parameters
skipped_PROCESS.jsonl   the rows that each process skipped
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from llave_jax.common.files import write_text
from llave_jax.config import Config
from llave_jax.data.batch_plan import BatchPlan
from llave_jax.models.config import LlaveConfig
from llave_jax.parallel import processes
from llave_jax.training import adapters, batch_shape, resume
from llave_jax.training.best import BEST
from llave_jax.weights import adapted, model_dir
from llave_jax.weights.checkpoint_seal import package_versions
from llave_jax.weights.fingerprint import weights_fingerprint
from llave_jax.weights.json_files import read_json
from llave_jax.weights.run_params import has_checkpoint
from llave_jax.weights.tokenizer_files import same_tokenizer_files

CONFIG = "config.json"
BATCH_PLAN = "batch_plan.json"
MODEL = "model"


def skip_file(workdir: Path, process: int | str) -> Path:
    """The file in which a process lists the rows that it skips.

    Args:
      workdir: the run's directory.
      process: index of the process; "*" for a pattern of all.

    Returns:
      The path.
    """
    return workdir / f"skipped_{process}.jsonl"


def check_processes(config: Config, workdir: Path) -> None:
    """Refuses a job whose processes have different configs, workdirs or packages. All processes call it.

    Args:
      config: of the run.
      workdir: the run's directory, as it was given.

    Raises:
      ValueError: it names the keys or packages, and the processes.
    """
    keys = {f"config.{key}": value for key, value in resume.leaves(json.loads(config.to_json()))}
    versions = {f"package {name}": version for name, version in package_versions().items()}
    processes.require_same(
        {**keys, **versions, "--workdir": str(workdir)},
        "Start all of them with the same flags and packages",
    )


def record_config(config: Config, workdir: Path) -> None:
    """Keeps the config with the run; makes WORKDIR.

    A run that ended before its first checkpoint, as with a mistyped path, has nothing to continue, and
    any config may follow. Where a run is continued, numbers of a batch that `config` leaves open are set
    as the run began with them.

    Args:
      config: of the run.
      workdir: the run's directory.

    Raises:
      ValueError: the run in `workdir` cannot go on with this config, naming the keys; or the config that it
        began with cannot be read.
    """
    path = workdir / CONFIG
    text = config.to_json(indent=2, sort_keys=True) + "\n"
    if path.exists() and has_checkpoint(workdir):
        before = read_json(path)
        resume.keep_batch(config, before)
        text = config.to_json(indent=2, sort_keys=True) + "\n"
        refused = resume.refused_changes(before, json.loads(text))
        if refused:
            raise ValueError(
                f"{workdir} holds a run with another config ({'; '.join(refused)}); "
                "use another --workdir, or the config it began with. What may change is listed in "
                "docs/operations.md"
            )
    write_text(path, text)


def record_batch_plan(
    config: Config, shards: int, find: Callable[[int | None], BatchPlan], workdir: Path
) -> BatchPlan:
    """The shape of the run's batches, kept with the run. All processes of a job call this.

    A run that is continued keeps the plan that it began with. On another number of devices, or with other
    numbers set by hand, micro-batches and the room of a batch are planned anew. The pairs, the expected fill
    and the slots of the order stay: they decide how many steps the run has, and which rows come when.

    Args:
      config: of the run.
      shards: devices that the batch is split over.
      find: plans the batch, given the pairs of a step where they are known; all processes call it.
      workdir: the run's directory.

    Returns:
      The plan, the same in every process.

    Raises:
      ValueError: as for `find`.
    """
    path = workdir / BATCH_PLAN
    settings = dataclasses.asdict(batch_shape.settings_of(config))
    asked = {"shards": shards, "set_by_hand": settings}
    begun = None
    if jax.process_index() == 0 and path.exists() and has_checkpoint(workdir):
        begun = read_json(path)
    begun = processes.json_from_first_process(begun)
    if begun is None:
        plan = find(None)
    else:
        plan = BatchPlan.from_dict(begun["plan"])
        if begun["asked"] == asked:
            return plan
        again = find(plan.pairs)
        plan = dataclasses.replace(again, fill=plan.fill, order_slots=plan.order_slots)
    if jax.process_index() == 0:
        write_text(path, json.dumps({"asked": asked, "plan": plan.to_dict()}, indent=2) + "\n")
    return plan


def record_model(
    config: Config, llave_config: LlaveConfig, tokenizer_path: Path | None, workdir: Path
) -> None:
    """Keeps with the run what makes its checkpoints a model: config, tokenizer, source files.

    Args:
      config: of the run; `model.path` is a path, of `setup.with_local_model`.
      llave_config: the model that the run trains.
      tokenizer_path: its tokenizer, where `config.model.path` has none.
      workdir: the run's directory.

    Raises:
      ValueError: the run that is continued has another model, tokenizer or base of its adapters; or it trains
        adapters without a model.
    """
    kept, adapter = workdir / MODEL, _adapter_record(config, workdir)
    values = None if adapter is None else adapter.values()
    if not has_checkpoint(workdir) or not model_dir.is_model_dir(kept):
        model_dir.write_model_dir(
            kept,
            llave_config,
            source=config.model.path,
            tokenizer=tokenizer_path,
            adapter=values,
            overwrite=True,
        )
    else:
        _check_same_model(config, llave_config, tokenizer_path, kept)
        _check_same_base(adapter, kept)
    if config.checkpoint.best_metric is not None:
        best = workdir / BEST
        if not has_checkpoint(workdir):
            # The run begins anew, perhaps with other data: what was best before it is not this run's.
            shutil.rmtree(best, ignore_errors=True)
        if not model_dir.is_model_dir(best / MODEL):
            model_dir.write_model_dir(
                best / MODEL, llave_config, source=kept, adapter=values, overwrite=True
            )


def _check_same_model(
    config: Config, llave_config: LlaveConfig, tokenizer_path: Path | None, kept: Path
) -> None:
    now = dict(resume.leaves(llave_config.to_dict()))
    before = dict(resume.leaves(model_dir.load_config(kept).to_dict()))
    changed = [f"{key}: {before[key]!r} -> {now[key]!r}" for key in now if now[key] != before[key]]
    if changed:
        raise ValueError(
            f"{kept} is the model of the run; config.model describes another "
            f"({'; '.join(changed)}). Use another --workdir, or the model the run began with"
        )
    tokenizer = tokenizer_path
    if config.model.path is not None:
        tokenizer = model_dir.locate(config.model.path) / model_dir.TOKENIZER
    if tokenizer is None or not same_tokenizer_files(tokenizer, kept / model_dir.TOKENIZER):
        raise ValueError(
            f"{kept} has the tokenizer of the run; {tokenizer} is another. Use another --workdir, or "
            "the tokenizer the run began with"
        )


def _adapter_record(config: Config, workdir: Path) -> adapted.Record | None:
    """What is kept of a run's adapters and their base; None if it has none."""
    lora, path = adapters.lora_of(config), config.model.path
    if lora is None:
        return None
    if path is None:
        raise ValueError(
            "config.lora.rank asks for adapters, which need a trained model: expected --config.model.path=MODEL, "
            "or --config.lora.rank=None"
        )
    place = str(Path(path).absolute())
    # The config of the run has the name on the hub, where the model is from there.
    name = read_json(workdir / CONFIG)["model"]["path"]
    name = place if Path(name).expanduser().exists() else name
    return adapted.Record(name, place, weights_fingerprint(path), lora)


def _check_same_base(adapter: adapted.Record | None, kept: Path) -> None:
    """The base of a run's adapters has the weights that it began with; where it lies now is noted."""
    before = adapted.read_record(kept)
    if adapter is None or before is None:
        # `resume.refused_changes` has compared the configs.
        return
    adapted.check_base(before, Path(adapter.path), kept.parent)
    for folder in (kept, kept.parent / BEST / MODEL):
        if (folder / model_dir.ADAPTER).is_file():
            text = json.dumps(adapter.values(), indent=2, sort_keys=True) + "\n"
            write_text(folder / model_dir.ADAPTER, text)
