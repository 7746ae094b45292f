"""MMEB's reading, scoring, averages and files, against the recorded results and by themselves."""

import json
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llave_jax.evaluation import published
from llave_jax.evaluation.benchmarks import mmeb
from llave_jax.evaluation.benchmarks.mmeb import MMEB_DATASETS
from llave_jax.evaluation.cache import EmbeddingCache
from llave_jax.evaluation.output import read_scores
from llave_jax.evaluation.results import Results
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.task import TaskInfo
from llave_jax.inputs.content import item_key
from llave_jax.inputs.images import ImageError
from llave_jax.inputs.item import Item
from tests.evaluation.fake_encoder import HashEncoder, hash_vector
from tests.evaluation.mmeb_eval_tree import predictions, score_mmeb


def recorded_encoder(golden):
    """The authors' embeddings of golden/eval, by content."""
    arrays = np.load(golden / "eval/embeddings.npz")
    store = mmeb.open_images(golden / "eval")
    table = {}
    for name in ("TinyCls", "TinyT2I"):
        dataset = mmeb.read_rows(golden / "eval", name)
        for row in range(len(dataset)):
            ids = [dataset.query_ids[row], *dataset.target_ids[row]]
            vectors = [arrays[f"{name}/qry"][row], *arrays[f"{name}/tgt"][row]]
            for index, vector in zip(ids, vectors, strict=True):
                table[item_key(mmeb.make_item(dataset, index, store))] = vector
    return lambda items: np.stack([table[item_key(item)] for item in items])


def test_recorded_results_are_reproduced(golden, tmp_path):
    results = score_mmeb(recorded_encoder(golden), golden / "eval", None, tmp_path)
    expected = json.loads((golden / "eval/results.json").read_text())["results"]
    scores = np.load(golden / "eval/embeddings.npz")
    assert [result.info.name for result in results.tasks] == ["TinyCls", "TinyT2I"]
    for name, values in expected.items():
        result = results[name]
        assert predictions(golden / "eval", result) == values["pred_index"]
        # A sum of 64 products of float32: a few units in the last place of 1.
        np.testing.assert_allclose(
            np.stack(result.answers.all_scores), scores[f"{name}/scores"], atol=5e-7
        )
        written = json.loads((tmp_path / f"{name}_score.json").read_text())
        assert written == {key: values[key] for key in ("acc", "num_correct", "num_pred")}
        lines = (tmp_path / f"{name}_predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["predicted"] for line in lines] == values["pred"]
        again = read_scores(tmp_path / f"{name}_scores.npz")
        assert all(
            np.array_equal(a, b) for a, b in zip(again, result.answers.all_scores, strict=True)
        )


def test_recorded_unique_counts(golden):
    for name, values in json.loads((golden / "eval/results.json").read_text())["results"].items():
        dataset = mmeb.read_rows(golden / "eval", name)
        assert len(np.unique(dataset.query_ids)) == values["n_unique_queries"]
        assert len(np.unique(np.concatenate(dataset.target_ids))) == values["n_unique_targets"]


def test_parquet_and_json_are_the_same(golden, tmp_path):
    for name in ("TinyCls", "TinyT2I"):
        (tmp_path / f"{name}.json").write_bytes((golden / f"eval/{name}.json").read_bytes())
        parquet = mmeb.read_rows(golden / "eval", name)
        as_json = mmeb.read_rows(tmp_path, name)
        assert parquet.contents == as_json.contents
        assert np.array_equal(parquet.query_ids, as_json.query_ids)
        assert all(map(np.array_equal, parquet.target_ids, as_json.target_ids))


@pytest.mark.parametrize("prefix", ["", "images/", "mmeb/eval_images/"])
def test_images_from_an_archive(golden, tmp_path, prefix):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((golden / "eval/images").glob("*/*.png")):
            archive.write(path, prefix + path.relative_to(golden / "eval/images").as_posix())
    for name in ("TinyCls", "TinyT2I"):
        (tmp_path / f"{name}.json").write_bytes((golden / f"eval/{name}.json").read_bytes())
    encode = recorded_encoder(golden)
    from_folder = score_mmeb(encode, golden / "eval")
    from_archive = score_mmeb(encode, tmp_path)
    assert from_archive.table() == from_folder.table()


def write_rows(root, name, rows):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.json").write_text(json.dumps(rows))


def row(query, targets, query_image="", images=None):
    return {
        "qry_text": query,
        "qry_img_path": query_image,
        "tgt_text": targets,
        "tgt_img_path": images or [""] * len(targets),
    }


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9), min_size=1))
def test_first_maximum_wins_and_repeats_tie(tmp_path_factory, lists):
    root = tmp_path_factory.mktemp("rows")
    write_rows(root, "Own", [row(f"query {i}", texts) for i, texts in enumerate(lists)])
    result = score_mmeb(HashEncoder(), root)["Own"]
    chosen = predictions(root, result)
    for number, texts in enumerate(lists):
        query = hash_vector(item_key(Item(f"query {number}")))
        score = {text: float(query @ hash_vector(item_key(Item(text)))) for text in set(texts)}
        best = max(score, key=score.get)
        assert chosen[number] == texts.index(best)
        ties = {text: result.answers.all_scores[number][np.array(texts) == text] for text in texts}
        assert all(len(set(values.tolist())) == 1 for values in ties.values())
    expected = np.mean([1 / len(set(texts)) for texts in lists])
    assert result.chance == pytest.approx(expected)


def test_each_content_is_encoded_once_across_datasets(tmp_path):
    pixels = PIL.Image.new("RGB", (4, 4), "red")
    for path in ("A/one.png", "B/same.png"):
        (tmp_path / "images" / path).parent.mkdir(parents=True)
        pixels.save(tmp_path / "images" / path)
    write_rows(tmp_path, "A", [row("q", ["x", "y", "x"], "A/one.png"), row("q2", ["y", "z"])])
    write_rows(tmp_path, "B", [row("q", ["y", "new"], "B/same.png")])
    encode = HashEncoder()
    score_mmeb(encode, tmp_path)
    # "q" with the red picture is one item in both, and "y" too.
    assert len(encode.keys) == len(set(encode.keys)) == 6


def test_a_marker_without_an_image_holds_the_zero_picture(tmp_path):
    """As in the queries of WebQA and EDIS."""
    rows = [row("<|image_1|>\nFind a Wikipedia image: who?", ["t", "<|image_1|>\nIt."])]
    write_rows(tmp_path, "WebQA", rows)
    dataset = mmeb.read_rows(tmp_path, "WebQA")
    store = mmeb.open_images(tmp_path)
    query, *targets = (mmeb.make_item(dataset, i, store) for i in range(3))
    assert [item.images for item in (query, *targets)] == [(None,), (), (None,)]
    assert item_key(query) != item_key(Item(query.text))
    result = score_mmeb(HashEncoder(), tmp_path)["WebQA"]
    assert result.queries == 1


def test_one_text_for_a_list_of_images_and_null_cells(tmp_path):
    rows = [row("q", "", images=["a.png", "b.png"])]
    rows += [row(None, ["t", "u"], images=[None, None], query_image="a.png")]
    write_rows(tmp_path, "Own", rows)
    dataset = mmeb.read_rows(tmp_path, "Own")
    assert [dataset.contents[i] for i in dataset.target_ids[0]] == [("", "a.png"), ("", "b.png")]
    assert dataset.contents[dataset.query_ids[1]] == ("", "a.png")


def test_what_is_empty_is_skipped_and_counted(tmp_path, caplog):
    rows = [
        row("", ["a", "b"]),
        row("q", ["a", "", " \n", "b", None], images=["", "", "", "", None]),
        row("q", ["", "b"]),
        row("q", ["a", "b"]),
    ]
    write_rows(tmp_path, "Own", rows)
    dataset = mmeb.read_rows(tmp_path, "Own")
    assert dataset.row_numbers.tolist() == [1, 3]
    assert [[dataset.contents[i].text for i in ids] for ids in dataset.target_ids] == [
        ["a", "b"]
    ] * 2
    results = score_mmeb(HashEncoder(), tmp_path, None, tmp_path / "out")
    result = results["Own"]
    assert (result.queries, result.skipped_queries, result.skipped_candidates) == (2, 2, 3)
    assert "Own: skipped 2 of 4 rows whose query or positive has neither text nor" in caplog.text
    assert "Skipped, with neither text nor image: Own 2 rows, 3 candidates." in results.table()
    lines = (tmp_path / "out/Own_predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [1, 3]
    write_rows(tmp_path, "Own", rows[:1])
    with pytest.raises(ValueError, match=r"Own.json: has no rows whose query and positive are not"):
        mmeb.read_rows(tmp_path, "Own")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("q", ["a"]), row("q", [])], "row 1.*at least 1"),
        ([row("q", ["a", "b"], images=[""])], "row 0.*one length"),
        ([{"qry_text": "q"}], "row 0.*expected an object"),
        ([row("q", ["a", 3])], "row 0.*must be strings"),
        ([], "has no rows"),
    ],
)
def test_malformed_rows_are_named(tmp_path, rows, message):
    write_rows(tmp_path, "Own", rows)
    with pytest.raises(ValueError, match=message):
        mmeb.read_rows(tmp_path, "Own")


def test_missing_parquet_column_is_named(tmp_path):
    (tmp_path / "Own").mkdir()
    pq.write_table(pa.table({"qry_text": ["a"]}), tmp_path / "Own/test-0.parquet")
    with pytest.raises(ValueError, match=r"missing columns.*qry_img_path"):
        mmeb.read_rows(tmp_path, "Own")


def test_missing_data_is_named(tmp_path):
    write_rows(tmp_path, "Own", [row("q", ["a"], "Own/lost.png")])
    with pytest.raises(
        ImageError, match=r"Own.json: row 0 \(Own/lost.png\): the file does not exist"
    ):
        score_mmeb(HashEncoder(), tmp_path)
    with pytest.raises(FileNotFoundError, match="present: Own"):
        mmeb.read_rows(tmp_path, "GQA")
    with pytest.raises(FileNotFoundError, match="no datasets"):
        score_mmeb(HashEncoder(), tmp_path / "..", [])


def test_images_outside_the_root_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    write_rows(tmp_path, "Own", [row("q", ["a"], "../secret.png")])
    with pytest.raises(ValueError, match=r"Own.json: row 0: image path '../secret.png' leaves"):
        score_mmeb(HashEncoder(), tmp_path)


def test_the_benchmark_is_complete():
    groups = {}
    for info in MMEB_DATASETS:
        groups.setdefault((info.meta_task, info.in_distribution), []).append(info.name)
    assert {key: len(names) for key, names in groups.items()} == {
        ("classification", True): 5,
        ("classification", False): 5,
        ("vqa", True): 6,
        ("vqa", False): 4,
        ("retrieval", True): 8,
        ("retrieval", False): 4,
        ("grounding", True): 1,
        ("grounding", False): 3,
    }
    assert set(published.LLAVE_7B_DATASETS) == {info.name for info in MMEB_DATASETS}


def published_results() -> Results:
    """LLaVE-7B's published datasets as if they had been scored, 1000 rows each."""
    datasets = []
    for info in MMEB_DATASETS:
        score = round(10 * published.LLAVE_7B_DATASETS[info.name]) / 1000
        datasets.append(Result(info, {"precision@1": score}, 1000, 0.001))
    return Results(mmeb.SUITE, tuple(datasets))


def test_averages_of_the_published_datasets_are_the_published_averages():
    averages = {a.label: 100 * a.value for a in published_results().averages()}
    (row,) = (row for row in published.MMEB if row.model == "LLaVE-7B")
    for label, value in averages.items():
        # Printed to one decimal from datasets that were rounded to one decimal.
        assert value == pytest.approx(getattr(row, label.lower()), abs=0.1)


@pytest.mark.parametrize(
    "row", [*published.MMEB, *published.ABLATIONS.values()], ids=lambda row: row.model
)
def test_published_averages_fit_together(row):
    """Numbers of one decimal, and their weighted mean of one decimal: off by 0.1 at most."""
    assert (20 * row.ind + 16 * row.ood) / 36 == pytest.approx(row.overall, abs=0.1)
    # SigLIP's four averages, as printed, do not give its overall one.
    if row.vqa is not None and row.model != "SigLIP":
        tasks = 10 * row.classification + 10 * row.vqa + 12 * row.retrieval + 4 * row.grounding
        assert tasks / 36 == pytest.approx(row.overall, abs=0.1)


def test_all_published_rows_stand_beside_a_run():
    rows = published_results().comparison()
    assert [row[0] for row in rows] == [
        "model",
        *(row.model for row in published.MMEB),
        *(row.model for row in published.ABLATIONS.values()),
        "this run",
    ]
    lines = [" ".join(row) for row in rows]
    assert "VLM2Vec (base of LLaVE-7B) 63.5 61.1 64.5 87.3 69.7 61.0 65.8" in lines
    assert "Table 3, 7: Focal-InfoNCE - - - - 67.9 59.5 64.2" in lines


def test_a_partial_run_averages_nothing_it_does_not_have():
    full = published_results()
    partial = Results(mmeb.SUITE, tuple(r for r in full.tasks if r.info.name != "EDIS"))
    values = {average.label: average.value for average in partial.averages()}
    assert {label for label, value in values.items() if value is None} == {
        "retrieval",
        "OOD",
        "overall",
    }
    assert "Not scored: EDIS." in partial.table()
    assert "Not scored" not in full.table()
    assert "average/retrieval" not in partial.metrics()
    assert partial.metrics()["retrieval/NIGHTS"] == 0.67
    with pytest.raises(KeyError, match="EDIS"):
        partial["EDIS"]


def test_own_datasets_are_averaged_over_their_own_infos(tmp_path):
    write_rows(tmp_path, "Own", [row("q", ["a"])])
    infos = (TaskInfo("Own", "mine"), TaskInfo("Other", "mine"))
    alone = score_mmeb(HashEncoder(), tmp_path)
    assert [(a.label, a.value) for a in alone.averages()] == [("other", 1.0), ("overall", 1.0)]
    partial = score_mmeb(HashEncoder(), tmp_path, infos=infos)
    assert [(a.label, a.value) for a in partial.averages()] == [("mine", None), ("overall", None)]


def test_non_finite_embeddings_name_the_item(golden):
    def broken(items):
        return np.full((len(items), 4), np.nan, np.float32)

    with pytest.raises(ValueError, match="row 0: the embedding is not finite"):
        score_mmeb(broken, golden / "eval", ["TinyCls"])


def test_a_second_run_encodes_nothing(golden, tmp_path):
    encoders = HashEncoder(), HashEncoder()
    tables = [
        score_mmeb(encode, golden / "eval", cache=EmbeddingCache(tmp_path, "model")).table()
        for encode in encoders
    ]
    assert len(encoders[0].keys) == 12 + 62 + 12 + 23
    assert encoders[1].keys == []
    assert tables[0] == tables[1]
