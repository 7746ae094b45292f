"""Time and memory of embedding files of short texts: does either grow faster than the file?

    python benchmarks/embed_file.py [--sizes 250000 500000 1000000] [--model DIR]

For each size: `python -m llave_jax.embed` over a generated file, once more over the finished output
(what a start costs that finds everything done), and for the largest size a job that is killed half-way
and started again. Without --model, a model of random weights that is small enough for the host to
matter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "how",
    "many",
    "left",
    "right",
    "top",
    "bottom",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--model", help="model directory; default: a tiny one, made here")
    parser.add_argument("--dir", help="where files are written; default: a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder = Path(folder)
        model = args.model or make_model(folder / "model")
        print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start")
        print(
            f"{'items':>10}{'seconds':>10}{'items/s':>10}{'peak MiB':>10}{'again':>10}"
            f"{'peak MiB':>10}",
            flush=True,
        )
        for size in args.sizes:
            source, output = folder / f"{size}.jsonl", folder / f"out{size}"
            write_items(source, size)
            seconds, peak = run(model, source, output)
            again, peak_again = run(model, source, output)
            check(output, size)
            print(
                f"{size:>10}{seconds:>10.1f}{size / seconds:>10.0f}{peak:>10.0f}{again:>10.1f}"
                f"{peak_again:>10.0f}",
                flush=True,
            )
        size = args.sizes[-1]
        source, output = folder / f"{size}.jsonl", folder / f"out{size}"
        whole = np.load(output / "embeddings.npy", mmap_mode="r")
        killed = folder / "killed"
        first, _ = run(model, source, killed, kill_at=size // 2)
        second, _ = run(model, source, killed)
        check(killed, size)
        difference = np.abs(np.load(killed / "embeddings.npy", mmap_mode="r") - whole).max()
        print(
            f"killed with half of {size} done after {first:.1f} s, the rest took {second:.1f} s; "
            f"largest difference {difference:.1e}"
        )


def make_model(path: Path) -> Path:
    """A model of one layer with random weights, and a tokenizer to which the words are known.

    Made in a process of its own: Linux counts the memory of the process that starts another for that
    one's peak.
    """
    process = multiprocessing.get_context("spawn").Process(target=_make_model, args=(path,))
    process.start()
    process.join()
    return path


def _make_model(path: Path) -> None:
    import dataclasses

    import jax

    from llave_jax.digits.tokenizer import build_tokenizer
    from llave_jax.models.config import PRESETS
    from llave_jax.models.llave import Llave, example_batch
    from llave_jax.weights import model_dir

    config = PRESETS["tiny"]
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=1))
    params = Llave(config).init(jax.random.key(0), example_batch(config))["params"]
    tokenizer = build_tokenizer(path.with_name("tokenizer"))
    model_dir.write_model_dir(path, config, params, tokenizer=tokenizer)


def write_items(path: Path, count: int) -> None:
    """Texts of 4 to 15 words; a longer file begins as a shorter one does."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for i in range(count):
            words = (WORDS[k] for k in rng.integers(0, len(WORDS), rng.integers(4, 16)))
            file.write(json.dumps({"id": f"item {i}", "text": " ".join(words)}) + "\n")


def run(model: Path, source: Path, output: Path, kill_at: int | None = None) -> tuple[float, float]:
    """Seconds, start and compilation included, and the peak of resident memory in MiB."""
    command = [sys.executable, "-m", "llave_jax.embed", "--model", str(model)]
    command += ["--input", str(source), "--output", str(output)]
    start = time.monotonic()
    with open(output.with_suffix(".log"), "ab") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    progress = output / "progress.jsonl"
    while kill_at is not None and job.poll() is None:
        time.sleep(0.2)
        if progress.exists() and items_done(progress) >= kill_at:
            job.send_signal(signal.SIGKILL)
            break
    _, status, usage = os.wait4(job.pid, 0)
    if kill_at is None and status:
        raise SystemExit(output.with_suffix(".log").read_text()[-2000:])
    return time.monotonic() - start, usage.ru_maxrss / 1024


def items_done(progress: Path) -> int:
    lines = progress.read_text().split("\n")[1:-1]
    # The line of a complete output has no items of its own.
    return sum(json.loads(line).get("items", 0) for line in lines)


def check(output: Path, size: int) -> None:
    vectors = np.load(output / "embeddings.npy", mmap_mode="r")
    assert len(vectors) == size
    with open(output / "ids.jsonl") as file:
        assert all(json.loads(line) == f"item {i}" for i, line in enumerate(file))


if __name__ == "__main__":
    main()
