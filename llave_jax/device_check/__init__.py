"""What a new device has to prove before a run: `python -m llave_jax.check_device`."""
