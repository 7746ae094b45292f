"""Convert between Hugging Face checkpoints and model directories; `--help` says how."""

import sys

from llave_jax.convert import main

if __name__ == "__main__":
    sys.exit(main())
