"""One run at a time in a WORKDIR, and what killed runs have left there.

Of several processes the first holds the lock for all. What a lock is says `common/locks.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from llave_jax.common.files import remove_abandoned
from llave_jax.common.locks import OutputInUse, only_writer
from llave_jax.parallel import processes

# Where commands write that work on a run.
_FOLDERS = (
    *("model", "model/tokenizer", "best", "best/model", "best/model/tokenizer"),
    *("digits", "digits/tokenizer", "eval", "eval/*", "eval/*/*", "curves"),
)


class WorkdirInUse(Exception):
    """Another run is in this WORKDIR; the message says which."""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds WORKDIR while the block runs. All processes of a job call this.

    Args:
      workdir: the run's directory; made.

    Raises:
      WorkdirInUse: another run holds it; in every process of the job.
      OSError: the directory cannot be made or written to.
    """
    with contextlib.ExitStack() as stack:
        refused = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(only_writer(workdir, flag="--workdir"))
            except OutputInUse as error:
                refused = str(error)
        refused = processes.json_from_first_process(refused)
        if refused is not None:
            raise WorkdirInUse(refused)
        yield


def remove_leftovers(workdir: Path) -> None:
    """Removes temporary files and folders of killed runs. Call with `workdir` locked, on the first process.

    What a living process still writes, as an evaluation that was started beside the run, stays. Unfinished
    checkpoints are removed by `checkpoint_writer.py`.

    Args:
      workdir: the run's directory.
    """
    for folder in [workdir, *(found for name in _FOLDERS for found in workdir.glob(name))]:
        remove_abandoned(folder)
