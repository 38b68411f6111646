"""What is run from a clone: the quickstart, the tests, benchmarks and experiments."""
