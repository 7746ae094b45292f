"""Hard negatives of training rows, found by a model."""
