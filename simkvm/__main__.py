"""`python -m simkvm` is the command line."""

from simkvm.cli import main

if __name__ == "__main__":
    main(prog_name="simkvm")
