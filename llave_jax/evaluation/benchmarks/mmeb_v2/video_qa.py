"""MMEB-V2's five tasks of questions about a video: how question and options are put into words.

Owns the wording. It is part of the benchmark: another string gives another score. Spaces are as VLM2Vec's evaluation
has them, also where one is missing or doubled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llave_jax.evaluation.benchmarks.builder import TaskBuilder
from llave_jax.evaluation.benchmarks.mmeb_v2.fields import Row, join, text_item
from llave_jax.evaluation.benchmarks.mmeb_v2.frames import FrameFolders
from llave_jax.inputs.chat import IMAGE_MARKER

PROMPT = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only "
    "the exact text of your chosen answer. Question: "
)
# The field that says which config a row of MVBench is of: the folder of its frames.
SUBSET = "subset"


def video_mme(builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders) -> None:
    """Four options, each with its letter.

    Args:
      builder: takes queries and candidates.
      rows: with `question`, `videoID`, `options` ("A. text") and `answer`, a letter.
      frames: of the videos.

    Raises:
      ValueError: a field is not what it should be; it names row and field.
    """
    for row in rows:
        options = row.texts("options")
        letters = [chr(ord("A") + place) for place in range(len(options))]
        answer = row.text("answer")
        if answer not in letters:
            raise row.wrong("answer", f"a letter from A to {letters[-1]}")
        question = f"{row.text('question')}\n" + "\n".join(options)
        candidates = {option: without_letter(option) for option in options}
        right = options[letters.index(answer)]
        _ask(builder, row, frames, row.id("videoID"), question, options, candidates, right)


def ego_schema(builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders) -> None:
    """Five options, each with its letter. The first one follows the question without a space.

    Args:
      builder: takes queries and candidates.
      rows: with `question`, `video_idx`, `option` ("A. text") and `answer`, a number from 0.
      frames: of the videos.

    Raises:
      ValueError: a field is not what it should be; it names row and field.
    """
    for row in rows:
        options = row.texts("option")
        question = row.text("question") + " ".join(options)
        candidates = {option: without_letter(option) for option in options}
        right = options[row.index("answer", len(options))]
        _ask(builder, row, frames, row.id("video_idx"), question, options, candidates, right)


def next_qa(builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders) -> None:
    """Five options. The question lists them with letters, candidates have none.

    Args:
      builder: takes queries and candidates.
      rows: with `question`, `video`, `a0` to `a4` and `answer`, a number from 0.
      frames: of the videos.

    Raises:
      ValueError: a field is not what it should be; it names row and field.
    """
    for row in rows:
        options = [row.text(f"a{place}") for place in range(5)]
        question = with_options(row.text("question"), lettered(options))
        candidates = {option: option for option in options}
        right = options[row.index("answer", 5)]
        _ask(builder, row, frames, row.id("video"), question, options, candidates, right)


def mv_bench(builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders) -> None:
    """Two to five options, given letters here.

    Args:
      builder: takes queries and candidates.
      rows: with `question`, `video` (a file), `candidates`, `answer`, one of them, and `subset`. Of repeated candidates
        the last one is right, as in VLM2Vec's evaluation.
      frames: of the videos.

    Raises:
      ValueError: a field is not what it should be; it names row and field.
    """
    for row in rows:
        texts, answer = row.texts("candidates"), row.text("answer")
        if answer not in texts:
            raise row.wrong("answer", f"one of {texts!r:.200}")
        options = lettered(texts)
        right = options[len(texts) - 1 - texts[::-1].index(answer)]
        folder = f"{row.text(SUBSET)}/{row.id('video')}"
        question = with_options(row.text("question"), options)
        candidates = {option: option for option in options}
        _ask(builder, row, frames, folder, question, options, candidates, right)


def activity_net_qa(builder: TaskBuilder, rows: Iterable[Row], frames: FrameFolders) -> None:
    """Yes or no.

    Args:
      builder: takes queries and candidates.
      rows: with `question`, `video_name` and `answer`.
      frames: of the videos.

    Raises:
      ValueError: a field is not what it should be; it names row and field.
    """
    options = ["yes", "no"]
    for row in rows:
        answer = row.text("answer")
        if answer not in options:
            raise row.wrong("answer", "yes or no")
        question = f"{row.text('question')}? (A) yes; (B) no."
        candidates = {option: option for option in options}
        folder = f"v_{row.id('video_name')}"
        _ask(builder, row, frames, folder, question, options, candidates, answer)


def lettered(options: Sequence[str]) -> list[str]:
    """Options as "(A) text".

    Args:
      options: in order.

    Returns:
      The same with letters.
    """
    return [f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(options)]


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options below it.

    Args:
      question: the text.
      options: with letters.

    Returns:
      The text, without white space at its end.
    """
    return "\n".join([question, "Options:", *options]).rstrip()


def without_letter(option: str) -> str:
    """The text of an option "A. text", by VLM2Vec's rule: a full stop at its end is lost with the letter.

    Args:
      option: with its letter. Without ". " its last character alone is looked at, which is their rule too.

    Returns:
      What follows the first ". ", without dots and spaces at both ends.
    """
    return option[option.find(". ") :].strip(". ")


def _ask(
    builder: TaskBuilder,
    row: Row,
    frames: FrameFolders,
    folder: str,
    question: str,
    options: Sequence[str],
    candidates: Mapping[str, str],
    right: str,
) -> None:
    """Adds a query and its candidates, name -> text."""
    pool = [
        builder.add_candidate(option, text_item(candidates[option], row.where))
        for option in options
    ]
    video = frames.video(join(IMAGE_MARKER, PROMPT, question), folder, row.where)
    builder.add_query(row.where, video, {right: 1}, pool)
