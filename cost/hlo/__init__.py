"""What a compiled, scheduled program does: its text read, priced, simulated, compared with the plan."""
