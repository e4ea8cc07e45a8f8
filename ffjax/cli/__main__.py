"""`python -m ffjax.cli` is `ffjax`."""

from ffjax.cli import main

main()
