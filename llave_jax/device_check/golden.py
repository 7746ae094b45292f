"""A tiny LLaVE whose embeddings and training step are known: the whole program, on the mesh as it is.

Parameters and items come from a stream of bits that never changes; the numbers in `golden.json` were computed
from them in float32 on a CPU, with the code that agrees with the authors' (tests/test_golden.py). They are
recorded anew, after a change that is meant, by

    python -m llave_jax.device_check.golden llave_jax/device_check/golden.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.common.files import write_text
from llave_jax.device_check.report import Row
from llave_jax.embedding.embedding_step import build_embedding_step
from llave_jax.inputs.anyres import image_taps, num_crops
from llave_jax.inputs.batch import Budget, PackedBatch, stack_batches
from llave_jax.inputs.config import InputConfig, grid_pinpoints
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import VISUAL_SLOT, TokenSequence
from llave_jax.inputs.taps import newlines
from llave_jax.models.config import LlaveConfig, TextConfig, VisionConfig
from llave_jax.models.llave import Llave, param_shardings
from llave_jax.models.parameters import parameter_shapes
from llave_jax.parallel import sharding
from llave_jax.training import optim, train_step
from llave_jax.training.step_loss import LossConfig

# Heads of 64 and 72, two layers each, and keys that query heads share.
CONFIG = LlaveConfig(
    VisionConfig(144, 2, 2, 160, image_size=56, patch_size=14),
    TextConfig(128, 2, 2, 1, 256, vocab_size=256, rope_theta=10_000.0),
    InputConfig(pinpoints=grid_pinpoints(56, 2, 2), max_text_length=128, max_length=256),
)
PAIRS, MICRO_BATCHES, ROW_LENGTH, CROPS = 8, 2, 256, 5
# Width and height of the queries' pictures; None: a text.
PICTURES = ((56, 56), None, (112, 70), (40, 100), None, (112, 112), (56, 57), None)
LEARNING_RATE = 0.02
RECORDED = Path(__file__).with_name("golden.json")
# Another order of summation in float32 changes cosines by a few 1e-7, and relative errors of norms by less than
# this.
FLOAT32_BOUND = 1e-5
# bfloat16 may be off by this many times the largest error that it had on the CPU on which the numbers were
# recorded.
BFLOAT16_MARGIN = 4.0


class Stream:
    """Numbers that are the same with every version of every package."""

    def __init__(self, seed: int):
        self._bits = np.random.PCG64(seed)

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 numbers in [-1, 1)."""
        raw = self._bits.random_raw(math.prod(shape)) >> np.uint64(40)
        return (raw.astype(np.float64) / 2**23 - 1).astype(np.float32).reshape(shape)

    def integers(self, below: int, shape: tuple[int, ...]) -> np.ndarray:
        """Whole numbers from 0."""
        raw = self._bits.random_raw(math.prod(shape)) >> np.uint64(33)
        return (raw % np.uint64(below)).astype(np.int64).reshape(shape)


def make_params() -> dict[str, np.ndarray]:
    """Parameters by path."""
    stream, params = Stream(1), {}
    for path, shape in sorted(parameter_shapes(CONFIG).items()):
        values = stream.uniform(shape)
        if path.endswith("scale"):
            params[path] = 1 + values / 4
        else:
            params[path] = values * np.float32(0.15)
    return params


def make_batch(shards: int) -> tuple[PackedBatch, list[list[list[str]]]]:
    """All shards' batch, arrays [M, S, ...], and the numbers of the pairs [M][S][G]."""
    stream = Stream(2)
    pairs = [(_side(stream, i, PICTURES[i]), _side(stream, i + 3, None)) for i in range(PAIRS)]
    slots = -(-PAIRS // (shards * MICRO_BATCHES))
    budget = Budget(slots, ROW_LENGTH, slots * CROPS, slots)
    parts, numbers = [], []
    for part in range(MICRO_BATCHES):
        packer = Packer(budget, shards, CONFIG.vision.crop)
        for i in range(part, PAIRS, MICRO_BATCHES):
            if not packer.add(pairs[i], str(i), shard=i // MICRO_BATCHES % shards):
                raise AssertionError(f"pair {i} finds no room in {budget}")
        batch, ids = packer.emit()
        parts.append(batch)
        numbers.append(ids)
    return stack_batches(parts), numbers


def _side(stream: Stream, number: int, picture: tuple[int, int] | None) -> TokenSequence:
    size, text = CONFIG.vision.image_size, stream.integers(255, (5 + 4 * number,)) + 1
    if picture is None:
        crops = np.zeros((0, size, size, 3), np.uint8)
        return TokenSequence(text.astype(np.int32), crops, newlines(0))
    layout = (CONFIG.inputs, CONFIG.vision.crop)
    taps = image_taps(*picture, *layout)
    crops = stream.integers(256, (num_crops(*picture, *layout), size, size, 3)).astype(np.uint8)
    tokens = np.concatenate([np.full(taps.shape, VISUAL_SLOT), text]).astype(np.int32)
    return TokenSequence(tokens, crops, taps)


def compute(mesh: jax.sharding.Mesh, dtype: str, attention: tuple[str, str]) -> dict[str, Any]:
    """What the model computes.

    Args:
      mesh: the devices; all processes call this.
      dtype: of activations.
      attention: implementations of the language model's and of the vision tower's attention.

    Returns:
      "cosines" of queries and targets [PAIRS, PAIRS], the first "coordinates" of the queries' embeddings
      [PAIRS, 4], "loss" and "grad_norm" of a step, and "cosines_after" it.
    """
    model = Llave(
        CONFIG,
        dtype=jnp.dtype(dtype),
        attention=attention[0],
        vision_attention=attention[1],
        remat="block",
    )
    params = sharding.unflatten(make_params())
    places = param_shardings(params, mesh)
    params = jax.tree.map(
        lambda x, place: jax.make_array_from_callback(x.shape, place, lambda index: x[index]),
        params,
        places,
    )
    multipliers = optim.lr_multipliers(list(sharding.flatten(params)), ((".*", 1.0),))
    # With so large an epsilon a step follows the gradient itself. Adam's own first step follows its sign, which
    # rounding decides where a gradient is 0.
    optimizer = optim.make_optimizer(LEARNING_RATE, multipliers, epsilon=1.0, clip_norm=None)
    step = train_step.build_step(model, mesh, optimizer, multipliers, LossConfig())
    batch, numbers = make_batch(sharding.num_shards(mesh))
    local = sharding.local_shards(mesh)
    batch = jax.tree.map(lambda x: x[:, local.start : local.stop], batch)
    with jax.default_matmul_precision("highest"):
        embed = build_embedding_step(model, mesh)
        before = _embeddings(embed, params, batch, numbers, mesh)
        placed = sharding.device_put_batch(batch, mesh, leading_axes=1)
        state, metrics = step.run(step.init(params), placed, None)
        after = _embeddings(embed, state.params, batch, numbers, mesh)
    return {
        "cosines": before[:, 0] @ before[:, 1].T,
        "coordinates": before[:, 0, :4],
        "loss": np.asarray(metrics["loss"]),
        "grad_norm": np.asarray(metrics["grad_norm"]),
        "cosines_after": after[:, 0] @ after[:, 1].T,
    }


def _embeddings(embed, params, batch, numbers, mesh) -> np.ndarray:
    """[PAIRS, 2, D], in the order of the pairs."""
    found = np.zeros((PAIRS, 2, CONFIG.text.hidden_size), np.float32)
    for part, ids in enumerate(numbers):
        micro_batch = jax.tree.map(lambda x, part=part: x[part], batch)
        out = np.asarray(embed(params, sharding.device_put_batch(micro_batch, mesh)))
        for shard, names in enumerate(ids):
            for slot, name in enumerate(names):
                if name:
                    found[int(name)] = out[shard, :, slot]
    return found


def agreement(
    mesh: jax.sharding.Mesh, attention: tuple[str, str], dtypes: tuple[str, ...]
) -> Iterator[Row]:
    """The recorded numbers against those of the devices.

    Args:
      mesh: the devices; all processes call this.
      attention: as for `compute`.
      dtypes: of activations, of "float32" and "bfloat16".

    Yields:
      A finding for each dtype.
    """
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    for dtype in dtypes:
        subject = f"embeddings and a step, {dtype}, attention {'/'.join(attention)}"
        try:
            found = compute(mesh, dtype, attention)
        # Whatever a compiler or a device says here, training would meet it.
        except Exception as error:
            text = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
            yield Row("golden model", subject, False, text)
            continue
        errors = differences(found, recorded["values"])
        bounds = {
            name: FLOAT32_BOUND if dtype == "float32" else BFLOAT16_MARGIN * error
            for name, error in recorded["bfloat16_errors"].items()
        }
        wrong = [name for name, error in errors.items() if not error <= bounds[name]]
        shown = wrong or [max(errors, key=lambda name: errors[name] / bounds[name])]
        text = ", ".join(
            f"{name} off by {errors[name]:.2g} (bound {bounds[name]:.2g})" for name in shown
        )
        yield Row("golden model", subject, not wrong, text, {"errors": errors, "bounds": bounds})


def differences(found: dict[str, Any], recorded: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each number: of loss and norm as a share, of cosines and coordinates as they are.

    Args:
      found, recorded: of `compute`.

    Returns:
      By name; infinity for what is not finite.
    """
    errors = {}
    for name, values in recorded.items():
        expected = np.asarray(values, np.float64)
        error = np.abs(np.asarray(found[name], np.float64) - expected)
        if name in ("loss", "grad_norm"):
            error /= np.abs(expected)
        largest = float(error.max())
        errors[name] = largest if math.isfinite(largest) else math.inf
    return errors


def record(path: Path) -> None:
    """Writes the numbers of this machine's CPU.

    Args:
      path: of the file.
    """
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices("cpu")[:1])
    exact, rounded = (compute(mesh, dtype, ("xla", "xla")) for dtype in ("float32", "bfloat16"))
    values = {name: np.round(np.asarray(x, np.float64), 7).tolist() for name, x in exact.items()}
    errors = {name: float(f"{x:.2g}") for name, x in differences(rounded, values).items()}
    write_text(path, json.dumps({"values": values, "bfloat16_errors": errors}) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
