"""The tasks behind a checkpoint: their Fishers, heads and outputs, and saved progress."""
