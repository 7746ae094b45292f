"""Writing checkpoints in the background: sealed, the newest kept, and a failure said at once.

orbax writes the files and gives a checkpoint its name when all are there. This module adds the seal
(`weights/checkpoint_seal.py`), takes a checkpoint's name away before its files are removed, and turns what
goes wrong into one message that names the folder.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llave_jax.common.directories import make_directory
from llave_jax.weights import checkpoint_seal
from llave_jax.weights.run_params import checkpoint_steps

# Where checkpoints wait to be removed. Under its number, one that is half removed would pass for a checkpoint.
_REMOVED = ".removed"
# Behind the name of a checkpoint that cannot be used and is kept.
DAMAGED = ".damaged"


class CheckpointWriter:
    """Saves checkpoints of any items into one folder. All processes of a job use it together.

    Args:
      folder: STEP/ITEM is written in it; made if it is not there. What killed processes have left in it is
        removed.
      keep: how many checkpoints are kept.
      about: what each checkpoint says of itself besides package versions, for JSON.

    Raises:
      OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, keep: int, about: Mapping[str, Any]):
        self._folder, self._about = folder.resolve(), about
        self._first = jax.process_index() == 0
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._check_writable()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                todelete_subdir=_REMOVED,
                async_options=ocp.AsyncOptions(
                    # In the background, a folder that cannot be made shows as a timeout of five minutes.
                    create_directories_asynchronously=False,
                    post_finalization_callback=self._seal,
                ),
            ),
        )
        self._clear()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, also of one that is being written; None if there is none."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the machines are about to be taken away.

        Args:
          step: optimiser steps done.

        Returns:
          True if so, in all processes alike.
        """
        return self._manager.reached_preemption(step)

    def restore(self, step: int, args: ocp.args.Composite) -> Any:
        """Reads a checkpoint.

        Args:
          step: of the checkpoint.
          args: as of orbax.

        Returns:
          What orbax returns.
        """
        return self._manager.restore(step, args=args)

    def save(self, step: int, args: ocp.args.Composite) -> None:
        """Writes a checkpoint. Returns when the arrays are copied; the rest is done in the background.

        Args:
          step: of the checkpoint.
          args: its items, as of orbax.

        Raises:
          OSError: this checkpoint or the one before cannot be written.
        """
        self.wait()
        self._step = step
        try:
            self._manager.save(step, args=args)
        except Exception as error:
            self._error = error
            self.check()
        self._thread = threading.Thread(target=self._finish, args=(step,), name="checksums")
        self._thread.start()

    def check(self) -> None:
        """Says if the last checkpoint could not be written.

        Raises:
          OSError: it names the folder, the reason and what is kept.
        """
        if self._error is None:
            return
        error, self._error = self._error, None
        reason = _reason(error)
        if reason is None:
            raise error
        kept = self._kept()
        raise OSError(
            f"{self._folder}: the checkpoint of step {self._step} could not be written: "
            f"{reason}. "
            + (f"That of step {kept} is kept" if kept is not None else "There is none before it")
            + "; make room or give the right to write, and run the same command again"
        ) from error

    def wait(self) -> None:
        """Waits until the last checkpoint is whole.

        Raises:
          OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Waits as `wait` does, and ends the writer.

        Raises:
          OSError: the last checkpoint could not be written, and `check` has not said so.
        """
        try:
            self.wait()
        finally:
            # orbax raises again what `check` has said.
            with contextlib.suppress(Exception):
                self._manager.close()

    def _check_writable(self) -> None:
        probe = self._folder / f".probe_{jax.process_index()}"
        try:
            make_directory(self._folder)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"{self._folder}: checkpoints cannot be written here: {error.strerror}; give the right to "
                "write, or use another --workdir"
            ) from error

    def _seal(self) -> None:
        """Called by orbax on the first process before the checkpoint takes its name."""
        (folder,) = self._folder.glob(f"{self._step}.orbax-checkpoint-tmp*")
        checkpoint_seal.write_contents(folder, {"step": self._step, **self._about})

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            checkpoint_seal.write_checksums(
                self._folder / str(step), jax.process_index(), jax.process_count()
            )
        except Exception as error:  # it is raised where training sees it
            self._error = error
        self._clear()

    def _clear(self) -> None:
        if not self._first:
            return
        shutil.rmtree(self._folder / _REMOVED, ignore_errors=True)
        if self._error is not None:
            for left in self._folder.glob(f"{self._step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    def _kept(self) -> int | None:
        steps = checkpoint_steps(self._folder)
        return max((step for step in steps if step != self._step), default=None)


def set_aside(folder: Path) -> None:
    """Renames a checkpoint that cannot be used, so that its number may be saved again.

    Args:
      folder: of the checkpoint. Earlier ones that were set aside under the same number are kept too.
    """
    aside, number = folder.with_name(folder.name + DAMAGED), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}{DAMAGED}-{number}")
    folder.rename(aside)


def _reason(error: Exception) -> str | None:
    """What the operating system said, out of what orbax or tensorstore makes of it; None: it did not."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    said = re.search(r": ([^:\[\]]+) \[os_error_code", str(error))
    return said[1] if said else None
