"""ffjax takes a single-device JAX train step and finds a fast way to run it on a cluster."""

__version__ = "0.1.0.dev0"
