"""A checkpoint's way to the Hub and into other people's engines.

python -m hub_export build --checkpoint outputs/run/final --out outputs/smoldriver
python -m hub_export embed --checkpoint outputs/run/merge --blind outputs/run/blind/final
python -m hub_export check outputs/smoldriver
python -m hub_export push outputs/smoldriver your-name/smoldriver --dry_run
python -m hub_export serve transformers outputs/smoldriver
python -m hub_export onnx outputs/smoldriver --out outputs/smoldriver-onnx
python -m hub_export cost outputs/smoldriver --out outputs/cost.json
python -m hub_export label outputs/smoldriver outputs/questions --out outputs/answers

`python -m hub_export COMMAND --help` lists a command's options. Exit status 2 and one line on stderr: something given
was wrong; `--traceback` or SMOLDRIVER_TRACEBACK=1 shows where it was noticed.
"""

import argparse
import os
import sys
from dataclasses import fields
from importlib import import_module
from typing import Any, NoReturn

from transformers import HfArgumentParser

# {words: (module with `main`, or `module:function`; its arguments; what it does)}; only the module of the command that
# is given is imported.
COMMANDS = {
    "build": ("build", "BuildArguments", "a checkpoint → a folder that is ready for the Hub"),
    "embed": ("embed", "EmbedArguments", "a SmolDriver and its blind twin → the default model of this repository"),
    "check": ("check", "CheckArguments", "prove a folder in a process that has nothing else"),
    "push": ("push", "PushArguments", "publish a checked folder"),
    "serve transformers": ("engines.transformers_server", "TransformersServerArguments", "transformers' own server"),
    "serve vllm": ("engines.vllm", "VllmArguments", "vLLM's own server"),
    "onnx": ("engines.onnx", "OnnxArguments", "graphs for ONNX Runtime"),
    "label": ("label:command", "LabelArguments", "answer the questions of a prepared data set"),
    "cost": ("cost", "CostArguments", "measure what a checkpoint costs on this machine"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A module's docstring as it stands, and each option's default."""


class Parser(HfArgumentParser):
    """Options from a dataclass; fields with the metadata `positional` are given without their names."""

    def add_argument(self, *names: str, positional: bool = False, **options: Any) -> argparse.Action:
        if positional:
            names = (names[0].removeprefix("--"),)
            del options["required"]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; --help lists what there is", file=sys.stderr)
        sys.exit(2)


def parser_of(argv: list[str]) -> Parser:
    """The parser of all commands; the one that `argv` names knows its options."""
    top = Parser(prog="python -m hub_export", description=__doc__, formatter_class=HelpFormatter)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    engines = commands.add_parser("serve", help="with an OpenAI-compatible API").add_subparsers(
        metavar="ENGINE", required=True
    )
    for words, (module_name, arguments_name, does) in COMMANDS.items():
        *group, name = words.split()
        place = engines if group else commands
        if argv[: len(group) + 1] != [*group, name]:
            place.add_parser(name, help=does)
            continue
        file, _, function = module_name.partition(":")
        module = import_module(f"hub_export.{file}")
        arguments = getattr(module, arguments_name)
        chosen = place.add_parser(
            name, help=does, dataclass_types=arguments, description=module.__doc__, formatter_class=HelpFormatter
        )
        chosen.set_defaults(main=getattr(module, function or "main"), arguments=arguments)
        chosen.add_argument("--traceback", action="store_true", help="Show where an error was noticed.")
    return top


def main(argv: list[str]) -> None:
    """Run the command that the first argument names."""
    parser = parser_of(argv)
    given = parser.parse_args(argv)
    args = given.arguments(**{item.name: getattr(given, item.name) for item in fields(given.arguments)})
    try:
        given.main(args)
    except (ValueError, OSError) as error:  # these say what was expected; a traceback would bury it
        if given.traceback or os.environ.get("SMOLDRIVER_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split()) if isinstance(error, OSError) else str(error)
        parser.exit(2, f"hub_export {argv[0]}: {message}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
