"""Runs cases in processes of their own, with limits of time and memory, and sorts what comes of each.

ok         the input was read, or is still good
clear      an error of this package, or of the system, that names what is wrong
raw        any other exception: a user would not understand it
hang       more than CPU_SECONDS of work, or no end
memory     more than MEMORY_BYTES
outside    something was written outside of the output
crash      the process died
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from llave_jax.common.text import shortened

CPU_SECONDS = 20.0
WALL_SECONDS = 200.0
MEMORY_BYTES = 2 << 30
OUTSIDE = Path("/tmp/llave_fuzz_outside")
GOOD = ("ok", "clear")

PACKAGE = Path(__file__).parents[2] / "llave_jax"


class Outcome(NamedTuple):
    """What came of one case; `seed` makes it again."""

    target: str
    seed: int
    kind: str
    detail: str


def run_cases(targets: Iterable[str], cases: int, first_seed: int, workers: int) -> list[Outcome]:
    """Runs cases of several targets.

    Args:
      targets: names in `targets.TARGETS`.
      cases: of each target.
      first_seed: the cases have this seed and those that follow.
      workers: processes at a time.

    Returns:
      What came of each.
    """
    from tests.fuzz.targets import TARGETS

    names = list(targets)
    waiting = collections.deque((name, first_seed + n) for n in range(cases) for name in names)
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        base = Path(folder)
        for name in names:
            TARGETS[name].make(base / name)
        running: dict[Connection, Any] = {}

        def start() -> None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, base), daemon=True)
            process.start()
            theirs.close()
            running[ours] = [process, None]
            give(ours)

        def give(pipe: Connection) -> None:
            if waiting:
                running[pipe][1] = waiting.popleft()
                pipe.send(running[pipe][1])
            else:
                pipe.send(None)
                running.pop(pipe)[0].join(10)

        for _ in range(min(workers, len(waiting))):
            start()
        while running:
            ready = wait(list(running), timeout=WALL_SECONDS)
            for pipe in ready or list(running):
                process, case = running[pipe]
                try:
                    if not ready:
                        raise TimeoutError
                    outcomes.append(Outcome(*case, *pipe.recv()))  # pyright: ignore[reportAttributeAccessIssue]
                    give(pipe)
                except (EOFError, OSError):
                    process.kill() if not ready else None
                    process.join()
                    code = process.exitcode or 0
                    kind = "hang" if not ready or -code == signal.SIGPROF else "crash"
                    outcomes.append(Outcome(*case, kind, f"exit code {code}"))
                    del running[pipe]
                    if waiting:
                        start()
    return outcomes


def _work(pipe: Connection, base: Path) -> None:
    from tests.fuzz.targets import TARGETS

    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (case := pipe.recv()) is not None:
        name, seed = case
        # Python may be within a library that does not return: the signal's default ends the process.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        folder = Path(tempfile.mkdtemp(dir=base))
        try:
            TARGETS[name].run(base / name, folder, random.Random(f"{name} {seed}"))
            kind, detail = "ok", ""
        except MemoryError:
            kind, detail = "memory", traceback.format_exc()
        except BaseException as error:
            kind, detail = classify(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        odd = {path.name for path in folder.iterdir()} - {"in", "out"}
        if odd or OUTSIDE.exists() or OUTSIDE.with_name("x.safetensors").exists():
            kind, detail = "outside", f"{odd} {OUTSIDE.exists()}"
        shutil.rmtree(folder, ignore_errors=True)
        pipe.send((kind, detail))
    sys.exit(0)


def classify(error: BaseException) -> tuple[str, str]:
    """Whether a user can act on an exception.

    Args:
      error: what a reader raised.

    Returns:
      "clear" or "raw", and the message or the traceback.
    """
    # As a command prints it.
    text = shortened(str(error))
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(frames[-1].filename).is_relative_to(PACKAGE)
    own_class = type(error) is ValueError or (
        isinstance(error, ValueError | OSError) and type(error).__module__.startswith("llave_jax")
    )
    of_system = isinstance(error, OSError) and (ours or error.filename is not None)
    if ((own_class and ours) or of_system) and 0 < len(text) < 4000:
        return "clear", text
    return "raw", "".join(traceback.format_exception(error))[-3000:]
