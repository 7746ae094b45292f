"""Models with adapters through the commands: merged, exported, embedded, indexed, with one and the same result."""

import json

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax import convert, embed, index
from llave_jax.embedding.embedder import Embedder
from llave_jax.models import lora
from llave_jax.models.lora import Lora
from llave_jax.models.parameters import adapter_shapes
from llave_jax.parallel import sharding
from llave_jax.training.checkpoint_writer import CheckpointWriter
from llave_jax.weights import adapted, hf_names, model_dir, peft_format
from llave_jax.weights.adapter import Adapter, Delta
from llave_jax.weights.export_source import ExportSource
from llave_jax.weights.fingerprint import model_fingerprint, weights_fingerprint
from llave_jax.weights.from_hf import convert_from_hf
from tools import merge_adapter

TEXTS = ["A cat", "A dog and a cat", "What is it?"]


@pytest.fixture(scope="module")
def places(golden_model, tmp_path_factory):
    """The golden model, a run that trained adapters on it, and the same adapters for peft."""
    folder = tmp_path_factory.mktemp("adapters")
    own = Lora(lora.find_modules("(language_model|projector)/.*"), rank=2, alpha=4.0)
    rng = np.random.default_rng(3)
    shapes = adapter_shapes(own.modules, own.rank, golden_model.config)
    arrays = {p: 0.1 * rng.normal(size=shape).astype(np.float32) for p, shape in shapes.items()}
    base = golden_model.directory
    record = adapted.Record(str(base), str(base), weights_fingerprint(base), own)
    model_dir.write_model_dir(
        folder / "run" / "model", golden_model.config, source=base, adapter=record.values()
    )
    writer = CheckpointWriter(folder / "run" / "checkpoints", keep=1, about={})
    writer.save(1, ocp.args.Composite(params=ocp.args.StandardSave(sharding.unflatten(arrays))))
    writer.close()
    peft_format.write_peft(folder / "peft", arrays, own, "llave")
    return base, folder / "run", folder / "peft", arrays


def weights(path, adapter=None):
    return {p: np.asarray(x) for p, x in model_dir.open_params(path, adapter).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
        assert found[path].dtype == array.dtype


def test_every_way_to_the_merged_weights_is_the_same(places, tmp_path, capsys):
    base, run, peft, _ = places
    expected = weights(run)
    assert any(not np.array_equal(x, expected[p]) for p, x in weights(base).items())
    assert_same(weights(base, peft), expected)
    assert_same(weights(base, run), expected)
    for name, flags in {
        "of_run": ["--model", str(run)],
        "of_peft": ["--model", str(base), "--adapter", str(peft)],
    }.items():
        output = tmp_path / name
        assert merge_adapter.main([*flags, "--output", str(output)]) == 0
        assert_same(weights(output), expected)
        assert adapted.read_record(output) is None
        assert (output / "carried.safetensors").exists()
    assert merge_adapter.main(["--model", str(base), "--output", str(tmp_path / "none")]) == 2
    assert "has parameters of its own, and no adapter is given" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert merge_adapter.main(["--model", str(run), "--output", str(tmp_path / "of_run")]) == 2
    assert "exists; choose another output" in capsys.readouterr().err


@pytest.mark.parametrize("layout", hf_names.LAYOUTS)
def test_a_run_is_exported_merged_or_its_adapters_alone(places, golden, tmp_path, layout):
    base, run, _, arrays = places
    flags = ["--to-hf", layout, "--input", str(run)]
    whole = tmp_path / "whole"
    checks = ["--no-check-vectors"] if layout == "onevision" else []
    assert convert.main([*flags, *checks, "--output", str(whole)]) == 0
    tower = golden / "siglip-tiny-open-patch30-224" / "config.json" if layout == "llave" else None
    convert_from_hf(whole, tmp_path / "again", vision_config=tower, show_progress=False)
    source = ExportSource(run)
    assert source.adapters
    assert not source.as_converted
    expected = {path: x.astype(source.dtypes[path]) for path, x in weights(run).items()}
    found = weights(tmp_path / "again")
    for path, array in expected.items():
        rows = len(array) if path.endswith("embedding") else None
        np.testing.assert_array_equal(found[path][:rows], array, err_msg=path)

    alone = tmp_path / "alone"
    assert convert.main([*flags, "--adapter-only", "--output", str(alone)]) == 0
    assert_same(weights(base, alone), weights(run))
    total = sum(
        (alone / name).stat().st_size
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert total < 100_000 + sum(array.nbytes for array in arrays.values())


def test_what_is_embedded_with_an_adapter_is_known_by_it(places, golden_model, tmp_path):
    base, _, peft, _ = places
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in TEXTS))
    flags = ["--model", str(base), "--input", str(lines)]
    assert embed.main([*flags, "--adapter", str(peft), "--output", str(tmp_path / "with")]) == 0
    expected = Embedder.from_pretrained(base, adapter=peft).encode(TEXTS)
    np.testing.assert_allclose(np.load(tmp_path / "with" / "embeddings.npy"), expected, atol=1e-5)
    plain = Embedder.from_pretrained(base).encode(TEXTS)
    assert np.abs(plain - expected).max() > 1e-2
    run = json.loads((tmp_path / "with" / "run.json").read_text())["embeddings.npy"]
    assert run["adapter"] == str(peft)
    config = golden_model.config
    assert model_fingerprint(base, "float32", config, peft) != model_fingerprint(
        base, "float32", config
    )

    pytest.importorskip("lance")
    from llave_jax.search.index import Index
    from llave_jax.search.query import load_model

    where = ["--output", str(tmp_path / "index")]
    assert index.main(["build", *flags, "--adapter", str(peft), *where]) == 0
    with Index.open(tmp_path / "index") as opened:
        vector = load_model(opened, None).encode(TEXTS[0])
        np.testing.assert_allclose(vector, expected[0], atol=1e-5)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 90),
    st.tuples(st.integers(1, 70), st.integers(1, 40)),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    st.data(),
)
def test_parts_are_those_of_the_whole_to_the_bit(seed, rank, shape, dtype, data):
    rng = np.random.default_rng(seed)
    spread = np.exp(3 * rng.normal(size=shape[0]))[:, None]
    a = (rng.normal(size=(shape[0], rank)) * spread).astype(np.float32)
    b = rng.normal(size=(rank, shape[1])).astype(np.float32)
    weight = rng.normal(size=shape).astype(dtype)
    added = Adapter({("kernel", None): Delta(a, b, 1.7)})
    whole = added.add("kernel", None, weight)
    exact = weight.astype(np.float64) + 1.7 * (a.astype(np.float64) @ b.astype(np.float64))
    # What float32 and then the dtype of the weight round away.
    terms = np.abs(weight.astype(np.float64)) + 1.7 * (np.abs(a) @ np.abs(b)).astype(np.float64)
    largest = 1.7 * rank * np.abs(a).max(1)[:, None] * np.abs(b).max(0)
    error = 2**-23 * (terms + largest) + ml_dtypes.finfo(dtype).eps * np.abs(exact)
    assert (np.abs(whole.astype(np.float64) - exact) <= error).all()
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    part = tuple(slice(start, stop) for start, stop in ends)
    of_part = added.add("kernel", None, weight[part], part)
    np.testing.assert_array_equal(of_part, whole[part])
    assert of_part.dtype == whole.dtype == dtype


@given(st.integers(0, 2**32 - 1), st.integers(1, 45))
def test_the_order_of_the_sum_does_not_matter(seed, rank):
    """Of terms of many sizes that nearly cancel."""
    rng = np.random.default_rng(seed)
    a = (rng.normal(size=(9, rank)) * np.exp(4 * rng.normal(size=rank))).astype(np.float32)
    b = rng.normal(size=(rank, 5)).astype(np.float32)
    a = np.concatenate([a, a * np.float32(1 + 2**-20)], 1)
    b = np.concatenate([b, -b])
    weight = np.zeros((9, 5), np.float32)
    order = rng.permutation(2 * rank)
    sums = [
        Adapter({("kernel", None): Delta(a[:, by], b[by], 1.0)}).add("kernel", None, weight)
        for by in (np.arange(2 * rank), order)
    ]
    np.testing.assert_array_equal(*sums)
    assert np.isfinite(sums[0]).all()
