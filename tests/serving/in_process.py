"""Requests to an application in this process, and what they are made of."""

import asyncio
import base64
import dataclasses
import io

import httpx
import PIL.Image

from llave_jax.serving.app import App, Model
from llave_jax.serving.batcher import Batcher
from llave_jax.serving.guard import Keys
from llave_jax.serving.settings import Limits
from tests.serving.fake_engine import DIMENSION, LONGEST, FakeEngine

SMALL = dataclasses.replace(
    Limits(), body_bytes=100_000, held_bytes=250_000, items=20, images=2, pixels=10_000, waiting=40
)


def data_uri(size=(20, 10), color="red", kind="png"):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(buffer, kind)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def image_part(uri):
    return {"type": "image_url", "image_url": {"url": uri}}


TEXT_PART = {"type": "text", "text": "What is in it?"}


class InProcess:
    """An application with an engine without a model, and its clients.

    Attributes:
      app, engine, batcher: its parts.
    """

    def __init__(
        self, limits=SMALL, keys=(), hosts=None, start=True, prompts=("query",), **options
    ):
        self.engine = FakeEngine(limits=limits)
        self.app = App(limits, Keys(keys), hosts)
        self.batcher = Batcher(
            self.engine, max_waiting=limits.waiting, observer=self.app.metrics, **options
        )
        if start:
            self.app.start(Model("tiny", DIMENSION, LONGEST, prompts), self.batcher)

    async def request(self, method, path, **arguments):
        transport = httpx.ASGITransport(self.app.asgi, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **arguments)

    def call(self, method, path, **arguments):
        return asyncio.run(self.request(method, path, **arguments))

    def get(self, path, **arguments):
        return self.call("GET", path, **arguments)

    def post(self, path="/v1/embeddings", **fields):
        return self.call("POST", path, json=fields)


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for leak in ("llave_jax/", "Traceback", "site-packages", "/tmp", "Error("):
        assert leak not in response.text
    return error
