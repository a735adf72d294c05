"""`python -m training.nuscenes`: questions of a nuScenes-format fleet, see `convert`."""

from training.nuscenes.convert import NuScenesArguments, main
from training.stages.command_line import run
from training.stages.recipes import Stage

STAGE = Stage()  # a fleet's root is too large to be hashed

if __name__ == "__main__":
    run(main, NuScenesArguments)
