"""The digits benchmark: what its files say is true, unambiguous, split cleanly and reproducible.

Truth is checked from the files alone: texts are parsed here and compared with the annotations.
"""

import hashlib
import json
import re
import time
import unicodedata
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer

from llave_jax.digits import dataset as digits
from llave_jax.digits import scenes
from llave_jax.digits.tokenizer import build_tokenizer, corpus
from llave_jax.evaluation.benchmarks import mmeb
from llave_jax.inputs.item import Item
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.config import PRESETS

SMALL = digits.Sizes(train=60, eval=40)
ROWS = {"top": 0, "bottom": 1}
COLUMNS = {"left": 0, "right": 1}
WORDS = {word: digit for digit, word in enumerate(scenes.DIGITS)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return digits.build(tmp_path_factory.mktemp("benchmark") / "digits", sizes=SMALL)


@pytest.fixture(scope="module")
def annotations(built) -> dict:
    return json.loads((built / "annotations.json").read_text())


def train_rows(root: Path, subset: str) -> list[dict]:
    return json.loads((root / "train" / f"{subset}.json").read_text())


def eval_rows(root: Path, subset: str) -> list[dict]:
    path = root / "eval" / subset / "test-00000-of-00001.parquet"
    return pyarrow.parquet.read_table(path).to_pylist()


def all_rows(root: Path, subset: str, split: str) -> list[tuple[str, str, list[str], list[str]]]:
    """(query, its image, target texts, target images) of either split, the right target first."""
    if split == "train":
        return [
            (r["qry"], r["qry_image_path"], [r["pos_text"]], [r["pos_image_path"]])
            for r in train_rows(root, subset)
        ]
    return [
        (r["qry_text"], r["qry_img_path"], r["tgt_text"], r["tgt_img_path"])
        for r in eval_rows(root, subset)
    ]


def shown(annotations: dict, split: str, path: str) -> dict:
    return annotations[f"{'train_images' if split == 'train' else 'eval/images'}/{path}"]


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# What texts mean, worked out again.


def cell_of(place: str) -> int:
    row, column = place.split()
    return 2 * ROWS[row] + COLUMNS[column]


def facts_of(caption: str) -> dict[int, int]:
    found = re.findall(r"\ban? (\w+) at the (\w+ \w+)", caption)
    rebuilt = " and ".join(
        ", ".join(f"{'an' if w == 'eight' else 'a'} {w} at the {p}" for w, p in found).rsplit(
            ", ", 1
        )
    )
    assert caption == rebuilt
    return {cell_of(place): WORDS[word] for word, place in found}


def is_true(caption: str, shown_digits: list[int]) -> bool:
    return all(shown_digits[cell] == digit for cell, digit in facts_of(caption).items())


def answer_of(question: str, shown_digits: list[int]) -> str:
    grid = [shown_digits[:2], shown_digits[2:]]
    if match := re.fullmatch(r"Which digit is at the (\w+ \w+)\?", question):
        return scenes.DIGITS[shown_digits[cell_of(match[1])]]
    if match := re.fullmatch(r"How many times does (\w+) appear\?", question):
        return scenes.DIGITS[shown_digits.count(WORDS[match[1]])]
    if match := re.fullmatch(r"What does the (\w+) (row|column) read\?", question):
        line = grid[ROWS[match[1]]] if match[2] == "row" else [r[COLUMNS[match[1]]] for r in grid]
        return " ".join(scenes.DIGITS[digit] for digit in line)
    match = re.fullmatch(r"Which digit is (to the left of|.*of|above|below) the (\w+)\?", question)
    row, column = place_of(grid, WORDS[match[2]])
    step = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    row, column = row + step[match[1]][0], column + step[match[1]][1]
    assert min(row, column) >= 0
    return scenes.DIGITS[grid[row][column]]


def place_of(grid: list[list[int]], digit: int) -> tuple[int, int]:
    (place,) = [(r, c) for r in range(2) for c in range(2) if grid[r][c] == digit]
    return place


# The rows.


@pytest.mark.parametrize("subset", digits.SUBSETS)
def test_train_rows_have_mmebs_form(built, subset):
    rows = train_rows(built, subset)
    assert len(rows) == SMALL.train
    keys = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
    for row in rows:
        assert list(row) == keys
        for text, image in zip(keys[::2], keys[1::2], strict=True):
            assert isinstance(row[text], str)
            assert row[text].count("<|image_1|>") == (row[image] != "")
            assert not row[image] or (built / "train_images" / row[image]).is_file()


@pytest.mark.parametrize("subset", digits.SUBSETS)
def test_eval_rows_have_mmebs_form(built, golden, subset):
    path = built / "eval" / subset / "test-00000-of-00001.parquet"
    reference = golden / "eval" / "TinyCls" / "test-00000-of-00001.parquet"
    schema, expected = (pyarrow.parquet.read_schema(p) for p in (path, reference))
    assert [(field.name, field.type) for field in schema] == [
        (field.name, field.type) for field in expected
    ]
    for query, image, texts, paths in all_rows(built, subset, "eval"):
        for text, path in [(query, image), *zip(texts, paths, strict=True)]:
            assert text.count("<|image_1|>") == (path != "")
            assert not path or (built / "eval" / "images" / path).is_file()
        candidates = list(zip(texts, paths, strict=True))
        assert len(set(candidates)) == len(candidates)
        assert len(candidates) == (10 if subset == digits.CLASSIFICATION else digits.CANDIDATES)


def test_evaluation_reads_it(built):
    assert set(mmeb.dataset_names(built / "eval")) == set(digits.SUBSETS)
    store = mmeb.open_images(built / "eval")
    for subset, meta_task in digits.SUBSETS.items():
        assert meta_task in {info.meta_task for info in mmeb.MMEB_DATASETS}
        dataset = mmeb.read_rows(built / "eval", subset)
        assert len(dataset) == SMALL.eval
        mmeb.make_item(dataset, len(dataset.contents) - 1, store)


def test_chance(built):
    of = {subset: digits.chance(eval_rows(built, subset)) for subset in digits.SUBSETS}
    assert of.pop(digits.CLASSIFICATION) == pytest.approx(0.1)
    assert list(of.values()) == pytest.approx([0.05] * 4)
    assert digits.chance([{"tgt_text": ["a"]}, {"tgt_text": ["a", "b"]}]) == 0.75


# Their truth.


@pytest.mark.parametrize("split", ["train", "eval"])
def test_classes_are_right(built, annotations, split):
    for _, image, texts, _ in all_rows(built, digits.CLASSIFICATION, split):
        (digit,) = shown(annotations, split, image)["digits"]
        assert texts[0] == f"the digit {scenes.DIGITS[digit]}"
    if split == "eval":
        assert set(texts) == {f"the digit {word}" for word in scenes.DIGITS}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_only_the_first_answer_is_right(built, annotations, split):
    for query, image, texts, _ in all_rows(built, digits.VQA, split):
        question = query.removeprefix(digits.ANSWER.format(""))
        answer = answer_of(question, shown(annotations, split, image)["digits"])
        assert [text == answer for text in texts] == [True] + [False] * (len(texts) - 1)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_only_the_first_caption_is_true(built, annotations, split):
    for _, image, texts, _ in all_rows(built, digits.RETRIEVAL_I2T, split):
        seen = shown(annotations, split, image)["digits"]
        assert [is_true(t, seen) for t in texts] == [True] + [False] * (len(texts) - 1)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_only_the_first_image_fits_the_caption(built, annotations, split):
    for query, _, _, paths in all_rows(built, digits.RETRIEVAL_T2I, split):
        caption = query.removeprefix(digits.FIND_IMAGE.format(""))
        fits = [is_true(caption, shown(annotations, split, path)["digits"]) for path in paths]
        assert fits == [True] + [False] * (len(paths) - 1)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_only_the_first_crop_is_of_the_named_cell(built, annotations, split):
    for query, image, _, paths in all_rows(built, digits.GROUNDING, split):
        label = re.fullmatch(r'.*labeled as "the (\w+)( at the (\w+ \w+))?"', query, re.DOTALL)
        scene = shown(annotations, split, image)
        cells = [
            cell
            for cell in range(4)
            if label[1] in ("digit", scenes.DIGITS[scene["digits"][cell]])
            and (label[3] is None or cell == cell_of(label[3]))
        ]
        assert len(cells) == 1
        scans = [shown(annotations, split, path)["scans"] for path in paths]
        right = [[scene["scans"][cells[0]]] == scan for scan in scans]
        assert right == [True] + [False] * (len(paths) - 1)


def test_training_negatives_are_wrong_and_hard(built, annotations):
    for row in train_rows(built, digits.RETRIEVAL_I2T):
        seen = shown(annotations, "train", row["qry_image_path"])["digits"]
        assert not is_true(row["neg_text"], seen)
        assert facts_of(row["neg_text"]).keys() == facts_of(row["pos_text"]).keys()
    for row in train_rows(built, digits.RETRIEVAL_T2I):
        caption = row["qry"].removeprefix(digits.FIND_IMAGE.format(""))
        right, wrong = (
            shown(annotations, "train", row[key]) for key in ("pos_image_path", "neg_image_path")
        )
        assert not is_true(caption, wrong["digits"])
        assert sorted(right["scans"]) == sorted(wrong["scans"])


def test_eval_has_hard_negatives(built, annotations):
    for _, image, _, paths in all_rows(built, digits.GROUNDING, "eval"):
        own = shown(annotations, "eval", image)["scans"]
        scans = [shown(annotations, "eval", path)["scans"][0] for path in paths]
        assert set(own) <= set(scans)
    for _, _, _, paths in all_rows(built, digits.RETRIEVAL_T2I, "eval"):
        scans = [sorted(shown(annotations, "eval", path)["scans"]) for path in paths]
        assert scans.count(scans[0]) >= 2


def test_train_and_test_share_no_scan(annotations):
    used = {"train_images": set(), "eval": set()}
    for path, picture in annotations.items():
        used[path.split("/")[0]].update(picture["scans"])
    assert not used["train_images"] & used["eval"]


@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_stratified(seed):
    labels = scenes.load_scans().labels
    train, test = scenes.split_scans(labels, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    share = np.bincount(labels[test]) / np.bincount(labels)
    assert np.all(np.abs(share - scenes.TEST_SHARE) < 0.01)


# The pictures.


def test_files_show_what_is_annotated(built, annotations):
    """The nine scans most like a cell, or a crop, say the annotated digit; its own is near them."""
    scans = scenes.load_scans()
    plain = np.stack([scenes.draw_scan(pixels) for pixels in scans.pixels]).astype(np.float64)
    plain = plain.reshape(len(plain), -1) - plain.reshape(len(plain), -1).mean(1, keepdims=True)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    read, ranks = [], []
    for path, picture in annotations.items():
        image = PIL.Image.open(built / path)
        assert image.mode == "L"
        side = scenes.CELL_PIXELS
        if len(picture["scans"]) == 4:
            assert image.size == (scenes.SCENE_PIXELS,) * 2
            boxes = [
                (c * side, r * side, (c + 1) * side, (r + 1) * side) for r in (0, 1) for c in (0, 1)
            ]
            cells = [image.crop(box) for box in boxes]
        else:
            cells = [image.resize((side, side))]
        for cell, scan, digit in zip(cells, picture["scans"], picture["digits"], strict=True):
            pixels = np.asarray(cell, np.float64).ravel()
            likeness = plain @ (pixels - pixels.mean())
            votes = scans.labels[np.argsort(likeness)[-9:]]
            read.append(np.bincount(votes).argmax() == digit)
            ranks.append(np.count_nonzero(likeness > likeness[scan]))
    assert np.mean(read) > 0.9
    # Turned and shifted, a scan may be more like another one; a wrong one would rank about 900th.
    assert np.median(ranks) < 20


@settings(max_examples=30)
@given(st.integers(0, 1796), st.integers(0, 2**32))
def test_drawing_keeps_the_ink(index, seed):
    pixels = scenes.load_scans().pixels[index]
    drawn = scenes.draw_scan(pixels, np.random.default_rng(seed))
    assert drawn.shape == (scenes.CELL_PIXELS,) * 2
    assert drawn.dtype == np.uint8
    # Enlarged 2.4 times and scaled by +-5% a side; clipping bicubic lobes adds some.
    assert 0.85 < drawn.sum() / (pixels.sum() * 2.4**2) < 1.25


@given(st.integers(0, 2**32), st.integers(2, 4))
def test_families_rearrange_the_same_scans(seed, size):
    labels = scenes.load_scans().labels
    pools = [np.flatnonzero(labels == digit) for digit in range(10)]
    family = scenes.make_family(np.random.default_rng(seed), pools, size)
    assert len({scene.digits for scene in family}) == len(family) == size
    assert len({tuple(sorted(scene.scans)) for scene in family}) == 1
    for scene in family:
        assert len(set(scene.scans)) == 4
        assert tuple(labels[list(scene.scans)]) == scene.digits


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_every_question_has_the_answer_that_parsing_it_gives(shown_digits):
    scene = scenes.Scene(tuple(shown_digits), (0, 1, 2, 3))
    asked = [pair for pairs in scenes.questions(scene).values() for pair in pairs]
    assert len({question for question, _ in asked}) == len(asked)
    for question, answer in asked:
        assert answer_of(question, shown_digits) == answer


# Building.


def test_a_second_build_changes_nothing(built):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    start = time.perf_counter()
    assert digits.build(built, sizes=SMALL) == built
    assert time.perf_counter() - start < 0.1
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == before


def test_same_arguments_give_the_same_bytes(built, tmp_path):
    assert files(digits.build(tmp_path / "again", sizes=SMALL)) == files(built)


def test_stale_directories_are_rebuilt(built, tmp_path):
    directory = digits.build(tmp_path / "deep" / "digits", seed=1, sizes=SMALL)
    other = files(directory)
    assert other["annotations.json"] != (built / "annotations.json").read_bytes()
    digits.build(directory, sizes=SMALL)
    assert files(directory) == files(built)
    assert [p.name for p in directory.parent.iterdir()] == ["digits"]


def test_eval_does_not_depend_on_the_size_of_training(built, tmp_path):
    more = digits.build(tmp_path / "more", sizes=digits.Sizes(train=100, eval=SMALL.eval))
    assert files(more / "eval") == files(built / "eval")


def test_rows_belong_to_the_version(built):
    """Where this fails, what is built has changed: raise VERSION, or old directories stay in use."""
    rows = [all_rows(built, subset, s) for subset in digits.SUBSETS for s in ("train", "eval")]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert (digits.VERSION, digest[:16]) == (4, "5eb078b509e458a6")


def test_foreign_directories_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has no digits\.json"):
        digits.build(tmp_path, sizes=SMALL)
    assert files(tmp_path) == {"thesis.tex": b"mine"}


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(digits, "_eval_rows", fail)
    with pytest.raises(OSError, match="disk full"):
        digits.build(tmp_path / "digits", sizes=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [{"train": 81}, {"eval": 61}, {"eval": 38}])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="expected a multiple"):
        digits.Sizes(**sizes)


# The tokenizer.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_tokenizer_is_like_qwen2s(tokenizer, golden):
    reference = AutoTokenizer.from_pretrained(golden / "checkpoint")
    assert type(tokenizer) is type(reference)
    for name in ("pad_token", "eos_token", "padding_side"):
        assert getattr(tokenizer, name) == getattr(reference, name)
    ours, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, reference))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["normalizer"] == theirs["normalizer"]


def test_tokenizer_fits_the_tiny_model(tokenizer):
    tiny = PRESETS["tiny"]
    assert len(tokenizer) <= tiny.text.vocab_size
    assert tokenizer.model_max_length == tiny.inputs.max_text_length
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert special == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [
        special[1],
        tokenizer.encode("a")[0],
        special[2],
    ]


def test_every_word_is_one_token(tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    for text in corpus():
        text = text.replace("<|image_1|>", "")
        assert len(tokenizer.encode(text)) == len(split(text))


@given(st.text())
def test_any_text_survives(tokenizer, text):
    decoded = tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False)
    assert decoded == unicodedata.normalize("NFC", text)


def test_tokenizer_files_are_the_same_every_time(tmp_path):
    first, second = (files(build_tokenizer(tmp_path / name)) for name in "ab")
    assert first == second
    assert set(first) >= {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}


def test_pictures_fit_the_tiny_model(built, tokenizer):
    """Digits and crops take one tile, scenes one for each cell, and no text is cut."""
    config = PRESETS["tiny"]
    assert config.vision.image_size == scenes.CELL_PIXELS
    builder = SequenceBuilder(tokenizer, config.input_spec)
    for subset in digits.SUBSETS:
        for query, image, texts, paths in all_rows(built, subset, "train"):
            for text, path in [(query, image), *zip(texts, paths, strict=True)]:
                images = (str(built / "train_images" / path),) if path else ()
                sequence = builder(Item(text, images))
                assert len(sequence) < config.inputs.max_length
                tiles = 0 if not path else 4 if path.startswith(digits.SCENES) else 1
                assert len(sequence.crops) == (1 + tiles if path else 0)
