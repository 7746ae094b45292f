"""Requests to the server, broken in their bodies, heads, sizes and timing.

A case is good if the server answers in time with a status that says what is wrong, in OpenAI's form where it is the
application that answers, tells nothing of the machine, and is as healthy as before. Status 500 is never good.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import PIL.Image

from tests.fuzz.mutations import (
    TEXTS,
    mutate_bytes,
    mutate_json,
    mutate_json_text,
    value_of_any_kind,
)

ROOT = Path(__file__).parents[2]
LIMITS = {
    "body_bytes": 2_000_000, "head_seconds": 1.0, "body_seconds": 1.0, "write_seconds": 1.0, "pixels": 4_000_000,
    "items": 64, "waiting": 512, "request_seconds": 15.0, "video_seconds": 5.0,
}  # fmt: skip
SECONDS = 20.0
# Of the machine, its paths and its code.
LEAKS = re.compile(
    rb"Traceback|File \\?\"|site-packages|llave_jax/|\.py\b|/tmp/|/home/|/root/|/proc/|root:x|Error\(|"
    + re.escape(str(ROOT).encode())
)
ROUTES = (
    "/v1/embeddings",
    "/search",
    "/v1/models",
    "/v1/models/x",
    "/health",
    "/ready",
    "/metrics",
    "/",
    "/index",
)

_server: subprocess.Popen | None = None
_address: tuple[str, int] = ("", 0)


def make(base: Path) -> None:
    """Pictures for the requests."""
    base.mkdir()
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        PIL.Image.effect_noise((40, 30), 60).convert("RGB").save(base / f"a.{kind}", kind)


def run(base: Path, case: Path, rng: random.Random) -> None:
    """One request, or a few on one connection."""
    if _server is None:
        _start()
    assert _server is not None
    for _ in range(rng.choice((1, 1, 1, 3))):
        _send(_request(base, rng), rng)
    status, answer = _answer(
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    assert status == 200, answer
    assert _server.poll() is None


def _start() -> None:
    """A server for this process, which ends when this process has."""
    global _server, _address
    command = [sys.executable, "-m", "tests.serving.fake_server", json.dumps(LIMITS), "--until-eof"]
    _server = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    atexit.register(_server.kill)
    assert _server.stdout is not None
    host, port = _server.stdout.readline().decode().strip().removeprefix("http://").split(":")
    _address = host, int(port)


def _request(base: Path, rng: random.Random) -> bytes:
    """The bytes of a request, good or broken in one of many ways."""
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_bytes(_whole(_body(base, rng), rng), rng)
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 300)))
    body = _body(base, rng)
    if kind == 2 and body[:1] == b"{":
        body = mutate_json_text(body, rng)
    return _whole(body, rng)


def _whole(body: bytes, rng: random.Random) -> bytes:
    """A head for a body."""
    route = rng.choice(("/v1/embeddings",) * 6 + ROUTES)
    method = rng.choice(("POST",) * 9 + ("GET", "PUT", "HEAD", "OPTIONS", "DELETE", "FOO"))
    if rng.random() < 0.05:
        route += rng.choice(
            ("/", "?x=1", "%00", "/../../etc/passwd", "%2e%2e/", "//", "\\", "%zz", "é")
        )
    headers = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }
    chunked = rng.random() < 0.1
    if chunked:
        del headers["Content-Length"]
        headers["Transfer-Encoding"] = "chunked"
        body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in _pieces(body, rng)) + b"0\r\n\r\n"
    if rng.random() < 0.15:
        name = rng.choice(list(headers))
        headers[name] = rng.choice(
            (
                "",
                "-1",
                "0",
                "5",
                "99999999999999999999",
                "1e3",
                "gzip",
                "text/plain",
                "a" * 70_000,
                "\x00",
                "é",
                "x, y",
            )
        )
    if rng.random() < 0.15:
        headers[
            rng.choice(
                (
                    "Authorization",
                    "Expect",
                    "Content-Encoding",
                    "Upgrade",
                    "Cookie",
                    "X-Forwarded-For",
                )
            )
        ] = rng.choice(("Bearer x", "100-continue", "gzip", "websocket", "a=b" * 1000, "' OR 1=1"))
    lines = [f"{method} {route} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body


def _pieces(body: bytes, rng: random.Random) -> list[bytes]:
    size = rng.choice((1 + len(body) // 3, 1000 + len(body) // 10))
    return [body[at : at + size] for at in range(0, len(body), size)]


def _body(base: Path, rng: random.Random) -> bytes:
    """A body, most of the time with something wrong in it."""
    kind = rng.randrange(12)
    if kind == 0:
        return b"[" * rng.choice((50, 200, 100_000))
    if kind == 1:
        return b" " * rng.choice((0, 1, 1_999_990, 2_000_001, 3_000_000))
    if kind == 2:
        text = rng.choice(TEXTS) if rng.random() < 0.5 else "x" * rng.choice((10, 5000, 1_000_001))
        value: Any = {"input": [str(text)] * rng.choice((1, 3, 65)), "truncate": rng.random() < 0.5}
    elif kind == 3:
        value = {"input": "a", rng.choice(("dimensions", "encoding_format", "model", "on_error", "user", "x")): (
            value_of_any_kind(rng)
        )}  # fmt: skip
    elif kind == 4:
        value = {"text": "a", "where": value_of_any_kind(rng), "k": value_of_any_kind(rng)}
    else:
        part = _picture(base, rng)
        content = (
            [{"type": "text", "text": "what is <image>?"}, part]
            if kind < 7
            else [part] * rng.choice((1, 2, 40))
        )
        value = {"input": [content] * rng.choice((1, 1, 2, 20))}
        if kind > 9:
            value = {"messages": [{"role": "user", "content": content}]}
        if rng.random() < 0.5:
            value["on_error"] = "skip"
    if rng.random() < 0.3:
        value = mutate_json(value, rng)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _picture(base: Path, rng: random.Random) -> dict[str, Any]:
    """A part with an image or a video, most of the time a broken one or a bomb."""
    path = rng.choice(sorted(base.iterdir()))
    data = path.read_bytes()
    media_type = f"image/{path.suffix[1:]}"
    match rng.randrange(7):
        case 0:
            data = mutate_bytes(data, rng)
        case 1:
            data = _png_bomb(rng.choice((3000, 30_000, 2**31 - 1)), rng.choice((1, 2000, 30_000)))
        case 2:
            data = _gif_bomb(rng.choice((10, 20_000)))
        case 3:
            data = rng.choice(
                (b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"#EXTM3U\nfile:///etc/passwd\n", b"")
            )
    uri = f"data:{media_type};base64," + base64.b64encode(data).decode()
    match rng.randrange(8):
        case 0:
            uri = mutate_bytes(uri.encode(), rng).decode("latin-1")
        case 1:
            uri = rng.choice((
                "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:22/", "http://169.254.169.254/latest/",
                "data:", "data:,", "data:image/png;base64", "ftp://x", "\\\\host\\share", "a.png", "~/x", "data:;base64,=",
            ))  # fmt: skip
        case 2:
            video = rng.choice(
                (
                    f"data:video/jpeg;base64,{uri.split(',')[-1]}," * 2,
                    uri,
                    "data:video/mp4;base64,AAAA",
                )
            )
            return {"type": "video_url", "video_url": {"url": video}}
    return {"type": "image_url", "image_url": {"url": uri}}


def _png_bomb(width: int, height: int) -> bytes:
    """A small file of many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = zlib.compress(bytes(min(width * 3 + 1, 10_000) * min(height, 100)), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _gif_bomb(frames: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("P", (8, 8)).save(buffer, "gif")
    whole = buffer.getvalue()
    at = whole.index(b",")
    return whole[:at] + whole[at:-1] * frames + b";"


def _send(request: bytes, rng: random.Random) -> None:
    """Sends a request fast, slowly, in part, or without waiting for its answer; checks the answer."""
    manner = rng.randrange(12)
    if manner == 0:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(_address, SECONDS) as connection,
        ):
            connection.sendall(request[: rng.randrange(len(request) + 1)])
        return
    if manner == 1:
        # The rest never comes.
        request = request[: rng.randrange(len(request) + 1)]
    status, answer = _answer(request, slow=manner == 2)
    if status is not None:
        assert status != 500, answer[:2000]
        assert 200 <= status < 600, answer[:200]


def _answer(request: bytes, slow: bool = False) -> tuple[int | None, bytes]:
    """The first response's status and all that came; None: the server closed the connection."""
    answer = b""
    end = time.monotonic() + SECONDS
    with socket.create_connection(_address, SECONDS) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in (
                [request[at : at + 100] for at in range(0, len(request), 100)][:20]
                if slow
                else [request]
            ):
                connection.sendall(piece)
                if slow:
                    time.sleep(0.01)
        # What came of a request that was not whole is told by a closed connection.
        while not _is_whole(answer, request):
            assert time.monotonic() < end, (
                f"no whole answer to {request[:300]!r} within {SECONDS} s: {answer[:300]!r}"
            )
            connection.settimeout(max(0.01, end - time.monotonic()))
            try:
                piece = connection.recv(1 << 20)
            except ConnectionError:
                break
            except TimeoutError:
                continue
            if not piece:
                break
            answer = (answer + piece).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    # What the client has written itself may be quoted.
    leaks = [found for found in LEAKS.findall(answer) if found not in request]
    assert not leaks, f"{leaks} in {answer[:2000]!r}"
    if not answer:
        return None, answer
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    status = int(answer[9:12])
    head, _, body = answer.partition(b"\r\n\r\n")
    if status >= 400 and b"application/json" in head and body and not request.startswith(b"HEAD"):
        with contextlib.suppress(ValueError):  # several answers on one connection
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}, body[:500]
    return status, answer


def _is_whole(answer: bytes, asked: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if asked.startswith(b"HEAD"):
        return bool(end)
    length = re.search(rb"content-length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])
