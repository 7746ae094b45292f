"""A server in a thread of this process: real sockets, and the shapes that are used are compiled when they are."""

import contextlib

from llave_jax.serving import process
from llave_jax.serving.app import App, Model
from llave_jax.serving.batcher import Batcher
from llave_jax.serving.engine import ModelEngine
from llave_jax.serving.settings import Limits


@contextlib.contextmanager
def served(embedder, name="tiny", limits=None):
    """The URL of a server of an embedder."""
    limits = limits or Limits()
    app = App(limits)
    batcher = Batcher(ModelEngine(embedder, limits), observer=app.metrics)
    model = Model(name, embedder.config.text.hidden_size, embedder.config.inputs.max_length, ())
    app.start(model, batcher)
    with process.HttpServer(app.asgi, process.listen("127.0.0.1", 0), limits, 5.0) as http:
        yield http.url
    batcher.close(5.0)
