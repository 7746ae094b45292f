"""A server's process: its end, and clients that are slow, silent or gone."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from llave_jax.serving import process

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def started(**limits):
    command = [sys.executable, "-m", "tests.serving.fake_server", json.dumps(limits)]
    server = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        server.url = server.stdout.readline().strip()
        assert server.url, server.stderr.read()
        yield server
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def url():
    limits = {
        "head_seconds": 0.5, "body_seconds": 0.5, "write_seconds": 0.5, "connections": 40, "body_bytes": 1_000_000,
    }  # fmt: skip
    with started(**limits) as server:
        yield server.url
        assert httpx.get(server.url + "/health").status_code == 200


def connect(url):
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), 10)
    connection.settimeout(10)
    return connection


def embed(url, **fields):
    return httpx.post(url + "/v1/embeddings", json=fields, timeout=20)


def head(length, *lines):
    lines = (
        "POST /v1/embeddings HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        *lines,
    )
    return ("\r\n".join([*lines, f"Content-Length: {length}"]) + "\r\n\r\n").encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_being_answered(number):
    with started() as server:
        answers = []
        client = threading.Thread(target=lambda: answers.append(embed(server.url, input="SLOW")))
        client.start()
        # A client that holds its connection open without a request does not hold the server.
        with httpx.Client(base_url=server.url) as idle, connect(server.url):
            idle.get("/health")
            while "llave_unfinished_items 1.0" not in httpx.get(server.url + "/metrics").text:
                time.sleep(0.01)
            server.send_signal(number)
            client.join()
            assert answers[0].status_code == 200
            _, errors = server.communicate(timeout=20)
        assert server.returncode == 0
        assert "told to stop" in errors
        assert "Traceback" not in errors
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


def test_the_end_is_bounded_and_a_second_signal_ends_at_once():
    with started() as server:
        items = [f"SLOW {n}" for n in range(200)]

        def ask():
            with pytest.raises(httpx.HTTPError):
                embed(server.url, input=items)

        client = threading.Thread(target=ask)
        client.start()
        while "llave_unfinished_items 200.0" not in httpx.get(server.url + "/metrics").text:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=5)
        assert server.returncode == 128 + signal.SIGTERM
        client.join()


def test_a_port_that_is_taken():
    with process.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(process.PortTaken, match=f"--port {port}: .*in use; name another port"):
            process.listen("127.0.0.1", port)
    with pytest.raises(process.PortTaken, match="is no address of this machine"):
        process.listen("no-such-host.invalid", 0)


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "])
def test_a_head_that_does_not_come(url, sent):
    with connect(url) as connection:
        connection.sendall(sent)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1000) == b""


def test_a_head_that_comes_in_drops(url):
    with connect(url) as connection, pytest.raises(OSError):  # noqa: PT012
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(100):
            connection.sendall(b"X: y\r\n")
            time.sleep(0.1)


def test_a_body_that_does_not_come(url):
    with connect(url) as connection:
        connection.sendall(head(100) + b'{"input"')
        assert b" 408 " in connection.recv(100)


def test_a_kept_connection(url):
    with httpx.Client(base_url=url) as client:
        ports = set()
        for _ in range(3):
            response = client.post("/v1/embeddings", json={"input": "a"})
            assert response.status_code == 200
            stream = response.extensions["network_stream"]
            ports.add(stream.get_extra_info("client_addr"))
            # Longer than a head may take: between two requests a connection may rest.
            time.sleep(0.6)
        assert len(ports) == 1


def test_a_client_that_does_not_read(url):
    def answered():
        text = httpx.get(url + "/metrics", timeout=20).text
        return sum(
            float(n) for n in re.findall(r'requests_total\{route="show_metrics".*\} (\S+)', text)
        )

    requests = 6000
    whole = len(httpx.get(url + "/metrics").content) * requests
    with connect(url) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * requests)
        # Until the buffers of both ends are full, and then for as long as the server waits.
        last = 0
        while (count := answered()) > last + 1:
            last = count
            time.sleep(1.5)
        received = 0
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
        assert received < whole / 2


def test_a_body_that_is_too_large_is_answered(url):
    with connect(url) as connection:
        connection.sendall(head(1_500_000) + b" " * 1_500_000)
        answer = connection.recv(10_000)
        assert b" 413 " in answer
        assert b"connection: close" in answer
        while connection.recv(10_000):
            pass


def test_more_connections_than_are_allowed(url):
    connections = [connect(url) for _ in range(60)]
    statuses = []
    for connection in connections:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            statuses.append(connection.recv(1000).split()[1])
    for connection in connections:
        connection.close()
    assert set(statuses) == {b"200", b"503"} or set(statuses) == {b"503"}
    end = time.monotonic() + 10
    while httpx.get(url + "/health").status_code != 200:
        assert time.monotonic() < end


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff\x16\x03\x01\r\n\r\n",
        b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        head("x"),
        head(-1),
        head("5", "Content-Length: 6"),
        head(5, "Transfer-Encoding: chunked") + b"zz\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_request(url, sent):
    with connect(url) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            answer = connection.recv(10_000)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5", b"HTTP/1.1 200"))
        assert b"Traceback" not in answer
    assert httpx.get(url + "/health").status_code == 200
