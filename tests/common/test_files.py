"""Files and directories appear whole or not at all, and leave nothing else behind."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llave_jax.common import files, locks

# A process that writes in several ways, says so, and waits.
WRITER = """
import sys
from pathlib import Path
from llave_jax.common import files, locks

root = Path(sys.argv[1])
(root / "model").mkdir()
(root / "model/old").write_text("old")
with (
    files.atomic_file(root / "a.txt") as file,
    files.scratch_directory(root / "digits") as scratch,
    files.scratch_directory(root / "model") as staged,
    locks.only_writer(root / "out"),
    locks.only_writer(root / "beside", inside=False),
):
    file.write_text("half")
    (scratch / "b").write_text("half")
    (staged / "new").write_text("new")
    rename = Path.rename
    def stop(path, target):
        rename(path, target)
        print("ready", flush=True)
        sys.stdin.read()
    Path.rename = stop
    files.replace_directory(root / "model", staged)
"""


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


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing to `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path, writer
):
    before = names(tmp_path)
    files.remove_abandoned(tmp_path)
    with files.scratch_directory(tmp_path / "digits"):
        pass
    assert names(tmp_path) == before
    for output, inside in (("out", True), ("beside", False)):
        message = rf"{output}: another job is writing to it: process {writer.pid} on "
        with (
            pytest.raises(locks.OutputInUse, match=message),
            locks.only_writer(tmp_path / output, inside=inside),
        ):
            pass
    # Another one may write the same file; the last one to finish wins.
    files.write_text(tmp_path / "a.txt", "ours")
    assert (tmp_path / ".a.txt.partial").read_text() == "half"

    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "model").exists()
    with files.scratch_directory(tmp_path / "model"):
        assert names(tmp_path / "model") == ["old"]
    with files.scratch_directory(tmp_path / "digits"):
        pass
    for output, inside in (("out", True), ("beside", False)):
        with locks.only_writer(tmp_path / output, inside=inside):
            pass
    files.remove_abandoned(tmp_path)
    assert names(tmp_path) == ["a.txt", "model", "old", "out"]
    assert (tmp_path / "a.txt").read_text() == "ours"


def test_what_was_replaced_is_removed_after_a_kill(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / ".model.0.replaced").mkdir()
    with files.staged_directory(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]


FULL = """
import resource, signal, sys
import numpy as np, safetensors.numpy
from llave_jax.common import files

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    exec(sys.argv[1])
except files.DiskFull as error:
    print(error)
"""


@pytest.mark.parametrize(
    "write",
    [
        'files.write_bytes("out.bin", bytes(200_000))',
        'files.write_arrays("out.npz", a=np.zeros(100_000))',
        'with files.atomic_file("out") as path: safetensors.numpy.save_file({"a": np.zeros(100_000)}, path)',
        'with files.staged_directory("out") as path: (path / "a").write_bytes(bytes(200_000))',
    ],
)
def test_a_file_without_room_is_named_and_leaves_nothing(tmp_path, write):
    (tmp_path / "before").write_text("stays")
    run = subprocess.run(
        [sys.executable, "-c", FULL, write],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = run.stdout.splitlines()
    assert line.split(":")[0].endswith(write.split('"')[1])
    assert "must not grow so large" in line
    assert "make room and run the same command again" in line
    assert names(tmp_path) == ["before"]
