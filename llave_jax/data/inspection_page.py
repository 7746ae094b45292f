"""A page of sample pairs as the model will see them: chat text, tiles, base crop, token counts.

It is one self-contained HTML file. Figures by subset are `inspection.py`.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from llave_jax.common.files import write_text
from llave_jax.data.sources import PairSource
from llave_jax.inputs.anyres import tile_grid
from llave_jax.inputs.images import image_size
from llave_jax.inputs.item import Item
from llave_jax.inputs.sequence import VISUAL_SLOT, SequenceBuilder, TokenSequence

_THUMBNAIL = 300
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
  color: #1c1e21; background: #fafafa; }
pre { background: #fff; border: 1px solid #ddd; padding: 1em; overflow-x: auto; font-size: 12px; }
.pair { display: flex; flex-wrap: wrap; gap: 1em; margin: 0 0 1.2em; }
.side { flex: 1 1 320px; background: #fff; border: 1px solid #ddd; border-radius: 6px;
  padding: .8em 1em; min-width: 0; }
.side h4 { margin: 0 0 .5em; font-size: 13px; color: #555; }
.chat { white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.5 ui-monospace, monospace; }
.special { color: #999; }
.visual { background: #dbeafe; color: #1e40af; border-radius: 3px; padding: 0 .3em; }
.crops { display: flex; flex-wrap: wrap; gap: .6em; margin-top: .6em; align-items: flex-end; }
.crops figure { margin: 0; font-size: 11px; color: #666; }
.crops img { display: block; max-width: 100%; border: 1px solid #ccc; }
.error { color: #b00020; }
"""


def write_page(
    path: Path, report: str, source: PairSource, builder: SequenceBuilder, samples: int
) -> None:
    """Writes the page: the printed report, then sample pairs of each subset.

    Args:
      path: of the page.
      report: what is printed.
      source: of the pairs.
      builder: of the model's sequences.
      samples: pairs of each subset, evenly spread over it.
    """
    sections = []
    for subset, indices in source.subsets.items():
        chosen = indices[:: max(1, len(indices) // max(samples, 1))][:samples]
        pairs = "\n".join(_pair(source, index, builder) for index in chosen)
        sections.append(f"<h2>{html.escape(subset)}</h2>\n{pairs}")
    page = (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>Training data</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Training data</h1>\n<pre>{html.escape(report)}</pre>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    write_text(path, page)


def _pair(source: PairSource, index: int, builder: SequenceBuilder) -> str:
    name = html.escape(source.pair_id(index))
    try:
        pair = source[index]
        others = [source.draw(index, n, 0).target for n in range(1, pair.num_targets)]
        items = [("query", pair.query), ("target", pair.target)]
        items += [("hard negative", negative) for negative in pair.negatives]
        items += [("another target", target) for target in others]
        sides = [
            _side(f"{name} {side}{_score(score)}", item, builder)
            for (side, item), score in itertools.zip_longest(items, (None, *pair.scores))
        ]
    except ValueError as error:  # what training would raise or skip is shown in its place
        sides = [f"<div class='side error'>{name}: {html.escape(str(error))}</div>"]
    return f"<div class='pair'>{''.join(sides)}</div>"


def _score(score: float | None) -> str:
    return "" if score is None else f" (score {score:.4g})"


def _side(title: str, item: Item, builder: SequenceBuilder) -> str:
    sequence = builder(item)
    figures = _figures(item, sequence, builder)
    crops = f", {len(sequence.crops)} crops" if len(sequence.crops) else ""
    return (
        f"<div class='side'><h4>{title}: {len(sequence)} tokens{crops}</h4>"
        f"<div class='chat'>{_chat(sequence, builder)}</div>{figures}</div>"
    )


def _chat(sequence: TokenSequence, builder: SequenceBuilder) -> str:
    """The token ids as text. A mark stands for visual tokens."""
    special = set(builder.tokenizer.all_special_tokens)
    parts = []
    for visual, group in itertools.groupby(sequence.tokens.tolist(), lambda t: t == VISUAL_SLOT):
        ids = list(group)
        if visual:
            parts.append(f"<span class='visual'>{len(ids)} visual tokens</span>")
            continue
        text = html.escape(builder.tokenizer.decode(ids))
        for token in map(html.escape, special):
            text = text.replace(token, f"<span class='special'>{token}</span>")
        parts.append(text)
    return "".join(parts)


def _figures(item: Item, sequence: TokenSequence, builder: SequenceBuilder) -> str:
    """Two figures for each image: its tiles, put together, with the cuts drawn in; and its base crop."""
    config, crop = builder.spec.config, builder.spec.crop
    figures, first = [], 0
    for image in item.images:
        if image is None:
            if first in sequence.zero_crops:
                grey = PIL.Image.new("RGB", (crop.size, crop.size), (128, 128, 128))
                figures.append(_figure(grey, "zero picture: a marker without an image"))
            first += 1
            continue
        width, height = image_size(image, item.name)
        rows, columns = tile_grid(width, height, config, crop)
        tiles = sequence.crops[first + 1 : first + 1 + rows * columns]
        # A model without tiles has none to show; a cut sequence has lost its last crops.
        if rows and len(tiles) == rows * columns:
            figures.append(
                _figure(
                    _mosaic(tiles, rows, columns), f"{width}x{height} on {rows}x{columns} tiles"
                )
            )
        figures += [
            _figure(PIL.Image.fromarray(c), "base crop") for c in sequence.crops[first:][:1]
        ]
        first += 1 + rows * columns
    return f"<div class='crops'>{''.join(figures)}</div>" if figures else ""


def _mosaic(tiles: np.ndarray, rows: int, columns: int) -> PIL.Image.Image:
    size = tiles.shape[1]
    grid = tiles.reshape(rows, columns, size, size, 3).swapaxes(1, 2)
    image = PIL.Image.fromarray(grid.reshape(rows * size, columns * size, 3))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    draw = PIL.ImageDraw.Draw(image)
    for row in range(1, rows):
        draw.line([(0, y := row * image.height // rows), (image.width, y)], "red", 2)
    for column in range(1, columns):
        draw.line([(x := column * image.width // columns, 0), (x, image.height)], "red", 2)
    return image


def _figure(image: PIL.Image.Image, caption: str) -> str:
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(caption)
    return f"<figure><img alt='{caption}' src='data:image/jpeg;base64,{data}'>{caption}</figure>"
