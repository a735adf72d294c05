"""Stages: what a recipe says about them, what a command declares about itself, and the plan that follows from both.

A recipe is one YAML file: `output_dir`, `data`, `env` (environment variables), `common` (groups of arguments for the
merge keys of YAML) and, in the order in which they run, a section per stage:

    heal:
      <<: *finetuning         # of `common`
      module: finetune        # python -m training.finetune
      from: transfer          # an earlier section: fills the argument that the command starts from, `checkpoint`
      data: prepare           # an earlier section, or a path; left out: the recipe's `data`
      learning_rate: 1.0e-4   # any other argument of the command

Where an argument names what a stage reads, the name of an earlier section stands for its result, `SECTION/FILE` for a
file in its folder. A command becomes a stage by declaring `STAGE`, a `Stage`, beside its `main`; nothing else knows.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, get_type_hints

import yaml

RECIPES = Path(__file__).parents[1] / "recipes"
SETTINGS = ("output_dir", "data", "env", "common")  # of a recipe, not of a stage
PROCESSES = "processes"  # an argument of the runner: a stage in so many processes of this machine
OWN = ("module", "from")  # of a section, not of its command


def _own_folder(arguments: Mapping[str, Any]) -> str:
    return "."


def _no_figures(folder: Path) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """What a command declares about itself.

    Attributes:
        start: the argument that a section's `from` fills, what the stage goes on from; none: it starts from nothing.
        inputs: the arguments that name what it reads. It is hashed, so that a change is noticed.
        caches: the arguments that name a folder beside the stages'; a relative one lies in the recipe's `output_dir`.
        result: from the arguments to the folder that the stage is run for, relative to its `output_dir`.
        resumes: goes on by itself after a kill; otherwise its half-written folder is deleted first.
        distributed: may run in several processes.
        figures: from `output_dir` to what the stage reached.
    """

    start: str | None = None
    inputs: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    result: Callable[[Mapping[str, Any]], str] = _own_folder
    resumes: bool = False
    distributed: bool = False
    figures: Callable[[Path], dict[str, Any]] = _no_figures


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file says, its groups merged into the sections."""

    file: Path
    output_dir: str
    data: str | None
    env: dict[str, str]
    sections: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PlannedStage:
    """A section with everything that it leaves to the recipe.

    Attributes:
        module: `training.MODULE`.
        stage: what that declares.
        arguments: in full, `output_dir` included.
        reads: argument → the stages that make what it names.
    """

    module: str
    stage: Stage
    arguments: dict[str, Any]
    reads: dict[str, list[str]]

    @property
    def folder(self) -> Path:
        return Path(self.arguments["output_dir"])

    @property
    def result(self) -> Path:
        """The folder that the stage is run for."""
        return self.folder / self.stage.result(self.arguments)

    @property
    def source(self) -> str | None:
        """The stage that this one goes on from, if it is one of the recipe's."""
        return next(iter(self.reads.get(self.stage.start or "", [])), None)


def read_recipe(name: str) -> Recipe:
    """A recipe by file or name.

    Raises:
        ValueError: no such recipe, no stage in it, or a section that is no mapping or names no module.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not file.is_file():
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        raise ValueError(f"no recipe {name!r}; training/recipes has {known}")
    content = yaml.safe_load(file.read_text())
    if not isinstance(content, dict) or not set(content) - set(SETTINGS):
        raise ValueError(f"{file} is no recipe: it has no section of a stage beside {', '.join(SETTINGS)}")
    sections = {key: value for key, value in content.items() if key not in SETTINGS}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{file}: section {key} must hold arguments, one a line; got {section!r}")
        if not isinstance(section.get("module"), str):
            raise ValueError(f"{file}: section {key} must say which command it runs, e.g. module: finetune")
    env = {key: str(value) for key, value in (content.get("env") or {}).items()}
    return Recipe(file, content.get("output_dir") or f"outputs/{file.stem}", content.get("data"), env, sections)


def module_of(module: str) -> ModuleType:
    """The module behind `python -m training.MODULE`.

    Raises:
        ValueError: there is none, or it declares no STAGE.
    """
    name = f"training.{module}"
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:  # a room: its command is its __main__
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError:  # not even the package that should hold it
        spec = None
    if spec is None:
        raise ValueError(f"there is no command {name}")
    command = import_module(spec.name)
    if not isinstance(vars(command).get("STAGE"), Stage):
        raise ValueError(f"{name} is no stage of a recipe: it declares no STAGE")
    return command


def plan(
    sections: Mapping[str, Mapping[str, Any]],
    root: Path,
    data: str | None,
    made: Mapping[str, PlannedStage] = MappingProxyType({}),
) -> dict[str, PlannedStage]:
    """Stages in the order of their sections, with all arguments.

    Args:
        sections: of a recipe.
        root: the recipe's `output_dir`; a stage's folder is `root/SECTION` unless it says otherwise.
        data: what stages read that do not say: a path, or a stage.
        made: stages of another plan, which sections may name too.

    Raises:
        ValueError: a section that its command would not understand, or that reads what no stage before it makes.
    """
    known = dict(made)
    for name, section in sections.items():
        later = {other for other in sections if other not in known}
        try:
            known[name] = _planned(section, root, root / name, data, known, later)
        except ValueError as error:
            raise ValueError(f"section {name}: {error}") from None
    return {name: known[name] for name in sections}


def _planned(
    section: Mapping[str, Any],
    root: Path,
    folder: Path,
    data: str | None,
    known: Mapping[str, PlannedStage],
    later: Collection[str],
) -> PlannedStage:
    command = module_of(section["module"])
    stage: Stage = command.STAGE
    arguments = {"output_dir": str(folder), **{key: section[key] for key in section if key not in OWN}}
    if "from" in section:
        if stage.start is None or stage.start in arguments:
            raise ValueError(f"it cannot say from: {stage.start or 'its command starts from nothing'}")
        if section["from"] not in known:
            raise ValueError(f"it starts from {section['from']!r}, which is no section before it")
        arguments[stage.start] = section["from"]
    if data is not None and "data" in stage.inputs:
        arguments.setdefault("data", data)
    for key in stage.caches:
        if key in arguments:
            arguments[key] = str(root / arguments[key])
    reads: dict[str, list[str]] = {}

    def path_of(key: str, value: str) -> str:
        source, _, file = value.partition("/")
        if source in later:
            raise ValueError(f"its {key} names section {source}, which does not come before it")
        if source not in known:
            return value
        reads.setdefault(key, []).append(source)
        return str(known[source].folder / file if file else known[source].result)

    for key in dict.fromkeys(filter(None, (stage.start, *stage.inputs))):
        value = arguments.get(key)
        if value is not None:
            arguments[key] = [path_of(key, item) for item in value] if isinstance(value, list) else path_of(key, value)
    check_arguments(section["module"], command, arguments)
    return PlannedStage(section["module"], stage, arguments, reads)


def kinds_of(command: ModuleType) -> list[type]:
    """The dataclasses that a command's `main` takes, whose fields are its arguments."""
    hints = get_type_hints(command.main)
    return [hints[name] for name in signature(command.main).parameters]


def check_arguments(module: str, command: ModuleType, arguments: Mapping[str, Any]) -> None:
    """Before anything runs, say which arguments a command does not know, or must have; what they hold is its affair.

    Raises:
        ValueError: naming them.
    """
    taken = [field for kind in kinds_of(command) for field in fields(kind) if field.init]
    allowed = {field.name for field in taken} | ({PROCESSES} if command.STAGE.distributed else set())
    if unknown := sorted(set(arguments) - allowed):
        raise ValueError(f"training.{module} has no argument {', '.join(unknown)}")
    missing = [
        field.name
        for field in taken
        if field.default is MISSING and field.default_factory is MISSING and arguments.get(field.name) is None
    ]
    if missing:
        raise ValueError(f"it needs {', '.join(missing)}; a checkpoint may be named by from: SECTION")


def needed(stages: dict[str, PlannedStage], *names: str) -> list[str]:
    """The named stages of a plan and all that they are made from, in order."""
    found = set(names)
    for name in reversed(stages):
        if name in found:
            found.update(source for sources in stages[name].reads.values() for source in sources)
    return [name for name in stages if name in found]
