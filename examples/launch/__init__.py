"""A train script for any number of processes, and how SLURM and Kubernetes start it."""
