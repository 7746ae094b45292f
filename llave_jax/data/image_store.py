"""Encoded image files by the paths that rows give: in a folder, in zip archives below it, or in one archive.

Owns finding and reading bytes, for training and evaluation; decoding is `inputs/images.py`. Archives are
read in place. A compact index of 32 bytes a member is built once, and worker processes get it with the
store.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from llave_jax.common.content import short_hash
from llave_jax.inputs.images import (
    MAX_FILE_BYTES,
    ImageError,
    read_image_file,
    refuse_data_uri,
)

# Where a cloned MMEB-train repository keeps archives, below the image root.
_ARCHIVE_FOLDERS = (".", "images_zip", "images")

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_UINT32_MAX = np.iinfo(np.uint32).max
_MEMBER = np.dtype(
    [
        ("key", "<u8"),
        ("offset", "<u8"),
        ("packed", "<u4"),
        ("size", "<u4"),
        ("archive", "<u2"),
        ("method", "<u2"),
        ("crc", "<u4"),
    ]
)


def check_relative(path: str, name: str = "") -> None:
    """Refuses an image path that is absolute or climbs out of the image root.

    The check is on the path's text. A symbolic link inside the root may lead anywhere, since only the
    owner of the folder can have put it there.

    Args:
      path: as a row gives it.
      name: where the path was found, for the error.

    Raises:
      ImageError: the path leaves the root.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path or not parts:
        raise ImageError(
            name, f"image path {path!r} leaves the image root; paths are relative to the root"
        )


class ImageStore:
    """The images below one root. Picklable; threads may read at the same time.

    The root is a folder: a path is looked up as a file first, then in the archives `ROOT/*.zip`,
    `ROOT/images_zip/*.zip` and `ROOT/images/*.zip`, as if each were unpacked into `ROOT`,
    `ROOT/images`, or a folder of the archive's name in either.

    Or the root is a zip archive, in which all paths may lie below the same folders: the first path that
    is asked for shows which.

    Args:
      root: a folder or a zip archive.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: an archive is not readable.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.exists():
            raise FileNotFoundError(f"image root {self.root} is neither a folder nor a zip archive")
        self._archives = [self.root]
        if self.root.is_dir():
            self._archives = [
                archive
                for folder in _ARCHIVE_FOLDERS
                for archive in sorted((self.root / folder).glob("*.zip"))
            ]
        self._members = _index_archives(self._archives)
        self._files: dict[int, int] = {}
        # Of a root that is an archive: the folders that all paths lie below.
        self._prefix: str | None = None

    def read(self, path: str, name: str = "") -> bytes:
        """The encoded bytes of an image.

        Args:
          path: relative to the root, with forward slashes.
          name: where the path was found, for errors.

        Returns:
          The file's content.

        Raises:
          ImageError: the path leaves the root, nothing is there, or it cannot be read.
        """
        found = self.find(path, name)
        return found if isinstance(found, bytes) else read_image_file(found, name)

    def find(self, path: str, name: str = "") -> str | bytes:
        """As `read`, but of a file only its path: it is read when it is used, and may be large.

        Args:
          path: relative to the root, with forward slashes.
          name: where the path was found, for errors.

        Returns:
          The file's path, or the bytes of an archive's member.

        Raises:
          ImageError: the path leaves the root, nothing is there, or the archive cannot be read.
        """
        where = f"{name} ({path})" if name else path
        refuse_data_uri(path, name)
        check_relative(path, name)
        file, reason = self.root / path, f"the file does not exist below {self.root}"
        try:
            os.stat(file)
            return str(file)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            reason = f"cannot be read below {self.root}: {error.strerror}"
        member = self._find_member(path)
        if member is not None:
            return self._read_member(member, where)
        if self._archives == [self.root]:
            reason = f"the file does not exist in the archive {self.root}"
        elif self._archives:
            reason += f", nor in its {len(self._archives)} zip archive(s)"
        advice = "unpack the images there, or name the folder or zip archive that holds them"
        raise ImageError(where, f"{reason}; {advice}")

    def _find_member(self, path: str) -> np.void | None:
        """The index entry of a path, searching archives whose name is a folder in it first."""
        if self._archives == [self.root]:
            if self._prefix is None:
                self._prefix = _find_prefix(self.root, path)
            return None if self._prefix is None else self._member(0, self._prefix + path)
        parts = PurePosixPath(path).parts
        numbers = range(len(self._archives))
        for number in sorted(numbers, key=lambda n: self._archives[n].stem not in parts):
            for candidate in _names_inside(parts, self._archives[number].stem):
                member = self._member(number, candidate)
                if member is not None:
                    return member
        return None

    def _member(self, archive: int, name: str) -> np.void | None:
        key = _key(archive, name)
        index = int(np.searchsorted(self._members["key"], key))
        if index < len(self._members) and self._members["key"][index] == key:
            return self._members[index]
        return None

    def _read_member(self, member: np.void, where: str) -> bytes:
        archive = self._archives[member["archive"]]
        where = f"{where} in {archive.name}"
        size = int(member["size"])
        if size == 0:
            raise ImageError(where, "the file is empty (0 bytes)")
        if max(size, int(member["packed"])) > MAX_FILE_BYTES:
            raise ImageError(where, f"the file has {size} bytes; the limit is {MAX_FILE_BYTES}")
        descriptor = self._descriptor(int(member["archive"]))
        header = os.pread(descriptor, _LOCAL_HEADER.size, int(member["offset"]))
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise ImageError(where, "the archive is corrupt: no file header where its index says")
        fields = _LOCAL_HEADER.unpack(header)
        start = int(member["offset"]) + _LOCAL_HEADER.size + fields[-2] + fields[-1]
        packed = os.pread(descriptor, int(member["packed"]), start)
        if member["method"] == zipfile.ZIP_STORED:
            data = packed
        else:
            try:
                # The limit keeps a forged size from inflating without end.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
            except zlib.error as error:
                raise ImageError(where, f"corrupt in the archive: {error}") from error
        if len(data) != size:
            raise ImageError(where, f"truncated in the archive: {len(data)} of {size} bytes")
        if zlib.crc32(data) != member["crc"]:
            raise ImageError(where, "corrupt in the archive: its checksum does not match")
        return data

    def _descriptor(self, number: int) -> int:
        if number not in self._files:
            descriptor = os.open(self._archives[number], os.O_RDONLY)
            if self._files.setdefault(number, descriptor) != descriptor:
                os.close(descriptor)  # another thread was quicker
        return self._files[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __del__(self):
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def _names_inside(parts: tuple[str, ...], stem: str) -> list[str]:
    """What a row's path can be called inside an archive."""
    names = ["/".join(parts)]
    if parts[0] == "images":
        parts = parts[1:]
        names.append("/".join(parts))
    if parts and parts[0] == stem:
        names.append("/".join(parts[1:]))
    return [name for name in names if name]


def _find_prefix(archive: Path, path: str) -> str | None:
    """The folders below which a path lies in an archive, as "" or "images/"; None if it is not there."""
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
    if path in names:
        return ""
    found = [name for name in names if name.endswith("/" + path)]
    return min(found, key=len)[: -len(path)] if found else None


def _key(archive: int, member: str) -> int:
    name = f"{archive}/{member}".encode(errors="surrogatepass")
    return int.from_bytes(short_hash(name), "little")


def _index_archives(archives: list[Path]) -> np.ndarray:
    """Entries of all members of all archives, sorted by key."""
    entries = []
    for number, archive in enumerate(archives):
        try:
            with zipfile.ZipFile(archive) as file:
                members = file.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{archive}: not a readable zip archive: {error}") from error
        for info in members:
            if info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise ValueError(
                    f"{archive}: {info.filename} is encrypted or compressed in an unusual way; "
                    "unpack the archive into the image root instead"
                )
            # Sizes beyond 4 GiB are cut to a number that reading refuses all the same.
            packed, size = (min(n, _UINT32_MAX) for n in (info.compress_size, info.file_size))
            key, method = _key(number, info.filename), info.compress_type
            entries.append((key, info.header_offset, packed, size, number, method, info.CRC))
    return np.sort(np.array(entries, dtype=_MEMBER), order="key")
