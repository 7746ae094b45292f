"""torchvision for tests, beside a PyTorch for CPUs as well.

transformers prepares images with torchvision. The wheel on PyPI is compiled for CUDA: with a PyTorch for CPUs its compiled
operators are missing, and the import fails because two of them are not declared. Resizing needs none of them.
"""

from __future__ import annotations

import importlib
import sys

import pytest


def import_torchvision() -> None:
    """Imports torchvision, or skips the tests that need it. Call it before transformers is imported."""
    torch = pytest.importorskip("torch")
    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed", allow_module_level=True)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    global _declared  # the declarations end with the object
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")


_declared = None
