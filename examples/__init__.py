"""Ordinary single-device JAX training programs: `ffjax.examples.gpt` and so on; see README.md beside this file."""
