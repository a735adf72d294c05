"""`metrics.json` of `training.evaluate` → the card's tables, the Hub's model-index and `.eval_results`.

Nothing is computed from predictions here: each figure stands in the file, or is the difference of two that do.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

PIPELINE = "image-text-to-text"
BLIND = ("template_majority", "text_only", "black", "wrong_scene")
KEYS = (
    "command",
    "arguments",
    "seed",
    "split",
    "split_hash",
    "checkpoint",
    "versions",
    "counts",
    "results",
    "intervals",
)
KINDS = {"yes_no": "yes/no"}  # where a name with blanks is not how one writes it
LANGUAGE = (
    ("exact match", ("exact_match",)),
    ("BLEU-4 (COCO)", ("coco", "bleu_4")),
    ("ROUGE-L (COCO)", ("coco", "rouge_l")),
    ("CIDEr (COCO)", ("coco", "cider")),
    ("BLEU (sacrebleu)", ("sacrebleu", "score")),
    ("BERTScore F1", ("bert_score", "f1")),
    ("DriveLM final without judge", ("drivelm", "final")),
)
FINGERPRINTED = (".json", ".safetensors", ".bin", ".jinja", ".txt")


def load_metrics(path: Path) -> dict[str, Any]:
    """`metrics.json` of an evaluation.

    Raises:
        ValueError: a key is missing, or there are no sighted answers or no blind control: they are not published
            without.
    """
    metrics = json.loads(path.read_text())
    missing = [key for key in KEYS if key not in metrics]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}: figures are published with them or not at all")
    if "sighted" not in metrics["results"] or not blind_of(metrics):
        raise ValueError(
            f"{path.name} needs sighted answers and at least one blind control ({', '.join(BLIND)}); it has "
            f"{', '.join(metrics['results']) or 'none'}. Figures without mean little"
        )
    return metrics


def check_fingerprint(metrics: dict[str, Any], checkpoint: Path, adapter: Path | None) -> None:
    """Make sure that it was this checkpoint, with this adapter or none, that was evaluated.

    Raises:
        ValueError: it was not.
    """
    evaluated = metrics["checkpoint"]
    for key, folder in (("fingerprint", checkpoint), ("adapter_fingerprint", adapter)):
        found = None if folder is None else fingerprint(folder)
        if evaluated.get(key) != found:
            raise ValueError(
                f"metrics.json is of another model: its {key} is {evaluated.get(key)}, that of {folder} is {found}"
            )


def fingerprint(folder: Path) -> str:
    """The same as `training.evaluation.answering.fingerprint`: sha256 over a folder's weights and settings."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in FINGERPRINTED):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def blind_of(metrics: dict[str, Any]) -> list[str]:
    """The blind controls that were evaluated."""
    return [control for control in BLIND if control in metrics["results"]]


def figures(metrics: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(title, place in a control's results, name among the intervals) of each figure that is shown; all are better
    when higher."""
    sighted = metrics["results"]["sighted"]
    yield "accuracy", ("accuracy",), "accuracy"
    for category in sighted.get("by_category", {}):
        yield f"accuracy, {category} category", ("by_category", category, "accuracy"), category
    for kind in sighted.get("by_type", {}):
        yield (
            f"accuracy, {KINDS.get(kind, kind.replace('_', ' '))} questions",
            ("by_type", kind, "accuracy"),
            f"type:{kind}",
        )
    yield "balanced accuracy, yes/no", ("by_type", "yes_no", "balanced_accuracy"), "yes_no_balanced_accuracy"
    for title, place in LANGUAGE:
        yield title, place, ""


def value_at(metrics: dict[str, Any], control: str, place: tuple[str, ...]) -> float | None:
    """A figure of a control, or None where it was not measured."""
    value: Any = metrics["results"].get(control, {})
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def shown(value: float | None, interval: dict[str, Any] | None = None, sign: str = "") -> str:
    """A figure as tables print it, three digits behind the point, with its interval where there is one."""
    if value is None:
        return "–"
    text = format(value, f"{sign}.3f") if isinstance(value, float) else str(value)
    if interval and interval["low"] is not None:
        text += f" [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"
    return text


def best_blind(metrics: dict[str, Any], place: tuple[str, ...]) -> tuple[str, float] | None:
    """The blind control that reaches most, and what it reaches."""
    values = [(control, value_at(metrics, control, place)) for control in blind_of(metrics)]
    known = [(control, value) for control, value in values if value is not None]
    return max(known, key=lambda item: item[1]) if known else None


def results_table(metrics: dict[str, Any]) -> dict[str, Any]:
    """Sighted figures beside the blind ones, and the difference to the best of these, paired where there is one."""
    blind, intervals = blind_of(metrics), metrics["intervals"]
    rows = []
    for title, place, name in figures(metrics):
        sighted = value_at(metrics, "sighted", place)
        if sighted is None:
            continue
        gain, best = "–", best_blind(metrics, place)
        if best:
            paired = intervals.get("sighted_minus", {}).get(best[0], {}).get(name)
            gain = shown(paired["estimate"] if paired else sighted - best[1], paired, "+")
        answers = value_at(metrics, "sighted", (*place[:-1], "answers"))
        own = shown(sighted, intervals.get("sighted", {}).get(name))
        others = [shown(value_at(metrics, control, place)) for control in blind]
        rows.append([title, shown(answers), own, *others, gain])
    columns = ["figure", "answers", "sighted", *(name.replace("_", " ") for name in blind), "sighted − best blind"]
    return {"columns": columns, "rows": rows}


def budgets_table(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """What fewer visual tokens cost; None where only one budget was evaluated."""
    budgets = [control for control in metrics["results"] if control.startswith("sighted@")]
    if not budgets:
        return None
    rows = []
    for control in [*budgets, "sighted"]:
        tokens = value_at(metrics, control, ("visual_tokens_per_scene",))
        accuracy = value_at(metrics, control, ("accuracy",))
        balanced = value_at(metrics, control, ("by_type", "yes_no", "balanced_accuracy"))
        rows.append([f"{tokens:g}" if tokens is not None else "–", shown(accuracy), shown(balanced)])
    rows.sort(key=lambda row: float(row[0]) if row[0] != "–" else 0)
    return {"columns": ["visual tokens per scene", "accuracy", "balanced accuracy, yes/no"], "rows": rows}


def controls_table(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """What happens with fewer, exchanged or spoilt images; of each corruption the strongest severity."""
    chosen: dict[str, str] = {}  # the last of each kind; severities rise
    for control in metrics["results"]:
        if control not in BLIND and not control.startswith("sighted"):
            kind = control.rpartition(":")[0] if control.startswith("corrupt:") else control
            chosen[kind] = control
    rows = []
    for control in chosen.values():
        gap = metrics["intervals"].get("sighted_minus", {}).get(control, {}).get("accuracy")
        cells = [
            shown(value_at(metrics, control, (name,))) for name in ("answers", "accuracy", "changed_from_sighted")
        ]
        rows.append([control_title(control), *cells, shown(gap["estimate"], gap, "+") if gap else "–"])
    columns = ["images or questions", "answers", "accuracy", "share of answers that changed", "sighted − this"]
    return {"columns": columns, "rows": rows} if rows else None


def control_title(control: str) -> str:
    """What a reader calls a control: "fog, severity 3", "without CAM_BACK"."""
    kind, *rest = control.split(":")
    if kind == "corrupt":
        return f"{rest[0].replace('_', ' ')}, severity {rest[1]}"
    return f"without {rest[0]}" if kind == "drop" else kind.replace("_", " ")


def model_index(metrics: dict[str, Any], dataset: str) -> list[EvalResult]:
    """The figures of the results table as the Hub's model-index wants them; the best blind control is in the name."""
    entries = []
    for title, place, _ in figures(metrics):
        value, best = value_at(metrics, "sighted", place), best_blind(metrics, place)
        if value is None:
            continue
        entries.append(
            EvalResult(
                task_type=PIPELINE,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=metrics["split"],
                metric_type=place[-1],
                metric_name=f"{title} (blind, {best[0]}: {shown(best[1])})" if best else title,
                metric_value=value,
            )
        )
    return entries


def write_eval_results(metrics: dict[str, Any], dataset: str, target: Path) -> None:
    """The newer form of the same figures; it names data sets by their Hub id."""
    notes = f"split {metrics['split']}, split hash {metrics['split_hash']}, seed {metrics['seed']}"
    entries = []
    for title, place, _ in figures(metrics):
        value, best = value_at(metrics, "sighted", place), best_blind(metrics, place)
        if value is not None:
            blind = f"; blind, {best[0]}: {shown(best[1])}" if best else ""
            entries.append(EvalResultEntry(dataset_id=dataset, task_id=title, value=value, notes=notes + blind))
    target.parent.mkdir(exist_ok=True)
    target.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
