"""Steps as other people write them, one idiom each; `harness.py` says what each must pass."""

MODULES = ("optimizers", "linen_steps", "nnx_steps", "other_frameworks", "control_flow", "primitives")
