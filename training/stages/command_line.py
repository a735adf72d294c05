"""From a shell to a stage's `main`: options into dataclasses, and a user's mistake told in one line.

    if __name__ == "__main__":
        run(main, FinetuneArguments, SFTConfig)

A mistake (an option that is unknown or missing, a missing folder, settings that do not fit) is one line on stderr and
exit status 2; `--traceback`, or SMOLDRIVER_TRACEBACK=1 in the environment, shows where it was found.
"""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser

TRACEBACK = "--traceback"


def run(main: Callable[..., Any], *arguments: type, parser: type[HfArgumentParser] | None = None) -> None:
    """Parse the command line into dataclasses and call a stage with them.

    Args:
        main: takes one instance of each of `arguments`.
        arguments: dataclasses whose fields are the options.
        parser: `trl.TrlParser` where a stage takes `--config FILE.yaml` too.
    """
    show = TRACEBACK in sys.argv or os.environ.get("SMOLDRIVER_TRACEBACK") == "1"
    sys.argv = [word for word in sys.argv if word != TRACEBACK]
    try:
        main(*parse(arguments, parser))
    except (ValueError, OSError, FloatingPointError) as error:
        if show:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: tuple[type, ...], parser: type[HfArgumentParser] | None) -> tuple[Any, ...]:
    epilog = f"{TRACEBACK} shows where an error was found."
    known = (parser or HfArgumentParser)(arguments, epilog=epilog)
    known.error = refuse  # type: ignore[method-assign]  # argparse prints all options first
    if parser is None:
        return known.parse_args_into_dataclasses()
    return known.parse_args_and_config()  # type: ignore[attr-defined]


def refuse(message: str) -> NoReturn:
    raise ValueError(message)


def one_line(error: Exception) -> str:
    """What an error says, on one line; an OSError's with its file."""
    return " ".join(str(error).split()) or type(error).__name__
