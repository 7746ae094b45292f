"""What each part of docs/training.md does to the bundled benchmark of digits: mean and spread over seeds.

    python benchmarks/recipes.py --dir DIR [--seeds 0 1 2] [--steps 1100] [--more-steps 550] [--only base lora]

For each seed: a base trained from scratch (`configs/quickstart.py`), the same with one part added, and children
of the base that train on, by full tuning and by LoRA, and the two merged. Negatives, order and teacher's scores
come from the seed's own base (`llave_jax.mine`). What DIR holds already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from llave_jax.common.tables import align  # noqa: E402

# Rows of the mined order that follow one another: half a step's.
CLUSTER = 16
NEGATIVES = 2


class Recipes:
    """The runs of one seed, each in a folder of its own.

    Args:
      folder: of the seed.
      seed: of parameters and data.
      steps: of the runs from scratch.
      more_steps: of those that go on from the base.
    """

    def __init__(self, folder: Path, seed: int, steps: int, more_steps: int):
        self._folder, self._seed = folder, seed
        self._steps, self._more_steps = steps, more_steps
        self.all: dict[str, Callable[[], dict[str, float]]] = {
            "base": lambda: self._train("base"),
            "learned temperature": lambda: self._train(
                "learned temperature", "loss.learn_temperature=True", "loss.temperature_rate=1.0"
            ),
            "Matryoshka (16, 32, 96)": lambda: self._train("matryoshka", "loss.dims=(16, 32, 96)"),
            f"mined negatives, {NEGATIVES} a row": lambda: self._train(
                "negatives", *self._mined_rows()
            ),
            "mined order": lambda: self._train(
                "order",
                f"data.order=mined:{self._mined() / 'neighbours.parquet'}",
                f"data.sub_batch={CLUSTER}",
            ),
            "distillation": lambda: self._train(
                "distillation",
                *self._mined_rows(),
                "loss.distill_weight=0.5",
                "loss.teacher_temperature=0.05",
            ),
            "base, trained on": lambda: self._train_on("on", "optim.learning_rate=2e-4"),
            "base, LoRA": lambda: self._train_on(
                "lora", "optim.learning_rate=2e-3", "lora.rank=16"
            ),
            "the two merged": self._merge,
        }

    def scores(self, name: str) -> dict[str, float]:
        """The scores of a recipe; its run, and those that it needs, are made if they are not there."""
        return self.all[name]()

    def _path(self, name: str) -> Path:
        return self._folder / name.replace(" ", "_")

    def _train(self, name: str, *settings: str, steps: int | None = None) -> dict[str, float]:
        run = self._path(name)
        if (run / "results.txt").exists():
            return last_scores(run)
        flags = [f"--config.{setting}" for setting in settings]
        call(
            "llave_jax.train",
            f"--config={ROOT / 'configs/quickstart.py'}",
            f"--workdir={run}",
            f"--config.steps={steps or self._steps}",
            f"--config.seed={self._seed}",
            *flags,
        )
        return last_scores(run)

    def _train_on(self, name: str, *settings: str) -> dict[str, float]:
        self._train("base")
        base = f"model.path={self._path('base')}"
        return self._train(name, base, *settings, steps=self._more_steps)

    def _mined(self) -> Path:
        """Negatives and neighbours of the training rows, by the seed's base."""
        self._train("base")
        mined, digits = self._path("mined"), self._path("base") / "digits"
        call(
            "llave_jax.mine",
            f"--model={self._path('base')}",
            f"--data={digits / 'train'}",
            f"--image-root={digits / 'train_images'}",
            f"--output={mined}",
            "--ranks=1:50",
        )
        return mined

    def _mined_rows(self) -> tuple[str, ...]:
        return (
            f"data.path={self._mined()}",
            f"data.image_root={self._path('base') / 'digits/train_images'}",
            "loss.hard_negatives=True",
            f"loss.negatives_per_row={NEGATIVES}",
        )

    def _merge(self) -> dict[str, float]:
        merged, results = self._path("merged"), self._path("merged_results")
        parents = [self._path("on"), self._path("lora")]
        self.scores("base, trained on")
        self.scores("base, LoRA")
        if not merged.exists():
            call(
                ROOT / "tools/merge_models.py",
                "--models",
                *map(str, parents),
                f"--output={merged}",
            )
        call(
            "llave_jax.evaluate",
            f"--model={merged}",
            "--benchmark=digits",
            f"--data={parents[0] / 'digits'}",
            f"--output={results}",
        )
        summary = json.loads((results / "summary.json").read_text())
        return {"average/overall": summary["averages"]["overall"]}


def last_scores(run: Path) -> dict[str, float]:
    """The benchmark's scores of a finished run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    scored = [line for line in lines if "eval/average/overall" in line]
    prefix = "eval/"
    return {k.removeprefix(prefix): v for k, v in scored[-1].items() if k.startswith(prefix)}


def call(command: str | Path, *flags: str) -> None:
    """Runs a command of the package, or a script of tools/."""
    start = time.monotonic()
    what = ["-m", command] if isinstance(command, str) else [str(command)]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, *what, *flags],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{command} {' '.join(flags)}\n{done.stderr[-2000:]}")
    print(f"{time.monotonic() - start:7.1f} s  {command} {' '.join(flags)}"[:150], flush=True)


def table(found: dict[str, list[float]]) -> str:
    """Mean, least and most of each recipe, in percent, and the difference to the base of the same seed."""
    rows = [["", "seeds", "mean", "least", "most", "to the base"]]
    for name, values in found.items():
        differences = [v - b for v, b in zip(values, found["base"], strict=False)]
        figures = (statistics.mean(values), min(values), max(values))
        rows.append(
            [
                name,
                str(len(values)),
                *(f"{100 * figure:.1f}" for figure in figures),
                f"{100 * statistics.mean(differences):+.1f}",
            ]
        )
    return align(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", required=True, type=Path, help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1100, help="of the runs from scratch")
    parser.add_argument("--more-steps", type=int, default=550, help="of those that go on")
    parser.add_argument("--only", nargs="+", help="recipes whose names begin so; default: all")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        recipes = Recipes(args.dir / f"seed_{seed}", seed, args.steps, args.more_steps)
        for name in recipes.all:
            if args.only and name != "base" and not name.startswith(tuple(args.only)):
                continue
            scores = recipes.scores(name)
            found.setdefault(name, []).append(scores["average/overall"])
            print(f"seed {seed}, {name}: {100 * found[name][-1]:.1f}", flush=True)
    machine = f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the end"
    print(f"\nprecision@1 in percent, average of the digits benchmark; {machine}\n{table(found)}")


if __name__ == "__main__":
    main()
