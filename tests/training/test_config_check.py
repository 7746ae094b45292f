"""Settings that cannot work are refused by name, before anything is read or built; all others go through."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax import train
from llave_jax.common.command_line import load_config
from llave_jax.config import default_config
from llave_jax.training import resume
from llave_jax.training.config_check import TABLE, check_config

ROOT = Path(__file__).parents[2]
# Paths, names of the user's own, booleans, and what is checked against the data or the model.
FREE = {
    *("model.path", "model.tokenizer", "model.inputs.pinpoints"),
    *("data.path", "data.image_root", "data.subsets", "data.split"),
    *("loss.mask_false_negatives", "loss.hard_negatives", "lora.rslora"),
    *("loss.learn_temperature", "loss.temperature_per_subset"),
    *("checkpoint.best_metric", "log.wandb", "eval.benchmark", "eval.datasets"),
}
HUGE = 10**9
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
NAMES = st.text("abcxyz_0", max_size=8).map(lambda text: f"{text}!")


def integers(least):
    """(values that work, values that do not) of a whole number."""
    return st.integers(least, HUGE), st.integers(-HUGE, least - 1)


def floats(least=-1e9, most=1e9, *, least_works=True, most_works=True):
    """(values that work, values that do not) of a number between two bounds."""
    works = st.floats(least, most, exclude_min=not least_works, exclude_max=not most_works)
    bad = [NOT_FINITE]
    if least > -1e9:
        bad.append(st.floats(-1e9, least, exclude_max=least_works))
    if most < 1e9:
        bad.append(st.floats(most, 1e9, exclude_min=most_works))
    return works, st.one_of(bad)


def names(*known):
    return st.sampled_from(known), NAMES


SHARE = floats(0, 1)
POSITIVE = floats(0, least_works=False)
NOT_NEGATIVE = floats(0)
BETA = floats(0, 1, most_works=False)
AXIS = (st.one_of(st.just(-1), st.integers(1, HUGE)), st.one_of(st.just(0), st.integers(-HUGE, -2)))
FIELDS = {
    "seed": integers(0),
    "steps": integers(1),
    "model.preset": names("tiny", "llave-0.5b"),
    "model.inputs.anyres_max": integers(1),
    "model.inputs.newline_position": names("grid", "no_token"),
    "model.inputs.pool_mode": names("max", "average"),
    "model.inputs.pool_stride": integers(1),
    "model.inputs.max_text_length": integers(1),
    "model.inputs.max_length": integers(1),
    "model.inputs.max_frames": integers(0),
    "model.inputs.frames_per_second": integers(1),
    "data.max_rows": integers(1),
    "data.epochs": integers(1),
    "data.num_workers": integers(0),
    "data.stall_warning": NOT_NEGATIVE,
    "data.order": names("uniform", "modality", "mined:a.parquet"),
    "data.sub_batch": integers(1),
    "data.weights": (
        st.just((("A", 1.0), ("B", 2))),
        st.sampled_from([(("A", 0.0),), (("A", -1.0),), (("A", math.nan),), ("A",), ((1.0, "A"),)]),
    ),
    "data.on_error": names("raise", "skip"),
    "data.max_skip_share": SHARE,
    "data.held_out": BETA,
    "batch.pairs": integers(1),
    "batch.pairs_per_device": integers(1),
    "batch.max_pairs": integers(1),
    "batch.micro_batches": integers(1),
    "batch.row_length": integers(1),
    "batch.tokens_per_pair": POSITIVE,
    "batch.crops_per_pair": NOT_NEGATIVE,
    "batch.taps": integers(1),
    "batch.fill": floats(0, 1, least_works=False),
    "loss.kind": names("hardness", "focal"),
    "loss.alpha": floats(),
    "loss.margin": floats(),
    "loss.temperature": POSITIVE,
    "loss.pool": names("global", "micro", "device"),
    "loss.negatives_per_row": integers(1),
    "loss.hardness_on": names("all", "in_batch"),
    "loss.temperature_range": (
        st.just((0.05, 0.5)),
        st.sampled_from([(), (0.1,), (0.0, 1.0), (0.2, 0.1), (0.1, math.inf), ("a", "b")]),
    ),
    "loss.temperature_rate": NOT_NEGATIVE,
    "loss.mask_margin": floats(),
    "loss.in_batch_off": (st.just(()), st.sampled_from([(1,), ("A", None)])),
    "loss.dims": (
        st.sampled_from([(8,), (64, 256, 896)]),
        st.sampled_from([(0, 8), (8, 8), (16, 8), (8.5,), ("8",)]),
    ),
    "loss.dim_weights": (st.just(()), st.sampled_from([(0.0,), (-1.0,), (math.nan,), ("a",)])),
    # More than 0 needs hard negatives.
    "loss.distill_weight": (st.just(0.0), SHARE[1]),
    "loss.teacher_temperature": POSITIVE,
    "optim.learning_rate": NOT_NEGATIVE,
    "optim.warmup_fraction": SHARE,
    "optim.beta1": BETA,
    "optim.beta2": BETA,
    "optim.epsilon": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip_norm": POSITIVE,
    "optim.rates": (
        st.just((("vision_tower/.*", None), (".*", 0.5))),
        st.sampled_from([(), (("(", 1.0),), ((".*", -1.0),), ((".*", math.inf),), (".*",)]),
    ),
    "lora.rank": integers(1),
    "lora.alpha": POSITIVE,
    "lora.dropout": BETA,
    "lora.targets": (st.sampled_from([".*", "projector/.*"]), st.sampled_from(["(", "[a"])),
    "lora.base_dtype": names("float32", "bfloat16"),
    "nonfinite.action": names("stop", "skip"),
    "nonfinite.max_in_a_row": integers(0),
    "nonfinite.max_in_all": integers(0),
    "profile.start": integers(1),
    "profile.steps": integers(1),
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "mesh.tensor": AXIS,
    "dtype": names("float32", "bfloat16"),
    "attention": names("auto", "xla", "blockwise", "splash", "triton"),
    "vision_attention": names("auto", "xla"),
    "remat": names("none", "block", "both"),
    "checkpoint.every": integers(1),
    "checkpoint.keep": integers(1),
    "log_every": integers(1),
    "eval.every": integers(0),
    "eval.max_pairs": integers(2),
    "eval.patience": integers(1),
}


def test_every_field_is_checked_or_free():
    fields = {field for field, _ in resume.leaves(json.loads(default_config().to_json()))}
    assert set(TABLE) == set(FIELDS) == fields - FREE
    assert fields >= FREE


@pytest.mark.parametrize("field", FIELDS)
@given(st.data())
def test_a_field_is_refused_by_the_name_of_its_flag(field, data):
    works, does_not = FIELDS[field]
    config = default_config()
    config.update_from_flattened_dict({field: data.draw(works)})
    check_config(config)
    value = data.draw(does_not)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError) as refused:
        check_config(config)
    assert str(refused.value).startswith(f"--config.{field} is {value!r}; expected ")
    assert len(str(refused.value)) < 300


def test_all_that_is_wrong_is_said_at_once():
    config = default_config()
    config.optim.learning_rate, config.data.num_workers = -1.0, -1
    with pytest.raises(ValueError, match=r"data\.num_workers is -1; .* 0\. --config\.optim\.learn"):
        check_config(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "focal", "hardness_on": "in_batch"}, r"hardness_on is 'in_batch'; .*focal"),
        ({"hardness_on": "explicit"}, r"hardness_on is 'explicit'; without .*hard_negatives=True"),
        ({"in_batch_off": ("A",)}, r"in_batch_off leaves .*hard_negatives=True"),
        ({"temperature_per_subset": True}, r"expected --config\.loss\.learn_temperature=True"),
        ({"learn_temperature": True, "temperature": 2.0}, r"is 2\.0, .*expected 0\.01 to 1\.0"),
        ({"dims": (8, 16), "dim_weights": (1.0,)}, r"dim_weights is \(1\.0,\); .*\(8, 16\)"),
        ({"distill_weight": 0.5}, r"distill_weight is 0\.5; .*hard_negatives=True"),
    ],
)
def test_settings_of_the_loss_go_together(settings, message):
    config = default_config()
    config.loss.update(settings)
    with pytest.raises(ValueError, match=message):
        check_config(config)
    if "hard_negatives" in message:
        config.loss.hard_negatives = True
        check_config(config)


def test_planned_micro_batches_need_the_global_pool():
    config = default_config()
    config.batch.micro_batches, config.loss.pool = None, "micro"
    with pytest.raises(ValueError, match=r"^--config\.batch\.micro_batches is None; with .*micro"):
        check_config(config)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_shipped_configs_go_through(path):
    check_config(load_config(str(path)))


def test_training_writes_nothing_first(tmp_path):
    config = default_config()
    config.optim.warmup_fraction = 1.5
    with pytest.raises(ValueError, match=r"--config\.optim\.warmup_fraction is 1\.5"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Switching off.


@pytest.mark.parametrize("form", ["={}", " {}"])
@pytest.mark.parametrize("value", ["", "None"])
def test_a_field_that_may_be_none_is_switched_off(form, value):
    def given_as(field, value):
        flag, *words = f"--config.{field}{form.format(value)}".split(" ")
        return [flag, *words]

    optional = [
        ("eval.benchmark", "digits"), ("data.image_root", "X"), ("steps", "7"), ("batch.pairs", "8"),
        ("checkpoint.best_metric", "loss"), ("batch.fill", "0.5"), ("model.inputs.max_length", "9"),
        ("optim.clip_norm", "2.0"), ("eval.max_pairs", "5"),
    ]  # fmt: skip
    for field, other in optional:
        config = load_config("quickstart", given_as(field, value))
        group, _, name = field.rpartition(".")
        for part in group.split(".") if group else ():
            config = config[part]
        assert config[name] is None
        # The last one counts.
        again = load_config("quickstart", [*given_as(field, value), *given_as(field, other)])
        assert str(dict(resume.leaves(json.loads(again.to_json())))[field]) == other
        last = load_config("quickstart", [*given_as(field, other), *given_as(field, value)])
        assert dict(resume.leaves(json.loads(last.to_json())))[field] is None


def test_a_field_that_needs_a_value_is_not_switched_off():
    with pytest.raises(ValueError, match=r"config\.optim\.learning_rate"):
        load_config("quickstart", ["--config.optim.learning_rate=None"])
    with pytest.raises(ValueError, match="no such field"):
        load_config("quickstart", ["--config.eval.benchmrk=None"])
    assert load_config("quickstart", ["--config.loss.kind="]).loss.kind == ""
