"""Steps as other people write them, one idiom each. `tests/test_conformance.py` runs them; `harness.py` says how."""
