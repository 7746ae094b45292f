"""Ways to break a file: of its bytes, and of the values of its JSON."""

from __future__ import annotations

import json
import random
from typing import Any

# What breaks parsers and limits.
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    255,
    2**31,
    2**32 - 1,
    2**63,
    10**9,
    10**30,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
)
TEXTS = (
    "",
    "x",
    "../x",
    "../../../../tmp/llave_fuzz_outside",
    "/etc/passwd",
    "/tmp/llave_fuzz_outside/x.safetensors",
    "a\0b",
    "\ud800",
    "9" * 5000,
    "data:image/png;base64,AAAA",
    "http://127.0.0.1:9/x",
    "concat:a|b",
    "<script>alert(1)</script>",
    "%s%n",
)
TOKENS = (
    b"\0",
    b"\xff" * 4,
    b"[" * 2000,
    b"{}",
    b"NaN",
    b"9" * 300,
    b'"',
    b"\n",
    b"PK\x01\x02",
    b"-1",
    b"\xed\xa0\x80",
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """The data with one to six changes: flipped, replaced, removed, repeated or foreign bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        # Headers stand at the beginning, directories of archives at the end.
        ends = rng.choice((len(out), len(out), 64, 400))
        place = rng.randrange(min(len(out), ends) + 1)
        if rng.random() < 0.2:
            place = len(out) - place
        match rng.randrange(8):
            case 0 if out:
                out[min(place, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[min(place, len(out) - 1)] = rng.choice(
                    (0, 1, 127, 128, 255, rng.randrange(256))
                )
            case 2:
                del out[place : place + rng.choice((1, 4, 64, 4096))]
            case 3:
                size = rng.choice((1, 4, 64, 1024))
                out[place:place] = out[place : place + size] * rng.choice((1, 2, 50))
            case 4:
                out[place:place] = rng.choice(TOKENS)
            case 5:
                size = rng.choice((2, 4, 8))
                value = rng.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1)) % (1 << 8 * size)
                out[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))
            case 6:
                del out[place:]
            case _:
                other = rng.randrange(len(out) + 1)
                size = rng.choice((1, 16, 256))
                out[place : place + size] = out[other : other + size]
    return bytes(out)


def value_of_any_kind(rng: random.Random) -> Any:
    kinds = (
        *NUMBERS,
        *TEXTS,
        None,
        True,
        False,
        [],
        {},
        [[]],
        [1, 2],
        ["a"],
        {"a": 1},
        [None],
        [[0, 0]],
        [[-1, "x"]],
    )
    return rng.choice(kinds)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A JSON value in which one to three values are changed, removed, moved or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        waiting = [value]
        while waiting and len(places) < 3000:
            outer = waiting.pop()
            if isinstance(outer, dict | list) and outer:
                keys = list(outer) if isinstance(outer, dict) else list(range(len(outer)))
                places += [(outer, key) for key in keys]
                waiting += [outer[key] for key in keys]
        if not places:
            return value_of_any_kind(rng)
        outer, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del outer[key]
            case 1:
                other, other_key = rng.choice(places)
                found = other.get(other_key) if isinstance(other, dict) else None
                outer[key] = json.loads(json.dumps(found))
            case 2 if isinstance(outer[key], int | float) and not isinstance(outer[key], bool):
                outer[key] = rng.choice(
                    (-outer[key], outer[key] + 1, outer[key] * 10**6, outer[key] / 3, 0)
                )
            case 3 if isinstance(outer, dict):
                outer[rng.choice(TEXTS)] = value_of_any_kind(rng)
            case _:
                outer[key] = value_of_any_kind(rng)
    return value


def mutate_json_text(text: bytes, rng: random.Random) -> bytes:
    """A JSON text with a broken value, or with broken bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(text, rng)
    changed = json.dumps(mutate_json(json.loads(text), rng)).encode()
    return changed if rng.random() < 0.95 else changed.replace(b'"', b"'", 1)
