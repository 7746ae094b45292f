"""Breaks inputs at random and reads them; says what came of each target.

    python -m tests.fuzz [--targets checkpoint,rows] [--cases 1000] [--seed 0] [--workers 2]

Only "ok" and "clear" are good outcomes: any other makes the exit status 1, and its cases are printed with the seed
that makes them again (--cases 1 --seed N).
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz.harness import GOOD, run_cases
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--cases", type=int, default=200, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--shown", type=int, default=3, help="bad cases that are printed of each target"
    )
    args = parser.parse_args()
    bad = 0
    for target in args.targets.split(","):
        begin = time.monotonic()
        outcomes = run_cases([target], args.cases, args.seed, args.workers)
        counts = collections.Counter(outcome.kind for outcome in outcomes)
        listed = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
        print(
            f"{target}: {len(outcomes)} cases in {time.monotonic() - begin:.0f} s: {listed}",
            flush=True,
        )
        failures = [outcome for outcome in outcomes if outcome.kind not in GOOD]
        bad += len(failures)
        last = collections.Counter(
            f"{o.kind}: {o.detail.strip().splitlines()[-1][:150]}" for o in failures
        )
        for text, count in last.most_common(12):
            print(f"  {count} x {text}")
        for outcome in failures[: args.shown]:
            print(
                f"--- {target} --seed {outcome.seed}: {outcome.kind}\n{outcome.detail}", flush=True
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
