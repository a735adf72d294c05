"""Markdown tables and the numbers in them."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


def number(value: float | None) -> str:
    """Three digits, or all before the point; nothing where there is no value."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
