"""`python -m benchmarks.toyworld`: three models, blind controls and ablations; see `run`."""

from benchmarks.toyworld.run import ToyworldArguments, main
from training.stages.command_line import run

if __name__ == "__main__":
    run(main, ToyworldArguments)
