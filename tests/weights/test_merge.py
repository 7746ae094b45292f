"""Merging of models: weights against NumPy in float64, dtypes, order, memory, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llave_jax.models.config import PRESETS
from llave_jax.models.lora import Lora
from llave_jax.models.parameters import adapter_shapes, linear_maps, parameter_shapes
from llave_jax.parallel import sharding
from llave_jax.weights import merge, model_dir
from llave_jax.weights.adapted import Record
from llave_jax.weights.fingerprint import weights_fingerprint
from llave_jax.weights.merge import merge_models, slerp_factors
from llave_jax.weights.safetensors_io import CheckpointError, SafetensorsWriter, encode_header
from tools import merge_models as tool

ROOT = Path(__file__).parents[2]
TINY = dataclasses.replace(
    PRESETS["tiny"], text=dataclasses.replace(PRESETS["tiny"].text, num_layers=1, vocab_size=590)
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(merge, "SLICE", 1000)


def random_params(seed, config=TINY, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        path: rng.standard_normal(shape).astype(dtype)
        for path, shape in parameter_shapes(config).items()
    }


@pytest.fixture(scope="module")
def models(golden, tmp_path_factory):
    """Three models, the second in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for seed, dtype in enumerate((np.float32, BFLOAT16, np.float32)):
        params = random_params(seed, dtype=dtype)
        path = folder / "abc"[seed]
        model_dir.write_model_dir(path, TINY, params, tokenizer=golden / "checkpoint")
        made[path] = params
    return made


def as_run(path: Path, params, golden, adapter=None) -> Path:
    """A training run with these parameters."""
    tokenizer = golden / "checkpoint"
    model_dir.write_model_dir(path / "model", TINY, tokenizer=tokenizer, adapter=adapter)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoints/3/params", sharding.unflatten(params))
    return path


def plain_slerp(first, second, share):
    cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
    angle = np.arccos(cosine)
    return (np.sin((1 - share) * angle) * first + np.sin(share * angle) * second) / np.sin(angle)


def expected(tensors, weights, method):
    tensors = [tensor.astype(np.float64) for tensor in tensors]
    if method == "linear":
        return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
    result, total = tensors[0], weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight
        result = plain_slerp(result, tensor, weight / total)
    return result


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (0.2, 0.3, 0.5)])
def test_against_numpy(models, tmp_path, method, weights):
    paths = list(models)[: len(weights)]
    merged = merge_models(paths, weights, method, tmp_path / "out", show_progress=False)
    assert merged.linear == ()
    found = model_dir.open_params(tmp_path / "out")
    whole: dict[str, list[np.ndarray]] = {"child": [], **{str(path): [] for path in paths}}
    for name, array in found.items():
        tensors = [models[path][name] for path in paths]
        reference = expected(tensors, weights, method)
        assert array.dtype == np.float32
        # Factors and each of up to three products and sums are rounded to float32.
        size = sum(np.abs(tensor.astype(np.float64)) for tensor in tensors)
        assert (np.abs(array - reference) <= 4 * 2**-24 * 1.2 * size).all()
        whole["child"].append(reference.reshape(-1))
        for path in paths:
            whole[str(path)].append(models[path][name].astype(np.float64).reshape(-1))
    child = np.concatenate(whole["child"])
    for path, parent in zip(paths, merged.parents, strict=True):
        other = np.concatenate(whole[str(path)])
        cosine = child @ other / np.linalg.norm(child) / np.linalg.norm(other)
        assert math.isclose(parent.cosine, cosine, rel_tol=1e-9)
        assert parent.lowest <= parent.cosine + 1e-9
        assert parent.tensor in found


def test_the_first_model_gives_dtype_and_all_other_files(models, tmp_path):
    a, b, _ = models
    (b / "prompts.json").write_text('{"query": "find: "}')
    merge_models([b, a], [0.5, 0.5], "linear", tmp_path / "out", show_progress=False)
    found = model_dir.open_params(tmp_path / "out")
    assert {array.dtype for array in found.values()} == {BFLOAT16}
    other = tmp_path / "other"
    merge_models([a, b], [0.5, 0.5], "linear", other, show_progress=False)
    for name, array in model_dir.open_params(other).items():
        # The same sums, in bfloat16.
        np.testing.assert_array_equal(array.astype(BFLOAT16), found[name])
    assert model_dir.load_prompts(tmp_path / "out") == {"query": "find: "}
    assert model_dir.load_prompts(other) == {}
    assert model_dir.load_config(other) == TINY
    assert (other / "tokenizer/tokenizer.json").read_bytes() == (
        a / "tokenizer/tokenizer.json"
    ).read_bytes()
    (b / "prompts.json").unlink()


def test_a_weight_of_one_is_that_model(models, tmp_path):
    a, b, _ = models
    for method in merge.METHODS:
        merge_models([a, b], [0, 1], method, tmp_path / method, show_progress=False)
        for name, array in model_dir.open_params(tmp_path / method).items():
            np.testing.assert_array_equal(array, models[b][name].astype(np.float32))


def test_a_run_is_a_parent(models, golden, tmp_path):
    a, _, c = models
    run = as_run(tmp_path / "run", models[c], golden)
    for paths, output in (([a, c], "plain"), ([a, run], "with_run"), ([run, a], "run_first")):
        merge_models(paths, [0.25, 0.75], "slerp", tmp_path / output, show_progress=False)
    plain = model_dir.open_params(tmp_path / "plain")
    for name, array in model_dir.open_params(tmp_path / "with_run").items():
        np.testing.assert_array_equal(array, plain[name])
    assert sorted(path.name for path in (tmp_path / "run_first").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer",
    ]


def test_a_run_with_adapters_is_merged_with_its_base(models, golden, tmp_path):
    a, b, _ = models
    lora = Lora((next(iter(linear_maps())),), rank=2, alpha=4.0)
    rng = np.random.default_rng(5)
    shapes = adapter_shapes(lora.modules, lora.rank, TINY)
    arrays = {path: rng.standard_normal(shape).astype("f") for path, shape in shapes.items()}
    record = Record(str(b), str(b), weights_fingerprint(b), lora)
    run = as_run(tmp_path / "run", arrays, golden, record.values())
    merge_models([a, run], [0.5, 0.5], "linear", tmp_path / "out", show_progress=False)
    with_adapters = model_dir.open_params(run)
    for name, array in model_dir.open_params(tmp_path / "out").items():
        reference = (models[a][name] + np.asarray(with_adapters[name]).astype(np.float64)) / 2
        np.testing.assert_allclose(array, reference, rtol=0, atol=2**-22 * np.abs(reference).max())
    assert not (tmp_path / "out" / model_dir.ADAPTER).exists()
    assert any(
        not np.array_equal(np.asarray(with_adapters[name]), array)
        for name, array in models[b].items()
    )


vectors = st.lists(
    st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=4, max_size=4
)


@hypothesis.given(vectors, vectors, st.floats(0.01, 0.99))
def test_slerp_of_two(first, second, share):
    tensors = np.array([first, second])
    lengths = np.linalg.norm(tensors, axis=1)
    hypothesis.assume((lengths > 0).all())
    units = tensors / lengths[:, None]
    sine = np.linalg.norm(units[1] - (units[0] @ units[1]) * units[0])
    hypothesis.assume(sine > 1e-3)
    factors, linear = slerp_factors(units @ units.T, [1 - share, share])
    assert not linear
    merged = factors @ units
    # Between unit vectors the result is one, and it divides the angle.
    assert math.isclose(merged @ merged, 1, abs_tol=1e-9)
    angle = np.arccos(np.clip(units[0] @ units[1], -1, 1))
    assert math.isclose(np.arccos(np.clip(merged @ units[0], -1, 1)), share * angle, abs_tol=1e-6)
    swapped, _ = slerp_factors(units[::-1] @ units[::-1].T, [share, 1 - share])
    np.testing.assert_allclose(swapped[::-1], factors, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 2, 3], [2, 4, 6]),
        ([1, 2, 3], [-1, -2, -3]),
        ([0, 0, 0], [1, 2, 3]),
        ([1, 0, 0], [1, 1e-8, 0]),
    ],
)
def test_what_has_no_arc_is_merged_linearly(first, second):
    tensors = np.array([first, second], np.float64)
    factors, linear = slerp_factors(tensors @ tensors.T, [0.25, 0.75])
    assert linear
    np.testing.assert_array_equal(factors, [0.25, 0.75])


def test_parallel_tensors_are_said(models, golden, tmp_path, capsys):
    a, _, _ = models
    params = dict(models[a])
    names = [name for name in params if "norm" in name]
    params |= {name: -params[name] for name in params if name not in names}
    params |= {name: params[name] + np.float32(0.5) for name in params if name not in names}
    other = tmp_path / "other"
    model_dir.write_model_dir(other, TINY, params, tokenizer=golden / "checkpoint")
    flags = ["--models", str(a), str(other), "--method", "slerp", "--output", str(tmp_path / "out")]
    assert tool.main(flags) == 0
    said = capsys.readouterr().out
    assert f"{len(names)} tensors were too nearly parallel" in said


def test_models_of_other_sizes(models, golden, tmp_path):
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, intermediate_size=96))
    other = tmp_path / "other"
    params = random_params(0, config)
    model_dir.write_model_dir(other, config, params, tokenizer=golden / "checkpoint")
    with pytest.raises(ValueError, match=r"other sizes: text.intermediate_size \(288 and 96\)"):
        merge_models([next(iter(models)), other], [0.5, 0.5], "linear", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_inputs_are_taken_from_the_first(models, golden, tmp_path, caplog):
    config = dataclasses.replace(TINY, inputs=dataclasses.replace(TINY.inputs, max_length=256))
    other = tmp_path / "other"
    model_dir.write_model_dir(other, config, random_params(0), tokenizer=golden / "checkpoint")
    merge_models(
        [other, next(iter(models))], [0.5, 0.5], "linear", tmp_path / "out", show_progress=False
    )
    assert "inputs.max_length (256 and 128)" in caplog.text
    assert model_dir.load_config(tmp_path / "out") == config


def test_values_that_are_not_finite(models, golden, tmp_path):
    a, _, _ = models
    params = dict(models[a])
    params["vision_tower/patch_embedding/bias"] = np.full(96, np.nan, np.float32)
    other = tmp_path / "other"
    model_dir.write_model_dir(other, TINY, params, tokenizer=golden / "checkpoint")
    with pytest.raises(CheckpointError, match=r"other: tensor vision_tower/patch_embedding/bias"):
        merge_models([a, other], [0.5, 0.5], "linear", tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "0.5"], "1 weights for 2 models"),
        (["--weights", "0.5", "0.6"], "sum to 1"),
        (["--weights", "1.5", "-0.5"], "at least 0"),
        (["--weights", "nan", "1"], "at least 0"),
        (["--dtype", "float32"], "--dtype is of use only with --sample"),
        (["--sample", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_mistakes_are_named(models, tmp_path, capsys, flags, message):
    a, b, _ = map(str, models)
    try:
        status = tool.main(["--models", a, b, "--output", str(tmp_path / "out"), *flags])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_taken(models, tmp_path):
    a, b, _ = models
    with pytest.raises(ValueError, match="lie within one another"):
        merge_models([a, b], [0.5, 0.5], "linear", b, overwrite=True)
    merge_models([a, b], [0.5, 0.5], "linear", tmp_path / "out", show_progress=False)
    with pytest.raises(FileExistsError):
        merge_models([a, b], [0.5, 0.5], "linear", tmp_path / "out", show_progress=False)
    merge_models([a, b], [1, 0], "linear", tmp_path / "out", overwrite=True, show_progress=False)


@pytest.mark.slow
def test_embeddings_of_a_sample(golden_model, tmp_path, capsys):
    sample = tmp_path / "items.jsonl"
    sample.write_text('{"text": "A cat and a dog"}\n{"text": "A dog"}\n')
    params = sharding.flatten(golden_model.params)
    rng = np.random.default_rng(0)
    noisy = {
        name: np.asarray(array) + 0.3 * np.std(array) * rng.standard_normal(array.shape).astype("f")
        for name, array in params.items()
    }
    other, a = tmp_path / "other", golden_model.directory
    model_dir.write_model_dir(other, golden_model.config, noisy, source=a)
    flags = ["--models", str(a), str(other), "--output", str(tmp_path / "out")]
    assert tool.main([*flags, "--weights", "1", "0", "--sample", str(sample)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cosine of embeddings" in lines[0]
    # The child is the first model.
    assert lines[2].split()[2:4] == ["1.000000", "1.000000"]
    assert float(lines[3].split()[3]) < 0.9999


MEMORY = """
import resource, sys
from llave_jax.weights import merge, model_dir
if sys.argv[1:]:
    merge.merge_models(sys.argv[1:3], [0.5, 0.5], "slerp", sys.argv[3], show_progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_does_not_grow_with_a_tensor(golden, tmp_path):
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab_size=1 << 20))
    layout = {name: (BFLOAT16, shape) for name, shape in parameter_shapes(config).items()}
    one = np.ones(1 << 20, BFLOAT16)
    for model in "ab":
        folder = tmp_path / model
        model_dir.write_model_dir(folder, config, tokenizer=golden / "checkpoint")
        header = encode_header(layout, model_dir.METADATA)
        with SafetensorsWriter(folder / model_dir.WEIGHTS, header) as writer:
            for name, (_, shape) in layout.items():
                size = math.prod(shape)
                for start in range(0, size, one.size):
                    writer.write_slice(name, start, one[: size - start])
    embedding = 2 * 96 * (1 << 20)  # bytes

    def peak(*arguments):
        script = [sys.executable, "-c", MEMORY, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return 1024 * int(subprocess.check_output(script, cwd=ROOT, env=environment))

    grown = peak(tmp_path / "a", tmp_path / "b", tmp_path / "out") - peak()
    # The embedding of both in float32 would be four times these bytes.
    assert grown < embedding / 2


def test_slices_are_checked(tmp_path):
    header = encode_header({"x": (np.dtype(np.float32), (2, 3))}, {})
    with (
        pytest.raises(CheckpointError, match="16 of 24 bytes"),
        SafetensorsWriter(tmp_path / "a", header) as file,
    ):
        file.write_slice("x", 0, np.zeros(4, np.float32))
    for start, values in ((4, np.zeros(3, np.float32)), (0, np.zeros(3))):
        with (
            pytest.raises(CheckpointError, match="elements up to"),
            SafetensorsWriter(tmp_path / f"b{start}", header) as file,
        ):
            file.write_slice("x", start, values)


def test_a_report_of_plain_values(models, tmp_path, capsys):
    a, b, _ = map(str, models)
    assert tool.main(["--models", a, b, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split("  ")[0] == "model"
    assert f"written to {tmp_path / 'out'}" in said
    assert json.loads((tmp_path / "out/config.json").read_text())["llave_jax_format"] == 1
