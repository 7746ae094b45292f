"""The quickstart with few digits, instead of the pages' (see reduction.py)."""

from configs.quickstart import get_config as get_config
from llave_jax.digits import dataset
from tests.few_digits import FEW

dataset.Sizes = FEW
