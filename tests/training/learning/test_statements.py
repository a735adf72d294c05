from training.data.wording import STATUSES
from training.learning.slots import CLOSEST_TOKEN, FIRST_OBJECT, groups_of
from training.learning.statements import Statement, certain_tokens, read_from, statements_about, truth_of


def thing(name, status=None, camera="FRONT"):
    return {"name": name, "camera": camera, "status": status, "distance": 5.0}


def contents(*things, unclear=()):
    return {"objects": list(things), "words": {}, "unclear": list(unclear)}


def test_what_is_true_of_a_picture():
    frame = contents(
        thing("car", "moving"), thing("car", "parked"), *[thing("barrier")] * 5, thing("bus", camera="BACK")
    )
    statements = statements_about([frame])
    true, clear = truth_of(statements, frame, "FRONT")
    assert all(clear)
    assert {one for one, holds in zip(statements, true, strict=True) if holds} == {
        Statement("car", "class"),
        Statement("car", "state", "moving"),
        Statement("car", "state", "parked"),
        Statement("car", "number", "two"),
        Statement("barrier", "class"),
        Statement("barrier", "number", "many"),
    }
    assert Statement("car", "number", "two").bag() == {"car": 1, "two": 1}
    assert Statement("bicycle", "state", "with rider").bag() == {"bicycle": 1, "with": 1, "rider": 1}


def test_classes_that_only_some_frames_know_have_statements():
    statements = statements_about([contents(thing("forklift"))])
    assert [one.kind for one in statements if one.name == "forklift"] == ["class"] + ["number"] * 4
    true, _ = truth_of(statements, contents(thing("forklift")), "FRONT")
    assert sum(true) == 2


def test_a_statement_is_read_from_the_first_token_and_its_classes_own():
    statements = [Statement("car", "class"), Statement("bus", "state", "parked")]
    told = read_from(statements, 20)
    for column, statement in enumerate(statements):
        assert told[:, column].nonzero().flatten().tolist() == [0, *groups_of(statement.name)]
    for count in (1, 2, 4):
        assert read_from(statements, count).tolist() == told[:count].tolist()
        assert read_from(statements, count).any(0).all() or count > 1
    assert read_from(statements, 1).all()


def test_an_object_of_unknown_state_may_be_in_any():
    frame = contents(thing("car", "parked"), thing("car"), thing("barrier"))
    statements = statements_about([frame])
    _, clear = truth_of(statements, frame, "FRONT")
    unknown = {one for one, known in zip(statements, clear, strict=True) if not known}
    assert unknown == {Statement("car", "state", "moving"), Statement("car", "state", "stopped")}


def test_what_is_unclear_is_neither_asked_nor_written():
    frame = contents(thing("car", "moving"), thing("bus", "parked"), unclear=[("car", "FRONT"), ("bus", "BACK")])
    statements = statements_about([frame])
    _, clear = truth_of(statements, frame, "FRONT")
    assert {one.name for one, known in zip(statements, clear, strict=True) if not known} == {"car"}
    certain = certain_tokens(frame, "FRONT", 20)
    doubtful = {0, CLOSEST_TOKEN, *groups_of("car"), *range(FIRST_OBJECT, 20)}
    assert {token for token, known in enumerate(certain) if not known} == doubtful
    assert all(certain_tokens(frame, "LEFT", 20))
    assert any(certain[token] for name in STATUSES for token in groups_of(name))
