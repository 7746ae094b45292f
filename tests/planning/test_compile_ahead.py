"""Compiling ahead: what is counted is what runs, and the tiny model compiles for a TPU slice."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.models.config import PRESETS
from llave_jax.models.llave import Llave, abstract_params
from llave_jax.models.lora import Lora, find_modules
from llave_jax.models.parameters import adapter_shapes
from llave_jax.parallel import sharding
from llave_jax.planning import chips, collectives, flops, hlo

ROOT = Path(__file__).parents[2]
COMPILE = [sys.executable, str(ROOT / "tools/compile_ahead.py"), "--json"]


def test_loop_bodies_count_as_often_as_they_run():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    arguments = (jnp.ones((32, 64)), jnp.ones((10, 64, 64)))
    text = jax.jit(layers).lower(*arguments).compile().as_text()
    assert hlo.cost(text, 1).product_flops == 10 * 2 * 32 * 64 * 64


def test_collectives_are_counted_with_their_bytes():
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    split = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=split)
    gather = jax.jit(lambda x: x * 2, out_shardings=sharding.replicated(mesh))
    (found,) = hlo.cost(gather.lower(x).compile().as_text(), 8).collectives
    assert (found.kind, found.group, found.count) == ("all-gather", 8, 1)
    assert found.result_bytes == 16 * 4 * 4
    assert found.wire_bytes == 16 * 4 * 4 * 7 / 8


TPU_PROGRAM = """\
HloModule m, is_scheduled=true

%cond (p: (s32[], bf16[8,16,1152,1])) -> pred[] {
  %p = (s32[], bf16[8,16,1152,1]) parameter(0)
  %n = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (q: (s32[], bf16[8,16,1152,1])) -> (s32[], bf16[8,16,1152,1]) {
  %q = (s32[], bf16[8,16,1152,1]) parameter(0)
  %x = bf16[8,16,1152,1]{2,1,0,3:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %w = bf16[1152,16,72,1]{2,1,0,3} constant({...})
  %heads = bf16[8,16,16,72]{1,3,2,0:T(8,128)(2,1)} convolution(%x, %w), window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], bf16[8,16,1152,1]) tuple(%q, /*index=1*/%x)
}

ENTRY %main (a: bf16[8,16,1152,1]) -> (s32[], bf16[8,16,1152,1]) {
  %a = bf16[8,16,1152,1] parameter(0)
  %z = s32[] constant(0)
  %s = (s32[], bf16[8,16,1152,1]) tuple(%z, %a)
  ROOT %while = (s32[], bf16[8,16,1152,1]) while(%s), condition=%cond, body=%body
}
"""


def test_products_that_tpus_write_as_convolutions():
    """A projection to 16 heads is a convolution whose window meets the input in one place each."""

    cost = hlo.cost(TPU_PROGRAM, 1)
    assert cost.cycles == 300
    assert cost.product_flops == 3 * 2 * 8 * 16 * 16 * 72 * 1152


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x", 3),
        ("replica_groups=[4,16]<=[64], x", 16),
        ("replica_groups=mesh['a'=2,'b'=8] {'b'}, x", 8),
        ("replica_groups=mesh['a'=16,'b'=4], device_ids=([4,16]T(1,0)) {'a'}, x", 16),
        ("x", 64),
    ],
)
def test_groups_of_an_exchange_in_all_their_spellings(written, size):
    assert hlo._group_size(written, 64) == size


FUSED_EXCHANGES = """\
HloModule m, is_scheduled=true

%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[16,32] {
  %p = bf16[64,32] parameter(0)
  %r = bf16[64,32] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %at = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = bf16[16,32] dynamic-slice(%r, %at, %zero), dynamic_slice_sizes={16,32}
}

%start (q: bf16[16,32]) -> (bf16[16,32], bf16[64,32]) {
  %q = bf16[16,32] parameter(0)
  %g = bf16[64,32] all-gather(%q), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t = (bf16[16,32], bf16[64,32]) tuple(%q, %g)
}

%async_collective_fusion.1 (q2: bf16[16,32]) -> bf16[64,32] {
  %q2 = bf16[16,32] parameter(0)
  ROOT %g2 = bf16[64,32] all-gather(%q2), replica_groups={{0,1,2,3}}, dimensions={0}
}

%done (q3: bf16[16,32]) -> bf16[64,32] {
  %q3 = bf16[16,32] parameter(0)
  ROOT %g3 = bf16[64,32] all-gather(%q3), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: bf16[64,32]) -> bf16[64,32] {
  %a = bf16[64,32] parameter(0)
  %scattered = bf16[16,32] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %async-collective-start.1 = (bf16[16,32], bf16[64,32]) fusion(%scattered), kind=kCustom, calls=%start
  %beside = bf16[64,32] fusion(%scattered), kind=kOutput, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"70"}
  ROOT %async-collective-done.1 = bf16[64,32] fusion(%scattered), kind=kCustom, calls=%done
}
"""


def test_exchanges_that_tpus_fuse_count_once():
    cost = hlo.cost(FUSED_EXCHANGES, 4)
    scatter, gather = cost.collectives
    assert (scatter.kind, scatter.group, scatter.hidden) == ("reduce-scatter", 4, False)
    assert scatter.wire_bytes == 3 * 16 * 32 * 2
    assert (gather.kind, gather.group, gather.hidden) == ("all-gather", 4, True)
    assert gather.wire_bytes == 3 / 4 * 64 * 32 * 2
    assert cost.cycles == 70


GPU_PROGRAM = """\
HloModule m, is_scheduled=true

ENTRY %main (a: bf16[16,64], b: bf16[16,32], q: bf16[1,128,2,64]) -> bf16[64,64] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %q = bf16[1,128,2,64]{3,2,1,0} parameter(2)
  %start = ((bf16[16,64]{1,0}, bf16[16,32]{1,0}), (bf16[64,64]{1,0}, /*index=1*/bf16[64,32]{1,0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":false}}
  %done = (bf16[64,64]{1,0}, bf16[64,32]{1,0}) all-gather-done(%start)
  %waited = (bf16[64,64]{1,0}, bf16[16,64]{1,0}) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":true}}
  %sum = f32[8]{0} all-reduce-start(%c), replica_groups={{0,1,2,3}}, backend_config={"collective_backend_config":{"is_sync":false}}
  %pallas_call.3 = bf16[1,128,2,64]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/self_attn/shard_map/triton_causal_fwd/pallas_call"}
  ROOT %out = bf16[64,64]{1,0} get-tuple-element(%done), index=0
}
"""


def test_programs_of_gpus():
    """Exchanges start apart, with operands and results in tuples; kernels have names where they come
    from."""
    cost = hlo.cost(GPU_PROGRAM, 4)
    gather, scatter, total = cost.collectives
    assert (gather.kind, gather.hidden, gather.shape) == (
        "all-gather",
        True,
        "bf16[64,64]+bf16[64,32]",
    )
    assert (scatter.kind, scatter.hidden, scatter.shape) == (
        "reduce-scatter",
        False,
        "bf16[16,64]",
    )
    assert (total.kind, total.hidden, total.shape) == ("all-reduce", True, "f32[8]")
    assert cost.kernels == {"triton_causal_fwd": [(((1, 128, 2, 64),) * 3, 1)]}


MEMORY_PROGRAM = """\
HloModule m, is_scheduled=true

%read (stack: f32[27,64,32], at: s32[], x: f32[64,32]) -> f32[64,32] {
  %stack = f32[27,64,32] parameter(0)
  %at = s32[] parameter(1)
  %x = f32[64,32] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[1,64,32] dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %flat = f32[64,32] bitcast(%part)
  ROOT %sum = f32[64,32] add(%flat, %x)
}

%write (stack2: f32[27,64,32], y: f32[1,64,32], at2: s32[]) -> f32[27,64,32] {
  %stack2 = f32[27,64,32] parameter(0)
  %y = f32[1,64,32] parameter(1)
  %at2 = s32[] parameter(2)
  %zero2 = s32[] constant(0)
  ROOT %updated = f32[27,64,32] dynamic-update-slice(%stack2, %y, %at2, %zero2, %zero2)
}

ENTRY %main (s: f32[27,64,32], n: s32[], x3: f32[64,32]) -> f32[27,64,32] {
  %s = f32[27,64,32] parameter(0)
  %n = s32[] parameter(1)
  %x3 = f32[64,32] parameter(2)
  %layer = f32[64,32] fusion(%s, %n, %x3), kind=kLoop, calls=%read
  %w = f32[64,32] constant({...})
  %product = f32[64,64] dot(%layer, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %b = f32[1,64,32] bitcast(%layer)
  ROOT %all = f32[27,64,32] fusion(%s, %b, %n), kind=kLoop, calls=%write
}
"""


def test_bytes_that_operations_move():
    """Of stacked layers only the one that is read or written."""
    cost = hlo.cost(MEMORY_PROGRAM, 1)
    layer, index = 64 * 32 * 4, 4
    read, product, write = cost.operations
    assert read == (0, 3 * layer + index, 1)
    assert product == (2 * 64 * 64 * 32, 2 * layer + 64 * 64 * 4, 1)
    assert write == (0, 2 * layer + index, 1)
    # Reading is limited by the memory, the product by its operations.
    seconds = (read[1] + write[1]) / 1e9 + product[0] / 1e6
    assert cost.roofline_seconds(1e6, 1e9) == pytest.approx(seconds)


def test_necessary_operations_are_those_of_the_parameters():
    """Two operations for each weight and token, but for embeddings, norms and biases."""
    config = PRESETS["llave-2b"]
    shapes = sharding.flatten(abstract_params(Llave(config)))

    def weights(prefix):
        return sum(
            int(np.prod(leaf.shape))
            for path, leaf in shapes.items()
            if path.startswith(prefix) and path.endswith("kernel")
        )

    tokens = 10
    linear = flops.text_forward(config, np.ones(tokens))
    scores = 4 * tokens * config.text.num_layers * config.text.hidden_size
    assert linear - scores == 2 * tokens * weights("language_model/")
    patches, width = config.vision.num_patches, config.vision.hidden_size
    scores = 4 * config.vision.num_layers * patches**2 * width
    assert flops.vision_forward(config, 1) - scores == 2 * patches * weights("vision_tower/")
    assert flops.projector_forward(config, 1) == 2 * patches * weights("projector/")


def test_attention_counts_pairs_within_sequences():
    config = PRESETS["tiny"]
    joined = flops.text_forward(config, np.array([300]))
    apart = flops.text_forward(config, np.array([100, 200]))
    pairs = 300 * 301 / 2 - 100 * 101 / 2 - 200 * 201 / 2
    text = config.text
    scores = 4 * pairs * (text.num_layers - 1) * text.num_heads * text.head_dim
    # One token less for which the last layer computes more than keys and values.
    keys = 2 * text.hidden_size * text.num_kv_heads * text.head_dim
    token = 2 * (flops.text_layer_weights(config) - keys)
    assert joined - apart == scores - token


def test_frozen_tower_has_no_backward_pass():
    config = PRESETS["llave-0.5b"]
    lengths = np.array([100.0])
    trained = flops.training(config, lengths, 2, freeze_vision=False)
    frozen = flops.training(config, lengths, 2, freeze_vision=True)
    assert trained == pytest.approx(3 * flops.embedding(config, lengths, 2))
    assert trained - frozen > 2 * flops.vision_forward(config, 2)


@pytest.mark.parametrize("pattern", [".*", "(language_model|projector)/.*", "language_model/.*"])
def test_adapters_need_no_gradients_of_weights(pattern):
    """Their own products three times, and those of the base twice, as far down as there are adapters."""
    config, tokens, crops = PRESETS["llave-2b"], 10, 3
    modules = find_modules(pattern)

    def operations(rank):
        return flops.training_adapters(
            config, np.ones(tokens), crops, Lora(modules, rank=rank, alpha=1.0)
        )

    patches, text, vision = crops * config.vision.num_patches, config.text, config.vision
    own = {p: math.prod(s) for p, s in adapter_shapes(modules, 1, config).items()}
    in_text = sum(size for path, size in own.items() if path.startswith("language_model/"))
    elsewhere = sum(own.values()) - in_text
    each = 3 * 2 * (tokens * in_text + patches * elsewhere)
    assert operations(7) - operations(3) == pytest.approx(4 * each, rel=1e-12)

    # Products of attention have two gradients each.
    scores = 4 * tokens * text.num_layers * text.hidden_size
    base = 2 * flops.text_forward(config, np.ones(tokens)) + scores
    width = vision.hidden_size
    towers = (flops.projector_forward(config, crops), flops.vision_forward(config, crops))
    if pattern == ".*":
        # Nothing needs the gradient of pixels, nor of what the first layer's projections read.
        read = vision.crop.patch_dim * width + 3 * width**2
        attention = 4 * vision.num_layers * patches * vision.num_patches * width
        base += 2 * sum(towers) + attention - 2 * patches * read
    elif "projector" in pattern:
        base += sum(towers) + 2 * patches * text.hidden_size**2
    else:
        heads = text.num_heads + 2 * text.num_kv_heads
        base += sum(towers) - 2 * tokens * text.hidden_size * heads * text.head_dim
    assert operations(1) - each == pytest.approx(base, rel=1e-12)


def test_unknown_topologies_are_refused():
    with pytest.raises(ValueError, match="expected CHIP:SHAPE"):
        chips.topology_devices("v99:2x2")


@pytest.mark.parametrize("topology", ["h100", "h100:", "h100:2x4", "h100:0"])
def test_shapes_that_hosts_of_gpus_do_not_come_in_are_refused(topology):
    with pytest.raises(ValueError, match="expected"):
        chips.topology_devices(topology)


def test_what_compiles_for_gpus_is_named_where_it_is_missing(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(chips.topologies, "get_topology_desc", missing)
    with pytest.raises(chips.NoCompilerError, match=r"h100:8.*pip install llave_jax\[cuda\]"):
        chips.topology_devices("h100:8")


def test_what_compiles_for_tpus_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(chips.NoCompilerError, match=r"v4:2x2x4.*pip install llave_jax\[tpu\]"):
        chips.topology_devices("v4:2x2x4")


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    return write_tiny_config(tmp_path_factory, "tpu_v4")


def write_tiny_config(tmp_path_factory, large):
    """The tiny model in bfloat16, everything that a large config does."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(
        f"from configs.{large} import get_config as large\n"
        "def get_config():\n"
        "    config = large()\n"
        "    config.model.preset = 'tiny'\n"
        "    config.batch.pairs, config.batch.micro_batches = 64, 2\n"
        "    config.model.inputs.max_length = config.model.inputs.max_text_length = 512\n"
        "    config.batch.row_length = 512\n"
        "    config.batch.tokens_per_pair = 256.0\n"
        "    return config\n"
    )
    return path


def compile_tiny(config, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [*COMPILE, f"--config={config}", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_tiny_model_compiles_for_a_tpu_slice(tiny_config):
    pytest.importorskip("libtpu", reason="needs the libtpu wheel: pip install llave_jax[tpu]")
    done = compile_tiny(tiny_config, "--topology=v4:2x2x1")
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["devices"] == 4
    assert values["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert {"splash_causal_fwd", "splash_causal_bwd", "splash_full_fwd"} <= set(values["kernels"])
    purposes = {row["purpose"] for row in values["collectives"]}
    assert collectives.UNACCOUNTED not in purposes
    assert {"parameter gather", "gradient scatter", "embedding gather and loss"} <= purposes
    assert 0 < values["memory_gib"]["peak"] < values["memory_gib"]["hbm"]
    assert values["executed_over_necessary"] > 1


@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="needs jax's CUDA plugin: pip install llave_jax[cuda]",
)
def test_tiny_model_compiles_for_a_host_of_gpus(tmp_path_factory):
    config = write_tiny_config(tmp_path_factory, "gpu_h100")
    done = compile_tiny(config, "--topology=h100:8")
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["devices"] == 8
    assert values["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert values["seconds_are"] == "bounds"
    phases = {"causal_fwd", "causal_bwd_queries", "causal_bwd_keys", "full_fwd"}
    assert {f"triton_{phase}" for phase in phases} <= set(values["kernels"])
    purposes = {row["purpose"] for row in values["collectives"]}
    assert collectives.UNACCOUNTED not in purposes
    assert {"parameter gather", "gradient scatter", "embedding gather and loss"} <= purposes
    assert 0 < values["memory_gib"]["peak"] < values["memory_gib"]["hbm"]
    assert values["executed_over_necessary"] > 1


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("all-reduce", "f32[1152,1536]", "embedding gather and loss"),
        # 36 rows a device, padded to whole tiles.
        ("reduce-scatter", "f32[40,1536]", "embedding gather and loss"),
        ("reduce-scatter", "f32[48,1536]", collectives.UNACCOUNTED),
        ("reduce-scatter", "f32[32,1536]", collectives.UNACCOUNTED),
        ("all-gather", "bf16[1152,1536]", "parameter gather"),
        ("all-reduce", "bf16[1152,1537]", collectives.UNACCOUNTED),
        ("reduce-scatter", "bf16[36,1536]+bf16[1152,48]", "gradient scatter"),
        ("all-reduce", "f32[]+f32[64]", "scalars and vectors"),
    ],
)
def test_exchanges_without_a_name_are_known_by_their_size(kind, shape, expected):
    size = hlo.num_bytes(shape)
    exchange = hlo.Collective(kind, "", shape, group=32, count=1, result_bytes=size, hidden=False)
    assert collectives.purpose(exchange, pool=1152 * 1536, parameters={(1152, 1536)}) == expected


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        # Pools of micro-batches are gathered within the loop over these.
        ("jit(f)/jvp()/while/body/closed_call/shard_map/all_gather", "embedding gather and loss"),
        ("jit(f)/jvp()/shard_map/psum", "embedding gather and loss"),
        ("jit(f)/layers.body/self_attn/shard_map/triton_causal_fwd", collectives.UNACCOUNTED),
    ],
)
def test_exchanges_are_known_by_where_they_come_from(op_name, expected):
    size = 8 * hlo.num_bytes("bf16[512,896]")
    exchange = hlo.Collective("all-gather", op_name, "bf16[512,896]", 8, 8, size, hidden=False)
    assert collectives.purpose(exchange, pool=256 * 896, parameters={(896, 4864)}) == expected


@pytest.mark.slow
def test_overflow_is_reported(tiny_config):
    pytest.importorskip("libtpu", reason="needs the libtpu wheel: pip install llave_jax[tpu]")
    done = compile_tiny(tiny_config, "--topology=v5e:2x2", "--config.batch.crops_per_pair=100000")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "RESOURCE_EXHAUSTED" in json.loads(done.stdout.splitlines()[-1])["does_not_fit"]
