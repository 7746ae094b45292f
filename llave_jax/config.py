"""The configuration of a training run: every field with its default, and what it means.

A config file (`configs/NAME.py`) calls `default_config()` and sets what differs; the command line
overrides single fields (`--config.optim.learning_rate=2e-5`); `--config.eval.benchmark=None`, or nothing
behind the =, switches a field off. A misspelt field is an error; values with which no run can work are
refused by `training/config_check.py`. Nothing is built here: `training/setup.py` makes a run's objects from
these fields, `training/batch_shape.py` the shape of its batches.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# A run's configuration, an `ml_collections.ConfigDict` with the fields of `default_config`. Type checkers
# cannot know these fields, as they are set when the program runs, so that they see `Any`. A field that
# does not exist is an error when it is read: the ConfigDict is locked.
Config: TypeAlias = Any


def default_config() -> Config:
    """Every field, with the paper's optimiser and loss (section 4.1, appendix A.1) and no data of its own.

    What the paper's data and inputs add is `paper_config`.
    """
    config: Config = ConfigDict()
    config.seed = 0
    # Optimiser steps of the run. None: as many as `data.epochs` passes over the data take. Warm-up and decay of
    # the learning rate span all steps. A run that goes on with more of either takes the schedule of the new length
    # from the step that it has reached.
    config.steps = placeholder(int)

    # A model directory, another run, a Hugging Face checkpoint or its name on the hub (org/name or
    # org/name@revision); without one, the name of a preset to be trained from scratch with the
    # tokenizer found in `tokenizer` (a directory). `inputs` overrides fields of InputConfig (None: as
    # the model has it); the run's model keeps what was overridden. `pinpoints` are (rows, columns), for
    # all canvases from 1 x 1 to rows x columns of the vision tower's crops, or a tuple of canvases
    # (height, width) in pixels.
    config.model = ConfigDict()
    config.model.path = placeholder(str)
    config.model.preset = placeholder(str)
    config.model.tokenizer = placeholder(str)
    config.model.inputs = ConfigDict(
        {
            "pinpoints": placeholder(tuple),
            "anyres_max": placeholder(int),
            "newline_position": placeholder(str),
            "pool_mode": placeholder(str),
            "pool_stride": placeholder(int),
            "max_text_length": placeholder(int),
            "max_length": placeholder(int),
            "max_frames": placeholder(int),
            "frames_per_second": placeholder(int),
        }
    )

    # Where the pairs come from: see `llave_jax.data.sources.open_source`. `path` "digits" is the
    # bundled benchmark, built on first use under the workdir.
    config.data = ConfigDict()
    config.data.path = placeholder(str)
    config.data.image_root = placeholder(str)
    config.data.subsets = ()
    config.data.split = "original"
    # The first rows of each subset; None: all.
    config.data.max_rows = placeholder(int)
    config.data.epochs = 1
    config.data.num_workers = 4
    # Seconds without a row until a warning names it and the process that loads it; 0: never.
    config.data.stall_warning = 60.0
    # "uniform": all rows shuffled. "modality": each step takes rows with an image in the query, or rows
    # without, as the authors trained (`llave_jax.data.modality_order.ModalityOrder`). "mined:FILE": rows that are
    # each other's hard negatives share a step (`llave_jax.data.mined_order.MinedOrder`); FILE is the
    # neighbours.parquet of `llave_jax.mine`.
    config.data.order = "uniform"
    # Of the uniform order: rows of one subset that follow one another (1: a shuffle of all), and the
    # share of each subset in the stream, as (subset, weight) pairs (empty: every row once an epoch). Of the
    # order of mined neighbours, sub_batch: rows of a cluster.
    config.data.sub_batch = 1
    config.data.weights = ()
    # Rows that cannot be used: "raise", or "skip" and list them in WORKDIR/skipped_PROCESS.jsonl, until
    # they are more than `max_skip_share` of the run's rows.
    config.data.on_error = "raise"
    config.data.max_skip_share = 0.01
    # Share of the rows kept from training, by the hash of their content. They are scored (`eval`).
    config.data.held_out = 0.0

    # Pairs of a step, over all devices. They go through the model in `micro_batches` parts: more parts
    # take less memory. pairs None: `pairs_per_device` for each device along data and fsdp; without this
    # either, `max_pairs`, or half of it, a quarter and so on, until an epoch has 8 steps and the step fits
    # into the devices' memory. micro_batches None: as few as fit. Memory is measured by compiling the step
    # (`llave_jax.training.batch_search`).
    config.batch = ConfigDict()
    config.batch.pairs = placeholder(int)
    config.batch.pairs = 256
    config.batch.pairs_per_device = placeholder(int)
    config.batch.max_pairs = 256
    config.batch.micro_batches = placeholder(int)
    config.batch.micro_batches = 1
    # The room of a batch. None: planned from a sample of the data (`llave_jax.data.batch_plan`). What was
    # planned is in WORKDIR/batch_plan.json; `llave_jax.inspect_data` shows it before a run. Tokens of a
    # row; room for tokens and for crops, divided by `pairs`; patches that are averaged to one visual
    # token, at most. Pairs that find no room wait for the next step.
    config.batch.row_length = placeholder(int)
    config.batch.tokens_per_pair = placeholder(float)
    config.batch.crops_per_pair = placeholder(float)
    config.batch.taps = placeholder(int)
    # The share of `pairs` that a step has on average. With room for fewer tokens than `pairs` take, it is
    # less than 1. None: as planned.
    config.batch.fill = placeholder(float)

    # kind "hardness": the paper's, with hardness `alpha` (0: InfoNCE). "focal": Focal-InfoNCE, with
    # `margin`.
    config.loss = ConfigDict()
    config.loss.kind = "hardness"
    config.loss.alpha = 9.0
    config.loss.margin = 0.3
    # The negatives that alpha weighs: "all", those of other pairs ("in_batch"), or those that the row itself names
    # ("explicit", as EmbeddingGemma has it).
    config.loss.hardness_on = "all"
    config.loss.temperature = 0.02
    # Learn the temperature, from `temperature` on: one for all, or one for each subset. It stays in
    # `temperature_range`, and its rate is `optim.learning_rate` times `temperature_rate`. Range and rate are CLIP's
    # (arXiv 2103.00020; 5e-4 at a learning rate of 1e-5). With a larger learning rate take a smaller factor.
    config.loss.learn_temperature = False
    config.loss.temperature_per_subset = False
    config.loss.temperature_range = (0.01, 1.0)
    config.loss.temperature_rate = 50.0
    # pool "global": every pair of the step is a negative of every other, with exact gradients.
    # "micro": those of its own micro-batch only, as the authors' gradient accumulation does.
    # "device": those of its micro-batch on its own device only, batch.pairs / (shards *
    # batch.micro_batches) of them, as without the paper's cross-device gathering. Shards are the
    # devices along data and fsdp, so this pool depends on the mesh. In all three every pair of the
    # step counts the same. Hard negatives and `mask_false_negatives` apply within the pool.
    config.loss.pool = "global"
    # Equal targets (same text and image; class names, yes and no) are not each other's negatives.
    # The authors' code does not mask them.
    config.loss.mask_false_negatives = False
    # Negatives that are more similar to the query than its target plus this margin are left out, and likewise
    # from target to query (0.1 in Qwen3-VL-Embedding); None: none are.
    config.loss.mask_margin = placeholder(float)
    # Subsets whose pairs have no negatives but those that their own rows name, as classes need it. Their targets
    # are candidates for the queries of other subsets.
    config.loss.in_batch_off = ()
    # Use the hard negatives that rows name (`neg_text`, `neg_image_path`) as further candidates, the first
    # `negatives_per_row` of each row.
    config.loss.hard_negatives = False
    config.loss.negatives_per_row = 1
    # Matryoshka: the loss is the mean over the first numbers of each embedding, L2-normalised again, such as
    # (64, 256, 896). They ascend, and the last is the model's width. `dim_weights`: what each counts; (): the same.
    config.loss.dims = ()
    config.loss.dim_weights = ()
    # Rows with a teacher's scores (`scores`): share of the divergence from them in the loss, 0 to 1; and the
    # temperature by which the scores are divided.
    config.loss.distill_weight = 0.0
    config.loss.teacher_temperature = 1.0

    # `rates`: (path regex, factor on the learning rate); None freezes. The first match wins.
    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-5
    config.optim.warmup_fraction = 0.03
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.0
    # Gradients with a larger norm are scaled down to it; None: never.
    config.optim.clip_norm = placeholder(float)
    config.optim.clip_norm = 1.0
    config.optim.rates = (("vision_tower/.*", None), (".*", 1.0))

    # Adapters of rank `rank` on the modules whose path `targets` matches as a whole; None: the model's own
    # parameters are trained. They need `model.path`, whose parameters stay as they are, in `base_dtype` (None: as
    # stored). An adapter counts alpha / rank (`rslora`: alpha / sqrt(rank)) times; `dropout` is the share of its
    # inputs that a step leaves out. Their learning rates are those of `optim.rates`, by path (such as
    # language_model/layers/self_attn/q_proj/lora_a). docs/training.md, "Adapters".
    config.lora = ConfigDict()
    config.lora.rank = placeholder(int)
    config.lora.alpha = 32.0
    config.lora.dropout = 0.0
    config.lora.targets = "(language_model|projector)/.*"
    config.lora.rslora = False
    config.lora.base_dtype = placeholder(str)

    # A step whose loss or gradient is not finite: "stop" ends the run, with the last checkpoint kept. "skip" leaves
    # the parameters as they are and goes on, until it has happened more than `max_in_a_row` times in a row or
    # more than `max_in_all` times in the whole run.
    config.nonfinite = ConfigDict({"action": "stop", "max_in_a_row": 5, "max_in_all": 50})

    # Devices along each mesh axis; -1: the rest. Batches are split over data and fsdp.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    # Activations and products; what is trained is float32. Norms, softmax and loss are float32.
    config.dtype = "bfloat16"
    # Implementations of `llave_jax.ops.attention`; "auto": what suits the devices, once it has agreed with the
    # reference on them (`llave_jax.ops.attention_choice`).
    config.attention = "auto"
    config.vision_attention = "auto"
    # What the backward pass recomputes: see `llave_jax.models.remat.REMATS`.
    config.remat = "block"

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000
    config.checkpoint.keep = 2
    # Score by which the best parameters are kept in WORKDIR/best: of the benchmark ("average/overall") or
    # of held-out pairs ("validation/recall@1"). Of a loss ("validation/loss") the smallest is the best.
    # None: not kept.
    config.checkpoint.best_metric = placeholder(str)
    config.log_every = 10
    # Project of Weights & Biases that gets the metrics too (extra `wandb`); None: none.
    config.log = ConfigDict({"wandb": placeholder(str)})

    # Traces `steps` steps from step `start` on by jax.profiler, into WORKDIR/tensorboard; None: none. The first
    # step of a process compiles.
    config.profile = ConfigDict({"start": placeholder(int), "steps": 3})

    # Evaluation at the start and the end of the run, and every `every` steps (0: no), on the benchmark and on
    # the pairs of `data.held_out`. `benchmark` "digits", a directory in MMEB's form (of `datasets`; empty: all),
    # or one with queries.jsonl, corpus.jsonl and qrels.tsv; or "NAME:DIR" with the NAME of any benchmark that
    # `llave_jax.evaluate` knows; None: no benchmark.
    config.eval = ConfigDict()
    config.eval.benchmark = placeholder(str)
    config.eval.datasets = ()
    config.eval.every = 0
    # Held-out pairs are candidates of each other in one pool of at most so many; None: of all.
    config.eval.max_pairs = placeholder(int)
    config.eval.max_pairs = 1000
    # The run ends when `checkpoint.best_metric` has not become better in so many evaluations in a row; None: it
    # never ends early. A run that has ended so goes on if it is run again with more patience.
    config.eval.patience = placeholder(int)
    # From here on a field that is not there is an error, not a new field.
    return config.lock()


def paper_config() -> Config:
    """`default_config` with the data and inputs of the paper's models, in place of the base model's.

    The base models have 36 canvases up to 6 x 6, sequences of 32 768 tokens and other newlines or none
    said. The authors' training overrides all of these.
    """
    config = default_config()
    # Up to 768 x 768 pixels, as in the authors' code. The paper says 672 x 672.
    config.model.inputs.pinpoints = (2, 2)
    config.model.inputs.anyres_max = 9
    config.model.inputs.newline_position = "grid"
    config.model.inputs.max_length = 4096
    config.model.inputs.max_text_length = 4096
    # 662 thousand pairs of MMEB's 20 training subsets.
    config.data.max_rows = 50_000
    return config
