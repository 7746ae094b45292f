"""What checks of a device found: rows, their table, the verdict, and the JSON for an issue.

Owns how findings are shown. Nothing here names the host, its users or its paths.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from llave_jax.common.tables import align

# Packages whose versions decide what a device computes.
PACKAGES = (
    *("llave_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("flax", "optax", "numpy", "tokamax"),
)
# Settings of the environment that change what is compiled.
FLAGS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
      check: which check it belongs to.
      subject: what was checked.
      passed: whether it is as it has to be; None: it is no condition.
      text: the finding in words and numbers.
      values: the finding as plain numbers, for the JSON.
    """

    check: str
    subject: str
    passed: bool | None
    text: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mark(self) -> str:
        """How the table shows `passed`."""
        return {True: "ok", False: "FAILED", None: ""}[self.passed]


def table(rows: Sequence[Row]) -> str:
    """The findings as text.

    Args:
      rows: at least one.

    Returns:
      Aligned lines.
    """
    cells = [[row.check, row.subject, row.mark, row.text] for row in rows]
    return align([["check", "of", "", "found"], *cells], left=4)


def verdict(rows: Iterable[Row]) -> tuple[bool, str]:
    """Whether the device may be used as it is.

    Args:
      rows: all findings.

    Returns:
      Whether nothing failed, and a line that says so or names what failed.
    """
    failed = [f"{row.check} ({row.subject})" for row in rows if row.passed is False]
    device = jax.devices()[0].device_kind
    if failed:
        return False, f"FAILED on {device}: {', '.join(failed)}"
    return True, f"passed: {device} computes what it should"


def to_json(rows: Iterable[Row], config_name: str | None, fields: dict[str, Any]) -> str:
    """The file to attach to an issue.

    Args:
      rows: all findings.
      config_name: of the config that was checked with.
      fields: that it sets, by name.

    Returns:
      JSON with versions, kind of device, driver, flags and findings.
    """
    rows, device = list(rows), jax.devices()[0]
    passed, line = verdict(rows)
    values = {
        "passed": passed,
        "verdict": line,
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "driver": device.client.platform_version,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in PACKAGES if (found := _version(name))},
        },
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "config": config_name and re.split(r"[/\\]", config_name)[-1],
        "fields": fields,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return json.dumps(_without_paths(values), indent=2) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# What looks like a path of this machine, or its address.
_PATH = re.compile(r"(?<![\w/])(?:~|\.{1,2})?/[\w.~-]+(?:/[\w.~+-]*)*|\b[A-Za-z]:\\\S+")


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str):
        return _PATH.sub("PATH", value).replace(platform.node() or "\0", "HOST")
    # JSON has no infinity.
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return str(value)
    return value
