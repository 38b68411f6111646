"""Training with a penalty, and the measures taken of it."""
