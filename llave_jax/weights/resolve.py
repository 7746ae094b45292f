"""From what a user calls a model to its model directory: `resolve_model`.

A Hugging Face checkpoint, from the disk or from the hub, is converted once into a cache:

    LLAVE_JAX_CACHE/models/NAME-KEY        a model directory; it may be deleted at any time (`cache_folder`)

What is downloaded lies in the hub's own cache. Pickled weights and code are not downloaded.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from llave_jax.common.content import digest, sampled_digest
from llave_jax.common.directories import make_directory
from llave_jax.common.files import cache_folder
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf, model_files
from llave_jax.weights.hf_config import find_tower_config
from llave_jax.weights.json_files import read_json
from llave_jax.weights.safetensors_io import CheckpointError

# A name on the hub, and the branch, tag or commit behind an @.
_HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# What a checkpoint's files are called; model directories on the hub have the same.
_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*merges.txt", "README.md", "LICENSE*")
# Weights in a subfolder are those of an earlier step, or of another format.
_NOT_DOWNLOADED = ("*/*.safetensors", "*.bin.index.json", ".*/*", "trainer_state.json")

logger = logging.getLogger(__name__)


def resolve_model(model: str | os.PathLike) -> Path:
    """The model directory, or the training run, that a user means.

    Args:
      model: a model directory, a training run, a Hugging Face directory of either layout, or a name on
        the hub as `org/name` or `org/name@revision`. What is on the disk goes before the hub. A
        Hugging Face checkpoint is converted into the cache, unless it is there already; several
        processes that ask for it share one conversion.

    Returns:
      A path for the functions of `model_dir`: `model` itself, or a directory of the cache.

    Raises:
      CheckpointError: it is none of these, cannot be downloaded, or is no model of a form that is
        known. The message says what to do.
      OSError: the cache cannot be written.
    """
    path = Path(model).expanduser()
    if path.exists() and not is_checkpoint(path):
        model_dir.locate(path)
        return path
    checkpoint = find_checkpoint(model)
    if model_dir.is_model_dir(checkpoint):
        return checkpoint
    name = checkpoint.resolve().name if path.exists() else path.as_posix()
    return _converted(checkpoint, re.sub(r"[^\w.-]+", "--", name, flags=re.ASCII))


def is_checkpoint(path: Path) -> bool:
    """Whether a directory on the disk is a Hugging Face checkpoint, whole or not.

    Args:
      path: may be missing.

    Returns:
      True if its config.json is that of a Hugging Face model.

    Raises:
      CheckpointError: config.json is not JSON.
    """
    config = path / "config.json"
    if not config.is_file() or any(map(model_dir.is_model_dir, (path, path / model_dir.RUN_MODEL))):
        return False
    # A training run that was stopped early has a config.json, too.
    return bool(read_json(config).keys() & {"architectures", "model_type"})


def find_checkpoint(name: str | os.PathLike) -> Path:
    """A directory of the disk, or else the folder that a model of the hub was downloaded to.

    Args:
      name: a path, or a name on the hub as for `resolve_model`.

    Returns:
      The path, or the folder that the download lies in.

    Raises:
      CheckpointError: there is no such directory, nor a model of this name that can be downloaded.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    named = _HUB_NAME.fullmatch(os.fspath(name))
    if not named:
        raise CheckpointError(f"{name}: no such directory (a model on the hub is called org/name)")
    return _download(named["repo"], named["revision"])


def hub_name(model: str | os.PathLike) -> str | None:
    """The name on the hub by which a user calls a model.

    Args:
      model: as for `resolve_model`.

    Returns:
      "org/name", without a revision; None for what is on the disk.
    """
    named = _HUB_NAME.fullmatch(os.fspath(model))
    return None if named is None or Path(model).expanduser().exists() else named["repo"]


# The cache of conversions.


def _converted(source: Path, name: str) -> Path:
    """The conversion of a Hugging Face directory, made if it is not in the cache."""
    import filelock

    target = cache_folder() / "models" / f"{name}-{_identity(source)}"
    if _is_whole(target):
        return target
    try:
        make_directory(target.parent, private=True)
        lock = filelock.FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"{target.parent}: cannot be written ({error.strerror or error}). Converted models are kept "
            "there; LLAVE_JAX_CACHE names another folder"
        ) from error
    try:
        # Whoever held the lock before may have made it.
        if not _is_whole(target):
            logger.info("converting %s, once, to %s", source, target)
            convert_from_hf(source, target, overwrite=True)
    finally:
        lock.release()
    return target


def _is_whole(target: Path) -> bool:
    """A conversion appears whole. Who tidies the cache may remove the large file alone."""
    return model_dir.is_model_dir(target) and (target / model_dir.WEIGHTS).is_file()


def _identity(source: Path) -> str:
    """Differs between two checkpoints, and between two states of one directory.

    Large files are compared by size, time of change and samples of their content, so that starting
    with a model of 15 GB does not read all of it.
    """
    parts = [f"format {model_dir.FORMAT} ".encode()]
    files = model_files(source)
    # The llave layout can have the tower's sizes outside the directory.
    tower = read_json(source / "config.json").get("mm_vision_tower")
    if outside := find_tower_config(source, tower):
        files.append(outside)
    for file in files:
        status = file.stat()
        name = os.path.relpath(file, source)
        parts.append(f"{name} {status.st_size} {status.st_mtime_ns} ".encode())
        parts.append(sampled_digest(file))
    return digest(*parts).hex()[:16]


# The hub.


def _download(repo: str, revision: str | None) -> Path:
    """The folder of the hub's cache that holds a model; downloads what is missing there.

    Raises:
      CheckpointError: saying why it is not there and what to do.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise CheckpointError(
            f"{repo}: no such directory. If it is a model on the hub: pip install huggingface_hub"
        ) from error
    name = f"{repo}@{revision}" if revision else repo
    url = f"{constants.ENDPOINT}/{repo}"
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(_DOWNLOADED),
            ignore_patterns=list(_NOT_DOWNLOADED),
        )
    except errors.GatedRepoError as error:
        problem = f"its owner asks for consent: accept the terms at {url}, then {_LOG_IN}"
        raise CheckpointError(f"{name}: {problem}") from error
    except errors.RepositoryNotFoundError as error:
        problem = f"no such directory, and no such model at {url}. If it is private: {_LOG_IN}"
        raise CheckpointError(f"{name}: {problem}") from error
    except errors.RevisionNotFoundError as error:
        problem = f"{repo} has no revision {revision}; its branches and tags are at {url}/tree/main"
        raise CheckpointError(f"{name}: {problem}") from error
    except errors.LocalEntryNotFoundError as error:
        problem = f"no such directory, and not (or not wholly) in the hub's cache, {constants.HF_HUB_CACHE}. "
        if constants.HF_HUB_OFFLINE:
            problem += "HF_HUB_OFFLINE forbids to download it: unset it, once"
        else:
            problem += (
                f"{constants.ENDPOINT} could not be reached: check the network, or HF_ENDPOINT; or copy "
                f"the cache from a machine where `hf download {repo}` works"
            )
        raise CheckpointError(f"{name}: {problem}") from error
    except Exception as error:
        # The library's transport, and with it the errors of a connection, differ between its versions.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            problem = f"{constants.ENDPOINT} does not accept the token: {_LOG_IN}"
        else:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = f"the download failed ({reason}). The same command continues it"
        raise CheckpointError(f"{name}: {problem}") from error
    if not any(Path(folder).glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: {url} has no weights in safetensors. Pickled ones can run code when read, and are "
            "not downloaded"
        )
    return Path(folder)


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
