"""Pack a step's trajectories into rows, prefix trees, ranks and micro-batches."""
