"""Texts, pictures, candidates and labels of image and document tasks, written out by hand."""

import json
import re

import numpy as np
import pytest

from llave_jax import evaluate
from llave_jax.evaluation.benchmarks.base import Options
from llave_jax.evaluation.benchmarks.mmeb_v2.benchmark import MmebV2
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import SUITE, TASKS, VARIANTS
from llave_jax.evaluation.run import evaluate as evaluate_tasks
from llave_jax.evaluation.run import require_data
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_v2.miniature import CATEGORIES, Miniature, picture

MARKED = "<|image_1|>\nFind the class.  "


def image_task(root, name, *rows, options=None):
    for row in rows:
        for path in (row["qry_img_path"], *row["tgt_img_path"]):
            if path:
                (root / "image-tasks" / path).parent.mkdir(parents=True, exist_ok=True)
                (root / "image-tasks" / path).write_bytes(picture(path))
    Miniature(root).table("ziyjiang/MMEB_Test_Instruct", name, "test", list(rows))
    return MmebV2(root, options).read(name)


def row(inst, text, image, targets, pictures=None, tgt_inst=""):
    return {
        "qry_inst": inst,
        "qry_text": text,
        "qry_img_path": image,
        "tgt_inst": tgt_inst,
        "tgt_text": targets,
        "tgt_img_path": [""] * len(targets) if pictures is None else pictures,
    }


def shown(items):
    """Text and file names of pictures."""
    return [(i.text, *(p and str(p).split("image-tasks/")[1] for p in i.images)) for i in items]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SUN397", "<image>\nFind the class.   What?\n"),
        ("MSCOCO_i2t", "<image>\nFind the class.   What?\n"),
        ("GQA", "<image>\nFind the class. What?\n"),
    ],
)
def test_pictures_that_ask_for_texts(tmp_path, name, expected):
    answers = ['the "right" one', " ", "the other", "the other"]
    rows = [row(MARKED, "What?", "a/q.png", answers), row(MARKED, "", "a/r.png", ["the other"])]
    task = image_task(tmp_path, name, *rows)
    blank = expected.replace(" What?", "")
    assert shown(task.queries) == [(expected, "a/q.png"), (blank, "a/r.png")]
    assert shown(task.candidates) == [('the "right" one',), (" ",), ("the other",)]
    # A repeated name is ranked once for its row, whatever the pool says: see `scoring`.
    assert [pool.tolist() for pool in task.pools] == [[0, 1, 2, 2], [2]]
    assert [right.tolist() for right in task.relevant] == [[0], [2]]


@pytest.mark.parametrize(
    ("name", "instruction", "expected"),
    [
        ("MSCOCO_t2i", "Find an image:", ("Find an image: a  cat\n",)),
        ("VisDial", "Find an image:", ("Find an image: a  cat\n\n",)),
        # A marker without a picture holds the zero picture.
        ("EDIS", "<|image_1|>\nFind it:", ("<image>\nFind it: a  cat\n", None)),
    ],
)
def test_texts_that_ask_for_pictures(tmp_path, name, instruction, expected):
    query = (instruction, "a  cat", "")
    blank = row(*query, ["", ""], ["p/1.jpg", "p/2.jpg"], "<|image_1|>\nRepresent it.")
    alone = row(*query, [" "], ["p/2.jpg", "p/3.jpg"], "<|image_1|>\nRepresent it.")
    captions = ["one ", "two", "three"]
    pictures = ["p/4.jpg", "p/4.jpg", "p/1.jpg"]
    captioned = row(*query, captions, pictures, "<|image_1|>\nRepresent it:")
    task = image_task(tmp_path, name, blank, alone, captioned)
    assert shown(task.queries) == [expected] * 3
    assert shown(task.candidates) == [
        ("<image>\nRepresent it.\n", "p/1.jpg"),
        ("<image>\nRepresent it.\n", "p/2.jpg"),
        ("<image>\nRepresent it.\n", "p/3.jpg"),
        # The first of a name counts: other captions of this picture are not embedded.
        ("<image>\nRepresent it: one \n", "p/4.jpg"),
    ]
    assert task.candidate_names == ["p/1.jpg", "p/2.jpg", "p/3.jpg", "p/4.jpg"]
    assert [pool.tolist() for pool in task.pools] == [[0, 1], [1, 2], [3, 3, 0]]


@pytest.mark.parametrize("name", ["NIGHTS", "RefCOCO-Matching"])
def test_pictures_that_ask_for_pictures(tmp_path, name):
    plain = row(MARKED, "it", "q.png", ["", ""], ["p/1.jpg", "p/2.jpg"], "<|image_1|>\nShow it.")
    captions = ['"the cup"', "the pot"]
    captioned = row(MARKED, "it", "q.png", captions, ["p/1.jpg"] * 2, "<|image_1|>\nSelect:")
    task = image_task(tmp_path, name, plain, captioned)
    assert shown(task.queries) == [("<image>\nFind the class. it\n", "q.png")] * 2
    assert shown(task.candidates) == [
        ("<image>\nShow it.", "p/1.jpg"),
        ("<image>\nShow it.", "p/2.jpg"),
        ('<image>\nSelect: "the cup"\n', "p/1.jpg"),
        ("<image>\nSelect: the pot\n", "p/1.jpg"),
    ]
    assert task.candidate_names == ["p/1.jpg:", "p/2.jpg:", "p/1.jpg:the cup", "p/1.jpg:the pot"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tgt_text", [], "row 1: tgt_text: expected a list of texts; found []"),
        ("tgt_text", ["a"], "row 1: tgt_text: expected 2 texts, one for each of tgt_img_path"),
        ("tgt_img_path", ["p/1.jpg", "p/9.jpg"], "row 1 (p/9.jpg): the file does not exist"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, field, value, message):
    good = row("Find:", "x", "q.png", ["a", "b"], ["p/1.jpg", "p/2.jpg"], "Show")
    image_task(tmp_path, "NIGHTS", good)
    table = "ziyjiang/MMEB_Test_Instruct"
    Miniature(tmp_path).table(table, "NIGHTS", "test", [good, {**good, field: value}])
    with pytest.raises(ValueError, match=re.escape(message)):
        list(MmebV2(tmp_path).read("NIGHTS").candidates)


def test_pictures_may_be_elsewhere(tmp_path):
    rows = [row("Find:", "x", "q.png", ["a"])]
    image_task(tmp_path, "GQA", *rows)
    (tmp_path / "image-tasks").rename(tmp_path / "elsewhere")
    task = MmebV2(tmp_path, Options(images=tmp_path / "elsewhere")).read("GQA")
    assert task.queries[0].images == (str(tmp_path / "elsewhere/q.png"),)
    with pytest.raises(FileNotFoundError, match=r"picture 'q.png' of its first row was not found"):
        MmebV2(tmp_path).read("GQA")


def documents(root, repository, split, pages, queries, qrels):
    mini = Miniature(root)
    mini.table(repository, "corpus", split, pages)
    mini.table(repository, "queries", split, queries)
    rows = [{"query-id": q, "corpus-id": c, "score": s} for q, c, s in qrels]
    mini.table(repository, "qrels", split, rows)


ESG = ("vidore/esg_reports_v2", "test")
PAGES = [{"corpus-id": n, "image": {"bytes": b"%d" % n, "path": f"{n}.png"}} for n in (30, 1, 7)]
ASKED = [
    {"query-id": 5, "query": "Who?", "language": "english"},
    {"query-id": 2, "query": " Où? ", "language": "french"},
]


def test_documents_with_graded_relevance(tmp_path):
    # The larger of two scores counts, whichever comes first.
    qrels = [(5, 7, 1), (5, 30, 2), (5, 7, 2), (5, 30, 1), (5, 1, 0), (2, 1, 1), (9, 1, 1)]
    documents(tmp_path, *ESG, PAGES, ASKED, qrels)
    task = MmebV2(tmp_path).read("ViDoRe_esg_reports_v2_multilingual")
    prompt = "Find a document image that matches the given query: "
    assert [item.text for item in task.queries] == [prompt + "Who?", prompt + " Où? "]
    target = "<image> Understand the content of the provided document image."
    assert [(i.text, i.images) for i in task.candidates] == [
        (target, (b"%d" % number,)) for number in (30, 1, 7)
    ]
    assert task.pools is None
    assert task.candidate_names == ["30", "1", "7"]
    found = [
        dict(zip(r.tolist(), g.tolist(), strict=True))
        for r, g in zip(task.relevant, task.gains, strict=True)
    ]
    assert found == [{2: 2.0, 0: 2.0}, {1: 1.0}]
    english = MmebV2(tmp_path).read("ViDoRe_esg_reports_v2")
    assert english.query_names == ["5"]
    assert english.info.metric == "ndcg_linear@5"


def test_documents_whose_pages_are_files(tmp_path):
    name = "x" * 60 + ".v2.jpg"
    folder = tmp_path / "visdoc-tasks/images/VisRAG_PlotQA"
    folder.mkdir(parents=True)
    file = folder / ("x" * 50 + "_" + "9d92b04e" + ".jpg")  # md5 of the name
    repository = ("openbmb/VisRAG-Ret-Test-PlotQA", "train")
    documents(
        tmp_path,
        *repository,
        [{"corpus-id": name}],
        [{"query-id": "q", "query": "?"}],
        [("q", name, 1)],
    )
    benchmark = MmebV2(tmp_path)
    (missing,) = benchmark.missing(["VisRAG_PlotQA"])
    assert missing.example == file.name
    file.write_bytes(b"page")
    task = benchmark.read("VisRAG_PlotQA")
    assert task.candidates[0].images == (str(file),)
    assert task.candidate_names == [name]


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ([(5, 7, 1), (2, "1", 1)], "corpus-id '1' (str) is not in"),
        ([(5, 7, 1)], "query '2': expected right answers among the candidates; found none"),
        ([(5, 7, 1), (2, 4, 1)], "corpus-id 4 (int) is not in"),
        ([(5, 7, 1), (2, 1, None)], "row 1: score must be a number; found None"),
    ],
)
def test_malformed_judgements_are_named(tmp_path, qrels, message):
    if any(isinstance(page, str) for _, page, _ in qrels):
        qrels = [(query, str(page), score) for query, page, score in qrels]
        message = message.replace("'1'", "'7'")
    documents(tmp_path, *ESG, PAGES, ASKED, qrels)
    with pytest.raises(ValueError, match=re.escape(message)):
        MmebV2(tmp_path).read("ViDoRe_esg_reports_v2_multilingual")


def test_the_table_of_tasks():
    assert {name: TASKS[name].info.meta_task for name in TASKS} == {
        name: category for category, names in CATEGORIES.items() for name in names
    }
    assert not TASKS.keys() & VARIANTS.keys()
    averages = SUITE.averages
    assert {label: len(averages[label]) for label in ("image", "video", "visdoc", "overall")} == {
        "image": 36,
        "video": 18,
        "visdoc": 24,
        "overall": 78,
    }
    assert len(averages) == 12 + 3 + 1
    # The means that VLM2Vec's authors give, from their scores of tasks.
    published = SUITE.references[0].averages
    assert np.isclose(published["video"], 34.6, atol=0.1)


def test_what_is_missing_is_said_before_anything_is_computed(tmp_path, capsys):
    data = Miniature(tmp_path / "data").write(["WebQA", "K700", "ViDoRe_docvqa", "GQA"])
    (data / "image-tasks/WebQA").rename(data / "image-tasks/moved")
    (data / "vidore/docvqa_test_subsampled_beir/qrels/test-00000-of-00001.parquet").unlink()
    flags = ["--check-data", "--benchmark", "mmeb-v2", "--data", str(data)]
    assert evaluate.main([*flags, "--tasks", "K700,GQA"]) == 0
    assert capsys.readouterr().out == "2 of 2 tasks have all data that was looked for.\n"
    assert evaluate.main([*flags, "--tasks", "WebQA,K700,ViDoRe_docvqa,MSVD"]) == 2
    pixels = "hf download TIGER-Lab/MMEB-V2 --repo-type dataset --include"
    assert capsys.readouterr().out.splitlines() == [
        "pictures in image-tasks or image-tasks/MMEB, such as WebQA/tgt é 0.JPEG",
        "  for WebQA",
        f"  {pixels} 'image-tasks/mmeb_v1.tar*' --local-dir {data}",
        "annotations vidore/docvqa_test_subsampled_beir (qrels)",
        "  for ViDoRe_docvqa",
        "  hf download vidore/docvqa_test_subsampled_beir --repo-type dataset --local-dir "
        f"{data}/vidore/docvqa_test_subsampled_beir",
        "annotations VLM2Vec/MSVD",
        "  for MSVD",
        f"  hf download VLM2Vec/MSVD --repo-type dataset --local-dir {data}/VLM2Vec/MSVD",
        "frames in video-tasks/frames/video_ret/MSVD/frames or video-tasks/frames/video_ret/MSVD or "
        "video-tasks/frames/video_ret/data/ziyan/video_retrieval/MSVD/frames",
        "  for MSVD",
        f"  {pixels} 'video-tasks/frames/video_ret.tar*' --local-dir {data}",
        "",
        "1 of 4 tasks have all data that was looked for.",
    ]
    benchmark = MmebV2(data)
    require_data(benchmark, ["K700", "GQA"])
    with pytest.raises(
        FileNotFoundError, match=r"^76 of 78 tasks lack .*\n(.*\n){9,}and \d+ more$"
    ):
        require_data(benchmark, benchmark.names())


def test_a_submission_has_all_tasks_of_one_model(tmp_path):
    data = Miniature(tmp_path / "data").write(["GQA", "ViDoSeek-page", "K700"])
    output, encode = tmp_path / "out", HashEncoder()
    settings = {"model": "models/mine", "fingerprint": "a", "dtype": "float32", "max_length": 9}
    for task in ("GQA", "ViDoSeek-page", "K700"):
        other = {"fingerprint": "b"} if task == "K700" else {}
        evaluate_tasks(encode, MmebV2(data), [task], output, settings=settings | other)
    evaluate_tasks(encode, MmebV2(data), ["GQA"], output, settings=settings | {"dimension": 16})
    submission = json.loads((output / "mmeb_v2_submission.json").read_text())
    found = {modality: list(tasks) for modality, tasks in submission["metrics"].items()}
    assert found == {"image": ["GQA"], "video": [], "visdoc": ["ViDoSeek-page-fixed"]}
    score = json.loads((output / "visdoc/ViDoSeek-page_score.json").read_text())
    assert submission["metrics"]["visdoc"]["ViDoSeek-page-fixed"] == score
    assert {key.split("@")[0] for key in score} == {
        *("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr"),
        *("num_pred", "num_data"),
    }
    assert (score["num_pred"], score["num_data"]) == (3, 3)
    metadata = submission["metadata"]
    assert metadata.pop("report_generated_date")
    assert metadata == {
        "model_name": "mine",
        "model_backbone": None,
        "model_size": None,
        "embedding_dimension": 16,
        "max_length_tokens": 9,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
    }
