"""`python -m internvl_edge`: the command line, also from a clone that is not installed."""

from .cli import main

main()
