"""The program: its jaxpr, the factors of its ops, and the shardings that these allow."""
