"""What every request passes: host, API key, limits of its body, errors in one form, headers of the response.

Plain ASGI around the routes. Nothing here knows what a route does.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from llave_jax.common.json_text import parse_json
from llave_jax.serving.errors import ApiError, invalid
from llave_jax.serving.metrics import Metrics
from llave_jax.serving.settings import Limits

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The page's scripts, styles and requests are the server's own; its images may also be ones the user drops.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
# Names under which a server on the loopback interface is called. Others come from pages that lead their own
# name to 127.0.0.1 to read what the server answers (DNS rebinding).
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# Of a status without a client to tell.
CLIENT_LEFT = 499


class ClientLeft(Exception):
    """The client has closed the connection."""


class Keys:
    """API keys, of which no comparison tells anything by its time.

    Args:
      keys: the valid ones; none: every request is let in.
    """

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: str) -> bool:
        """Whether a key is one of the valid ones.

        Args:
          key: as the client gives it.

        Returns:
          True if it is valid. All keys are compared, whichever matches.
        """
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = False
        for other in self._digests:
            found |= hmac.compare_digest(digest, other)
        return found


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response in JSON that no cache keeps.

    Args:
      value: to be written as JSON, or JSON itself as bytes.
      status: of HTTP.
      headers: further ones.

    Returns:
      The response.
    """
    content = value if isinstance(value, bytes) else json.dumps(value, allow_nan=False).encode()
    return Response(
        content, status, {"cache-control": "no-store", **(headers or {})}, "application/json"
    )


class Guard:
    """The outermost layer of the application.

    Args:
      app: the routes; `scope["endpoint"]` is what answers.
      metrics: count requests.
      keys: API keys.
      open_routes: path -> whether it is answered without a key.
      hosts: names by which clients may call the server; None: any.
    """

    def __init__(
        self,
        app: App,
        metrics: Metrics,
        keys: Keys,
        open_routes: Callable[[str], bool],
        hosts: Sequence[str] | None,
    ):
        self._app = app
        self._metrics = metrics
        self._keys = keys
        self._open = open_routes
        self._hosts = hosts and {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        began = time.monotonic()
        status = 0
        scope["app"] = self

        async def send_checked(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_RAW_HEADERS]
            await send(message)

        try:
            try:
                self._check(scope)
                await self._app(scope, receive, send_checked)
            except Exception as error:
                if status:
                    raise
                await _response_to(error, scope)(scope, receive, send_checked)
        except ClientLeft:
            status = CLIENT_LEFT
        except Exception:
            log.exception("a response was not finished")
            raise  # It has begun and cannot be changed: the HTTP server closes the connection.
        finally:
            route = getattr(scope.get("endpoint"), "__name__", "other")
            self._metrics.request(route, status or CLIENT_LEFT, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not answered, whatever it asks for."""
        headers = scope["headers"]
        if self._hosts is not None:
            host = b"".join(value for name, value in headers if name == b"host").decode("latin-1")
            name = re.sub(r":\d*$", "", host.lower())
            if name not in self._hosts:
                raise ApiError(
                    421,
                    f"this server is not called {name[:100]!r}; its operator can allow that name (--host-name)",
                    "host_not_allowed",
                )
        if self._keys and not self._open(scope["path"]):
            given = [value for name, value in headers if name == b"authorization"]
            scheme, _, key = (given[0] if given else b"").decode("latin-1").partition(" ")
            if len(given) != 1 or scheme.lower() != "bearer" or not self._keys.accepts(key.strip()):
                raise ApiError(
                    401,
                    "the API key is missing or not valid; send it as Authorization: Bearer KEY",
                    "invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )


def _response_to(error: Exception, scope: Scope) -> Response:
    if isinstance(error, ClientLeft):
        raise error
    if isinstance(error, HTTPException):
        wording = {404: "there is no such route", 405: "the route has other methods"}
        text = wording.get(error.status_code, "the request cannot be answered")
        text = f"{scope['method'][:20]} {scope['path'][:100]}: {text}"
        error = ApiError(error.status_code, text, headers=dict(error.headers or {}))
    if not isinstance(error, ApiError):
        log.error("a request failed", exc_info=error)
        error = ApiError(500, "the server failed to answer; its log says why", "internal_error")
    return json_response({"error": error.body}, error.status, error.headers)


class HeldBytes:
    """Counts the bytes of all bodies in memory.

    Args:
      limit: of their sum.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._held = 0

    def take(self, count: int) -> None:
        """Counts more bytes in.

        Args:
          count: bytes that will be held.

        Raises:
          ApiError: 429, they would be too many.
        """
        if self._held + count > self._limit:
            raise ApiError(
                429,
                "the server holds too many requests; try again",
                "queue_full",
                headers={"retry-after": "1"},
            )
        self._held += count

    def give_back(self, count: int) -> None:
        """Counts bytes out.

        Args:
          count: bytes that were taken.
        """
        self._held -= count


class Body:
    """The JSON body of a request, which counts as held while the block runs.

        async with Body(scope, receive, limits, held) as fields: ...

    Entering reads and parses it.

    Args:
      scope, receive: of the request.
      limits: of bodies.
      held: counts the bytes.

    Raises:
      ApiError: the body is not JSON, not an object, too large, too slow, or there is no room for it.
      ClientLeft: the client has closed the connection.
    """

    def __init__(self, scope: Scope, receive: Receive, limits: Limits, held: HeldBytes):
        self._headers = dict(scope["headers"])
        self._receive = receive
        self._limits = limits
        self._held = held
        self._taken = 0

    async def __aenter__(self) -> dict[str, Any]:
        try:
            return await self._fields()
        except BaseException:
            self._held.give_back(self._taken)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._held.give_back(self._taken)

    async def _fields(self) -> dict[str, Any]:
        kind = self._headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # A page of another site can send other types without asking the browser for permission.
        if kind != b"application/json":
            raise ApiError(415, "expected the header Content-Type: application/json")
        if self._headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "compressed bodies are not accepted")
        raw = await self._read()
        try:
            if len(raw) < _PARSED_AT_ONCE:
                fields = parse_json(bytes(raw))
            else:
                fields = await asyncio.get_running_loop().run_in_executor(
                    None, parse_json, bytes(raw)
                )
        except ValueError as error:
            raise invalid(f"the body is not valid JSON: {str(error)[:200]}") from error
        if not isinstance(fields, dict):
            raise invalid("the body is not a JSON object")
        return fields

    async def _read(self) -> bytearray:
        limit = self._limits.body_bytes
        declared = self._headers.get(b"content-length", b"")
        length = int(declared) if declared.isdigit() and len(declared) < 20 else None
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                if length is not None and length > limit:
                    await self._too_large(0)
                if length:
                    self._take(length)
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    body += message.get("body", b"")
                    if len(body) > limit:
                        await self._too_large(len(body))
                    if len(body) > self._taken:
                        self._take(len(body) - self._taken)
                    if not message.get("more_body"):
                        return body
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the body did not arrive within {self._limits.body_seconds:g} s",
                headers={"connection": "close"},
            ) from error

    def _take(self, count: int) -> None:
        self._held.take(count)
        self._taken += count

    async def _too_large(self, size: int) -> None:
        """Raises 413, after most of the body: who still sends would not see a response."""
        while size < 2 * self._limits.body_bytes:
            message = await self._receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect":
                raise ClientLeft
            if not message.get("more_body"):
                break
        raise ApiError(
            413,
            f"the body has more than {self._limits.body_bytes} bytes, the limit of this server",
            "request_too_large",
            headers={"connection": "close"},
        )


# Smaller bodies are parsed without handing them to a thread.
_PARSED_AT_ONCE = 64 << 10
