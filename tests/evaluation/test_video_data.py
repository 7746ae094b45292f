"""Readers of text-video data sets, on the files and folders that are downloaded."""

import json
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest

from llave_jax.evaluation import run
from llave_jax.evaluation.benchmarks import activitynet, didemo, lsmdc, msrvtt, msvd, text_video
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
    dataset = msrvtt.read(tmp_path)
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
    dataset = msvd.read(tmp_path)
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
    dataset = msrvtt.read(downloaded)
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
    dataset = msrvtt.read(downloaded)
    assert dataset.captions[0] == "a person is doing thing 7010"
    assert len(dataset.videos) == 1000

    other = [row + " again" for row in jsfusion_rows()[0]]
    write_csv(downloaded / "other" / "rewritten.csv", HEADER, other)
    with pytest.raises(ValueError, match=r"more than one file: .*rewritten.csv \(1000 entries\)"):
        msrvtt.read(downloaded)


def test_csv_of_a_spreadsheet(tmp_path):
    """A byte order mark, and fewer captions than published numbers belong to: said, not refused."""
    make_videos(tmp_path, ["video2"], ".mp4")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfvideo_id,sentence\r\nvideo2,a cat\r\n")
    assert msrvtt.read(tmp_path).captions == ("a cat",)


def test_a_smaller_test_set_is_said(tmp_path, caplog):
    make_videos(tmp_path, ["video2"], ".mp4")
    write_csv(tmp_path / "t.csv", "video_id,sentence", ["video2,a", "video2,b"])
    msrvtt.read(tmp_path)
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
    dataset = msvd.read(tmp_path / "root")
    assert [path.stem for path in dataset.videos] == names[8:]
    assert dataset.captions[:2] == ("a man v8_0_10", "someone")

    (data / "captions2.pkl").write_bytes(pickle.dumps({name: ["other"] for name in names}))
    with pytest.raises(ValueError, match=r"captions2.pkl \(4 entries\).*raw-captions.pkl \(8"):
        msvd.read(tmp_path / "root")


def test_a_video_in_two_places(tmp_path):
    make_videos(tmp_path, ["video2"], ".mp4")
    write_csv(tmp_path / "t.csv", "video_id,sentence", ["video2,a cat"])
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "video2.mp4").write_bytes(b"small")
    with pytest.raises(ValueError, match=r"compressed/video2.mp4 and videos/video2.mp4"):
        msrvtt.read(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no csv file has the columns .*\(none\)"):
        msrvtt.read(tmp_path)
    (tmp_path / "t.csv").write_text("video_id,sentence\nvideo7,hello\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 videos .* 'video7'"):
        msrvtt.read(tmp_path)
    (tmp_path / "t.csv").write_text("video_id,sentence\nvideo7,hello\nvideo8\n")
    with pytest.raises(ValueError, match=r"t.csv: line 3: expected a video_id and a sentence"):
        msrvtt.read(tmp_path)
    (tmp_path / "t.csv").write_text("video,text\nvideo7,hello\n")
    with pytest.raises(ValueError, match=r"t.csv has \('video', 'text'\)"):
        msrvtt.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a test_list.txt below it, found none"):
        msvd.read(tmp_path)
    (tmp_path / "test_list.txt").write_text("v1 v2")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"v1": [["x"]]}))
    with pytest.raises(ValueError, match="no captions for 1 videos, such as 'v2'"):
        msvd.read(tmp_path)


def write_didemo(root):
    """As LocalizingMoments gives it: several sentences a video in any order, and names with the site's suffixes."""
    rows = [
        {"video": "12@N00_1_a.avi", "description": "a dog runs ", "times": [[0, 1], [0, 0]]},
        {"video": "34@N01_2_b.mov", "description": "first\n", "times": [[1, 1]]},
        {"video": "12@N00_1_a.avi", "description": "it sits", "times": [[2, 3]]},
        {"video": "56@N02_3_c", "description": "gone", "times": [[0, 0]]},
        {"video": "78@N03_4_d.m4v", "description": "of another split", "times": [[0, 0]]},
    ]
    (root / "test_data.json").write_text(json.dumps(rows))
    (root / "test_list.txt").write_text("12@N00_1_a.avi\n34@N01_2_b.mov\n56@N02_3_c\n")
    (root / "videos").mkdir()
    # The second was converted.
    for name in ("12@N00_1_a.avi", "34@N01_2_b.mp4", "78@N03_4_d.m4v"):
        (root / "videos" / name).write_bytes(name.encode())


def test_didemo(tmp_path, caplog):
    write_didemo(tmp_path)
    dataset = didemo.read(tmp_path)
    assert dataset.captions == ("a dog runs it sits", "first")
    assert [path.name for path in dataset.videos] == ["12@N00_1_a.avi", "34@N01_2_b.mp4"]
    assert (dataset.owners.tolist(), dataset.missing) == ([0, 1], 1)
    assert "1 of 3 videos are not below" in caplog.text
    assert (
        "has 3 videos; the test split, to which published numbers belong, has 1004" in caplog.text
    )
    results = run.evaluate(
        HashEncoder(), text_video.READERS["didemo"](tmp_path, Options()), None, tmp_path / "out"
    )
    assert [result.queries for result in results.tasks] == [2, 2]
    assert results["didemo_t2v"].settings == {"missing_videos": 1}


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("1@N0_a.3gp", "1@N0_a.3gp"),
        ("1@N0_a.wmv", "1@N0_a.mp4"),
        ("1@N0_a.MOV", "1@N0_a.MOV.mp4"),
        ("1@N0_a", "1@N0_a"),
        ("1@N0_a.asx", "1@N0_a.asx"),
    ],
)
def test_names_of_downloaded_and_converted_videos(tmp_path, listed, there):
    rows = [{"video": listed, "description": "a dog"}, {"video": "b", "description": "a cat"}]
    (tmp_path / "test_data.json").write_text(json.dumps(rows))
    # The file without a suffix is not a second "b".
    for name in (there, "b.avi", "b"):
        (tmp_path / name).write_bytes(name.encode())
    dataset = didemo.read(tmp_path)
    assert [path.name for path in dataset.videos] == [there, "b.avi"]
    assert dataset.missing == 0


sentences = st.text("ab. \t\n\u2028\xa0", min_size=1, max_size=8).filter(str.strip)


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 2), sentences), min_size=1, max_size=8))
def test_a_paragraph_is_all_sentences_in_order(tmp_path_factory, told):
    """Of rows of several videos in any order, and of the same sentences listed by video."""
    root = tmp_path_factory.mktemp("data")
    videos = list(dict.fromkeys(video for video, _ in told))
    by_video = {video: [text for owner, text in told if owner == video] for video in videos}
    rows = [{"video": f"v_{video}", "description": text} for video, text in told]
    entries = {f"v_{video}": {"sentences": texts} for video, texts in by_video.items()}
    (root / "test_data.json").write_text(json.dumps(rows))
    (root / "val_1.json").write_text(json.dumps(entries))
    make_videos(root, [f"v_{video}" for video in videos], ".mp4")
    for dataset in (didemo.read(root), activitynet.read(root)):
        assert [path.stem for path in dataset.videos] == [f"v_{video}" for video in videos]
        for caption, texts in zip(dataset.captions, by_video.values(), strict=True):
            assert caption.split(" ") == [word for text in texts for word in text.split()]


def test_activitynet(tmp_path):
    entries = {
        "v_abc-1": {
            "duration": 9.5,
            "timestamps": [[0, 4], [4, 9]],
            "sentences": [" A man. ", "He runs."],
        },
        "v_v_x": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["Snow falls."]},
        "v_other": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["Not asked."]},
    }
    (tmp_path / "val_1.json").write_text(json.dumps(entries))
    (tmp_path / "val_ids.json").write_text(json.dumps(["v_v_x", "v_abc-1", "v_v_x"]))
    (tmp_path / "Activity_Videos").mkdir()
    for name in ("v_abc-1.mp4", "v_x.webm", "other.mkv"):
        (tmp_path / "Activity_Videos" / name).write_bytes(name.encode())
    dataset = activitynet.read(tmp_path)
    assert dataset.captions == ("Snow falls.", "A man. He runs.")
    assert [path.name for path in dataset.videos] == ["v_x.webm", "v_abc-1.mp4"]
    (tmp_path / "val_ids.json").write_text(json.dumps(["v_none"]))
    with pytest.raises(
        ValueError, match=r"val_ids.json: 1 of 1 videos have no sentences .* 'v_none'"
    ):
        activitynet.read(tmp_path)
    (tmp_path / "val_1.json").write_text(json.dumps({"v_a": {"sentences": "text"}}))
    with pytest.raises(ValueError, match=r"val_1.json: 'v_a': expected sentences, a list of texts"):
        activitynet.read(tmp_path)


def test_lsmdc(tmp_path):
    clips = ["1004_Juno_00.00.32.161-00.00.35.421", "1001_Flight_00.00.01.000-00.00.02.000"]
    table = "".join(
        f"{clip}\t00:00:32\t00:00:35\t00.00.32\t00.00.35\tSOMEONE walks\x85 {n}.  \n"
        for n, clip in enumerate(clips)
    )
    path = tmp_path / "LSMDC16_challenge_1000_publictect.csv"
    # A character that ends a line for str.splitlines, not for a file.
    path.write_text(table, encoding="utf-8")
    for clip in clips:
        folder = tmp_path / clip.rsplit("_", 1)[0]
        folder.mkdir()
        (folder / f"{clip}.avi").write_bytes(clip.encode())
    dataset = lsmdc.read(tmp_path)
    assert dataset.captions == ("SOMEONE walks\x85 0.", "SOMEONE walks\x85 1.")
    assert [video.name for video in dataset.videos] == [f"{clip}.avi" for clip in clips]
    path.write_text(table + "clip\twithout\tcells\n")
    with pytest.raises(ValueError, match=r"publictect.csv: line 3: expected 6 cells with tabs"):
        lsmdc.read(tmp_path)
    path.write_text(table)
    (tmp_path / "1004_Juno" / f"{clips[0]}.avi").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 videos are not below .*1004_Juno_00"):
        lsmdc.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "test_data.json: not JSON"),
        ("{}", "test_data.json: expected a list of rows, found dict"),
        ('[{"video": "a.avi", "description": 3}]', "row 0: expected texts video and description"),
    ],
)
def test_malformed_didemo_is_named(tmp_path, content, message):
    write_didemo(tmp_path)
    (tmp_path / "test_data.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        didemo.read(tmp_path)
