"""Inner loops that NumPy has no fast way for, compiled for this processor. They know addresses and numbers, nothing else."""
