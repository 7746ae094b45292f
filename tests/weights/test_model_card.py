"""Model cards of exported directories, and the licence of the package."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from llave_jax.models.config import PRESETS
from llave_jax.models.parameters import parameter_shapes
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.to_hf import convert_to_hf
from tests.weights.convert_checkpoints import LAYOUTS, assert_same_files, write_hf
from tools import convert_hf

ROOT = Path(__file__).parents[2]
SOURCE_CARD = """\
---
license: other
license_name: research-only
license_link: https://example.org/licence
base_model:
- lmms-lab/llava-onevision-qwen2-0.5b-ov
pipeline_tag: image-text-to-text
---

# A model of somebody
"""


def export(source, output, layout, **options):
    convert_to_hf(source, output, layout, show_progress=False, **options)
    return output


def converted(path, layout="llave", readme=None, **options):
    """A model directory converted from a golden checkpoint with a README.md of `readme`."""
    source = write_hf(path / "hf", layout, **options)
    if readme is not None:
        (source / "README.md").write_text(readme)
    convert_from_hf(source, path / "ours", show_progress=False)
    return path / "ours"


def trained(path, source):
    """The model with other weights."""
    params = {
        name: np.asarray(array) * np.float32(1.5)
        for name, array in model_dir.open_params(source).items()
    }
    config = model_dir.load_config(source)
    model_dir.write_model_dir(path / "trained", config, params, source=source)
    return path / "trained"


@pytest.mark.parametrize("readme", [None, SOURCE_CARD])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_unchanged_has_its_own_card_or_none(tmp_path, layout, readme):
    ours = converted(tmp_path, layout, readme)
    export(ours, tmp_path / "back", "llave" if layout == "llave" else "onevision")
    assert_same_files(tmp_path / "back", tmp_path / "hf")


@pytest.mark.parametrize("layout", ["llave", "hub"])
def test_card_of_a_trained_model(tmp_path, layout):
    ours = trained(tmp_path, converted(tmp_path, layout))
    target = export(ours, tmp_path / "my-model", "llave" if layout == "llave" else "onevision")
    data = metadata_load(target / "README.md")
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "feature-extraction"
    assert data["library_name"] == "transformers"
    assert "embedding" in data["tags"]
    assert "base_model" not in data
    card = ModelCard.load(target / "README.md")
    assert card.text.strip().startswith("# my-model\n")
    assert "one\nL2-normalised vector of 64 dimensions" in card.text
    assert "@article{lan2025llave," in card.text


@pytest.mark.parametrize("layout", ["llave", "onevision"])
@pytest.mark.parametrize("preset", ["tiny"])
def test_card_of_a_model_made_here(golden, tmp_path, layout, preset):
    config = PRESETS[preset]
    shapes = parameter_shapes(config)
    params = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    model_dir.write_model_dir(tmp_path / "ours", config, params, tokenizer=golden / "checkpoint")
    target = export(tmp_path / "ours", tmp_path / "hf", layout, base_model="me/base")
    data = metadata_load(target / "README.md")
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "me/base"


def test_licence_and_base_of_the_source_go_on(tmp_path):
    ours = converted(tmp_path, readme=SOURCE_CARD)
    data = metadata_load(export(ours, tmp_path / "new", "onevision") / "README.md")
    assert data["license"] == "other"
    assert data["license_name"] == "research-only"
    assert data["license_link"] == "https://example.org/licence"
    assert data["base_model"] == ["lmms-lab/llava-onevision-qwen2-0.5b-ov"]
    assert data["pipeline_tag"] == "feature-extraction"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readme_of_the_source_stays(tmp_path, caplog, layout):
    ours = trained(tmp_path, converted(tmp_path, layout, readme=SOURCE_CARD))
    target = export(ours, tmp_path / "new", "llave" if layout == "llave" else "onevision")
    assert (target / "README.md").read_text() == SOURCE_CARD
    assert metadata_load(target / "MODEL_CARD.md")["license"] == "other"
    assert "the card of this model is MODEL_CARD.md" in caplog.text


def test_changed_settings_are_a_change(tmp_path):
    """Same weights, but laid out differently: not the same model again."""
    ours = converted(tmp_path)
    config = model_dir.load_config(ours)
    inputs = dataclasses.replace(config.inputs, newline_position="frame")
    model_dir.write_config(ours, dataclasses.replace(config, inputs=inputs))
    assert (export(ours, tmp_path / "new", "llave") / "README.md").is_file()


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("lmms-lab/llava-onevision-qwen2-7b-ov", "lmms-lab/llava-onevision-qwen2-7b-ov"),
        ("checkpoints/mine", None),
        ("/mnt/lmms-lab/llava", None),
        ("./", None),
        ("", None),
    ],
)
def test_base_model_of_the_configuration(tmp_path, name, base):
    ours = converted(tmp_path, changes={"_name_or_path": name})
    data = metadata_load(export(ours, tmp_path / "new", "onevision") / "README.md")
    assert data.get("base_model") == base


@pytest.mark.parametrize(
    "readme", ["no front matter", "---\n- a list\n---\n", "---\na: [b\n---\n", "---\n---\n", ""]
)
def test_cards_that_say_nothing(tmp_path, readme):
    ours = converted(tmp_path, readme=readme)
    data = metadata_load(export(ours, tmp_path / "new", "onevision") / "README.md")
    assert data["license"] == "apache-2.0"


def test_command(golden, tmp_path, capsys):
    ours = str(converted(tmp_path))
    arguments = ["--to-hf", "onevision", "--input", ours, "--output", str(tmp_path / "new")]
    arguments += ["--no-check-vectors"]
    assert convert_hf.main([*arguments, "--base-model", "me/base"]) == 0
    assert not (tmp_path / "new" / "check_vectors.json").exists()
    assert metadata_load(tmp_path / "new" / "README.md")["base_model"] == "me/base"
    with pytest.raises(SystemExit):
        convert_hf.main(["--input", ours, "--output", "x", "--base-model", "me/base"])
    assert "only with --to-hf" in capsys.readouterr().err


def test_little_memory_leaves_check_vectors_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llave_jax.convert.available_host_memory", lambda: 2**30)
    arguments = ["--to-hf", "onevision", "--input", str(converted(tmp_path))]
    assert convert_hf.main([*arguments, "--output", str(tmp_path / "new")]) == 0
    assert not (tmp_path / "new" / "check_vectors.json").exists()
    said = capsys.readouterr().err
    assert "takes about 2 GiB of memory, and 1 are free" in said
    assert "tools/check_export.py --write" in said


def test_licence_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    for name in project["license-files"]:
        assert (ROOT / name).is_file()
