"""`python -m benchmarks.toyworld`: the models, their blind controls, ablations, rigs and a study; see `run`."""

from benchmarks.toyworld.run import ToyworldArguments, main
from training.stages.command_line import run

if __name__ == "__main__":
    run(main, ToyworldArguments)
