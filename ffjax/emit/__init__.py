"""From a plan to a JAX program: sharding constraints, lowering, and what the compiler made of it."""
