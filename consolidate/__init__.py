"""Elastic Weight Consolidation for checkpoints: measure the Fisher diagonal, store it, train with it."""
