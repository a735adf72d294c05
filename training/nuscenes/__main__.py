"""`python -m training.nuscenes`: questions of a nuScenes-format fleet, see `convert`."""

from transformers.hf_argparser import HfArgumentParser

from training.nuscenes.convert import NuScenesArguments, main
from training.stages import Stage

STAGE = Stage()  # a fleet's root is too large to be hashed

if __name__ == "__main__":
    main(*HfArgumentParser(NuScenesArguments).parse_args_into_dataclasses())
