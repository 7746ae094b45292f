"""mteb's own evaluation on tasks made here: retrieval over texts, images, both and videos, classification; no downloads."""

import doctest
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("mteb")

import datasets
import jax
import mteb
import torch
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.results.task_result import TaskError
from safetensors.numpy import load_file, save_file

from llave_jax import evaluate
from llave_jax.embedding.embedder import Embedder
from llave_jax.evaluation import mteb_model, mteb_run
from llave_jax.evaluation.benchmarks import corpus
from llave_jax.evaluation.benchmarks.mmeb import MMEB_DATASETS
from llave_jax.evaluation.cache import EmbeddingCache
from llave_jax.evaluation.mteb_model import MtebEncoder
from llave_jax.evaluation.scoring import score_task
from llave_jax.evaluation.task import TaskInfo
from llave_jax.inputs.item import Item
from llave_jax.weights.prompts import read_prompt_set
from tests.evaluation.fake_encoder import HashEncoder, hash_vector

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
INSTRUCTION = "Find an image of this colour."


def metadata(name, category, modalities):
    return TaskMetadata(
        name=name,
        description="Colours by their names.",
        dataset={"path": "nowhere/colours", "revision": "1"},
        type="Any2AnyRetrieval",
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        prompt={"query": INSTRUCTION},
    )


def retrieval(corpus, queries, relevant):
    """What a retrieval task has as its dataset."""
    split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
    return {"default": {"test": split}}


def pictures():
    return [PIL.Image.new("RGB", (8, 6), colour) for colour in COLOURS.values()]


def table(**columns):
    """Texts and pictures by column."""
    kinds = {
        name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


class ColourRetrieval(AbsTaskRetrieval):
    metadata = metadata("ColourRetrieval", "t2i", ["text", "image"])

    def load_data(self, **kwargs):
        corpus = table(id=[f"d-{name}" for name in COLOURS], image=pictures())
        queries = table(id=[f"q-{name}" for name in COLOURS], text=list(COLOURS))
        relevant = {f"q-{name}": {f"d-{name}": 1} for name in COLOURS}
        self.dataset = retrieval(corpus, queries, relevant)
        self.data_loaded = True


class Recoloured(AbsTaskRetrieval):
    """A picture with a text that names another colour; a picture of that colour is right."""

    metadata = metadata("Recoloured", "it2i", ["text", "image"])

    def load_data(self, **kwargs):
        corpus = table(id=[f"d-{name}" for name in COLOURS], image=pictures())
        others = [*list(COLOURS)[1:], next(iter(COLOURS))]
        ids = [f"q-{name}" for name in COLOURS]
        queries = table(id=ids, text=[f"make it {name}" for name in others], image=pictures())
        relevant = {query: {f"d-{name}": 1} for query, name in zip(ids, others, strict=True)}
        self.dataset = retrieval(corpus, queries, relevant)
        self.data_loaded = True


class ColourClasses(AbsTaskClassification):
    metadata = TaskMetadata(
        name="ColourClasses",
        description="Pictures by their colour.",
        dataset={"path": "nowhere/colours", "revision": "1"},
        type="ImageClassification",
        category="i2c",
        modalities=["image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )
    input_column_name = "image"
    samples_per_label, n_experiments = 2, 2

    def load_data(self, **kwargs):
        data = table(image=3 * pictures()).add_column("label", 3 * list(range(len(COLOURS))))
        self.dataset = datasets.DatasetDict({"train": data, "test": data.select(range(6))})
        self.data_loaded = True


class Shades(AbsTaskRetrieval):
    """Videos by texts; frames are columns of numbers, as a data set without torchcodec has them."""

    metadata = metadata("ShadesT2V", "t2v", ["text", "video"])

    def load_data(self, **kwargs):
        clips = [np.full((5, 3, 4, 4), 40 * n, np.uint8).tolist() for n in range(4)]
        corpus = datasets.Dataset.from_dict({"id": [f"d{n}" for n in range(4)], "video": clips})
        queries = table(id=[f"q{n}" for n in range(4)], text=[f"shade {40 * n}" for n in range(4)])
        self.dataset = retrieval(corpus, queries, {f"q{n}": {f"d{n}": 1} for n in range(4)})
        self.data_loaded = True


class Words(AbsTaskRetrieval):
    """Texts with graded relevance, several right ones, and a query that finds little."""

    metadata = TaskMetadata(
        name="Words",
        description="Words that share letters.",
        dataset={"path": "nowhere/words", "revision": "1"},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **kwargs):
        rng = np.random.default_rng(0)
        corpus = {"id": [f"d{n}" for n in range(40)], "title": [""] * 40}
        corpus["text"] = [f"word {n}" for n in range(40)]
        queries = {"id": [f"q{n}" for n in range(9)], "text": [f"ask {n}" for n in range(9)]}
        relevant = {
            query: {
                f"d{document}": int(rng.integers(1, 4))
                for document in rng.choice(40, rng.integers(1, 9), replace=False)
            }
            for query in queries["id"]
        }
        self.dataset = retrieval(table(**corpus), table(**queries), relevant)
        self.data_loaded = True


class ColourEncoder:
    """Knows colours in texts and pictures; remembers the items."""

    def __init__(self):
        self.items, self.options = [], []

    def __call__(self, items, **options):
        self.items += items
        self.options.append(options)
        return np.stack([hash_vector(self.colour(item).encode()) for item in items])

    @staticmethod
    def colour(item):
        if item.video is not None:
            return str(item.video[0].getpixel((0, 0))[0])
        if item.images and "make it" not in item.text:
            pixel = item.images[0].convert("RGB").getpixel((0, 0))
            return next(name for name, value in COLOURS.items() if value == pixel)
        return item.text.rsplit(" ", 1)[-1]


META = mteb_model.model_meta("llave_jax/test", "1", dimension=16, max_length=512)


def run(encoder, task, **options):
    results = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, **options)
    return results.task_results[0].scores["test"][0]


def test_retrieval_of_images_by_text():
    encode = ColourEncoder()
    scores = run(MtebEncoder(encode, META), ColourRetrieval())
    assert scores["ndcg_at_10"] == 1.0
    texts = {item.text for item in encode.items}
    assert "Find an image of this colour: red" in texts
    assert "<image>\nRepresent the given image." in texts
    assert len(encode.items) == 6


def test_retrieval_by_image_and_text():
    encode = ColourEncoder()
    assert run(MtebEncoder(encode, META), Recoloured())["ndcg_at_10"] == 1.0
    queries = [item for item in encode.items if "make it" in item.text]
    assert [len(item.images) for item in queries] == [1, 1, 1]
    assert queries[0].text == "<image>\nFind an image of this colour: make it green"


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ({}, "Represent the given image."),
        ({"query": "Q: "}, "Represent the given image."),
        ({"ImageClassification": "Identify the colour"}, "Identify the colour"),
    ],
)
def test_classification_of_images(prompts, text):
    encode = ColourEncoder()
    assert run(MtebEncoder(encode, META, prompts=prompts), ColourClasses())["accuracy"] == 1.0
    assert {item.text for item in encode.items} == {f"<image>\n{text}"}


def test_retrieval_of_videos_by_text():
    encode = ColourEncoder()
    assert run(MtebEncoder(encode, META, frames=(1, 3)), Shades())["ndcg_at_10"] == 1.0
    clips = [item for item in encode.items if item.video is not None]
    assert [len(clip.video) for clip in clips] == [3] * 4
    assert {clip.text for clip in clips} == {"<image>\nRepresent the given video."}


def test_a_wrong_model_scores_low():
    def encode(items, **options):
        return np.stack([hash_vector(f"{i}{item.text}".encode()) for i, item in enumerate(items)])

    assert run(MtebEncoder(encode, META), ColourRetrieval())["ndcg_at_10"] < 1.0


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({}, "Find an image of this colour: red", "<image>\nRepresent the given image."),
        ({"query": "Q>", "document": "Show it."}, "Q>red", "<image>\nShow it."),
        ({"query": "Q: ", "ColourRetrieval": "T: "}, "T: red", "<image>\nT:"),
        (
            {"Any2AnyRetrieval-query": "A: ", "Any2AnyRetrieval": "B: ", "query": "Q: "},
            "A: red",
            "<image>\nB:",
        ),
        ({"ColourRetrieval-query": "C: ", "ColourRetrieval": "T: "}, "C: red", "<image>\nT:"),
        ({"query": ""}, "red", "<image>\nRepresent the given image."),
    ],
)
def test_prompts_in_mtebs_order(prompts, query, document):
    encode = ColourEncoder()
    run(MtebEncoder(encode, META, prompts=prompts), ColourRetrieval())
    texts = [item.text for item in encode.items]
    assert query in texts
    assert texts.count(document) == 3


def test_mmebs_prompts_are_those_of_its_rows():
    """A task of mteb that is made of an MMEB data set gets the texts of MMEB's rows."""
    (prompts, encode) = read_prompt_set("mmeb"), ColourEncoder()

    class Mscoco(ColourRetrieval):
        metadata = metadata("MSCOCOT2IRetrieval", "t2i", ["text", "image"])

    run(MtebEncoder(encode, META, prompts=prompts), Mscoco())
    texts = {item.text for item in encode.items}
    assert "Find me an everyday image that matches the given caption: red" in texts
    assert "<image>\nRepresent the given image." in texts
    assert len(texts) == 4
    sides = [name.rpartition("-") for name in prompts]
    names = {
        task if side in ("query", "document") else "".join((task, dash, side))
        for task, dash, side in sides
    }
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    assert names <= known | {info.name for info in MMEB_DATASETS}


def test_batch_size_and_progress_are_passed_on():
    encode = ColourEncoder()
    asked = {"batch_size": 2, "show_progress_bar": True}
    run(MtebEncoder(encode, META), ColourRetrieval(), encode_kwargs=dict(asked))
    assert encode.options == [{"batch_size": 2, "show_progress": True}] * 2
    encode = ColourEncoder()
    run(MtebEncoder(encode, META, automatic_batches=True), ColourRetrieval())
    # mteb's encoders show a bar if nothing is said.
    assert encode.options == [{"batch_size": None, "show_progress": True}] * 2
    encode = ColourEncoder()
    run(MtebEncoder(encode, META), ColourRetrieval(), show_progress_bar=False)
    assert encode.options == [{"batch_size": 32, "show_progress": False}] * 2
    with pytest.raises(ValueError, match="precision is 'int8'"):
        MtebEncoder(encode, META).encode(
            [], task_metadata=None, hf_split="", hf_subset="", precision="int8"
        )


def test_our_scorer_agrees_with_mtebs():
    """The same embeddings: rankings with graded relevance, in mteb's way and in ours."""

    def encode(items, **options):
        # mteb's texts have an instruction before these two words.
        return np.stack([hash_vector(" ".join(item.text.split()[-2:]).encode()) for item in items])

    theirs = run(MtebEncoder(encode, META), Words())
    task = Words()
    task.load_data()
    data = task.dataset["default"]["test"]
    names = ("nDCG@10", "nDCG@5", "recall@10", "recall@100", "precision@1", "MRR@10", "hit@5")
    ours = score_task(
        encode,
        corpus.make_task(
            TaskInfo("Words", "t", metric="nDCG@10"),
            {row["id"]: Item(row["text"]) for row in data["queries"]},
            {row["id"]: Item(row["text"]) for row in data["corpus"]},
            data["relevant_docs"],
            names,
        ),
        EmbeddingCache(),
    ).metrics
    pairs = {
        "nDCG@10": "ndcg_at_10",
        "nDCG@5": "ndcg_at_5",
        "recall@10": "recall_at_10",
        "recall@100": "recall_at_100",
        "precision@1": "precision_at_1",
        "MRR@10": "mrr_at_10",
        "hit@5": "hit_rate_at_5",
    }
    for our, their in pairs.items():
        # mteb rounds to five places.
        assert ours[our] == pytest.approx(theirs[their], abs=1e-5), our
    assert 0 < ours["nDCG@10"] < 1


@pytest.fixture
def local_tasks(monkeypatch):
    """mteb's own tasks are fetched from the hub."""
    tasks = {
        "ColourRetrieval": ColourRetrieval,
        "ColourClasses": ColourClasses,
        "ShadesT2V": Shades,
    }

    def get_task(name):
        return tasks[name]()

    monkeypatch.setattr(mteb, "get_task", get_task)


def test_the_command_keeps_and_continues(golden_model, tmp_path, capsys, monkeypatch, local_tasks):
    """Two models in folders called alike, scored into one --output; a task that is there is not scored again."""
    folders = [tmp_path / which / "model" for which in "ab"]
    for scale, folder in enumerate(folders, 1):
        shutil.copytree(golden_model.directory, folder)
        weights = load_file(folder / "model.safetensors")
        weights = {name: (scale * x).astype(x.dtype) for name, x in weights.items()}
        save_file(weights, folder / "model.safetensors")
    encoded = []
    encode = Embedder.encode
    monkeypatch.setattr(
        Embedder,
        "encode",
        lambda self, items, **k: encoded.append(len(items)) or encode(self, items),
    )
    counts = []
    for folder, names, flags in [
        (0, "mteb:ColourRetrieval", []),
        (1, "mteb:ColourRetrieval", []),
        (0, "mteb:ColourRetrieval,mteb:ColourClasses", []),
        (0, "mteb:ColourRetrieval", ["--truncate-dim", "8"]),
    ]:
        command = ["--model", str(folders[folder]), "--benchmark", names, *flags]
        assert evaluate.main([*command, "--output", str(tmp_path / "out")]) == 0
        counts.append(sum(encoded))
    # Embeddings are kept by content: the pictures of the second task are those of the first.
    assert counts == [6, 12, 12, 12]
    table = capsys.readouterr().out
    assert "ColourClasses" in table
    assert (tmp_path / "out/table.txt").read_text() in table
    # Two models, and one of them truncated.
    assert len(list((tmp_path / "out/results").rglob("ColourRetrieval.json"))) == 3
    assert len(list((tmp_path / "out/results").rglob("embed_dim_8/ColourRetrieval.json"))) == 1
    (meta, *_) = (tmp_path / "out").rglob("model_meta.json")
    known = json.loads(meta.read_text())
    assert known["framework"] == ["JAX", "safetensors"]
    assert known["n_parameters"] == sum(x.size for x in jax.tree.leaves(golden_model.params))
    text = golden_model.config.text
    assert known["n_embedding_parameters"] == text.vocab_size * text.hidden_size
    runs = json.loads((tmp_path / "out/run.json").read_text())
    assert runs["ColourRetrieval"]["query_prompt"] == INSTRUCTION
    assert runs["ColourRetrieval"]["truncate_dim"] == 8
    assert "prompt" not in runs["ColourClasses"]


def test_other_prompts_are_another_revision(golden_model, tmp_path, local_tasks):
    shutil.copytree(golden_model.directory, tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--benchmark", "mteb:ColourRetrieval"]
    scores = []
    for prompts in ({}, {"query": "Which of these is "}, {"query": "Name "}):
        (tmp_path / "model/prompts.json").write_text(json.dumps(prompts))
        assert evaluate.main([*command, "--output", str(tmp_path / "out")]) == 0
        runs = json.loads((tmp_path / "out/run.json").read_text())
        assert runs["ColourRetrieval"]["query_prompt"] == prompts.get("query", INSTRUCTION)
        scores.append(len(list((tmp_path / "out").rglob("ColourRetrieval.json"))))
    assert scores == [1, 2, 3]


def test_what_was_encoded_before_a_kill_is_not_encoded_again(tmp_path):
    encode = ColourEncoder()

    def killed_at_the_second_call(items, **options):
        if encode.items:
            raise KeyboardInterrupt
        return encode(items)

    def start(encoder):
        cache = EmbeddingCache(tmp_path, "1")
        return run(MtebEncoder(encoder, META, cache=cache), ColourRetrieval())

    with pytest.raises(KeyboardInterrupt):
        start(killed_at_the_second_call)
    assert len(encode.items) == 3
    assert start(encode)["ndcg_at_10"] == 1.0
    assert len(encode.items) == 6
    start(encode)
    assert len(encode.items) == 6


def test_videos_have_room(golden_model, local_tasks):
    assert mteb_run.find_tasks(["ColourRetrieval"]).max_length == 0
    assert mteb_run.find_tasks(["ColourRetrieval", "ShadesT2V"]).max_length == 8192


def test_a_decoder_is_asked_for(local_tasks, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchcodec" else find(name)
    )
    mteb_run.require_decoder(mteb_run.find_tasks(["ColourRetrieval"]))
    with pytest.raises(ValueError, match=r"videos of ShadesT2V need torchcodec: .*mteb\[video\]"):
        mteb_run.require_decoder(mteb_run.find_tasks(["ShadesT2V"]))


def test_means_of_a_benchmark(monkeypatch):
    tasks = [ColourRetrieval(), Recoloured(), ColourClasses()]
    names = [task.metadata.name for task in tasks]
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: SimpleNamespace(tasks=tasks))
    chosen = mteb_run.find_tasks(["Colours (all)"])
    assert chosen.benchmarks == {"Colours (all)": names}
    scores = dict(zip(names, (0.2, 0.4, 0.9), strict=True))
    rows = list(mteb_run._means(chosen, scores))
    assert [row[2:] for row in rows] == [["mean of tasks", "50.0"], ["mean of types", "60.0"]]
    del scores["Recoloured"]
    assert list(mteb_run._means(chosen, scores)) == []


@pytest.mark.slow
def test_two_processes_score_as_one(golden_model, tmp_path):
    """One task, and then two of which the first process alone knows that one is done."""
    program = (
        "import sys, mteb\nfrom llave_jax import evaluate\nfrom tests.evaluation import test_mteb_model as t\n"
        "mteb.get_task = lambda name: getattr(t, name)()\nsys.exit(evaluate.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "--model", str(golden_model.directory)]

    def start(names, output, *flags):
        return subprocess.Popen(
            [*command, "--benchmark", names, "--output", str(tmp_path / output), *flags],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    for names in ("mteb:ColourRetrieval", "mteb:ColourRetrieval,mteb:ColourClasses"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", "2", "--process_id"]
        together = [start(names, "two", *flags, str(number)) for number in range(2)]
        outputs = [process.communicate(timeout=500) for process in together]
        assert [process.returncode for process in together] == [0, 0], outputs
        alone = start(names, "one").communicate(timeout=500)[0]
        # Before it gloo says that it is connected.
        assert outputs[0][0].endswith(alone)
        assert names.rpartition(":")[2] in alone
        assert "Colour" not in outputs[1][0]


def test_wording():
    assert doctest.testmod(mteb_model).failed == 0
    picture = PIL.Image.new("RGB", (4, 4))
    batch = {
        "text": ["a dog", None, "both", "An <|image_1|> element", "<image> or <image>?"],
        "image": [picture, None, [picture, picture], None, [picture, picture]],
        "audio": [1, 2, 3, 4, 5],
    }
    items = mteb_model.batch_items(batch, "task")
    assert [(item.text, item.images) for item in items] == [
        ("<image>\na dog", (picture,)),
        ("", ()),
        ("<image>\n<image>\nboth", (picture, picture)),
        ("An < |image_1|> element", ()),
        ("<image> or <image>?", (picture, picture)),
    ]


def test_pictures_in_memory_are_bounded(monkeypatch):
    monkeypatch.setattr(mteb_model, "_CHUNK_PICTURES", 6)
    encode = ColourEncoder()
    frames = np.zeros((4, 3, 2, 2), np.uint8)
    batches = [{"video": [frames, frames]}, {"video": [frames]}, {"text": 5 * ["red"]}]
    vectors = MtebEncoder(
        lambda items, **o: (encode.options.append(len(items)), encode(items))[1], META
    )
    task = ColourRetrieval().metadata
    assert vectors.encode(batches, task_metadata=task, hf_split="", hf_subset="").shape == (8, 16)
    assert [n for n in encode.options if isinstance(n, int)] == [2, 6]


class Decoder:
    """What torchcodec's VideoDecoder has: a length, a rate, and frames by index."""

    def __init__(self, frames, rate, lost=0):
        self._frames, self._lost = frames, lost
        self.metadata = SimpleNamespace(average_fps=rate)

    def __len__(self):
        return len(self._frames)

    def get_frames_at(self, indices):
        if max(indices) >= len(self._frames) - self._lost:
            raise RuntimeError(
                "Requested next frame while there are no more frames left to decode."
            )
        return SimpleNamespace(data=torch.from_numpy(self._frames[indices]))


class PyavDecoder(Decoder):
    """The same of a video file; torchcodec itself needs a PyTorch and an FFmpeg that suit it."""

    def __init__(self, source, **options):
        av = pytest.importorskip("av")
        with av.open(io.BytesIO(source)) as container:
            rate = container.streams.video[0].average_rate
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        super().__init__(np.stack(frames).transpose(0, 3, 1, 2), float(rate))


@pytest.fixture
def torchcodec(monkeypatch):
    """datasets takes PyavDecoder for torchcodec's decoder."""
    decoders = ModuleType("torchcodec.decoders")
    vars(decoders).update(VideoDecoder=PyavDecoder, AudioDecoder=type("AudioDecoder", (), {}))
    package = ModuleType("torchcodec")
    vars(package).update(decoders=decoders)
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", True)


@pytest.mark.slow
def test_mtebs_own_trial_of_encoders(torchcodec):
    """A small task of every type that mteb has, of texts, images and videos."""
    encode = HashEncoder()
    lengths = []

    def counted(items, **options):
        lengths.extend(len(item.video) for item in items if item.video is not None)
        return encode(items)

    results = mteb.mock_run(MtebEncoder(counted, META, cache=EmbeddingCache()))
    assert [name for name, r in results.items() if isinstance(r, TaskError)] == []
    done = {name for name, result in results.items() if result is not None}
    assert len(done) >= 50
    assert {name for name in done if "Video" in name} >= {
        "MockVideoRetrievalT2V",
        "MockVideoClassification",
        "MockVideoPairClassification",
    }
    # A second of 24 frames.
    assert set(lengths) == {3}


@pytest.mark.parametrize("form", ["decoder", "tensor", "floats", "one channel"])
def test_forms_of_videos(form):
    frames = (10 * np.arange(12, dtype=np.uint8))[:, None, None, None] + np.zeros(
        (12, 3, 4, 6), np.uint8
    )
    video = {
        "decoder": lambda: Decoder(frames, 6.0),
        "tensor": lambda: torch.from_numpy(frames),
        "floats": lambda: torch.from_numpy(frames / 255.0),
        "one channel": lambda: frames[:, :1],
    }[form]()
    batch = {"video": [video], "text": ["a clip"]}
    (item,) = mteb_model.batch_items(batch, "task", instruction="Find", frames=(3, 4))
    assert item.text == "<image>\nFind: a clip"
    # Three of a second are six frames, of which four are taken.
    assert [picture.getpixel((0, 0)) for picture in item.video] == [
        (v, v, v) for v in (0, 30, 70, 110)
    ]
    assert item.video[0].size == (6, 4)


def test_frames_that_a_video_lacks_at_its_end():
    frames = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros((6, 3, 4, 6), np.uint8)
    shown = mteb_model.video_frames(Decoder(frames, 1.0, lost=2), "task", 1, 2)
    assert [picture.getpixel((0, 0))[0] for picture in shown] == [0, 3]
    with pytest.raises(ValueError, match="task: a video has no frame"):
        mteb_model.video_frames(Decoder(frames, 1.0, lost=6), "task", 1, 2)


def test_what_is_no_input_is_refused():
    with pytest.raises(ValueError, match=r"task: inputs have columns \['audio'\]"):
        mteb_model.batch_items({"audio": [1]}, "task")
    with pytest.raises(ValueError, match=r"task: a video must be frames"):
        mteb_model.batch_items({"video": [np.zeros((2, 4, 4))]}, "task")
    both = {"video": [np.zeros((1, 3, 4, 4))], "image": [PIL.Image.new("RGB", (4, 4))]}
    with pytest.raises(ValueError, match="both images and a video"):
        mteb_model.batch_items(both, "task")
    with pytest.raises(
        ValueError, match=r"mteb has no task and no benchmark 'CIRRIT2IRetriev'.*CIRRIT2IRetrieval"
    ):
        mteb_run.find_tasks(["CIRRIT2IRetriev"])


def test_tasks_and_benchmarks_are_found_without_data():
    (task,) = mteb_run.find_tasks(["CIRRIT2IRetrieval"]).tasks
    assert task.metadata.name == "CIRRIT2IRetrieval"
    assert len(mteb_run.find_tasks(["MIEB(lite)", "CIRRIT2IRetrieval"]).tasks) > 40
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    assert known >= mteb_model.TRAINING_DATASETS
