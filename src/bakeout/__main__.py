"""`python -m bakeout` is the command line."""

from bakeout.cli import main

main(prog_name="bakeout")
