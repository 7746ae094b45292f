"""The server's process: its socket, the thread that speaks HTTP, and its end.

HTTP is spoken from the beginning, by a thread of its own, so that health checks are answered while the main thread
loads the model. A signal ends the process within a bounded time: what is being answered is finished, nothing new is
taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llave_jax.common.interrupts import GRACE, SignalThread
from llave_jax.serving.app import App
from llave_jax.serving.batcher import Batcher
from llave_jax.serving.settings import Limits

log = logging.getLogger(__name__)

# Load balancers keep idle connections for a minute; whoever closes first must be the load balancer.
KEEP_ALIVE = 75
_HEAD_BYTES = 32 << 10


class PortTaken(ValueError):
    """The address cannot be listened on."""


def listen(host: str, port: int) -> socket.socket:
    """Takes the address.

    Args:
      host: a name or an address of this machine.
      port: 0 for any that is free.

    Returns:
      The socket, listening.

    Raises:
      PortTaken: somebody else has it, or it is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise PortTaken(
            f"--host {host}: is no address of this machine ({error.strerror})"
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise PortTaken(
            f"--host {host} --port {port}: {error.strerror}; name another port, or end the program that has it"
        ) from error
    return listening


class HttpServer:
    """uvicorn in a thread. `with` stops it, whatever happens in the block.

    Args:
      asgi: the application.
      listening: its socket.
      limits: of connections.
      drain: seconds that requests may take to finish when the server stops.
    """

    def __init__(self, asgi: Any, listening: socket.socket, limits: Limits, drain: float):
        # What it says in between is about single clients.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        self._drain = drain
        self._server = uvicorn.Server(
            uvicorn.Config(
                asgi,
                loop="asyncio",
                http=_protocol(limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=max(1, round(drain)),
                h11_max_incomplete_event_size=_HEAD_BYTES,
            )
        )
        self._socket = listening
        host, port = listening.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except Exception:
            log.exception("the HTTP server failed")

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(1.0 if kind else self._drain)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self, timeout: float) -> bool:
        """Takes no more connections, and finishes the requests that there are.

        Args:
          timeout: seconds to wait for them.

        Returns:
          Whether all were finished.
        """
        self._server.should_exit = True
        self._thread.join(timeout)
        return not self._thread.is_alive()


def _protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP, with limits of time for clients that write or read slowly."""

    class Protocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _blocked: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except Exception:  # a request line that h11 lets pass and uvicorn cannot decode
                self.transport.abort()
                return
            if self.cycle is not None and not self.cycle.response_complete:
                self._head = _cancelled(self._head)
            elif self._head is None:
                self._await_head()

        def _await_head(self) -> None:
            self._head = self.loop.call_later(limits.head_seconds, self.transport.abort)

        def on_response_complete(self) -> None:
            self._head = _cancelled(self._head)
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._blocked = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._blocked = _cancelled(self._blocked)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head, self._blocked = _cancelled(self._head), _cancelled(self._blocked)
            super().connection_lost(exc)

    return Protocol


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def run_until_told(http: HttpServer, app: App, batcher: Batcher, drain: float) -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes what is being answered.

    Args:
      http: speaks HTTP for `app`.
      app: started.
      batcher: of the application; it is closed.
      drain: seconds to finish. What hangs afterwards is ended, and a second signal ends the process at once.

    Raises:
      RuntimeError: the HTTP server has died.
    """
    with _signals(drain) as told:
        while not told.wait(1.0):
            if not http.alive:
                raise RuntimeError("the HTTP server has died; its log says why")
        end = time.monotonic() + drain
        app.drain()
        answered = http.stop(drain)
        finished = batcher.close(max(0.0, end - time.monotonic()))
        if not (answered and finished):
            log.warning("requests were cut off, as they took longer than --drain %g s", drain)


@contextlib.contextmanager
def _signals(drain: float) -> Iterator[threading.Event]:
    """A block in which a signal sets the event, and ends the process should it hang."""
    told, left = threading.Event(), threading.Event()

    def first(number: int) -> None:
        log.info("told to stop: finishing what is being answered")
        told.set()
        timer = threading.Timer(drain + GRACE, end, (number,))
        timer.daemon = True
        timer.start()

    def end(number: int) -> None:
        if not left.is_set():
            os._exit(128 + number)

    def noted(number: int, frame: FrameType | None) -> None:
        """The thread has taken it."""

    signals = SignalThread(noted, first, end)
    try:
        yield told
    finally:
        left.set()
        signals.close()
