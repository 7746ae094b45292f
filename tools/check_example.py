"""Check a converted LLaVE-0.5B, -2B or -7B against the example that its authors publish.

    python tools/check_example.py --model DIR --image PHOTO

PHOTO is the picture of a cat and a dog of the authors' repository, `figures/example.jpg`. Prints the
cosines of both directions, image to text and text to image, beside the published ones.

Exit status: 0 if all agree as far as half precision allows, 1 if one differs, 2 if the check could
not be made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from llave_jax import Embedder
from llave_jax.common import command_line
from llave_jax.weights import model_dir
from llave_jax.weights.resolve import resolve_model

# The authors' demo puts a space, not a newline, behind the image.
QUESTION = "<image> Represent the given image with the following question: What is in the image"
CAPTION = "Find me an everyday image that matches the given caption: {}."
PICTURE = "<image> Represent the given image."
ANIMALS = ("A cat and a dog", "A cat and a tiger")

# The published numbers were computed in float16.
TOLERANCE = 0.01


class Published(NamedTuple):
    """Cosines that the authors print, each for ANIMALS in their order.

    Attributes:
      hidden_size: of the model: the dimension of its embeddings.
      image_to_text: of the picture with each text.
      text_to_image: of each caption with the picture.
    """

    hidden_size: int
    image_to_text: tuple[float, float]
    text_to_image: tuple[float, float]


PUBLISHED = {
    "0.5B": Published(896, (0.4802, 0.3413), (0.3992, 0.3354)),
    "2B": Published(1536, (0.5132, 0.3809), (0.5225, 0.4141)),
    "7B": Published(3584, (0.6240, 0.4543), (0.5347, 0.4001)),
}


class _Row(NamedTuple):
    query: str
    target: str
    cosine: float
    published: float

    @property
    def agrees(self) -> bool:
        return abs(self.cosine - self.published) <= TOLERANCE


def size_of(hidden_size: int) -> str:
    """Finds the released model whose embeddings have a size.

    Args:
      hidden_size: D.

    Returns:
      A key of PUBLISHED.

    Raises:
      ValueError: there is none.
    """
    for size, published in PUBLISHED.items():
        if published.hidden_size == hidden_size:
            return size
    known = ", ".join(f"{p.hidden_size} ({size})" for size, p in PUBLISHED.items())
    raise ValueError(
        f"the model's embeddings have {hidden_size} dimensions, those of the released models {known}; "
        "name the one to compare with: --size"
    )


def _compare(model: Embedder, image: str, published: Published) -> list[_Row]:
    """The example's cosines, published and of `model`."""
    captions = [CAPTION.format(animals) for animals in ANIMALS]
    question, picture, *texts = model.encode(
        [
            {"text": QUESTION, "image": image},
            {"text": PICTURE, "image": image},
            *ANIMALS,
            *captions,
        ]
    )
    answers, queries = texts[: len(ANIMALS)], texts[len(ANIMALS) :]
    rows = [
        _Row("the picture, what is in it", text, float(question @ answer), cosine)
        for text, answer, cosine in zip(ANIMALS, answers, published.image_to_text, strict=True)
    ]
    rows += [
        _Row(f"caption: {text}", "the picture", float(query @ picture), cosine)
        for text, query, cosine in zip(ANIMALS, queries, published.text_to_image, strict=True)
    ]
    return rows


def _table(rows: list[_Row]) -> str:
    lines = [f"{'query':28}{'target':20}{'cosine':>8}{'published':>11}{'difference':>12}"]
    lines += [
        f"{row.query:28}{row.target:20}{row.cosine:8.4f}{row.published:11.4f}"
        f"{row.cosine - row.published:+12.4f}{'' if row.agrees else '  differs'}"
        for row in rows
    ]
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("tools/check_example.py", __doc__)
    command_line.add_model_argument(parser)
    parser.add_argument("--image", required=True, metavar="PHOTO", help="the authors' picture")
    parser.add_argument(
        "--size",
        choices=tuple(PUBLISHED),
        help="released model to compare with; by default the one with embeddings of this size",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of parameters and activations (default: %(default)s)",
    )
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> int:
    directory = resolve_model(args.model)
    size = args.size or size_of(model_dir.load_config(directory).text.hidden_size)
    model = Embedder.from_pretrained(directory, dtype=args.dtype)
    rows = _compare(model, args.image, PUBLISHED[size])
    print(f"{args.model} in {args.dtype}, beside LLaVE-{size} as published\n\n{_table(rows)}\n")
    agrees = all(row.agrees for row in rows)
    print("agrees" if agrees else f"differs by more than {TOLERANCE}")
    return 0 if agrees else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_check, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
