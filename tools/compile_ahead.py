"""Compile a training run for a TPU slice or a host of GPUs without having one, and report memory and
speed.

    python tools/compile_ahead.py --config configs/tpu_v4.py:7b --topology v4:4x4x4
    python tools/compile_ahead.py --config configs/llave_0_5b.py --topology v5e:4x4 --json
    python tools/compile_ahead.py --config configs/gpu_h100.py:2b --topology h100:8

Needs the libtpu wheel (`pip install llave_jax[tpu]`) or jax's CUDA plugin (`llave_jax[cuda]`), no
accelerator. Assumptions are in docs/scaling.md. Exit status 1: the program does not fit into the chips'
memory.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from absl import app, flags
from ml_collections import config_flags

from llave_jax.common.files import write_text
from llave_jax.planning import compile_ahead, prediction

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The run: configs/NAME.py.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice (v4:4x4x4, v5e:4x8) or GPUs of a host (h100:8)."
)
_PROGRAM = flags.DEFINE_enum("program", "train", ["train", "embed"], "Which step to compile.")
_JSON = flags.DEFINE_bool("json", False, "Print the report as one JSON object.")
_HLO = flags.DEFINE_string("hlo", None, "Also write the optimised program's text to this file.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    training = _PROGRAM.value == "train"
    compile_step = (
        compile_ahead.compile_train_step if training else compile_ahead.compile_embedding_step
    )
    try:
        compiled = compile_step(_CONFIG.value, _TOPOLOGY.value)
    except compile_ahead.DoesNotFit as error:
        if _JSON.value:
            print(json.dumps({"topology": _TOPOLOGY.value, "does_not_fit": str(error)}))
        else:
            print(f"{_TOPOLOGY.value}: does not fit into memory\n{error}")
        return 1
    if _HLO.value:
        write_text(_HLO.value, compiled.program.as_text())
    values = {"topology": _TOPOLOGY.value, **prediction.predict(compiled, training=training)}
    print(json.dumps(values) if _JSON.value else f"{_TOPOLOGY.value}: {prediction.table(values)}")
    return int(values["memory_gib"]["margin"] < 0)


if __name__ == "__main__":
    sys.exit(app.run(main))
