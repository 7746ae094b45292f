"""A run that trains adapters (LoRA): from `config.lora` to the adapters, their learning rates and first values.

What adapters are and how they are added is `models/lora.py`. The base's parameters stay as they are stored and are
read from `model.path` whenever the run begins or goes on; the run keeps the adapters alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llave_jax.config import Config
from llave_jax.models import lora
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import param_shardings
from llave_jax.models.lora import AdaptedLlave, Lora
from llave_jax.models.parameters import adapter_shapes, parameter_shapes
from llave_jax.parallel import sharding
from llave_jax.training import optim
from llave_jax.training.state import TrainState
from llave_jax.weights import model_dir


def lora_of(config: Config) -> Lora | None:
    """The adapters that a config describes.

    Args:
      config: of the run.

    Returns:
      The adapters; None if it trains the model's own parameters.

    Raises:
      ValueError: `lora.targets` names no module.
    """
    values = config.lora
    if values.rank is None:
        return None
    return Lora(
        modules=lora.find_modules(values.targets),
        rank=values.rank,
        alpha=values.alpha,
        rslora=values.rslora,
        dropout=values.dropout,
        seed=config.seed,
    )


def learning_rates(config: Config, llave_config: LlaveConfig) -> dict[str, float | None]:
    """The multiplier of the learning rate for each parameter of a run.

    Args:
      config: of the run.
      llave_config: the model that is trained.

    Returns:
      path -> multiplier; None for a frozen parameter, as all of the base are where there are adapters.

    Raises:
      ValueError: as for `optim.lr_multipliers`, or `optim.rates` freeze an adapter.
    """
    base, adapters = list(parameter_shapes(llave_config)), lora_of(config)
    if adapters is None:
        return optim.lr_multipliers(base, config.optim.rates)
    own = adapter_shapes(adapters.modules, adapters.rank, llave_config)
    rates = optim.lr_multipliers([*base, *own], config.optim.rates)
    frozen = [path for path in own if rates[path] is None]
    if frozen:
        raise ValueError(
            f"config.optim.rates freezes the adapter {frozen[0]}, which config.lora.targets asks for; give it a "
            "factor in config.optim.rates, or leave its module out of config.lora.targets"
        )
    return {path: rates[path] if path in own else None for path in rates}


def base_dtypes(config: Config, llave_config: LlaveConfig) -> dict[str, Any]:
    """In which dtypes the base's parameters are on the devices.

    Args:
      config: of a run with adapters.
      llave_config: the model that is trained.

    Returns:
      path -> dtype: `lora.base_dtype`, or as they are stored, or without a stored model `dtype`.
    """
    asked, path = config.lora.base_dtype, config.model.path
    if asked is None and path is not None:
        return {name: array.dtype for name, array in model_dir.open_params(path).items()}
    return dict.fromkeys(parameter_shapes(llave_config), jnp.dtype(asked or config.dtype))


def begin(config: Config, llave_config: LlaveConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The parameters before the first step: the base's, and adapters that do not change it yet.

    Args:
      config: of a run with adapters.
      llave_config: the model that is trained.
      mesh: the devices.

    Returns:
      The parameter tree, made and read in its shards.
    """
    adapters = lora_of(config)
    assert adapters is not None

    def make() -> dict[str, Any]:
        return sharding.unflatten(lora.init_adapters(adapters, llave_config))

    made = jax.jit(make, out_shardings=param_shardings(jax.eval_shape(make), mesh))()
    return _joined(_load_base(config, mesh), made)


def with_new(model: AdaptedLlave, base: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters for trying out a program, without a trained base; traceable.

    Args:
      model: with adapters.
      base: the parameter tree of the base.

    Returns:
      The tree with adapters as before the first step, each array in the model's dtype for it.
    """
    flat = sharding.flatten(base) | lora.init_adapters(model.lora, model.config)
    forms = model.abstract_parameters()
    return sharding.unflatten({path: flat[path].astype(forms[path].dtype) for path in sorted(flat)})


def with_base(config: Config, state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """A state of which a checkpoint holds the adapters alone, with the base's parameters.

    Args:
      config: of a run with adapters.
      state: its parameters are the adapters.
      mesh: the devices.

    Returns:
      The whole state.
    """
    return state._replace(params=_joined(_load_base(config, mesh), state.params))


def _load_base(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    asked = config.lora.base_dtype
    return model_dir.load_params(
        config.model.path, mesh=mesh, dtype=None if asked is None else jnp.dtype(asked)
    )


def _joined(base: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    both = sharding.flatten(base) | sharding.flatten(adapters)
    return sharding.unflatten({path: both[path] for path in sorted(both)})
