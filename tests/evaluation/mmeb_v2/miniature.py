"""MMEB-V2 in miniature: all 78 tasks in the hub's form, with a few rows and pictures of a few pixels.

Names, layouts and fields are written out here, not taken from the package. Nothing in a picture is right or wrong:
which candidate a stand-in model ranks first is left to chance.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet

_CATEGORIES = {
    "I-CLS": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    "I-QA": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA",
    "I-RET": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ Wiki-SS-NQ "
    "OVEN EDIS",
    "I-VG": "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing",
    "V-CLS": "K700 SmthSmthV2 HMDB51 UCF101 Breakfast",
    "V-QA": "MVBench Video-MME NExTQA EgoSchema ActivityNetQA",
    "V-RET": "DiDeMo MSR-VTT MSVD VATEX YouCook2",
    "V-MRET": "QVHighlight Charades-STA MomentSeeker",
    "VD-ViDoRe-V1": "ViDoRe_arxivqa ViDoRe_docvqa ViDoRe_infovqa ViDoRe_tabfquad ViDoRe_tatdqa ViDoRe_shiftproject "
    "ViDoRe_syntheticDocQA_artificial_intelligence ViDoRe_syntheticDocQA_energy "
    "ViDoRe_syntheticDocQA_government_reports ViDoRe_syntheticDocQA_healthcare_industry",
    "VD-ViDoRe-V2": "ViDoRe_esg_reports_human_labeled_v2 ViDoRe_biomedical_lectures_v2_multilingual "
    "ViDoRe_economics_reports_v2_multilingual ViDoRe_esg_reports_v2_multilingual",
    "VD-VisRAG": "VisRAG_ArxivQA VisRAG_ChartQA VisRAG_MP-DocVQA VisRAG_SlideVQA VisRAG_InfoVQA VisRAG_PlotQA",
    "VD-OOD": "ViDoSeek-page ViDoSeek-doc MMLongBench-page MMLongBench-doc",
}
# Category -> tasks, in the order of the leaderboard's tables.
CATEGORIES = {category: names.split() for category, names in _CATEGORIES.items()}
TASKS = [name for names in CATEGORIES.values() for name in names]

_IMAGES = [name for key, names in CATEGORIES.items() if key[:2] == "I-" for name in names]
IMAGE_TO_TEXT = CATEGORIES["I-CLS"] + ["VisualNews_i2t", "MSCOCO_i2t"]
TEXT_TO_IMAGE = ["VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA", "Wiki-SS-NQ", "EDIS"]
# Those whose pictures have captions.
CAPTIONED = ["WebQA", "EDIS", "OVEN", "RefCOCO-Matching"]

_MVBENCH = """
episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action
object_existence object_interaction object_shuffle moving_direction action_localization scene_transition action_count
moving_count moving_attribute state_change fine_grained_pose character_order egocentric_navigation
counterfactual_inference
"""
MVBENCH = _MVBENCH.split()

# Task -> repository, where it is not VLM2Vec/TASK.
REPOSITORIES = {
    "K700": "VLM2Vec/Kinetics-700",
    "YouCook2": "lmms-lab/YouCook2",
    "ViDoSeek-page": "VLM2Vec/ViDoSeek-page-fixed",
    "ViDoSeek-doc": "VLM2Vec/ViDoSeek",
    "MMLongBench-page": "VLM2Vec/MMLongBench-page-fixed",
    "ViDoRe_esg_reports_human_labeled_v2": "vidore/esg_reports_human_labeled_v2",
    **{
        f"ViDoRe_{name}_v2_multilingual": f"vidore/{name}_v2"
        for name in ("biomedical_lectures", "economics_reports", "esg_reports")
    },
    **{
        f"ViDoRe_{name}": f"vidore/{name}_test_subsampled_beir"
        for name in ("arxivqa", "docvqa", "infovqa", "tabfquad")
    },
    **{name: f"vidore/{name[7:]}_test_beir" for name in CATEGORIES["VD-ViDoRe-V1"][4:]},
    **{
        name: f"openbmb/VisRAG-Ret-Test-{name.removeprefix('VisRAG_')}"
        for name in CATEGORIES["VD-VisRAG"]
    },
}
# Task -> folder of its frames, as the archives have it, and as VLM2Vec's settings have it where they differ.
FRAMES = {
    "K700": ("video_cls/K700",),
    "SmthSmthV2": ("video_cls/SSv2",),
    **{name: (f"video_cls/{name}",) for name in ("HMDB51", "UCF101", "Breakfast")},
    **{
        name: (f"video_ret/data/ziyan/video_retrieval/{name}/frames", f"video_ret/{name}")
        for name in CATEGORIES["V-RET"]
    },
    "QVHighlight": ("video_mret/QVHighlight",),
    "Charades-STA": ("video_mret/Charades-STA", "video_mret/Charades_STA"),
    "MomentSeeker": ("video_mret/MomentSeeker",),
    **{name: (f"video_qa/{name}",) for name in CATEGORIES["V-QA"]},
    "EgoSchema": ("video_qa/egoschema", "video_qa/EgoSchema"),
}


class Miniature:
    """Writes tasks below a data root.

    Args:
      root: the data root.
      saved: annotations as folders of `save_to_disk`, otherwise as cloned repositories with parquet files.
      archived: pictures in the hub's tar archives, otherwise unpacked, in folders as VLM2Vec's settings name them.
    """

    def __init__(self, root: Path, *, saved: bool = False, archived: bool = False):
        self.root, self.saved, self.archived = root, saved, archived
        self._pixels = root / ".unpacked" if archived else root

    def write(self, tasks: list[str] | None = None) -> Path:
        """Writes tasks; None: all 78. Returns the data root."""
        for name in tasks or TASKS:
            if name in FRAMES:
                _VIDEO_WRITERS[name](self, name)
            elif name in _IMAGES:
                self._images(name)
            else:
                self._documents(name)
        if self.archived:
            self._archive()
        return self.root

    def table(
        self, repository: str, config: str | None, split: str, rows: list[dict], shards: int = 1
    ) -> None:
        """Writes the annotations of a split."""
        table = pa.Table.from_pylist(rows)
        ends = np.linspace(0, len(rows), shards + 1, dtype=int)
        parts = [table.slice(a, b - a) for a, b in itertools.pairwise(ends)]
        if not self.saved:
            folder = self.root / repository / (config or "data")
            folder.mkdir(parents=True, exist_ok=True)
            for number, part in enumerate(parts):
                name = f"{split}-{number:05}-of-{shards:05}.parquet"
                pyarrow.parquet.write_table(part, folder / name)
            return
        folder = self.root / "annotation" / repository / (config or "")
        folder.mkdir(parents=True, exist_ok=True)
        files = [f"data-{number:05}-of-{shards:05}.arrow" for number in range(shards)]
        for part, name in zip(parts, files, strict=True):
            with pa.ipc.new_stream(str(folder / name), part.schema) as stream:
                stream.write_table(part)
        state = {"_data_files": [{"filename": name} for name in files], "_split": split}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))

    def picture(self, path: str) -> str:
        """Writes a picture below the image tasks' root. Returns its path."""
        _write(self._pixels / "image-tasks" / path, picture(path))
        return path

    def frames(self, task: str, folder: str, names: list[str]) -> None:
        """Writes frames into a video's folder; the folder of a task is that of its layout."""
        where = FRAMES[task][0 if self.archived or self.saved else -1]
        for name in names:
            path = f"video-tasks/frames/{where}/{folder}/{name}"
            _write(self._pixels / path, picture(f"{task}/{folder}/{name}"))

    def _images(self, name: str) -> None:
        rows = []
        for number in range(4):
            copies = [0, 1, 2, 1] if number % 2 else [0, 1, 2]
            texts = [f"{name} text {(number + place) % 6}" for place in copies]
            # Odd paths: spaces, capitals, letters beyond ASCII, other suffixes.
            paths = [f"{name}/tgt é {(number + place) % 6}.JPEG" for place in copies]
            query = f"{name}/query_{number % 3}.png"
            row = {
                "qry_inst": "<|image_1|>\nFind what belongs to the image.",
                "qry_text": f"question {number}" if number else "",
                "qry_img_path": self.picture(query),
                "tgt_inst": "",
                "tgt_text": texts,
                "tgt_img_path": [""] * len(texts),
            }
            if name in TEXT_TO_IMAGE:
                row |= {"qry_inst": "Find an image.", "qry_img_path": ""}
                row["qry_text"] = f"caption {number}"
            if name not in IMAGE_TO_TEXT + CATEGORIES["I-QA"]:
                row |= {
                    "tgt_inst": "\nRepresent the given image.",
                    "tgt_img_path": [self.picture(path) for path in paths],
                    "tgt_text": texts if name in CAPTIONED else [""] * len(texts),
                }
            if name == "WebQA":  # One picture with two captions counts as one candidate.
                row["tgt_text"] = [f"{text} in row {number}" for text in texts]
            rows.append(row)
        self.table("ziyjiang/MMEB_Test_Instruct", name, "test", rows)

    def _documents(self, name: str) -> None:
        repository = REPOSITORIES.get(name, f"VLM2Vec/{name}")
        split = "train" if name in CATEGORIES["VD-VisRAG"] else "test"
        numbered = name in CATEGORIES["VD-ViDoRe-V1"] + CATEGORIES["VD-ViDoRe-V2"]
        ids: list[int | str] = [3, 1, 20, 100, 7, 8]
        if name in CATEGORIES["VD-VisRAG"]:
            ids = [f"{'a very long name, ' * 4}page {number} of it.jpg" for number in ids]
        elif not numbered:
            ids = [f"report (2nd) é.pdf_{number}" for number in ids]
        queries: list[int | str] = [5, 4, 10] if numbered else ["q-5", "q/4", "10"]
        languages = ["english", "french", "english"]
        corpus = []
        for place, page in enumerate(ids):
            content = f"{name}/{0 if place == 5 else page}"  # Two pages have one picture.
            image = {"bytes": picture(content), "path": f"{page}.png"}
            corpus.append({"corpus-id": page, "image": image})
        asked = [
            {"query-id": query, "query": f"{name} asks {query}"}
            | ({"language": language} if name in CATEGORIES["VD-ViDoRe-V2"] else {})
            for query, language in zip(queries, languages, strict=True)
        ]
        grades = (2, 1, 1) if name in CATEGORIES["VD-ViDoRe-V2"] else (1, 1, 1)
        relevant = [
            (queries[0], ids[1], grades[0]),
            (queries[0], ids[2], grades[1]),
            (queries[1], ids[2], 1),
            # A pair that is repeated with less relevance, and one without any.
            (queries[2], ids[5], grades[0]),
            (queries[2], ids[5], 1),
            (queries[2], ids[0], 0),
        ]
        qrels = [{"query-id": q, "corpus-id": page, "score": score} for q, page, score in relevant]
        self.table(repository, "queries", split, asked)
        self.table(repository, "corpus", split, corpus, shards=2)
        self.table(repository, "qrels", split, qrels)

    def _archive(self) -> None:
        """The tar archives of TIGER-Lab/MMEB-V2, each with the folders that it really has."""
        images, videos = self._pixels / "image-tasks", self._pixels / "video-tasks/frames"
        if images.exists():
            _tar(self.root / "image-tasks/mmeb_v1.tar.gz", images, "MMEB")
        for name in ("video_cls", "video_ret"):
            if (videos / name).exists():
                _tar(self.root / f"video-tasks/frames/{name}.tar.gz", videos / name, ".")
        for name in ("video_mret", "video_qa"):
            if (videos / name).exists():
                _tar(self.root / f"video-tasks/frames/{name}.tar.gz", videos / name, name)
        whole = self.root / "video-tasks/frames/video_qa.tar.gz"
        if whole.exists():
            content = whole.read_bytes()
            whole.unlink()
            step = len(content) // 5 + 1
            for number in range(5):
                part = content[number * step : (number + 1) * step]
                whole.with_name(f"{whole.name}-{number:02}").write_bytes(part)
        shutil.rmtree(self._pixels)


def picture(name: str) -> bytes:
    """A PNG of 8 x 6 pixels that its name decides."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def frame_names(count: int, form: str = "frame_{:04d}.jpg", step: int = 1) -> list[str]:
    """Names of frames, with gaps where `step` is above 1."""
    return [form.format(1 + step * number) for number in range(count)]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _tar(path: Path, folder: Path, top: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, arcname=top)


def _classification(mini: Miniature, task: str) -> None:
    classes = {
        "K700": ["waiting_in_line", "archery", "archery"],
        "HMDB51": ["ride_bike", "brush_hair", "shoot_ball"],
        "UCF101": ["PlayingDaf", "ApplyEyeMakeup", "YoYo"],
        "Breakfast": ["scrambledegg", "tea", "a_name_that_is_not_in_the_list"],
    }[task]
    videos = [f"{task} #1 (2).x_1", "-Abc&d", "v"]
    for video, count in zip(videos, (12, 3, 9), strict=True):
        mini.frames(task, video, frame_names(count))
    rows = [{"video_id": v, "pos_text": c} for v, c in zip(videos, classes, strict=True)]
    mini.table(REPOSITORIES.get(task, f"VLM2Vec/{task}"), None, "test", rows)


def _something(mini: Miniature, task: str) -> None:
    names = [f"Putting {thing} onto [something]" for thing in ("a cup", "a pen", "two pens")]
    rows = []
    for number, video in enumerate((74225, 116154, 3)):
        mini.frames(task, str(video), frame_names(9))
        rows.append({"video_id": video, "pos_text": names[number], "neg_text": names})
    mini.table(f"VLM2Vec/{task}", None, "test", rows)


def _retrieval(mini: Miniature, task: str) -> None:
    rows = []
    for number, count in enumerate((12, 2, 8, 64)):
        stem = {"DiDeMo": f"54322{number}@N00_24085.a", "YouCook2": f"xHr8X2Wpmno_{number}"}.get(
            task, f"video{number}"
        )
        mini.frames(task, stem, frame_names(count))
        caption = f"somebody does the thing {number}"
        row: dict = {"video_id": stem, "video": f"{stem}.mp4", "caption": caption}
        if task == "MSVD":
            row["caption"] = [caption, "another caption"]
        elif task == "DiDeMo":
            row = {"video": f"test/{stem}.mov", "caption": caption}
        elif task == "VATEX":
            row = {"videoID": stem, "enCap": [caption, "another caption"]}
        elif task == "YouCook2":
            row = {"id": stem, "video_path": f"val/{stem}.mp4", "sentence": caption}
        rows.append(row)
    config, split = {"MSR-VTT": ("test_1k", "test"), "YouCook2": (None, "val")}.get(
        task, (None, "test")
    )
    mini.table(REPOSITORIES.get(task, f"VLM2Vec/{task}"), config, split, rows, shards=2)


def _clips(mini: Miniature, task: str) -> None:
    rows = []
    for number in range(3):
        video = f"{task}_{number}.clip_60.0_210.0"
        mini.frames(task, f"{video}/query", frame_names(20))
        for clip in ("positive", *(f"negative_{place}" for place in (1, 2, 10))):
            mini.frames(task, f"{video}/{clip}", frame_names(8 if clip == "positive" else 3))
        rows.append({"query": f"moment {number}", "video_path": f"videos/{video}.mp4"})
    # Two rows of one video.
    rows.append({"query": "another moment", "video_path": rows[0]["video_path"]})
    mini.table(f"VLM2Vec/{task}", None, "test", rows)


def _seeker(mini: Miniature, task: str) -> None:
    rows = []
    for number, shown in enumerate(("movie/q.mp4", "picture.jpg", "")):
        clips = [f"cartoon/{number}_{place}.mp4" for place in range(4)]
        for place, clip in enumerate(clips):
            folder = clip.replace("/", "_").removesuffix(".mp4")
            mini.frames(task, f"video_frames/{folder}", frame_names(2 + 4 * place))
        paths = [{"output_path": clip, "start": 0.5} for clip in clips]
        rows.append(
            {
                "query": f"what happens {number}",
                "input_frames": shown,
                "positive_frames": paths[: 1 + number % 2],
                "negative_frames": paths[1 + number % 2 :],
            }
        )
    mini.frames(task, "video_frames/movie_q", frame_names(5))
    mini.frames(task, ".", ["query_picture.jpg"])
    mini.table(f"VLM2Vec/{task}", None, "test", rows)


def _mv_bench(mini: Miniature, task: str) -> None:
    for place, config in enumerate(MVBENCH):
        video = "castle_s01e02_clip_03" if place == 0 else f"{place}.mp4"
        mini.frames(task, f"{config}/{video}", frame_names(9, "{:05d}.jpg", step=3))
        candidates = ["Yes.", "No.", "not sure"][: 2 + place % 2]
        row = {
            "video": video,
            "question": f"Does it happen in {config}?",
            "candidates": candidates,
            "answer": candidates[place % len(candidates)],
        }
        mini.table(f"VLM2Vec/{task}", config, "train", [row])


def _questions(mini: Miniature, task: str) -> None:
    rows, config = [], {"NExTQA": "MC", "EgoSchema": "Subset"}.get(task)
    for number in range(3):
        question = f"what is seen {number}"
        options = [f"{letter}. Thing {letter}{number}." for letter in "ABCDE"]
        video: str | int = f"vid-{number % 2}"  # Two questions about one video.
        row: dict = {"question": question}
        if task == "Video-MME":
            row |= {"videoID": video, "options": options[:4], "answer": "ABCD"[number]}
            row |= {"question_id": f"{number}-1", "domain": "Life", "sub_category": "Food"}
        elif task == "EgoSchema":
            row |= {"video_idx": video, "option": options, "answer": str(number)}
            row["question_idx"] = str(number)
        elif task == "NExTQA":
            video = 4010069381 + number % 2
            row |= {"video": video, "answer": number, "qid": number, "type": "TP"}
            row |= {f"a{place}": f"answer {place}" for place in range(5)}
        else:
            row |= {"video_name": video, "answer": ("yes", "no")[number % 2]}
            row["question_id"] = f"v_{video}_{number}"
        folder = f"v_{video}" if task == "ActivityNetQA" else str(video)
        # 0000.jpeg, 0002.jpeg, ...: frames with gaps, and fewer than are asked for.
        names = [f"{2 * place:04d}.jpeg" for place in range(9 if number else 5)]
        mini.frames(task, folder, names)
        rows.append(row)
    mini.table(f"VLM2Vec/{task}", config, "test", rows)


_VIDEO_WRITERS = {
    **dict.fromkeys(("K700", "HMDB51", "UCF101", "Breakfast"), _classification),
    "SmthSmthV2": _something,
    **dict.fromkeys(CATEGORIES["V-RET"], _retrieval),
    **dict.fromkeys(("QVHighlight", "Charades-STA"), _clips),
    "MomentSeeker": _seeker,
    **dict.fromkeys(CATEGORIES["V-QA"], _questions),
    "MVBench": _mv_bench,
}
