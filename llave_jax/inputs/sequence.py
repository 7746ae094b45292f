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
from llave_jax.inputs.config import InputSpec
from llave_jax.inputs.crops import resize_to_crop
from llave_jax.inputs.item import ImageLike, Item, VideoLike

# Stands in `TokenSequence.tokens` where a visual token goes.
VISUAL_SLOT = -1


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """One item, ready to pack.

    Attributes:
      tokens: int32 [T], token ids, VISUAL_SLOT where a visual token goes.
      crops: uint8 [C, size, size, 3].
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
    """What takes the place of one marker.

    Attributes:
      crops: uint8 [C, size, size, 3].
      taps: of its V visual tokens, over the patches of `crops`.
      is_zero: it is the zero picture, a single crop.
    """

    crops: np.ndarray
    taps: T.Taps
    is_zero: bool = False


class SequenceBuilder:
    """`builder(item) -> TokenSequence` for one model.

    An item that is too long is cut without a warning: whoever collects sequences gives it
    (`cuts.CutWarnings`). A builder never changes and can be pickled: every data worker has one.

    Args:
      tokenizer: a Hugging Face fast tokenizer that belongs to the model.
      spec: of the model.
    """

    def __init__(self, tokenizer: Any, spec: InputSpec):
        self.tokenizer = tokenizer
        self.spec = spec
        # Looked up once: the tokenizer computes it at every access, which is slow.
        self._pad_token_id = tokenizer.pad_token_id
        size = spec.crop.size
        self._no_crops = np.zeros((0, size, size, 3), np.uint8)

    def __call__(self, item: Item) -> TokenSequence:
        """Lays out an item. What is too long is cut at its end, and `num_cut` says how much.

        Args:
          item: its images and its video are read here.

        Returns:
          The sequence, of at most `max_length` tokens.

        Raises:
          ValueError: an image cannot be read, a marker is misplaced, or the text has a token that the
            model has no embedding for; it names the item.
        """
        config, crop = self.spec.config, self.spec.crop
        visuals = self._visuals(item)
        content = chat.place_markers(item.text, len(visuals), item.name)
        ids = chat.chat_ids(self.tokenizer, content)
        # A padding token that the text spells out is dropped, and only after the text is cut: the
        # authors' code finds padding by its id when it inserts images.
        is_token = ids != self._pad_token_id
        whole = np.count_nonzero(is_token) + sum(visual.taps.shape[0] - 1 for visual in visuals)
        ids = ids[: config.max_text_length][is_token[: config.max_text_length]]
        self._check_ids(ids, item.name)

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
                taps.append(_shift(visual.taps, num_crops * crop.num_patches))
                crops.append(visual.crops)
                if visual.is_zero:
                    zero_crops.append(num_crops)
                num_crops += len(visual.crops)
            tokens.append(piece)
        length = sum(map(len, tokens))
        sequence = TokenSequence(
            tokens=np.concatenate(tokens),
            crops=np.concatenate(crops) if crops else self._no_crops,
            taps=T.concatenate(taps) if taps else T.newlines(0),
            name=item.name,
            zero_crops=tuple(zero_crops),
            num_cut=int(whole) - min(length, config.max_length),
        )
        if length > config.max_length:
            sequence = _truncate(sequence, config.max_length, crop.num_patches)
        return sequence

    def _check_ids(self, ids: np.ndarray, name: str) -> None:
        """Raises ValueError for a token that has no embedding: it would make the result NaN."""
        unknown = ids[ids >= self.spec.vocab_size]
        if len(unknown):
            raise ValueError(
                f"{name or 'item'}: the text has the token {self.tokenizer.decode(unknown[:1])!r} "
                f"(id {unknown[0]}), but the model has embeddings for {self.spec.vocab_size} tokens "
                "only; take it out of the text, or use the tokenizer that belongs to the model"
            )

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
        image = images.load_image(source, name)
        taps = anyres.image_taps(*image.size, self.spec.config, self.spec.crop)
        return Visual(anyres.image_crops(image, self.spec.config, self.spec.crop), taps)

    def _zero_picture(self) -> Visual:
        crop = self.spec.crop
        crops = np.zeros((1, crop.size, crop.size, 3), np.uint8)
        return Visual(crops, anyres.single_crop_taps(crop), is_zero=True)

    def _video(self, source: VideoLike, name: str) -> Visual:
        config, crop = self.spec.config, self.spec.crop
        frames = video.load_frames(source, config, name)
        crops = np.stack([resize_to_crop(frame, crop.size) for frame in frames])
        return Visual(crops, video.video_taps(len(frames), config, crop))


def _split_at_markers(ids: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """The pieces of text between image tokens: their ids, and whether an image token comes before."""
    markers = np.flatnonzero(ids == chat.IMAGE_TOKEN)
    starts, ends = [0, *(markers + 1)], [*markers, len(ids)]
    return [
        (ids[start:end], number > 0)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _shift(taps: T.Taps, offset: int) -> T.Taps:
    """The same taps, `offset` patches further on; newlines stay newlines."""
    return T.Taps(np.where(taps.index == T.NEWLINE, T.NEWLINE, taps.index + offset), taps.weight)


def _truncate(sequence: TokenSequence, length: int, num_patches: int) -> TokenSequence:
    """The first `length` tokens, without the crops that none of them looks at."""
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
