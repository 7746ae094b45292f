"""Taps, any-resolution layout and video layout: index arithmetic, checked against pixels and sums."""

import dataclasses
import math

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax.inputs import anyres, video
from llave_jax.inputs import taps as T
from llave_jax.inputs.config import InputConfig, grid_pinpoints
from llave_jax.inputs.crops import CropGeometry

sizes = st.integers(1, 40)
CROP = CropGeometry(size=28, patch_size=4)
SIGLIP_CROP = CropGeometry(size=384, patch_size=14)


def combine(taps, features):
    """What the device computes, in NumPy: features [n, D], the newline last."""
    index = np.where(taps.index == T.NEWLINE, len(features) - 1, taps.index)
    tapped = features[index]
    weight = taps.weight[..., None]
    if taps.width > 1:
        maximum = tapped.max(-2)
        return np.where((weight == 1).all(-2), maximum, (tapped * weight).sum(-2))
    return (tapped * weight).sum(-2)


@given(sizes, sizes, sizes, sizes)
def test_resize_weights_sum_to_one(height, width, new_height, new_width):
    taps = T.resize_bilinear(T.crop_map(0, 1, 1, 40)[:height, :width], new_height, new_width)
    np.testing.assert_allclose(taps.weight.sum(-1), 1, rtol=1e-6)
    assert taps.shape == (new_height, new_width)


@given(sizes, sizes)
def test_resize_to_the_same_size_is_the_identity(height, width):
    source = T.crop_map(0, 1, 1, 40)[:height, :width]
    features = np.random.default_rng(0).normal(size=(1600, 3))
    resized = T.resize_bilinear(source, height, width)
    np.testing.assert_allclose(combine(resized, features), combine(source, features), rtol=1e-6)


@pytest.mark.parametrize("size", [(27, 27, 14, 14), (54, 37, 31, 22), (5, 9, 3, 9), (7, 7, 20, 3)])
def test_resize_is_torchs(size):
    torch = pytest.importorskip("torch")
    height, width, new_height, new_width = size
    features = np.random.default_rng(0).normal(size=(height * width, 4)).astype(np.float32)
    source = T.plain(np.arange(height * width).reshape(height, width))
    image = torch.tensor(features.reshape(1, height, width, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        image, (new_height, new_width), mode="bilinear", align_corners=False
    )
    actual = combine(T.resize_bilinear(source, new_height, new_width), features)
    np.testing.assert_allclose(actual, expected[0].permute(1, 2, 0).numpy(), atol=1e-5)


@given(st.integers(1, 13), st.integers(1, 4), st.booleans())
def test_pooled_windows(side, stride, take_max):
    features = np.random.default_rng(side).normal(size=(side * side, 2))
    pooled = combine(T.pool_windows(T.crop_map(0, 1, 1, side), stride, take_max), features)
    rows = side // stride
    windows = features.reshape(side, side, 2)[: rows * stride, : rows * stride]
    windows = windows.reshape(rows, stride, rows, stride, 2)
    expected = windows.max((1, 3)) if take_max else windows.mean((1, 3))
    np.testing.assert_allclose(pooled, expected, rtol=1e-6, atol=1e-9)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 6), st.sampled_from([None, 1, 9]))
def test_image_taps_stay_within_their_crops(width, height, grid, anyres_max):
    size, side = CROP.size, CROP.patches_per_side
    config = InputConfig(pinpoints=grid_pinpoints(size, grid, grid), anyres_max=anyres_max)
    image = PIL.Image.new("RGB", (width, height))
    crops = anyres.image_crops(image, config, CROP)
    taps = anyres.image_taps(width, height, config, CROP)
    assert crops.shape[1:] == (size, size, 3)
    assert taps.index.max() < len(crops) * side**2
    assert taps.index.min() >= T.NEWLINE
    newlines = (taps.index[:, 0] == T.NEWLINE).sum()
    tiles = len(taps.index) - side**2
    assert tiles == 0 or tiles % newlines == 0
    if anyres_max is not None:
        assert tiles - newlines <= 1.1**2 * anyres_max * side**2


def test_taps_point_at_the_pixels_of_the_image():
    """Colour every patch of a 2 x 1 tiled image differently; the map must show them in order."""
    side = CROP.patches_per_side
    config = InputConfig(pinpoints=((28, 56),))
    colours = np.arange(side * 2 * side, dtype=np.uint8).reshape(side, 2 * side)
    image = PIL.Image.fromarray(np.kron(colours, np.ones((4, 4), np.uint8))).convert("RGB")
    crops = anyres.image_crops(image, config, CROP)
    features = crops[:, ::4, ::4, 0].reshape(-1, 1).astype(float)
    features = np.concatenate([features, [[-1.0]]])
    tokens = combine(anyres.image_taps(56, 28, config, CROP), features)[side**2 :, 0]
    expected = np.concatenate([colours, np.full((side, 1), -1.0)], axis=1)
    np.testing.assert_array_equal(tokens.reshape(side, -1), expected)


@pytest.mark.parametrize(
    ("size", "crops", "tokens"),
    [((500, 375), 3, 1728), ((640, 480), 5, 2929), ((800, 800), 5, 3699)],
)
def test_known_token_counts(size, crops, tokens):
    """Typical pictures, and the most that 2 x 2 tiles give, with the released models' settings."""
    config = InputConfig(pinpoints=grid_pinpoints(384, 2, 2))
    assert anyres.image_taps(*size, config, SIGLIP_CROP).shape == (tokens,)
    assert len(anyres.image_crops(PIL.Image.new("RGB", size), config, SIGLIP_CROP)) == crops


@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize("newline", ["grid", "frame", "one_token", "no_token"])
def test_video_token_count(mode, newline):
    config = InputConfig(pinpoints=(), newline_position=newline, pool_mode=mode)
    side = 27
    pooled = math.ceil(side / 2) if mode == "bilinear" else side // 2
    per_frame = {"grid": pooled * (pooled + 1), "frame": pooled**2 + 1}.get(newline, pooled**2)
    expected = 5 * per_frame + (newline == "one_token")
    assert video.video_taps(5, config, CropGeometry(27, 1)).shape == (expected,)


def test_single_crop_has_one_newline():
    config = InputConfig(pinpoints=())
    taps = anyres.image_taps(100, 50, config, CROP)
    assert taps.shape == (50,)
    assert taps.index[-1, 0] == T.NEWLINE
    assert len(anyres.image_crops(PIL.Image.new("RGB", (100, 50)), config, CROP)) == 1


def test_widening_keeps_the_sum():
    taps = T.crop_map(0, 1, 1, 3).reshape(-1)
    features = np.random.default_rng(0).normal(size=(9, 2))
    np.testing.assert_array_equal(combine(T.widen(taps, 4), features), features)
    with pytest.raises(ValueError, match="narrow"):
        T.widen(T.widen(taps, 4), 1)


def test_unknown_settings_are_refused():
    config = InputConfig(pinpoints=())
    with pytest.raises(ValueError, match="newline_position"):
        dataclasses.replace(config, newline_position="row")
    with pytest.raises(ValueError, match="pool_mode"):
        dataclasses.replace(config, pool_mode="median")
    with pytest.raises(ValueError, match="0 frames"):
        video.sample_frame_indices(0, 30.0)


@given(st.integers(1, 5000), st.floats(0.1, 120), st.integers(1, 64))
def test_frame_indices(num_frames, fps, max_frames):
    indices = video.sample_frame_indices(num_frames, fps, max_frames=max_frames)
    assert 1 <= len(indices) <= max_frames
    assert indices[0] == 0
    assert all(0 <= i < num_frames for i in indices)
    assert indices == sorted(indices)
