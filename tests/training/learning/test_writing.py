import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from smoldriver_hf import CAMERAS
from training.learning.slots import length_of
from training.learning.writing import PictureCollator, ShownFrame, Targets, Writer, areas, as_long_as_words, measured

FEATURES = {str(index): torch.randn(16, 32, generator=torch.Generator().manual_seed(index)) for index in range(6)}


def thing(name, status=None, camera=CAMERAS[0], distance=5.0):
    return {"name": name, "camera": camera, "status": status, "distance": distance}


def contents(*things, unclear=()):
    return {"objects": list(things), "words": {CAMERAS[0]: ["rain"]}, "unclear": list(unclear)}


def frame(*things, unclear=(), images=2):
    shown = dict(zip(CAMERAS, FEATURES, strict=True))
    return ShownFrame("scene", dict(list(shown.items())[:images]), contents(*things, unclear=unclear))


def parts(count=8, **settings):
    model = tiny_model()
    everything = [contents(thing("car"))]
    targets = Targets(tiny_tokenizer(), model.get_input_embeddings().weight, everything, count)
    projector = model.model.multi_modal_projector
    writer = Writer(projector, targets, count, **{"first_token_weight": 2.0, "noise": 0.0, **settings})
    return writer, PictureCollator(FEATURES, CAMERAS, targets)


def test_a_token_has_its_target_whatever_the_budget():
    _, most = parts(8)
    shown = frame(thing("car", "moving"), thing("bus", "parked"), unclear=[("truck", CAMERAS[1])])
    batch = most([shown])
    assert batch["targets"].shape == (2, 8, 32) and batch["camera_ids"].tolist() == [0, 1]
    for count in (1, 2, 4):
        few = parts(count)[1]([shown])
        torch.testing.assert_close(few["targets"], batch["targets"][:, :count])
        assert torch.equal(few["certain"], batch["certain"][:, :count])
    lengths = batch["targets"].norm(dim=-1)
    assert lengths.flatten().tolist() == pytest.approx([most.targets.length] * 16, rel=1e-4)


def test_tokens_of_a_budget_are_the_first_of_a_larger_one():
    shown = [frame(thing("car"))]
    writer, collate = parts(8)
    few, few_collate = parts(2)
    assert torch.allclose(few(**few_collate(shown))["cosine"], writer(**collate(shown))["cosine"][:, :2], atol=1e-5)


def test_unclear_classes_teach_nothing():
    """Nothing depends on whether a thing of the class is told of; elsewhere, and where it is clear, much does."""
    writer, collate = parts()

    def gradients(*things, unclear):
        writer.zero_grad()
        writer(**collate([frame(*things, unclear=unclear)]))["loss"].backward()
        return torch.cat([weight.grad.flatten() for weight in writer.parameters() if weight.grad is not None])

    for name, status in (("truck", "moving"), ("pedestrian", "standing")):
        unclear = [(name, CAMERAS[0])]
        without = gradients(thing("bus", "moving"), unclear=unclear)
        assert torch.equal(without, gradients(thing("bus", "moving"), thing(name, status), unclear=unclear))
        assert without.any()
        elsewhere = gradients(thing("bus", "moving"), thing(name, status, CAMERAS[1]), unclear=unclear)
        assert not torch.equal(without, elsewhere)
        assert not torch.equal(
            gradients(thing("bus"), unclear=[]), gradients(thing("bus"), thing(name, status), unclear=[])
        )


def test_a_statements_own_logits_have_no_gradient_where_it_is_unclear():
    writer, collate = parts()
    writer(**collate([frame(thing("car"), unclear=[("truck", CAMERAS[0])], images=1)]))["loss"].backward()
    about_truck = torch.tensor([one.name == "truck" for one in collate.targets.statements])
    assert not writer.bias.grad[:, about_truck].any() and writer.bias.grad[:, ~about_truck].any()
    assert not writer.bias.grad[~writer.told_by].any()


def test_a_picture_of_which_all_is_unclear_has_no_loss():
    writer, collate = parts()
    names = {one.name for one in collate.targets.statements}
    out = writer(**collate([frame(unclear=[(name, CAMERAS[0]) for name in names], images=1)]))
    assert out["loss"].item() == 0


def test_the_first_token_counts_double():
    _, collate = parts()
    batch = collate([frame(thing("car", "moving"))])
    batch["clear"] = torch.zeros_like(batch["clear"])  # leaves what tokens should be
    each = []
    for token in range(8):
        certain = torch.zeros_like(batch["certain"])
        certain[:, token] = True
        each.append(parts()[0](**{**batch, "certain": certain})["loss"])
    double = parts()[0](**batch)["loss"]
    torch.testing.assert_close(double, (2 * each[0] + sum(each[1:])) / 9)
    torch.testing.assert_close(parts(first_token_weight=1.0)[0](**batch)["loss"], sum(each) / 8)


def test_perfect_tokens_lose_little():
    writer, collate = parts()
    batch = collate([frame(thing("car", "moving"), thing("pedestrian", "standing"))])
    usual = writer(**batch)
    writer.write = lambda features, camera_ids: batch["targets"]
    perfect = writer(**batch)
    torch.testing.assert_close(perfect["cosine"], torch.ones(2, 8))
    assert perfect["loss"] < usual["loss"]


def test_noise_is_for_training_only():
    writer, collate = parts(noise=0.5)
    batch = collate([frame(thing("car"))])
    writer.eval()
    assert torch.equal(writer(**batch)["cosine"], writer(**batch)["cosine"])
    writer.train()
    assert not torch.equal(writer(**batch)["cosine"], writer(**batch)["cosine"])


def test_visual_tokens_become_as_long_as_words():
    for connector in (torch.nn.Linear(32, 16, bias=False), tiny_model().model.multi_modal_projector):
        features = torch.stack(list(FEATURES.values()))

        def write(connector=connector, features=features):
            if isinstance(connector, torch.nn.Linear):
                return connector(features)
            return connector(features, torch.arange(6), 4, connector.grid)[0]

        embeddings = torch.randn(20, 16)
        before = write()
        as_long_as_words(connector, before, float(length_of(embeddings)))
        after = write()
        assert after.norm(dim=-1).mean().item() == pytest.approx(length_of(embeddings).item(), rel=1e-4)
        assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-5)  # nothing else changes


def test_figures_of_what_is_written():
    writer, collate = parts()
    things = [[thing("car", "moving")], [thing("car", "parked")], [], [thing("car", "moving")], [], [thing("bus")]]
    frames = [frame(*shown, images=1) for shown in things]
    figures = measured(writer, collate, frames, [1, 8], batch_size=4)
    assert figures == measured(writer, collate, frames, [1, 8], batch_size=6)
    assert figures["frames"] == 6 and len(figures["cosine"]) == 8
    assert set(figures["area_under_curve"]) == {"1", "8"}
    assert figures["area_under_curve"]["8"]["state"] is None  # two moving cars are too few
    assert 0 <= figures["area_under_curve"]["1"]["class"] <= 1
    doubtful = [frame(unclear=[("car", CAMERAS[0])], images=1)]
    assert measured(writer, collate, doubtful, [1], batch_size=4)["cosine"][0] is None


def test_areas_by_hand():
    scores = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    true = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 1, 0]]).bool()
    scores, true = scores.repeat(2, 1), true.repeat(2, 1)
    clear = torch.ones_like(true)
    clear[:3, 2] = False  # too few of the third are left
    found = areas(scores, true, clear, ["class", "class", "state"])
    assert found == {"class": 0.75, "state": None, "number": None}  # all pictures show the second
    clear[2::4, 0] = False  # the pictures that were taken for shown
    assert areas(scores, true, clear, ["class"] * 3)["class"] is None  # two of the others remain
