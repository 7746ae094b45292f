"""Array records: what was written is what is read, a killed run continues, damage is repaired."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from llave_jax.data import prepare
from llave_jax.data.image_store import ImageStore
from llave_jax.data.row_forms import FIELDS
from llave_jax.data.rows import RowError
from llave_jax.data.skips import SkipLog, TooManySkips
from llave_jax.data.sources import IMAGES, MmebSource, open_source
from llave_jax.inputs.images import ImageError
from tests.data.mmeb_tree import encode, make_tree, picture

TOOL = Path(__file__).parents[2] / "tools/prepare_data.py"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mmeb") / "tree"
    make_tree(root, 10)
    return root


def open_tree(tree: Path, **options) -> MmebSource:
    return open_source(tree, subsets=["CIRR", "WebQA"], **options)


def run(source, output, **options):
    prepare.prepare(source, output, **{"split": "original", "rows_per_shard": 4, **options})


def files_of(output: Path) -> dict[str, int]:
    return {
        str(path.relative_to(output)): path.stat().st_mtime_ns
        for path in sorted(output.rglob("mmeb_train-*"))
    }


def test_records_are_the_rows_also_without_this_package(tree, tmp_path, in_process):
    source = open_tree(tree)
    run(source, tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "CIRR")
    assert builder.info.splits["original"].num_examples == 10
    records = builder.as_data_source(split="original")
    for number in range(10):
        row, images = source.read(number)
        record = records[number]
        assert record["row"] == number
        assert [record[field].decode() for field in FIELDS] == [*row][:-1]
        assert [record[name] for name in IMAGES] == list(images)
        assert record.keys() == {"row", *FIELDS, *IMAGES}
    assert "tensorflow" not in sys.modules
    assert not list(tmp_path.rglob("*.partial"))


def test_a_second_run_keeps_complete_shards_and_repairs_damaged_ones(tree, tmp_path, in_process):
    source = open_tree(tree)
    run(source, tmp_path)
    before = files_of(tmp_path)
    run(source, tmp_path)
    assert files_of(tmp_path) == before
    name = "CIRR/mmeb_train-original.array_record-00001-of-00003"
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[len(damaged) // 3] ^= 1
    (tmp_path / name).write_bytes(bytes(damaged))
    (tmp_path / "WebQA/mmeb_train-original.array_record-00000-of-00003.json").unlink()
    run(source, tmp_path)
    after = files_of(tmp_path)
    changed = {name.removesuffix(".json") for name in before if before[name] != after[name]}
    assert changed == {name, "WebQA/mmeb_train-original.array_record-00000-of-00003"}
    prepared = open_source(tmp_path)
    for i in range(20):
        assert prepared[i].query.images == source[i].query.images


def test_an_interrupted_shard_does_not_appear(tree, tmp_path, in_process, monkeypatch):
    source = open_tree(tree)
    read = ImageStore.read
    calls = iter(range(100))

    def interrupted(self, *arguments):
        if next(calls) == 12:
            raise KeyboardInterrupt
        return read(self, *arguments)

    monkeypatch.setattr(ImageStore, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path)
    shards = [path for path in tmp_path.rglob("mmeb_train-*") if path.suffix != ".json"]
    assert len(shards) == 1  # rows 0 to 3 of CIRR take 12 - 1 images; row 4 stops
    assert all(path.with_name(path.name + ".json").exists() for path in shards)
    with pytest.raises(FileNotFoundError, match="no training data"):
        open_source(tmp_path)
    monkeypatch.setattr(ImageStore, "read", read)
    run(source, tmp_path)
    assert len(open_source(tmp_path)) == 20


def test_other_rows_do_not_mix_with_those_that_are_there(tree, tmp_path, in_process):
    run(open_tree(tree), tmp_path)
    with pytest.raises(ValueError, match="these rows make 2 shards"):
        run(open_tree(tree, max_rows=6), tmp_path)
    rows = [json.loads(json.dumps(open_tree(tree).row(i)._asdict())) for i in range(10)]
    rows[5]["qry"] = "something else"
    other = tmp_path / "other"
    other.mkdir()
    (other / "CIRR.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="00001-of-00003 holds other rows"):
        run(open_source(other, image_root=tree), tmp_path)


def test_two_splits_share_a_folder(tree, tmp_path, in_process):
    source = open_tree(tree)
    run(source, tmp_path)
    run(open_tree(tree, max_rows=6), tmp_path, split="diverse_instruction")
    assert len(open_source(tmp_path)) == 20
    assert len(open_source(tmp_path, split="diverse_instruction")) == 12


def test_an_index_of_an_older_version_is_made_anew(tree, tmp_path, in_process):
    source = open_tree(tree)
    run(source, tmp_path)
    before = files_of(tmp_path)
    index = tmp_path / "CIRR/rows-original.npz"
    with np.load(index) as content:
        older = {name: content[name] for name in ("row", "digest")}
    np.savez(index, **older)
    prepared = open_source(tmp_path)
    assert prepared.contents().tolist() == [source.digest(i) for i in range(20)]
    with pytest.raises(
        ValueError, match=r"CIRR/original was prepared .* run tools/prepare_data.py"
    ):
        prepared.queries()
    run(source, tmp_path)
    assert files_of(tmp_path) == before
    np.testing.assert_array_equal(open_source(tmp_path).queries(), source.queries())


def test_rows_with_an_empty_side_are_left_out_alike(tree, tmp_path, in_process):
    """Of parquet and of records made of it, there are the same pairs in the same order."""
    folder = tmp_path / "tree/WebQA"
    folder.mkdir(parents=True)
    (tmp_path / "tree/images").symlink_to(tree / "images")
    paths = sorted((tree / "WebQA").glob("*.parquet"))
    rows = [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]
    rows[3]["qry"] = "  "
    rows[8] |= {"pos_text": None, "pos_image_path": None}
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "original-00000-of-00001.parquet")
    source = open_source(tmp_path / "tree")
    run(source, tmp_path / "out")  # on_error is "raise": such rows are no error
    prepared = open_source(tmp_path / "out")
    assert prepared.left_out == {"WebQA": [3, 8]} == {n: [*r] for n, r in source.left_out.items()}
    assert prepared.subsets == source.subsets == {"WebQA": range(8)}
    for i in range(8):
        assert prepared.pair_id(i) == source.pair_id(i)
        assert prepared.digest(i) == source.digest(i)
        assert prepared[i].query.images == source[i].query.images == (None,)
        assert prepared[i].target.text == source[i].target.text
    facts = (source.contents(), *source.queries())
    for found, expected in zip((prepared.contents(), *prepared.queries()), facts, strict=True):
        np.testing.assert_array_equal(found, expected)
    capped = open_source(tmp_path / "out", max_rows=8)
    assert (capped.left_out, len(capped)) == ({"WebQA": [3]}, 7)


@pytest.fixture
def broken(tmp_path) -> MmebSource:
    """Rows 1 (no text), 4 (image gone), 6 (image cut) of 9 cannot be used."""
    data = encode(picture(np.random.default_rng(0), 30, 30), "PNG")
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "good.png").write_bytes(data)
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    images = {4: "gone.png", 6: "cut.png"}
    rows = [
        {
            "qry": "" if n == 1 else f"q{n}",
            "qry_image_path": "",
            "pos_text": "t",
            "pos_image_path": images.get(n, "good.png"),
        }
        for n in range(9)
    ]
    (folder / "Mine.json").write_text(json.dumps(rows))
    return open_source(folder / "Mine.json")


def test_broken_rows_stop_the_preparation_by_name(broken, tmp_path, in_process):
    with pytest.raises((RowError, ImageError), match=r"Mine.json row (1|4|6)"):
        run(broken, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("dataset_info.json"))


def test_skipped_rows_are_left_out_and_listed(broken, tmp_path, in_process):
    skips = SkipLog(tmp_path / "out/skipped.jsonl", limit=3)
    run(broken, tmp_path / "out", skips=skips)
    prepared = open_source(tmp_path / "out")
    kept = [n for n in range(9) if n not in (1, 4, 6)]
    assert [prepared.pair_id(i) for i in range(6)] == [f"Mine:{n}" for n in kept]
    assert [prepared[i].query.text for i in range(6)] == [f"q{n}" for n in kept]
    lines = [json.loads(line) for line in skips.path.read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [1, 4, 6]
    facts = (broken.contents(), *broken.queries())
    for found, expected in zip((prepared.contents(), *prepared.queries()), facts, strict=True):
        np.testing.assert_array_equal(found, expected[kept])
    capped = open_source(tmp_path / "out", max_rows=5)
    assert len(capped.contents()) == len(capped.queries()[0]) == 3
    assert [capped.pair_id(i) for i in range(len(capped))] == ["Mine:0", "Mine:2", "Mine:3"]


def test_too_many_skipped_rows_stop(broken, tmp_path, in_process):
    with pytest.raises(TooManySkips, match=r"skipped.jsonl"):
        run(broken, tmp_path / "out", skips=SkipLog(tmp_path / "skipped.jsonl", limit=2))


def test_images_are_only_read_if_they_are_trusted(broken, tmp_path, in_process):
    skips = SkipLog(tmp_path / "skipped.jsonl", limit=3)
    run(broken, tmp_path / "out", skips=skips, check_images=False)
    assert len(open_source(tmp_path / "out")) == 7  # the cut image is not noticed
    assert len(skips) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "[]",
        lambda text: text.replace('"rows": [0', '"rows": [1'),
        lambda text: text.replace('"digests": ["', '"digests": ["0'),
        lambda text: text.replace('"skipped": []', '"skipped": [[0, "why"]]'),
    ],
)
def test_a_record_that_was_changed_is_not_believed(tree, tmp_path, in_process, damage, caplog):
    source = open_source(tree, subsets=["WebQA"])
    run(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    record = min((tmp_path / "out").rglob("mmeb_train-*.json"))
    text = record.read_text()
    assert damage(text) != text
    record.write_text(damage(text))
    run(source, tmp_path / "out")
    assert record.read_text() == text
    assert files_of(tmp_path / "out").keys() == before.keys()
    assert "written again" in caplog.text


@pytest.mark.slow
def test_faults_of_a_command_with_workers(tmp_path):
    """A second command, a full disk, a signal and a kill: each ends as it should, and nothing is left."""
    make_tree(tmp_path / "tree", 300)
    out, whole = tmp_path / "out", tmp_path / "whole"

    def start(output, limit=None):
        resource = pytest.importorskip("resource")
        command = [sys.executable, TOOL, "--input", tmp_path / "tree", "--rows-per-shard", "5"]
        process = subprocess.Popen(
            [*command, "--num-workers", "2", "--output", output],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if limit is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        return process

    def at_work(process):
        """Waits until workers write, and returns them."""
        before = len(list(out.rglob("mmeb_train-*.json")))
        while len(list(out.rglob("mmeb_train-*.json"))) < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
        return psutil.Process(process.pid).children(recursive=True)

    full = start(out, limit=1000)
    _, errors = full.communicate()
    assert full.returncode == 2
    assert re.search(r"error: .*array_record-\d+-of-\d+: a file must not grow so large", errors)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = start(out)
        children = at_work(process)
        if number == signal.SIGINT:
            os.killpg(process.pid, signal.SIGSTOP)
            second = start(out)
            assert f"is writing to it: process {process.pid} on" in second.communicate()[1]
            assert second.returncode == 2
            os.killpg(process.pid, signal.SIGCONT)
        # As a terminal and a scheduler do, to all processes.
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)
        _, errors = process.communicate()
        psutil.wait_procs(children, timeout=30)
        assert not [child for child in children if child.is_running()]
        assert "Traceback" not in errors
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    for output in (out, whole):
        assert start(output).wait() == 0
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert {path.relative_to(out) for path in out.rglob("*")} == {
        path.relative_to(whole) for path in whole.rglob("*")
    }
    # A record's fields have no fixed order in its bytes.
    a, b = open_source(out), open_source(whole)
    assert len(a) == len(b) == 2100
    for i in range(0, 2100, 7):
        assert [(x.text, x.images) for x in (a[i].query, a[i].target)] == [
            (x.text, x.images) for x in (b[i].query, b[i].target)
        ]


@pytest.mark.slow
def test_a_killed_command_is_continued(tree, tmp_path):
    command = [sys.executable, TOOL, "--input", tree, "--rows_per_shard", "1", "--num_workers", "2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, "--output", killed], start_new_session=True)
    while not list(killed.rglob("mmeb_train-*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(killed.rglob("dataset_info.json"))
    before = files_of(killed)
    subprocess.run([*command, "--output", killed], check=True)
    subprocess.run([*command, "--output", whole], check=True)
    after = files_of(killed)
    assert set(before) <= set(after) == set(files_of(whole))
    a, b = open_source(killed), open_source(whole)
    assert len(a) == len(b) == 70
    for i in range(70):
        assert [x.images for x in (a[i].query, a[i].target)] == [
            x.images for x in (b[i].query, b[i].target)
        ]
