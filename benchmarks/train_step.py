"""Speed of the whole training step, and of embedding, on this machine, beside PyTorch's.

    python benchmarks/train_step.py --preset llave-0.5b                  # one GPU, bfloat16
    python benchmarks/train_step.py --preset llave-2b --torch            # and transformers, same items
    python benchmarks/train_step.py --preset llave-0.5b --embed --torch
    python benchmarks/train_step.py --preset mid-size --pairs 8 --micro-batches 8 --dtype float32 --torch  # a CPU

Pairs have the sizes of MMEB's mix (llave_jax/planning/workload.py), random pixels and random tokens; weights
are random. transformers' LlavaOnevision gets the same items as the authors feed it: padded, queries
and targets apart, SDPA, gradient checkpointing, frozen tower, AdamW. MFU counts necessary operations
(llave_jax/planning/flops.py) of both alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.embedding.embedding_step import build_embedding_step
from llave_jax.inputs.anyres import image_taps
from llave_jax.inputs.batch import Budget, PackedBatch, stack_batches
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import VISUAL_SLOT, TokenSequence
from llave_jax.inputs.taps import newlines
from llave_jax.models.config import PRESETS, LlaveConfig
from llave_jax.models.llave import Llave, example_batch
from llave_jax.models.remat import REMATS
from llave_jax.ops import attention
from llave_jax.parallel import sharding
from llave_jax.planning import flops, workload
from llave_jax.training import optim, train_step
from llave_jax.training.step_loss import LossConfig

# The model of tests/golden/cpu_baseline.json, with which the authors' code was timed on two cores, and its pairs.
MID_SIZE = dataclasses.replace(
    PRESETS["llave-0.5b"],
    text=dataclasses.replace(
        PRESETS["llave-0.5b"].text,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        intermediate_size=1408,
        vocab_size=8000,
    ),
    vision=dataclasses.replace(
        PRESETS["llave-0.5b"].vision,
        hidden_size=384,
        num_layers=8,
        num_heads=6,
        intermediate_size=1536,
    ),
)
MODELS = {**PRESETS, "mid-size": MID_SIZE}
MID_SIZE_PAIR = (workload.Side(16, ((640, 480, 1.0),)), workload.Side(6, None))
# Dense bfloat16 operations a second, as published, by a part of the device's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}
# Rows are a multiple of what the attention kernels' blocks divide.
ROW_TILE = 512
FROZEN = (("vision_tower/.*", None), (".*", 1.0))


def main() -> None:
    args = parse_arguments()
    config = MODELS[args.preset]
    if args.layers:
        config = dataclasses.replace(
            config,
            text=dataclasses.replace(config.text, num_layers=args.layers),
            vision=dataclasses.replace(config.vision, num_layers=args.layers),
        )
    sides = MID_SIZE_PAIR if args.preset == "mid-size" else None
    pairs = [random_pair(config, i, sides) for i in range(args.pairs)]
    batch = pack(config, pairs, args)
    lengths = np.array([len(s) for pair in pairs for s in pair])
    crops = sum(len(s.crops) for pair in pairs for s in pair)
    if args.embed:
        needed = flops.embedding(config, lengths, crops)
    else:
        needed = flops.training(config, lengths, crops, freeze_vision=True)
    runs = {"llave_jax": jax_run}
    if args.torch:
        runs["transformers"] = torch_run
    for name, run in runs.items():
        seconds, memory = run(config, pairs, batch, args)
        row = {
            "program": name,
            "what": "embed" if args.embed else "train",
            "preset": args.preset,
            "layers": args.layers,
            "device": jax.devices()[0].device_kind,
            "seconds": seconds,
            "pairs_per_second": len(pairs) / seconds,
            "tokens_per_second": float(lengths.sum()) / seconds,
            "tflops_per_second": needed / seconds / 1e12,
            "mfu": mfu(needed / seconds),
            "peak_memory_gib": memory,
        }
        print(json.dumps(row), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(MODELS), default="llave-0.5b")
    parser.add_argument("--layers", type=int, help="of each tower, instead of the preset's")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a step")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="block", choices=tuple(REMATS))
    parser.add_argument("--embed", action="store_true", help="the forward pass only")
    parser.add_argument("--torch", action="store_true", help="also run transformers")
    parser.add_argument(
        "--torch-batch", type=int, default=4, help="pairs at a time, as the authors"
    )
    parser.add_argument(
        "--torch-keeps", action="store_true", help="transformers keeps all activations"
    )
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def random_pair(
    config: LlaveConfig, seed: int, sides: tuple[workload.Side, workload.Side] | None
) -> tuple[TokenSequence, TokenSequence]:
    """Query and target with random content, of the given sizes or of MMEB's."""
    rng = np.random.default_rng(seed)
    if sides is not None:
        query, target = (random_side(config, side, rng) for side in sides)
        return query, target
    shares = np.array([subset.rows for subset in workload.SUBSETS.values()], float)
    subset = list(workload.SUBSETS.values())[rng.choice(len(shares), p=shares / shares.sum())]
    return random_side(config, subset.query, rng), random_side(config, subset.target, rng)


def random_side(
    config: LlaveConfig, side: workload.Side, rng: np.random.Generator
) -> TokenSequence:
    vision = config.vision
    size = vision.image_size
    text = rng.integers(1, config.text.vocab_size - 8, workload.CHAT_TOKENS + round(side.text))
    if side.images is None:
        return TokenSequence(
            text.astype(np.int32), np.zeros((0, size, size, 3), np.uint8), newlines(0)
        )
    shares = [share for *_, share in side.images]
    width, height, _ = side.images[rng.choice(len(shares), p=shares)]
    taps = image_taps(width, height, config.inputs, config.vision.crop)
    count = workload.image_cost(width, height, config.input_spec).crops
    tokens = np.concatenate([np.full(taps.shape, VISUAL_SLOT), text]).astype(np.int32)
    crops = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    return TokenSequence(tokens, crops, taps, name=f"{width}x{height}")


def pack(config: LlaveConfig, pairs: list, args: argparse.Namespace) -> PackedBatch:
    """All pairs in micro-batches of one row, as long as the longest needs: arrays [M, 1, ...]."""

    def tokens(pair: tuple[TokenSequence, TokenSequence]) -> int:
        return sum(len(s) for s in pair)

    # Dealt by size, so that none is much longer than the others.
    ordered = sorted(pairs, key=tokens)
    parts = [ordered[i :: args.micro_batches] for i in range(args.micro_batches)]
    longest = max(sum(map(tokens, part)) for part in parts)
    crops = max(sum(len(s.crops) for pair in part for s in pair) for part in parts)
    budget = Budget(1, -(-longest // ROW_TILE) * ROW_TILE, crops, max(map(len, parts)))
    packers = [Packer(budget, 1, config.vision.crop) for _ in parts]
    for packer, part in zip(packers, parts, strict=True):
        if not all(packer.add(pair) for pair in part):
            raise ValueError(f"a micro-batch does not fit {budget}")
    return stack_batches([packer.emit()[0] for packer in packers])


def jax_run(config, pairs, batch, args) -> tuple[float, float | None]:
    """(seconds of a step, peak GiB)."""
    del pairs
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    implementation = attention.on_mesh(args.attention, mesh)
    model = Llave(
        config,
        dtype=jnp.dtype(args.dtype),
        param_dtype=jnp.dtype(args.dtype) if args.embed else jnp.float32,
        attention=implementation,
        vision_attention=implementation,
        remat=args.remat,
        freeze_vision=True,
    )
    params = jax.jit(lambda key: model.init(key, example_batch(config))["params"])(
        jax.random.key(0)
    )
    if args.embed:
        embed = build_embedding_step(model, mesh)
        parts = [
            sharding.device_put_batch(jax.tree.map(lambda x, i=i: x[i], batch), mesh)
            for i in range(args.micro_batches)
        ]

        def run():
            jax.block_until_ready([embed(params, part) for part in parts])

        return timed(run, args.repeats), peak_memory()
    multipliers = optim.lr_multipliers(list(sharding.flatten(params)), FROZEN)
    step = train_step.build_step(
        model,
        mesh,
        optim.make_optimizer(1e-5, multipliers),
        multipliers,
        LossConfig(),
    )
    state = step.init(params)
    batch = sharding.device_put_batch(batch, mesh, leading_axes=1)

    def run_step():
        nonlocal state
        state, metrics = step.run(state, batch, None)
        float(metrics["loss"])

    return timed(run_step, args.repeats), peak_memory()


def torch_run(config, pairs, batch, args) -> tuple[float, float | None]:
    """The same for transformers: micro-batches of `--torch-batch` pairs, gradients added up."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch_model(config)
    model = model.to(device, getattr(torch, args.dtype))  # pyright: ignore[reportArgumentType]
    model.train()
    model.vision_tower.requires_grad_(False)
    if not args.torch_keeps:
        model.language_model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0
    )
    parts = [
        [torch_inputs(model, [pair[side] for pair in pairs[i : i + args.torch_batch]], device)
         for side in (0, 1)]
        for i in range(0, len(pairs), args.torch_batch)
    ]  # fmt: skip

    def step():
        for sides in parts:
            with torch.set_grad_enabled(not args.embed):
                query, target = (torch_embed(model, inputs) for inputs in sides)
            if not args.embed:
                torch_loss(query, target).backward()
        if not args.embed:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = timed(step, args.repeats)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return seconds, memory


def torch_model(config: LlaveConfig):
    from transformers import LlavaOnevisionConfig, LlavaOnevisionModel, Qwen2Config
    from transformers import SiglipVisionConfig as VisionConfig

    text, vision = config.text, config.vision
    return LlavaOnevisionModel(
        LlavaOnevisionConfig(
            text_config=Qwen2Config(
                hidden_size=text.hidden_size,
                num_hidden_layers=text.num_layers,
                num_attention_heads=text.num_heads,
                num_key_value_heads=text.num_kv_heads,
                intermediate_size=text.intermediate_size,
                vocab_size=text.vocab_size,
            ),
            vision_config=VisionConfig(
                hidden_size=vision.hidden_size,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_heads,
                intermediate_size=vision.intermediate_size,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                vision_use_head=False,
            ),
            image_grid_pinpoints=[list(p) for p in config.inputs.pinpoints],
            image_token_index=text.vocab_size - 2,
            video_token_index=text.vocab_size - 1,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        )
    )


def torch_inputs(model, sequences: list[TokenSequence], device: str) -> dict:
    """Sequences padded on the right to the longest, their crops to the most."""
    import torch

    length = max(len(s) for s in sequences)
    tokens = np.zeros((len(sequences), length), np.int64)
    attended = np.zeros((len(sequences), length), np.int64)
    for row, sequence in enumerate(sequences):
        ids = np.where(sequence.tokens == VISUAL_SLOT, model.config.image_token_id, sequence.tokens)
        tokens[row, : len(ids)], attended[row, : len(ids)] = ids, 1
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(attended)}
    pictures = [s for s in sequences if len(s.crops)]
    if pictures:
        most = max(len(s.crops) for s in pictures)
        pixels = np.zeros((len(pictures), most, 3, *pictures[0].crops.shape[1:3]), np.float32)
        for row, s in enumerate(pictures):
            pixels[row, : len(s.crops)] = s.crops.transpose(0, 3, 1, 2) / 127.5 - 1
        sizes = [list(map(int, s.name.split("x")))[::-1] for s in pictures]
        dtype = next(model.parameters()).dtype
        inputs |= {
            "pixel_values": torch.tensor(pixels).to(dtype),
            "image_sizes": torch.tensor(sizes),
        }
    return {name: x.to(device) for name, x in inputs.items()}


def torch_embed(model, inputs: dict):
    import torch

    hidden = model(**inputs, use_cache=False).last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    pooled = hidden[torch.arange(len(last), device=last.device), last].float()
    return torch.nn.functional.normalize(pooled, dim=-1)


def torch_loss(query, target, alpha: float = 9.0, temperature: float = 0.02):
    import torch

    similarity = query @ target.T
    weights = alpha * similarity.detach() * (1 - torch.eye(len(query), device=query.device))
    logits = similarity / temperature + weights
    labels = torch.arange(len(query), device=query.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return 0.5 * (cross_entropy(logits, labels) + cross_entropy(logits.T, labels))


def timed(run: Callable[[], None], repeats: int) -> float:
    """Median seconds, after one run that compiles."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def peak_memory() -> float | None:
    """GiB, where the device says so."""
    statistics = jax.devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return peak and peak / 2**30


def mfu(rate: float) -> float | None:
    kind = jax.devices()[0].device_kind
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
    return peak and rate / peak


if __name__ == "__main__":
    main()
