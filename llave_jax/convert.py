"""Convert between Hugging Face checkpoints and model directories.

    python tools/convert_hf.py --input HF --output DIR
    python tools/convert_hf.py --to-hf {llave,onevision} --input DIR --output HF_DIR
    python tools/convert_hf.py --to-hf {llave,onevision} --adapter-only --input RUN --output ADAPTER_DIR

HF is a checkpoint's directory, or its name on the Hugging Face hub (org/name or org/name@revision). The
checkpoint has the layout of the authors' code (LlavaQwenForCausalLM: the released LLaVE models,
LLaVA-OneVision, Aquila-VL, and what was fine-tuned from them) or of transformers' LlavaOnevision. With
--to-hf, DIR is a model directory or a training run; for onevision, a few items are then embedded in float32 and kept
in HF_DIR/check_vectors.json, with which tools/check_export.py compares other software. A run that trained adapters is
written with its base, merged; with --adapter-only, its adapters alone, in the format of the peft library.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from llave_jax.common import command_line
from llave_jax.common.host_memory import available_host_memory
from llave_jax.common.locks import only_writer
from llave_jax.models.parameters import parameter_shapes
from llave_jax.weights.adapted import trained_adapter
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.hf_names import LAYOUTS
from llave_jax.weights.model_dir import load_config
from llave_jax.weights.peft_format import write_peft
from llave_jax.weights.prompts import SETS, read_prompt_set
from llave_jax.weights.resolve import find_checkpoint, resolve_model
from llave_jax.weights.to_hf import CHECK_VECTORS, convert_to_hf

# What embedding the items of check vectors takes: bytes beside the weights, and of each parameter, which is float32 and
# copied layer by layer as it is loaded.
_BESIDE_WEIGHTS, _BYTES_A_PARAMETER = 3 * 2**29, 5


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("tools/convert_hf.py", __doc__)
    parser.add_argument(
        "--input", required=True, help="what to convert: a directory, or a name on the hub"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--to-hf", choices=tuple(LAYOUTS), help="write a Hugging Face directory of this layout"
    )
    parser.add_argument(
        "--vision-config",
        metavar="FILE",
        help="config.json of the vision tower, where a LlavaQwen checkpoint does not tell it",
    )
    parser.add_argument(
        "--base-model",
        metavar="ID",
        help="with --to-hf, for the model card: name on the hub of the model this one was trained "
        "from, such as lmms-lab/llava-onevision-qwen2-0.5b-ov",
    )
    parser.add_argument(
        "--no-check-vectors",
        action="store_true",
        help="with --to-hf onevision: embed nothing, for machines that cannot hold the model in float32",
    )
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="with --to-hf, of a run that trained adapters: write those alone, for the peft library",
    )
    parser.add_argument(
        "--prompts",
        metavar="SET",
        help=f"named prompts to put into the model directory: {', '.join(SETS)}, or a JSON file of names and texts; "
        "default: those of --input",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --output")
    args = parser.parse_args(argv)
    if args.to_hf and args.vision_config:
        parser.error("--vision-config is of use only without --to-hf")
    if args.prompts and args.to_hf:
        parser.error(
            "--prompts is of use only without --to-hf; an export has the model directory's"
        )
    if args.base_model and not args.to_hf:
        parser.error("--base-model is of use only with --to-hf")
    if args.adapter_only and (not args.to_hf or args.overwrite or args.no_check_vectors):
        parser.error(
            "--adapter-only goes with --to-hf, and without --overwrite and --no-check-vectors"
        )
    if args.no_check_vectors and args.to_hf != "onevision":
        parser.error("--no-check-vectors is of use only with --to-hf onevision")
    return args


def _convert(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    with only_writer(args.output, inside=False):
        if args.adapter_only:
            lora, arrays = trained_adapter(resolve_model(args.input))
            write_peft(args.output, arrays, lora, args.to_hf, base_model=args.base_model)
        elif args.to_hf:
            source = resolve_model(args.input)
            same = convert_to_hf(
                source,
                args.output,
                args.to_hf,
                base_model=args.base_model,
                overwrite=args.overwrite,
            )
            if args.to_hf == "onevision" and not same and not args.no_check_vectors:
                _write_check_vectors(source, args.output)
        else:
            convert_from_hf(
                find_checkpoint(args.input),
                args.output,
                vision_config=args.vision_config,
                prompts=read_prompt_set(args.prompts) if args.prompts else None,
                overwrite=args.overwrite,
            )
    print(f"written to {args.output}")


def _write_check_vectors(source: Path, export: str) -> None:
    """The export is complete before: whatever ends this, it can be made up for with tools/check_export.py --write."""
    shapes = parameter_shapes(load_config(source)).values()
    needed = _BESIDE_WEIGHTS + _BYTES_A_PARAMETER * sum(map(math.prod, shapes))
    if needed > (available := available_host_memory()):
        print(
            f"without {CHECK_VECTORS}: embedding its items takes about {needed / 2**30:.0f} GiB of memory, and "
            f"{available / 2**30:.0f} are free; on a larger machine, tools/check_export.py --write adds it",
            file=sys.stderr,
        )
        return
    # Imported here: other conversions need no JAX.
    from llave_jax.embedding import check_vectors

    print(f"embedding the items of {export}/{CHECK_VECTORS}", file=sys.stderr)
    check_vectors.write(Path(export), check_vectors.make(source))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_convert, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
