"""Chains of tasks on real data, each by the command line."""
