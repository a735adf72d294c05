"""A checkpoint's way to the Hub and into other people's engines.

python -m hub_export build --checkpoint outputs/run/final --out outputs/smoldriver
python -m hub_export check outputs/smoldriver
python -m hub_export push outputs/smoldriver your-name/smoldriver --dry_run
python -m hub_export serve transformers outputs/smoldriver
python -m hub_export onnx outputs/smoldriver --out outputs/smoldriver-onnx
python -m hub_export cost outputs/smoldriver --out outputs/cost.json
python -m hub_export label outputs/smoldriver outputs/questions --out outputs/answers

`python -m hub_export COMMAND --help` lists a command's options.
"""

import sys
from dataclasses import MISSING, fields
from importlib import import_module

from transformers import HfArgumentParser

COMMANDS = {
    "build": "BuildArguments",
    "check": "CheckArguments",
    "push": "PushArguments",
    "serve": "ServeArguments",
    "onnx": "OnnxArguments",
    "label": "LabelArguments",
    "cost": "CostArguments",
}


def parse(arguments_class: type, argv: list[str]) -> object:
    """Arguments of one command. Values before the first option belong to the fields without a default, in order."""
    required = [item.name for item in fields(arguments_class) if item.default is item.default_factory is MISSING]
    named = []
    while argv and not argv[0].startswith("-") and required:
        named += [f"--{required.pop(0)}", argv[0]]
        argv = argv[1:]
    (args,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(named + argv)
    return args


def main(argv: list[str]) -> None:
    """Run the command that the first argument names."""
    if not argv or argv[0] not in COMMANDS:
        wanted = f"expected one of {', '.join(COMMANDS)}; got {argv[0] if argv else 'nothing'}"
        sys.exit(f"{__doc__}\n{wanted}")
    module = import_module(f"hub_export.{argv[0]}")
    try:
        module.main(parse(getattr(module, COMMANDS[argv[0]]), argv[1:]))
    except ValueError as error:  # these say what was expected; a traceback would bury it
        sys.exit(f"hub_export {argv[0]}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
