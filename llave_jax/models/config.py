"""The configuration of a LLaVE model: sizes of its two towers, and how its inputs are laid out.

The values come from a checkpoint's config.json (`llave_jax.weights`) or from a preset here, never from
a model's name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llave_jax.common.ranges import ConfigError, check_real, check_whole
from llave_jax.inputs.config import InputConfig, InputSpec, grid_pinpoints
from llave_jax.inputs.crops import CropGeometry

# What a size may be: far beyond any model of this kind, and far below what would exhaust memory or time. A
# config.json with other numbers is broken, or made to do harm.
MAX_WIDTH = 65_536
MAX_MLP_WIDTH = 1 << 20
MAX_LAYERS = 1000
MAX_VOCABULARY = 1 << 24
MAX_IMAGE_SIZE = 4096
MAX_PATCHES_PER_SIDE = 256
# Tiles of one canvas. The checkpoints of LLaVA-OneVision have up to 6 x 6.
MAX_TILES = 400


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower.

    Attributes:
      hidden_size: width.
      num_layers: layers that run. LLaVE drops the last one of the original tower.
      num_heads: attention heads.
      intermediate_size: width of the MLP.
      image_size: pixels of a crop's side.
      patch_size: pixels of a patch's side.
      layer_norm_eps: added to the variance.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        _check_tower(self)
        check_whole("image_size", self.image_size, 1, MAX_IMAGE_SIZE)
        check_whole("patch_size", self.patch_size, 1, self.image_size)
        if self.crop.patches_per_side > MAX_PATCHES_PER_SIDE:
            raise ConfigError(
                "patch_size",
                f"is {self.patch_size}: {self.crop.patches_per_side} patches along the image's side; expected at most "
                f"{MAX_PATCHES_PER_SIDE}",
            )
        check_real("layer_norm_eps", self.layer_norm_eps, 0, 0.1)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                "hidden_size", f"{self.hidden_size} is not a multiple of {self.num_heads} heads"
            )

    @property
    def crop(self) -> CropGeometry:
        """Sizes of crops and patches: all that `llave_jax.inputs` must know of the tower."""
        return CropGeometry(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of a crop: the tower's sequence length."""
        return self.crop.num_patches


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen2 language model.

    Attributes:
      hidden_size: width, and so the size of an embedding.
      num_layers: transformer layers.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      intermediate_size: width of the MLP.
      vocab_size: rows of the token embedding.
      rope_theta: base of the rotary wavelengths.
      rms_norm_eps: added to the mean square.
      tie_word_embeddings: whether the checkpoint's LM head is the token embedding.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    def __post_init__(self):
        _check_tower(self)
        check_whole("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        check_whole("vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        check_real("rope_theta", self.rope_theta, 1, 1e12)
        check_real("rms_norm_eps", self.rms_norm_eps, 0, 0.1)
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(
                "tie_word_embeddings",
                f"is {self.tie_word_embeddings!r:.60}; expected true or false",
            )
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "hidden_size",
                f"{self.hidden_size}, {self.num_heads} query heads and {self.num_kv_heads} key and value heads do "
                "not divide one another",
            )

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_heads


def _check_tower(config: VisionConfig | TextConfig) -> None:
    """The fields that both towers have."""
    check_whole("hidden_size", config.hidden_size, 1, MAX_WIDTH)
    check_whole("num_layers", config.num_layers, 1, MAX_LAYERS)
    check_whole("num_heads", config.num_heads, 1, MAX_WIDTH)
    check_whole("intermediate_size", config.intermediate_size, 1, MAX_MLP_WIDTH)


@dataclasses.dataclass(frozen=True)
class LlaveConfig:
    """A model.

    Attributes:
      vision: its vision tower.
      text: its language model.
      inputs: how its inputs are laid out.
    """

    vision: VisionConfig
    text: TextConfig
    inputs: InputConfig

    @property
    def input_spec(self) -> InputSpec:
        """What `llave_jax.inputs` must know of the model."""
        return InputSpec(self.inputs, self.vision.crop, self.text.vocab_size)

    def check(self) -> None:
        """Refuses parts that do not fit together. What reads a model from a file calls it.

        Raises:
          ConfigError: heads of odd size; canvases that are not made of whole tiles, or of too many.
        """
        if self.text.head_dim % 2:
            raise ConfigError(
                "hidden_size",
                f"{self.text.hidden_size} makes heads of {self.text.head_dim}; rotary embeddings need an even size",
            )
        tile = self.vision.image_size
        for height, width in self.inputs.pinpoints:
            if height % tile or width % tile:
                raise ConfigError(
                    "image_grid_pinpoints",
                    f"has {height} x {width}; expected multiples of the tower's image size, {tile}",
                )
            if (height // tile) * (width // tile) > MAX_TILES:
                raise ConfigError(
                    "image_grid_pinpoints",
                    f"has {height} x {width}; expected at most {MAX_TILES} tiles of {tile} x {tile}",
                )

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of all values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlaveConfig:
        """The inverse of `to_dict`, also after JSON.

        Args:
          values: what `to_dict` gave; tuples may have become lists.

        Returns:
          The configuration.

        Raises:
          ConfigError: a value is missing, unknown or not allowed.
        """
        _check_keys("the configuration", values, cls)
        parts = {"vision": VisionConfig, "text": TextConfig, "inputs": InputConfig}
        for key, part in parts.items():
            _check_keys(key, values[key], part)
        pinpoints = values["inputs"]["pinpoints"]
        if not isinstance(pinpoints, list | tuple) or not all(
            isinstance(pair, list | tuple) for pair in pinpoints
        ):
            raise ConfigError("pinpoints", f"is {pinpoints!r:.60}; expected pairs of pixels")
        inputs = {**values["inputs"], "pinpoints": tuple(map(tuple, pinpoints))}
        config = cls(
            vision=VisionConfig(**values["vision"]),
            text=TextConfig(**values["text"]),
            inputs=InputConfig(**inputs),
        )
        config.check()
        return config


def _check_keys(name: str, values: Any, kind: Any) -> None:
    """Refuses what is not an object with the fields of a class."""
    if not isinstance(values, dict):
        raise ConfigError(name, f"is {values!r:.60}; expected an object")
    fields = {
        field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)
    }
    if missing := [key for key, needed in fields.items() if needed and key not in values]:
        raise ConfigError(name, f"lacks {', '.join(missing)}")
    if unknown := [key for key in values if key not in fields]:
        raise ConfigError(name, f"has the unknown field {unknown[0]!r:.60}")


SIGLIP_SO400M = VisionConfig(
    hidden_size=1152,
    num_layers=26,
    num_heads=16,
    intermediate_size=4304,
    image_size=384,
    patch_size=14,
)


def _released(text: TextConfig) -> LlaveConfig:
    inputs = InputConfig(pinpoints=grid_pinpoints(384, 2, 2))
    return LlaveConfig(vision=SIGLIP_SO400M, text=text, inputs=inputs)


PRESETS: dict[str, LlaveConfig] = {
    "llave-0.5b": _released(
        TextConfig(
            hidden_size=896,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            intermediate_size=4864,
            vocab_size=151_936,
        )
    ),
    "llave-2b": _released(
        TextConfig(
            hidden_size=1536,
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            intermediate_size=8960,
            vocab_size=151_936,
        )
    ),
    "llave-7b": _released(
        TextConfig(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            intermediate_size=18_944,
            vocab_size=152_064,
            tie_word_embeddings=False,
        )
    ),
    # Small enough to train from scratch on a laptop: the model of configs/quickstart.py.
    "tiny": LlaveConfig(
        vision=VisionConfig(
            hidden_size=96,
            num_layers=3,
            num_heads=3,
            intermediate_size=288,
            image_size=24,
            patch_size=12,
        ),
        text=TextConfig(
            hidden_size=96,
            num_layers=3,
            num_heads=3,
            num_kv_heads=1,
            intermediate_size=288,
            vocab_size=512,
            rope_theta=10_000.0,
        ),
        inputs=InputConfig(pinpoints=grid_pinpoints(24, 2, 2), max_text_length=128, max_length=128),
    ),
}
