"""Candidate shardings, the named expert strategies, and the search among them (`ffjax.strategies`)."""
