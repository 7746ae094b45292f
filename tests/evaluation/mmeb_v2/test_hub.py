"""Tables of the hub are found and read in every layout; what is missing or damaged is named."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData

ROWS = [
    {
        "id": number,
        "text": f"row é {number}",
        "image": {"bytes": bytes([number] * 50), "path": None},
    }
    for number in range(23)
]
PLAIN = [{"id": row["id"], "text": row["text"]} for row in ROWS]
README = """---
configs:
- config_name: other
  data_files: other.parquet
- config_name: pages
  data_files:
  - split: train
    path: odd/a*
  - split: test
    path:
    - odd/b*
    - odd/c.parquet
---
# A dataset
"""


def parquet(path: Path, rows, group: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def arrow(folder: Path, rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The order is that of the state, not of the names.
    for name, part in (("z.arrow", rows[:9]), ("a.arrow", rows[9:])):
        table = pa.Table.from_pylist(part, schema=pa.Table.from_pylist(rows).schema)
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    files = [{"filename": "z.arrow"}, {"filename": "a.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "test"}))
    (folder / "dataset_info.json").write_text("{}")


def shards(folder: Path, form: str = "test-{:05}-of-00002.parquet") -> None:
    parquet(folder / form.format(0), ROWS[:12])
    parquet(folder / form.format(1), ROWS[12:])


def decoy(folder: Path) -> None:
    parquet(folder / "train-00000-of-00001.parquet", ROWS[:1])


def declared(root: Path) -> None:
    folder = root / "Owner/Name"
    parquet(folder / "odd/a.parquet", ROWS[:1])
    parquet(folder / "odd/b.parquet", ROWS[:4])
    parquet(folder / "odd/c.parquet", ROWS[4:])
    parquet(folder / "pages/test.parquet", ROWS[:2])
    (folder / "README.md").write_text(README)


def cached(root: Path) -> None:
    folder = root / "datasets--Owner--Name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc\n")
    shards(folder / "snapshots/abc/pages")
    parquet(folder / "snapshots/fff/pages/test-0.parquet", ROWS[:2])


def saved_dict(root: Path) -> None:
    folder = root / "annotation/Owner/Name/pages"
    arrow(folder / "test", ROWS)
    arrow(folder / "train", ROWS[::2])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def json_lines(root: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in PLAIN)
    (root / "Name/pages").mkdir(parents=True)
    (root / "Name/pages/test.jsonl").write_text(lines)


def json_list(root: Path) -> None:
    (root / "Name/json").mkdir(parents=True)
    (root / "Name/json/pages.json").write_text(json.dumps(PLAIN))


LAYOUTS = {
    "clone": lambda root: (shards(root / "Owner/Name/pages"), decoy(root / "Owner/Name/pages")),
    "clone below data": lambda root: shards(root / "Name/data/pages"),
    "clone, folders of splits": lambda root: shards(root / "Name/pages/test", "{:04}.parquet"),
    "declared": declared,
    "cache": cached,
    "saved": lambda root: arrow(root / "annotation/Owner/Name/pages", ROWS),
    "saved dict": saved_dict,
    "local": lambda root: shards(root / "visdoc-tasks/Name/pages"),
    "without splits": lambda root: shards(root / "Name/pages", "part{}.parquet"),
    "JSON lines": json_lines,
    "JSON": json_list,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_is_read_alike_in_every_layout(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    table = HubData(tmp_path).table("Owner/Name", "pages", "test", ["visdoc-tasks/Name"])
    assert len(table) == len(ROWS)
    assert table.rows("id", "text") == PLAIN
    assert table.rows("text", first=7) == [{"text": row["text"]} for row in ROWS[:7]]
    if "image" in table.columns:
        assert [table.cell(row, "image") for row in range(23)] == [row["image"] for row in ROWS]
    else:
        assert layout.startswith("JSON")


def test_a_dataset_without_configs(tmp_path):
    shards(tmp_path / "Owner/Name/data")
    decoy(tmp_path / "Owner/Name/data")
    assert HubData(tmp_path).table("Owner/Name", None, "test").rows("id", "text") == PLAIN


@given(st.lists(st.tuples(st.integers(0, 22), st.sampled_from(["id", "image"])), max_size=20))
def test_cells_in_any_order(tmp_path_factory, asked):
    root = tmp_path_factory.getbasetemp() / "cells"
    if not root.exists():
        shards(root / "Name/pages")
    table = HubData(root).table("Owner/Name", "pages", "test")
    for row, column in asked:
        assert table.cell(row, column) == ROWS[row][column]


def test_what_is_missing_or_damaged_is_named(tmp_path):
    data = HubData(tmp_path)
    assert data.find("Owner/Name", "pages", "test") is None
    folder = tmp_path / "Owner/Name"
    command = f"hf download Owner/Name --repo-type dataset --local-dir {folder}"
    with pytest.raises(FileNotFoundError, match=re.escape(command)):
        data.table("Owner/Name", "pages", "test")
    shards(folder / "pages")
    with pytest.raises(ValueError, match=r"pages: has no column 'score'; found id, text, image"):
        data.table("Owner/Name", "pages", "test").rows("score")
    first = folder / "pages/test-00000-of-00002.parquet"
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{first.name}: not a parquet file that can be read"):
        data.table("Owner/Name", "pages", "test")
    first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=f"{first.name}: is a pointer of Git LFS"):
        data.table("Owner/Name", "pages", "test")


def test_a_saved_dataset_that_lacks_a_file_is_named(tmp_path):
    folder = tmp_path / "annotation/Owner/Name"
    arrow(folder, ROWS)
    (folder / "a.arrow").unlink()
    with pytest.raises(ValueError, match=r"state.json: names .*a.arrow, which does not exist"):
        HubData(tmp_path).table("Owner/Name", None, "test")
    state = {"_data_files": [{"filename": "../../../secret.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state.json: expected .* leaves"):
        HubData(tmp_path).table("Owner/Name", None, "test")


def test_a_readme_does_not_lead_out_of_its_repository(tmp_path):
    parquet(tmp_path / "secret.parquet", ROWS)
    (tmp_path / "Owner/Name").mkdir(parents=True)
    text = README.replace("odd/b*", "../../secret.parquet").replace("odd/c.parquet", "/etc/*")
    (tmp_path / "Owner/Name/README.md").write_text(text)
    assert HubData(tmp_path).find("Owner/Name", "pages", "test") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": 1}\n{"a": \n', "line 2: not a JSON object"), ("[1]", "row 0: expected an object")],
)
def test_a_malformed_line_is_named(tmp_path, content, message):
    (tmp_path / "Name").mkdir()
    (tmp_path / "Name/test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        HubData(tmp_path).table("Owner/Name", None, "test")
