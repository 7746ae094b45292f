"""Which queries of a task a page shows, and what of them: the worst answers, some right ones, their best candidates.

Owns the choice. Pictures are `report_pictures.py`, looks `report_html.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llave_jax.evaluation.report_html import Candidate, Card, Example
from llave_jax.evaluation.report_pictures import Pictures, Reader
from llave_jax.evaluation.scoring import Answers
from llave_jax.evaluation.task import Task
from llave_jax.inputs.item import Item

# Candidates shown of a query, besides its best right one.
CANDIDATES = 5
# Cards of a page, by which examples become fewer where tasks are many, and examples of a task at most and at least.
_CARDS, _MOST, _LEAST = 1700, 8, 2
# Captions that are shown of a group that counts as one answer, and frames of a video that is the query.
_CAPTIONS, _FRAMES = 3, 3


def chosen(answers: Answers, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The queries that are shown.

    Wrong answers are those that lead over the best right one by the most, the worst first; the right answer of such a
    query may not be ranked at all. Right answers are evenly spread.

    Args:
      answers: of a task.
      count: of both together, at most; a third of it are right ones.

    Returns:
      Row numbers of wrong and of right answers.
    """
    right = answers.right
    wrong_rows, right_rows = np.flatnonzero(~right), np.flatnonzero(right)
    lead = answers.scores[wrong_rows, 0] - answers.positive_score[wrong_rows]
    worst = wrong_rows[np.argsort(-lead, kind="stable")][: count - count // 3]
    if len(right_rows) > count // 3:
        places = np.linspace(0, len(right_rows) - 1, count // 3).astype(int)
        right_rows = right_rows[places]
    return worst, right_rows


class _Found(NamedTuple):
    """A candidate of an example: which, its cosine, its rank from 1."""

    answer: int
    score: float
    rank: int


class Gallery:
    """Examples of all tasks of a page; where tasks are many, each has fewer.

    Args:
      tasks: how many there are.

    Attributes:
      each: examples of a task: 8 with 30 tasks or fewer, 3 with 78.
      pictures: reads what is shown.
    """

    def __init__(self, tasks: int):
        cards = CANDIDATES + 2
        self.each = min(_MOST, max(_LEAST, _CARDS // (cards * max(1, tasks))))
        # The query counts twice: it may be a video, of which several frames are shown.
        self.pictures = Reader(tasks * self.each * (cards + 1))

    def examples(self, task: Task, answers: Answers) -> dict[str, list[Example]]:
        """Queries with their best answers, and each with its best right one at any rank.

        Args:
          task: which the answers are of.
          answers: rankings.

        Returns:
          Examples of "Wrong" and of "Right" answers.
        """
        wrong, right = chosen(answers, self.each)
        found = _examples(task, answers, [*wrong.tolist(), *right.tolist()], self.pictures)
        return {"Wrong": found[: len(wrong)], "Right": found[len(wrong) :]}


def _examples(task: Task, answers: Answers, rows: Sequence[int], pictures: Reader) -> list[Example]:
    found = [_found(answers, row) for row in rows]
    wanted = list(dict.fromkeys(entry.answer for row in found for entry in row))
    items = [task.queries[row] for row in rows] + [_item(task, answer) for answer in wanted]
    frames = [_FRAMES] * len(rows) + [1] * len(wanted)
    shown = pictures.read(items, frames)
    cards = [_card(item, picture) for item, picture in zip(items, shown, strict=True)]
    of_answer = dict(zip(wanted, cards[len(rows) :], strict=True))
    for answer in wanted if task.groups is not None else ():
        of_answer[answer] = Card(_captions(task, answer))
    return [
        Example(
            query=cards[number],
            candidates=[
                Candidate(of_answer[answer], score, rank, positive=answer in task.relevant[row])
                for answer, score, rank in found[number]
            ],
        )
        for number, row in enumerate(rows)
    ]


def _found(answers: Answers, row: int) -> list[_Found]:
    ranked = [
        _Found(int(answer), float(score), rank)
        for rank, (answer, score) in enumerate(
            zip(answers.ranking[row], answers.scores[row], strict=True), 1
        )
        if answer >= 0
    ]
    shown = ranked[:CANDIDATES]
    positive = int(answers.positive[row])
    if positive >= 0 and positive not in [entry.answer for entry in shown]:
        behind = _Found(positive, float(answers.positive_score[row]), 1 + int(answers.better[row]))
        shown.append(next((entry for entry in ranked if entry.answer == positive), behind))
    return shown


def _members(task: Task, answer: int) -> np.ndarray:
    """Candidates that count as one answer."""
    return np.array([answer]) if task.groups is None else np.flatnonzero(task.groups == answer)


def _item(task: Task, answer: int) -> Item:
    return task.candidates[int(_members(task, answer)[0])]


def _captions(task: Task, answer: int) -> str:
    """The first texts of a group, and how many more there are; a single one as it is."""
    members = _members(task, answer)
    texts = [readable(task.candidates[int(member)].text) for member in members[:_CAPTIONS]]
    if len(members) == 1:
        return texts[0]
    more = len(members) - len(texts)
    return "\n".join([*(f"• {text}" for text in texts), *([f"and {more} more"] if more else [])])


def _card(item: Item, pictures: Pictures) -> Card:
    # The name says where an item is from; of a text, the text itself is enough.
    alt = f"{pictures.what}: {item.name}" if item.name else pictures.what
    return Card(readable(item.text), pictures.shown, alt, pictures.note)


def readable(text: str) -> str:
    """User text without the markers that stand for images.

    Args:
      text: user content.

    Returns:
      The text, stripped.
    """
    for marker in ("<|image_1|>", "<image>"):
        text = text.replace(marker, "")
    return text.strip()
