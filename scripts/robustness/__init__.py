"""Damaged files and killed commands."""
