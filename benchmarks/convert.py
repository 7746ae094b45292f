"""Time and peak memory of converting a checkpoint of true size, there and back.

    python benchmarks/convert.py --directory SCRATCH [--form llava-onevision-0.5b]

Beside it, as the peer: reading and writing the same weights with the safetensors package, all of them
in memory, as conversion scripts usually do. Needs 6 GB in SCRATCH, which is left as it was.
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.hub_checkpoints import FORMS, write_checkpoint

PEER = """
import sys
import ml_dtypes  # for bfloat16
from safetensors.numpy import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2])
"""
IDLE = "import llave_jax.weights.from_hf, llave_jax.weights.to_hf"


def measure(*command: str) -> tuple[float, float]:
    """Seconds and peak resident MB of a command."""
    # The peak of all children so far is all that the system tells: a process of its own for each.
    script = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    kilobytes = int(done.stdout) if sys.platform != "darwin" else int(done.stdout) // 1024
    return seconds, kilobytes * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--form", choices=FORMS, default=FORMS[0])
    args = parser.parse_args()
    tool = str(Path(__file__).parents[1] / "tools" / "convert_hf.py")
    python = sys.executable
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        source = str(write_checkpoint(Path(folder) / "hf", args.form))
        ours, back, peer = (f"{folder}/{name}" for name in ("ours", "back", "peer.safetensors"))
        weights = Path(source) / "model.safetensors"
        commands = {
            "start of the tool": (python, "-c", IDLE),
            "to a model directory": (python, tool, "--input", source, "--output", ours),
            "back": (python, tool, "--to-hf", "llave", "--input", ours, "--output", back),
            "peer: load_file, save_file": (python, "-c", PEER, str(weights), peer),
        }
        print(f"{args.form}: {weights.stat().st_size / 1e9:.2f} GB")
        for name, command in commands.items():
            seconds, peak = measure(*command)
            print(f"{name:28}{seconds:7.1f} s{peak:9.0f} MB peak")
        same = filecmp.cmp(weights, f"{back}/model.safetensors", shallow=False)
        print(f"came back {'byte for byte' if same else 'CHANGED'}")


if __name__ == "__main__":
    main()
