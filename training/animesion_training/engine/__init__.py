"""The training engine: setup, loop, steps, optimizer, checkpoints and the folder of a run."""
