"""The one table of tensor names: Hugging Face names and shapes to ours, and back.

A rule names a tensor in both worlds; what differs between the two Hugging Face layouts are only
the prefixes. Tensors without a path of ours are carried: the embedding model does not use them,
a Hugging Face checkpoint does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from llave_jax.models.config import LlaveConfig

# The prefixes of each layout. Where several are in use, the first is the one we write.
#   llave: the authors' code (LlavaQwenForCausalLM).
#   onevision: transformers' LlavaOnevisionForConditionalGeneration. Checkpoints on the hub and
#     those saved by transformers 4 have the first form; transformers 5 drops the inner
#     `vision_model`; a bare state dict has everything below `model`.
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "llave": {
        "text": ("model",),
        "vision": ("model.vision_tower.vision_tower.vision_model",),
        "linear_1": ("model.mm_projector.0",),
        "linear_2": ("model.mm_projector.2",),
        "newline": ("model.image_newline",),
        "lm_head": ("lm_head",),
    },
    "onevision": {
        "text": ("language_model.model", "model.language_model"),
        "vision": (
            "vision_tower.vision_model",
            "vision_tower",
            "model.vision_tower.vision_model",
            "model.vision_tower",
        ),
        "linear_1": ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        "linear_2": ("multi_modal_projector.linear_2", "model.multi_modal_projector.linear_2"),
        "newline": ("image_newline", "model.image_newline"),
        "lm_head": ("language_model.lm_head", "lm_head"),
    },
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
      name: Hugging Face name; `{text}` and the like stand for a layout's prefix, `{n}` for the
        layer, which becomes the first axis of ours.
      path: ours, or None for a carried tensor.
      shape: ours without the layer axis, in the sizes of `sizes`. `a*b` is one axis there.
      transform: what turns their array into ours:
        "copy": the same elements in the same order; ours may split an axis `a*b` in two.
        "transpose": the two axes exchanged (a torch Linear is [out, in]), then as "copy".
        "patches": a convolution [out, channel, row, column] becomes a matrix
          [row * column * channel, out].
    """

    name: str
    path: str | None
    shape: str
    transform: str = "copy"

    @property
    def stacked(self) -> bool:
        return "{n}" in self.name

    @property
    def tower(self) -> str:
        return "vision" if "{vision}" in self.name else "text"


def _linear(name: str, path: str | None, kernel: str, *, bias: bool = True) -> list[Rule]:
    """A torch Linear: weight and bias; `kernel` is the shape of ours, "in out"."""
    rules = [Rule(f"{name}.weight", path and f"{path}/kernel", kernel, "transpose")]
    if bias:
        rules.append(Rule(f"{name}.bias", path and f"{path}/bias", kernel.split()[1]))
    return rules


def _layer_norm(name: str, path: str | None) -> list[Rule]:
    return [
        Rule(f"{name}.weight", path and f"{path}/scale", "v_width"),
        Rule(f"{name}.bias", path and f"{path}/bias", "v_width"),
    ]


_TEXT_LAYER, _TEXT = "{text}.layers.{n}", "language_model/layers"
_VISION_LAYER, _VISION = "{vision}.encoder.layers.{n}", "vision_tower/layers"
_HEAD = "{vision}.head"

RULES: tuple[Rule, ...] = (
    # Qwen2
    Rule("{text}.embed_tokens.weight", "language_model/embed_tokens/embedding", "vocab width"),
    Rule(f"{_TEXT_LAYER}.input_layernorm.weight", f"{_TEXT}/input_layernorm/scale", "width"),
    *_linear(f"{_TEXT_LAYER}.self_attn.q_proj", f"{_TEXT}/self_attn/q_proj", "width heads*head"),
    *_linear(f"{_TEXT_LAYER}.self_attn.k_proj", f"{_TEXT}/self_attn/k_proj", "width kv*head"),
    *_linear(f"{_TEXT_LAYER}.self_attn.v_proj", f"{_TEXT}/self_attn/v_proj", "width kv*head"),
    *_linear(
        f"{_TEXT_LAYER}.self_attn.o_proj",
        f"{_TEXT}/self_attn/o_proj",
        "heads*head width",
        bias=False,
    ),
    Rule(
        f"{_TEXT_LAYER}.post_attention_layernorm.weight",
        f"{_TEXT}/post_attention_layernorm/scale",
        "width",
    ),
    *_linear(f"{_TEXT_LAYER}.mlp.gate_proj", f"{_TEXT}/mlp/gate_proj", "width mlp", bias=False),
    *_linear(f"{_TEXT_LAYER}.mlp.up_proj", f"{_TEXT}/mlp/up_proj", "width mlp", bias=False),
    *_linear(f"{_TEXT_LAYER}.mlp.down_proj", f"{_TEXT}/mlp/down_proj", "mlp width", bias=False),
    Rule("{text}.norm.weight", "language_model/norm/scale", "width"),
    # Projector and newline
    *_linear("{linear_1}", "projector/linear_1", "v_width width"),
    *_linear("{linear_2}", "projector/linear_2", "width width"),
    Rule("{newline}", "image_newline", "width"),
    # SigLIP
    Rule(
        "{vision}.embeddings.patch_embedding.weight",
        "vision_tower/patch_embedding/kernel",
        "patch*patch*channels v_width",
        "patches",
    ),
    Rule(
        "{vision}.embeddings.patch_embedding.bias", "vision_tower/patch_embedding/bias", "v_width"
    ),
    Rule(
        "{vision}.embeddings.position_embedding.weight",
        "vision_tower/position_embedding",
        "positions v_width",
    ),
    *_layer_norm(f"{_VISION_LAYER}.layer_norm1", f"{_VISION}/layer_norm1"),
    *_linear(
        f"{_VISION_LAYER}.self_attn.q_proj", f"{_VISION}/self_attn/q_proj", "v_width v_heads*v_head"
    ),
    *_linear(
        f"{_VISION_LAYER}.self_attn.k_proj", f"{_VISION}/self_attn/k_proj", "v_width v_heads*v_head"
    ),
    *_linear(
        f"{_VISION_LAYER}.self_attn.v_proj", f"{_VISION}/self_attn/v_proj", "v_width v_heads*v_head"
    ),
    *_linear(
        f"{_VISION_LAYER}.self_attn.out_proj",
        f"{_VISION}/self_attn/out_proj",
        "v_heads*v_head v_width",
    ),
    *_layer_norm(f"{_VISION_LAYER}.layer_norm2", f"{_VISION}/layer_norm2"),
    *_linear(f"{_VISION_LAYER}.mlp.fc1", f"{_VISION}/mlp/fc1", "v_width v_mlp"),
    *_linear(f"{_VISION_LAYER}.mlp.fc2", f"{_VISION}/mlp/fc2", "v_mlp v_width"),
    # Carried
    Rule("{lm_head}.weight", None, "vocab width"),
    *_layer_norm("{vision}.post_layernorm", None),
    Rule(f"{_HEAD}.probe", None, "1 1 v_width"),
    Rule(f"{_HEAD}.attention.in_proj_weight", None, "3*v_width v_width"),
    Rule(f"{_HEAD}.attention.in_proj_bias", None, "3*v_width"),
    *_linear(f"{_HEAD}.attention.out_proj", None, "v_width v_width"),
    *_layer_norm(f"{_HEAD}.layernorm", None),
    *_linear(f"{_HEAD}.mlp.fc1", None, "v_width v_mlp"),
    *_linear(f"{_HEAD}.mlp.fc2", None, "v_mlp v_width"),
)


def _rule(name: str) -> Rule:
    return next(rule for rule in RULES if rule.name == name)


LM_HEAD = _rule("{lm_head}.weight")
EMBEDDING = _rule("{text}.embed_tokens.weight")
PATCH_EMBEDDING = _rule("{vision}.embeddings.patch_embedding.weight")
POSITION_EMBEDDING = _rule("{vision}.embeddings.position_embedding.weight")
VISION_FC1 = _rule(f"{_VISION_LAYER}.mlp.fc1.weight")
POST_LAYERNORM = tuple(rule for rule in RULES if "{vision}.post_layernorm" in rule.name)


@dataclasses.dataclass(frozen=True)
class Match:
    """What a Hugging Face name stands for: a rule, and the layer if the rule has one."""

    rule: Rule
    layer: int | None = None


@functools.cache
def _patterns(layout: str) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    def pattern(rule: Rule) -> re.Pattern[str]:
        text = re.escape(rule.name).replace(r"\{n\}", r"(?P<layer>0|[1-9]\d*)")
        for key, prefixes in LAYOUTS[layout].items():
            options = "|".join(re.escape(prefix) for prefix in prefixes)
            text = text.replace(rf"\{{{key}\}}", f"(?:{options})")
        return re.compile(text)

    return tuple((pattern(rule), rule) for rule in RULES)


def match(name: str, layout: str) -> Match | None:
    """Which row of the table a Hugging Face tensor name is; None if it is none."""
    found = []
    for pattern, rule in _patterns(layout):
        if hit := pattern.fullmatch(name):
            layer = hit.groupdict().get("layer")
            found.append(Match(rule, None if layer is None else int(layer)))
    if len(found) > 1:
        rows = ", ".join(hit.rule.name for hit in found)
        raise ValueError(f"tensor name {name} matches several rows of the name table: {rows}")
    return found[0] if found else None


def layout_of(tensor_names: Iterable[str]) -> str | None:
    """The layout that knows most of these tensor names; None if neither knows any."""
    known = dict.fromkeys(LAYOUTS, 0)
    for name in tensor_names:
        for layout in LAYOUTS:
            known[layout] += match(name, layout) is not None
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def hf_name(hit: Match, layout: str) -> str:
    """The name we write for a row of the table in a layout."""
    prefixes = {key: options[0] for key, options in LAYOUTS[layout].items()}
    return hit.rule.name.format(n=hit.layer, **prefixes)


def sizes(config: LlaveConfig) -> dict[str, int]:
    """The words of `Rule.shape` for one model."""
    text, vision = config.text, config.vision
    return {
        "vocab": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_heads,
        "kv": text.num_kv_heads,
        "head": text.head_dim,
        "mlp": text.intermediate_size,
        "v_width": vision.hidden_size,
        "v_heads": vision.num_heads,
        "v_head": vision.hidden_size // vision.num_heads,
        "v_mlp": vision.intermediate_size,
        "patch": vision.patch_size,
        "channels": 3,
        "positions": vision.num_patches,
        "1": 1,
        "3": 3,
    }


def _axes(rule: Rule, config: LlaveConfig) -> list[tuple[int, ...]]:
    known = sizes(config)
    return [tuple(known[word] for word in axis.split("*")) for axis in rule.shape.split()]


def layer_shape(rule: Rule, config: LlaveConfig) -> tuple[int, ...]:
    """Our shape of a rule's tensor, without the layer axis."""
    axes = _axes(rule, config)
    if rule.transform == "patches":
        return tuple(math.prod(axis) for axis in axes)
    return tuple(size for axis in axes for size in axis)


def hf_shape(rule: Rule, config: LlaveConfig) -> tuple[int, ...]:
    """Their shape of a rule's tensor."""
    axes = _axes(rule, config)
    if rule.transform == "patches":
        (rows, columns, channels), (width,) = axes
        return (width, channels, rows, columns)
    merged = [math.prod(axis) for axis in axes]
    return tuple(reversed(merged)) if rule.transform == "transpose" else tuple(merged)


def num_layers(rule: Rule, config: LlaveConfig) -> int | None:
    """Length of the layer axis of a rule's tensor, None if it has none."""
    if not rule.stacked:
        return None
    return config.vision.num_layers if rule.tower == "vision" else config.text.num_layers


def parameter_shapes(config: LlaveConfig) -> dict[str, tuple[int, ...]]:
    """path -> shape of the whole parameter tree of a model."""
    shapes = {}
    for rule in RULES:
        if rule.path is not None:
            layers = num_layers(rule, config)
            shape = layer_shape(rule, config)
            shapes[rule.path] = shape if layers is None else (layers, *shape)
    return shapes


def parameter_matches(config: LlaveConfig) -> list[Match]:
    """All tensors a Hugging Face checkpoint needs for the parameter tree, in the table's order."""
    hits = []
    for rule in RULES:
        if rule.path is not None:
            layers = num_layers(rule, config)
            hits += [Match(rule)] if layers is None else [Match(rule, n) for n in range(layers)]
    return hits


def to_ours(rule: Rule, array: np.ndarray, config: LlaveConfig) -> np.ndarray:
    """Their array of one tensor -> ours, without the layer axis."""
    if rule.transform == "patches":
        array = array.transpose(2, 3, 1, 0)
    elif rule.transform == "transpose":
        array = array.T
    return array.reshape(layer_shape(rule, config))


def to_hf(rule: Rule, array: np.ndarray, config: LlaveConfig) -> np.ndarray:
    """Our array of one tensor, without the layer axis -> theirs."""
    shape = hf_shape(rule, config)
    if rule.transform == "patches":
        width, channels, rows, columns = shape
        return array.reshape(rows, columns, channels, width).transpose(3, 2, 0, 1)
    if rule.transform == "transpose":
        return array.reshape(shape[::-1]).T
    return array.reshape(shape)
