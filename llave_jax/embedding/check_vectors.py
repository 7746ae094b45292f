"""Check vectors: a few items with the embeddings that a model gives them, kept beside an export.

Whoever loads the export elsewhere embeds the same items and compares. The items tell the usual mistakes apart: texts,
an image that needs no resizing, one that does. For one text the file also has the vectors that come of the usual
mistakes with its prompt, so that a comparison can name the mistake. How other software is asked for its vectors is
`tools/check_export.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from llave_jax.common import files
from llave_jax.common.tables import align
from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs import chat, images, taps
from llave_jax.inputs.sequence import TokenSequence
from llave_jax.parallel import sharding
from llave_jax.weights import model_dir
from llave_jax.weights.export_source import ExportSource
from llave_jax.weights.json_files import read_json
from llave_jax.weights.safetensors_io import CheckpointError
from llave_jax.weights.to_hf import CHECK_VECTORS

FORMAT = 1

# float32 on both sides, summed in another order: the largest difference of one of D numbers.
SAME = 1e-4
# Half precision, or an image that was resized by another library.
CLOSE = 0.998
# Half precision normalises to within this.
_LENGTH = 1e-2
# Of a batch in which the items are embedded.
_TOKENS = 4096
# At which a vector is taken for that of a mistake.
_RECOGNISED = 0.9995


@dataclasses.dataclass(frozen=True)
class CheckItem:
    """An item to embed.

    Attributes:
      name: what it is.
      text: user content; "" for an image alone.
      image: the bytes of a PNG file; None for a text.
      resized: whether the image has another size than a crop.
    """

    name: str
    text: str = ""
    image: bytes | None = None
    resized: bool = False

    @property
    def data_uri(self) -> str | None:
        """The image as a `data:` URI."""
        return None if self.image is None else _PNG + base64.b64encode(self.image).decode()

    def item(self) -> dict[str, Any]:
        """The item as `Embedder.encode` takes it."""
        image = {} if self.image is None else {"image": self.open()}
        return {"text": self.text, **image} if self.text else image

    def open(self) -> PIL.Image.Image:
        """The decoded image."""
        assert self.image is not None, f"{self.name} has no image"
        return images.load_image(self.image, self.name)


_PNG = "data:image/png;base64,"


class Mistake(NamedTuple):
    """What comes of a wrong prompt for one item.

    Attributes:
      name: a key of `MISTAKES`.
      vector: float32 [D].
    """

    name: str
    vector: np.ndarray


_TURN = "<|im_start|>assistant\n"

# Name -> what the mistake makes of the right prompt and the text in it, and what it means.
MISTAKES: dict[str, tuple[Callable[[str, str], str], str]] = {
    "no chat template": (
        lambda prompt, text: text,
        "the text was embedded without the chat template. Send it as `messages` (vLLM applies no template to `input`), "
        "or let the library make a message of it",
    ),
    "no assistant turn": (
        lambda prompt, text: prompt[: prompt.index(_TURN)],
        "the prompt ends behind the user's message, so the wrong token is pooled. The chat template in use is not the "
        "export's chat_template.jinja",
    ),
    "open assistant turn": (
        lambda prompt, text: prompt[: prompt.index(_TURN) + len(_TURN)],
        "the prompt ends where a chat model would begin to answer, so the wrong token is pooled. The chat template in "
        "use is one for chats, not the export's chat_template.jinja",
    ),
    "no last newline": (
        lambda prompt, text: prompt[:-1],
        "the prompt lacks its last newline, which is the token to pool. Something strips the rendered prompt",
    ),
    "no system message": (
        lambda prompt, text: prompt[prompt.index("<|im_start|>user") :],
        "the prompt lacks the system message that the model was trained with",
    ),
    "no text": (
        lambda prompt, text: chat.chat_text(""),
        "the text does not reach the model: the prompt around it is empty",
    ),
}


@dataclasses.dataclass(frozen=True)
class CheckVectors:
    """The content of a file of check vectors.

    Attributes:
      items: to embed.
      vectors: float32 [n, D], L2-normalised, of `items`.
      mistakes: of the first item, a text.
    """

    items: tuple[CheckItem, ...]
    vectors: np.ndarray
    mistakes: tuple[Mistake, ...]


def check_items(crop_size: int) -> tuple[CheckItem, ...]:
    """The items of every model.

    Args:
      crop_size: pixels of a crop's side.

    Returns:
      Texts, and drawn images with and without text.
    """
    whole = _png(_drawing(crop_size, crop_size))
    wide = _png(_drawing(crop_size * 5 // 4, crop_size * 7 // 8))
    question = "Represent the given image with the following question: What is in the image"
    return (
        CheckItem("text", "A cat and a dog"),
        CheckItem(
            "text with an instruction",
            "Find me an everyday image that matches the given caption: A cat and a dog.",
        ),
        CheckItem("long text, other scripts", "Größe, 大きさ, размер: \n" * 6),
        CheckItem("image of a crop's size", image=whole),
        CheckItem("image and text", question, image=whole),
        CheckItem("image that is resized", "Represent the given image.", image=wide, resized=True),
    )


def _drawing(width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: discs and a ramp, which compress well."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 96)], axis=-1)
    for number, colour in enumerate([(220, 40, 40), (40, 180, 60), (240, 240, 240)]):
        centre_x, centre_y = width * (2 + 3 * number) // 10, height * (3 + 2 * number) // 10
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < (min(width, height) // 6) ** 2
        picture[inside] = colour
    return picture.astype(np.uint8)


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return file.getvalue()


def make(model: str | os.PathLike) -> CheckVectors:
    """Embed the items as the export of a model does: in float32, with weights of the export's precision.

    Args:
      model: a model directory or a training run.

    Returns:
      The items with their vectors, and those of mistakes.
    """
    # Small batches: the items are few, and the model may only just fit into memory.
    embedder = Embedder.from_pretrained(model, dtype="float32", tokens_per_batch=_TOKENS)
    # A run's weights are float32, its export has those of the checkpoint that it began from.
    stored, written = model_dir.open_params(model), ExportSource(model).dtypes
    params = sharding.flatten(embedder.params)
    embedder.params = None  # each array is freed when its cast takes its place
    for path in params:
        if stored[path].dtype != written[path]:
            params[path] = params[path].astype(written[path]).astype(np.float32)
    embedder.params = sharding.unflatten(params)
    items = check_items(embedder.config.vision.image_size)
    text = items[0].text
    prompts = [wrong(chat.chat_text(text), text) for wrong, _ in MISTAKES.values()]
    return CheckVectors(
        items=items,
        vectors=embedder.encode([item.item() for item in items]),
        mistakes=tuple(map(Mistake, MISTAKES, _embed_prompts(embedder, prompts))),
    )


def _embed_prompts(embedder: Embedder, prompts: Sequence[str]) -> np.ndarray:
    """float32 [n, D], of texts that are the whole prompt."""
    crop = embedder.config.input_spec.crop
    none = np.zeros((0, crop.size, crop.size, 3), np.uint8)
    tokenizer = embedder.builder.tokenizer
    waiting = {
        index: TokenSequence(
            np.asarray(tokenizer.encode(prompt, add_special_tokens=False), np.int32),
            none,
            taps.newlines(0),
            name=prompt,
        )
        for index, prompt in enumerate(prompts)
    }
    found = np.zeros((len(prompts), embedder.config.text.hidden_size), np.float32)
    while waiting:
        names = list(waiting)
        batch, slots = embedder.pack([waiting[name] for name in names])
        vectors = np.asarray(embedder.forward(batch))
        for place in np.argwhere(slots >= 0):
            index = names[slots[tuple(place)]]
            found[index] = vectors[tuple(place)]
            del waiting[index]
    return found


def write(directory: Path, check: CheckVectors) -> None:
    """Write the file of check vectors.

    Args:
      directory: the export.
      check: what it holds.
    """
    values = {
        "format": FORMAT,
        "embeddings": "base64 of little-endian float32",
        "dimensions": int(check.vectors.shape[1]),
        "items": [
            {
                "name": item.name,
                "text": item.text,
                **({"image": item.data_uri, "resized": item.resized} if item.image else {}),
                "embedding": _encoded(vector),
            }
            for item, vector in zip(check.items, check.vectors, strict=True)
        ],
        "mistakes": [
            {"name": mistake.name, "embedding": _encoded(mistake.vector)}
            for mistake in check.mistakes
        ],
    }
    files.write_text(
        directory / CHECK_VECTORS, json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    )


def _encoded(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def read(export: Path) -> CheckVectors:
    """Reads the check vectors of an export.

    Args:
      export: its directory.

    Returns:
      Its items with their vectors.

    Raises:
      CheckpointError: there are none, or the file is damaged or of another version.
    """
    path = export / CHECK_VECTORS
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file. Exports in the OneVision layout have it unless nothing has changed; make it: "
            f"python tools/check_export.py --model {export} --write"
        )
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format is {values.get('format')!r:.60}; this version reads {FORMAT}. Make it again: --write"
        )
    try:
        width = values["dimensions"]
        entries = [(_item(entry), _decoded(entry["embedding"], width)) for entry in values["items"]]
        mistakes = tuple(
            Mistake(str(entry["name"]), _decoded(entry["embedding"], width))
            for entry in values["mistakes"]
        )
        vectors = np.stack([vector for _, vector in entries])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({type(error).__name__}: {error}). Make it again: --write"
        ) from error
    return CheckVectors(tuple(item for item, _ in entries), vectors, mistakes)


def _item(entry: dict[str, Any]) -> CheckItem:
    item = CheckItem(
        str(entry["name"]),
        str(entry["text"]),
        _decoded_image(entry.get("image")),
        bool(entry.get("resized")),
    )
    if not item.text and item.image is None:
        raise ValueError(f"{item.name} has neither text nor image")
    return item


def _decoded(text: str, width: int) -> np.ndarray:
    vector = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    if vector.shape != (width,) or not np.isfinite(vector).all():
        raise ValueError(
            f"an embedding has the shape {vector.shape}; expected {width} finite numbers"
        )
    return vector


def _decoded_image(uri: str | None) -> bytes | None:
    if uri is None:
        return None
    if not uri.startswith(_PNG):
        raise ValueError(f"an image begins with {uri[:30]!r}; expected {_PNG}")
    return base64.b64decode(uri.removeprefix(_PNG), validate=True)


class Row(NamedTuple):
    """How a vector compares with the one that is expected.

    Attributes:
      form: the way in which the item was given, "" if there is one only.
      item: what was embedded.
      cosine: with the expected vector.
      difference: the largest of one number, both vectors normalised.
      length: of the vector as it came.
      verdict: "same", "close" or "differs"; "scaled" if only the length is wrong; "refused" for an item without a
        vector.
      reason: for "differs", a key of MISTAKES if it is one; for "refused", what was said.
    """

    form: str
    item: CheckItem
    cosine: float
    difference: float
    length: float
    verdict: str
    reason: str = ""


def refused(form: str, item: CheckItem, reason: str) -> Row:
    """The row of an item for which there is no vector.

    Args:
      form, item, reason: as in `Row`.

    Returns:
      The row.
    """
    return Row(form, item, np.nan, np.nan, np.nan, "refused", reason)


def compare(check: CheckVectors, index: int, found: np.ndarray, form: str = "") -> Row:
    """Compare a vector with that of an item.

    Args:
      check: what is expected.
      index: of the item.
      found: float [D], or the first numbers of it.
      form: as in `Row`.

    Returns:
      The row.
    """
    found = np.asarray(found, np.float64)
    item, width = check.items[index], check.vectors.shape[1]
    if found.ndim != 1 or not 0 < len(found) <= width:
        return refused(
            form, item, f"the vector has the shape {found.shape}; expected {width} numbers"
        )
    length = float(np.linalg.norm(found))
    if not np.isfinite(length) or length == 0:
        return refused(form, item, "the vector is zero, or has numbers that are not finite")

    def against(expected: np.ndarray) -> tuple[float, float]:
        expected = expected[: len(found)].astype(np.float64)
        expected /= np.linalg.norm(expected)
        return float(expected @ found / length), float(np.abs(found / length - expected).max())

    cosine, difference = against(check.vectors[index])
    verdict, reason = (
        "same" if difference <= SAME else "close" if cosine >= CLOSE else "differs",
        "",
    )
    if index == 0:
        mistaken = {mistake.name: against(mistake.vector)[0] for mistake in check.mistakes}
        nearest = max(mistaken, key=mistaken.__getitem__, default="")
        # A mistake may change the vector by less than half precision does.
        if verdict != "same" and mistaken and mistaken[nearest] > max(cosine, _RECOGNISED):
            verdict, reason = "differs", nearest
    if verdict != "differs" and abs(length - 1) > _LENGTH:
        verdict = "scaled"
    return Row(form, item, cosine, difference, length, verdict, reason)


def table(rows: Sequence[Row]) -> str:
    """The rows for people.

    Args:
      rows: any.

    Returns:
      Lines, without a newline at the end.
    """
    forms = any(row.form for row in rows)
    heading = ["item", *(["sent as"] if forms else []), "cosine", "difference", "length", ""]
    lines = [heading]
    for row in rows:
        numbers = (
            ["-"] * 3
            if row.verdict == "refused"
            else [f"{row.cosine:.6f}", f"{row.difference:.1e}", f"{row.length:.4f}"]
        )
        said = f"differs: {row.reason}" if row.reason in MISTAKES else row.verdict
        lines.append([row.item.name, *([row.form] if forms else []), *numbers, said])
    return align(lines, left=2 if forms else 1)


def explain(rows: Sequence[Row]) -> list[str]:
    """What the rows mean, in sentences.

    Args:
      rows: of one model.

    Returns:
      One sentence or more a finding; a single one if all agree.
    """
    said: list[str] = []
    for form in dict.fromkeys(row.form for row in rows):
        said += [
            f"{form}: {line}" if form else line
            for line in _explain_form([r for r in rows if r.form == form])
        ]
    return said


def _explain_form(rows: list[Row]) -> list[str]:
    wrong = [row for row in rows if row.verdict == "differs"]
    given = [row for row in rows if row.verdict != "refused"]
    said = [
        f"No vector for {row.item.name}: {row.reason}" for row in rows if row.verdict == "refused"
    ]
    if any(abs(row.length - 1) > _LENGTH for row in given):
        said.append(
            "The vectors are not normalised. Divide each by its length before you take inner products."
        )
    texts = [row for row in wrong if row.item.image is None]
    if texts:
        named = [MISTAKES[row.reason][1] for row in texts if row.reason in MISTAKES]
        said.append(
            f"The texts differ: {named[0]}."
            if named
            else "The texts differ, and not by a mistake that this check knows. Usual reasons: the mean or the first "
            "token is pooled, not the last one; padding is taken for the last token; a prompt of the library's own "
            "stands in front of the text; the tokenizer or the weights are another model's."
        )
    elif [row for row in wrong if not row.item.resized]:
        said.append(
            "The texts agree, images do not. Usual reasons: the image does not reach the model; it stands behind the "
            "text; its crops are laid out in another way (image_grid_pinpoints, vision_aspect_ratio); its pixels are "
            "normalised with another mean."
        )
    elif wrong:
        said.append(
            "Only the image that is resized differs: it is cut into crops in another way, or resized with another "
            "filter."
        )
    if not wrong and given and given == rows:
        close = [row for row in given if row.verdict == "close"]
        if not close:
            said.append("All vectors agree to the precision of float32.")
        elif all(row.item.resized for row in close):
            said.append(
                "All vectors agree; images are resized by another library, which rounds in another way."
            )
        else:
            said.append("All vectors agree as far as half precision allows.")
    return said
