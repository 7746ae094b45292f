"""Check that this machine's devices compute what they should, and how fast.

    python -m llave_jax.check_device [--config NAME] [--short] [--output FILE.json]

Compares every implementation of attention with a reference, a small model's embeddings and training step with
recorded numbers, and what devices exchange with what they sent; then times attention, the config's training step
and its input. Prints a table and a verdict. Exit status 1: something is wrong. FILE.json is to be attached
to an issue; it holds no names of hosts, and no paths.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from llave_jax.common import command_line
from llave_jax.common.files import write_text
from llave_jax.config import Config
from llave_jax.device_check import attention, collectives, golden, report, training
from llave_jax.models.llave import attention_cases
from llave_jax.ops.attention_choice import choose
from llave_jax.parallel import processes, sharding
from llave_jax.training import setup
from llave_jax.training.config_check import check_config
from llave_jax.training.resume import leaves


def check(config: Config, *, short: bool) -> Iterator[report.Row]:
    """Runs all checks.

    Args:
      config: of the run that the devices are for.
      short: leave out what only compares speeds, and models other than the config's.

    Yields:
      The findings, as they come.

    Raises:
      ValueError, OSError: the config does not describe a run.
    """
    check_config(config)
    config = setup.with_local_model(config)
    mesh = setup.make_mesh(config)
    model = setup.model_config(config)
    device = jax.local_devices()[0]
    tried = attention.cases(model, config.dtype, device.platform, short=short)
    yield from attention.agreement(tried, device, with_peers=not short)
    packed, crops = attention_cases(golden.CONFIG, config.dtype)
    try:
        chosen = choose("auto", mesh, packed), choose("auto", mesh, crops)
    except ValueError as error:
        yield report.Row("golden model", "attention", False, str(error))
    else:
        dtypes = (config.dtype,) if short else ("float32", "bfloat16")
        yield from golden.agreement(_mesh_of_golden_model(mesh), chosen, dtypes)
    yield from collectives.exchanges(mesh)
    if not short:
        with tempfile.TemporaryDirectory() as folder:
            yield from training.measure(config, mesh, Path(folder))


def _mesh_of_golden_model(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """All devices, but for devices that one CPU simulates: of these the first.

    XLA has a thread for each simulated device. A device that waits in two exchanges at once takes the thread
    of another one, for which it then waits forever.
    """
    first = mesh.devices.flat[0]
    if first.platform != "cpu" or jax.process_count() > 1:
        return mesh
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, [first])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser(
        "llave_jax.check_device", __doc__, takes_config=True, default_config="quickstart"
    )
    parser.add_argument(
        "--short", action="store_true", help="only what decides whether results are right: a minute"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write the findings as JSON, too"
    )
    processes.add_arguments(parser)
    return parser.parse_args(argv)


def _command(args: argparse.Namespace) -> int:
    processes.initialize(args)
    first, start = jax.process_index() == 0, time.monotonic()
    command_line.set_up_logging(args, first=first, times=True)
    rows = []
    for row in check(args.config, short=args.short):
        rows.append(row)
        if first:
            seconds = time.monotonic() - start
            print(
                f"{seconds:4.0f} s  {row.check}, {row.subject}: {row.mark or row.text}",
                file=sys.stderr,
            )
    # A device of any process may be the one that is wrong.
    others = processes.gather(
        [row.check + ": " + row.subject for row in rows if row.passed is False]
    )
    for number, failed in enumerate(others[1:], start=1):
        rows += [
            report.Row("process", f"{number}: {what}", False, "failed there") for what in failed
        ]
    passed, line = report.verdict(rows)
    if first:
        print(f"{report.table(rows)}\n{line}")
        if args.output is not None:
            write_text(args.output, report.to_json(rows, args.config_name, _fields(args.config)))
    return 0 if passed else 1


# Fields that name folders, files or accounts.
_PRIVATE = (
    *("model.path", "model.tokenizer", "data.path", "data.image_root"),
    *("data.subsets", "data.weights", "eval.benchmark", "eval.datasets", "log.wandb"),
)


def _fields(config: Config) -> dict[str, Any]:
    values = json.loads(config.to_json())
    return {key: value for key, value in leaves(values) if key not in _PRIVATE}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_command, parse_args(argv), (ValueError, OSError, FloatingPointError))


if __name__ == "__main__":
    sys.exit(main())
