"""From the results of `benchmarks.speed` to its tables and ratios."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from benchmarks.markdown import number, table

TILES, NO_TILES = "SmolVLM, tiles", "SmolVLM, no tiles"
HEADLINE = "SmolDriver dino 16"


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """k of y ≈ c · x^k, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def summary(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in samples.items()}


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
    steps = (NO_TILES, "SmolDriver vit 64", "SmolDriver vit 16", HEADLINE)
    tower, tokens, dino = (seconds[one]["first_token"] / seconds[next]["first_token"] for one, next in pairwise(steps))
    found = {
        "first token, against SmolVLM without tiles": theirs["first_token"] / ours["first_token"],
        "questions per second, against SmolVLM without tiles": theirs[most] / ours[most],
        "questions per second, against itself without reuse": no_reuse / ours[most],
        "preprocessing, against SmolVLM without tiles": theirs["preprocess"] / ours["preprocess"],
        "of that first token: from the 224 px tower (ViT-B) at equal tokens": tower,
        "of that first token: from 16 tokens a camera in place of 64": tokens,
        "of that first token: from DINOv2-S in place of ViT-B": dino,
    }
    if shipped := seconds.get(TILES):
        for key, name in (
            ("first_token", "first token"),
            (most, "questions per second"),
            ("preprocess", "preprocessing"),
        ):
            found[f"{name}, against SmolVLM as shipped"] = shipped[key] / ours[key]
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


def report(results: dict[str, Any]) -> str:
    """Everything as Markdown; a part that was not measured is left out."""
    parts = (_settings, _variants, _ratios, _large, _precision, _memory, _growth)
    return "\n\n".join("\n".join(lines) for part in parts if (lines := part(results)))


def _settings(results: dict[str, Any]) -> list[str]:
    settings, machine = results["settings"], results["machine"]
    out = []
    if settings["quick"]:
        out += ["**Tiny models: this shows that the benchmark runs, and nothing about speed.**", ""]
    out += [
        f"{settings['dtype'].removeprefix('torch.')}, {settings['threads']} threads, medians of {settings['rounds']} "
        f"interleaved rounds (tiles: one), {settings['new_tokens']} tokens an answer, {settings['batch_size']} rows; "
        f"torch {machine['torch']}, transformers {machine['transformers']}. Six 1600×900 JPEGs. Random weights with "
        "SmolVLM2-256M's text dimensions."
    ]
    if results["rates"]:
        rates = summary(results["rates"])
        out += [
            "",
            f"This machine, in this run: {rates['flops'] / 1e9:,.0f} GFLOP/s in matrix products, "
            f"{rates['bandwidth'] / 1e9:.1f} GB/s read.",
        ]
    return out


def _variants(results: dict[str, Any]) -> list[str]:
    if not results["variants"]:
        return []
    fractions, counts = limits(results), results["settings"]["question_counts"]
    header = ["", "visual tokens", "preprocess s", "vision s", "prefill s", "first token s", "answer s"]
    header += [f"questions/s at {count}" for count in counts]
    header += ["GFLOP a question", "peak MiB", "× limit: encode", "× limit: token", "× limit: batch of tokens"]
    rows = []
    for name, samples in results["variants"].items():
        seconds, cost = summary(samples), results["flops"].get(name, {})
        peaks = results["memory"].get(name, {})
        row = [name, str(cost.get("visual_tokens", ""))]
        row += [number(seconds[key]) for key in ("preprocess", "vision", "prefill", "first_token", "answer")]
        row += [number(count / seconds[f"questions_{count}"]) for count in counts]
        row += [number(cost["per_question"] / 1e9) if cost else "", number(max(peaks.values(), default=None))]
        row += [number(fractions.get(name, {}).get(key)) for key in ("encode", "step", "batch_step")]
        rows.append(row)
    note = (
        "SmolVLM is asked one question after another with `generate`, as it comes; its time for many questions is "
        "that of one, images decoded once. SmolDriver encodes the scene once and asks all. GFLOP a question: at "
        "91 questions a scene. × limit: measured time over what the rates above allow."
    )
    return [*table(header, rows), "", note]


def _ratios(results: dict[str, Any]) -> list[str]:
    rows = [[name, number(value)] for name, value in ratios(results).items()]
    return [f"`{HEADLINE}` is faster by:", "", *table(["factor", "×"], rows)] if rows else []


def _large(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, str(cost["visual_tokens"]), *(number(cost[key] / 1e9) for key in ("vision", "prefill", "per_question"))]
        for name, cost in results["flops"].items()
        if name.startswith("2.2B")
    ]
    header = ["", "visual tokens", "GFLOP vision", "GFLOP prefill", "GFLOP a question"]
    return ["SmolVLM2-2.2B's dimensions, counted, not run:", "", *table(header, rows)] if rows else []


def _precision(results: dict[str, Any]) -> list[str]:
    if not results["precision"]:
        return []
    settings, judged = results["settings"], results.get("precision_accuracy", {})
    most = settings["question_counts"][-1]
    accuracy: dict[str, Any] = list(judged.values())[-1] if judged else {}
    rows = []
    for name, samples in results["precision"].items():
        seconds, exact = summary(samples), accuracy.get(name, {})
        row = [name, *(number(seconds[key] * 1e3) for key in ("encode", "step", "batch_step"))]
        row += [number(most / seconds[f"questions_{most}"])]
        rows.append([*row, number(exact.get("mean_kl_nats")), number(exact.get("same_first_token"))])
    header = ["", "encode ms", "token ms", f"tokens of {settings['batch_size']} rows ms"]
    header += [f"questions/s at {most}", "KL to fp32, nats", "same first token"]
    note = f"Accuracy judged on: {', '.join(judged)} (the last one is shown)."
    return [f"Presets (`{HEADLINE}`):", "", *table(header, rows), "", note]


def _memory(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, ", ".join(f"{count}: {peak:,.0f}" for count, peak in peaks.items())]
        for name, peaks in results["memory"].items()
    ]
    title = "Peak MiB of a fresh process, by number of questions:"
    return [title, "", *table(["", "questions: MiB"], rows)] if rows else []


def _growth(results: dict[str, Any]) -> list[str]:
    rows = [
        [axis, f"{curve['x'][0]}…{curve['x'][-1]}", number(curve["exponent"]), number(curve["exponent_of_last"])]
        for axis, curve in growth_exponents(results).items()
    ]
    header = ["", "range", "k", "k of the last three points"]
    return ["Growth (seconds ≈ c · x^k):", "", *table(header, rows)] if rows else []
