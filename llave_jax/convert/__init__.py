"""Conversion between Hugging Face checkpoints and model directories, in both directions.

`names` is the one table of tensor names, `hf_config` translates configurations, `from_hf` and
`to_hf` move the weights, tensor by tensor. Neither JAX nor PyTorch is needed.
"""
