"""Archives are unpacked once and whole, or not at all, and nothing leaves their folder."""

import io
import tarfile

import pytest

from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData
from llave_jax.evaluation.benchmarks.mmeb_v2.pixels import Pixels, archive_parts, unpack
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import TASKS

SPEC = TASKS["ImageNet-1K"]


def tar(path, members, mode="w:gz"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                file.addfile(info)
    return path


def split(path, count):
    content = path.read_bytes()
    path.unlink()
    step = len(content) // count + 1
    parts = [path.with_name(f"{path.name}-{number:02}") for number in range(count)]
    for number, part in enumerate(parts):
        part.write_bytes(content[number * step : (number + 1) * step])
    return parts


@pytest.mark.parametrize("top", ["MMEB/", "", "./MMEB/"])
@pytest.mark.parametrize("form", ["tar", "tar.gz", "parts"])
def test_an_archive_is_unpacked(tmp_path, form, top):
    members = {
        f"{top}{name}": name.encode() for name in ("a/1.png", "a/2.png", "b c/é.png", "MMEB/x")
    }
    suffix = "tar" if form == "tar" else "tar.gz"
    path = tar(
        tmp_path / f"image-tasks/mmeb_v1.{suffix}", members, "w" if form == "tar" else "w:gz"
    )
    if form == "parts":
        split(path, 3)
    pixels = Pixels(HubData(tmp_path))
    assert pixels.find(SPEC, "a/1.png") is None
    assert pixels.has_archive(SPEC)
    store = pixels.store(SPEC, "a/1.png")
    assert store.root == tmp_path / "image-tasks/MMEB"
    assert [store.read(name).decode() for name in ("a/2.png", "b c/é.png", "MMEB/x")] == [
        "a/2.png",
        "b c/é.png",
        "MMEB/x",
    ]
    assert not list(tmp_path.rglob(".*"))
    # A second time it is left alone.
    (tmp_path / "image-tasks/MMEB/a/1.png").write_bytes(b"kept")
    assert pixels.store(SPEC, "a/1.png").read("a/1.png") == b"kept"


@pytest.mark.parametrize(
    "member",
    [
        {"../outside.png": b"x"},
        {"/tmp/outside.png": b"x"},
        {"a": (tarfile.SYMTYPE, "/etc"), "a/passwd": b"x"},
        {"a": (tarfile.LNKTYPE, "../../outside.png")},
        {"a": (tarfile.FIFOTYPE, "")},
    ],
)
def test_nothing_leaves_the_folder(tmp_path, member):
    path = tar(tmp_path / "x/a.tar.gz", {"fine.png": b"x", **member})
    with pytest.raises(ValueError, match=r"a.tar.gz: '.*': "):
        unpack([path], tmp_path / "x/folder")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["x", "x/a.tar.gz"]


def test_a_truncated_archive_leaves_nothing(tmp_path):
    path = tar(tmp_path / "x/a.tar.gz", {f"{n}.png": bytes(range(256)) * 9 for n in range(99)})
    *most, last = split(path, 3)
    last.unlink()
    assert archive_parts(tmp_path / "x/a") == most
    with pytest.raises(ValueError, match=r"a.tar.gz-01: damaged, or not all of it is there"):
        unpack(most, tmp_path / "x/folder")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [p.name for p in most]
    most[0].unlink()
    assert archive_parts(tmp_path / "x/a") == []


def test_a_folder_that_lacks_the_pictures_is_not_replaced(tmp_path):
    tar(tmp_path / "image-tasks/mmeb_v1.tar.gz", {"MMEB/a.png": b"x"})
    (tmp_path / "image-tasks/MMEB").mkdir()
    pixels = Pixels(HubData(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Remove .*MMEB, so that mmeb_v1.tar.gz is"):
        pixels.store(SPEC, "a.png")
    with pytest.raises(FileNotFoundError, match=r"hf download TIGER-Lab/MMEB-V2 .*video_cls"):
        pixels.open(TASKS["K700"])
