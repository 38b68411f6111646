"""`python -m consolidate` is the command `consolidate`."""

from consolidate.cli import main

main()
