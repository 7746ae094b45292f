"""MMEB-V2's 18 video tasks: from annotation rows to a task.

Owns the table of parsers, and those of classification and of retrieval. Questions are `video_qa.py`, clips of a video
`moments.py`, the choice of frames `frames.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llave_jax.evaluation.benchmarks.builder import TaskBuilder
from llave_jax.evaluation.benchmarks.mmeb_v2 import moments, video_qa
from llave_jax.evaluation.benchmarks.mmeb_v2.fields import Row, join, text_item
from llave_jax.evaluation.benchmarks.mmeb_v2.frames import (
    DEFAULT_FRAMES,
    FrameFolders,
)
from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData
from llave_jax.evaluation.benchmarks.mmeb_v2.pixels import Pixels
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import METRICS, Spec
from llave_jax.evaluation.task import Task
from llave_jax.inputs.chat import IMAGE_MARKER

Parse = Callable[[TaskBuilder, Iterable[Row], FrameFolders], None]


@dataclasses.dataclass(frozen=True)
class Parser:
    """How the rows of a task are read.

    Attributes:
      columns: that are read.
      parse: fills a task.
      local: whether each query ranks candidates of its own.
      frames: how many of a video, unless a run says another number; None: all, whatever a run says.
      rows: so many are read; None: all.
    """

    columns: tuple[str, ...]
    parse: Parse
    local: bool
    frames: int | None = DEFAULT_FRAMES
    rows: int | None = None


def read(spec: Spec, data: HubData, pixels: Pixels, frames: int | None = None) -> Task:
    """Reads a task. With several processes all call this alike.

    Args:
      spec: the task.
      data: where its annotations are.
      pixels: where its frames are.
      frames: to use of a video; None: 8.

    Returns:
      The task; no picture is read yet. `settings` has the number of frames.

    Raises:
      FileNotFoundError: annotations or frames are missing; it says how many.
      ValueError: a row is malformed; it names row and field.
    """
    builder, folders = _parse(spec, data, pixels.open(spec), frames)
    if missing := folders.missing():
        raise FileNotFoundError(f"{spec.name}: {missing}. {pixels.advice(spec)}")
    settings = {"frames": "all" if folders.count is None else folders.count}
    return builder.task(settings, spec.name)


def missing_frames(spec: Spec, data: HubData, root: Path) -> str:
    """What a task lacks of its frames.

    Args:
      spec: the task.
      data: where its annotations are, all of them.
      root: the folder of its frames.

    Returns:
      How many folders are missing or without frames, and the first of them; "" if there are none.

    Raises:
      ValueError: a row is malformed; it names row and field.
    """
    return _parse(spec, data, root)[1].missing()


def _parse(
    spec: Spec, data: HubData, root: Path, frames: int | None = None
) -> tuple[TaskBuilder, FrameFolders]:
    parser = PARSERS[spec.name.removesuffix("_1k8")]
    if frames is not None and frames < 1:
        raise ValueError(f"the number of frames is {frames}; expected at least 1")
    folders = FrameFolders(root, parser.frames and (frames or parser.frames))
    builder = TaskBuilder(spec.info, METRICS, local=parser.local)
    parser.parse(builder, _rows(spec, data, parser), folders)
    return builder, folders


def _rows(spec: Spec, data: HubData, parser: Parser) -> Iterator[Row]:
    for config in spec.configs:
        table = data.table(spec.repository, config, spec.split, spec.local)
        for number, values in enumerate(table.rows(*parser.columns, first=parser.rows)):
            yield Row({**values, video_qa.SUBSET: config}, table.where(number))


def _class_names(dataset: str) -> list[str]:
    path = Path(__file__).with_name("class_names.json")
    return json.loads(path.read_text(encoding="utf-8"))[dataset]


def _classify(
    instruction: str,
    dataset: str,
    builder: TaskBuilder,
    rows: Iterable[Row],
    frames: FrameFolders,
) -> None:
    """A video, and the names of all classes: those of rows first, then those that no row has."""
    for row in rows:
        name = row.text("pos_text")
        builder.add_candidate(name, text_item(name, row.where))
        video = frames.video(join(IMAGE_MARKER, instruction), row.id("video_id"), row.where)
        builder.add_query(row.where, video, {name: 1})
    for name in _class_names(dataset):
        builder.add_candidate(name, text_item(name, f"class names of {dataset}"))


def _classify_by_row(
    instruction: str, builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders
) -> None:
    """A video, and the row's own names."""
    for row in rows:
        name, names = row.text("pos_text"), row.texts("neg_text")
        if name not in names:
            raise row.wrong("neg_text", f"the right answer {name!r} among the names")
        pool = [builder.add_candidate(name, text_item(name, row.where)) for name in names]
        video = frames.video(join(IMAGE_MARKER, instruction), row.id("video_id"), row.where)
        builder.add_query(row.where, video, {name: 1}, pool)


def _retrieve(
    instruction: str,
    caption: str,
    video: str,
    builder: TaskBuilder,
    rows: Iterable[Row],
    frames: FrameFolders,
) -> None:
    """A caption, the first where a row has several, and all videos; a file's folder is named without its suffix."""
    for row in rows:
        found = row.values[caption]
        text = found if isinstance(found, str) else row.texts(caption)[0]
        folder = row.id(video)
        if video == "video":
            folder = posixpath.splitext(posixpath.basename(folder))[0]
        builder.add_candidate(folder, frames.video(moments.TARGET, folder, row.where))
        query = text_item(join(instruction, text), row.where)
        builder.add_query(row.where, query, {folder: 1})


def _classification(instruction: str, dataset: str) -> Parser:
    parse = functools.partial(_classify, instruction, dataset)
    return Parser(("video_id", "pos_text"), parse, local=False)


def _retrieval(instruction: str, caption: str, video: str) -> Parser:
    parse = functools.partial(_retrieve, instruction, caption, video)
    return Parser((caption, video), parse, local=False)


def _questions(parse: Parse, columns: str) -> Parser:
    return Parser(tuple(columns.split()), parse, local=True)


PARSERS: dict[str, Parser] = {
    "K700": _classification("Recognize the category of the video content.", "Kinetics-700"),
    "SmthSmthV2": Parser(
        ("video_id", "pos_text", "neg_text"),
        functools.partial(
            _classify_by_row,
            "What actions or object interactions are being performed by the person in the video?",
        ),
        local=True,
        rows=1000,
    ),
    "HMDB51": _classification(
        "What actions or objects interactions are the person in the video doing?", "HMDB51"
    ),
    "UCF101": _classification(
        "What activities or sports are being performed by the person in the video?", "UCF101"
    ),
    # The space at the end is the benchmark's.
    "Breakfast": _classification(
        "Recognize the breakfast type that the person is cooking in the video. ", "Breakfast"
    ),
    "MVBench": _questions(video_qa.mv_bench, "question video candidates answer"),
    "Video-MME": _questions(video_qa.video_mme, "question videoID options answer"),
    "NExTQA": _questions(video_qa.next_qa, "question video answer a0 a1 a2 a3 a4"),
    "EgoSchema": _questions(video_qa.ego_schema, "question video_idx option answer"),
    "ActivityNetQA": _questions(video_qa.activity_net_qa, "question video_name answer"),
    "DiDeMo": _retrieval(
        "Find a video that includes the following described scenes:", "caption", "video"
    ),
    "MSR-VTT": _retrieval(
        "Find a video that contains the following visual content:", "caption", "video_id"
    ),
    "MSVD": _retrieval(
        "Find the video snippet that corresponds to the given summary:", "caption", "video_id"
    ),
    "VATEX": _retrieval("Select a video that fits the description provided:", "enCap", "videoID"),
    "YouCook2": _retrieval(
        "Find a video that demonstrates the following action while making a recipe:",
        "sentence",
        "id",
    ),
    "QVHighlight": Parser(("query", "video_path"), moments.clips_of_a_video, local=True),
    "Charades-STA": Parser(("query", "video_path"), moments.clips_of_a_video, local=True),
    "MomentSeeker": Parser(
        ("query", "positive_frames", "negative_frames", "input_frames"),
        moments.moment_seeker,
        local=True,
        frames=None,
    ),
}
