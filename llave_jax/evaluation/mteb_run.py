"""Scores a model on tasks and benchmarks of the `mteb` package, which fetches their data.

Owns how mteb is run: which tasks, which are done already, several processes, the table. How a model is shown to mteb
is `mteb_model.py`.
"""

# mteb is an extra that is often not installed; where it is, its own types are not checked here.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from llave_jax.common import extras
from llave_jax.common.content import digest
from llave_jax.common.tables import align, percent
from llave_jax.embedding.run_info import record_run
from llave_jax.evaluation.cache import EmbeddingCache
from llave_jax.parallel.processes import json_from_first_process
from llave_jax.weights import model_card, model_dir
from llave_jax.weights.json_files import read_json
from llave_jax.weights.resolve import hub_name

if TYPE_CHECKING:
    from mteb import ResultCache
    from mteb.models import ModelMeta

    from llave_jax.embedding.embedder import Embedder

PREFIX = "mteb:"
# Of mteb's data loader, where no batch size is asked for: the Embedder makes its own batches.
_LOADER_ITEMS = 64
# Tokens of a video of 32 frames.
_VIDEO_LENGTH = 8192


class Chosen(NamedTuple):
    """What is scored.

    Attributes:
      tasks: of mteb, each once.
      benchmarks: name -> names of its tasks, of the benchmarks that were asked for.
    """

    tasks: list[Any]
    benchmarks: dict[str, list[str]]

    @property
    def max_length(self) -> int:
        """Tokens that the longest items need; 0: the model's own limit suffices."""
        videos = any("video" in task.metadata.modalities for task in self.tasks)
        return _VIDEO_LENGTH if videos else 0


def find_tasks(names: Sequence[str]) -> Chosen:
    """Tasks of mteb by their names.

    Args:
      names: of tasks ("CIRRIT2IRetrieval") and of benchmarks ("MIEB(lite)"), whose tasks are all taken.

    Returns:
      The tasks; no data is fetched.

    Raises:
      MissingPackage: mteb is not installed.
      ValueError: mteb has no such task or benchmark; it names those that are spelled alike.
    """
    extras.require("mteb", "mteb's tasks")
    import mteb

    found: dict[str, Any] = {}
    benchmarks: dict[str, list[str]] = {}
    for name in names:
        try:
            tasks = [mteb.get_task(name)]
        except KeyError:
            try:
                tasks = list(mteb.get_benchmark(name).tasks)
            except KeyError:
                known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
                known += [benchmark.name for benchmark in mteb.get_benchmarks()]
                near = difflib.get_close_matches(name, known, 3)
                hint = f"; close to it are {', '.join(near)}" if near else ""
                raise ValueError(f"mteb has no task and no benchmark {name!r:.100}{hint}") from None
            benchmarks[name] = [task.metadata.name for task in tasks]
        found |= {task.metadata.name: task for task in tasks}
    return Chosen(list(found.values()), benchmarks)


def require_decoder(chosen: Chosen) -> None:
    """Checks that videos can be decoded, without fetching any.

    Args:
      chosen: of `find_tasks`.

    Raises:
      MissingPackage: there are videos, and datasets has no decoder for them.
    """
    names = [t.metadata.name for t in chosen.tasks if "video" in t.metadata.modalities]
    if names and importlib.util.find_spec("torchcodec") is None:
        raise extras.MissingPackage(
            f"videos of {names[0]} need torchcodec: pip install 'mteb[video]'"
        )


def evaluate_mteb(
    embedder: Embedder,
    chosen: Chosen,
    output: Path,
    *,
    model: str | os.PathLike,
    directory: Path,
    settings: Mapping[str, Any] | None,
    cache: EmbeddingCache,
    batch_size: int | None = None,
) -> str:
    """Score tasks, one after the other. What was scored with this model before is not scored again.

    With several processes all call this alike. The first one keeps the results; all encode.

    Args:
      embedder: the model.
      chosen: of `find_tasks`, or tasks of one's own.
      output: where mteb's results go, `results/<model>/<revision>/<task>.json`, and `run.json`.
      model: as its user calls it.
      directory: of the model.
      settings: of the model as in `run.json`: "fingerprint", and "truncate_dim" if there is one; None on other
        processes than the first.
      cache: takes and gives embeddings; of the first process.
      batch_size: items encoded together on a device; None: automatic.

    Returns:
      The table of scores.

    Raises:
      ValueError, OSError: data cannot be fetched or read.
    """
    import mteb

    from llave_jax.evaluation.mteb_model import MtebEncoder

    first = jax.process_index() == 0
    used: dict[str, Any] = json_from_first_process(settings)
    meta = describe(embedder, used, model, directory)
    inputs = embedder.config.inputs
    # mteb's protocol has the arguments of its own loader; a model that is loaded already has others.
    encoder: Any = MtebEncoder(
        embedder.encode,
        meta,
        prompts=embedder.prompts,
        cache=cache,
        automatic_batches=batch_size is None,
        frames=(inputs.frames_per_second, inputs.max_frames),
    )
    options: Any = {"batch_size": batch_size or _LOADER_ITEMS, "show_progress_bar": first}
    scores: dict[str, float] = {}
    rows = [["task", "type", "metric", "%"]]
    notes = []
    with _results(output, chosen.tasks, meta) as results:
        for task in chosen.tasks:
            name = task.metadata.name
            if first:
                record_run(output, name, None)
            found = mteb.evaluate(
                encoder,
                task,
                cache=results,
                encode_kwargs=options.copy(),
                co2_tracker=False,
                show_progress_bar=False,
            )
            notes += [f"{e.task_name}: not scored: {e.exception}" for e in found.exceptions or ()]
            for result in found.task_results:
                scores[name] = result.validate_and_filter_scores(task).get_score()
                rows.append(
                    [name, task.metadata.type, task.metadata.main_score, percent(scores[name])]
                )
                if first:
                    record_run(output, name, {**used, **encoder.prompts_of(task.metadata)})
    rows += _means(chosen, scores)
    return "\n\n".join([align(rows, left=3), *notes])


def _means(chosen: Chosen, scores: Mapping[str, float]) -> Iterator[list[str]]:
    """Rows for the means that mteb's leaderboard has, of benchmarks whose tasks were all scored."""
    types = {task.metadata.name: task.metadata.type for task in chosen.tasks}
    for benchmark, names in chosen.benchmarks.items():
        if not scores.keys() >= set(names):
            continue
        by_type: dict[str, list[float]] = {}
        for name in names:
            by_type.setdefault(types[name], []).append(scores[name])
        yield [benchmark, "", "mean of tasks", percent(mean(scores[name] for name in names))]
        yield [benchmark, "", "mean of types", percent(mean(map(mean, by_type.values())))]


def describe(
    embedder: Embedder, settings: Mapping[str, Any], model: str | os.PathLike, directory: Path
) -> ModelMeta:
    """What mteb's results say of a model.

    Its revision is the fingerprint; of a model that has prompts, a digest of both.

    Args:
      embedder, settings, model, directory: as of `evaluate_mteb`.

    Returns:
      The metadata.
    """
    from llave_jax.evaluation.mteb_model import model_meta

    arrays = jax.tree.leaves(embedder.params)
    text = embedder.config.text
    revision = str(settings["fingerprint"])
    if embedder.prompts:
        prompts = json.dumps(embedder.prompts, sort_keys=True)
        revision = digest(revision.encode(), prompts.encode()).hex()[: len(revision)]
    source = model_dir.locate(directory) / model_dir.SOURCE
    config = source / model_dir.CONFIG
    licence, base = model_card.licence_and_base(
        source / model_card.README, read_json(config) if config.is_file() else None
    )
    name = hub_name(model)
    return model_meta(
        name or f"llave_jax/{Path(model).resolve().name}",
        revision,
        dimension=text.hidden_size,
        max_length=embedder.config.inputs.max_length,
        parameters=sum(x.size for x in arrays),
        embedding_parameters=text.vocab_size * text.hidden_size,
        parameter_bytes=sum(x.nbytes for x in arrays),
        dims=_trained_dims(directory),
        truncate_dim=settings.get("truncate_dim"),
        half_precision=embedder.model.dtype.name == "bfloat16",
        licence=licence,
        adapted_from=base[0] if isinstance(base, list) else base,
        reference=None if name is None else f"https://huggingface.co/{name}",
    )


def _trained_dims(directory: Path) -> Sequence[int]:
    """Prefixes of embeddings that a training run trains; a model directory does not know them."""
    file = directory / model_dir.CONFIG
    loss = read_json(file).get("loss") if file.is_file() else None
    return loss.get("dims") or () if isinstance(loss, dict) else ()


@contextlib.contextmanager
def _results(output: Path, tasks: Iterable[Any], meta: ModelMeta) -> Iterator[ResultCache]:
    """mteb's results. Processes other than the first have a copy of its own, so that all run the same tasks."""
    import mteb

    results = mteb.ResultCache(output)
    if jax.process_count() == 1:
        yield results
        return
    names = {t.metadata.name for task in tasks for t in (task, *getattr(task, "tasks", ()))}
    paths = {name: results.get_task_result_path(name, meta) for name in sorted(names)}
    known = json_from_first_process(
        {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
        if jax.process_index() == 0
        else None
    )
    if jax.process_index() == 0:
        yield results
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = mteb.ResultCache(folder)
        for name, text in known.items():
            path = copy.get_task_result_path(name, meta)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        yield copy
