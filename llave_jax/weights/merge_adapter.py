"""A model directory from a base and adapters: weights with the adapters added, layer by layer."""

from __future__ import annotations

import os
from pathlib import Path

from llave_jax.common.files import staged_directory
from llave_jax.common.locks import only_writer
from llave_jax.common.progress import Progress
from llave_jax.models.parameters import num_layers, parameter_shapes, weight_at
from llave_jax.weights import model_dir
from llave_jax.weights.export_source import ExportSource
from llave_jax.weights.safetensors_io import SafetensorsWriter, check_finite, encode_header


def merge_adapter(
    model: str | os.PathLike,
    output: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
    show_progress: bool = True,
) -> None:
    """Writes a model with the weights of a base and its adapters. One layer is in memory at a time.

    Args:
      model: the base, a model directory or a run; or a run that trained adapters, which are added to their base.
        Of a base that is a run, one parameter with all its layers is in memory.
      output: the model directory to make; appears when it is complete. Its dtypes are the base's.
      adapter: what is added besides, as for `adapted.open_adapter`.
      overwrite: replace a model directory that exists.
      show_progress: show a progress bar.

    Raises:
      CheckpointError: base or adapter cannot be read, or do not belong together.
      ValueError: there is no adapter.
      FileExistsError: `output` exists.
    """
    source = ExportSource(model, adapter)
    if not source.adapters:
        raise ValueError(f"{model}: has parameters of its own, and no adapter is given")
    shapes = parameter_shapes(source.config)
    layers = {path: num_layers(weight_at(path), source.config) for path in shapes}
    header = encode_header(
        {path: (source.stored[path], shape) for path, shape in shapes.items()}, model_dir.METADATA
    )
    total = sum(count or 1 for count in layers.values())
    with only_writer(output, inside=False):
        model_dir.check_output(Path(output), overwrite=overwrite, keep=source.directory)
        with staged_directory(output) as staged:
            model_dir.write_config(staged, source.config)
            model_dir.take_over(source.directory, staged)
            with (
                SafetensorsWriter(staged / model_dir.WEIGHTS, header) as writer,
                Progress(total, "merging", unit="layers", enabled=show_progress) as progress,
            ):
                for path, count in layers.items():
                    for layer in (None,) if count is None else range(count):
                        array = source.parameter(path, layer)
                        check_finite(array, path, source.directory)
                        writer.write(path, array, layer)
                        progress.update(1)
