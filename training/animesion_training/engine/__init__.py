"""The training loop and what it stands on: steps, optimizer, checkpoints, processes, run folders."""
