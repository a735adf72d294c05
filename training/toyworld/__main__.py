"""`python -m training.toyworld`: draw a toy world, see `make`."""

from training.stages.command_line import run
from training.stages.recipes import Stage
from training.toyworld.make import ToyWorldArguments, main

STAGE = Stage()

if __name__ == "__main__":
    run(main, ToyWorldArguments)
