"""Ordinary single-device JAX training programs, importable as `ffjax.examples.gpt` and so on; see README.md beside it."""
