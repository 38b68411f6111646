"""Batches from the rows of task data."""
