"""The routes: embeddings, search, models, health and metrics; and the page's files.

Owns what each route takes and answers. Batching is `batcher.py`, what all requests pass `guard.py`, the process
`process.py`.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import mimetypes
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from llave_jax.embedding.precision import truncate
from llave_jax.search.index import Index
from llave_jax.serving import items as client_items
from llave_jax.serving import searching
from llave_jax.serving.batcher import (
    Batcher,
    Cancelled,
    Closing,
    Embedded,
    QueueFull,
    Ticket,
)
from llave_jax.serving.errors import ApiError, invalid
from llave_jax.serving.guard import Body, ClientLeft, Guard, HeldBytes, Keys, json_response
from llave_jax.serving.items import ClientItem, ItemError
from llave_jax.serving.metrics import CONTENT_TYPE, Metrics
from llave_jax.serving.settings import Limits

PAGE = Path(__file__).parent / "page"
# Fields of /v1/embeddings. The second line is vLLM's and changes nothing here: the chat format is always closed.
_FIELDS = {
    *("input", "messages", "model", "encoding_format", "dimensions", "user"),
    *(
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "priority",
        "request_id",
    ),
    *("prompt_name", "input_type", "truncate", "truncate_prompt_tokens", "on_error"),
}
_PLENTY_OF_NUMBERS = 50_000
_SEARCHES = 4


@dataclasses.dataclass
class Model:
    """What the routes need to know of a model.

    Attributes:
      name: by which clients call it.
      dimension: D.
      max_length: tokens of the longest item.
      prompts: names of its prompts.
    """

    name: str
    dimension: int
    max_length: int
    prompts: Sequence[str] = ()


class App:
    """The application; `asgi` is what the HTTP server calls.

    It answers from the beginning; what needs the model answers 503 until `start`.

    Args:
      limits: of requests.
      keys: API keys.
      hosts: names by which clients may call the server; None: any.
    """

    def __init__(
        self, limits: Limits, keys: Keys | None = None, hosts: Sequence[str] | None = None
    ):
        self._limits = limits
        self._held = HeldBytes(limits.held_bytes)
        self._model: Model | None = None
        self._batcher: Batcher | None = None
        self._index: Index | None = None
        # Searching an index holds a thread while the disk is read.
        self._searches = ThreadPoolExecutor(_SEARCHES, thread_name_prefix="search")
        self._draining = False
        self._created = int(time.time())
        self.metrics = Metrics(
            lambda: self._batcher.waiting if self._batcher else 0,
            lambda: self._batcher.unfinished if self._batcher else 0,
        )
        self._files = {f"/{name}": file for name, file in _page_files().items()}
        if "/index.html" in self._files:
            self._files["/"] = self._files["/index.html"]
        routes = [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/search", self.search, methods=["POST"]),
            Route("/index", self.index),
            Route("/items/{id:path}/thumbnail", self.thumbnail),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.show_metrics),
            *(Route(path, self.page) for path in self._files),
        ]
        self.asgi = Guard(
            Router(routes, redirect_slashes=False),
            self.metrics,
            keys or Keys(),
            self._is_open,
            hosts,
        )

    def start(self, model: Model, batcher: Batcher, index: Index | None = None) -> None:
        """Begins to answer requests that need the model.

        Args:
          model: what clients are told of it.
          batcher: embeds their items.
          index: of its vectors, to be searched; None: there is none.
        """
        self._model, self._batcher, self._index = model, batcher, index
        self.metrics.ready.set(1)

    def drain(self) -> None:
        """Refuses new requests that need the model; those that are being answered go on."""
        self._draining = True
        self.metrics.ready.set(0)

    def _is_open(self, path: str) -> bool:
        return path in ("/health", "/ready") or path in self._files

    def _serving(self) -> tuple[Model, Batcher]:
        if self._draining:
            raise ApiError(
                503,
                "the server is shutting down",
                "shutting_down",
                headers={"retry-after": "5", "connection": "close"},
            )
        if self._model is None or self._batcher is None:
            raise ApiError(
                503,
                "the model is being loaded and compiled",
                "loading",
                headers={"retry-after": "5"},
            )
        return self._model, self._batcher

    # Routes.

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        model, batcher = self._serving()
        async with Body(request.scope, request.receive, self._limits, self._held) as fields:
            asked = _Asked.parse(fields, model, self._limits)
            ticket = await self._embed(asked.items, batcher, request, stop=not asked.skip)
        return await self._answer(asked, ticket, model)

    async def search(self, request: Request) -> Response:
        """POST /search"""
        model, batcher = self._serving()
        index = self._searched()
        async with Body(request.scope, request.receive, self._limits, self._held) as fields:
            if fields.get("model") is not None:
                _check_model(fields["model"], model)
            columns = await self._in_thread(lambda: index.columns)
            asked = searching.parse(fields, columns, model.prompts, self._limits)
            ticket = None
            if asked.item is not None:
                ticket = await self._embed([asked.item], batcher, request, stop=True)
        if ticket is not None:
            vector = _embedded(ticket, 0).vector
        else:
            vector = await self._in_thread(
                lambda: _existing(index.vector, asked.like or "", "like")
            )
        began = time.monotonic()
        hits = await self._in_thread(lambda: index.search(vector, asked.k, where=asked.where))
        seconds = round(time.monotonic() - began, 6)
        results = [searching.result(hit, index.settings.thumbnails) for hit in hits]
        return json_response({"results": results, "model": model.name, "search_seconds": seconds})

    async def index(self, request: Request) -> Response:
        """GET /index: what can be searched, and by which columns it can be filtered."""
        model, _ = self._serving()
        index = self._searched()
        described = await self._in_thread(lambda: searching.describe(index, self._limits))
        return json_response({**described, "model": model.name})

    async def thumbnail(self, request: Request) -> Response:
        """GET /items/ID/thumbnail"""
        self._serving()
        index, id = self._searched(), request.path_params["id"]
        picture = await self._in_thread(lambda: _existing(index.thumbnail, id, "id"))
        if picture is None:
            raise ApiError(404, "the item has no thumbnail", "not_found")
        return Response(
            picture, headers={"cache-control": "private, max-age=300"}, media_type="image/jpeg"
        )

    def _searched(self) -> Index:
        if self._index is None:
            raise ApiError(
                404, "this server has no index; its operator can name one (--index)", "no_index"
            )
        return self._index

    async def _in_thread(self, action: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._searches, action)

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        model, _ = self._serving()
        return json_response({"object": "list", "data": [self._describe(model)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        model, _ = self._serving()
        _check_model(request.path_params["name"], model)
        return json_response(self._describe(model))

    async def health(self, request: Request) -> Response:
        """GET /health: whether the process works at all."""
        if self._batcher is not None and not self._batcher.alive and not self._draining:
            return json_response({"status": "a thread has died"}, 500)
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: whether requests are answered."""
        self._serving()
        return json_response({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        """GET /, and the files of the page."""
        content, media_type = self._files[request.scope["path"]]
        return Response(content, headers={"cache-control": "no-cache"}, media_type=media_type)

    def _describe(self, model: Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "llave_jax",
            "max_model_len": model.max_length,
            "dimensions": model.dimension,
            "prompts": list(model.prompts),
        }

    # Embedding.

    async def _embed(
        self, items: Sequence[ClientItem], batcher: Batcher, request: Request, *, stop: bool
    ) -> Ticket:
        """The finished ticket of a request's items; gives them up if the client leaves."""
        loop = asyncio.get_running_loop()
        finished = loop.create_future()

        def done() -> None:
            loop.call_soon_threadsafe(_set, finished)

        try:
            ticket = batcher.submit(items, done, stop=stop)
        except QueueFull as error:
            raise ApiError(
                429,
                f"the queue is full: {error}",
                "queue_full",
                headers={"retry-after": str(error.retry_after)},
            ) from error
        except Closing as error:
            raise ApiError(
                503, str(error), "shutting_down", headers={"retry-after": "5"}
            ) from error
        left = asyncio.ensure_future(_until_left(request))
        try:
            await asyncio.wait(
                (finished, left),
                timeout=self._limits.request_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            left.cancel()
            batcher.cancel(ticket)  # nothing, if it is finished
        self._count(ticket)
        if not finished.done():
            if left.done() and not left.cancelled():
                raise ClientLeft
            raise ApiError(
                504,
                f"the items were not embedded within {self._limits.request_seconds:g} s",
                "timeout",
            )
        return ticket

    def _count(self, ticket: Ticket) -> None:
        for item, outcome in zip(ticket.items, ticket.outcomes, strict=True):
            kind = "image" if item.images else "text" if item.video is None else "video"
            result = "error"
            if isinstance(outcome, Embedded):
                result = "ok"
            elif outcome is None or isinstance(outcome, Cancelled):
                result = "cancelled"
            self.metrics.items(kind, result)

    async def _answer(self, asked: _Asked, ticket: Ticket, model: Model) -> Response:
        if not asked.skip:
            # What the others were given up for.
            for number, outcome in enumerate(ticket.outcomes):
                if not isinstance(outcome, Embedded | Cancelled):
                    _embedded(ticket, number)
        outcomes: list[Embedded | ApiError] = []
        for number in range(len(ticket.items)):
            try:
                outcomes.append(_embedded(ticket, number))
            except ApiError as error:
                outcomes.append(error)
        tokens = sum(outcome.tokens for outcome in outcomes if isinstance(outcome, Embedded))

        def body() -> bytes:
            data = ",".join(asked.entry(n, outcome) for n, outcome in enumerate(outcomes))
            tail = json_response(
                {"model": model.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
            ).body
            return f'{{"object":"list","data":[{data}],'.encode() + bytes(tail)[1:]

        numbers = 0 if asked.base64 else len(outcomes) * (asked.dimensions or model.dimension)
        if numbers < _PLENTY_OF_NUMBERS:
            return json_response(body())
        return json_response(await asyncio.get_running_loop().run_in_executor(None, body))


def _set(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


async def _until_left(request: Request) -> None:
    """Returns when the client has closed the connection. The body is read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _embedded(ticket: Ticket, number: int) -> Embedded:
    """An item's result; raises ApiError if there is none."""
    outcome, item = ticket.outcomes[number], ticket.items[number]
    if isinstance(outcome, Embedded):
        return outcome
    if isinstance(outcome, ItemError):
        raise invalid(str(outcome), outcome.where, outcome.code)
    raise ApiError(
        500, f"{item.where}: the model failed on it; the server's log says why", "internal_error"
    )


def _existing(read: Callable[[str], Any], id: str, param: str) -> Any:
    try:
        return read(id)
    except KeyError as error:
        raise ApiError(404, f"the index has no item {id[:100]!r}", "not_found", param) from error


def _check_model(name: Any, model: Model) -> None:
    if name != model.name:
        raise ApiError(
            404,
            f"the model {str(name)[:100]!r} is not served here; this server has {model.name!r}",
            "model_not_found",
            "model",
        )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A request for embeddings.

    Attributes:
      items: what to embed.
      dimensions: of the answer; None: all.
      base64: write vectors as little-endian float32 in base64.
      skip: an item that cannot be embedded is an entry with an error, not the end of the request.
    """

    items: list[ClientItem]
    dimensions: int | None
    base64: bool
    skip: bool

    @classmethod
    def parse(cls, fields: Mapping[str, Any], model: Model, limits: Limits) -> _Asked:
        """Reads the fields of a request; raises ApiError."""
        unknown = sorted(set(fields) - _FIELDS)
        if unknown:
            raise invalid(f"the field {unknown[0][:60]!r} is not known", unknown[0][:60])
        if fields.get("model") is not None:
            _check_model(fields["model"], model)
        given = [key for key in ("input", "messages") if fields.get(key) is not None]
        if len(given) != 1:
            raise invalid("expected either input or messages", "input")
        if given == ["input"]:
            items = client_items.parse_input(fields["input"], limits)
        else:
            items = [client_items.parse_messages(fields["messages"], "messages", limits)]
        encoding = _one_of(fields, "encoding_format", ("float", "base64"))
        dimensions = fields.get("dimensions")
        if dimensions is not None and (
            type(dimensions) is not int or not 1 <= dimensions <= model.dimension
        ):
            raise invalid(
                f"dimensions: expected a number from 1 to {model.dimension}", "dimensions"
            )
        prompt = client_items.prompt_of(fields, model.prompts)
        truncate = fields.get("truncate")
        if truncate not in (None, False, True):
            raise invalid("truncate: expected true or false", "truncate")
        if (tokens := fields.get("truncate_prompt_tokens")) is not None:
            # vLLM: -1 is the model's own length.
            if tokens not in (-1, model.max_length) or isinstance(tokens, bool):
                raise invalid(
                    f"truncate_prompt_tokens: expected -1 or {model.max_length}, the model's length",
                    "truncate_prompt_tokens",
                )
            truncate = True
        items = [
            dataclasses.replace(item, prompt_name=prompt, truncate=bool(truncate)) for item in items
        ]
        skip = _one_of(fields, "on_error", ("raise", "skip")) == "skip"
        return cls(items, dimensions, encoding == "base64", skip)

    def entry(self, number: int, outcome: Embedded | ApiError) -> str:
        """The JSON of one item's entry."""
        if isinstance(outcome, ApiError):
            error = bytes(json_response(outcome.body).body).decode()
            return f'{{"object":"embedding","index":{number},"embedding":null,"error":{error}}}'
        vector = truncate(outcome.vector, self.dimensions)
        if self.base64:
            numbers = f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'
        else:
            # Nine digits give back the same float32.
            numbers = "[" + ",".join(map("%.9g".__mod__, vector.tolist())) + "]"
        return f'{{"object":"embedding","index":{number},"embedding":{numbers}}}'


def _one_of(fields: Mapping[str, Any], name: str, values: Sequence[str]) -> str:
    value = fields.get(name)
    if value is None:
        return values[0]
    if value not in values:
        raise invalid(f"{name}: expected one of {', '.join(values)}", name)
    return value


def _page_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name: content and media type. They are read once, so that no request names a file."""
    if not (PAGE / "index.html").is_file():
        return {}
    found = {}
    for path in sorted(PAGE.iterdir()):
        if path.is_file() and not path.name.startswith(("_", ".")):
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            found[path.name] = (path.read_bytes(), kind)
    return found
