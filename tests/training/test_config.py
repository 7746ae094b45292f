"""From a config file to the model that is trained: the paper's inputs on any base model."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from llave_jax.config import default_config, paper_config
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.inputs.anyres import largest_image
from llave_jax.inputs.config import grid_pinpoints
from llave_jax.inputs.packing import Planner
from llave_jax.training import setup
from llave_jax.training.batch_search import with_batch_by_hand
from llave_jax.training.batch_shape import check_budget, make_plan
from llave_jax.training.setup import canvases, model_config, open_training_source
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from tests.weights.convert_checkpoints import write_hf

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER_CONFIGS = ("llave_0_5b", "llave_2b", "llave_7b", "tpu_v4", "gpu_h100")


def load_config(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A tiny base model with inputs as LLaVA-OneVision's: 36 canvases, long sequences, other newlines."""
    hf = write_hf(
        tmp_path_factory.mktemp("base") / "hf",
        changes={
            "image_grid_pinpoints": "(1x1),...,(6x6)",
            "tokenizer_model_max_length": 32768,
            "mm_newline_position": "one_token",
        },
    )
    tokenizer = json.loads((hf / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = 32768
    (hf / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    convert_from_hf(hf, hf.parent / "model", show_progress=False)
    return hf.parent / "model"


@pytest.mark.parametrize("name", PAPER_CONFIGS)
def test_the_papers_inputs_whatever_the_base_model_says(name, base_model):
    before = model_dir.load_config(base_model)
    assert len(before.inputs.pinpoints) == 36
    assert (before.inputs.max_length, before.inputs.max_text_length) == (32768, 32768)
    config = load_config(name)
    config.model.path = str(base_model)
    found = model_config(config)
    tile = before.vision.image_size
    assert found.inputs.pinpoints == (
        (tile, tile),
        (2 * tile, tile),
        (tile, 2 * tile),
        (2 * tile, 2 * tile),
    )
    assert (found.inputs.max_length, found.inputs.max_text_length) == (4096, 4096)
    assert (found.inputs.newline_position, found.inputs.anyres_max) == ("grid", 9)
    assert (found.vision, found.text) == (before.vision, before.text)
    assert config.data.max_rows == 50_000


def assert_room(config, shards):
    """Batches planned for a few small pairs hold the largest that the model allows."""
    llave, config = model_config(config), with_batch_by_hand(config, shards) or config
    small = PairSizes(
        np.full((100, 2), [200, 40]), np.full((100, 2), [1, 0]), np.full(100, True), np.full(100, 9)
    )
    budget = make_plan(config, llave, shards, lambda: small).budget
    crops, taps = largest_image(llave.inputs, llave.vision.crop)
    planner = Planner(budget, 1)
    planner.check([llave.inputs.max_length, 0], crops, 0, "the largest item")
    assert budget.taps >= taps


@pytest.mark.parametrize("shards", [1, 8])
def test_own_data_has_all_its_rows_and_room_for_llaves_items(shards, caplog):
    config = load_config("finetune")
    assert config.data.max_rows is None
    # As planned for 8 devices of some memory, where no row may be skipped.
    config.batch.pairs, config.batch.micro_batches, config.data.on_error = 256, 8, "raise"
    assert_room(config, shards)
    assert not caplog.records


def test_rows_of_ones_own_that_are_left_out_are_said(tmp_path, caplog):
    row = {"qry": "a", "qry_image_path": "", "pos_text": "b", "pos_image_path": ""}
    for name in ("mine", "CIRR"):
        (tmp_path / f"{name}.json").write_text(json.dumps([row] * 5))
    config = paper_config()
    config.data.path, config.data.max_rows = str(tmp_path), 3
    assert len(open_training_source(config, tmp_path)) == 6
    (said,) = caplog.messages
    assert said.startswith("mine: the first 3 rows and no more, as data.max_rows says")
    config.data.max_rows = 6
    assert len(open_training_source(config, tmp_path)) == 10
    assert len(caplog.records) == 1


def test_a_config_of_ones_own_keeps_the_models_inputs_and_all_rows(base_model):
    config = default_config()
    config.model.path = str(base_model)
    assert model_config(config) == model_dir.load_config(base_model)
    assert config.data.max_rows is None


def test_canvases_in_tiles_or_in_pixels():
    assert canvases((2, 3), 384) == grid_pinpoints(384, 2, 3)
    assert canvases((2, 2), 24) == ((24, 24), (48, 24), (24, 48), (48, 48))
    assert canvases(((384, 768),), 384) == ((384, 768),)
    assert canvases([[384, 768], [384, 384]], 384) == ((384, 768), (384, 384))
    assert canvases((), 384) == ()


@pytest.mark.parametrize("pinpoints", [(0, 2), (384, 384), ((384, 100),), ((0, 384),), (2,)])
def test_canvases_that_are_not_whole_tiles_are_refused(pinpoints):
    with pytest.raises(ValueError, match=r"model\.inputs\.pinpoints is .* multiples of .* 384"):
        canvases(pinpoints, 384)


def test_canvases_from_the_command_line():
    """The flag's own parser, through which --config.model.inputs.pinpoints=2,2 goes."""
    from ml_collections.config_flags import tuple_parser

    config = paper_config()
    for text, expected in {"2,2": (2, 2), "((384,768),)": ((384, 768),)}.items():
        config.model.inputs.pinpoints = tuple_parser.TupleParser().parse(text)
        assert config.model.inputs.pinpoints == expected


SHARDS = {"llave_0_5b": 8, "llave_2b": 8, "llave_7b": 16, "tpu_v4": 16, "gpu_h100": 8}


@pytest.mark.parametrize("name", PAPER_CONFIGS)
def test_the_papers_budgets_hold_the_largest_pair_of_any_base_model(name, base_model, caplog):
    config = load_config(name)
    for path in (None, str(base_model)):
        config.model.path = path
        assert_room(config, SHARDS[name])
    assert not caplog.records


def too_small(**changes):
    """A config whose batches are too small for what LLaVA-OneVision's own inputs allow."""
    config = load_config("llave_2b")
    config.model.inputs.pinpoints = (6, 6)
    config.model.inputs.max_length = 32768
    config.batch.row_length, config.batch.tokens_per_pair = 15_360, 3840.0
    config.batch.crops_per_pair, config.batch.taps = 6.0, 1
    config.update_from_flattened_dict(changes)
    return config


def test_budgets_too_small_for_the_model_are_refused_with_the_numbers_to_change():
    config = too_small()
    with pytest.raises(ValueError, match="too small") as refused:
        check_budget(config, model_config(config), 8)
    message = str(refused.value)
    assert "raise batch.row_length to 32768, or lower model.inputs.max_length to 15360" in message
    assert "24 crops, an image has up to 37: raise batch.crops_per_pair to 9.25" in message
    assert "up to 2304 x 2304 pixels" in message
    assert "raise batch.taps to 4, or lower model.inputs.pinpoints to at most 9 tiles" in message
    assert "--config.data.on_error=skip" in message

    # The numbers it names are enough, and no smaller ones.
    enough = {"batch.row_length": 32768, "batch.crops_per_pair": 9.25, "batch.taps": 4}
    check_budget(too_small(**enough), model_config(too_small(**enough)), 8)
    for key, less in {"row_length": 32767, "crops_per_pair": 9.0, "taps": 3}.items():
        config = too_small(**{**enough, f"batch.{key}": less})
        with pytest.raises(ValueError, match=key):
            check_budget(config, model_config(config), 8)


def test_data_without_large_items_may_have_small_batches(caplog):
    """Texts alone, with rows for them: what is too large would be skipped and counted."""
    changes = {"batch.row_length": 512, "batch.crops_per_pair": 0.0, "data.on_error": "skip"}
    config = too_small(**changes)
    check_budget(config, model_config(config), 8)
    assert "raise batch.row_length to 32768" in caplog.text
    assert "raise batch.crops_per_pair" in caplog.text


def test_budgets_that_hold_any_item_but_not_two_are_warned_about(caplog):
    config = load_config("quickstart")
    config.batch.pairs = 16
    check_budget(config, model_config(config), 1)
    assert not caplog.records
    check_budget(config, model_config(config), 16)
    assert "1 row(s) of 224 tokens and 7 crops: too small for a pair" in caplog.text


def test_a_checkpoint_of_hugging_face_is_a_model_path(golden, golden_model, tmp_path, monkeypatch):
    """The run's own config keeps the name that the user gave."""
    monkeypatch.setenv("LLAVE_JAX_CACHE", str(tmp_path))
    config = default_config()
    assert setup.with_local_model(config) is config
    config.model.path = str(golden / "checkpoint")
    local = setup.with_local_model(config)
    assert config.model.path == str(golden / "checkpoint")
    assert Path(local.model.path).is_relative_to(tmp_path)
    assert setup.model_config(local) == golden_model.config
    assert len(setup.load_tokenizer(local, None)) == len(golden_model.tokenizer)
    config.model.path = None
    with pytest.raises(ValueError, match="no tokenizer; expected"):
        setup.load_tokenizer(config, tmp_path / "none")
