"""`python -m training.toyworld`: draw a toy world, see `make`."""

from transformers.hf_argparser import HfArgumentParser

from training.stages import Stage
from training.toyworld.make import ToyWorldArguments, main

STAGE = Stage()

if __name__ == "__main__":
    main(*HfArgumentParser(ToyWorldArguments).parse_args_into_dataclasses())
