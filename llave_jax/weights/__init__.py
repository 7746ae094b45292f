"""Model directories and Hugging Face checkpoints, in both directions. Neither JAX nor PyTorch is needed to convert."""
