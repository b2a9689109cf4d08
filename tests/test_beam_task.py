"""Loss, scores, schedule, names and the training task of the beam system."""

import pytest
import torch
from torch import nn

from conftest import message
from leansense.beam.features import make_target
from leansense.beam.task import (
    BeamScores,
    BeamTask,
    ce_loss,
    evaluate,
    focal_loss,
    name_rebuilding,
    name_run,
    predict,
    published_tags,
    rank_beams,
    recipe,
    score,
)
from leansense.core.loader import Indexed, loader
from leansense.core.schedule import Recipe, optimizer, rates, scheduler
from leansense.core.tags import write_tags
from leansense.core.train import fit

SOFT = torch.from_numpy(make_target(31))[None]


def peak(at: int | None) -> torch.Tensor:
    logits = torch.full((1, 64), -4.0 if at is not None else 0.0)
    if at is not None:
        logits[0, at] = 4.0
    return logits


# --- loss ---


@pytest.mark.parametrize(
    "at, target, wanted",
    [
        (None, SOFT, 0.1282485),
        (31, SOFT, 2.653552e-4),
        (40, SOFT, 0.06077197),
        (None, torch.tensor([31]), 0.1286113),
    ],
)
def test_focal_vectors(at, target, wanted):
    assert focal_loss(peak(at), target).item() == pytest.approx(wanted, rel=1e-5)


def test_losses_take_several_steps():
    """What the published focal loss cannot: one-hot targets of five steps."""
    torch.manual_seed(0)
    logits, beams = torch.randn(3, 5, 64, requires_grad=True), torch.randint(64, (3, 5))
    soft = torch.from_numpy(make_target(beams.numpy()))
    for loss in (focal_loss, ce_loss):
        for target in (beams, soft):
            whole = loss(logits, target)
            each = [loss(logits[:, k], target[:, k]) for k in range(5)]
            assert whole.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    focal_loss(logits, beams).backward()
    assert logits.grad.abs().min() > 0


def test_focal_is_its_formula():
    torch.manual_seed(1)
    x, t = torch.randn(2, 64, dtype=torch.double), torch.rand(2, 64, dtype=torch.double)
    p = x.sigmoid()
    cost = -(t * p.log() + (1 - t) * (1 - p).log())
    p_t, a_t = p * t + (1 - p) * (1 - t), 0.25 * t + 0.75 * (1 - t)
    assert focal_loss(x, t).item() == pytest.approx((cost * a_t * (1 - p_t) ** 2).mean().item())


# --- scores ---

VECTORS = [
    ([[10, 12, 9], [0, 1, 2], [40, 50, 63]], [10, 3, 58], [33.3333] * 3, [7 / 15, 8 / 15, 9 / 15]),
    ([[5, 6, 7], [20, 30, 25]], [5, 26], [50.0] * 3, [0.5, 0.6, 0.9]),
    (
        [[31, 32, 30], [0, 63, 10], [50, 44, 47], [12, 11, 13]],
        [31, 63, 47, 20],
        [25.0, 50.0, 75.0],
        [0.35, 0.6, 0.75],
    ),
]


def as_logits(ranked: list[list[int]]) -> torch.Tensor:
    logits = torch.zeros(len(ranked), 64)
    for row, beams in enumerate(ranked):
        logits[row, beams] = torch.tensor([3.0, 2.0, 1.0])
    return logits


@pytest.mark.parametrize("ranked, labels, accuracies, shares", VECTORS)
def test_score_vectors(ranked, labels, accuracies, shares):
    found = score(ranked, labels)
    assert [found[f"top{k}"] for k in (1, 2, 3)] == accuracies
    assert found["dba"] == pytest.approx(sum(shares) / 3, abs=1e-10)
    metric = BeamScores()
    metric.update(as_logits(ranked), torch.tensor(labels), torch.full((len(labels),), 32))
    whole = metric.compute()
    assert whole["dba"] == pytest.approx(found["dba"], abs=1e-12) == whole["dba_32"]
    assert "dba_31" not in whole


def test_published_log_aggregates_by_samples():
    shares = (0.9926241134751773, 0.9006369426751591, 0.8906555090655507, 0.8989456609894567)
    counts = (235, 471, 478, 411)
    metric = BeamScores()
    for k, (share, n) in enumerate(zip(shares, counts)):
        lost = round((1 - share) * 15 * n)  # whole distances, over three answers
        metric.sums[k, 0] = torch.tensor([lost - 2 * (lost // 3), lost // 3, lost // 3])
        metric.counts[k] = n
    metric._update_count = 1
    found = metric.compute()
    assert [found[f"dba_{s}"] for s in (31, 32, 33, 34)] == pytest.approx(shares, abs=1e-12)
    assert found["dba"] == pytest.approx(0.9107628004179729, abs=1e-12)


def test_scores_do_not_depend_on_batches():
    torch.manual_seed(2)
    logits, labels = torch.randn(40, 5, 64), torch.randint(64, (40, 5))
    scenario = torch.randint(31, 35, (40,))
    whole, parts = BeamScores(), BeamScores()
    whole.update(logits, labels, scenario)
    for k in range(0, 40, 7):
        parts.update(logits[k : k + 7], labels[k : k + 7], scenario[k : k + 7])
    assert whole.compute() == parts.compute()
    assert whole.counts.sum() == 200
    flat = score(rank_beams(logits).flatten(0, 1), labels.flatten())
    assert {name: whole.compute()[name] for name in flat} == flat


def test_scores_add_up_across_processes():
    """What DDP does: the states of all are summed, nothing but integers."""
    torch.manual_seed(3)
    logits, labels = torch.randn(9, 64), torch.randint(64, (9,))
    scenario = torch.tensor([31, 32, 33] * 3)
    whole, ranks = BeamScores(), [BeamScores(), BeamScores()]
    whole.update(logits, labels, scenario)
    for rank, metric in enumerate(ranks):
        metric.update(logits[rank::2], labels[rank::2], scenario[rank::2])
    joined = BeamScores()
    joined.update(logits[:0], labels[:0], scenario[:0])
    for name, reduce in joined._reductions.items():
        setattr(joined, name, reduce(torch.stack([getattr(m, name) for m in ranks])))
        assert not getattr(joined, name).is_floating_point()
    assert joined.compute() == whole.compute()


def test_equal_logits_and_foreign_scenarios():
    assert rank_beams(torch.zeros(1, 64)).tolist() == [[0, 1, 2]]
    metric = BeamScores()
    said = message(
        ValueError, metric.update, torch.zeros(1, 64), torch.tensor([1]), torch.tensor([7])
    )
    assert "scenario 7 is none of (31, 32, 33, 34)" in said


# --- schedule ---

PUBLISHED = {
    0: 2.5e-6, 1: 4.886e-6, 5: 5.125e-5, 9: 9.761e-5, 10: 1e-4, 11: 9.893e-5, 17: 5.635e-5,
    24: 3.565e-6, 25: 1.25e-4, 30: 6.375e-5, 34: 5.498e-6, 35: 1.25e-4, 45: 1.25e-4, 49: 8.268e-5,
}  # fmt: skip


@pytest.mark.parametrize("flag", [1, "1", "cyclic"])
def test_published_rates(flag):
    curve = [row[0] for row in rates(recipe(50, 1e-4, flag), [1e-4], 50)]
    for epoch, rate in PUBLISHED.items():
        assert curve[epoch] == pytest.approx(rate, rel=2e-4), epoch


def test_published_rates_of_another_peak():
    """The restart and the floor are numbers, whatever the rate given."""
    curve = [row[0] for row in rates(recipe(50, 5e-4), [5e-4], 50)]
    assert (curve[0], curve[10], curve[25]) == pytest.approx((2.5e-6, 5e-4, 1.25e-4))


def test_short_runs_go_through_all_phases():
    curve = [row[0] for row in rates(recipe(10), [1e-4], 10)]
    assert curve[0] == pytest.approx(2.5e-6) and curve[2] == pytest.approx(1e-4)
    assert curve[5] == pytest.approx(1.25e-4) == curve[7]
    kept = [row[0] for row in rates(recipe(15, shrink=False), [1e-4], 15)]
    assert kept[10] == pytest.approx(1e-4)


def test_a_group_below_the_floor_is_refused():
    """The published construction silently raised such a group."""
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr=rate) for rate in (1e-4, 1e-6)]
    said = message(
        ValueError, scheduler, optimizer(groups, recipe(50)), recipe(50), epochs=50, steps=0
    )
    assert "floor=2.5e-06 is above the peak learning rate 1e-06" in said


def test_plain_schedules_and_settings():
    for name in ("constant", "cosine", "onecycle", "warmup_cosine"):
        assert recipe(20, 1e-3, name).schedule == name
    assert recipe(5, scheduler=0).schedule == "constant"
    assert recipe(5).weight_decay == 0.01 and not recipe(5).no_decay_norm_bias
    assert "nearest is 'cosine'" in message(ValueError, recipe, 5, 1e-4, "cosin")
    assert "cyclic needs t_max" in message(ValueError, Recipe, schedule="cyclic", warmup=3)
    assert Recipe().schedule == "constant" and Recipe().gamma == 0.1


# --- task ---


class Tiny(nn.Module):
    def __init__(self, steps: int = 1):
        super().__init__()
        self.steps, self.layer = steps, nn.Linear(4, 64 * steps)

    def forward(self, batch):
        found = self.layer(batch["gps"].flatten(1))
        return found.view(-1, self.steps, 64) if self.steps > 1 else found


def items(n: int = 48, steps: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(n):
        gps = torch.rand(2, 2, generator=generator)
        beam = (gps[0, 0] * 60).long() + torch.arange(steps)
        beam = beam if steps > 1 else beam[0]
        found.append(
            {
                "id": str(k),
                "gps": gps,
                "beam": beam,
                "target": torch.from_numpy(make_target(beam.numpy())),
                "scenario": torch.tensor(31 + k % 4),
                "image": torch.full((2, 3, 4, 4), 9, dtype=torch.uint8),
                "present": torch.ones(3, 2, dtype=torch.bool),
            }
        )
    return found


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("loss, temp_coef", [("focal", 1), ("focal", 0), ("ce", 1), ("ce", 0)])
def test_task_trains(tmp_path, steps, loss, temp_coef):
    torch.manual_seed(0)
    task = BeamTask(Tiny(steps), recipe(3, 0.05, "constant"), loss, temp_coef, 0.3)
    data = Indexed(items(steps=steps))
    train, valid = (loader(data, 16, seed=0, shuffle=shuffle) for shuffle in (True, False))
    result = fit(task, train, valid, epochs=3, folder=tmp_path, seed=0, monitor="valid_dba",
                 mode="max", resume="", progress=False)  # fmt: skip
    history = result.history
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert result.best_score == max(history["valid_dba"])
    assert evaluate(task.model, valid)["dba"] == pytest.approx(result.best_score, abs=1e-12)
    assert predict(task.model, valid)["id"] == [str(k) for k in range(48)]
    tags = published_tags(history)
    assert {f"DBA_score_val/scenario{s}" for s in (31, 32, 33, 34, "_all")} <= tags.keys()
    assert {"curr_acc_val/scenario33beam2", "curr_acc_train/beam0", "curr_loss_val"} <= tags.keys()


def test_task_settings():
    assert "nearest is 'focal'" in message(ValueError, BeamTask, Tiny(), recipe(3), "focl")
    for name in ("modality_dropout", "frame_dropout"):
        said = message(ValueError, BeamTask, Tiny(), recipe(3), **{name: 1.0})
        assert f"{name}=1.0" in said


def test_validation_drops_nothing():
    task = BeamTask(Tiny(), recipe(3), modality_dropout=0.9)
    seen = []
    task.model.forward = lambda batch: seen.append(batch["present"].all()) or torch.zeros(4, 64)
    batch = {k: torch.stack([i[k] for i in items(4)]) for k in items(1)[0] if k != "id"}
    task.valid_step(batch)
    task.eval()
    task.step(batch)
    task.train()
    task.step(batch)
    assert [bool(value) for value in seen] == [True, True, False]


# --- names ---


def test_run_names():
    assert name_run("log/base") == "log/base"
    assert name_run("log/base", "lidar_radar", "zerolike") == "log/base-ms_lidar_radar-zerolike"
    assert name_run("log/base", "image", "randlike", 1) == "log/base-ms_image-randlike_val"
    assert name_rebuilding("log/m", "lidar radar", "image", "zerolike") == (
        "log/m-lidar_radar2image-zerolike"
    )


def test_tags_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = {"train_loss": [2.0, 1.0], "valid_dba": [0.1, 0.5], "valid_top2_34": [3.0, 4.0]}
    written = EventAccumulator(str(write_tags(tmp_path / "log", published_tags(history))))
    written.Reload()
    assert sorted(written.Tags()["scalars"]) == [
        "DBA_score_val/scenario_all", "curr_acc_val/scenario34beam1", "curr_loss_train",
    ]  # fmt: skip
    values = [event.value for event in written.Scalars("DBA_score_val/scenario_all")]
    assert values == pytest.approx([0.1, 0.5])
    assert set(published_tags({"train_trans": 1.0})) == {"curr_iter_loss_trans"}
