"""The model card of an exported folder, from files that are published with it, and from nothing else."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from safetensors import safe_open

TEMPLATES = Path(__file__).with_name("templates")
STAGES = ("assemble", "transfer", "finetune", "run")
METRICS_KEYS = ("dataset", "split", "split_hash", "seed", "command", "versions", "results", "controls")
COST_KEYS = ("command", "device", "rows")
PIPELINE = "image-text-to-text"


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


Figure = float | Mapping[str, float]  # with an interval: {"value": …, "low": …, "high": …}


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Figure]]:
    """(path, figure) of every number below `value`, and of every `{"value": …, "low": …, "high": …}`."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float) or (isinstance(value, Mapping) and "value" in value):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}/{key}" if prefix else str(key))


def point(figure: Figure) -> float:
    """The number in a figure with or without an interval."""
    return figure["value"] if isinstance(figure, Mapping) else figure


def shown(figure: Figure | None) -> str:
    """A figure as the table prints it, three digits behind the point."""
    if figure is None:
        return "–"
    text = f"{point(figure):.3f}" if isinstance(point(figure), float) else str(point(figure))
    if isinstance(figure, Mapping) and {"low", "high"} <= set(figure):
        text += f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return text


def load_metrics(path: Path) -> dict[str, Any]:
    """`metrics.json` of an evaluation.

    It holds `dataset` (a Hub id or a name), `split`, `split_hash`, `seed`, `command`, `versions` {package: version},
    `results` (nested dicts of figures) and `controls` {name: the same nested dicts, answered without seeing}. A figure
    is a number, or `{"value", "low", "high"}`. Anything else in the file is ignored.

    Raises:
        ValueError: a key is missing, or there is no figure or no control: they are not published without.
    """
    metrics = json.loads(path.read_text())
    missing = [key for key in METRICS_KEYS if key not in metrics]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}: figures are published with them or not at all")
    if not list(leaves(metrics["results"])) or not metrics["controls"]:
        raise ValueError(f"{path.name} needs results and at least one blind control; figures without mean little")
    return metrics


def results_table(metrics: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the controls, and one row per metric; the last column subtracts the first control."""
    names = list(metrics["controls"])
    controls = [dict(leaves(metrics["controls"][name])) for name in names]
    rows = []
    for metric, figure in leaves(metrics["results"]):
        blind = controls[0].get(metric)
        gain = "–" if blind is None else f"{point(figure) - point(blind):+.3f}"
        row = {"metric": metric, "sighted": shown(figure), "gain": gain}
        rows.append({**row, "controls": [shown(control.get(metric)) for control in controls]})
    return names, rows


def load_cost(path: Path) -> dict[str, Any]:
    """A cost table: `command`, `device` and `rows`, a list of dicts with the same keys.

    Raises:
        ValueError: a key is missing, or the rows differ in their columns.
    """
    cost = json.loads(path.read_text())
    missing = [key for key in COST_KEYS if key not in cost]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    columns = list(cost["rows"][0])
    if any(list(row) != columns for row in cost["rows"]):
        raise ValueError(f"{path.name}: every row must have the columns {columns}")
    rows = [
        [row[column] if isinstance(row[column], str) else shown(row[column]) for column in columns]
        for row in cost["rows"]
    ]
    return {"command": cost["command"], "device": cost["device"], "columns": columns, "rows": rows}


def recipe(folder: Path) -> list[dict[str, Any]]:
    """How each stage was run, from the notes beside the weights."""
    notes = []
    for stage in STAGES:
        if not (folder / f"{stage}.json").is_file():
            continue
        note = json.loads((folder / f"{stage}.json").read_text())
        figures = [
            (key, ", ".join(f"{name} {version}" for name, version in value.items()) if key == "versions" else value)
            for key, value in note.items()
            if key not in ("command", "arguments")
        ]
        notes.append({"stage": stage, "file": f"{stage}.json", "command": note.get("command", ""), "figures": figures})
    return notes


def count_parameters(folder: Path) -> dict[str, Any]:
    """What the safetensors headers say: parameters, those of the projector, bytes and the dtypes."""
    parameters = projector = 0
    dtypes = set()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                tensor = weights.get_slice(name)
                count = 1
                for size in tensor.get_shape():
                    count *= size
                parameters += count
                projector += count if name.startswith("model.multi_modal_projector.") else 0
                dtypes.add(tensor.get_dtype())
    return {
        "parameters": parameters,
        "projector_parameters": projector,
        "weight_bytes": sum(path.stat().st_size for path in files),
        "dtype": " and ".join(sorted(dtypes)),
    }


def base_models(folder: Path) -> list[str]:
    """Hub ids of the parts that `assemble` was given."""
    if not (folder / "assemble.json").is_file():
        return []
    arguments = json.loads((folder / "assemble.json").read_text())["arguments"]
    parts = [arguments[name] for name in ("vision", "text", "smolvlm")]
    return [part for part in parts if part and part.count("/") == 1]


def write_card(folder: Path, name: str, license_name: str) -> None:
    """Write README.md, and `.eval_results/` where the figures belong to a data set on the Hub.

    Args:
        folder: an export, complete but for its card.
        name: what the model is called, and the local folder that the card's snippet loads.
        license_name: of the weights.
    """
    config = json.loads((folder / "config.json").read_text())
    metrics = load_metrics(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    controls, rows = results_table(metrics) if metrics else ([], [])
    folded = config["projector_config"]["scale_factor"] ** 2 if config["connector"] == "pixel_shuffle" else 1
    data = ModelCardData(
        model_name=name,
        language="en",
        license=license_name,
        library_name="transformers",
        pipeline_tag=PIPELINE,
        tags=["custom_code", "autonomous-driving", "multi-camera", "vision-language-model"],
        base_model=base_models(folder) or None,
        eval_results=model_index(metrics) if metrics else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "card.md"),
        name=name,
        license=license_name,
        has_picture=(folder / "picture.png").is_file(),
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
        controls=controls,
        blind=controls[0] if controls else None,
        rows=rows,
        versions_of=lambda versions: ", ".join(f"{package} {version}" for package, version in versions.items()),
        notes=recipe(folder),
        cost=load_cost(folder / "cost.json") if (folder / "cost.json").is_file() else None,
        **count_parameters(folder),
    )
    card.save(folder / "README.md")
    if metrics and metrics["dataset"].count("/") == 1:
        write_eval_results(folder, metrics)


def model_index(metrics: dict[str, Any]) -> list[EvalResult]:
    """Every figure as the Hub's model-index wants it; the blind control stands beside it."""
    blind_name = next(iter(metrics["controls"]))
    blind = dict(leaves(metrics["controls"][blind_name]))
    results = []
    for metric, figure in leaves(metrics["results"]):
        label = f"{metric} ({blind_name}: {shown(blind[metric])})" if metric in blind else metric
        results.append(
            EvalResult(
                task_type=PIPELINE,
                dataset_type=metrics["dataset"],
                dataset_name=metrics["dataset"],
                dataset_split=metrics["split"],
                metric_type=metric.rsplit("/", 1)[-1],
                metric_name=label,
                metric_value=point(figure),
            )
        )
    return results


def write_eval_results(folder: Path, metrics: dict[str, Any]) -> None:
    """The newer form of the same figures; it names data sets by their Hub id."""
    entries = [
        EvalResultEntry(
            dataset_id=metrics["dataset"],
            task_id=metric,
            value=point(figure),
            notes=f"split {metrics['split']}, split hash {metrics['split_hash']}, seed {metrics['seed']}",
        )
        for metric, figure in leaves(metrics["results"])
    ]
    target = folder / ".eval_results" / "smoldriver.yaml"
    target.parent.mkdir(exist_ok=True)
    target.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
