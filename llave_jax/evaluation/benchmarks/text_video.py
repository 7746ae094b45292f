"""Zero-shot text-video retrieval: which video belongs to a caption, and the reverse.

Owns the wording and both directions' tasks. Files are found by `video_files.py`. Videos are decoded by
`inputs/video_decode.py` (extra `video`); `inputs/video.py` chooses the frames.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llave_jax.common.files import write_text
from llave_jax.evaluation import output, published
from llave_jax.evaluation.benchmarks import activitynet, didemo, lsmdc, msrvtt, msvd
from llave_jax.evaluation.benchmarks.base import Benchmark, Options
from llave_jax.evaluation.benchmarks.video_files import VideoDataset
from llave_jax.evaluation.results import Reference, Suite
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.task import Items, Task, TaskInfo
from llave_jax.inputs import video_decode
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import only_on_first

# The authors' wording, with "an video": the model was trained on it as an instruction.
QUERY = "Find me an video that matches the given caption: {}"
TARGET = "<image>\nRepresent the given video."

METRICS = ("R@1", "R@5", "R@10", "median rank", "mean rank")
# Direction -> suffix of its task, and key in the score file.
_FORTH, _BACK = ("t2v", "text_to_video"), ("v2t", "video_to_text")


class TextVideo(Benchmark):
    """Captions and videos, ranked in both directions.

    Args:
      read: finds and reads the files.
      data_dir: what it is given.

    Raises:
      FileNotFoundError, ValueError: files are missing, malformed or ambiguous; it names them.
      MissingPackage: PyAV, which decodes videos, is not installed.

    Reference: LLaVE (arXiv 2503.04812), zero-shot text-video retrieval.
    """

    # 32 frames of 14 x 15 tokens, with the prompt, exceed the 4096 tokens that suffice for images.
    max_length = 8192

    def __init__(
        self,
        read: Callable[[str | os.PathLike], VideoDataset],
        data_dir: str | os.PathLike,
        options: Options | None = None,
    ):
        video_decode.check_installed()
        self._dataset = read(data_dir)
        name = self._dataset.name
        infos = [
            TaskInfo(f"{name}_{suffix}", "video", metric="R@1") for suffix, _ in (_FORTH, _BACK)
        ]
        references = ()
        if name in published.LLAVE_7B_VIDEO:
            recalls = zip(METRICS, published.LLAVE_7B_VIDEO[name], strict=False)
            tasks = {(infos[0].name, metric): value for metric, value in recalls}
            references = (Reference("LLaVE-7B", tasks),)
        self.suite = Suite(name, tuple(infos), references=references)

    def names(self) -> list[str]:
        """Both directions."""
        return [info.name for info in self.suite.tasks]

    def read(self, name: str) -> Task:
        """The task of one direction, by the conventions of the papers' evaluation code.

        With one caption a video, a tied match counts with every rank that it could take. With several captions a
        video, each caption is a query of its own; from video to text, the captions of a video count as one text with
        the score of the best of them.
        """
        dataset, owners = self._dataset, self._dataset.owners
        captions = Items(len(dataset.captions), self._caption)
        videos = Items(len(dataset.videos), self._video)
        stems = [video.stem for video in dataset.videos]
        one_each = len(captions) == len(videos)
        settings = {"missing_videos": dataset.missing} if dataset.missing else {}
        forth, back = self.suite.tasks
        if name == forth.name:
            return Task(
                info=forth,
                queries=captions,
                candidates=videos,
                relevant=[np.array([owner], np.int32) for owner in owners],
                metrics=METRICS,
                all_tied=one_each,
                settings=settings,
                query_names=dataset.captions,
                candidate_names=stems,
            )
        return Task(
            info=back,
            queries=videos,
            candidates=captions,
            relevant=[np.array([video], np.int32) for video in range(len(videos))],
            groups=owners,
            metrics=METRICS,
            all_tied=True,
            settings=settings,
            query_names=stems,
            candidate_names=[f"captions of {stem}" for stem in stems],
        )

    def write(self, directory: Path, task: Task, result: Result) -> None:
        """Writes `<name>_score.json` with the directions that were scored, and each direction's predictions."""
        path = directory / f"{self.suite.name}_score.json"
        forth = task.info == self.suite.tasks[0]
        scores = {} if forth or not path.exists() else json.loads(path.read_text())
        scores[(_FORTH if forth else _BACK)[1]] = dict(result.metrics)
        write_text(path, json.dumps(scores, indent=2) + "\n")
        rows = output.prediction_rows(task, only_on_first(result.answers))
        output.write_lines(directory / f"{task.info.name}_predictions.jsonl", rows)

    def _caption(self, index: int) -> Item:
        text = QUERY.format(self._dataset.captions[index])
        return Item(text, name=f"{self._dataset.name}: caption {index}")

    def _video(self, index: int) -> Item:
        path = str(self._dataset.videos[index])
        return Item(TARGET, video=path, name=f"{self._dataset.name}: video {index}")


READERS: dict[str, Callable[[str | os.PathLike, Options], TextVideo]] = {
    name: functools.partial(TextVideo, read)
    for name, read in {
        "msrvtt": msrvtt.read,
        "msvd": msvd.read,
        "didemo": didemo.read,
        "activitynet": activitynet.read,
        "lsmdc": lsmdc.read,
    }.items()
}
