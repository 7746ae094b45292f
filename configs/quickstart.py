"""Train a tiny LLaVE from scratch on handwritten digits: five to six minutes on two CPU cores.

The vision tower is trained too. Data, tokenizer and benchmark are built on first use.
"""

from llave_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.model.preset = "tiny"
    config.model.tokenizer = "digits"
    config.data.path = "digits"
    config.data.num_workers = 0
    config.steps = 1100

    # Room for the largest pair (109 tokens and 7 crops; on average 89 and 5) 32 times, two to a row, so
    # that a step is the same pairs on any number of devices.
    config.batch.pairs = 32
    config.batch.row_length = 224
    config.batch.tokens_per_pair = 112.0
    config.batch.crops_per_pair = 7.0
    config.batch.taps = 1
    config.batch.fill = 1.0

    config.loss.alpha = 9.0
    # Ten class names and a few answers: most batches hold the same target several times.
    config.loss.mask_false_negatives = True
    config.optim.learning_rate = 7e-4
    config.optim.warmup_fraction = 0.1
    config.optim.beta2 = 0.98
    config.optim.weight_decay = 0.1
    config.optim.rates = ((".*", 1.0),)
    config.dtype = "float32"
    # Faster here than keeping everything: memory that is written for the first time costs more.
    config.remat = "block"

    config.checkpoint.every = 300
    config.eval.benchmark = "digits"
    return config
