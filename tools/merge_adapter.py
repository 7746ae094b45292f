"""Merge an adapter (LoRA) into its base: a model directory without adapters.

    python tools/merge_adapter.py --model BASE --adapter ADAPTER --output DIR
    python tools/merge_adapter.py --model RUN --output DIR

ADAPTER is a directory in the format of the peft library (adapter_config.json and adapter_model.safetensors, with
the module names of the authors' code or of transformers' LlavaOnevision), or a run that trained adapters on BASE. The
second form merges a run that trained adapters with the base that it began from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llave_jax.common import command_line
from llave_jax.weights.merge_adapter import merge_adapter
from llave_jax.weights.resolve import resolve_model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("tools/merge_adapter.py", __doc__)
    command_line.add_model_argument(parser)
    command_line.add_adapter_argument(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="model directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --output")
    return parser.parse_args(argv)


def _merge(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    model = resolve_model(args.model)
    merge_adapter(model, args.output, args.adapter, overwrite=args.overwrite)
    print(f"written to {args.output}")


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
