"""From a config file to the model that is trained: the paper's inputs on any base model."""

import json
import runpy
from pathlib import Path

import pytest

from llave_jax import model_dir
from llave_jax.config import canvases, default_config, model_config, paper_config
from llave_jax.convert.from_hf import convert_from_hf
from llave_jax.models.config import grid_pinpoints
from tests.convert_checkpoints import write_hf

CONFIGS = Path(__file__).parent.parent / "configs"
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
