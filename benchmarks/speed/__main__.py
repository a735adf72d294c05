"""`python -m benchmarks.speed`: how fast, and how far from what the machine can do; see `run`."""

from benchmarks.speed.run import SpeedArguments, main
from training.stages.command_line import run

if __name__ == "__main__":
    run(main, SpeedArguments)
