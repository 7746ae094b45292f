"""A tenth of the bundled benchmark, for tests of how runs behave and not of how well they learn."""

import functools

from llave_jax.digits.dataset import Sizes

# In place of `llave_jax.digits.dataset.Sizes`, whose defaults are those of the quickstart.
FEW = functools.partial(Sizes, train=600, eval=40)
