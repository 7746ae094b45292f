"""The processes of a job end together: the error of one, or its death, ends the others with a word about it.

Without this, they would wait in a collective operation or at jax's exit for minutes, and none would say why.
Errors go through the job's key-value store, which every process asks once a second. A process that is killed
says nothing: the first process holds a connection to each of the others, and notices when one closes. Of a
host that is silent without closing its connections, jax's heartbeat tells (`--heartbeat-timeout`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the job's key-value store has no public name

from llave_jax.common.text import shortened

_KEY = "llave_jax/peers"
# Seconds between two questions to the key-value store.
_POLL = 1.0
# Seconds that the process which holds the store waits for the others to read why the job ends.
_FAREWELL = 5.0
# Seconds in which a collective operation that broke off is explained by the failure of another process.
_EXPLANATION = 10.0
# Seconds between the end of a process and the others taking it for a failure.
_GRACE = 2.0
# Exit statuses: of a mistake of the user's and of any other error, as of `common.command_line`.
_USER_ERROR, _ERROR = 2, 1


class _Peers:
    """This process among those of its job."""

    def __init__(self, client: Any, index: int, count: int, coordinator: str):
        self._client, self._index, self._count = client, index, count
        self._coordinator = coordinator.rpartition(":")[0].strip("[]")
        self._ending = threading.Event()
        self._sockets: list[socket.socket] = []
        self._set(f"who/{index}", f"{socket.gethostname()}, pid {os.getpid()}")
        for target in (self._poll, self._accept if index == 0 else self._connect):
            threading.Thread(target=target, name=f"peers{target.__name__}", daemon=True).start()

    def fail(self, text: str, status: int) -> None:
        """Tells the others why this process ends, and makes it end without waiting for them."""
        self._ending.set()
        failure = {"process": self._index, "text": text, "status": status}
        self._set(f"failed/{self._index}", json.dumps(failure))
        atexit.register(self._exit, status)

    def end(self) -> None:
        """This process has done its part."""
        self._ending.set()
        self._set(f"done/{self._index}", "")

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_KEY}/{key}", value, allow_overwrite=True)

    def _all(self, key: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"{_KEY}/{key}")
        return {int(name.rpartition("/")[2]): value for name, value in found}

    def _who(self, process: int) -> str:
        with contextlib.suppress(Exception):
            return f"process {process} ({self._names[process]})"
        return f"process {process}"

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return self._all("who")

    def _poll(self) -> None:
        while not self._ending.wait(_POLL):
            try:
                failed = self._all("failed")
                if len(self._all("who")) == self._count:
                    _ = self._names
            except Exception:
                # The store has gone with the first process, which `_connect` notices.
                continue
            for process, value in failed.items():
                if process != self._index:
                    failure = json.loads(value)
                    self._leave(f"{self._who(process)} {failure['text']}", failure["status"])

    def _accept(self) -> None:
        with socket.create_server(("", 0), backlog=self._count) as server:
            self._set("port", str(server.getsockname()[1]))
            while True:
                connection, _ = server.accept()
                self._sockets.append(connection)
                threading.Thread(target=self._hold, args=(connection,), daemon=True).start()

    def _hold(self, connection: socket.socket) -> None:
        """On the first process: waits until one of the others closes its connection."""
        name = connection.makefile().readline().strip()
        if not name.isdigit() or int(name) >= self._count:
            return
        self._wait_for_close(connection)
        process = int(name)
        # Time to say that it is done: a job that is told to stop ends its processes one after another.
        time.sleep(_GRACE)
        with contextlib.suppress(Exception):
            expected = {**self._all("done"), **self._all("failed"), **self._all("left")}
            if not self._ending.is_set() and process not in expected:
                failure = {"process": process, "text": _DIED, "status": _ERROR}
                self._set(f"failed/{process}", json.dumps(failure))

    def _connect(self) -> None:
        """On the other processes: waits until the first one closes the connection."""
        try:
            port = int(self._client.blocking_key_value_get(f"{_KEY}/port", 60_000))
            connection = socket.create_connection((self._coordinator, port), timeout=60)
            connection.settimeout(None)
            connection.sendall(f"{self._index}\n".encode())
        except Exception as error:
            logging.getLogger(__name__).info("process 0 is not watched: %s", error)
            return
        self._sockets.append(connection)
        self._wait_for_close(connection)
        if not self._ending.is_set():
            self._leave(f"{self._who(0)} {_DIED}", _ERROR)

    def _wait_for_close(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(64):
                pass

    def _leave(self, text: str, status: int) -> None:
        if self._ending.is_set():
            return
        self._ending.set()
        # At once and in one piece: jax may end this process meanwhile.
        os.write(2, f"error: {text}. This process ends with it\n".encode())
        self._exit(status)

    def _exit(self, status: int) -> None:
        self._set(f"left/{self._index}", "")
        until = time.monotonic() + _FAREWELL
        with contextlib.suppress(Exception):
            while self._index == 0 and time.monotonic() < until:
                gone = {**self._all("left"), **self._all("done")}
                time.sleep(0.2)
                if len(gone) >= self._count:
                    break
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(status)


def _broke_off(error: Exception) -> bool:
    """Whether an error is that of talking to another process."""
    words = ("Gloo", "UNAVAILABLE", "coordination service", "oordinationService")
    return isinstance(error, jax.errors.JaxRuntimeError) or any(
        word in str(error) for word in words
    )


_DIED = "has ended without a word, as if it was killed or its host was lost"
_peers: _Peers | None = None


def watch() -> None:
    """Begins to watch the other processes of the job. Call once, after they have found each other."""
    global _peers
    job = distributed.global_state
    if job.client is not None and job.num_processes > 1 and _peers is None:
        _peers = _Peers(job.client, job.process_id, job.num_processes, str(job.coordinator_address))


def leaving() -> None:
    """Says that this process is about to end and that the others know why."""
    if _peers is not None:
        _peers.end()


def sharing_failures(
    action: Callable[[Any], int | None],
    user_errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> Callable[[Any], int | None]:
    """A command whose failure in one process ends the others, too.

    Args:
      action: does what the flags say; returns an exit status.
      user_errors: exceptions whose message says what to do.

    Returns:
      `action`; where it raises, the other processes show the message with the number and the host of this
      process, and end with its status.
    """

    def shared(args: Any) -> int | None:
        try:
            status = action(args)
        except Exception as error:
            if _peers is not None:
                if _broke_off(error):
                    # Another process has failed, and the thread that learns of it ends this one.
                    time.sleep(_EXPLANATION)
                is_users = isinstance(error, user_errors)
                text = str(error) if is_users else f"{type(error).__name__}: {error}"
                _peers.fail(
                    f"has ended: {shortened(text)[:1500]}", _USER_ERROR if is_users else _ERROR
                )
            raise
        if _peers is not None:
            _peers.end()
        return status

    return shared
