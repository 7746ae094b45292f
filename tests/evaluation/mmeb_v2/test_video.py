"""MMEB-V2's video tasks: the wording to the letter, which frames are used, and what is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax.evaluation.benchmarks.base import Options
from llave_jax.evaluation.benchmarks.mmeb_v2 import frames, tasks, video
from llave_jax.evaluation.benchmarks.mmeb_v2.benchmark import MmebV2
from llave_jax.evaluation.task import Task
from tests.evaluation.mmeb_v2.miniature import CATEGORIES, FRAMES, Miniature, frame_names

CONFIGS = {"MSR-VTT": "test_1k", "NExTQA": "MC", "EgoSchema": "Subset"}
SPLITS = {"YouCook2": "val", "MVBench": "train"}


def read(root: Path, task: str, rows: list[dict], folders: dict[str, list[str]], **options) -> Task:
    """The task of these rows and frames."""
    mini = Miniature(root)
    configs = tasks.TASKS[task].configs if task == "MVBench" else [CONFIGS.get(task)]
    spec = tasks.TASKS[task]
    for config, part in zip(configs, [rows, *[rows[:1]] * (len(configs) - 1)], strict=True):
        mini.table(spec.repository, config, SPLITS.get(task, "test"), part)
    for folder, names in folders.items():
        mini.frames(task, folder, names)
    return MmebV2(root, Options(**options)).read(task)


def shown(root: Path, task: str, item) -> list[str]:
    """Frames or pictures of an item, below the folder of the task."""
    folder = root / "video-tasks/frames" / FRAMES[task][-1]
    assert not (item.video and item.images)
    return [str(Path(path).relative_to(folder)) for path in (item.video or item.images)]


def clips(folder: str, count: int = 3) -> list[str]:
    return [f"{folder}/{name}" for name in frame_names(count)]


ASK = (
    "<image> Given a video and a question, select the most accurate answer from the provided candidates. Return only "
    "the exact text of your chosen answer. Question:  "
)
# Task -> row, folder of its frames, text of the query, names and texts of the first candidates, the right one.
VIDEO_QUERIES = {
    "K700": (
        {"video_id": "abc_1", "pos_text": "archery"},
        "abc_1",
        "<image> Recognize the category of the video content.",
        [("archery", "archery"), ("waiting_in_line", "waiting_in_line")],
        "archery",
    ),
    "SmthSmthV2": (
        {"video_id": 74225, "pos_text": "Closing [it]", "neg_text": ["Opening it", "Closing [it]"]},
        "74225",
        "<image> What actions or object interactions are being performed by the person in the video?",
        [("Opening it", "Opening it"), ("Closing [it]", "Closing [it]")],
        "Closing [it]",
    ),
    "HMDB51": (
        {"video_id": "a.b", "pos_text": "ride_bike"},
        "a.b",
        "<image> What actions or objects interactions are the person in the video doing?",
        [("ride_bike", "ride_bike")],
        "ride_bike",
    ),
    "UCF101": (
        {"video_id": "v_1", "pos_text": "PlayingDaf"},
        "v_1",
        "<image> What activities or sports are being performed by the person in the video?",
        [("PlayingDaf", "PlayingDaf")],
        "PlayingDaf",
    ),
    "Breakfast": (
        {"video_id": "P03 cam01", "pos_text": "tea"},
        "P03 cam01",
        "<image> Recognize the breakfast type that the person is cooking in the video. ",
        [("tea", "tea")],
        "tea",
    ),
    "Video-MME": (
        {
            "question": "What is it?",
            "videoID": "fFjv93ACGo8",
            "options": ["A. A cat.", "B. Mr. Dot", "C. 3.5 m", "D. None"],
            "answer": "B",
        },
        "fFjv93ACGo8",
        ASK + "What is it?\nA. A cat.\nB. Mr. Dot\nC. 3.5 m\nD. None",
        [
            ("A. A cat.", "A cat"),
            ("B. Mr. Dot", "Mr. Dot"),
            ("C. 3.5 m", "3.5 m"),
            ("D. None", "None"),
        ],
        "B. Mr. Dot",
    ),
    "NExTQA": (
        {
            "question": "why is she there",
            "video": 4010069381,
            "answer": 2,
            **{f"a{place}": f"reason {place}" for place in range(5)},
        },
        "4010069381",
        ASK + "why is she there\nOptions:\n(A) reason 0\n(B) reason 1\n(C) reason 2\n"
        "(D) reason 3\n(E) reason 4",
        [(f"reason {place}", f"reason {place}") for place in range(5)],
        "reason 2",
    ),
    "EgoSchema": (
        {
            "question": "What does c do?",
            "video_idx": "0074f737",
            "answer": "1",
            "option": ["A. C cooks.", "B. C eats... "],
        },
        "0074f737",
        ASK + "What does c do?A. C cooks. B. C eats... ",
        [("A. C cooks.", "C cooks"), ("B. C eats... ", "C eats")],
        "B. C eats... ",
    ),
    "MVBench": (
        {
            "question": "Who is first?",
            "video": "166583.webm",
            "candidates": ["red", "blue", "red", "green "],
            "answer": "red",
        },
        "episodic_reasoning/166583.webm",
        ASK + "Who is first?\nOptions:\n(A) red\n(B) blue\n(C) red\n(D) green",
        [(name, name) for name in ("(A) red", "(B) blue", "(C) red", "(D) green ")],
        "(C) red",
    ),
    "ActivityNetQA": (
        {"question": "is it raining", "video_name": "1QIUV7WYKXg", "answer": "no"},
        "v_1QIUV7WYKXg",
        ASK + "is it raining? (A) yes; (B) no.",
        [("yes", "yes"), ("no", "no")],
        "no",
    ),
}
# Task -> row, folder of its frames, text of the query.
TEXT_QUERIES = {
    "MSR-VTT": (
        {"video_id": "video9770", "video": "video9770.mp4", "caption": "a person"},
        "video9770",
        "Find a video that contains the following visual content: a person",
    ),
    "MSVD": (
        {"video_id": "xY_0_5", "video": "xY_0_5.avi", "caption": ["a person", "another"]},
        "xY_0_5",
        "Find the video snippet that corresponds to the given summary: a person",
    ),
    "DiDeMo": (
        {"video": "test/35@N00_2.x.mov", "caption": ""},
        "35@N00_2.x",
        "Find a video that includes the following described scenes:",
    ),
    "YouCook2": (
        {"id": "xHr8_0", "video_path": "validation/415/xHr8_0.mp4", "sentence": "cut it"},
        "xHr8_0",
        "Find a video that demonstrates the following action while making a recipe: cut it",
    ),
    "VATEX": (
        {"videoID": "Ptf_10", "enCap": ["a person", "another"]},
        "Ptf_10",
        "Select a video that fits the description provided: a person",
    ),
}


@pytest.mark.parametrize("name", VIDEO_QUERIES)
def test_questions_about_videos_and_their_classes(tmp_path, name):
    row, folder, text, candidates, right = VIDEO_QUERIES[name]
    other = [] if name != "MVBench" else [f"{c}/{row['video']}" for c in tasks.MVBENCH]
    task = read(tmp_path, name, [row], {f: frame_names(3) for f in (folder, *other)})
    assert task.queries[0].text == text
    assert shown(tmp_path, name, task.queries[0]) == clips(folder)
    ranked = range(task.count) if task.pools is None else task.pools[0]
    found = [(task.candidate_names[place], task.candidates[place].text) for place in ranked]
    assert found[: len(candidates)] == candidates
    assert [task.candidate_names[place] for place in task.relevant[0]] == [right]
    classes = {"K700": 700, "HMDB51": 51, "UCF101": 101, "Breakfast": 10}
    assert len(found) == classes.get(name, len(candidates))
    assert (task.pools is None) == (name in classes)


@pytest.mark.parametrize("name", TEXT_QUERIES)
def test_captions_of_videos(tmp_path, name):
    row, folder, text = TEXT_QUERIES[name]
    task = read(tmp_path, name, [row], {folder: frame_names(3)})
    assert (task.queries[0].text, task.queries[0].video) == (text, None)
    assert task.candidates[0].text == "<image> Understand the content of the provided video."
    assert shown(tmp_path, name, task.candidates[0]) == clips(folder)
    assert task.pools is None
    assert task.candidate_names == [folder]


@pytest.mark.parametrize("name", ["QVHighlight", "Charades-STA"])
def test_clips_of_a_video(tmp_path, name):
    row = {"query": "he waves", "video_path": "some/where/v.1_60.0_210.0.mp4"}
    folders = {
        f"v.1_60.0_210.0/{clip}": frame_names(count)
        for clip, count in (("query", 20), ("negative_10", 3), ("negative_9", 8), ("positive", 9))
    }
    task = read(tmp_path, name, [row, {**row, "query": "he sits"}], folders, frames=4)
    asked = "<image> Find the clip that corresponds to the described scene in the given video:"
    assert [item.text for item in task.queries] == [f"{asked} he waves", f"{asked} he sits"]
    query = shown(tmp_path, name, task.queries[0])
    assert [path[-8:-4] for path in query] == ["0001", "0007", "0013", "0020"]
    folder = "v.1_60.0_210.0"
    assert task.candidate_names == [
        f"{folder}/{c}" for c in ("negative_9", "negative_10", "positive")
    ]
    assert [len(item.video) for item in task.candidates] == [4, 3, 4]
    assert {item.text for item in task.candidates} == {
        "<image> Understand the content of the provided video."
    }
    assert [pool.tolist() for pool in task.pools] == [[0, 1, 2]] * 2
    assert [right.tolist() for right in task.relevant] == [[2]] * 2
    assert task.settings == {"frames": 4}


def test_moment_seeker(tmp_path):
    def row(number, shown, right):
        clips = [{"output_path": f"movie/{number}_{place}.mp4.mp4"} for place in range(3)]
        return {
            "query": f"text {number}",
            "input_frames": shown,
            "positive_frames": clips[:right],
            "negative_frames": clips[right:],
        }

    rows = [row(0, "a/q.mp4", 1), row(1, "q_1.jpg", 2), row(2, "", 1), row(2, "x.png", 2)]
    folders = {
        f"video_frames/movie_{number}_{place}": frame_names(10 + place)
        for number in range(3)
        for place in range(3)
    }
    folders |= {"video_frames/a_q": frame_names(12), ".": ["query_q_1.jpg"]}
    task = read(tmp_path, "MomentSeeker", rows, folders, frames=4)
    assert [item.text for item in task.queries] == [
        "<image> Find the clip that corresponds to the given sentence and video segment: text 0",
        "<image> Select the video clip that aligns with the given text and image: text 1",
        "Find the clip that corresponds to the given text: text 2",
        "Find the clip that corresponds to the given text: text 2",
    ]
    # All frames are used, whatever number is asked for.
    assert shown(tmp_path, "MomentSeeker", task.queries[0]) == clips("video_frames/a_q", 12)
    assert task.settings == {"frames": "all"}
    assert shown(tmp_path, "MomentSeeker", task.queries[1]) == ["query_q_1.jpg"]
    assert task.queries[2].video is None
    assert not task.queries[2].images
    assert [len(item.video) for item in task.candidates] == [10, 11, 12] * 3
    assert {item.text for item in task.candidates} == {
        "<image> Understand the content of the provided video clip."
    }
    assert [pool.tolist() for pool in task.pools] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8]]
    assert [right.tolist() for right in task.relevant] == [[0], [3, 4], [6], [6, 7]]


def test_mvbench_is_read_in_the_order_of_its_configs(tmp_path):
    root = Miniature(tmp_path).write(["MVBench"])
    task = MmebV2(root).read("MVBench")
    folders = [shown(root, "MVBench", item)[0].split("/")[0] for item in task.queries]
    assert folders == list(tasks.MVBENCH)
    assert shown(root, "MVBench", task.queries[0])[0].endswith("castle_s01e02_clip_03/00001.jpg")


def test_only_the_first_thousand_rows_of_something_something(tmp_path):
    row = {"video_id": 1, "pos_text": "a", "neg_text": ["a", "b"]}
    task = read(tmp_path, "SmthSmthV2", [row] * 1003, {"1": frame_names(1)})
    assert len(task.queries) == 1000


def test_a_class_that_is_not_in_the_list_is_a_candidate_too(tmp_path):
    rows = [{"video_id": "a", "pos_text": name} for name in ("tea", "new", "tea")]
    task = read(tmp_path, "Breakfast", rows, {"a": frame_names(1)})
    assert task.count == 11
    assert task.candidate_names[:2] == ["tea", "new"]
    assert [right.tolist() for right in task.relevant] == [[0], [1], [0]]


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (8, 64, [0, 9, 18, 27, 36, 45, 54, 63]),
        (8, 9, [0, 1, 2, 3, 4, 5, 6, 8]),
        (8, 12, [0, 1, 3, 4, 6, 7, 9, 11]),
        (8, 8, list(range(8))),
        (8, 7, list(range(7))),
        (1, 5, [0]),
        (None, 70, list(range(70))),
    ],
)
def test_frames_that_are_used(count, total, expected):
    names = [str(number) for number in range(total)]
    assert frames.sample(names, count) == [names[place] for place in expected]


@given(st.integers(2, 70), st.integers(1, 200))
def test_frames_are_evenly_spread(count, total):
    chosen = [int(name) for name in frames.sample([str(n) for n in range(total)], count)]
    assert len(chosen) == min(count, total)
    assert (chosen[0], chosen[-1]) == (0, total - 1)
    steps = np.diff(chosen)
    assert (steps > 0).all()
    if total >= count:
        assert steps.max() <= (total - 1) / (count - 1) + 1


@given(st.lists(st.integers(0, 10**7), min_size=1, unique=True), st.integers(0, 6), st.booleans())
def test_frames_are_in_the_order_of_their_numbers(numbers, width, upper):
    names = [f"{'Frame' if upper else 'frame'}_{number:0{width}}.jpg" for number in numbers]
    assert sorted(names, key=frames.natural_key) == [
        name for _, name in sorted(zip(numbers, names, strict=True))
    ]


def test_only_pictures_are_frames(tmp_path):
    names = ["2.JPG", "10.jpeg", "1.png", "0.gif", "notes.txt", "._1.jpg", "3.webp"]
    task = read(tmp_path, "UCF101", [{"video_id": "v", "pos_text": "YoYo"}], {"v": names})
    assert shown(tmp_path, "UCF101", task.queries[0]) == ["v/1.png", "v/2.JPG", "v/10.jpeg"]


@pytest.mark.parametrize("archived", [False, True])
def test_layouts_of_folders_have_the_same_frames(tmp_path, archived):
    names = CATEGORIES["V-RET"] + ["Charades-STA", "EgoSchema"]
    found = {}
    for saved in (False, True):
        root = Miniature(tmp_path / str(saved), saved=saved, archived=archived).write(names)
        benchmark = MmebV2(root)
        for name in names:
            task = benchmark.read(name)
            items = itertools.chain(task.queries, task.candidates)
            seen = [[Path(path).read_bytes() for path in item.video or ()] for item in items]
            assert any(seen)
            assert found.setdefault(name, seen) == seen


def test_missing_frames_are_listed_before_anything_is_computed(tmp_path):
    rows = [{"video_id": f"v{number}", "pos_text": "YoYo"} for number in range(5)]
    there = {f"v{number}": frame_names(1) for number in (0, 4)} | {"v2": ["notes.txt"]}
    with pytest.raises(FileNotFoundError) as refused:
        read(tmp_path, "UCF101", rows, there)
    said = str(refused.value)
    assert "2 of its videos and pictures" in said
    assert f"UCF101/v1 ({tmp_path}" in said
    assert "row 1) does not exist" in said
    assert "v2 (" in said
    assert "has no frames" in said
    (missing,) = MmebV2(tmp_path).missing(["UCF101"])
    assert missing.what in said
    assert "video_cls" in missing.command


MISTAKES = [
    ("Video-MME", {"answer": "E"}, "answer: expected a letter from A to D; found 'E'"),
    ("Video-MME", {"options": []}, "options: expected a list of texts"),
    ("NExTQA", {"answer": 5}, "answer: expected a number from 0 to 4; found 5"),
    ("EgoSchema", {"answer": "-1"}, "answer: expected a number from 0 to 1"),
    ("EgoSchema", {"video_idx": 1.5}, "video_idx: expected a text or a whole number"),
    ("MVBench", {"answer": "pink"}, "answer: expected one of"),
    ("ActivityNetQA", {"answer": "maybe"}, "answer: expected yes or no"),
    ("SmthSmthV2", {"neg_text": ["Opening it"]}, "neg_text: expected the right answer"),
    ("K700", {"pos_text": 3}, "pos_text: expected a text; found 3"),
    ("HMDB51", {"video_id": "../../other"}, "leaves"),
]


@pytest.mark.parametrize(("name", "change", "expected"), MISTAKES)
def test_a_malformed_row_is_named(tmp_path, name, change, expected):
    row, folder, *_ = VIDEO_QUERIES[name]
    with pytest.raises(ValueError, match="row 0") as refused:
        read(tmp_path, name, [row | change], {folder: frame_names(1)})
    assert expected in str(refused.value)


def test_a_video_without_a_right_clip_is_named(tmp_path):
    row = {"query": "q", "video_path": "v.mp4"}
    folders = {"v/query": frame_names(1), "v/negative_1": frame_names(1)}
    with pytest.raises(ValueError, match=r"row 0: .*QVHighlight/v: expected a folder positive"):
        read(tmp_path, "QVHighlight", [row], folders)


def test_a_number_of_frames_below_one_is_refused(tmp_path):
    row, folder, *_ = VIDEO_QUERIES["K700"]
    with pytest.raises(ValueError, match="frames is 0"):
        read(tmp_path, "K700", [row], {folder: frame_names(1)}, frames=0)


def test_every_video_task_has_a_parser():
    names = {name for name, spec in tasks.TASKS.items() if spec.modality == "video"}
    assert set(video.PARSERS) == names
    assert set(VIDEO_QUERIES) | set(TEXT_QUERIES) | set(CATEGORIES["V-MRET"]) == names
