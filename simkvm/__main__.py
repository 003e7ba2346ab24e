"""`python -m simkvm` is the command line."""

from simkvm.cli import main

main(prog_name="simkvm")
