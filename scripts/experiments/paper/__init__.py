"""The experiments of the paper, resumable unit by unit."""
