"""MMEB-V2: its tasks, what is missing of them on disk, score files and the leaderboard's submission.

Owns the directory of data and the form of the output. Texts and items are made by the readers beside this module, one
for each modality.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llave_jax.common.files import write_text
from llave_jax.embedding.run_info import read_runs
from llave_jax.evaluation import output
from llave_jax.evaluation.benchmarks.base import Benchmark, Missing, Options
from llave_jax.evaluation.benchmarks.mmeb_v2 import image, video, visdoc
from llave_jax.evaluation.benchmarks.mmeb_v2.frames import DEFAULT_FRAMES
from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData
from llave_jax.evaluation.benchmarks.mmeb_v2.pixels import Pixels
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import (
    MODALITIES,
    SUITE,
    TASKS,
    VARIANTS,
    Spec,
)
from llave_jax.evaluation.results import Results
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.task import Task
from llave_jax.parallel.processes import only_on_first

SUBMISSION = "mmeb_v2_submission.json"
# Settings of a run on which scores depend.
_SAME = ("fingerprint", "dtype", "max_length", "truncate_dim")
# Tokens of a frame with its newlines, and of texts around a video; a video saved as frames has at most 64.
_FRAME_TOKENS, _TEXT_TOKENS, _SAVED_FRAMES = 210, 512, 64

# (task, data) -> a picture of its first row, below its picture folder; "" if it needs none.
_FIRST_PICTURE: dict[str, Callable[[Spec, HubData], str]] = {
    "image": image.first_picture,
    "visdoc": visdoc.first_picture,
}


class MmebV2(Benchmark):
    """MMEB-V2 in a folder of repositories of the hub. See docs/evaluation.md for the layouts.

    Args:
      data_dir: the data root.
      options: `images` is a folder or zip archive of the image tasks' pictures, if it is not where it is looked for;
        `frames` of a video are used.

    Raises:
      FileNotFoundError: there is no such directory, or no images where `options` says.

    Reference: VLM2Vec-V2 (arXiv 2507.04590).
    """

    suite = SUITE
    variants = tuple(VARIANTS)

    def __init__(self, data_dir: str | os.PathLike, options: Options | None = None):
        self._options = options or Options()
        self._data = HubData(data_dir)
        self._pixels = Pixels(self._data, self._options.images)
        frames = max(_SAVED_FRAMES, self._options.frames or 0)
        self.max_length = 1 << math.ceil(math.log2(frames * _FRAME_TOKENS + _TEXT_TOKENS))

    def names(self) -> list[str]:
        """All 78 tasks, whether or not they are there: see `missing`."""
        return list(TASKS)

    def missing(self, names: Sequence[str]) -> list[Missing]:
        """What tasks lack on disk: tables of annotations, the folder of pictures or frames.

        Of pictures, the first row's are looked for; of frames, all folders.

        Args:
          names: of the tasks.

        Returns:
          What is missing.

        Raises:
          ValueError: there is no such task; or data is malformed, and it names file and row.
        """
        return [found for name in names for found in self._missing_of(_spec(name))]

    def _missing_of(self, spec: Spec) -> list[Missing]:
        data = self._data
        absent = [
            config
            for config in spec.configs
            if data.find(spec.repository, config, spec.split, spec.local) is None
        ]
        found = []
        if absent:
            named = ", ".join(config for config in absent if config)
            what = f"annotations {spec.repository}{f' ({named})' if named else ''}"
            found.append(Missing(spec.name, what, data.command(spec.repository)))
        picture = ""
        needs_pictures = spec.modality != "visdoc"
        if not absent and spec.modality != "video":
            picture = _FIRST_PICTURE[spec.modality](spec, data)
            needs_pictures = bool(picture)
        folder = self._pixels.find(spec, picture)
        if needs_pictures and folder is None and not self._pixels.has_archive(spec):
            kind = "frames" if spec.modality == "video" else "pictures"
            folders = " or ".join(spec.pictures)
            what = f"{kind} in {folders}"
            found.append(Missing(spec.name, what, self._pixels.command(spec), picture))
        elif spec.modality == "video" and folder is not None and not absent:
            what = video.missing_frames(spec, data, folder)
            found += [Missing(spec.name, what, self._pixels.command(spec))] if what else []
        return found

    def read(self, name: str) -> Task:
        """Reads a task. With several processes all call this alike: the first one unpacks archives."""
        spec = _spec(name)
        if spec.modality == "video":
            return video.read(spec, self._data, self._pixels, self._options.frames)
        reader = image if spec.modality == "image" else visdoc
        return reader.read(spec, self._data, self._pixels)

    def write(self, directory: Path, task: Task, result: Result) -> None:
        """Writes `<modality>/<task>_score.json` and `<modality>/<task>_pred.jsonl`, as the leaderboard's code does."""
        folder = directory / _spec(task.info.name).modality
        score = {**result.metrics, "num_pred": result.queries, "num_data": result.queries}
        output.write_score(folder, task.info.name, score)
        rows = output.prediction_rows(task, only_on_first(result.answers))
        output.write_lines(folder / f"{task.info.name}_pred.jsonl", rows)

    def finish(self, directory: Path, results: Results, settings: Mapping[str, Any] | None) -> None:
        """Writes the submission: all tasks in the directory that were computed with these settings.

        Args:
          directory: of the score files.
          results: of this run.
          settings: what computed them; None: only this run's tasks are in the submission.
        """
        scored = {result.info.name for result in results.tasks}
        if settings is not None:
            scored |= self._scored_alike(read_runs(directory), settings)
        metrics: dict[str, dict[str, Any]] = {modality: {} for modality in MODALITIES}
        for spec in (*TASKS.values(), *VARIANTS.values()):
            path = directory / spec.modality / f"{spec.name}_score.json"
            if spec.name in scored and path.is_file():
                metrics[spec.modality][spec.key] = json.loads(path.read_text(encoding="utf-8"))
        known = settings or {}
        metadata = {
            "model_name": Path(str(known["model"])).name if "model" in known else None,
            "model_backbone": None,
            "model_size": None,
            "embedding_dimension": known.get("dimension"),
            "max_length_tokens": known.get("max_length"),
            "model_release_date": None,
            "data_source": "Self-Reported",
            "url": None,
            "report_generated_date": datetime.datetime.now().isoformat(),
        }
        # What is null here, the user fills in.
        submission = {"metadata": metadata, "metrics": metrics}
        write_text(directory / SUBMISSION, json.dumps(submission, indent=4) + "\n")

    def _scored_alike(
        self, runs: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> set[str]:
        """Tasks that earlier runs scored with the same model, precision, length and number of frames."""
        names = set()
        for name in runs.keys() & (TASKS.keys() | VARIANTS.keys()):
            alike = all(runs[name].get(key) == settings.get(key) for key in _SAME)
            frames = runs[name].get("frames", "all")
            if alike and frames in ("all", self._options.frames or DEFAULT_FRAMES):
                names.add(name)
        return names


def _spec(name: str) -> Spec:
    spec = TASKS.get(name) or VARIANTS.get(name)
    if spec is None:
        raise ValueError(
            f"MMEB-V2 has no task {name!r:.100}; it has {', '.join(TASKS)}, and beside them {', '.join(VARIANTS)}"
        )
    return spec
