"""Scores a model on tasks and benchmarks of the `mteb` package, which fetches their data.

Owns how mteb is run: which tasks, which are done already, several processes, the table. How a model is shown to mteb
is `mteb_model.py`.
"""

# mteb is an extra that is often not installed; where it is, its own types are not checked here.
# pyright: reportMissingImports=false

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llave_jax.common import extras
from llave_jax.common.tables import align, percent
from llave_jax.evaluation.cache import EmbeddingCache
from llave_jax.parallel.processes import from_first_process

if TYPE_CHECKING:
    from llave_jax.embedding.embedder import Embedder

PREFIX = "mteb:"
# Of mteb's data loader, where no batch size is asked for: the Embedder makes its own batches.
_LOADER_ITEMS = 64


def check_installed() -> None:
    """Looks for mteb.

    Raises:
      MissingPackage: it is not installed.
    """
    extras.require("mteb", "mteb's tasks")


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks of mteb by their names.

    Args:
      names: of tasks ("CIRRIT2IRetrieval") and of benchmarks ("MIEB(lite)"), whose tasks are all taken.

    Returns:
      The tasks, each once; no data is fetched.

    Raises:
      ValueError: mteb has no such task or benchmark; it names those that are spelled alike.
    """
    import mteb

    found: dict[str, Any] = {}
    for name in names:
        try:
            tasks = [mteb.get_task(name)]
        except KeyError:
            try:
                tasks = list(mteb.get_benchmark(name).tasks)
            except KeyError:
                known = [task.metadata.name for task in mteb.get_tasks()]
                near = difflib.get_close_matches(name, known, 3)
                hint = f"; close to it are {', '.join(near)}" if near else ""
                raise ValueError(f"mteb has no task and no benchmark {name!r:.100}{hint}") from None
        found |= {task.metadata.name: task for task in tasks}
    return list(found.values())


def evaluate_mteb(
    embedder: Embedder,
    tasks: Sequence[Any],
    output: Path,
    *,
    name: str,
    settings: Mapping[str, Any],
    cache: EmbeddingCache,
    batch_size: int | None = None,
) -> str:
    """Score tasks, one after the other. Tasks that were scored with these weights before are not scored again.

    With several processes all call this alike. The first one keeps the results; all encode.

    Args:
      embedder: the model.
      tasks: of `find_tasks`, or one's own.
      output: where mteb's results go: `results/<model>/<fingerprint>/<task>.json`.
      name: of the model, "organisation/model".
      settings: of the model as in `run.json`: "fingerprint", and "truncate_dim" if there is one.
      cache: takes and gives embeddings; of the first process.
      batch_size: items encoded together on a device; None: automatic.

    Returns:
      The table of scores.

    Raises:
      ValueError, OSError: data cannot be fetched or read.
    """
    import mteb

    from llave_jax.evaluation.mteb_model import MtebEncoder, model_meta

    first = jax.process_index() == 0
    arrays = jax.tree.leaves(embedder.params)
    inputs = embedder.config.inputs
    meta = model_meta(
        name,
        str(settings["fingerprint"]),
        dimension=settings.get("truncate_dim") or embedder.config.text.hidden_size,
        max_length=inputs.max_length,
        parameters=sum(x.size for x in arrays),
        parameter_bytes=sum(x.nbytes for x in arrays),
    )
    # mteb's protocol has the arguments of its own loader; a model that is loaded already has others.
    encoder: Any = MtebEncoder(
        embedder.encode,
        meta,
        prompts=embedder.prompts,
        cache=cache,
        automatic_batches=batch_size is None,
        frames=(inputs.frames_per_second, inputs.max_frames),
    )
    results = mteb.ResultCache(output)
    options: Any = {"batch_size": batch_size or _LOADER_ITEMS, "show_progress_bar": first}
    rows = [["task", "type", "metric", "%"]]
    for task in tasks:
        known = results.load_task_result(task.metadata.name, meta) if first else None
        missing = known is None or bool(known.get_missing_evaluations(task))
        # The first process decides for all, as all have to encode the same.
        if bool(from_first_process(np.array(missing))):
            found = mteb.evaluate(
                encoder,
                task,
                cache=results if first else None,
                overwrite_strategy="always",
                encode_kwargs=options.copy(),
                co2_tracker=False,
                show_progress_bar=False,
            )
            known = found.task_results[0]
        if known is not None:
            kind, metric = task.metadata.type, task.metadata.main_score
            rows.append([task.metadata.name, kind, metric, percent(known.get_score())])
    return align(rows, left=3)
