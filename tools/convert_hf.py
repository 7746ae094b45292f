"""Convert between Hugging Face checkpoints and model directories.

    python tools/convert_hf.py --input HF_DIR --output DIR
    python tools/convert_hf.py --to-hf {llave,onevision} --input DIR --output HF_DIR

HF_DIR is a checkpoint in the layout of the authors' code (LlavaQwenForCausalLM: the released LLaVE
models, LLaVA-OneVision and Aquila-VL, and what was fine-tuned from them) or of transformers'
LlavaOnevision. In the other direction DIR is a model directory or a training run.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.hf_names import LAYOUTS
from llave_jax.weights.to_hf import convert_to_hf


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="what to convert")
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
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --output")
    values = parser.parse_args(arguments)
    if values.to_hf and values.vision_config:
        parser.error("--vision-config is of use only without --to-hf")
    if values.base_model and not values.to_hf:
        parser.error("--base-model is of use only with --to-hf")
    return values


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    # A terminated conversion cleans up like one stopped with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    values = parse_arguments(arguments)
    try:
        if values.to_hf:
            convert_to_hf(
                values.input,
                values.output,
                values.to_hf,
                base_model=values.base_model,
                overwrite=values.overwrite,
            )
        else:
            convert_from_hf(
                values.input,
                values.output,
                vision_config=values.vision_config,
                overwrite=values.overwrite,
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {values.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
