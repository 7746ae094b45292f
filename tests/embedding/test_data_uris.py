"""An image itself, in place of its path, in rows and items: refused in a few words, whatever its size."""

import base64
import json

import numpy as np
import pytest

from llave_jax import Embedder, embed, inspect_data
from llave_jax.data.image_store import ImageStore
from llave_jax.inputs.images import ImageError, load_image

ADVICE = "a data URI; expected a path: write the image to a file and name that"


@pytest.fixture(scope="module")
def uri():
    content = np.random.default_rng(0).bytes(5 << 20)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_in_python(uri, tmp_path, golden_model):
    for read in (load_image, ImageStore(tmp_path).read):
        with pytest.raises(ImageError, match=ADVICE) as raised:
            read(uri, "row 3")
        assert str(raised.value).startswith(f"row 3 ({uri[:50]}")
        assert len(str(raised.value)) < 300
    model = Embedder.from_pretrained(golden_model.directory)
    # There it is one of the forms of an image, and this one is no image.
    with pytest.raises(ValueError, match="item 0: not an image of a known format") as raised:
        model.encode([{"image": uri}])
    assert len(str(raised.value)) < 300


def test_in_items(uri, tmp_path, golden_model, capsys):
    (tmp_path / "items.jsonl").write_text(json.dumps({"image": uri}) + '\n{"text": "a cat"}\n')
    arguments = ["--model", golden_model.directory, "--input", tmp_path / "items.jsonl"]
    command = [*map(str, arguments), "--output"]
    assert embed.main([*command, str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "items.jsonl:1" in error
    assert ADVICE in error
    assert len(error) < 500
    assert embed.main([*command, str(tmp_path / "b"), "--on-error", "skip"]) == 0
    (skipped,) = (tmp_path / "b" / "skipped.jsonl").read_text().splitlines()
    assert ADVICE in json.loads(skipped)["reason"]
    assert sum(path.stat().st_size for path in (tmp_path / "b").iterdir()) < 10_000


@pytest.mark.parametrize("kind", ["uri", "empty sides", "no row"])
def test_rows_of_which_none_can_be_used(uri, tmp_path, golden_model, capsys, kind):
    row = {"qry": "<|image_1|>\nFind", "qry_image_path": uri, "pos_text": "a", "pos_image_path": ""}
    rows, said = {
        "uri": ([row] * 3, ADVICE),
        "empty sides": (
            [row | {"qry": "", "qry_image_path": ""}] * 3,
            "the query has neither text",
        ),
        "no row": ([], "have no rows"),
    }[kind]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = ["--config", "finetune", f"--config.model.path={golden_model.directory}"]
    config += [f"--config.data.path={tmp_path / 'rows.json'}", "--workdir", str(tmp_path / "look")]
    assert inspect_data.main(config) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert len(error) < 1700
