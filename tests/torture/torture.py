"""Kills a training run at random moments, starts it again each time, and compares it with one left alone.

    python -m tests.torture.torture --kills 100 --output /tmp/torture

The run is the quickstart in small: images, data workers, evaluation of the digits and of held-out pairs, a
best checkpoint. Half of the kills come at moments drawn from the whole life of a process, start-up included.
The others wait until a file appears in the run's folder (a checkpoint being written, a score, best.json)
and come within the next tenth of a second, so that the narrow moments are met too. One in five is SIGTERM,
which lets the run save; one in ten of those is followed by a second one at once.

In the end metrics (timings apart), TensorBoard's scalars, best.json, every file's arrays of the last and the
best checkpoint, and the position in the data must be equal, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
from tensorboardX.proto import event_pb2

from llave_jax.weights.run_params import saved_tree
from tests.xla_flags import xla_flags

ROOT = Path(__file__).parents[2]
CONFIG = """
from configs.quickstart import get_config as quickstart
from llave_jax.digits import dataset
from tests.few_digits import FEW

# With all queries nearly all moments would fall into an evaluation.
dataset.Sizes = FEW


def get_config():
    config = quickstart()
    config.steps = {steps}
    config.batch.pairs = 16
    config.data.num_workers = 2
    config.data.held_out = 0.02
    config.log_every = 1
    config.checkpoint.every = 7
    config.checkpoint.keep = 2
    config.checkpoint.best_metric = "validation/loss"
    config.eval.every = 10
    config.eval.max_pairs = 16
    config.eval.datasets = ("Digits-Grounding",)
    return config
"""
# Differ between two runs that are alike: how long things took, and how much memory.
TIMINGS = (
    "time",
    "seconds",
    "per_second",
    "goodput",
    "bytes",
    "memory",
    "share",
    "gib",
    "restarts",
)
# Names of files that announce a narrow moment.
NARROW = ("checkpoint-tmp", "best", "metrics", "eval", ".tmp", "summary")
# A run that makes no progress for so long has failed.
PATIENCE = 600


@dataclasses.dataclass
class Outcome:
    """What a tortured run went through."""

    kills: dict[str, int]
    progress: list[int]
    differences: list[str]


def command(config: Path, workdir: Path) -> list[str]:
    """The command of the run; the same each time."""
    return [sys.executable, "-m", "llave_jax.train", f"--config={config}", f"--workdir={workdir}"]


def start(config: Path, workdir: Path) -> subprocess.Popen:
    """Starts the run, in a process group of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = xla_flags(2)
    log = open(workdir.with_suffix(".log"), "ab")  # noqa: SIM115  # The process keeps it.
    return subprocess.Popen(
        command(config, workdir),
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that has may still wait for its new parent to take notice."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def files(workdir: Path) -> set[str]:
    """All files of a run that announce a narrow moment, with the sizes of those that grow."""
    found = set()
    for folder, names, leaves in os.walk(workdir):
        if os.path.basename(folder) == "digits":
            names.clear()
            continue
        for name in (*names, *leaves):
            if any(part in name for part in NARROW):
                path = os.path.join(folder, name)
                try:
                    found.add(f"{path} {os.stat(path).st_size}")
                except FileNotFoundError:
                    continue
    return found


def wait(run: subprocess.Popen, seconds: float) -> bool:
    """Whether the run has ended within a time."""
    try:
        run.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_for_moment(run: subprocess.Popen, workdir: Path, rng: random.Random, life: float) -> str:
    """Waits for the moment at which to kill, and says which kind it was; "" if the run has ended."""
    if rng.random() < 0.5:
        return "" if wait(run, rng.uniform(0, life)) else "any"
    if wait(run, rng.uniform(0, life) / 2):
        return ""
    before = files(workdir)
    while not wait(run, 0.002):
        if files(workdir) - before:
            return "" if wait(run, rng.choice([0, 0.1]) * rng.random()) else "narrow"
    return ""


def workers_of(run: subprocess.Popen) -> list[psutil.Process]:
    """Processes that the run has started."""
    try:
        return psutil.Process(run.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def torture(config: Path, workdir: Path, kills: int, rng: random.Random, life: float) -> Outcome:
    """Kills the run so many times, and lets it end.

    Args:
      config: file of the run.
      workdir: of the run.
      kills: how many there shall be.
      rng: decides the moments.
      life: seconds that a process lives at most before it is killed, on average half of them.

    Returns:
      What was done, and what was wrong on the way.
    """
    outcome = Outcome({}, [], [])
    while sum(outcome.kills.values()) < kills:
        run = start(config, workdir)
        moment = wait_for_moment(run, workdir, rng, life)
        if not moment:
            if run.returncode:
                outcome.differences.append(f"ended by itself with status {run.returncode}")
            break
        children = workers_of(run)
        name = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
        os.kill(run.pid, name)
        if name == signal.SIGTERM and rng.random() < 0.1:
            time.sleep(rng.uniform(0, 0.5))
            run.send_signal(signal.SIGTERM)
        if not wait(run, 120):
            outcome.differences.append(f"did not end within two minutes of {name.name}")
            run.kill()
        if name == signal.SIGTERM and run.returncode not in (143, -15, 0):
            outcome.differences.append(f"status {run.returncode} after SIGTERM")
        # A worker that is being imported looks for its parent when that is done.
        _, alive = psutil.wait_procs(children, timeout=60)
        outcome.differences += [f"worker still there: {child}" for child in alive if runs(child)]
        key = f"{moment} {name.name}"
        outcome.kills[key] = outcome.kills.get(key, 0) + 1
        outcome.progress.append(steps_done(workdir))
        print(f"kill {sum(outcome.kills.values())}: {key}, step {outcome.progress[-1]}", flush=True)
    run = start(config, workdir)
    if not wait(run, PATIENCE):
        run.kill()
    if run.returncode:
        outcome.differences.append(f"the last start ended with status {run.returncode}")
    return outcome


def steps_done(workdir: Path) -> int:
    """Step of the newest checkpoint that has its name; 0 if there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def is_timing(name: str) -> bool:
    """Whether a metric differs between two runs that are alike."""
    return any(part in name for part in TIMINGS)


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The run's lines without timings. A torn line is an error."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


def scalars(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: scalar -> (step, value) in order, whatever files they are in."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            # A record is its length (8 bytes), a checksum (4), the event, and a checksum (4).
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == event.session_log.START:
                # TensorBoard forgets what earlier files have from this step on.
                for tag, points in found.items():
                    found[tag] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                if not is_timing(value.tag):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a part of a checkpoint."""
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved_tree(folder))
    tree = ocp.PyTreeCheckpointer().restore(folder, restore_args=to_numpy)
    found: dict[str, np.ndarray] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key in value:
                walk(value[key], f"{name}/{key}")
        else:
            found[name] = np.asarray(value)

    walk(tree, folder.name)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Where two runs differ that should be equal."""
    found = []
    lines = metrics(one), metrics(other)
    if lines[0] != lines[1]:
        first = [a for a, b in zip(*lines, strict=False) if a != b][:1]
        found.append(f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines, first {first}")
    shown = scalars(one), scalars(other)
    for tag in sorted(shown[0].keys() | shown[1].keys()):
        if shown[0].get(tag) != shown[1].get(tag):
            counts = [len(each.get(tag, ())) for each in shown]
            found.append(f"tensorboard: {tag} has {counts[0]} and {counts[1]} points")
    for part in ("checkpoints", "best/checkpoints"):
        steps = [sorted(p.name for p in (run / part).iterdir()) for run in (one, other)]
        if steps[0] != steps[1]:
            found.append(f"{part}: {steps[0]} and {steps[1]}")
            continue
        for step in steps[0]:
            for item in ("params", "optimizer"):
                folders = [run / part / step / item for run in (one, other)]
                if not folders[0].exists():
                    continue
                a, b = map(arrays, folders)
                unequal = [
                    k for k in a.keys() | b.keys()
                    if k not in a or k not in b or a[k].tobytes() != b[k].tobytes()
                ]  # fmt: skip
                if unequal:
                    found.append(f"{part}/{step}/{item}: {len(unequal)} arrays, {unequal[0]}")
            for path in (one / part / step).glob("data/*.json"):
                if path.read_text() != (other / path.relative_to(one)).read_text():
                    found.append(f"{path.relative_to(one)}: another position")
    records = [json.loads((run / "best" / "best.json").read_text()) for run in (one, other)]
    if records[0] != records[1]:
        found.append(f"best.json: {records[0]} and {records[1]}")
    names = [sorted(p.name for p in run.iterdir()) for run in (one, other)]
    if names[0] != names[1]:
        found.append(f"files: {sorted(set(names[0]) ^ set(names[1]))}")
    found += [
        f"left behind: {path.relative_to(other)}"
        for path in other.rglob("*")
        if "tmp" in path.name or "partial" in path.name
    ]
    return found


def compare(output: Path, kills: int, steps: int, seed: int) -> Outcome:
    """Trains a run undisturbed and one that is killed, in `output`.

    Args:
      output: folder of the two runs, emptied before.
      kills: of the second.
      steps: of both.
      seed: of the moments.

    Returns:
      What was done, and every difference.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    config = output / "config.py"
    config.write_text(CONFIG.format(steps=steps))
    undisturbed = output / "undisturbed"
    began = time.monotonic()
    run = start(config, undisturbed)
    while not steps_done(undisturbed) and time.monotonic() < began + PATIENCE:
        if wait(run, 0.1):
            break
    # Programs are compiled once. Later starts come to a checkpoint sooner, and half of their lives are longer.
    life = 1.25 * (time.monotonic() - began)
    if not wait(run, 6 * PATIENCE) or run.returncode:
        run.kill()
        raise SystemExit(f"the undisturbed run failed: see {undisturbed.with_suffix('.log')}")
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    killed = output / "killed"
    outcome = torture(config, killed, kills, random.Random(seed), life)
    outcome.differences += differences(undisturbed, killed)
    return outcome


def main() -> int:
    """Runs the command; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder for the two runs, emptied"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cache = args.output.with_name(args.output.name + ".jax")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    outcome = compare(args.output, args.kills, args.steps, args.seed)
    total = sum(outcome.kills.values())
    print(f"{total} kills: {outcome.kills}; newest checkpoint at each: {outcome.progress}")
    for difference in outcome.differences:
        print(f"DIFFERS {difference}")
    print("equal bit for bit" if not outcome.differences else "not equal")
    return 1 if outcome.differences else 0


if __name__ == "__main__":
    sys.exit(main())
