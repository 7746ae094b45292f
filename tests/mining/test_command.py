"""`python -m llave_jax.mine` with a model: rows of texts and of images only."""

import json

import numpy as np
import PIL.Image
import pytest

from llave_jax import mine
from llave_jax.embedding.embedder import Embedder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"images/{i}.png")
    (folder / "images/2.png").write_bytes((folder / "images/1.png").read_bytes())
    rows = [("", f"images/{i}.png", f"caption {i}", "") for i in range(3)]
    # Images only, one of them twice under two names.
    rows += [("", f"images/{i}.png", "", f"images/{(i + 1) % 3}.png") for i in range(3)]
    with (folder / "pairs.jsonl").open("w") as file:
        for row in rows:
            fields = ("qry", "qry_image_path", "pos_text", "pos_image_path")
            file.write(json.dumps(dict(zip(fields, row, strict=True))) + "\n")
    return folder


def flags(golden_model, data, output, *more):
    return [
        *("--model", str(golden_model.directory), "--data", str(data), "--output", str(output)),
        *("--relative", "1", "--negatives", "9", *more),
    ]


def test_scores_are_those_of_the_model(golden_model, data, tmp_path, capsys):
    assert mine.main(flags(golden_model, data, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert f"--config.data.image_root={data.absolute()}" in said
    rows = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").open()]
    assert len(rows) == 6
    model = Embedder.from_pretrained(golden_model.directory)

    def embed(text, path):
        return model.encode({"text": text, "image": data / path} if path else text)

    found = 0
    for row in rows:
        query = embed(row["qry"], row["qry_image_path"])
        positive = query @ embed(row["pos_text"], row["pos_image_path"])
        negatives = list(zip(row["neg_text"], row["neg_image_path"], strict=True))
        scores = [query @ embed(*negative) for negative in negatives]
        # Written with six digits; batches of another shape sum in another order.
        np.testing.assert_allclose(row["pos_scores"], [positive], atol=2e-5)
        np.testing.assert_allclose(row["neg_scores"], scores, atol=2e-5)
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
        assert all(score < row["pos_scores"][0] for score in row["neg_scores"])
        found += len(negatives)
    assert found
    # The second and the third picture are one content: its captions are positives of both rows.
    for row in rows[1:3]:
        assert not {"caption 1", "caption 2"} & set(row["neg_text"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ranks", "9:3"], "expected FIRST:END"),
        (["--margin", "0.1"], "not allowed with argument"),
        (["--memory", "0"], "--memory is 0"),
        (["--negatives", "0"], "negatives is 0"),
        (["--subsets", "others"], "no subsets"),
    ],
)
def test_mistakes_are_named(golden_model, data, tmp_path, capsys, more, message):
    try:
        status = mine.main(flags(golden_model, data, tmp_path / "out", *more))
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
