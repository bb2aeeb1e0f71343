"""`python -m bitroute` is the `quantize` command."""

from bitroute.cli import main

main(prog_name="quantize")
