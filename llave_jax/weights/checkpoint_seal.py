"""The seal of a checkpoint: which files it consists of, and their checksums.

    STEP/checkpoint.json                 its files with their sizes, the run's config and package versions
    STEP/checksums_PROCESS-of-COUNT.json SHA-256 of the files that this process has read

checkpoint.json is written before the checkpoint takes its name. Checksums follow while training goes on, each
process reading its share. A checkpoint whose process was killed in between has sizes without checksums.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from llave_jax.common.content import digest, file_digest
from llave_jax.common.files import write_text

CONTENTS = "checkpoint.json"
# orbax writes the time into it after the contents are noted.
_STEP_METADATA = "_CHECKPOINT_METADATA"
_CHECKSUMS = "checksums_*-of-*.json"
_PACKAGES = (
    *("llave_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore"),
    *("grain", "numpy", "ml_dtypes"),
)
_READERS = min(8, os.cpu_count() or 1)


@functools.cache
def package_versions() -> dict[str, str]:
    """The packages that training depends on.

    Returns:
      Name -> version; packages that are not installed are left out.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_contents(folder: Path, about: Mapping[str, Any]) -> None:
    """Notes the files of a checkpoint and their sizes.

    Args:
      folder: of the checkpoint; all its items are written.
      about: what else the checkpoint says of itself, for JSON.
    """
    files = {name: size for name, size in _sizes(folder).items() if name != _STEP_METADATA}
    values = {"files": files, "versions": package_versions(), **about}
    write_text(folder / CONTENTS, _signed(values))


def write_checksums(folder: Path, process: int, count: int) -> None:
    """Notes the checksums of a process's share of the files.

    Args:
      folder: of the checkpoint.
      process, count: number of this process, and of all processes.
    """
    sizes = {name: size for name, size in _sizes(folder).items() if "checksums_" not in name}
    digests = {"checksums": _digests(folder, _share(sizes, process, count))}
    write_text(folder / f"checksums_{process}-of-{count}.json", _signed(digests))


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint says which files it consists of; those of earlier versions do not.

    Args:
      folder: of the checkpoint.

    Returns:
      True if it does.
    """
    return (folder / CONTENTS).is_file()


def find_damage(folder: Path, item: str = "", *, process: int = 0, count: int = 1) -> str | None:
    """Reads a sealed checkpoint and compares it with its seal.

    Sizes of all files are compared. Checksums are compared for the process's share, so that processes which
    ask together read every file once.

    Args:
      folder: of the checkpoint.
      item: only the files below this folder of it; empty: all.
      process, count: number of this process, and of all that ask together.

    Returns:
      The first file that is not as it was saved, and what is wrong with it; None if there is none.
    """
    items: dict[str, int] = {}
    sums: dict[str, str] = {}
    for file in (folder / CONTENTS, *sorted(folder.glob(_CHECKSUMS))):
        values = _read_signed(file)
        if values is None:
            return f"{file} is not as it was written"
        items.update(values.get("files", {}))
        sums.update(values.get("checksums", {}))
    found = _sizes(folder)
    wanted = {name for name in {*items, *sums} if name.startswith(f"{item}/" if item else "")}
    for name in sorted(wanted):
        if name not in found:
            return f"{folder / name} is missing"
        if found[name] != items.get(name, found[name]):
            return (
                f"{folder / name} has {found[name]} bytes, not the {items[name]} that were written"
            )
    share = _share({name: found[name] for name in wanted & sums.keys()}, process, count)
    try:
        found_sums = _digests(folder, share)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for name, found_sum in found_sums.items():
        if found_sum != sums[name]:
            return f"{folder / name} has changed since it was written (its checksum differs)"
    return None


def _signed(values: Mapping[str, Any]) -> str:
    """JSON that holds a digest of itself."""
    text = json.dumps(values, sort_keys=True)
    values = {**values, "digest": digest(text.encode()).hex()}
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _read_signed(file: Path) -> dict[str, Any] | None:
    """What was given to `_signed`; None if a character has changed."""
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
        del values["digest"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return values if _signed(values) == text else None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a folder, by its path in the folder."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path.lstat().st_size
    return found


def _share(sizes: Mapping[str, int], process: int, count: int) -> list[str]:
    """A process's files, about as many bytes as the others have."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[process::count]


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        digests = readers.map(lambda name: file_digest(folder / name).hex(), names)
        return dict(zip(names, digests, strict=True))
