"""The toy world's results as tables in Markdown, one for each question."""

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import percent, table
from benchmarks.toyworld.results import FORMAT, LANGUAGE, best_values
from benchmarks.toyworld.variants import STUDY
from training.evaluation.controls import Control
from training.evaluation.figures import title_of

OUTDATED = (
    "The results in `benchmarks/results/toyworld.json` are those of an older road, which neither read nor aligned; "
    "`make benchmark` makes new ones."
)
TITLES = {
    "smolvlm-base": "SmolVLM, read and aligned only",
    "smolvlm-ft": "SmolVLM-FT",
    "smoldriver-base": "SmolDriver, read and aligned only",
    "smoldriver": "**SmolDriver**",
    "blind": "blind: the same language model, no images",
}
BLIND_COLUMNS = {
    "template_majority": "best answer per template %",
    "text_only": "no images %",
    "black": "black images %",
    "wrong_scene": "other scene's images %",
}
ABLATIONS = {
    "position-keys": "keys of positions only",
    "shared-qformer": "one Q-Former for all cameras",
    "no-camera-vector": "no camera vectors",
    "untrained-queries": "queries never trained",
    "frozen-projector": "projector as aligned, frozen",
    "no-attention": "no attention supervision",
    "no-reading": "no reading",
    "no-align": "no aligning",
    "with-transfer": "with knowledge transfer from the aligned SmolVLM",
    "healed": "with healing (language model frozen)",
}
WORLDS = {
    "evaluation": "the world of training, other scenes",
    "fog": "fog, which no training scene has",
    "other-rig": "unlike cameras, never trained on",
    "seven": "trained on seven cameras",
    "van": "trained on the unlike cameras",
}
WORDING = ("seed_bleu", "bert_score_f1")
CONTROLS = ("drop_relevant", "black_relevant", "permuted", "swap_left_right", "paraphrase", "absent_object")
VALUES = {"tokens": "{} tokens", "pixels": "{} px", "width": "width {}", "rank": "rank {}", "rate": "{}"}

Run = Mapping[str, Any]


def report(run: Run) -> str:
    """All tables, each under its question; one line for results of the older road."""
    if run.get("format") != FORMAT:
        return OUTDATED
    parts = {
        "How well do they answer?": models(run),
        "Do they look where the question points?": looking(run),
        "How many visual tokens does it take?": budgets(run),
        "What is each part and each stage worth?": ablations(run),
        "What if images or questions are not what they were?": controls(run),
        "And elsewhere?": worlds(run),
        "And with spoilt images?": corruptions(run),
        "Do other numbers help, and elsewhere too?": study(run),
        "What did it cost?": minutes(run),
    }
    shown = ["\n".join([f"*{question}*", "", *lines]) for question, lines in parts.items() if lines]
    return "\n\n".join([*shown, note(run)])


def note(run: Run) -> str:
    """How the figures came about."""
    found = run["models"].values()
    counts = sorted({0} | {model["questions"] for model in found})
    fewer = f" (some variants: {counts[1]})" if len(counts) > 2 else ""
    questions = f"{counts[-1]} questions{fewer}"
    seeds = max((model["seeds"] for model in found), default=0)
    split = f"; split {run['split_hash'][:12]}" if run["split_hash"] else ""
    return (
        f"Right answers on {questions} about scenes that no model has seen; up to {seeds} "
        f"seed{'s' if seeds != 1 else ''}, each one's own figure in brackets; two models are compared on the seeds "
        "that both have. Square brackets: 95 % intervals over scenes, of several seeds' answers together (under "
        "“look”: means of the seeds' own). "
        "BERTScore with MiniLM, not comparable with other encoders'. "
        f"Command: `{run['command'].strip()}`{split}."
    )


def spread(model: Run, group: str) -> str:
    """A figure in percent, with the seeds' own where there are several."""
    text = percent(model[group]["estimate"])
    seeds = model["per_seed"][group]
    return text if len(seeds) < 2 else f"{text} ({' '.join(percent(value) for value in seeds)})"


def gap(interval: Run | None) -> str:
    """A difference in points, with its interval; nothing where there is none."""
    if interval is None:
        return ""
    text = f"{100 * interval['estimate']:+.1f}"
    if interval["low"] is None:
        return text
    return f"{text} [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def share(interval: Run | None) -> str:
    """A share in percent, with its interval."""
    if interval is None:
        return "–"
    text = percent(interval["estimate"])
    return text if interval["low"] is None else f"{text} [{percent(interval['low'])}, {percent(interval['high'])}]"


def existence(model: Run) -> str:
    """Balanced existence with true images."""
    row = model["headline"].get("existence")
    return percent(row["score"]["estimate"]) if row else "–"


def models(run: Run) -> list[str]:
    """Each sighted model beside blind ones."""
    found = {name: run["models"][name] for name in TITLES if name in run["models"]}
    asked = [
        key
        for key in BLIND_COLUMNS
        if any(key in model["controls"] for name, model in found.items() if name != "blind")
    ]
    header = ["", "visual tokens", "perception %", "all %", "sighted − blind, perception", "sighted − blind, all"]
    header += [BLIND_COLUMNS[control] for control in asked]
    rows = []
    for name, model in found.items():
        minus = run["minus_blind"].get(name, {})
        rows.append(
            [
                TITLES[name],
                f"{model['visual_tokens_per_scene']:.0f}",
                spread(model, "perception"),
                spread(model, "accuracy"),
                gap(minus.get("perception")),
                gap(minus.get("accuracy")),
                *(
                    percent(model["controls"].get(control, {}).get("perception")) if name != "blind" else "–"
                    for control in asked
                ),
                *("–" if model[score] is None else f"{model[score]:.3f}" for score in WORDING),
            ]
        )
    return table([*header, *(title_of(LANGUAGE[score]) for score in WORDING)], rows) if rows else []


def looking(run: Run) -> list[str]:
    """The headline figures of SmolDriver and SmolVLM-FT, each beside the best blind control on the same questions."""
    found = {name: run["models"][name]["headline"] for name in ("smoldriver", "smolvlm-ft") if name in run["models"]}
    titles = {key: row["title"] for rows in found.values() for key, row in rows.items()}
    lines = []
    for key, title in titles.items():
        cells = [title, str(next(rows[key]["answers"] for rows in found.values() if key in rows))]
        for rows in found.values():
            row = rows.get(key, {})
            before, after = row.get("true_images"), row.get("swapped_images")
            true = percent(before["estimate"]) if before else "–"
            cells += [
                share(row.get("score")),
                share(row.get("blind")),
                f"{true} → {percent(after['estimate'])}" if after else true,
            ]
        lines.append(cells)
    names = [TITLES[name].strip("*") for name in found]
    columns = [f"{name}{what}" for name in names for what in (" %", ": blind, same questions %", ": true images %")]
    return table(["", "answers", *columns], lines) if lines else []


def budgets(run: Run) -> list[str]:
    """Accuracy over visual tokens."""
    ours = run["models"].get("smoldriver")
    counts = sorted(budget for name in (ours or {}).get("controls", {}) if (budget := Control.parse(name).budget))
    if not ours or not counts:
        return []
    rows = [
        [title, *(percent(ours["controls"][f"sighted@{budget}"][group]) for budget in counts)]
        for group, title in (("perception", "perception %"), ("accuracy", "all %"))
    ]
    minus = run["at_budget_minus_smolvlm_ft"]
    if minus:
        rows.append(
            ["minus SmolVLM-FT, perception", *(gap(minus.get(str(one), {}).get("perception")) for one in counts)]
        )
    return table(["SmolDriver's tokens per camera", *map(str, counts)], rows)


def ablations(run: Run) -> list[str]:
    """SmolDriver without a part or with one more, and SmolDriver minus that."""
    rows = []
    for name, title in {
        "smoldriver": "SmolDriver",
        "smoldriver-base": "no step on pictures with language",
        **ABLATIONS,
    }.items():
        if model := run["models"].get(name):
            follow = model["headline"].get("follow", {}).get("score")
            minus_blind = run["minus_blind"].get(name, {}).get("perception")
            rows.append(
                [
                    title,
                    spread(model, "perception"),
                    gap(run["reference_minus"].get(name, {}).get("perception")),
                    gap(minus_blind),
                    existence(model),
                    share(follow),
                    percent(model["controls"].get("sighted@1", {}).get("perception")),
                    spread(model, "accuracy"),
                ]
            )
    header = ["", "perception %", "SmolDriver − it, perception", "it − blind, perception", "existence %"]
    header += ["answers follow swapped images %", "perception at 1 token a camera %", "all %"]
    return table(header, rows) if len(rows) > 1 else []


def controls(run: Run) -> list[str]:
    """What becomes of the answers when the images or the questions are not what they were."""
    ours = run["models"].get("smoldriver", {"controls": {}})["controls"]
    rows = []
    for name in CONTROLS:
        if name in ours:
            cells = [Control.parse(name).title]
            for group in ("perception", "accuracy"):
                cells += [percent(ours[name][group]), gap(ours[name]["minus_sighted"].get(group)) or "–"]
            rows.append(cells)
    header = ["SmolDriver is given", "perception %", "minus true images, same questions", "all %", "minus true images"]
    return table(header, rows) if rows else []


def worlds(run: Run) -> list[str]:
    """Other weather and other cameras: asked about as they are, or after training on them."""
    found = dict(run["worlds"])
    for rig in ("", "seven-", "van-"):
        if f"{rig}smoldriver" in run["models"]:
            found[rig.rstrip("-") or "evaluation"] = {
                **{name: run["models"].get(f"{rig}{name}", {}) for name in ("smoldriver", "smolvlm-ft", "blind")},
                "smoldriver_minus_blind": run["minus_blind"].get(f"{rig}smoldriver", {}),
                "smoldriver_minus_smolvlm-ft": run["reference_minus"].get(f"{rig}smolvlm-ft", {}),
            }
    rows = []
    for name, title in WORLDS.items():
        if name in found:
            one = found[name]
            cells = [
                title,
                *(share(one.get(model, {}).get("perception")) for model in ("smoldriver", "smolvlm-ft", "blind")),
            ]
            minus = (one.get(f"smoldriver_minus_{other}", {}).get("perception") for other in ("blind", "smolvlm-ft"))
            rows.append([*cells, *map(gap, minus)])
    header = ["perception", "SmolDriver %", "SmolVLM-FT %", "blind %", "SmolDriver − blind", "SmolDriver − SmolVLM-FT"]
    return table(header, rows) if len(rows) > 1 else []


def corruptions(run: Run) -> list[str]:
    """Perception over severities."""
    found = run["models"].get("smoldriver", {}).get("corruptions")
    if not found:
        return []
    spoilt: dict[str, dict[int, str]] = {}  # {corruption: {severity: perception}}
    for control, scores in ((Control.parse(name), scores) for name, scores in found.items()):
        if control.corruption and control.severity:
            spoilt.setdefault(control.corruption, {})[control.severity] = percent(scores["perception"])
    severities = sorted({severity for cells in spoilt.values() for severity in cells})
    rows = [[name.replace("_", " "), *(cells[severity] for severity in severities)] for name, cells in spoilt.items()]
    title = f"SmolDriver, perception % ({percent(found['sighted']['perception'])} without)"
    return table([title, *(f"severity {severity}" for severity in severities)], rows)


def study(run: Run) -> list[str]:
    """One factor at a time in shorter runs, then the best of each together, there and elsewhere."""
    if "study" not in run["models"]:
        return []
    best = best_values(run)
    places = [("the recipe's own numbers", "", "study")]
    places += [(factor, value_title(value), f"study-{value}") for factor, values in STUDY.items() for value in values]
    places += [
        ("all that helped", ", ".join(map(value_title, best)), "study-best"),
        ("elsewhere: the recipe's own numbers", "", "study-elsewhere"),
        ("elsewhere: all that helped", ", ".join(map(value_title, best)), "study-elsewhere-best"),
    ]
    rows = []
    for factor, value, name in places:
        if model := run["models"].get(name):
            minus = run["reference_minus"].get(name, {}).get("perception")
            chosen = f"**{value}**" if name.removeprefix("study-") in best else value
            rows.append(
                [
                    factor,
                    chosen,
                    share(model["perception"]),
                    gap(run["minus_blind"].get(name, {}).get("perception")),
                    gap(minus),
                ]
            )
    header = ["shorter runs", "value", "perception %", "it − blind, perception", "the recipe's own − it, perception"]
    return table(header, rows)


def value_title(value: str) -> str:
    """ "tokens-8" → "8 tokens"."""
    kind, _, number = value.partition("-")
    return VALUES[kind].format(number)


def minutes(run: Run) -> list[str]:
    """By stage: how often it ran, and minutes of one core."""
    spent: dict[str, list[float]] = {}
    for name, stage in run["stages"].items():
        spent.setdefault(name.rsplit(".", 1)[-1], []).append(stage["minutes"])
    rows = [
        [stage, str(len(each)), f"{sum(each) / len(each):.1f}", f"{sum(each):.0f}"] for stage, each in spent.items()
    ]
    total = sum(map(sum, spent.values()))
    cores = f"minutes of one core, {run['arguments']['jobs']} side by side"
    return table(["stage", "runs", cores, f"all ({total:.0f})"], rows) if rows else []
