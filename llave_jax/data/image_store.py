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
from llave_jax.common.paths import OutsideRoot, below
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


# Limits of archives. Nothing is unpacked to the disk, and one member at a time to memory, so the sum of all
# members has no limit.
# The list of an archive's members is read whole: about 2.5 million of them fit.
MAX_DIRECTORY_BYTES = 256 << 20
# Pictures are compressed already. A large member that grows more than this is made to exhaust memory.
MAX_RATIO, RATIO_FREE_BYTES = 100, 32 << 20


class ImageStore:
    """The images below one root. Picklable; threads may read at the same time.

    The root is a folder: a path is looked up as a file first, then in the archives `ROOT/*.zip`,
    `ROOT/images_zip/*.zip` and `ROOT/images/*.zip`, as if each were unpacked into `ROOT`,
    `ROOT/images`, or a folder of the archive's name in either. A link is followed within the root, or if it
    lies in the root itself and leads to a folder.

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
        reason = f"the file does not exist below {self.root}"
        try:
            file = below(self.root, path, linked_folders=True)
            os.stat(file)
            return str(file)
        except OutsideRoot as error:
            raise ImageError(
                name, f"image path {path!r:.200} leaves the image root: {error}"
            ) from error
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:  # ValueError: half a surrogate pair
            if not isinstance(error, OSError):
                raise ImageError(name, f"image path {path!r:.200} is not text") from error
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
        packed_size = int(member["packed"])
        if max(size, packed_size) > MAX_FILE_BYTES:
            raise ImageError(where, f"the file has {size} bytes; the limit is {MAX_FILE_BYTES}")
        if size > RATIO_FREE_BYTES and size > MAX_RATIO * packed_size:
            raise ImageError(
                where,
                f"{packed_size} bytes claim to hold {size}: more than {MAX_RATIO} times as many, which no picture does",
            )
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
    names = [info.filename for info in _members(archive)]
    if path in names:
        return ""
    found = [name for name in names if name.endswith("/" + path)]
    return min(found, key=len)[: -len(path)] if found else None


def _key(archive: int, member: str) -> int:
    name = f"{archive}/{member}".encode(errors="surrogatepass")
    return int.from_bytes(short_hash(name), "little")


def _members(archive: Path) -> list[zipfile.ZipInfo]:
    """What an archive lists. It is read by one function, and its size is known before it is."""
    if not archive.is_file():
        raise ValueError(f"{archive}: not a readable zip archive: is not a file")
    listed = _directory_bytes(archive)
    if listed > MAX_DIRECTORY_BYTES:
        raise ValueError(
            f"{archive}: its list of members has {listed} bytes; the limit is {MAX_DIRECTORY_BYTES}. Divide the archive, "
            "or unpack it into the image root"
        )
    try:
        with zipfile.ZipFile(archive) as file:
            return file.infolist()
    except MemoryError:
        raise
    except Exception as error:  # a damaged list makes zipfile raise any exception
        raise ValueError(f"{archive}: not a readable zip archive: {error}") from error


# End of the central directory, of an archive and of one in zip64.
_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")


def _directory_bytes(archive: Path) -> int:
    """The size that an archive claims for its list of members; 0 if it has no end that says so."""
    with archive.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - (1 << 16) - _END.size - _END64.size - 20)
        file.seek(start)
        tail = file.read()
    claimed = 0
    place = tail.rfind(b"PK\5\6")
    if 0 <= place <= len(tail) - _END.size:
        claimed = _END.unpack_from(tail, place)[5]
        place = tail.rfind(b"PK\6\6", 0, place)
        if 0 <= place <= len(tail) - _END64.size:
            claimed = max(claimed * (claimed != _UINT32_MAX), _END64.unpack_from(tail, place)[8])
    # zipfile reads no more than there is.
    return min(claimed, size)


def _index_archives(archives: list[Path]) -> np.ndarray:
    """Entries of all members of all archives, sorted by key."""
    entries = []
    for number, archive in enumerate(archives):
        for info in _members(archive):
            if not info.filename or info.filename.endswith("/"):  # a folder
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
            if not 0 <= info.header_offset < 1 << 63:
                raise ValueError(
                    f"{archive}: not a readable zip archive: {info.filename:.200} has no place in it"
                )
            key, method = _key(number, info.filename), info.compress_type
            entries.append((key, info.header_offset, packed, size, number, method, info.CRC))
    return np.sort(np.array(entries, dtype=_MEMBER), order="key")
