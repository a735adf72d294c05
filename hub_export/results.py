"""`metrics.json` of `training.evaluate` → the card's tables, the Hub's model-index and `.eval_results`.

Nothing is computed from predictions here: each figure stands in the file, or is the difference of two that do.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from hub_export.files import read_json
from smoldriver_hf.fingerprint import fingerprint

PIPELINE = "image-text-to-text"
OLD_BLIND = ("template_majority", "text_only", "black", "wrong_scene")  # of files that do not say what is blind


class ControlWords(TypedDict):
    """What a control is called, and its group: "sighted", "budgets", "blind" or another."""

    title: str
    group: str
    corruption: str | None


class FigureWords(TypedDict):
    """A figure that is better when higher: its title, its place in a control's results, its name in the intervals."""

    title: str
    place: list[str]
    interval: str | None


class Metrics(TypedDict):
    """`metrics.json`, as far as it is read here."""

    command: str
    arguments: dict[str, Any]
    seed: int
    split: str
    split_hash: str
    checkpoint: dict[str, str]
    versions: dict[str, str]
    counts: dict[str, Any]
    controls: dict[str, ControlWords]
    figures: list[FigureWords]
    results: dict[str, dict[str, Any]]
    intervals: dict[str, dict[str, Any]]


WORDS = ("controls", "figures")


def load_metrics(path: Path) -> Metrics:
    """`metrics.json` of an evaluation; `with_words` if it lacks the words for what it holds.

    Raises:
        ValueError: a key is missing, or there are no sighted answers or no blind control: they are not published
            without.
    """
    content = read_json(path)
    missing = [key for key in Metrics.__annotations__ if key not in (*content, *WORDS)]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}: figures are published with them or not at all")
    metrics = with_words(content)
    if "sighted" not in metrics["results"] or not blind_of(metrics):
        raise ValueError(
            f"{path.name} needs sighted answers and at least one blind control; it has "
            f"{', '.join(metrics['results']) or 'none'}. Figures without mean little"
        )
    unnamed = [control for control in metrics["results"] if control not in metrics["controls"]]
    if unnamed:
        raise ValueError(f"{path.name} does not say what the controls {', '.join(unnamed)} are")
    return metrics


def with_words(content: dict[str, Any]) -> Metrics:
    """The same, and for a file that names neither its controls nor its figures: accuracies, under their own names."""
    if all(key in content for key in WORDS):
        return cast(Metrics, content)
    print(
        "metrics.json is of a time when it did not name its figures: the card shows accuracies alone. "
        "training.evaluate with the same output_dir writes it anew and asks nothing again",
        file=sys.stderr,
    )
    controls = {}
    for name in content["results"]:
        kind = "blind" if name in OLD_BLIND else "budgets" if name.startswith("sighted@") else name
        controls[name] = ControlWords(title=name.replace("_", " "), group=kind, corruption=None)
    sighted = content["results"].get("sighted", {})
    figures = [FigureWords(title="accuracy", place=["accuracy"], interval="accuracy")]
    for group, prefix in (("by_category", ""), ("by_type", "type:")):
        for name in sighted.get(group, {}):
            figures.append(
                FigureWords(title=f"accuracy, {name}", place=[group, name, "accuracy"], interval=prefix + name)
            )
    return cast(Metrics, {**content, "controls": controls, "figures": figures})


def check_fingerprint(metrics: Metrics, checkpoint: Path, adapter: Path | None) -> None:
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


def blind_of(metrics: Metrics) -> list[str]:
    """The blind controls that were evaluated."""
    return in_group(metrics, "blind")


def in_group(metrics: Metrics, group: str) -> list[str]:
    """The controls of a group that were evaluated."""
    return [
        name for name, words in metrics["controls"].items() if words["group"] == group and name in metrics["results"]
    ]


def figures(metrics: Metrics) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(title, place in a control's results, name among the intervals) of each figure that is shown."""
    for figure in metrics["figures"]:
        yield figure["title"], tuple(figure["place"]), figure["interval"] or ""


def value_at(metrics: Metrics, control: str, place: tuple[str, ...]) -> float | None:
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


def best_blind(metrics: Metrics, place: tuple[str, ...]) -> tuple[str, float] | None:
    """The blind control that reaches most, and what it reaches."""
    values = [(control, value_at(metrics, control, place)) for control in blind_of(metrics)]
    known = [(control, value) for control, value in values if value is not None]
    return max(known, key=lambda item: item[1]) if known else None


def results_table(metrics: Metrics) -> dict[str, Any]:
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
    titles = [metrics["controls"][name]["title"] for name in blind]
    columns = ["figure", "answers", "sighted", *titles, "sighted − best blind"]
    return {"columns": columns, "rows": rows}


def budgets_table(metrics: Metrics) -> dict[str, Any] | None:
    """What fewer visual tokens cost; None where only one budget was evaluated."""
    budgets = in_group(metrics, "budgets")
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


def controls_table(metrics: Metrics) -> dict[str, Any] | None:
    """What happens with fewer, exchanged or spoilt images; of each corruption the strongest severity."""
    chosen: dict[str, str] = {}  # the last of each corruption: severities rise
    for control, words in metrics["controls"].items():
        if control in metrics["results"] and words["group"] not in ("sighted", "blind", "budgets"):
            chosen[words["corruption"] or control] = control
    rows = []
    for control in chosen.values():
        gap = metrics["intervals"].get("sighted_minus", {}).get(control, {}).get("accuracy")
        names = ("answers", "accuracy", "changed_from_sighted")
        cells = [shown(value_at(metrics, control, (name,))) for name in names]
        rows.append([metrics["controls"][control]["title"], *cells, shown(gap["estimate"], gap, "+") if gap else "–"])
    columns = ["images or questions", "answers", "accuracy", "share of answers that changed", "sighted − this"]
    return {"columns": columns, "rows": rows} if rows else None


def measured(metrics: Metrics) -> Iterator[tuple[str, str, float, str]]:
    """(title, metric, sighted value, what the best blind control reaches) of each figure that was measured."""
    for title, place, _ in figures(metrics):
        value, best = value_at(metrics, "sighted", place), best_blind(metrics, place)
        if value is not None:
            yield title, place[-1], value, f"blind, {best[0]}: {shown(best[1])}" if best else ""


def model_index(metrics: Metrics, dataset: str) -> list[EvalResult]:
    """The figures of the results table as the Hub's model-index wants them; the best blind control is in the name."""
    return [
        EvalResult(
            task_type=PIPELINE,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=metrics["split"],
            metric_type=metric,
            metric_name=f"{title} ({blind})" if blind else title,
            metric_value=value,
        )
        for title, metric, value, blind in measured(metrics)
    ]


def write_eval_results(metrics: Metrics, dataset: str, target: Path) -> None:
    """The newer form of the same figures; it names data sets by their Hub id."""
    notes = f"split {metrics['split']}, split hash {metrics['split_hash']}, seed {metrics['seed']}"
    entries = [
        EvalResultEntry(dataset, title, value, notes="; ".join(filter(None, (notes, blind))))
        for title, _, value, blind in measured(metrics)
    ]
    target.parent.mkdir(exist_ok=True)
    target.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
