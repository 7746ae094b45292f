"""Merge models of one architecture into one: weighted means of their weights, or points on the arc between them.

    python tools/merge_models.py --models runs/a runs/b --output models/soup
    python tools/merge_models.py --models runs/a runs/b --weights 0.7 0.3 --method slerp --output models/ab

Tokenizer, prompts, input settings and dtypes are the first model's. Says how near each model is to the result: the
cosine of the weights, and with --sample the mean cosine of the embeddings of some items. Weights are read and written in slices, so that
memory does not grow with the models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llave_jax.common import command_line
from llave_jax.common.tables import align
from llave_jax.inputs.item import Item
from llave_jax.weights.merge import METHODS, check_weights, merge_models
from llave_jax.weights.resolve import resolve_model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("tools/merge_models.py", __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="at least two: model directories, training runs, Hugging Face checkpoints, or names on the hub",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, help="of each model, 1 in all; default: equal ones"
    )
    parser.add_argument("--method", choices=METHODS, default="linear")
    parser.add_argument("--output", required=True, help="model directory to write")
    parser.add_argument(
        "--sample",
        nargs="+",
        metavar="PATH",
        help="items as for llave_jax.embed --input; every model embeds them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --output")
    command_line.add_dtype_argument(parser)
    args = parser.parse_args(argv)
    if args.dtype and not args.sample:
        parser.error("--dtype is of use only with --sample: weights keep the first model's dtype")
    args.weights = args.weights or [1 / len(args.models)] * len(args.models)
    try:
        check_weights(args.weights, len(args.models))
    except ValueError as error:
        parser.error(str(error))
    return args


def _merge(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    items = _items(args.sample) if args.sample else []
    paths = [resolve_model(model) for model in args.models]
    merged = merge_models(paths, args.weights, args.method, args.output, overwrite=args.overwrite)
    heading = ["model", "weight", "cosine of weights", "lowest of a tensor"]
    rows = [
        [model, f"{weight:g}", f"{parent.cosine:.6f}", f"{parent.lowest:.6f} {parent.tensor}"]
        for model, weight, parent in zip(args.models, args.weights, merged.parents, strict=True)
    ]
    if items:
        # Imported here: merging itself needs no JAX.
        from llave_jax.embedding.likeness import mean_cosines

        heading.insert(3, "cosine of embeddings")
        for row, cosine in zip(
            rows, mean_cosines(paths, args.output, items, args.dtype), strict=True
        ):
            row.insert(3, f"{cosine:.6f}")
    print(align([heading, *rows]))
    if merged.linear:
        print(
            f"{len(merged.linear)} tensors were too nearly parallel for slerp and were merged linearly"
        )
    print(f"written to {args.output}")


def _items(sample: Sequence[str]) -> list[Item]:
    """All items of the sample; read before anything is merged, so that a mistake in it costs nothing."""
    from llave_jax.embedding.item_sources import open_items

    items = []
    for entry in open_items(sample):
        if entry.item is None:
            raise ValueError(entry.error)
        items.append(entry.item)
    if not items:
        raise ValueError(f"--sample {' '.join(sample)}: has no items")
    return items


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_merge, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
