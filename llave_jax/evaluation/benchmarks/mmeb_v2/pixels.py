"""Pictures and frames of MMEB-V2 below a data root: unpacked folders, zip archives, and the hub's tar archives.

Owns which folder holds a task's pictures, and unpacking. A tar archive cannot be read at random, so the first task
that needs one has it unpacked, once, below the data root. Zip archives are read in place by `data/image_store.py`.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from llave_jax.common.directories import make_directory
from llave_jax.common.files import replace_directory, scratch_directory
from llave_jax.common.locks import only_writer
from llave_jax.common.paths import OutsideRoot, check_relative
from llave_jax.common.progress import Progress
from llave_jax.data.image_store import ImageStore
from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import PIXELS, Archive, Spec
from llave_jax.inputs.images import ImageError
from llave_jax.parallel.processes import on_first_process

_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MEBIBYTE = 1 << 20


class Pixels:
    """Where the pictures and frames of tasks are.

    Args:
      data: the data root, which may hold the pixel repository's content itself or the repository as any other.
      images: folder or zip archive of the image tasks' pictures, if it is not where they are looked for.

    Raises:
      FileNotFoundError: `images` does not exist.
    """

    def __init__(self, data: HubData, images: str | os.PathLike | None = None):
        self._data = data
        self._images = None if images is None else Path(images)
        if self._images is not None and not self._images.exists():
            raise FileNotFoundError(f"image folder or archive {images} does not exist")
        self._roots = [data.root, *data.places(PIXELS)]
        self._stores: dict[Path, ImageStore] = {}
        self._opened: dict[tuple[str, str], Path] = {}

    def find(self, spec: Spec, picture: str = "") -> Path | None:
        """The folder of a task's pictures, or of its videos' frames.

        Args:
          spec: the task.
          picture: a path below the folder, which must be there.

        Returns:
          The folder (or zip archive); None if there is none, as long as the archive is not unpacked.
        """
        for folder in self._folders(spec):
            if folder.exists() and (not picture or self._has(folder, picture)):
                return folder
        return None

    def open(self, spec: Spec, picture: str = "") -> Path:
        """As `find`; an archive is unpacked if need be. With several processes all call this alike.

        Args:
          spec: the task.
          picture: a path below the folder, which must be there.

        Returns:
          The folder (or zip archive).

        Raises:
          FileNotFoundError: there are neither pictures nor an archive of them; it has the command that fetches it.
          ValueError: the archive is damaged, incomplete, or leads out of its folder.
        """
        # A task is read once more for the report, by the first process alone, which must not wait for others then.
        if (spec.name, picture) in self._opened:
            return self._opened[spec.name, picture]
        on_first_process(lambda: self._unpack_unless_there(spec, picture))
        self._stores.clear()  # Folders that were unpacked meanwhile may hold other archives.
        found = self.find(spec, picture)
        if found is None:
            places = ", ".join(map(str, self._folders(spec)))
            raise FileNotFoundError(
                f"{spec.name}: {f'the picture {picture!r} of its first row' if picture else 'a folder of pictures'} was "
                f"not found; looked in {places}. {self.advice(spec)}"
            )
        self._opened[spec.name, picture] = found
        return found

    def store(self, spec: Spec, picture: str) -> ImageStore:
        """The pictures of a task. With several processes all call this alike.

        Args:
          spec: the task.
          picture: one of them, which shows where they are.

        Returns:
          The store.

        Raises:
          FileNotFoundError, ValueError: as for `open`.
        """
        return self._store(self.open(spec, picture))

    def has_archive(self, spec: Spec) -> bool:
        """Whether a task's archive is there, complete as far as its parts are numbered, and not unpacked yet."""
        return (
            bool(self._parts(spec.archive)) and not (self._data.root / spec.archive.folder).exists()
        )

    def advice(self, spec: Spec) -> str:
        """What to do where a task's pictures are missing."""
        if self._images is not None and spec.modality == "image":
            return f"--images says that they are in {self._images}"
        target = self._data.root / spec.archive.folder
        if (parts := self._parts(spec.archive)) and target.exists():
            return f"Remove {target}, so that {parts[0].name} is unpacked to it"
        return f"Fetch them with `{self.command(spec)}`"

    def command(self, spec: Spec) -> str:
        """The command that fetches the archive of a task's pictures."""
        return self._data.command(PIXELS, spec.archive.pattern)

    def _folders(self, spec: Spec) -> list[Path]:
        if self._images is not None and spec.modality == "image":
            return [self._images]
        return list(dict.fromkeys(root / name for root in self._roots for name in spec.pictures))

    def _store(self, folder: Path) -> ImageStore:
        if folder not in self._stores:
            self._stores[folder] = ImageStore(folder)
        return self._stores[folder]

    def _has(self, folder: Path, picture: str) -> bool:
        try:
            self._store(folder).find(picture)
        except ImageError:
            return False
        return True

    def _parts(self, archive: Archive) -> list[Path]:
        for root in self._roots:
            if parts := archive_parts(root / archive.name):
                return parts
        return []

    def _unpack_unless_there(self, spec: Spec, picture: str) -> None:
        if self.find(spec, picture) is None and self.has_archive(spec):
            unpack(self._parts(spec.archive), self._data.root / spec.archive.folder)


def archive_parts(name: Path) -> list[Path]:
    """The files of a tar archive.

    Args:
      name: path without suffix.

    Returns:
      One file, or the numbered parts of one (`NAME.tar.gz-00`, ...) in order; [] if there is none, or if a part before
      the last one is absent.
    """
    for suffix in _SUFFIXES:
        path = name.with_name(name.name + suffix)
        if path.is_file():
            return [path]
    numbered = {}
    pattern = re.compile(re.escape(name.name) + r"\.tar(?:\.gz)?[-.](\d+)")
    for path in name.parent.iterdir() if name.parent.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            numbered[int(match[1])] = path
    order = sorted(numbered)
    return [numbered[number] for number in order] if order == list(range(len(order))) else []


def unpack(parts: Sequence[Path], folder: Path) -> None:
    """Unpacks a tar archive into a folder that appears when it is complete.

    If all of the archive lies in one folder with the new folder's name, that folder's content is unpacked.

    Args:
      parts: the archive's files, which are one stream.
      folder: is made; nothing may stand there. Another job that unpacks to it is refused.

    Raises:
      ValueError: the archive is damaged or truncated; a member is a link or a device, or leads out of the folder.
      DiskFull: there is no room.
    """
    make_directory(folder.parent)
    with only_writer(folder, inside=False, flag="--data"), scratch_directory(folder) as staged:
        if folder.exists():  # Another job was quicker.
            return
        try:
            _extract(parts, staged)
        except (tarfile.TarError, zlib.error, EOFError) as error:
            raise ValueError(
                f"{parts[-1]}: damaged, or not all of it is there ({error}); fetch it again"
            ) from error
        # Once for all files: there may be a million of them.
        os.sync()
        names = os.listdir(staged)
        if names == [folder.name]:
            (staged / folder.name).rename(inner := staged.with_suffix(".inner.partial"))
            try:
                replace_directory(folder, inner)
            finally:
                shutil.rmtree(inner, ignore_errors=True)
        else:
            replace_directory(folder, staged)


def _extract(parts: Sequence[Path], folder: Path) -> None:
    total = sum(path.stat().st_size for path in parts)
    stream = _Joined(parts)
    label = f"unpacking {parts[0].name}"
    with (
        stream,
        Progress(total // _MEBIBYTE, label, unit="MiB") as progress,
        tarfile.open(fileobj=io.BufferedReader(stream, _MEBIBYTE), mode="r|*") as tar,
    ):
        shown = 0
        for member in tar:
            where = f"{parts[0]}: {member.name!r:.200}"
            if member.isdir():
                continue
            if not member.isreg():
                raise ValueError(
                    f"{where}: is neither a file nor a folder; such archives are not unpacked here"
                )
            try:
                check_relative(member.name, "the archive's folder")
            except OutsideRoot as error:
                raise ValueError(f"{where}: {error}") from error
            target = folder / PurePosixPath(member.name)
            make_directory(target.parent)
            source = tar.extractfile(member)
            assert source is not None
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _MEBIBYTE)
            if target.stat().st_size != member.size:
                raise EOFError(f"{member.name} ends before its size")
            progress.update(stream.done // _MEBIBYTE - shown)
            shown = stream.done // _MEBIBYTE


class _Joined(io.RawIOBase):
    """Files read as one.

    Attributes:
      done: bytes that were read.
    """

    def __init__(self, paths: Sequence[Path]):
        self._left = list(paths)
        self._file: io.BufferedReader | None = None
        self.done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self._file is None:
                if not self._left:
                    return 0
                self._file = self._left.pop(0).open("rb")
            if count := self._file.readinto(buffer):
                self.done += count
                return count
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
