"""From an item to the sequence the model reads: token ids, uint8 crops, visual taps.

Puts chat text, images and video together and cuts the result to the model's length. All layout is
decided here, on the host, in NumPy; how sequences share a batch is `packing.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from llave_jax.inputs import anyres, chat, images, video
from llave_jax.inputs import taps as T
from llave_jax.inputs.item import ImageLike, Item, VideoLike
from llave_jax.models.config import LlaveConfig

# Stands in `Sequence.tokens` where a visual token goes.
VISUAL_SLOT = -1


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One item, ready to pack.

    Attributes:
      tokens: int32 [T], token ids, VISUAL_SLOT where a visual token goes.
      crops: uint8 [C, S, S, 3].
      taps: of the V visual slots, in order: [V] tokens over the C crops' patches.
      name: where the item comes from, for messages.
      zero_crops: which crops are zero pictures. Normalisation gives them 0, which no uint8 pixel
        becomes; their pixels hold no meaning.
      num_cut: tokens that the model's limits of text and of length cut off the end.
    """

    tokens: np.ndarray
    crops: np.ndarray
    taps: T.Taps
    name: str = ""
    zero_crops: tuple[int, ...] = ()
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


class Visual(NamedTuple):
    """What takes one marker's place: `crops` uint8 [C, S, S, 3] and the taps over them, [V].

    `is_zero`: it is the zero picture, a single crop.
    """

    crops: np.ndarray
    taps: T.Taps
    is_zero: bool = False


class SequenceBuilder:
    """`builder(item) -> Sequence` for one model: its tokenizer, sizes and input settings.

    What is too long is cut without a warning: `cuts.CutWarnings` gives it. Picklable (data workers
    hold one each) and without state that changes.
    """

    def __init__(self, tokenizer: Any, config: LlaveConfig):
        self.tokenizer = tokenizer
        self.config = config
        # Kept, since the tokenizer takes long to say it.
        self._pad_token_id = tokenizer.pad_token_id
        size = config.vision.image_size
        self._no_crops = np.zeros((0, size, size, 3), np.uint8)

    def __call__(self, item: Item) -> Sequence:
        """What is too long is cut at its end, and `num_cut` says so.

        Raises:
          ValueError: an image cannot be read, or a marker is misplaced; it names the item.
        """
        inputs, vision = self.config.inputs, self.config.vision
        visuals = self._visuals(item)
        content = chat.place_markers(item.text, len(visuals), item.name)
        ids = chat.chat_ids(self.tokenizer, content)
        # A literal padding token in the text is dropped after the text is cut: the model takes padding
        # out by its id, as the authors' image path does.
        is_token = ids != self._pad_token_id
        whole = np.count_nonzero(is_token) + sum(visual.taps.shape[0] - 1 for visual in visuals)
        ids = ids[: inputs.max_text_length][is_token[: inputs.max_text_length]]

        tokens: list[np.ndarray] = []
        taps: list[T.Taps] = []
        crops: list[np.ndarray] = []
        zero_crops: list[int] = []
        num_crops = 0
        remaining = iter(visuals)
        for piece, follows_marker in _split_at_markers(ids) if visuals else [(ids, False)]:
            if follows_marker:
                visual = next(remaining)
                tokens.append(np.full(visual.taps.shape, VISUAL_SLOT, np.int32))
                taps.append(_shift(visual.taps, num_crops * vision.num_patches))
                crops.append(visual.crops)
                if visual.is_zero:
                    zero_crops.append(num_crops)
                num_crops += len(visual.crops)
            tokens.append(piece)
        length = sum(map(len, tokens))
        sequence = Sequence(
            tokens=np.concatenate(tokens),
            crops=np.concatenate(crops) if crops else self._no_crops,
            taps=T.concatenate(taps) if taps else T.newlines(0),
            name=item.name,
            zero_crops=tuple(zero_crops),
            num_cut=whole - min(length, inputs.max_length),
        )
        if length > inputs.max_length:
            sequence = _truncate(sequence, inputs.max_length, vision.num_patches)
        return sequence

    def _visuals(self, item: Item) -> list[Visual]:
        """The item's images, one for each marker, or its video."""
        if item.video is not None:
            if item.images:
                raise ValueError(f"{item.name or 'item'}: has both images and a video; give one")
            return [self._video(item.video, item.name)]
        return [
            self._zero_picture() if image is None else self._image(image, item.name)
            for image in item.images
        ]

    def _image(self, source: ImageLike, name: str) -> Visual:
        inputs, vision = self.config.inputs, self.config.vision
        image = images.load_image(source, name)
        taps = anyres.image_taps(*image.size, inputs, vision.image_size, vision.patches_per_side)
        return Visual(anyres.image_crops(image, inputs, vision.image_size), taps)

    def _zero_picture(self) -> Visual:
        vision = self.config.vision
        crops = np.zeros((1, vision.image_size, vision.image_size, 3), np.uint8)
        return Visual(crops, anyres.single_crop_taps(vision.patches_per_side), is_zero=True)

    def _video(self, source: VideoLike, name: str) -> Visual:
        inputs, vision = self.config.inputs, self.config.vision
        frames = video.load_frames(source, inputs, name)
        crops = np.stack([anyres.squash(frame, vision.image_size) for frame in frames])
        return Visual(crops, video.video_taps(len(frames), inputs, vision.patches_per_side))


def _split_at_markers(ids: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """Pieces of text between the image tokens, each with whether an image stands before it."""
    places = np.flatnonzero(ids == chat.IMAGE_TOKEN)
    pieces = [(ids[: places[0]] if len(places) else ids, False)]
    ends = [*places[1:], len(ids)]
    pieces += [(ids[p + 1 : end], True) for p, end in zip(places, ends, strict=False)]
    return pieces


def _shift(taps: T.Taps, offset: int) -> T.Taps:
    return T.Taps(np.where(taps.index == T.NEWLINE, T.NEWLINE, taps.index + offset), taps.weight)


def _truncate(sequence: Sequence, length: int, num_patches: int) -> Sequence:
    """Cut the tail, and the crops that no remaining token looks at."""
    tokens = sequence.tokens[:length]
    taps = sequence.taps[: np.count_nonzero(tokens == VISUAL_SLOT)]
    num_crops = int(taps.index.max(initial=T.NEWLINE) // num_patches) + 1
    return dataclasses.replace(
        sequence,
        tokens=tokens,
        taps=taps,
        crops=sequence.crops[:num_crops],
        zero_crops=tuple(crop for crop in sequence.zero_crops if crop < num_crops),
    )
