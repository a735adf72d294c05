"""From the results of `benchmarks.speed` to its table, its ratios and its plots."""

from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed

from matplotlib.figure import Figure  # noqa: E402

from benchmarks.speed.measures import exponent, summary  # noqa: E402
from training.files import whole, write_text

TILES, NO_TILES = "SmolVLM, tiles", "SmolVLM, no tiles"
HEADLINE = "SmolDriver dino 16"


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def limits(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measured time over the time that the machine's own rates of that run allow, per SmolDriver variant.

    encode: tower, projector and prefill of the prefix, from pixels, over operations ÷ matrix-product rate.
    step, batch_step: one token of one answer, or of a batch, over operations ÷ rate + bytes of weights and cache ÷
    bandwidth.
    """
    rates = summary(results["rates"])
    batch = results["settings"]["batch_size"]
    fractions = {}
    for name, samples in results["variants"].items():
        if name not in results["flops"] or "batch_step" not in samples:
            continue
        seconds, cost = summary(samples), results["flops"][name]

        def step(rows: int, cost: dict[str, float] = cost) -> float:
            moved = cost["weight_bytes"] + cost["prefix_bytes"] + rows * cost["row_bytes"]
            return rows * cost["step"] / rates["flops"] + moved / rates["bandwidth"]

        fractions[name] = {
            "encode": (seconds["vision"] + seconds["prefill"]) / ((cost["vision"] + cost["prefill"]) / rates["flops"]),
            "step": seconds["step"] / step(1),
            "batch_step": seconds["batch_step"] / step(batch),
        }
    return fractions


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """How many times faster, and which part of the design each factor comes from."""
    seconds = {name: summary(samples) for name, samples in results["variants"].items()}
    if not {NO_TILES, HEADLINE, "SmolDriver vit 64", "SmolDriver vit 16"} <= set(seconds):
        return {}
    most = f"questions_{max(results['settings']['question_counts'])}"
    ours, theirs = seconds[HEADLINE], seconds[NO_TILES]
    no_reuse = ours[most.replace("questions", "no_reuse")]
    found = {
        "first token, against SmolVLM without tiles": theirs["first_token"] / ours["first_token"],
        "questions per second, against SmolVLM without tiles": theirs[most] / ours[most],
        "questions per second, against itself without reuse": no_reuse / ours[most],
        "preprocessing, against SmolVLM without tiles": theirs["preprocess"] / ours["preprocess"],
        "of that first token: from the 224 px tower (ViT-B) at equal tokens": theirs["first_token"]
        / seconds["SmolDriver vit 64"]["first_token"],
        "of that first token: from 16 tokens a camera in place of 64": seconds["SmolDriver vit 64"]["first_token"]
        / seconds["SmolDriver vit 16"]["first_token"],
        "of that first token: from DINOv2-S in place of ViT-B": seconds["SmolDriver vit 16"]["first_token"]
        / ours["first_token"],
    }
    if TILES in seconds:
        shipped = seconds[TILES]
        found["first token, against SmolVLM as shipped"] = shipped["first_token"] / ours["first_token"]
        found["questions per second, against SmolVLM as shipped"] = shipped[most] / ours[most]
        found["preprocessing, against SmolVLM as shipped"] = shipped["preprocess"] / ours["preprocess"]
    return found


def growth_exponents(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per axis: points, median seconds, k of seconds ≈ c · x^k over all points, and over the last three."""
    curves = {}
    for axis, samples in results["growth"].items():
        x = sorted(int(point) for point in samples)
        y = [summary(samples[str(point)])["seconds"] for point in x]
        if len(x) > 1:
            curves[axis] = {
                "x": x,
                "seconds": y,
                "exponent": exponent(x, y),
                "exponent_of_last": exponent(x[-3:], y[-3:]),
            }
    return curves


def table(results: dict[str, Any]) -> str:
    """The whole report as Markdown: the parts of what was measured."""
    out = ["# Speed", ""]
    if results["settings"]["quick"]:
        out += ["**Tiny models: this shows that the benchmark runs, and nothing about speed.**", ""]
    out += _conditions(results)
    for name, part in (
        ("variants", _variants),
        ("variants", _ratios),
        ("flops", _counted),
        ("precision", _presets),
        ("memory", _peaks),
        ("growth", _growth),
    ):
        if results[name]:
            out += part(results)
    return "\n".join(out)


def _conditions(results: dict[str, Any]) -> list[str]:
    settings, machine = results["settings"], results["machine"]
    out = [
        f"{settings['dtype'].removeprefix('torch.')}, {settings['threads']} threads, medians of {settings['rounds']} "
        f"interleaved rounds (tiles: one), {settings['new_tokens']} tokens an answer, {settings['batch_size']} rows; "
        f"torch {machine['torch']}, transformers {machine['transformers']}. Six 1600×900 JPEGs. Random weights with "
        "SmolVLM2-256M's text dimensions.",
        "",
    ]
    if results["rates"]:
        rates = summary(results["rates"])
        out += [
            f"This machine, in this run: {rates['flops'] / 1e9:,.0f} GFLOP/s in matrix products, "
            f"{rates['bandwidth'] / 1e9:.1f} GB/s read.",
            "",
        ]
    return out


def _variants(results: dict[str, Any]) -> list[str]:
    counts, fractions = results["settings"]["question_counts"], limits(results)
    header = ["", "visual tokens", "preprocess s", "vision s", "prefill s", "first token s", "answer s"]
    header += [f"questions/s at {count}" for count in counts]
    header += ["GFLOP a question", "peak MiB", "× limit: encode", "× limit: token", "× limit: batch of tokens"]
    rows = []
    for name, samples in results["variants"].items():
        seconds, cost = summary(samples), results["flops"].get(name, {})
        peaks = results["memory"].get(name, {})
        row = [name, str(cost.get("visual_tokens", ""))]
        row += [_number(seconds[key]) for key in ("preprocess", "vision", "prefill", "first_token", "answer")]
        row += [_number(count / seconds[f"questions_{count}"]) for count in counts]
        row += [_number(cost["per_question"] / 1e9) if cost else "", _number(max(peaks.values(), default=None))]
        row += [_number(fractions.get(name, {}).get(key)) for key in ("encode", "step", "batch_step")]
        rows.append(row)
    return [
        *_lines(header, rows),
        "",
        "SmolVLM is asked one question after another with `generate`, as it comes; its time for many questions is "
        "that of one, images decoded once. SmolDriver encodes the scene once and asks all. GFLOP a question: at "
        "91 questions a scene. × limit: measured time over what the rates above allow.",
        "",
    ]


def _ratios(results: dict[str, Any]) -> list[str]:
    found = ratios(results)
    if not found:
        return []
    rows = [[name, _number(value)] for name, value in found.items()]
    return [f"`{HEADLINE}` is faster by:", "", *_lines(["factor", "×"], rows), ""]


def _counted(results: dict[str, Any]) -> list[str]:
    large = {name: cost for name, cost in results["flops"].items() if name.startswith("2.2B")}
    if not large:
        return []
    keys = ("vision", "prefill", "per_question")
    rows = [
        [name, str(cost["visual_tokens"]), *(_number(cost[key] / 1e9) for key in keys)] for name, cost in large.items()
    ]
    header = ["", "visual tokens", "GFLOP vision", "GFLOP prefill", "GFLOP a question"]
    return ["SmolVLM2-2.2B's dimensions, counted, not run:", "", *_lines(header, rows), ""]


def _presets(results: dict[str, Any]) -> list[str]:
    settings, judged = results["settings"], results.get("precision_accuracy", {})
    most = settings["question_counts"][-1]
    accuracy: dict[str, Any] = list(judged.values())[-1] if judged else {}
    rows = []
    for name, samples in results["precision"].items():
        seconds, exact = summary(samples), accuracy.get(name, {})
        row = [name, *(_number(seconds[key] * 1e3) for key in ("encode", "step", "batch_step"))]
        row += [_number(most / seconds[f"questions_{most}"])]
        rows.append([*row, _number(exact.get("mean_kl_nats")), _number(exact.get("same_first_token"))])
    header = ["", "encode ms", "token ms", f"tokens of {settings['batch_size']} rows ms"]
    header += [f"questions/s at {most}", "KL to fp32, nats", "same first token"]
    return [
        *(f"Presets (`{HEADLINE}`):", ""),
        *_lines(header, rows),
        "",
        f"Accuracy judged on: {', '.join(judged)} (the last one is shown).",
        "",
    ]


def _peaks(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, ", ".join(f"{count}: {peak:,.0f}" for count, peak in peaks.items())]
        for name, peaks in results["memory"].items()
    ]
    return ["Peak MiB of a fresh process, by number of questions:", "", *_lines(["", "questions: MiB"], rows), ""]


def _growth(results: dict[str, Any]) -> list[str]:
    curves = growth_exponents(results)
    if not curves:
        return []
    rows = [
        [axis, f"{curve['x'][0]}…{curve['x'][-1]}", _number(curve["exponent"]), _number(curve["exponent_of_last"])]
        for axis, curve in curves.items()
    ]
    header = ["", "range", "k", "k of the last three points"]
    return ["Growth (seconds ≈ c · x^k):", "", *_lines(header, rows), ""]


def write_table(results: dict[str, Any], path: Path) -> str:
    """Write the report to `path` and return it."""
    text = table(results)
    write_text(path, text)
    return text


def write_plots(results: dict[str, Any], path: Path) -> None:
    """The growth curves, on logarithmic axes, as PNG; nothing where there are none."""
    curves = growth_exponents(results)
    if not curves:
        return
    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.loglog(curve["x"], curve["seconds"], marker="o", label="measured")
        # The straight line of the fit through the curve's geometric middle.
        middle = [geometric_mean(curve["x"]), geometric_mean(curve["seconds"])]
        fit = [middle[1] * (x / middle[0]) ** curve["exponent"] for x in curve["x"]]
        axes.loglog(curve["x"], fit, linestyle="--", color="gray", label=f"x^{curve['exponent']:.2f}")
        axes.set_xlabel(name)
        axes.set_ylabel("seconds")
        axes.set_xticks(curve["x"], [str(x) for x in curve["x"]], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
