"""The tasks of MMEB-V2: where each lies on the hub and on disk, its metric, its averages, published scores.

Owns the tables alone. Files are found by `hub.py` and `pixels.py`; each modality has a reader beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from llave_jax.evaluation.results import Reference, Suite, by_meta_task
from llave_jax.evaluation.task import TaskInfo

HIT, NDCG = "hit@1", "ndcg_linear@5"
# Every score file has all of them.
METRICS = tuple(
    f"{kind}@{k}"
    for k in (1, 5, 10)
    for kind in (
        *("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr"),
    )
)
MODALITIES = ("image", "video", "visdoc")
# The dataset repository of all pictures and frames.
PIXELS = "TIGER-Lab/MMEB-V2"
IMAGES = "ziyjiang/MMEB_Test_Instruct"
# The tables of a visual document task.
BEIR = ("queries", "qrels", "corpus")
# MVBench's tables, in the order in which they are joined.
MVBENCH = (
    "episodic_reasoning",
    "action_sequence",
    "action_prediction",
    "action_antonym",
    "fine_grained_action",
    "unexpected_action",
    "object_existence",
    "object_interaction",
    "object_shuffle",
    "moving_direction",
    "action_localization",
    "scene_transition",
    "action_count",
    "moving_count",
    "moving_attribute",
    "state_change",
    "fine_grained_pose",
    "character_order",
    "egocentric_navigation",
    "counterfactual_inference",
)


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar archive of the pixel repository.

    Attributes:
      name: below the data root, without its suffix (.tar, .tar.gz, or the numbered parts of one).
      folder: below the data root, into which it is unpacked.
    """

    name: str
    folder: str

    @property
    def pattern(self) -> str:
        """Of the archive's files in the repository."""
        return f"{self.name}.tar*"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A task, and where its data is.

    Attributes:
      info: name, category, main metric.
      modality: one of MODALITIES; a folder of the output.
      repository: dataset on the hub with the annotations.
      configs: the dataset's tables that are read; None: its only one.
      split: of the dataset.
      local: folders or files below the data root that may hold the annotations, if the repository's own names do not.
      pictures: folders below the data root that may hold the pictures or frames. The first that exists is used.
      archive: the pictures' archive.
      parser: name of the rule that turns rows into items; None where the modality has one rule.
      language: of the queries; None: all.
      key: of the task in a submission.
    """

    info: TaskInfo
    modality: str
    repository: str
    configs: tuple[str | None, ...]
    split: str
    local: tuple[str, ...]
    pictures: tuple[str, ...]
    archive: Archive
    parser: str | None = None
    language: str | None = None
    key: str = ""

    @property
    def name(self) -> str:
        """Of the task."""
        return self.info.name


_MMEB_V1 = Archive("image-tasks/mmeb_v1", "image-tasks/MMEB")
_VISDOC = Archive("visdoc-tasks/visdoc-tasks.images", "visdoc-tasks/images")
# Category -> parser -> tasks, in the order of the leaderboard's tables; the order of parsers does not count.
_IMAGE = {
    "I-CLS": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    "I-QA": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA",
    "I-RET": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ Wiki-SS-NQ "
    "OVEN EDIS",
    "I-VG": "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
_IMAGE_PARSERS = {
    "image_i2t": ["MSCOCO_i2t", "VisualNews_i2t"],
    "image_t2i": ["VisDial", "MSCOCO_t2i", "VisualNews_t2i", "WebQA", "EDIS", "Wiki-SS-NQ"],
    "image_i2i_vg": [
        "CIRR",
        "NIGHTS",
        "OVEN",
        "FashionIQ",
        "MSCOCO",
        "RefCOCO",
        "RefCOCO-Matching",
        "Visual7W-Pointing",
    ],
}


def _image_tasks() -> Iterator[Spec]:
    parsers = {name: parser for parser, names in _IMAGE_PARSERS.items() for name in names}
    for category, names in _IMAGE.items():
        default = "image_qa" if category == "I-QA" else "image_cls"
        for name in names.split():
            yield Spec(
                info=TaskInfo(name, category, metric=HIT),
                modality="image",
                repository=IMAGES,
                configs=(name,),
                split="test",
                local=("image-tasks",),
                pictures=("image-tasks", "image-tasks/MMEB"),
                archive=_MMEB_V1,
                parser=parsers.get(name, default),
                key=name,
            )


# Category -> archive, and (task, hub name unless VLM2Vec/TASK, config, split, folders of the frames).
_VIDEO: dict[str, tuple[str, tuple[tuple[str, str, str | None, str, tuple[str, ...]], ...]]] = {
    "V-CLS": (
        "video_cls",
        (
            ("K700", "VLM2Vec/Kinetics-700", None, "test", ("K700",)),
            ("SmthSmthV2", "", None, "test", ("SSv2",)),
            ("HMDB51", "", None, "test", ("HMDB51",)),
            ("UCF101", "", None, "test", ("UCF101",)),
            ("Breakfast", "", None, "test", ("Breakfast",)),
        ),
    ),
    "V-QA": (
        "video_qa",
        (
            ("MVBench", "", None, "train", ("MVBench",)),
            ("Video-MME", "", None, "test", ("Video-MME",)),
            ("NExTQA", "", "MC", "test", ("NExTQA",)),
            ("EgoSchema", "", "Subset", "test", ("EgoSchema", "egoschema")),
            ("ActivityNetQA", "", None, "test", ("ActivityNetQA",)),
        ),
    ),
    "V-RET": (
        "video_ret",
        tuple(
            (
                name,
                repository,
                config,
                split,
                (f"{name}/frames", name, f"data/ziyan/video_retrieval/{name}/frames"),
            )
            for name, repository, config, split in (
                ("DiDeMo", "", None, "test"),
                ("MSR-VTT", "", "test_1k", "test"),
                ("MSVD", "", None, "test"),
                ("VATEX", "", None, "test"),
                ("YouCook2", "lmms-lab/YouCook2", None, "val"),
            )
        ),
    ),
    "V-MRET": (
        "video_mret",
        (
            ("QVHighlight", "", None, "test", ("QVHighlight",)),
            ("Charades-STA", "", None, "test", ("Charades_STA", "Charades-STA")),
            ("MomentSeeker", "", None, "test", ("MomentSeeker",)),
        ),
    ),
}


def _video_task(
    category: str,
    archive: str,
    row: tuple[str, str, str | None, str, tuple[str, ...]],
) -> Spec:
    name, repository, config, split, folders = row
    root = f"video-tasks/frames/{archive}"
    repository = repository or f"VLM2Vec/{name}"
    return Spec(
        info=TaskInfo(name, category, metric=HIT),
        modality="video",
        repository=repository,
        configs=MVBENCH if name == "MVBench" else (config,),
        split=split,
        local=(f"video-tasks/{name}", f"video-tasks/{repository.split('/')[1]}"),
        pictures=tuple(f"{root}/{folder}" for folder in folders),
        archive=Archive(root, root),
        key=name,
    )


def _video_tasks() -> Iterator[Spec]:
    for category, (archive, rows) in _VIDEO.items():
        for row in rows:
            yield _video_task(category, archive, row)


# Category -> (task, hub name, split).
_VISDOC_TASKS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "VD-ViDoRe-V1": tuple(
        (f"ViDoRe_{name}", f"vidore/{name}_test{suffix}_beir", "test")
        for name, suffix in (
            *((name, "_subsampled") for name in ("arxivqa", "docvqa", "infovqa", "tabfquad")),
            *((name, "") for name in ("tatdqa", "shiftproject")),
            *(
                (f"syntheticDocQA_{topic}", "")
                for topic in (
                    "artificial_intelligence",
                    "energy",
                    "government_reports",
                    "healthcare_industry",
                )
            ),
        )
    ),
    "VD-ViDoRe-V2": (
        ("ViDoRe_esg_reports_human_labeled_v2", "vidore/esg_reports_human_labeled_v2", "test"),
        ("ViDoRe_biomedical_lectures_v2_multilingual", "vidore/biomedical_lectures_v2", "test"),
        ("ViDoRe_economics_reports_v2_multilingual", "vidore/economics_reports_v2", "test"),
        ("ViDoRe_esg_reports_v2_multilingual", "vidore/esg_reports_v2", "test"),
    ),
    "VD-VisRAG": tuple(
        (f"VisRAG_{name}", f"openbmb/VisRAG-Ret-Test-{name}", "train")
        for name in ("ArxivQA", "ChartQA", "MP-DocVQA", "SlideVQA", "InfoVQA", "PlotQA")
    ),
    "VD-OOD": (
        ("ViDoSeek-page", "VLM2Vec/ViDoSeek-page-fixed", "test"),
        ("ViDoSeek-doc", "VLM2Vec/ViDoSeek", "test"),
        ("MMLongBench-page", "VLM2Vec/MMLongBench-page-fixed", "test"),
        ("MMLongBench-doc", "VLM2Vec/MMLongBench-doc", "test"),
    ),
}
# Wrong page ids were corrected in repositories of new names. Submissions show by the name which were used.
_FIXED = ("ViDoSeek-page", "MMLongBench-page")


def _visdoc_task(
    category: str, name: str, repository: str, split: str, language: str | None = None
) -> Spec:
    folder = name.removeprefix("ViDoRe_") if category == "VD-ViDoRe-V2" else name
    return Spec(
        info=TaskInfo(name, category, metric=NDCG),
        modality="visdoc",
        repository=repository,
        configs=BEIR,
        split=split,
        local=(f"visdoc-tasks/{repository.split('/')[1]}",),
        pictures=(f"visdoc-tasks/images/{folder}", f"visdoc-tasks/{folder}"),
        archive=_VISDOC,
        parser="visrag" if category == "VD-VisRAG" else "vidore",
        language=language,
        key=f"{name}-fixed" if name in _FIXED else name,
    )


def _visdoc_tasks() -> Iterator[Spec]:
    for category, rows in _VISDOC_TASKS.items():
        for row in rows:
            yield _visdoc_task(category, *row)


def _variants() -> Iterator[Spec]:
    for name in ("biomedical_lectures_v2", "economics_reports_v2", "esg_reports_v2"):
        yield _visdoc_task("VD-ViDoRe-V2", f"ViDoRe_{name}", f"vidore/{name}", "test", "english")
    row = ("MomentSeeker_1k8", "", None, "test", ("MomentSeeker",))
    yield _video_task("V-MRET", "video_mret", row)


TASKS: dict[str, Spec] = {
    spec.name: spec for spec in (*_image_tasks(), *_video_tasks(), *_visdoc_tasks())
}
# Readable, but in no average: ViDoRe v2 in English alone, MomentSeeker before it was rid of repeated queries.
VARIANTS: dict[str, Spec] = {spec.name: spec for spec in _variants()}

_VLM2VEC, _GME = "VLM2Vec-V2.0 (2B, 8 frames)", "GME-2B"
# Task -> scores of both; "all_scores" of VLM2Vec's repository, v2.1 for the two fixed tasks.
_PUBLISHED: dict[str, tuple[float, float | None]] = {
    "K700": (38.2, 34.9),
    "SmthSmthV2": (43.0, 30.1),
    "HMDB51": (40.2, 43.0),
    "UCF101": (60.0, 52.1),
    "Breakfast": (14.8, 13.6),
    "MVBench": (33.6, 37.6),
    "Video-MME": (30.8, 34.0),
    "NExTQA": (20.9, 39.4),
    "EgoSchema": (35.0, 40.6),
    "ActivityNetQA": (53.0, 57.2),
    "DiDeMo": (30.0, 21.5),
    "MSR-VTT": (27.8, 27.0),
    "MSVD": (47.3, 47.3),
    "VATEX": (26.2, 23.1),
    "YouCook2": (10.6, 7.9),
    "QVHighlight": (49.7, 44.0),
    "Charades-STA": (20.1, 14.3),
    "MomentSeeker": (42.9, 37.1),
    "ViDoRe_arxivqa": (78.9, 82.5),
    "ViDoRe_docvqa": (37.1, 55.2),
    "ViDoRe_infovqa": (82.7, 90.7),
    "ViDoRe_tabfquad": (87.8, 93.3),
    "ViDoRe_tatdqa": (44.3, 70.3),
    "ViDoRe_shiftproject": (61.0, 92.9),
    "ViDoRe_syntheticDocQA_artificial_intelligence": (89.1, 98.1),
    "ViDoRe_syntheticDocQA_energy": (86.3, 92.6),
    "ViDoRe_syntheticDocQA_government_reports": (85.6, 97.2),
    "ViDoRe_syntheticDocQA_healthcare_industry": (91.1, 98.5),
    "ViDoRe_esg_reports_human_labeled_v2": (45.8, 60.3),
    "ViDoRe_biomedical_lectures_v2_multilingual": (44.6, 54.0),
    "ViDoRe_economics_reports_v2_multilingual": (42.3, 50.8),
    "ViDoRe_esg_reports_v2_multilingual": (45.7, 50.4),
    "VisRAG_ArxivQA": (76.7, 82.0),
    "VisRAG_ChartQA": (84.2, 79.1),
    "VisRAG_MP-DocVQA": (71.8, 84.3),
    "VisRAG_SlideVQA": (91.4, 93.7),
    "VisRAG_InfoVQA": (85.9, 91.4),
    "VisRAG_PlotQA": (65.9, 64.1),
    "ViDoSeek-page": (80.3, 79.8),
    "ViDoSeek-doc": (80.3, None),
    "MMLongBench-page": (44.7, 51.3),
    "MMLongBench-doc": (42.8, None),
}
# Of image tasks the mean alone is recorded here, and so is the mean of all 78.
_PUBLISHED_MEANS = {_VLM2VEC: {"image": 64.92, "overall": 59.2}, _GME: {}}


def _averages() -> dict[str, tuple[str, ...]]:
    by_category = by_meta_task([spec.info for spec in TASKS.values()])
    overall = by_category.pop("overall")
    by_modality = {
        modality: tuple(spec.name for spec in TASKS.values() if spec.modality == modality)
        for modality in MODALITIES
    }
    return {**by_category, **by_modality, "overall": overall}


def _reference(model: str, scores: Mapping[str, float]) -> Reference:
    """Its averages are means of its tasks where all of these are known."""
    means = {
        label: float(np.mean([scores[name] for name in names]))
        for label, names in _averages().items()
        if all(name in scores for name in names)
    }
    tasks = {(name, TASKS[name].info.metric): score for name, score in scores.items()}
    return Reference(model, tasks, means | _PUBLISHED_MEANS[model])


def _references() -> Iterator[Reference]:
    for index, model in enumerate((_VLM2VEC, _GME)):
        pairs = ((name, scores[index]) for name, scores in _PUBLISHED.items())
        yield _reference(model, {name: score for name, score in pairs if score is not None})


SUITE = Suite(
    "mmeb-v2",
    tuple(spec.info for spec in TASKS.values()),
    _averages(),
    tuple(_references()),
)
