import pytest
import torch
from tiny import tiny_tokenizer

from training.data.wording import STATUSES
from training.learning.slots import (
    CLOSEST_TOKEN,
    FIRST_OBJECT,
    GROUPS,
    WordTable,
    bags_of,
    groups_of,
    length_of,
    tokens_of,
    words_of,
)


def thing(name, status=None, distance=5.0, camera="FRONT"):
    return {"name": name, "camera": camera, "status": status, "distance": distance}


def contents(*things, **words):
    return {"objects": list(things), "words": words, "unclear": []}


def test_a_class_tells_its_states_by_their_share():
    same = words_of("car", [thing("car", "parked")] * 2)
    assert same == {"car": 1.0, "two": 1.0, "parked": 1.0}
    mixed = words_of("car", [thing("car", "parked"), thing("car", "parked"), thing("car", "moving")])
    assert mixed["parked"] == pytest.approx(2 * mixed["moving"])
    assert words_of("bicycle", [thing("bicycle", "with rider")]) == {"bicycle": 1, "one": 1, "with": 1, "rider": 1}
    assert "many" in words_of("car", [thing("car")] * 9)


def test_two_classes_that_share_a_token_never_share_the_other():
    for name in STATUSES:
        assert len(groups_of(name)) == 3
        for other in set(STATUSES) - {name}:
            if {name, other} in ({"truck", "trailer"}, {"bicycle", "traffic light"}):  # eleven classes in nine cells
                continue
            shared = [token for token in groups_of(name) if token in groups_of(other)]
            assert len([token for token in shared if token < CLOSEST_TOKEN]) <= 1, (name, other)
    assert len(groups_of("forklift")) == 3 and groups_of("forklift") == groups_of("forklift")
    assert max(groups_of("forklift")) < FIRST_OBJECT


def test_the_first_token_tells_all_and_the_closest_loudest():
    frame = contents(thing("bus", "moving", 20.0), thing("car", "parked", 6.0), FRONT=["rain"])
    (summary,) = bags_of(frame, "FRONT", 1)
    assert summary["car"] > summary["bus"] > 0 and summary["rain"] > 0 and summary["one"] == pytest.approx(1.6)


def test_more_tokens_add_and_never_change_those_before():
    things = [thing("bus", "moving", 20.0), thing("car", "parked", 6.0), thing("car", "moving", 7.0)]
    most = bags_of(contents(*things, FRONT=["rain"]), "FRONT", 24)
    for count in (1, 2, 5, 16, 17):
        assert bags_of(contents(*things, FRONT=["rain"]), "FRONT", count) == most[:count]
    assert most[CLOSEST_TOKEN]["closest"] == 1 and "car" in most[CLOSEST_TOKEN]
    assert [set(bag) for bag in most[FIRST_OBJECT : FIRST_OBJECT + 3]] == [
        {"car", "one", "parked"},
        {"car", "one", "moving"},
        {"bus", "one", "moving"},
    ]
    assert most[FIRST_OBJECT + 3] == {"nothing": 1.0}


def test_where_there_is_nothing_every_token_says_so():
    assert bags_of(contents(thing("car")), "BACK", len(GROUPS)) == [{"nothing": 1.0}] * len(GROUPS)


def test_tokens_are_as_long_as_words_and_most_like_what_they_say():
    tokenizer = tiny_tokenizer()
    table = WordTable(tokenizer, [contents(thing("forklift"), FRONT=["rain"])])
    assert {"forklift", "rain", "rider", "many", "nothing"} <= set(table.words)
    embeddings = torch.randn(len(tokenizer), 32, generator=torch.Generator().manual_seed(0))
    vectors = table.vectors(embeddings)
    weights = table.weights([{"car": 1.0, "parked": 1.0}, {"nothing": 1.0}])
    tokens = tokens_of(weights, vectors, length_of(embeddings))
    assert tokens.norm(dim=-1) == pytest.approx(length_of(embeddings).expand(2))
    assert tokens[1] == pytest.approx(
        vectors[table.index["nothing"]] / vectors[table.index["nothing"]].norm() * length_of(embeddings)
    )
