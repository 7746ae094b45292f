"""`check_device`: a whole run on simulated devices, what breaks it, and what its file says."""

import json
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax import check_device
from llave_jax.device_check import attention, collectives, golden, peers, report
from llave_jax.ops import attention as attention_lib
from llave_jax.ops.attention_check import Case, check
from llave_jax.parallel import sharding
from tests.ops.test_attention_check import not_compiled, wrong_block


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """The short form with a kernel that is wrong and one that does not compile: exit status and JSON."""
    file = tmp_path_factory.mktemp("check") / "device.json"
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in {"triton": wrong_block, "splash": not_compiled}.items():
            patch.setitem(attention_lib.KERNELS, name, _any(kernel))
        patch.setenv(
            "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=/home/me/x"
        )
        status = check_device.main(
            ["--config=quickstart", "--short", f"--output={file}", "--config.mesh.fsdp=2"]
        )
    return status, file.read_text()


def _any(kernel):
    return lambda *inputs, causal, **_: kernel(*inputs, causal=causal)


@pytest.mark.slow
def test_a_kernel_that_is_broken_fails_the_device_and_is_named(one_run):
    status, text = one_run
    assert status == 1
    values = json.loads(text)
    assert not values["passed"]
    failed = [row for row in values["rows"] if row["passed"] is False]
    assert {row["subject"].partition(":")[0] for row in failed} == {"triton", "splash"}
    assert all(row["subject"] in values["verdict"] for row in failed)
    (wrong,) = (row for row in failed if row["subject"].startswith("triton: packed"))
    assert "tokens 64 to 127, head 1" in wrong["text"]
    assert any("Mosaic failed to compile" in row["text"] for row in failed)


def test_what_is_right_passes_beside_it(one_run):
    rows = json.loads(one_run[1])["rows"]
    passed = {(row["check"], row["subject"]) for row in rows if row["passed"]}
    assert {name for check, name in passed if check == "collectives"} == {
        f"{name} along {axis}" for name in ("all_gather", "reduce_scatter", "psum")
        for axis in ("data (4)", "fsdp (2)")
    }  # fmt: skip
    assert any(check == "golden model" for check, _ in passed)
    assert any(subject.startswith("xla: packed rows") for _, subject in passed)


def test_the_file_names_no_host_and_no_path(one_run):
    text = one_run[1]
    assert "/home" not in text
    assert platform.node() not in text
    values = json.loads(text)
    assert values["versions"]["jax"] == jax.__version__
    assert values["device"]["kind"] == "cpu"
    assert "xla_force_host_platform_device_count=8" in values["flags"]["XLA_FLAGS"]
    assert values["fields"]["mesh.fsdp"] == 2
    assert "data.path" not in values["fields"]


def test_paths_and_infinities_in_messages():
    row = report.Row(
        "a", "b", False, "in /usr/lib/x.so and C:\\x\\y: 3 GB/s", {"error": float("inf")}
    )
    (said,) = json.loads(report.to_json([row], "/home/me/own.py", {}))["rows"]
    assert said["text"] == "in PATH and PATH 3 GB/s"
    assert said["values"] == {"error": "inf"}


@pytest.fixture(scope="module")
def half_of_the_devices():
    """The other half leave XLA threads to spare (`check_device._mesh_of_golden_model`)."""
    return sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])


@pytest.mark.slow
def test_golden_numbers_are_those_of_any_mesh(half_of_the_devices):
    mesh = half_of_the_devices
    (row,) = golden.agreement(mesh, ("xla", "xla"), ("float32",))
    assert row.passed, row.text
    assert max(row.values["errors"].values()) < golden.FLOAT32_BOUND / 2


@pytest.mark.slow
def test_a_model_that_is_a_little_wrong_is_not_golden(monkeypatch):
    """In bfloat16, whose bounds are the widest: one layer's attention sees a block less."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    monkeypatch.setitem(attention_lib.KERNELS, "triton", _short_of_a_block)
    (row,) = golden.agreement(mesh, ("triton", "xla"), ("bfloat16",))
    assert row.passed is False


def _short_of_a_block(query, key, value, segment_ids, *, causal, **_):
    hidden = segment_ids.at[:, :16].add(100)
    return attention_lib.xla_attention(query, key, value, hidden, causal=causal)


def test_recorded_numbers_tell_models_apart():
    """The bounds of bfloat16 are less than what tells queries, and parameters, apart."""
    recorded = json.loads(golden.RECORDED.read_text())
    values = {name: np.asarray(x) for name, x in recorded["values"].items()}
    bounds = {n: golden.BFLOAT16_MARGIN * e for n, e in recorded["bfloat16_errors"].items()}
    assert values["cosines"].std() > 4 * bounds["cosines"]
    moved = np.abs(values["cosines_after"] - values["cosines"]).max()
    assert moved > 4 * bounds["cosines_after"]


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "psum"])
def test_an_exchange_that_loses_a_device_is_found(name, mesh, monkeypatch):
    exchange, received = collectives._EXCHANGES[name]

    def losing(x, axis):
        return exchange(jnp.where(jax.lax.axis_index(axis) == 1, 0, x), axis)

    monkeypatch.setattr(collectives, "_EXCHANGES", {name: (losing, received)})
    rows = list(collectives.exchanges(mesh))
    assert [row.passed for row in rows] == [False] * 3


def test_one_device_has_nothing_to_exchange():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    (row,) = collectives.exchanges(mesh)
    assert row.passed is None


CASE = Case(2, 1, 24, True, "float32", ((1, 2, 60, 70), (130, 9)), 145)


@pytest.mark.parametrize("name", ["jax.nn", "jax triton", "jax splash"])
def test_peers_get_the_same_rows(name):
    outcome = check(peers.peers("cpu")[name](CASE), CASE)
    assert outcome.passed, outcome.failure


def test_segments_apart_for_implementations_that_know_none():
    places, lengths = peers._own_rows(CASE)
    ids = CASE.segment_ids.reshape(-1)
    for row, length in zip(places, lengths, strict=True):
        assert len(set(ids[row[:length]])) == 1
        assert (np.diff(row[:length]) == 1).all()
    used = np.concatenate([row[:n] for row, n in zip(places, lengths, strict=True)])
    assert sorted(used) == list(np.flatnonzero(ids))


def test_masks_that_are_too_large_are_not_made():
    with pytest.raises(peers.CannotRun, match="mask of 24576 x 24576"):
        peers.peers("cpu")["jax.nn"](Case(2, 1, 24, True, "float32", ((9,),), 24_576))


def test_speed_is_said_of_what_can_run(monkeypatch):
    monkeypatch.setattr(attention, "REPEATS", 1)
    rows = list(attention.speed(CASE, jax.devices()[0]))
    assert [row.subject.partition(":")[0] for row in rows] == ["blockwise", "xla", "jax.nn"]
    assert all(row.values["gradient_seconds"] > 0 for row in rows)
