"""A server under load, beside offline encoding of the same items: latency, throughput, errors and memory.

    python benchmarks/serve_load.py --model DIR [--clients 64] [--seconds 600]

Starts `python -m llave_jax.serve` and as many clients as asked for, all in one other process. Each sends its next
request when it has the answer to the last one: texts or pictures, one to `--most-items` in a request, as JPEG in data
URIs. Some answers are compared with vectors that `Embedder.encode` has given for the same items. When the server is
gone, `Embedder.encode` embeds the items of the same requests for `--offline-seconds`. It takes encoded pictures too.
Where other programs use the machine as well, items a CPU second compare better than items a second.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.embed_file import WORDS  # noqa: E402

# Cosine between the server's vector and the offline one, whose batches have other shapes.
ALIKE = 1 - 1e-5
_CHECKED_EVERY = 50


@dataclasses.dataclass
class Result:
    """What came of the clients' requests."""

    seconds: float = 0.0
    items: int = 0
    statuses: dict[int, int] = dataclasses.field(default_factory=dict)
    latencies: list[float] = dataclasses.field(default_factory=list)
    memory: list[float] = dataclasses.field(default_factory=list)
    checked: int = 0
    different: int = 0
    client_cpu: float = 0.0
    server_cpu: float = 0.0


class Load:
    """The requests, the same ones in each process: number -> items.

    Args:
      pictures: the share of requests that have pictures.
      most_items: of a request.
      size: pixels of a picture's longer side.
    """

    def __init__(self, pictures: float, most_items: int, size: int):
        rng = np.random.default_rng(0)
        self._share, self._most = pictures, most_items
        self.texts = [" ".join(rng.choice(WORDS, rng.integers(4, 16))) for _ in range(500)]
        self.pictures = []
        for _ in range(100):
            height = int(size * rng.uniform(0.6, 1.0))
            noise = rng.integers(0, 255, (8, 8, 3), np.uint8)
            buffer = io.BytesIO()
            PIL.Image.fromarray(noise).resize((size, height)).save(buffer, "jpeg")
            self.pictures.append(buffer.getvalue())

    def request(self, number: int) -> tuple[bool, list[int]]:
        """Whether the request has pictures, and which texts or pictures it has."""
        rng = np.random.default_rng(number)
        shows = bool(rng.random() < self._share)
        pool = self.pictures if shows else self.texts
        return shows, rng.integers(0, len(pool), rng.integers(1, self._most + 1)).tolist()

    def body(self, number: int) -> bytes:
        """The request in HTTP."""
        shows, chosen = self.request(number)
        entries: list[Any] = [self.texts[n] for n in chosen]
        if shows:
            uris = [base64.b64encode(self.pictures[n]).decode() for n in chosen]
            entries = [
                [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{uri}"}}]
                for uri in uris
            ]
        body = json.dumps({"input": entries, "encoding_format": "base64"}).encode()
        head = (
            "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def items(self) -> Iterator[Any]:
        """The items of all requests, one after another, as `Embedder.encode` takes them."""
        number = 0
        while True:
            shows, chosen = self.request(number)
            yield from ({"image": self.pictures[n]} if shows else self.texts[n] for n in chosen)
            number += 1


async def _client(
    port: int,
    load: Load,
    numbers: Iterator[int],
    until: float,
    result: Result,
    known: dict[Any, np.ndarray],
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    while (now := time.monotonic()) < until:
        number = next(numbers)
        shows, chosen = load.request(number)
        writer.write(load.body(number))
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        body = await reader.readexactly(int(length[1]))
        result.statuses[status] = result.statuses.get(status, 0) + 1
        if status == 429:
            await asyncio.sleep(1.0)
            continue
        assert status == 200, body[:500]
        result.latencies.append(time.monotonic() - now)
        result.items += len(chosen)
        if number % _CHECKED_EVERY == 0:
            for n, entry in zip(chosen, json.loads(body)["data"], strict=True):
                vector = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
                result.checked += 1
                result.different += float(vector @ known[shows, n]) < ALIKE
    writer.close()


async def _watch(pid: int, until: float, result: Result) -> None:
    import psutil

    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    while time.monotonic() < until:
        result.memory.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(1.0)
    result.server_cpu = sum(process.cpu_times()[:2]) - before


def _drive(
    pipe: Any,
    port: int,
    pid: int,
    load: Load,
    clients: int,
    seconds: float,
    known: dict[Any, np.ndarray],
) -> None:
    """All clients, in a process of their own."""

    async def together() -> Result:
        result = Result()
        numbers = iter(range(10**9))
        began = time.monotonic()
        until = began + seconds
        tasks = [_client(port, load, numbers, until, result, known) for _ in range(clients)]
        await asyncio.gather(_watch(pid, until, result), *tasks)
        result.seconds = time.monotonic() - began
        result.client_cpu = time.process_time()
        return result

    pipe.send(asyncio.run(together()))


def _offline(pipe: Any, model: str, load: Load, seconds: float) -> None:
    """Known vectors; then, told to go on, items a second and a CPU second of `Embedder.encode`."""
    from llave_jax import Embedder

    embedder = Embedder.from_pretrained(model)
    embedder.warm_up()
    texts = embedder.encode(load.texts)
    pictures = embedder.encode([{"image": picture} for picture in load.pictures])
    known = {(False, n): vector for n, vector in enumerate(texts)}
    pipe.send(known | {(True, n): vector for n, vector in enumerate(pictures)})
    pipe.recv()
    began, began_cpu = time.monotonic(), time.process_time()
    count = 0

    def items() -> Iterator[Any]:
        nonlocal count
        for item in load.items():
            if time.monotonic() - began > seconds:
                return
            count += 1
            yield item

    embedder.encode(items())
    pipe.send((count / (time.monotonic() - began), count / (time.process_time() - began_cpu)))


def start_server(model: str, *flags: str) -> tuple[subprocess.Popen, int]:
    """A server that is ready, and its port."""
    command = [sys.executable, "-m", "llave_jax.serve", "--model", model, "--port", "0", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r":(\d+): ready", line):
            return server, int(found[1])
    raise SystemExit("the server did not start")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model directory or a run's")
    parser.add_argument("--clients", type=int, nargs="+", default=[64])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of clients")
    parser.add_argument("--offline-seconds", type=float, default=30.0)
    parser.add_argument(
        "--pictures", type=float, default=0.5, help="share of requests with pictures"
    )
    parser.add_argument("--most-items", type=int, default=16, help="of a request")
    parser.add_argument("--size", type=int, default=256, help="pixels of a picture's longer side")
    parser.add_argument("--serve-flags", default="", help="further flags of the server")
    args = parser.parse_args()
    load = Load(args.pictures, args.most_items, args.size)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    offline = context.Process(
        target=_offline, args=(theirs, args.model, load, args.offline_seconds)
    )
    offline.start()
    known = ours.recv()
    server, port = start_server(args.model, *args.serve_flags.split())
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(
        f"{'clients':>8}{'requests':>10}{'items/s':>9}{'/CPU s':>8}{'p50 ms':>9}{'p99 ms':>9}{'429':>6}{'other':>7}"
        f"{'MiB at start':>14}{'MiB at end':>12}{'client CPU':>12}",
        flush=True,
    )
    rates = []
    for clients in args.clients:
        here, there = context.Pipe()
        driver = context.Process(
            target=_drive, args=(there, port, server.pid, load, clients, args.seconds, known)
        )
        driver.start()
        result: Result = here.recv()
        driver.join()
        assert result.checked, "no answer was compared"
        assert not result.different, (
            f"{result.different} of {result.checked} vectors differ from offline ones"
        )
        others = {s: n for s, n in result.statuses.items() if s not in (200, 429)}
        rates.append((result.items / result.seconds, result.items / result.server_cpu))
        p50, p99 = np.percentile(np.array(result.latencies) * 1000, [50, 99])
        tenth = max(1, len(result.memory) // 10)
        print(
            f"{clients:>8}{len(result.latencies):>10}{rates[-1][0]:>9.1f}{rates[-1][1]:>8.1f}{p50:>9.1f}{p99:>9.1f}"
            f"{result.statuses.get(429, 0):>6}{sum(others.values()):>7}"
            f"{np.mean(result.memory[tenth : 2 * tenth] or result.memory):>14.0f}"
            f"{np.mean(result.memory[-tenth:]):>12.0f}{result.client_cpu / result.seconds:>11.0%}",
            flush=True,
        )
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    ours.send("go")
    rate, rate_cpu = ours.recv()
    offline.join()
    print(
        f"offline: {rate:.1f} items/s, {rate_cpu:.1f} a CPU second; the server had {rates[-1][0] / rate:.0%} and "
        f"{rates[-1][1] / rate_cpu:.0%} of that"
    )


if __name__ == "__main__":
    main()
