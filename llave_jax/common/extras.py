"""Packages that only some commands need: the extras of pyproject.toml."""

from __future__ import annotations

import importlib.util


class MissingPackage(ImportError, ValueError):
    """A package is not installed; the message says what to install."""


# Module -> (name of its package, the extra that brings it).
_PACKAGES = {
    "av": ("PyAV", "video"),
    "mteb": ("mteb", "mteb"),
    "lancedb": ("LanceDB", "search"),
    "prometheus_client": ("prometheus-client", "serve"),
    "starlette": ("Starlette", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "lance": ("pylance", "lance"),
    "ray": ("Ray", "ray"),
    "wandb": ("wandb", "wandb"),
}


def missing(module: str, purpose: str) -> MissingPackage:
    """The error for a module that cannot be imported.

    Args:
      module: one of those above.
      purpose: what needs it, in the plural: "videos".

    Returns:
      The error, which says what to install.
    """
    package, extra = _PACKAGES[module]
    return MissingPackage(f"{purpose} need {package}: pip install 'llave_jax[{extra}]'")


def require(module: str, purpose: str) -> None:
    """Checks that a module is there, without importing it.

    Commands call it before long work that needs the module at its end.

    Args:
      module, purpose: as of `missing`.

    Raises:
      MissingPackage: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise missing(module, purpose)
