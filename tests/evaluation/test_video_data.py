"""Readers of MSR-VTT and MSVD, on the files and folders that are downloaded."""

import json
import pickle

import pytest

from llave_jax.evaluation import run
from llave_jax.evaluation.benchmarks import text_video
from llave_jax.evaluation.benchmarks import video_files as V
from llave_jax.evaluation.benchmarks.base import Options
from tests.evaluation.fake_encoder import HashEncoder


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
    benchmark = text_video.READERS["msrvtt"](tmp_path, Options())
    results = run.evaluate(encode, benchmark, None, tmp_path / "out")
    assert len(encode.keys) == 4
    assert "46.8" in results.table()
    written = json.loads((tmp_path / "out/msrvtt_score.json").read_text())
    assert written["video_to_text"] == results["msrvtt_v2t"].metrics
    assert written["text_to_video"] == results["msrvtt_t2v"].metrics
    lines = (tmp_path / "out/msrvtt_t2v_predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [["video2"], ["video1"]]


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
    results = run.evaluate(HashEncoder(), text_video.READERS["msvd"](tmp_path, Options()))
    assert [result.queries for result in results.tasks] == [3, 2]


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


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows, ""]))


HEADER = "key,vid_key,video_id,sentence"


def jsfusion_rows(count=1000):
    numbers = [7010 + 3 * i for i in range(count)]
    return [
        f"ret{i},msr{n},video{n},a person is doing thing {n}" for i, n in enumerate(numbers)
    ], numbers


@pytest.fixture
def downloaded(tmp_path):
    """msrvtt_data.zip and MSRVTT.zip unpacked side by side, as the papers' instructions have it."""
    rows, numbers = jsfusion_rows()
    data = tmp_path / "msrvtt_data"
    write_csv(data / "MSRVTT_JSFUSION_test.csv", HEADER, rows)
    for name, count in [("7k", 7010), ("9k", 9000)]:
        write_csv(
            data / f"MSRVTT_train.{name}.csv", "video_id", (f"video{i}" for i in range(count))
        )
    (data / "MSRVTT_data.json").write_text('{"sentences": [], "videos": []}')
    # What macOS leaves in archives.
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._MSRVTT_JSFUSION_test.csv").write_bytes(b"\0\5\x16\7\xff")
    videos = tmp_path / "MSRVTT" / "videos" / "all"
    videos.mkdir(parents=True)
    for number in [*numbers, 0, 1]:
        (videos / f"video{number}.mp4").write_bytes(b"")
    return tmp_path


def test_msrvtt_as_downloaded(downloaded, caplog):
    dataset = V.read_msrvtt(downloaded)
    rows, numbers = jsfusion_rows()
    assert [path.stem for path in dataset.videos] == [f"video{n}" for n in numbers]
    assert dataset.captions[1] == rows[1].split(",")[3]
    assert dataset.owners.tolist() == list(range(1000))
    assert not caplog.records


def test_msrvtt_beside_captions_of_other_videos(downloaded):
    """Such as training captions written out by one's own script, and a copy of the test's."""
    data = downloaded / "msrvtt_data"
    many = [f"k{i},m{i // 20},video{i // 20},caption {i}" for i in range(3000)]
    write_csv(data / "A_train_with_sentences.csv", HEADER, many)
    (downloaded / "backup.csv").write_bytes((data / "MSRVTT_JSFUSION_test.csv").read_bytes())
    dataset = V.read_msrvtt(downloaded)
    assert dataset.captions[0] == "a person is doing thing 7010"
    assert len(dataset.videos) == 1000

    other = [row + " again" for row in jsfusion_rows()[0]]
    write_csv(downloaded / "other" / "rewritten.csv", HEADER, other)
    with pytest.raises(ValueError, match=r"more than one file: .*rewritten.csv \(1000 entries\)"):
        V.read_msrvtt(downloaded)


def test_csv_of_a_spreadsheet(tmp_path):
    """A byte order mark, and fewer captions than published numbers belong to: said, not refused."""
    make_videos(tmp_path, ["video2"], ".mp4")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfvideo_id,sentence\r\nvideo2,a cat\r\n")
    assert V.read_msrvtt(tmp_path).captions == ("a cat",)


def test_a_smaller_test_set_is_said(tmp_path, caplog):
    make_videos(tmp_path, ["video2"], ".mp4")
    write_csv(tmp_path / "t.csv", "video_id,sentence", ["video2,a", "video2,b"])
    V.read_msrvtt(tmp_path)
    assert "2 captions of 1 videos; the 1k test split" in caplog.text


def test_msvd_as_downloaded(tmp_path):
    """msvd_data.zip with another model's pickles beside it, videos behind a link."""
    data = tmp_path / "root" / "msvd_data"
    data.mkdir(parents=True)
    names = [f"v{i}_0_10" for i in range(12)]
    for split, chosen in [("train", names[:6]), ("val", names[6:8]), ("test", names[8:])]:
        (data / f"{split}_list.txt").write_text("\n".join(chosen) + "\n")
    captions = {name: [["a", "man", name], ["someone"]] for name in names}
    (data / "raw-captions.pkl").write_bytes(pickle.dumps(captions, 2))
    (data / "features.pkl").write_bytes(pickle.dumps({name: [[0.5]] for name in names[:6]}))
    (data / "vocabulary.pkl").write_bytes(pickle.dumps(Harmful()))
    videos = tmp_path / "YouTubeClips"
    videos.mkdir()
    for name in names:
        (videos / f"{name}.avi").write_bytes(b"")
    (tmp_path / "root" / "videos").symlink_to(videos)
    (videos / "above").symlink_to(tmp_path / "root")
    dataset = V.read_msvd(tmp_path / "root")
    assert [path.stem for path in dataset.videos] == names[8:]
    assert dataset.captions[:2] == ("a man v8_0_10", "someone")

    (data / "captions2.pkl").write_bytes(pickle.dumps({name: ["other"] for name in names}))
    with pytest.raises(ValueError, match=r"captions2.pkl \(4 entries\).*raw-captions.pkl \(8"):
        V.read_msvd(tmp_path / "root")


def test_a_video_in_two_places(tmp_path):
    make_videos(tmp_path, ["video2"], ".mp4")
    write_csv(tmp_path / "t.csv", "video_id,sentence", ["video2,a cat"])
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "video2.mp4").write_bytes(b"small")
    with pytest.raises(ValueError, match=r"compressed/video2.mp4 and videos/video2.mp4"):
        V.read_msrvtt(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no csv file has the columns .*\(none\)"):
        V.read_msrvtt(tmp_path)
    (tmp_path / "t.csv").write_text("video_id,sentence\nvideo7,hello\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 videos .* 'video7'"):
        V.read_msrvtt(tmp_path)
    (tmp_path / "t.csv").write_text("video_id,sentence\nvideo7,hello\nvideo8\n")
    with pytest.raises(ValueError, match=r"t.csv: line 3: expected a video_id and a sentence"):
        V.read_msrvtt(tmp_path)
    (tmp_path / "t.csv").write_text("video,text\nvideo7,hello\n")
    with pytest.raises(ValueError, match=r"t.csv has \('video', 'text'\)"):
        V.read_msrvtt(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a test_list.txt below it, found none"):
        V.read_msvd(tmp_path)
    (tmp_path / "test_list.txt").write_text("v1 v2")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"v1": [["x"]]}))
    with pytest.raises(ValueError, match="no captions for 1 videos, such as 'v2'"):
        V.read_msvd(tmp_path)
