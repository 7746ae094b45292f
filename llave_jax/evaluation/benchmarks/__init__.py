"""Benchmarks: a module reads one; `registry.py` has their names."""
