"""The model card of an exported folder, from files that are published with it, and from nothing else."""

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from hub_export.files import read_json
from hub_export.lineage import RECIPE, Note, as_note
from hub_export.results import (
    PIPELINE,
    budgets_table,
    controls_table,
    load_metrics,
    model_index,
    results_table,
    shown,
    write_eval_results,
)

TEMPLATES = Path(__file__).with_name("templates")
RUN = f"{RECIPE}/run.json"
COST_KEYS = ("command", "device", "rows")
UNSHOWN = ("stage", "command", "arguments", "made_from", "trained_on", "parts", "teacher")  # long, or told elsewhere
LICENCES = {
    True: "which the toy world generated: free to use",
    False: "which is not a generated world: its own licences hold for these weights",
    None: "of which these notes do not tell the licence",
}


def snippet(repository: str, revision: str | None) -> str:
    """The lines that load the model and ask it; `revision` is a commit, or None for a local folder."""
    text = (TEMPLATES / "snippet.py").read_text().rstrip()
    commit = json.dumps(revision) if revision else "None"
    return text.replace('"REPOSITORY"', json.dumps(repository)).replace('"REVISION"', commit)


def pinned(card: str, name: str, repository: str, revision: str) -> str:
    """A card whose snippet loads `repository` at `revision` in place of the local folder `name`.

    Raises:
        ValueError: the card holds no such snippet (it was edited by hand).
    """
    local = snippet(name, None)
    if local not in card:
        raise ValueError("README.md does not hold the snippet that build wrote, so no commit can be written into it")
    return card.replace(local, snippet(repository, revision))


def load_cost(path: Path) -> dict[str, Any]:
    """A cost table: `command`, `device` and `rows`, a list of dicts with the same keys.

    Raises:
        ValueError: a key is missing, or the rows differ in their columns.
    """
    cost = read_json(path)
    missing = [key for key in COST_KEYS if key not in cost]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    columns = list(cost["rows"][0])
    if any(list(row) != columns for row in cost["rows"]):
        raise ValueError(f"{path.name}: every row must have the columns {columns}")
    rows = [[cell if isinstance(cell, str) else shown(cell) for cell in row.values()] for row in cost["rows"]]
    return {"command": cost["command"], "device": cost["device"], "columns": columns, "rows": rows}


def published_notes(folder: Path) -> list[tuple[str, Note]]:
    """(path in the repository, content) of the stages' notes, in the order of the stages."""
    files = [path for path in (folder / RECIPE).glob("*.json") if path.name[0].isdigit()]
    files.sort(key=lambda path: int(path.name.partition("-")[0]))
    return [(path.relative_to(folder).as_posix(), as_note(read_json(path))) for path in files]


def recipe(folder: Path) -> list[dict[str, Any]]:
    """How each stage was run, from the notes in `recipe/`."""
    stages = []
    for file, note in published_notes(folder):
        lines = [(key.replace("_", " "), in_words(value)) for key, value in note.items() if key not in UNSHOWN]
        stages.append({"stage": note["stage"], "file": file, "command": note["command"], "lines": lines})
    return stages


def data_licences(folder: Path) -> list[str]:
    """One sentence for each stage that trained: on which data, and whether it may be used freely."""
    sentences = []
    for _, note in published_notes(folder):
        if learnt := note["trained_on"]:
            data = Path(learnt["data"]).name
            sentences.append(f"Stage {note['stage']} trained on `{data}`, {LICENCES[learnt['generated']]}.")
    return list(dict.fromkeys(sentences))


def in_words(value: Any) -> str:
    """A value of a note in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load_stages(path: Path) -> dict[str, Any]:
    """`run.json` as a table: stages with their minutes, first and last loss."""
    run = read_json(path)
    rows = []
    for name, stage in run["stages"].items():
        ends = [stage.get("figures", {}).get(end, {}) for end in ("first", "last")]
        losses = [f"{end['loss']:.3f}" for end in ends if "loss" in end]
        steps = ends[1].get("step")
        rows.append([name, f"{stage['minutes']:.1f}", "–" if steps is None else str(steps), " → ".join(losses) or "–"])
    columns = ["stage", "minutes", "steps", "loss, first → last"]
    return {"recipe": Path(run["recipe"]["path"]).name, "columns": columns, "rows": rows}


def count_parameters(folder: Path) -> dict[str, Any]:
    """What the safetensors headers say: parameters, those of the projector, bytes and the dtypes."""
    parameters = projector = 0
    dtypes = set()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                tensor = weights.get_slice(name)
                count = math.prod(tensor.get_shape())
                parameters += count
                projector += count if name.startswith("model.multi_modal_projector.") else 0
                dtypes.add(tensor.get_dtype())
    return {
        "parameters": parameters,
        "projector_parameters": projector,
        "weight_bytes": sum(path.stat().st_size for path in files),
        "dtype": " and ".join(sorted(dtypes)),
    }


def base_models(notes: list[Note]) -> list[str]:
    """Hub ids of the pretrained parts that a stage was given."""
    parts = [note["arguments"].get(name) for note in notes for name in ("vision", "text", "smolvlm")]
    # A folder may be written like an id, owner/name.
    return list(dict.fromkeys(part for part in parts if part and part.count("/") == 1 and not Path(part).exists()))


def write_card(folder: Path, name: str, license_name: str, dataset: str | None = None) -> None:
    """Write README.md, and `.eval_results/` where the figures belong to a data set on the Hub.

    Args:
        folder: an export, complete but for its card.
        name: what the model is called, and the local folder that the card's snippet loads.
        license_name: of the weights.
        dataset: what was evaluated on, by its Hub id or any name; default: the name of the evaluated folder.
    """
    config = read_json(folder / "config.json")
    metrics = load_metrics(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    if metrics and dataset is None:
        dataset = Path(metrics["arguments"]["data"]).name
    folded = config["projector_config"]["scale_factor"] ** 2 if config["connector"] == "pixel_shuffle" else 1
    notes = [note for _, note in published_notes(folder)]
    if (folder / RUN).is_file():  # where a folder that held an old note is gone, the run's record still tells
        notes += [as_note(stage) for stage in read_json(folder / RUN)["stages"].values()]
    examples = folder / "demo" / "examples" / "examples.json"
    data = ModelCardData(
        model_name=name,
        language="en",
        license=license_name,
        library_name="transformers",
        pipeline_tag=PIPELINE,
        tags=["custom_code", "autonomous-driving", "multi-camera", "vision-language-model"],
        base_model=base_models(notes) or None,
        eval_results=model_index(metrics, str(dataset)) if metrics else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "card.md"),
        name=name,
        license=license_name,
        example=json.loads(examples.read_text())[0] if examples.is_file() else None,
        cameras=config["cameras"],
        vision=config["vision_config"]["model_type"],
        text=config["text_config"]["model_type"],
        max_queries=config["max_queries"] // folded,
        min_tokens=1 if folded == 1 else config["max_queries"] // folded,
        max_tokens=config["max_queries"] // folded,
        tokens_at_default=config["num_queries"] // folded,
        image_size=config["image_size"],
        snippet=snippet(name, None),
        metrics=metrics,
        dataset=dataset,
        tables=[table for table in (budgets_table(metrics), controls_table(metrics)) if table] if metrics else [],
        results=results_table(metrics) if metrics else None,
        in_words=in_words,
        told=list(dict.fromkeys(part for note in notes for part in note["parts"])),
        notes=recipe(folder),
        data_licences=data_licences(folder),
        run=load_stages(folder / RUN) if (folder / RUN).is_file() else None,
        cost=load_cost(folder / "cost.json") if (folder / "cost.json").is_file() else None,
        **count_parameters(folder),
    )
    card.save(folder / "README.md")
    if metrics and str(dataset).count("/") == 1:
        write_eval_results(metrics, str(dataset), folder / ".eval_results" / "smoldriver.yaml")
