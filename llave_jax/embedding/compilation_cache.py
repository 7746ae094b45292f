"""Compiled programs are kept under the user's cache folder, so that only the first process compiles.

    LLAVE_JAX_CACHE/compiled/PLATFORM-KEY      JAX's persistent compilation cache; it may be deleted at any time

Training keeps no programs unless its user sets JAX's own setting.
"""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from typing import Any

import jax

from llave_jax.common.content import short_hash
from llave_jax.common.directories import make_directory
from llave_jax.common.files import cache_folder

# Beyond this, JAX deletes what was not used for longest.
MAX_BYTES = 4 * 1024**3
# Programs that compile faster are not worth a file.
_LEAST_SECONDS = 0.2


def use_compilation_cache() -> None:
    """Lets JAX keep what it compiles in this process, unless its user has decided on that.

    JAX_COMPILATION_CACHE_DIR or `jax_compilation_cache_dir` choose another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing: with these set, nothing is changed here. JAX locks
    the folder, so that any number of processes may use it.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    folder = cache_folder() / "compiled" / _machine()
    try:
        # Who can write there can make this process run any code.
        make_directory(folder, private=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as error:
        logging.getLogger(__name__).info("compiled programs are not kept: %s", error)
        return
    values = {
        "jax_compilation_cache_max_size": MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": _LEAST_SECONDS,
    }
    for name, value in values.items():
        if name.upper() not in os.environ:
            settings.update(name, value)
    settings.update("jax_compilation_cache_dir", str(folder))


def _machine() -> str:
    """Programs for one CPU can fail on another, which may see the same home folder."""
    backend = jax.default_backend()
    if backend != "cpu":
        return backend
    try:
        text = Path("/proc/cpuinfo").read_text()
        lines = {line for line in text.splitlines() if line.startswith(("flags", "Features"))}
        features = "".join(sorted(lines))
    except OSError:
        features = platform.processor()
    return f"cpu-{short_hash((platform.machine() + features).encode(), 4).hex()}"
