"""Benchmarks: reading them, scoring a model on them, reports."""
