"""What the server allows and how long it waits. Flags of `llave_jax.serve` set some of these."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one request and of all requests together.

    Attributes:
      body_bytes: of one request's body.
      held_bytes: of the bodies of all requests that are being answered.
      items: of one request.
      characters: of one item's text.
      images: of one item.
      pixels: of one image.
      frames: of one video; of a longer one so many are taken.
      video_bytes: of one video.
      video_seconds: for decoding one video.
      waiting: items of all requests that wait to be prepared.
      connections: open at a time.
      head_seconds: for the head of a request.
      body_seconds: for its body.
      write_seconds: for a client to take a piece of the response.
      request_seconds: for the items of a request, from the end of its body on.
      results: of one search.
    """

    body_bytes: int = 64 << 20
    held_bytes: int = 512 << 20
    items: int = 2048
    characters: int = 1_000_000
    images: int = 16
    pixels: int = 64_000_000
    frames: int = 64
    video_bytes: int = 48 << 20
    video_seconds: float = 60.0
    waiting: int = 4096
    connections: int = 2000
    head_seconds: float = 20.0
    body_seconds: float = 60.0
    write_seconds: float = 60.0
    request_seconds: float = 300.0
    results: int = 1000

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"limit {field.name}: expected a positive number")
        if self.items > self.waiting:
            raise ValueError(
                f"a request may have {self.items} items, but only {self.waiting} may wait: no such request could "
                "ever be answered"
            )
