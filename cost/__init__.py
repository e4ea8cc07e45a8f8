"""What a plan costs: clusters, op and collective costs, memory, and the simulator (`ffjax.cost`)."""
