"""A kernel that is wrong is found, said and not used; one that is right is checked once.

Kernels stand in for an accelerator's: on CPUs "auto" is the XLA form, which nothing replaces.
"""

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.embedding.embedder import Embedder
from llave_jax.ops import attention as attention_lib
from llave_jax.ops import attention_check, attention_choice
from llave_jax.ops.attention import xla_attention
from llave_jax.ops.attention_check import Case, check
from llave_jax.parallel import processes, sharding
from llave_jax.train import train
from tests.training import text_runs
from tests.training.test_processes import free_port

ROWS, LENGTH = ((1, 2, 60, 70), (130, 9)), 145
PACKED = Case(2, 1, 16, True, "bfloat16", ROWS, LENGTH)
CROPS = Case(2, 2, 24, False, "float32", ((70,), (70,)), 70)


def wrong_block(query, key, value, segment_ids, *, causal):
    """As if a kernel skipped one block of keys for one block of queries of one head."""
    out = xla_attention(query, key, value, segment_ids, causal=causal)
    hidden = segment_ids.at[1, 16:32].set(7)
    skipped = xla_attention(query, key, value, hidden, causal=causal)
    return out.at[1, 64:128, 1].set(skipped[1, 64:128, 1])


def not_finite(query, key, value, segment_ids, *, causal):
    out = xla_attention(query, key, value, segment_ids, causal=causal)
    return out.at[0, 40, 1, 3].set(jnp.nan)


@jax.custom_vjp
def _off_by_a_twentieth(x):
    return x


_off_by_a_twentieth.defvjp(
    lambda x: (x, None), lambda _, gradient: (gradient.at[:, :64].mul(1.05),)
)


def wrong_gradient(query, key, value, segment_ids, *, causal):
    return xla_attention(query, _off_by_a_twentieth(key), value, segment_ids, causal=causal)


def not_compiled(*inputs, causal):
    raise NotImplementedError("Mosaic failed to compile\nand said much more")


BROKEN = {
    wrong_block: "the output is off by .* roundings in row 1, tokens 64 to 127, head 1",
    not_finite: "the output is not finite in row 0, token 40, head 1",
    wrong_gradient: "the gradient of keys is off by .* roundings in row ., tokens 0 to 63, head 0",
    not_compiled: "NotImplementedError: Mosaic failed to compile$",
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("xla", CROPS),
        ("blockwise", CROPS),
        *((name, PACKED) for name in attention_lib.IMPLEMENTATIONS[2:]),
    ],
)
def test_right_implementations_pass_with_room(name, case):
    attend = attention_choice.implementation(name, case, interpret=True)
    outcome = check(attend, case)
    assert outcome.passed, outcome.failure
    assert set(outcome.errors) == set(attention_check.RESULTS)
    assert 0 < outcome.worst < attention_check.MARGIN / 4


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kernel: kernel.__name__)
def test_what_is_wrong_is_found_and_named(broken):
    outcome = check(functools.partial(broken, causal=True), PACKED)
    assert not outcome.passed
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        raise AssertionError(outcome.failure)


def test_a_mask_that_is_off_by_one_token_is_found():
    def shifted(query, key, value, segment_ids):
        earlier = jnp.roll(segment_ids, 1, axis=1)
        return xla_attention(query, key, value, earlier, causal=True)

    assert not check(shifted, PACKED).passed


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Makes a kernel the one for this device, on which nothing has been checked."""
    monkeypatch.setenv("LLAVE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(attention_lib.AUTO, "cpu", "triton")
    monkeypatch.setattr(attention_check, "PACKED_ROWS", ROWS)
    monkeypatch.setattr(attention_check, "PACKED_LENGTH", LENGTH)

    def put(kernel):
        monkeypatch.setattr(attention_choice, "_chosen", {})
        monkeypatch.setitem(attention_lib.KERNELS, "triton", kernel)

    return put


MESH = functools.cache(lambda: sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}))


def test_auto_uses_what_passed_and_checks_it_once(device, caplog):
    device(xla_attention)
    assert attention_choice.choose("auto", MESH(), PACKED) == "triton"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    # Another run on this device trusts the first; another case, or another source of kernels, is checked.
    device(not_compiled)
    assert attention_choice.choose("auto", MESH(), PACKED) == "triton"
    other = dataclasses.replace(PACKED, dtype="float32")
    assert attention_choice.choose("auto", MESH(), other) == "xla"
    device(not_compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_choice, "_source_digest", lambda: "changed")
        assert attention_choice.choose("auto", MESH(), PACKED) == "xla"


def test_what_failed_is_checked_again(device, caplog):
    device(not_compiled)
    assert attention_choice.choose("auto", MESH(), CROPS) == "xla"
    assert 'attention "triton" IS NOT USED' in caplog.text
    assert "Mosaic failed to compile" in caplog.text
    device(xla_attention)
    assert attention_choice.choose("auto", MESH(), CROPS) == "triton"


def test_a_name_is_used_unchecked(device):
    device(not_compiled)
    assert attention_choice.choose("triton", MESH(), PACKED) == "triton"
    with pytest.raises(ValueError, match="attention is 'flash'"):
        attention_choice.choose("flash", MESH(), PACKED)


def test_heads_are_those_of_one_device(device):
    device(xla_attention)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 2})
    case = dataclasses.replace(PACKED, heads=4, groups=2)
    attention_choice.choose("auto", mesh, case)
    ((_, _, checked),) = attention_choice._chosen
    assert (checked.heads, checked.groups) == (2, 1)
    assert attention_choice._on_one_device(PACKED, mesh) == PACKED


def test_nothing_is_used_if_nothing_is_right(device, monkeypatch):
    device(not_compiled)
    monkeypatch.setattr(attention_lib, "xla_attention", not_finite)
    with pytest.raises(ValueError, match=r"no implementation .* tried triton, xla"):
        attention_choice.choose("auto", MESH(), PACKED)


def test_a_cache_that_cannot_be_written_stops_nothing(device, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    device(xla_attention)
    assert attention_choice.choose("auto", MESH(), CROPS) == "triton"


def test_another_process_that_fails_decides_for_all(device, monkeypatch, caplog):
    device(xla_attention)
    answers = iter(["no such instruction", None])
    monkeypatch.setattr(processes, "gather", lambda failure: [failure, next(answers)])
    assert attention_choice.choose("auto", MESH(), CROPS) == "xla"
    assert "no such instruction" in caplog.text


def test_embedder_does_not_use_a_broken_kernel(device, golden_model, caplog):
    items = ["a text", "and another one"]
    expected = Embedder.from_pretrained(golden_model.directory, attention="xla").encode(items)
    device(not_finite)
    model = Embedder.from_pretrained(golden_model.directory)
    assert model.model.attention == "xla"
    assert 'attention "triton" IS NOT USED' in caplog.text
    np.testing.assert_array_equal(model.encode(items), expected)


@pytest.mark.slow
def test_train_does_not_use_a_broken_kernel(device, golden_model, tmp_path, caplog):
    sides = {"qry_image_path": "", "pos_image_path": ""}
    rows = [{"qry": f"which is {i}?", "pos_text": f"it is {i}", **sides} for i in range(16)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "numbers.json").write_text(json.dumps(rows))
    device(not_finite)
    changes = {
        "model.path": str(golden_model.directory),
        "data.on_error": "skip",
        "steps": 1,
        "eval.benchmark": None,
    }
    config = text_runs.make_config(tmp_path, changes)
    # With the kernel, the loss would not be finite, which ends a run.
    assert train(config, tmp_path / "run")
    assert 'attention "triton" IS NOT USED' in caplog.text


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from llave_jax.ops import attention as lib, attention_choice
from tests.ops.test_attention_check import PACKED, MESH, not_finite
lib.AUTO["cpu"] = "triton"
lib.KERNELS["triton"] = not_finite if sys.argv[2] == "1" else lib.xla_attention
print(attention_choice.choose("auto", MESH(), PACKED))
"""


@pytest.mark.slow
def test_processes_choose_the_same(tmp_path):
    """One of two has a kernel that fails; the first has passed before."""
    root = Path(__file__).parents[2]
    port, env = free_port(), {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    for _ in range(2):
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, f"127.0.0.1:{port}", str(i)],
                env={**env, "LLAVE_JAX_CACHE": str(tmp_path / str(i))},
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        said = [job.communicate(timeout=300)[0].splitlines() for job in jobs]
        assert [lines[-1:] for lines in said] == [["xla"], ["xla"]]
        assert len(list((tmp_path / "0" / "attention").glob("triton-*"))) == 1
        assert not list((tmp_path / "1" / "attention").glob("triton-*"))
