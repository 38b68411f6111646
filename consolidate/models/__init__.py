"""Torch modules from checkpoints, and back."""
