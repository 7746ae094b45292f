"""Mining of hard negatives: time, memory, what is found, and whether killed jobs come to the same files.

    python benchmarks/mine.py [--rows 100000] [--kills 5] [--model DIR]

Rows come in groups of ten queries whose targets share all but one letter: these are the planted hard negatives. Each
row also has a twin elsewhere, with the same query and another target: a positive that must never be taken.
Without --model, a model of random weights that is small enough for the host to matter. The search is compared with
plain NumPy for some rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.embed_file import make_model  # noqa: E402

GROUP = 10
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
NEGATIVES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments at which jobs are killed"
    )
    parser.add_argument("--model", help="model directory; default: a tiny one, made here")
    parser.add_argument("--dir", help="where files are written; default: a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder = Path(folder)
        model = args.model or make_model(folder / "model")
        print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start")
        data = folder / "rows.jsonl"
        write_rows(data, args.rows)
        whole = folder / "whole"
        seconds, peak = run(model, data, whole)
        print(
            f"{args.rows} rows: {seconds:.0f} s, {args.rows / seconds:.0f} rows/s, peak {peak:.0f} MiB"
        )
        again, peak = run(model, data, whole)
        print(f"once more over the finished output: {again:.0f} s, peak {peak:.0f} MiB", flush=True)
        report(whole / "rows.jsonl", args.rows)
        compare_with_numpy(whole, min(200, args.rows))
        killed, moments = folder / "killed", random.Random(args.seed)
        done = []
        for _ in range(args.kills):
            # On average the last one comes shortly before the job would end.
            after = moments.uniform(0, 2 * seconds / (args.kills + 1))
            run(model, data, killed, kill_after=after)
            done.append(f"{after:.0f}")
        run(model, data, killed)
        same = all(digest(whole / name) == digest(killed / name) for name in names(whole))
        assert names(whole) == names(killed)
        print(f"killed after {', '.join(done)} s: {'the same files' if same else 'OTHER FILES'}")
        if not same:
            raise SystemExit(1)


def write_rows(path: Path, count: int) -> None:
    """Rows in a shuffled order, of texts of 40 letters: those of a group differ in the first."""
    rng = np.random.default_rng(0)
    rows: list[tuple[str, str]] = []
    while len(rows) < count:
        base = "".join(rng.choice(LETTERS, 39))
        for place in range(GROUP):
            text = LETTERS[place] + base
            rows.append((f"one {text}", text))
            # The twin: another target for the same query.
            rows.append((f"one {text}", f"{text} right"))
    order = rng.permutation(len(rows))[:count]
    with open(path, "w") as file:
        for i in order.tolist():
            query, target = rows[i]
            row = {"qry": query, "qry_image_path": "", "pos_text": target, "pos_image_path": ""}
            file.write(json.dumps(row) + "\n")


def run(
    model: Path | str, data: Path, output: Path, kill_after: float | None = None
) -> tuple[float, float]:
    """Seconds, start and compilation included, and the peak of resident memory in MiB."""
    command = [
        sys.executable,
        "-m",
        "llave_jax.mine",
        "--model",
        str(model),
        "--relative",
        "0.9999",
    ]
    command += ["--data", str(data), "--output", str(output), "--negatives", str(NEGATIVES)]
    log = output.with_suffix(".log")
    start = time.monotonic()
    with open(log, "ab") as file:
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    if kill_after is not None:
        try:
            job.wait(kill_after)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)
            job.wait()
        return kill_after, 0.0
    _, status, usage = os.wait4(job.pid, 0)
    if status:
        raise SystemExit(log.read_text()[-2000:])
    return time.monotonic() - start, usage.ru_maxrss / 1024


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path) as file:
        yield from map(json.loads, file)


def report(path: Path, count: int) -> None:
    """How many negatives are planted ones, and that none is a positive."""
    group = total = full = rows = 0
    for row in lines(path):
        rows += 1
        own = row["qry"].split()[1]
        full += len(row["neg_text"]) == NEGATIVES
        for text in row["neg_text"]:
            total += 1
            group += text.split()[0][1:] == own[1:]
            assert text.split()[0] != own, "a positive of the query is among the negatives"
    assert rows == count
    print(
        f"{full / rows:.1%} of the rows have {NEGATIVES} negatives; {group / total:.1%} of the negatives are of "
        "the row's own group",
        flush=True,
    )


def compare_with_numpy(output: Path, count: int) -> None:
    """The negatives of the first rows, against a full sort in NumPy over the embeddings on the disk."""
    vectors = {
        side: np.load(output / f"mining/{side}/embeddings.npy", mmap_mode="r")
        for side in ("query", "target")
    }
    rows = list(lines(output / "rows.jsonl"))
    numbers = {}
    for side, field in (("query", "qry"), ("target", "pos_text")):
        first: dict[str, int] = {}
        for row in rows:
            first.setdefault(row[field], len(first))
        numbers[side] = first
    positives: dict[str, set[int]] = {}
    for row in rows:
        positives.setdefault(row["qry"], set()).add(numbers["target"][row["pos_text"]])
    names = list(numbers["target"])
    wrong = 0
    for row in rows[:count]:
        scores = vectors["target"] @ vectors["query"][numbers["query"][row["qry"]]]
        bound = 0.9999 * scores[numbers["target"][row["pos_text"]]]
        scores[list(positives[row["qry"]])] = -np.inf
        ranked = np.argsort(-scores, kind="stable")[:100]
        ranked = ranked[scores[ranked] < bound][:NEGATIVES]
        # Scores of two sums in different orders differ by some 1e-7: near ties may change places.
        if [names[i] for i in ranked] != row["neg_text"]:
            found = [numbers["target"][text] for text in row["neg_text"]]
            wrong += len(found) != len(ranked) or bool(
                np.abs(scores[found] - scores[ranked]).max(initial=0) > 2e-6
            )
    print(f"compared with NumPy: {count - wrong} of {count} rows agree", flush=True)
    assert not wrong


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.is_file())


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
