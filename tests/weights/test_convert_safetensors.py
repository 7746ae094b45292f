"""The reader and writer of safetensors files, against the safetensors package."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    encode_header,
)

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), SHAPES),
    min_size=1,
    max_size=6,
)
in_tmp_path = hypothesis.settings(
    max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def arrays_of(tensors):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, (dtype, shape) in tensors.items()}


def write(path, arrays, order=None):
    tensors = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    path.unlink(missing_ok=True)
    with SafetensorsWriter(path, encode_header(tensors, {"format": "pt"})) as writer:
        for name in order or arrays:
            writer.write(name, arrays[name])


def assert_equal(first, second):
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    assert first.tobytes() == second.tobytes()


@in_tmp_path
@hypothesis.given(tensors=TENSORS, data=st.data())
def test_written_files_are_read_by_the_package(tmp_path, tensors, data):
    arrays = arrays_of(tensors)
    path = tmp_path / "file.safetensors"
    write(path, arrays, data.draw(st.permutations(sorted(arrays))))
    loaded = load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_equal(loaded[name], array)


@in_tmp_path
@hypothesis.given(tensors=TENSORS)
def test_files_of_the_package_are_read(tmp_path, tensors):
    arrays = arrays_of(tensors)
    path = tmp_path / "file.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_equal(file.read(name), array)
        assert_equal(np.asarray(file.view(name)), array)
        assert b"".join(file.chunks(name, size=7)) == array.tobytes()


@in_tmp_path
@hypothesis.given(tensors=TENSORS)
def test_a_header_written_again_gives_the_same_bytes(tmp_path, tensors):
    path, copy = tmp_path / "file.safetensors", tmp_path / "copy.safetensors"
    copy.unlink(missing_ok=True)
    save_file(arrays_of(tensors), path)
    file = SafetensorsFile(path)
    with SafetensorsWriter(copy, file.header) as writer:
        for name in reversed(file.tensors):
            writer.write(name, file.read(name))
    assert copy.read_bytes() == path.read_bytes()


def test_layers_are_written_one_by_one(tmp_path):
    path = tmp_path / "file.safetensors"
    stack = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    with SafetensorsWriter(path, encode_header({"x": (stack.dtype, stack.shape)}, {})) as writer:
        for layer in (2, 0, 3, 1):
            writer.write("x", stack[layer].T.copy().T, layer)
    np.testing.assert_array_equal(load_file(path)["x"], stack)


def test_what_was_not_written_is_noticed(tmp_path):
    header = encode_header({"x": (np.dtype(np.float32), (4, 2))}, {})
    with (
        pytest.raises(CheckpointError, match="8 of 32 bytes of tensor x"),
        SafetensorsWriter(tmp_path / "file.safetensors", header) as writer,
    ):
        writer.write("x", np.zeros(2, np.float32), 1)


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float16), np.zeros((3, 2), np.float32)])
def test_wrong_arrays_are_not_written(tmp_path, array):
    header = encode_header({"x": (np.dtype(np.float32), (2, 3))}, {})
    with (
        pytest.raises(CheckpointError, match=r"tensor x: expected float32 \(2, 3\), found"),
        SafetensorsWriter(tmp_path / "file.safetensors", header) as writer,
    ):
        writer.write("x", array)


def corrupt(path, change):
    save_file({"x": np.zeros(8, np.float32), "y": np.ones(8, np.float32)}, path)
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "expected .* from its header. An interrupted download"),
        (lambda data: data + b"x", "expected .* from its header"),
        (lambda data: b"", "not a safetensors file, or cut off: 0 bytes"),
        (lambda data: b"\xff" * 8 + data[8:], "not a safetensors file, or cut off"),
        (lambda data: data.replace(b'{"x"', b'[{"x'), "the header is not JSON"),
        (lambda data: data.replace(b'"y"', b'"x"'), "the header names x twice"),
        (lambda data: data.replace(b"[8]", b"[9]", 1), "x of shape .9,. and dtype F32 takes 36"),
        (lambda data: data.replace(b"[32,64]", b"[16,48]"), "tensor y begins at byte 16"),
        (lambda data: data.replace(b"F32", b"F64", 1), "x has dtype F64; expected one of F32"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = tmp_path / "file.safetensors"
    corrupt(path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)
