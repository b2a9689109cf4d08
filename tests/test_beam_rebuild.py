"""Rebuilding a missing sensor: stated counts and vectors, both forms, what moves, what stays."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from leansense.beam.missing import hide
from leansense.beam.model import build, count_instantiated, example
from leansense.beam.rebuild import (
    FREEZE,
    FeatureTrans,
    ProjectHead,
    Rebuilder,
    RebuildTask,
    answers,
    contrast_loss,
    distance_loss,
    distil_loss,
    over_pairs,
    trans_loss,
)
from leansense.beam.task import BeamTask
from leansense.core.loader import loader
from leansense.core.schedule import Recipe
from leansense.core.train import fit

TINY = dict(width=8, size=32, anchors=2, n_layer=1, image_depth=18, seq_len=2, dropout=0.0)


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return build(**TINY | settings)


def task_of(model=None, source="image", target="lidar radar", recipe=None, **settings):
    model = tiny() if model is None else model
    return RebuildTask(model, recipe or Recipe(lr=1e-3), source, target, **settings)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Frames(Dataset):
    def __init__(self, size=6):
        self.batch = example(tiny(), size)

    def __len__(self):
        return len(self.batch["id"])

    def __getitem__(self, key):
        return {name: value[key[1]] for name, value in self.batch.items()}


def loaders(size=6):
    data = Frames(size)
    return loader(data, 3, seed=0, shuffle=True), loader(data, 3, seed=0, shuffle=False)


# --- stated numbers


def test_stated_counts():
    assert count_instantiated(ProjectHead()) == 16_896
    assert count_instantiated(FeatureTrans()) == 41_792
    assert count_instantiated(FeatureTrans(sources=1)) == 33_600
    assert count_instantiated(FeatureTrans(sources=1, targets=2)) == 41_856
    for faithful in (True, False):
        assert count_instantiated(Rebuilder("lidar radar", "image", faithful=faithful)) == 92_480
    both = Rebuilder("image", "lidar radar", faithful=True)
    assert count_instantiated(both) == 3 * 16_896 + 41_856
    assert count_instantiated(Rebuilder("image", "radar_lidar")) == 3 * 16_896 + 2 * 33_600
    assert count_instantiated(Rebuilder("image", "radar")) == 2 * 16_896 + 33_600


def waves(batch):
    steps = torch.arange(batch * 30.0)
    return torch.sin(steps).reshape(5 * batch, 2, 3), torch.cos(steps).reshape(5 * batch, 2, 3)


@pytest.mark.parametrize(
    "batch, contrast, distance",
    [(1, 0.0, -5.4056249), (2, 6.0615664, -7.7608409), (3, 7.1747146, -9.4385510)],
)
def test_published_losses(batch, contrast, distance):
    a, b = waves(batch)
    assert contrast_loss(a, b, batch, "faithful").item() == pytest.approx(contrast, abs=2e-6)
    assert distance_loss(a, b, "faithful").item() == pytest.approx(distance, rel=1e-6)


def test_published_losses_of_equals():
    a, _ = waves(3)
    assert contrast_loss(a, a, 3, "faithful").item() == pytest.approx(0.1030361, abs=2e-6)
    assert distance_loss(a, a, "faithful").item() == 0.0
    assert trans_loss(a, a + 2, "faithful").item() == pytest.approx(4.0, rel=1e-5)


def test_bounded_losses_are_bounded():
    torch.manual_seed(0)
    for batch in (1, 2, 8):
        for scale in (1e-3, 1.0, 1e4):
            a, b = scale * torch.randn(2, 5 * batch, 4, 6)
            assert 0 <= distance_loss(a, b).item() <= 1
            assert 0 <= contrast_loss(a, b, batch).item() <= math.log(batch) + 2 / 0.1 + 1e-4
            assert trans_loss(torch.zeros_like(a), a).item() == pytest.approx(1.0)
            assert distance_loss(a, a).item() == pytest.approx(1.0, abs=1e-5)
            assert distance_loss(a, -a).item() == 0.0
    assert trans_loss(a, a).item() == 0.0 and contrast_loss(a, a, 8).item() < 0.1
    assert contrast_loss(a[:5], b[:5], 1).item() == 0.0
    more = distance_loss(a, b, "faithful").item(), distance_loss(a[:5], b[:5], "faithful").item()
    assert more[0] < 2 * more[1] < 0  # the published one grows with the batch


def test_contrast_of_bounded_form_has_no_negatives_of_its_own_sensor():
    torch.manual_seed(0)
    b = torch.randn(10, 4, 6)
    a = torch.ones(10, 4, 6)  # all samples of one sensor alike
    a[:] = torch.randn(1, 4, 6)
    by_hand = []
    va, vb = (F.normalize(v.sum(2).reshape(2, -1), dim=1) for v in (a, b))
    for i in range(2):
        row = [math.exp(float(va[i] @ vb[j]) / 0.1) for j in range(2)]
        column = [math.exp(float(va[j] @ vb[i]) / 0.1) for j in range(2)]
        by_hand += [-math.log(row[i] / sum(row)), -math.log(column[i] / sum(column))]
    assert contrast_loss(a, b, 2).item() == pytest.approx(sum(by_hand) / 4, rel=1e-4)


def test_mean_over_pairs_and_distillation():
    parts = {"image": torch.zeros(1), "lidar": torch.ones(1), "radar": torch.full((1,), 5.0)}
    mean = over_pairs(lambda a, b: (a - b).abs().sum(), parts)
    assert mean.item() == pytest.approx((1 + 5 + 4) / 3)
    logits = torch.randn(3, 5, 64)
    assert distil_loss(logits, logits).item() == pytest.approx(0.0, abs=1e-6)
    assert distil_loss(logits, logits.flip(0)).item() > 0


# --- one step


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize(
    "source, target",
    [
        ("lidar radar", "image"),
        ("image radar", "lidar"),
        ("image lidar", "radar"),
        ("image", "lidar radar"),
        ("radar", "image"),
    ],
)
def test_every_direction_trains(source, target, faithful):
    form = "faithful" if faithful else "bounded"
    task = task_of(None, source, target, faithful=faithful, form=form, alpha_distil=1.0).train()
    batch = example(task.model, 3)
    loss, terms = task.step(batch)
    scored = terms.pop("scores")
    assert scored[0].shape == (3, 64) and set(terms) == {
        "trans",
        "contrast",
        "distance",
        "fusion",
        "distil",
    }
    total = sum(task.alphas[name] * value for name, value in terms.items())
    assert loss.item() == pytest.approx(total.item())
    loss.backward()
    still = [n for n, p in task.rebuild.named_parameters() if p.grad is None]
    assert not still and all(p.grad is None for p in task.base.parameters())
    levels = [p for p in task.model.levels.parameters() if p.grad is not None and p.grad.any()]
    assert len(levels) == len(list(task.model.levels.parameters()))


def test_rebuilt_sensor_itself_is_not_needed():
    task = task_of().eval()
    batch = example(task.model, 2)
    without = {name: value for name, value in batch.items() if name not in ("lidar", "radar")}
    with torch.no_grad():
        assert torch.equal(task(batch), task(without))
        other = {**batch, "image": batch["image"].flip(0)}
        assert not torch.equal(task(batch), task(other))


def test_losses_without_weight_are_not_computed():
    task = task_of(alpha_trans=0.0, alpha_contrast=0.0, alpha_distance=0.0)
    assert set(task.step(example(task.model, 2))[1]) == {"fusion", "scores"}


def test_absent_frames_do_not_teach_the_guess():
    task = task_of(None, "image", "radar").eval()
    batch = hide(example(task.model, 2), "radar", frames=[0])
    junk = {**batch, "radar": batch["radar"].clone()}
    junk["radar"][:, 0] = 9
    with torch.no_grad():
        found = task.losses(batch, 1.0)[0]["trans"]
        assert torch.equal(found, task.losses(junk, 1.0)[0]["trans"])
        full = task.losses(example(task.model, 2), 1.0)[0]["trans"]
    assert not torch.equal(found, full)


def test_modes():
    task = task_of().train()
    norms = [m for m in task.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert task.model.training and task.rebuild.training and not task.base.training
    assert not any(m.training for m in norms)
    assert not any(m.training for m in task.base.modules())
    assert not any(p.requires_grad for p in task.base.parameters())
    moving = task_of(fixed_norms=False).train()
    assert all(m.training for m in moving.model.modules())
    task.eval()
    assert not task.rebuild.training
    assert task.train().rebuild.training  # validation in between leaves nothing behind


def test_share_of_rebuilt_maps():
    torch.manual_seed(1)
    task = task_of(rebuilt_share=0.0).eval()
    batch = example(task.model, 3)
    with torch.no_grad():
        guessed = task.rebuild(task.true_maps(batch))
        torch.testing.assert_close(task.replace(batch, guessed, 0.0), task.model(batch))
        torch.testing.assert_close(task.replace(batch, guessed, 1.0), task(batch))
        task.mix = "filled"
        filled = task.model(hide(batch, "lidar radar"))
        torch.testing.assert_close(task.replace(batch, guessed, 0.0), filled)
        half = task.replace(batch, guessed, 0.5)
        near = torch.stack([(half - filled).abs().amax(1), (half - task(batch)).abs().amax(1)])
        assert bool((near.amin(0) < 1e-4).all())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"source": "image", "target": "image"}, "none is in both"),
        ({"source": "", "target": "image"}, "each names a sensor"),
        ({"source": "lidar", "target": "imag"}, "nearest is 'image'"),
        ({"form": "unbounded"}, "form='unbounded'"),
        ({"mix": "zeros"}, "mix='zeros'"),
        ({"rebuilt_share": 1.5}, "rebuilt_share=1.5"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ValueError) as error:
        task_of(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_network_without_the_sensor_is_refused():
    with pytest.raises(ValueError, match="the network has no radar to rebuild from"):
        task_of(tiny(modalities="image lidar"))


# --- training


def test_guess_improves_on_fixed_data():
    task = task_of(None, "lidar radar", "image").train()
    batch, losses = example(task.model, 3), []
    optimiser = torch.optim.AdamW(task.rebuild.parameters(), lr=1e-2)
    for _ in range(15):
        loss, terms = task.step(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(terms["trans"].item())
    assert losses[-1] < 0.8 * losses[0] and all(map(math.isfinite, losses))


def test_frozen_parts_stay_and_rates_move(tmp_path):
    train, valid = loaders()
    recipe = Recipe(lr=1e-2, weight_decay=1e-4, schedule="cosine")
    task = task_of(recipe=recipe, lr_fusion=1e-4)
    base, model = state(task.base), state(task.model)
    encoders, heads = state(task.model.encoders), state(task.rebuild)
    settings = dict(seed=0, monitor="valid_loss", progress=False, tensorboard=False, patience=0)
    found = fit(
        task, train, valid, epochs=3, folder=tmp_path / "a", freeze=FREEZE["encoders"], **settings
    )
    assert same(task.base, base) and same(task.model.encoders, encoders)
    assert not same(task.model, model) and not same(task.rebuild, heads)
    for group, peak in (("rebuild", 1e-2), ("fusion", 1e-4)):
        rates = found.history[f"lr_{group}"]
        assert rates[0] == pytest.approx(peak) and rates[0] > rates[1] > rates[2] > 0
        assert rates[1] == pytest.approx(0.75 * peak)
    losses = ("trans", "contrast", "distance", "fusion")
    assert {f"{part}_{n}" for part in ("train", "valid") for n in losses} <= set(found.history)
    assert {"valid_dba", "valid_dba_31", "train_dba"} <= set(found.history)

    task = task_of(recipe=recipe, lr_fusion=1e-4)
    fit(task, train, valid, epochs=1, folder=tmp_path / "b", freeze=FREEZE["fusion"], **settings)
    assert same(task.model, model) and same(task.base, base) and not same(task.rebuild, heads)


def test_begins_with_the_networks_own_checkpoint(tmp_path):
    train, valid = loaders()
    settings = dict(seed=0, monitor="valid_loss", progress=False, tensorboard=False)
    first = BeamTask(tiny(seed=3), Recipe(lr=1e-3))
    start = fit(first, train, valid, epochs=1, folder=tmp_path / "base", **settings).best_path
    trained = state(first.model)
    task = task_of(tiny(seed=4))
    fit(
        task,
        train,
        valid,
        epochs=1,
        folder=tmp_path / "rebuild",
        start=start,
        freeze=FREEZE["fusion"],
        **settings,
    )
    assert same(task.base, trained) and same(task.model, trained)
    twin = task_of(tiny(seed=5))
    kept = copy.deepcopy(task.state_dict())
    kept |= {n: v + 1 for n, v in kept.items() if n.startswith("model.") and v.is_floating_point()}
    twin.load_state_dict(kept)  # one that has a base of its own keeps it
    assert same(twin.base, trained) and not same(twin.model, trained)


def test_answers_of_three_kinds():
    task = task_of()
    batch = example(task.model, 3)
    task.train()
    with torch.no_grad():
        task.model.join[-1].bias += 1
    found = answers(task, [batch, batch])
    assert task.training and task.rebuild.training and not task.base.training
    task.eval()
    with torch.no_grad():
        torch.testing.assert_close(found["base"][:3], task.base(batch))
        torch.testing.assert_close(found["full"][3:], found["base"][3:] + 1)
        torch.testing.assert_close(found["rebuilt"][3:], task(batch))
        torch.testing.assert_close(found["filled"][:3], task.base(hide(batch, "lidar radar")))
    assert torch.equal(found["beam"][:3], batch["beam"]) and len(found["scenario"]) == 6
