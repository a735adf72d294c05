import json

from exported import save_checkpoint
from tiny import CAMERAS, tiny_processor

from hub_export import cost
from hub_export.card import load_cost
from hub_export.cost import CostArguments


def test_the_table_has_every_budget_and_goes_into_the_card(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "final")
    file = cost.main(CostArguments(str(checkpoint), str(tmp_path / "cost.json"), rounds=2, new_tokens=3))
    rows = json.loads(file.read_text())["rows"]
    assert [row["visual tokens per scene"] for row in rows] == [budget * len(CAMERAS) for budget in (1, 4, 8)]
    for row in rows:
        assert 0 < row["look, s"] <= row["look and first token, s"] and row["further token, s"] >= 0
    table = load_cost(file)
    assert table["columns"] == list(rows[0]) and "thread" in table["device"] and "float32" in table["device"]


def test_default_budgets_end_with_all_queries():
    assert cost.default_budgets(tiny_processor()) == [1, 4, 8]
