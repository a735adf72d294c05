"""`python -m training.nuscenes`: questions of a nuScenes-format fleet, see `convert`."""

from training.command_line import run
from training.nuscenes.convert import NuScenesArguments, main

if __name__ == "__main__":
    run(main, NuScenesArguments)
