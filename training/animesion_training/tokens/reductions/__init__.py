"""Token reduction by dropping tokens (`pruning`) or combining them (`merging`)."""
