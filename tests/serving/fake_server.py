"""A server process without a model: `python -m tests.serving.fake_server [LIMITS]` prints its URL.

LIMITS is JSON for `Limits`. A text with the word SLOW takes a second.
"""

import argparse
import json
import os
import sys
import threading
import time

from llave_jax.common import command_line
from llave_jax.serving import process
from llave_jax.serving.app import App, Model
from llave_jax.serving.batcher import Batcher
from llave_jax.serving.settings import Limits
from tests.serving.fake_engine import DIMENSION, LONGEST, FakeEngine

DRAIN = 5.0


class _Engine(FakeEngine):
    def prepare(self, item):
        if "SLOW" in item.text:
            time.sleep(1.0)
        sequence = super().prepare(item)
        self.prepared.clear()
        self.batches.clear()
        return sequence


def _serve(args):
    limits = Limits(**json.loads(args.limits))
    app = App(limits)
    listening = process.listen("127.0.0.1", 0)
    with process.HttpServer(app.asgi, listening, limits, DRAIN) as http:
        batcher = Batcher(_Engine(limits=limits), max_waiting=limits.waiting, observer=app.metrics)
        app.start(Model("tiny", DIMENSION, LONGEST, ["query"]), batcher)
        print(http.url, flush=True)
        process.run_until_told(http, app, batcher, DRAIN)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("limits", nargs="?", default="{}")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--until-eof", action="store_true", help="end with who holds stdin")
    values = parser.parse_args()
    if values.until_eof:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    command_line.set_up_logging(values, times=True)
    sys.exit(command_line.run(_serve, values))
