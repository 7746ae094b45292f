"""Recall and ranks against the recorded ones and scipy; readers of the published files."""

import json
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from llave_jax.benchmarks import video_retrieval as V
from tests.fake_encoder import HashEncoder

NAMES = dict(zip(V.METRICS, ("R1", "R5", "R10", "MedianR", "MeanR"), strict=True))


@pytest.mark.parametrize("case", ["square_0", "square_1", "square_2", "multi_0", "multi_1", "ties"])
def test_recorded_metrics(golden, case):
    recorded = json.loads((golden / "eval/retrieval.json").read_text())["cases"][case]
    arrays = np.load(golden / "eval/retrieval.npz")
    similarity = arrays[f"{case}/sim"]
    owners = np.arange(len(similarity))
    if case.startswith("multi"):
        counts = np.diff([0, *arrays[f"{case}/cut_off_points"]])
        owners = np.repeat(np.arange(len(counts)), counts)
    computed = dict(
        zip(("text_to_video", "video_to_text"), V.both_directions(similarity, owners), strict=True)
    )
    for direction in ("text_to_video", "video_to_text"):
        if direction not in recorded:
            continue
        for name, key in NAMES.items():
            scale = 100 if name.startswith("R@") else 1
            # Some of the recorded percentages went through float32.
            assert scale * computed[direction][name] == pytest.approx(
                recorded[direction][key], rel=1e-7
            )


def test_recorded_ranks(golden):
    recorded = json.loads((golden / "eval/retrieval.json").read_text())["cases"]
    arrays = np.load(golden / "eval/retrieval.npz")
    for case in ("square_0", "square_1", "square_2", "ties"):
        similarity = arrays[f"{case}/sim"]
        assert (V.tied_ranks(similarity) - 1).tolist() == recorded[case]["text_to_video"]["cols"]


matrices = st.tuples(st.integers(1, 7), st.integers(0, 6), st.integers(0, 10_000))


@hypothesis.given(matrices)
def test_ranks_agree_with_scipy_with_ties(shape):
    videos, extra, seed = shape
    rng = np.random.default_rng(seed)
    owners = rng.permutation([*range(videos), *rng.integers(0, videos, extra)])
    similarity = rng.integers(0, 4, (videos + extra, videos)).astype(np.float32)
    rows = np.arange(len(owners))
    ordinal = scipy.stats.rankdata(-similarity, method="ordinal", axis=1)
    assert np.array_equal(V.positional_ranks(similarity, owners), ordinal[rows, owners])

    square = similarity[:videos]
    # Newer versions of scipy rank in the input's dtype.
    low = np.diagonal(scipy.stats.rankdata(-square, method="min", axis=1)).astype(int)
    high = np.diagonal(scipy.stats.rankdata(-square, method="max", axis=1)).astype(int)
    spans = [range(a, b + 1) for a, b in zip(low, high, strict=True)]
    assert V.tied_ranks(square).tolist() == [rank for span in spans for rank in span]


@hypothesis.given(matrices)
def test_order_of_captions_does_not_matter_without_ties(shape):
    videos, extra, seed = shape
    rng = np.random.default_rng(seed)
    owners = np.array([*range(videos), *rng.integers(0, videos, extra)])
    similarity = rng.permutation((videos + extra) * videos).reshape(-1, videos) / 97
    order = rng.permutation(len(owners))
    assert V.both_directions(similarity, owners) == V.both_directions(
        similarity[order], owners[order]
    )


def test_owners_are_checked():
    with pytest.raises(ValueError, match="each of the 3 videos"):
        V.both_directions(np.zeros((3, 3)), np.array([0, 1, 1]))


def make_videos(root, names, suffix):
    (root / "videos").mkdir()
    for name in names:
        (root / "videos" / f"{name}{suffix}").write_bytes(name.encode())


def test_msrvtt(tmp_path):
    make_videos(tmp_path, ["video1", "video2", "unused"], ".mp4")
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text(
        'key,vid_key,video_id,sentence\nr0,m2,video2,"a cat, a dog"\nr1,m1,video1,a car\n'
    )
    dataset = V.read_msrvtt(tmp_path)
    assert [path.name for path in dataset.videos] == ["video2.mp4", "video1.mp4"]
    assert dataset.captions == ("a cat, a dog", "a car")
    encode = HashEncoder()
    result = V.evaluate_video(encode, dataset, tmp_path / "out")
    assert len(encode.keys) == 4
    assert "46.8" in result.table()
    written = json.loads((tmp_path / "out/msrvtt_score.json").read_text())
    assert written["video_to_text"] == result.video_to_text
    similarity = np.load(tmp_path / "out/msrvtt_similarity.npy")
    assert V.both_directions(similarity, dataset.owners)[0] == result.text_to_video


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_msvd(tmp_path, protocol):
    make_videos(tmp_path, ["a_0_5", "b_1_9"], ".avi")
    (tmp_path / "test_list.txt").write_text("b_1_9\na_0_5\n")
    captions = {"a_0_5": [["a", "man"], ["someone"]], "b_1_9": [["a", "bird"]], "c": [["x"]]}
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol))
    dataset = V.read_msvd(tmp_path)
    assert [path.stem for path in dataset.videos] == ["b_1_9", "a_0_5"]
    assert dataset.captions == ("a bird", "a man", "someone")
    assert dataset.owners.tolist() == [0, 1, 1]
    assert V.evaluate_video(HashEncoder(), dataset).name == "msvd"


def test_python_2_captions(tmp_path):
    """Byte strings of Python 2, as in the published file: {'v': [['a', 'caf\\xc3\\xa9']]}."""
    content = b"(dp0\nS'v'\np1\n(lp2\n(lp3\nS'a'\np4\naS'caf\\xc3\\xa9'\np5\naas."
    (tmp_path / "raw.pkl").write_bytes(content)
    assert V.load_plain_pickle(tmp_path / "raw.pkl") == {"v": [["a", "café"]]}


class Harmful:
    def __reduce__(self):
        return (open, ("harm", "w"))


@pytest.mark.parametrize("content", [pickle.dumps({"v": [Harmful()]}), b"no pickle", b""])
def test_other_pickles_are_refused_unrun(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"captions.pkl: not a pickle of plain captions"):
        V.load_plain_pickle(tmp_path / "captions.pkl")
    assert not (tmp_path / "harm").exists()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"exactly one \*.csv"):
        V.read_msrvtt(tmp_path)
    (tmp_path / "t.csv").write_text("video_id,sentence\nvideo7,hello\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 videos .* 'video7'"):
        V.read_msrvtt(tmp_path)
    (tmp_path / "t.csv").write_text("video,text\nvideo7,hello\n")
    with pytest.raises(ValueError, match="expected video_id and sentence"):
        V.read_msrvtt(tmp_path)
    (tmp_path / "test_list.txt").write_text("v1 v2")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"v1": [["x"]]}))
    with pytest.raises(ValueError, match="no captions for 1 videos, such as 'v2'"):
        V.read_msvd(tmp_path)
