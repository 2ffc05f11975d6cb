"""torch modules, nothing else."""
