"""From a step to a plan: what is asked and checked, the search of each program, and what is written down of it."""
