"""Compile a training run for a TPU slice or a host of GPUs without having one, and report memory and
speed.

    python tools/compile_ahead.py --config configs/tpu_v4.py:7b --topology v4:4x4x4
    python tools/compile_ahead.py --config configs/llave_0_5b.py --topology v5e:4x4 --json
    python tools/compile_ahead.py --config configs/gpu_h100.py:2b --topology h100:8

Needs the libtpu wheel (`pip install llave_jax[tpu]`) or jax's CUDA plugin (`llave_jax[cuda]`), no
accelerator. Assumptions are in docs/scaling.md. Exit status 1: the program does not fit into the chips'
memory.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from llave_jax.common import command_line
from llave_jax.common.files import write_text
from llave_jax.planning import chips, compile_ahead, prediction
from llave_jax.training import setup


def parse_args() -> argparse.Namespace:
    """The flags' values, with the config loaded."""
    parser = command_line.Parser("tools/compile_ahead.py", __doc__, takes_config=True)
    parser.add_argument(
        "--topology",
        required=True,
        help="TPU slice (v4:4x4x4, v5e:4x8) or GPUs of a host (h100:8)",
    )
    parser.add_argument(
        "--program", choices=("train", "embed"), default="train", help="which step to compile"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--hlo", type=Path, metavar="FILE", help="also write the optimised program's text"
    )
    return parser.parse_args()


def _report(args: argparse.Namespace) -> int:
    command_line.set_up_logging(args)
    training = args.program == "train"
    compile_step = (
        compile_ahead.compile_train_step if training else compile_ahead.compile_embedding_step
    )
    try:
        compiled = compile_step(setup.with_local_model(args.config), args.topology)
    except compile_ahead.DoesNotFit as error:
        if args.json:
            print(json.dumps({"topology": args.topology, "does_not_fit": str(error)}))
        else:
            print(f"{args.topology}: does not fit into memory\n{error}")
        return 1
    if args.hlo:
        write_text(args.hlo, compiled.text)
    values = {"topology": args.topology, **prediction.predict(compiled, training=training)}
    print(json.dumps(values) if args.json else f"{args.topology}: {prediction.table(values)}")
    return int(values["memory_gib"]["margin"] < 0)


if __name__ == "__main__":
    user_errors = (ValueError, OSError, chips.NoCompilerError)
    sys.exit(command_line.run(_report, parse_args(), user_errors))
