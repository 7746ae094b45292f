"""Pictures of handwritten digits, and what can truly be said about them.

Owns the scans (scikit-learn's, 8 x 8 pixels), the scenes drawn from them and the texts of the bundled
benchmark: questions with answers, captions, labels. Rows and files are `dataset.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A scene is a grid of 2 x 2 cells, counted row by row.
CELLS = ("top left", "top right", "bottom left", "bottom right")
LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
NEIGHBOURS = {
    "to the left of": ((0, 1), (2, 3)),
    "to the right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}
CELL_PIXELS = 24
SCENE_PIXELS = 2 * CELL_PIXELS
TEST_SHARE = 0.22

# Largest random deviations of drawing and cropping: about those of handwriting itself.
_ROTATION_DEGREES = 5.0
_SCALE = 0.05
_SHIFT_PIXELS = 1.0
_CROP = 2  # pixels


class Scans(NamedTuple):
    """All scans.

    Attributes:
      pixels: uint8 [1797, 8, 8], bright strokes on black.
      labels: int [1797], 0 to 9.
    """

    pixels: np.ndarray
    labels: np.ndarray


def load_scans() -> Scans:
    """Read the scans that come with scikit-learn."""
    import sklearn.datasets

    bunch: Any = sklearn.datasets.load_digits()
    return Scans(np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target)


def split_scans(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split scans into training and test scans, each digit in the same share.

    Args:
      labels: int [n], 0 to 9.
      seed: of the split.

    Returns:
      train: int [a], indices of scans, sorted.
      test: int [n - a], about TEST_SHARE of each digit.
    """
    rng = np.random.default_rng([seed, 0])
    train, test = [], []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        count = round(TEST_SHARE * len(members))
        test.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def draw_scan(scan: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Enlarge a scan to a cell, with a margin around it.

    Args:
      scan: uint8 [8, 8].
      rng: turns, shifts and scales the scan a little; None: exactly in place.

    Returns:
      uint8 [24, 24].
    """
    jitter = rng.uniform(-1, 1, 4) if rng is not None else np.zeros(4)
    padded = PIL.Image.fromarray(np.pad(scan, 1))
    angle = np.deg2rad(_ROTATION_DEGREES * jitter[0])
    # Pillow takes the inverse map, from the cell to the padded scan.
    scale = padded.width / CELL_PIXELS / (1 + _SCALE * jitter[1])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = CELL_PIXELS / 2 + _SHIFT_PIXELS * jitter[2:]
    offset = padded.width / 2 - turn @ centre
    matrix = np.column_stack([turn, offset]).ravel()
    size = (CELL_PIXELS, CELL_PIXELS)
    bicubic = PIL.Image.Resampling.BICUBIC
    return np.asarray(padded.transform(size, PIL.Image.Transform.AFFINE, tuple(matrix), bicubic))


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the four cells show.

    Attributes:
      digits: the digit of each cell.
      scans: index of the scan that shows it.
    """

    digits: tuple[int, ...]
    scans: tuple[int, ...]

    def cells_of(self, digit: int) -> list[int]:
        """The cells that show a digit.

        Args:
          digit: 0 to 9.

        Returns:
          Their numbers, ascending.
        """
        return [cell for cell, other in enumerate(self.digits) if other == digit]


def draw_scene(scene: Scene, scans: Scans, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene.

    Args:
      scene: what to draw.
      scans: all scans.
      rng: of the small deviations of each digit.

    Returns:
      uint8 [48, 48].
    """
    cells = [draw_scan(scans.pixels[index], rng) for index in scene.scans]
    return np.block([cells[:2], cells[2:]])


def crop_cell(picture: np.ndarray, cell: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a cell out of a picture, up to 2 pixels beside its exact place.

    Args:
      picture: uint8 [48, 48].
      cell: 0 to 3.
      rng: of the deviation.

    Returns:
      uint8 [22 to 24, 22 to 24]: what lies outside the picture is missing.
    """
    top, left = np.array(divmod(cell, 2)) * CELL_PIXELS + rng.integers(-_CROP, _CROP + 1, 2)
    bottom, right = top + CELL_PIXELS, left + CELL_PIXELS
    return picture[max(top, 0) : bottom, max(left, 0) : right]


def make_family(rng: np.random.Generator, pools: Sequence[np.ndarray], size: int) -> list[Scene]:
    """Scenes of the same four scans in different cells.

    Three families in ten have only two different digits, so that there is something to count.

    Args:
      rng: of digits, scans and places.
      pools: for each digit, int [n], the scans that may be used.
      size: number of scenes, at most 4.

    Returns:
      Different scenes, in random order.
    """
    while True:
        choices = rng.choice(10, 2, replace=False) if rng.random() < 0.3 else np.arange(10)
        digits = sorted(rng.choice(choices, 4).tolist())
        arrangements = sorted(set(itertools.permutations(digits)))
        if len(arrangements) >= size:
            break
    scans = [
        index
        for digit, group in itertools.groupby(digits)
        for index in rng.choice(pools[digit], len(list(group)), replace=False).tolist()
    ]
    family = []
    for pick in rng.choice(len(arrangements), size, replace=False):
        unused = list(zip(digits, scans, strict=True))
        members = []
        for digit in arrangements[pick]:
            members.append(next(member for member in unused if member[0] == digit))
            unused.remove(members[-1])
        family.append(Scene(arrangements[pick], tuple(scan for _, scan in members)))
    return family


def questions(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """All questions about a scene, each with its only right answer.

    Answers are digit words, or what two cells read ("three seven").

    Args:
      scene: what the picture shows.

    Returns:
      (question, answer), by kind of question; a kind may have none.
    """
    word = [DIGITS[digit] for digit in scene.digits]
    unique = [cell for cell in range(4) if len(scene.cells_of(scene.digits[cell])) == 1]
    return {
        "place": [(f"Which digit is at the {CELLS[cell]}?", word[cell]) for cell in range(4)],
        "neighbour": [
            (f"Which digit is {relation} the {word[other]}?", word[cell])
            for relation, pairs in NEIGHBOURS.items()
            for cell, other in pairs
            if other in unique
        ],
        "count": [
            (f"How many times does {DIGITS[digit]} appear?", DIGITS[len(scene.cells_of(digit))])
            for digit in range(10)
        ],
        "reading": [
            (f"What does the {line} read?", f"{word[first]} {word[second]}")
            for line, (first, second) in LINES.items()
        ],
    }


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Draws one question with its answer.

    First the kind is drawn, then the answer, then the question, each with equal chances. So no answer is
    asked for more often because it is frequent.

    Args:
      scene: what is asked about.
      rng: of the draws.

    Returns:
      The question and the answer.
    """
    kinds = [pairs for pairs in questions(scene).values() if pairs]
    pairs = kinds[int(rng.integers(len(kinds)))]
    answers = sorted({answer for _, answer in pairs})
    answer = answers[int(rng.integers(len(answers)))]
    fitting = [question for question, other in pairs if other == answer]
    return fitting[int(rng.integers(len(fitting)))], answer


class Fact(NamedTuple):
    """A digit stands in a cell. A caption is made of facts, in the order of the cells.

    Attributes:
      cell: number of the cell.
      digit: 0 to 9.
    """

    cell: int
    digit: int


def holds(facts: Sequence[Fact], scene: Scene) -> bool:
    """Whether all facts are true of a scene.

    Args:
      facts: to check.
      scene: the scene.

    Returns:
      True if each fact's cell shows its digit.
    """
    return all(scene.digits[cell] == digit for cell, digit in facts)


def describe(scene: Scene, cells: Sequence[int]) -> tuple[Fact, ...]:
    """The facts of some cells of a scene.

    Args:
      scene: the scene.
      cells: numbers of the cells.

    Returns:
      One fact a cell, in the order of `cells`.
    """
    return tuple(Fact(cell, scene.digits[cell]) for cell in cells)


def caption(facts: Sequence[Fact]) -> str:
    """Facts as a text.

    Args:
      facts: at least one, in the order of the cells.

    Returns:
      Such as "a three at the top left and an eight at the bottom right".
    """
    parts = [f"{_article(digit)} {DIGITS[digit]} at the {CELLS[cell]}" for cell, digit in facts]
    return " and ".join(", ".join(parts).rsplit(", ", 1))


def _article(digit: int) -> str:
    """The indefinite article of a digit's word."""
    return "an" if digit == 8 else "a"


def choose_facts(
    scene: Scene, others: Sequence[Scene], rng: np.random.Generator
) -> tuple[Fact, ...]:
    """Draw two to four facts of a scene that do not all hold for any of the others.

    Args:
      scene: what the facts are about.
      others: scenes that each differ from it in some cell. All four facts tell them apart, so there is
        always a choice.
      rng: of the choice.

    Returns:
      The facts, in the order of the cells.
    """
    subsets = [cells for n in (2, 3, 4) for cells in itertools.combinations(range(4), n)]
    captions = [describe(scene, cells) for cells in subsets]
    telling = [facts for facts in captions if not any(holds(facts, other) for other in others)]
    return telling[int(rng.integers(len(telling)))]


def labels(scene: Scene, cell: int) -> list[str]:
    """Names of the digit in a cell that fit no other cell of the scene.

    Args:
      scene: the scene.
      cell: number of the cell.

    Returns:
      Two names with the place; a third without it, if the digit occurs once.
    """
    digit = scene.digits[cell]
    names = [f"the {DIGITS[digit]} at the {CELLS[cell]}", f"the digit at the {CELLS[cell]}"]
    return names + ([f"the {DIGITS[digit]}"] if len(scene.cells_of(digit)) == 1 else [])
