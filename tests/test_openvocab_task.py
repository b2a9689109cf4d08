"""Recipe, parameter groups and a training of openvocab on a few drawn pictures."""

import pytest
import torch

from conftest import message
from leansense.core.tags import write_tags
from leansense.core.train import fit
from leansense.openvocab import data
from leansense.openvocab.match import Costs
from leansense.openvocab.model import PRESETS, build
from leansense.openvocab.task import (
    Drawn,
    OpenVocabTask,
    build_detector,
    limit_validation,
    one_cycle,
    published_tags,
    recipe,
)
from leansense.openvocab.text import build_text

TINY = {
    "data": "standin", "standin": 40, "image_size": 64, "batch_size": 6, "max_phrases": 8,
    "preset": "demo", "dim": 16, "embed": 16, "text_encoder": "hash", "text_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def batches(own_data_root):
    return data.loaders(data.dataset(TINY), TINY)


def make_task(**more) -> OpenVocabTask:
    torch.manual_seed(0)
    return OpenVocabTask(build_detector(TINY), recipe(3e-3), Costs(weight_sim=1.0), **more)


def train(task, batches, folder, epochs=1, **more):
    given = {"monitor": "valid_recall1", "seed": 0, "progress": False} | more
    return fit(task, batches["train"], batches["valid"], epochs=epochs, folder=folder, **given)


def test_onecycle():
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    clock, found = one_cycle(made, 100), []
    for _ in range(100):
        found.append(made.param_groups[0]["lr"])
        made.step()
        clock.step()
    wanted = {0: 2.0e-5, 1: 3.447e-5, 5: 3.0168e-4, 9: 5e-4, 10: 4.9985e-4, 50: 2.8479e-4, 99: 2e-9}
    assert [found[k] for k in wanted] == pytest.approx(list(wanted.values()), rel=3e-4)


def test_cosine():
    from leansense.core.schedule import rates

    found = [row[0] for row in rates(recipe(1e-4, schedule="cosine"), [1e-4], 50)]
    assert (found[0], found[25]) == pytest.approx((1e-4, 5.05e-5)) and found[-1] > 1e-6


def test_groups_have_their_rates_and_decays():
    task = OpenVocabTask(
        build(
            "after", text=build_text("hash", dim=16), backbone="resnet10t", image_size=64, dim=32
        ),
        recipe(5e-4, 0.02),
        backbone_rate=0.1,
    )
    task.plan = (2, 10)
    groups = task.configure_optimizers()["optimizer"].param_groups
    peaks = {g["name"]: g["max_lr"] for g in groups}
    assert peaks["backbone"] == pytest.approx(5e-5) and peaks["heads"] == pytest.approx(5e-4)
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, value in task.model.named_parameters():
        bare = value.ndim <= 1 or name == "queries" or ".norm" in name
        assert decays[id(value)] == (0 if bare else 0.02), name
    assert len(decays) == sum(1 for p in task.parameters() if p.requires_grad)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_tensor_gets_a_gradient_on_the_first_step(batches, preset):
    """With a small trunk and narrow layers, so that it takes a second."""
    torch.manual_seed(0)
    text = build_text("tiny", captions=["a red ball"], dim=32, layers=1, vocabulary=300)
    model = build(preset, text=text, backbone="resnet10t", image_size=64, dim=32)
    task = OpenVocabTask(model, recipe())
    loss, parts = task.step(next(iter(batches["train"])))
    loss.backward()
    without = [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None]
    flat = [
        n for n, p in task.named_parameters()
        if p.grad is not None and not bool(p.grad.abs().sum() > 0)
    ]  # fmt: skip
    assert without == []
    assert not [name for name in flat if not name.startswith("model.backbone")]
    assert set(parts) == {"loss_cls", "loss_bbox", "loss_giou", "loss_sim", "unreachable"}


def test_a_training_learns_and_measures(batches, tmp_path):
    task = make_task(precision=True)
    result = train(task, batches, tmp_path, epochs=4)
    history = result.history
    assert history["train_loss"][-1] < history["train_loss"][0]
    for name in (
        "valid_recall1",
        "valid_upper",
        "valid_recall1_seen",
        "valid_map",
        "valid_loss_sim",
    ):
        assert len(history[name]) == 4, name
    assert not [name for name in history if "people" in name]
    assert history["lr_backbone"][1] == pytest.approx(0.1 * history["lr_heads"][1])
    best = max(history["valid_recall1"])
    assert result.best_score == best == history["valid_recall1"][result.best_epoch]


def test_the_same_seed_trains_the_same(batches, tmp_path):
    found = [train(make_task(), batches, tmp_path / str(k)).history for k in range(2)]
    assert found[0] == found[1]


def test_the_score_that_chooses_is_the_one_that_stops(batches, tmp_path):
    task = make_task()
    task.valid_scores = lambda: {"recall1": 0.5, "loss_other": 0.0}
    result = train(task, batches, tmp_path, epochs=9, patience=2)
    assert result.best_epoch == 0 and result.epochs_run == 3


def test_a_share_of_the_validation_part_is_drawn(batches):
    part = limit_validation(batches["valid"], 0.5, seed=1)
    names = [name for batch in part for name in batch["id"]]
    every = [name for batch in batches["valid"] for name in batch["id"]]
    assert len(names) == round(len(every) / 2) and set(names) < set(every)
    assert names == [n for batch in limit_validation(batches["valid"], 0.5, 1) for n in batch["id"]]
    assert isinstance(part.dataset, Drawn)
    assert limit_validation(batches["valid"], 1.0) is batches["valid"]
    assert "limit_val=0" in message(ValueError, limit_validation, batches["valid"], 0)


def test_published_tags(tmp_path):
    history = {"train_loss": [2.0, 1.0], "valid_loss_giou": [0.5, 0.4], "valid_map": [0.1, 0.2]}
    history |= {"lr_heads": [1e-3, 1e-4], "valid_recall1": [0.0, 0.1], "valid_map50": [0.2, 0.3]}
    tags = {"train/total_loss", "val/loss_giou", "val/mAP", "val/mAP_50", "lr"}
    assert set(published_tags(history)) == tags
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(write_tags(tmp_path / "log", published_tags(history))))
    board.Reload()
    assert set(board.Tags()["scalars"]) == tags
    assert [event.value for event in board.Scalars("val/mAP")] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: recipe(schedule="onecicle"), "onecycle"),
        (lambda: make_task(backbone_rate=0.0), "backbone_rate=0.0"),
        (lambda: build_detector(TINY | {"text_encoder": "tinny"}), "tiny"),
        (lambda: build_detector(TINY | {"preset": "aftr"}), "after"),
    ],
)
def test_bad_settings_are_one_line(call, said):
    assert said in message(ValueError, call)
