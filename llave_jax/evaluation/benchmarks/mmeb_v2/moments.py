"""MMEB-V2's three tasks of moment retrieval: which clip of a video is described.

Owns wording and folders. Which frames of a folder are used is `frames.py`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from llave_jax.evaluation.benchmarks.builder import Make, TaskBuilder
from llave_jax.evaluation.benchmarks.mmeb_v2.fields import Row, join, text_item
from llave_jax.evaluation.benchmarks.mmeb_v2.frames import FrameFolders
from llave_jax.inputs.chat import IMAGE_MARKER

QUERY = "Find the clip that corresponds to the described scene in the given video:"
TARGET = join(IMAGE_MARKER, "Understand the content of the provided video.")

SEEKER_VIDEO = "Find the clip that corresponds to the given sentence and video segment:"
SEEKER_PICTURE = "Select the video clip that aligns with the given text and image:"
SEEKER_TEXT = "Find the clip that corresponds to the given text:"
SEEKER_TARGET = join(IMAGE_MARKER, "Understand the content of the provided video clip.")


def clips_of_a_video(builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders) -> None:
    """QVHighlight and Charades-STA: a video's folder holds `query` and, beside it, its clips.

    Clips whose folder begins with "positive" are right. They are ranked in natural order of their names, where
    VLM2Vec's evaluation takes them as the file system gives them: this matters only for equal scores.

    Args:
      builder: takes queries and candidates.
      rows: with `query` and `video_path`. Those of one video share their clips.
      frames: of videos and clips.

    Raises:
      ValueError: a field is not what it should be, or no clip is right; it names row and folder.
    """
    for row in rows:
        folder = posixpath.splitext(posixpath.basename(row.text("video_path")))[0]
        names = frames.folders(folder, row.where)
        if not names:
            continue
        clips = [f"{folder}/{name}" for name in names if name != "query"]
        right = [clip for clip in clips if posixpath.basename(clip).startswith("positive")]
        if not right:
            raise ValueError(
                f"{row.where}: {frames.root / folder}: expected a folder positive*; found {', '.join(names)}"
            )
        pool = [
            builder.add_candidate(clip, frames.video(TARGET, clip, row.where)) for clip in clips
        ]
        text = join(IMAGE_MARKER, QUERY, row.text("query"))
        video = frames.video(text, f"{folder}/query", row.where)
        builder.add_query(row.where, video, dict.fromkeys(right, 1), pool)


def moment_seeker(builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders) -> None:
    """MomentSeeker: a text, with a video or a picture or alone, and clips of which one or more are right.

    Args:
      builder: takes queries and candidates.
      rows: with `query`, `input_frames` (a .mp4, a .jpg, or anything else for a text alone), `positive_frames` and
        `negative_frames` (lists of objects with `output_path`).
      frames: of videos and clips.

    Raises:
      ValueError: a field is not what it should be; it names row and field.
    """
    for row in rows:
        right, wrong = (
            [_clip_folder(path) for path in _paths(row, field)]
            for field in ("positive_frames", "negative_frames")
        )
        pool = [
            builder.add_candidate(clip, frames.video(SEEKER_TARGET, clip, row.where))
            for clip in (*right, *wrong)
        ]
        builder.add_query(row.where, _query(row, frames), dict.fromkeys(right, 1), pool)


def _query(row: Row, frames: FrameFolders) -> Make:
    query, shown = row.text("query"), row.values["input_frames"] or ""
    if shown.endswith(".mp4"):
        return frames.video(join(IMAGE_MARKER, SEEKER_VIDEO, query), _clip_folder(shown), row.where)
    if shown.endswith(".jpg"):
        text = join(IMAGE_MARKER, SEEKER_PICTURE, query)
        return frames.picture(text, f"query_{shown}", row.where)
    return text_item(join(SEEKER_TEXT, query), row.where)


def _paths(row: Row, field: str) -> list[str]:
    entries = row.values[field]
    if not isinstance(entries, list):
        raise row.wrong(field, "a list of objects with output_path")
    paths = [entry.get("output_path") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(path, str) and path for path in paths) or (
        field == "positive_frames" and not paths
    ):
        raise row.wrong(field, "a list of objects with output_path")
    return [path for path in paths if path]


def _clip_folder(path: str) -> str:
    return f"video_frames/{path.replace('/', '_').split('.mp4')[0]}"
