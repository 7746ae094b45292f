"""Files and directories appear whole or not at all, and leave nothing else behind."""

import stat

import numpy as np
import pytest

from llave_jax.common import files


def names(directory):
    return sorted(path.name for path in directory.rglob("*"))


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


def test_a_file_is_written_with_its_directory_and_nothing_beside_it(tmp_path):
    files.write_text(tmp_path / "new" / "a.txt", "Zürich\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "Zürich\n".encode()
    assert names(tmp_path) == ["a.txt", "new"]


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_file_whose_writing_stops_is_as_it_was(tmp_path, before):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)

    def write():
        with files.atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            assert (path.read_bytes() if path.exists() else None) == before
            raise Stopped

    with pytest.raises(Stopped):
        write()
    assert names(tmp_path) == ([] if before is None else ["a.bin"])
    if before is not None:
        assert path.read_bytes() == before


def test_the_temporary_file_of_a_killed_job_is_overwritten_and_no_reader_takes_it_for_a_result(
    tmp_path,
):
    partial = files.partial_path(tmp_path / "a.npz")
    partial.write_bytes(b"longer than what comes next")
    assert partial.suffix != ".npz"
    files.write_bytes(tmp_path / "a.npz", b"whole")
    assert (tmp_path / "a.npz").read_bytes() == b"whole"
    assert names(tmp_path) == ["a.npz"]


def test_arrays_come_back(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    files.write_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    for compress in (False, True):
        files.write_arrays(tmp_path / "b.npz", compress=compress, first=array, second=array[0])
        with np.load(tmp_path / "b.npz") as stored:
            assert set(stored) == {"first", "second"}
            np.testing.assert_array_equal(stored["first"], array)
    assert names(tmp_path) == ["a.npy", "b.npz"]


def test_a_directory_appears_at_the_end_with_the_rights_of_any_other(tmp_path):
    target = tmp_path / "deep" / "model"
    with files.staged_directory(target) as staged:
        (staged / "a").write_text("a")
        assert staged.parent == target.parent
        assert not target.exists()
    assert names(tmp_path) == ["a", "deep", "model"]
    (tmp_path / "other").mkdir()
    rights = [stat.S_IMODE(path.stat().st_mode) for path in (target, tmp_path / "other")]
    assert rights[0] == rights[1]


def test_a_directory_replaces_the_one_before_whole(tmp_path):
    target = tmp_path / "model"
    for content in "ab":
        with files.staged_directory(target) as staged:
            (staged / content).write_text(content)
    assert names(tmp_path) == ["b", "model"]


def test_a_directory_whose_writing_stops_is_as_it_was(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("a")

    def write():
        with files.staged_directory(target) as staged:
            (staged / "b").write_text("b")
            raise Stopped

    with pytest.raises(Stopped):
        write()
    assert names(tmp_path) == ["a", "model"]


def test_the_directory_before_comes_back_if_the_new_one_cannot_take_its_place(tmp_path):
    target, missing = tmp_path / "model", tmp_path / "missing"
    target.mkdir()
    (target / "a").write_text("a")
    with pytest.raises(FileNotFoundError):
        files.replace_directory(target, missing)
    assert names(tmp_path) == ["a", "model"]
