"""The README holds what the files of results say."""

import json

from benchmarks import tables


def test_the_readme_is_what_the_files_say():
    assert tables.main(check=True) == 0


def test_every_file_of_results_is_shown():
    shown = {f"{name}.json" for name in tables.PARTS} | {"scene.jpg"}
    assert {file.name for file in tables.RESULTS.iterdir()} == shown


def test_packing_is_told_against_the_slowest_way():
    text = tables.packing(json.loads((tables.RESULTS / "packing.json").read_text()))
    assert "| one per sequence, live | 3768 | 1.52 | 1 |" in text and "| packed, cached | 1031 | 6.69 | 4.4 |" in text
