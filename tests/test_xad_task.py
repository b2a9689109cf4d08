"""Losses, scores, rates, schedule, published names and the training task of xad."""

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from conftest import message
from leansense.core.checkpoint import MARK, read_checkpoint
from leansense.core.loader import loader
from leansense.core.schedule import param_groups, rates
from leansense.core.tags import write_tags
from leansense.core.train import fit
from leansense.xad.model import BASELINE, DEMO, build, module_groups
from leansense.xad.task import (
    LOSSES,
    STAGED,
    TAGS,
    LabelScores,
    MapScores,
    XadTask,
    answers,
    blind_scores,
    class_ious,
    evaluate,
    inputs_of,
    label_loss,
    losses_of,
    map_loss,
    publish_files,
    published_tags,
    rate_groups,
    recipe,
    score_cells,
    write_pretrained,
)

# --- losses: the vectors of the published functions ---

P1 = torch.tensor([[[[2.0, 0]], [[0, 1]], [[0, 0]], [[0, -1]]]]), torch.tensor([[[0, 1]]])
P2 = torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 1], [2, 3]]])
P3 = (
    torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1).repeat(1, 1, 1, 3),
    torch.tensor([[[0, 2, 2]]]),
)


@pytest.mark.parametrize(
    "given, wanted", [(P1, 0.600544), (P2, 1.386294), (P3, 1.622008)], ids=["P1", "P2", "P3"]
)
def test_map_loss(given, wanted):
    assert map_loss(*given, LOSSES["published"].cells).item() == pytest.approx(wanted, abs=1e-6)


def labelled(target, action, description):
    return {
        "bev": target,
        "action": torch.tensor(action, dtype=torch.float32),
        "description": torch.tensor(description, dtype=torch.float32),
    }


S1 = (
    (P1[0], torch.tensor([[1.0, -1, 0, 2]]), torch.tensor([[0.5, -0.5, 1, -1, 0, 0, 2, -2]])),
    labelled(P1[1], [[1, 0, 1, 0]], [[1, 0, 0, 1, 1, 0, 1, 0]]),
)
S2 = (
    (P2[0], torch.zeros(1, 4), torch.zeros(1, 8)),
    labelled(P2[1], [[1] * 4], [[0] * 8]),
)
S3 = (
    (
        torch.zeros(2, 4, 2, 2),
        torch.tensor([[10.0, -10, 10, -10], [0, 0, 0, 0]]),
        torch.tensor([[3.0, -3] * 4, [0.0] * 8]),
    ),
    labelled(
        torch.tensor([[[0, 1], [2, 3]], [[0, 0], [0, 0]]]),
        [[1, 0, 1, 0], [1, 1, 0, 0]],
        [[1, 0] * 4, [1] * 8],
    ),
)
TOTALS = [
    (S1, "published", 6.797685, 3.994987, 2.202154),
    (S1, "head", 2.307335, 1.868059, 1.545523),
    (S2, "published", 5.891751, None, None),
    (S2, "head", 3.465736, 3.465736, 0.693147),
    (S3, "published", 3.699848, None, None),
    (S3, "head", 2.450343, 1.039789, 1.088308),
]


@pytest.mark.parametrize("given, form, total, action, description", TOTALS)
def test_losses(given, form, total, action, description):
    found = {k: v.item() for k, v in losses_of(LOSSES[form], *given).items()}
    assert found["loss"] == pytest.approx(total, abs=2e-6)
    for name, wanted in (("action_loss", action), ("desc_loss", description)):
        assert wanted is None or found[name] == pytest.approx(wanted, abs=2e-6)


def test_the_stage_that_learns_the_map_alone():
    """Unweighted or weighted; labels are in neither, and cells of 255 count in none."""
    for form, weights in (("pretrain", [1.0] * 4), ("pretrain_weighted", [1.0, 10, 5, 10])):
        found = losses_of(LOSSES[form], S1[0][:1], S1[1])
        plain = nn.functional.cross_entropy(*P1, torch.tensor(weights))
        assert set(found) == {"loss", "bev_loss"} and found["loss"] == found["bev_loss"] == plain
    target = P2[1].clone()
    target[0, 1, 1] = 255
    logits = torch.randn(1, 4, 2, 2)
    whole = nn.functional.cross_entropy(
        logits.flatten(2)[:, :, :3], target.flatten(1)[:, :3], torch.tensor([1.0, 10, 5, 10])
    )
    assert map_loss(logits, target, (1, 10, 5, 10)).item() == pytest.approx(whole.item())


def test_what_the_weights_of_labels_weigh():
    """`weight` weighs both answers to a label, `pos_weight` only a label that is set."""
    logits, unset = torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2)
    for positive, ratio in ((False, 5.0), (True, 1.0)):
        rare = label_loss(logits, unset, (5.0, 5.0), positive)
        assert rare.item() == pytest.approx(ratio * label_loss(logits, unset, (1.0, 1.0)).item())


# --- the map's scores ---


def cells(truth, said, classes=4):
    scores = MapScores(classes)
    logits = nn.functional.one_hot(torch.tensor([[said]]), classes).movedim(-1, 1).float()
    scores.update(logits, torch.tensor([[truth]]))
    return scores


def test_miou_vectors():
    found = cells([0, 0, 0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2, 2, 0])
    assert class_ious(found.cells).tolist() == pytest.approx([0.5, 1 / 3, 2 / 3, 0])
    assert found.compute() == pytest.approx({"miou": 0.375, "acc": 0.625})
    assert cells(list(range(4)), list(range(4))).compute() == {"miou": 1.0, "acc": 1.0}


def test_miou_survives_a_class_that_is_absent():
    """The published mean is NaN here, and no later model is ever better than that."""
    found = cells([0, 0, 1, 1], [0, 1, 1, 1])
    assert class_ious(found.cells).isnan().tolist() == [False, False, True, True]
    assert found.compute()["miou"] == pytest.approx((0.5 + 2 / 3) / 2)
    missed = cells([0, 0, 1, 1], [0, 1, 1, 2])  # answered, though it never occurs: a fault
    assert missed.compute()["miou"] == pytest.approx((0.5 + 1 / 3 + 0) / 3)


def test_ignored_cells_and_no_cells():
    assert cells([0, 255, 1], [0, 1, 1]).compute() == {"miou": 1.0, "acc": 1.0}
    assert "no cell of the map counts" in message(ValueError, cells([255], [0]).compute)
    bad = torch.full((1, 4, 1, 1), float("nan"))
    target = torch.zeros(1, 1, 1, dtype=torch.long)
    assert "NaN" in message(ValueError, MapScores().update, bad, target)


def test_maps_are_scored_alike_however_they_are_dealt():
    """In one batch, one by one, and by two processes whose counts are added, as DDP does."""
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4, 5, 5), torch.randint(4, (6, 5, 5))
    whole, single, halves = MapScores(), MapScores(), [MapScores(), MapScores()]
    whole.update(logits, target)
    for k in range(6):
        single.update(logits[k : k + 1], target[k : k + 1])
        halves[k % 2].update(logits[k : k + 1], target[k : k + 1])
    assert whole.compute() == single.compute()
    assert score_cells(sum(half.cells for half in halves)) == whole.compute()
    summed = whole._reductions["cells"](torch.stack([half.cells for half in halves]))
    assert torch.equal(summed, whole.cells)


# --- four F1 ---

CASES = {
    "mixed": (
        [[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1]],
        [[1, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1]],
        [1, 2 / 3, 1, 2 / 3],
        (0.833333, 0.833333, 0.833333, 0.822222),
    ),
    "one label": ([[1, 0, 0, 0]] * 2, [[1, 0, 0, 0]] * 2, [1, 0, 0, 0], (0.25, 1.0, 1.0, 1.0)),
    "eight": (
        [[1, 0, 0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 1, 0, 0, 1]],
        [[1, 0, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 0, 0, 0]],
        [2 / 3, 1, 0, 0, 1, 0, 1, 2 / 3],
        (0.541667, 0.805668, 0.769231, 0.761905),
    ),
    "never yes": (
        [[1, 0, 0, 0], [0, 1, 0, 0]],
        [[0, 0, 0, 0]] * 2,
        [0, 0, 0, 0],
        (0, 0.428571, 0, 0),
    ),
}
NAMES = ("f1", "f1_overall", "f1_micro", "f1_samples")


def labels(truth, said, **how):
    scores = LabelScores(len(truth[0]), **how)
    scores.update(torch.tensor(said) * 8.0 - 4.0, torch.tensor(truth))
    return scores


@pytest.mark.parametrize("case", CASES)
def test_f1_vectors(case):
    truth, said, each, wanted = CASES[case]
    found = labels(truth, said)
    assert found.per_label().tolist() == pytest.approx(each, abs=1e-4)
    assert found.compute() == pytest.approx(dict(zip(NAMES, wanted)), abs=1e-6)
    assert found.support() == torch.tensor(truth).sum(0).tolist()


def test_f1_is_that_of_scikit_learn():
    torch.manual_seed(1)
    truth, said = torch.randint(2, (40, 8)), torch.randint(2, (40, 8))
    found, how = labels(truth.tolist(), said.tolist()).compute(), {"zero_division": 0}
    for name, average in (("f1", "macro"), ("f1_micro", "micro"), ("f1_samples", "samples")):
        assert found[name] == pytest.approx(f1_score(truth, said, average=average, **how))
    flat = f1_score(truth.flatten(), said.flatten(), average="macro", **how)
    assert found["f1_overall"] == pytest.approx(flat)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_label_that_occurs_nowhere_is_zero_or_left_out():
    truth, said = CASES["one label"][:2]
    assert labels(truth, said).compute()["f1"] == 0.25
    assert labels(truth, said, empty="skip").compute()["f1"] == 1.0
    assert "zero" in message(ValueError, LabelScores, 4, empty="zeros")
    assert "no frame has labels" in message(ValueError, LabelScores(4).compute)


def test_logits_that_happen_to_lie_between_0_and_1_are_no_probabilities():
    scores = LabelScores(2, "action")
    scores.update(torch.tensor([[0.2, 0.3]]), torch.tensor([[1, 1]]))
    assert scores.compute()["action_f1"] == 1.0


def test_labels_are_scored_alike_however_they_are_dealt():
    torch.manual_seed(2)
    logits, truth = torch.randn(10, 4), torch.randint(2, (10, 4))
    whole, parts = LabelScores(4), LabelScores(4)
    whole.update(logits, truth)
    for one, other in zip(logits.split(3), truth.split(3)):
        parts.update(one, other)
    assert whole.compute() == pytest.approx(parts.compute())


# --- rates and schedule ---


class Head(nn.Module):
    """Depth and features, side by side."""

    def __init__(self):
        super().__init__()
        self.depth_net, self.feat_proj = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, found):
        return torch.cat([self.depth_net(found), self.feat_proj(found)], 1).mean((2, 3))


class Camera(nn.Module):
    """What a camera sees, in the parts that the network's own cameras have."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = Head()

    def forward(self, images):
        return self.head(self.trunk(images))


class Encoder(nn.Module):
    """From eight numbers to a small map."""

    def __init__(self, cells):
        super().__init__()
        self.refiner, self.seg_head = nn.Linear(8, 8), nn.Linear(8, 4 * cells)
        self.side = int(cells**0.5)

    def forward(self, seen):
        return self.seg_head(self.refiner(seen)).unflatten(1, (4, self.side, self.side))


class Toy(nn.Module):
    """A network with three answers, on pictures of four pixels; its parts are named as ours."""

    def __init__(self, cells: int = 4, pretrain: bool = False):
        super().__init__()
        self.camera, self.bev_encoder = Camera(), Encoder(cells)
        self.text = None
        if not pretrain:
            self.text = nn.Linear(8, 12)

    def forward(self, imgs, *cameras):
        seen = self.camera(imgs.flatten(0, 1)).unflatten(0, imgs.shape[:2]).mean(1)
        if self.text is None:
            return self.bev_encoder(seen), None, None
        logits = self.text(seen)
        return self.bev_encoder(seen), logits[:, :4], logits[:, 4:]


def test_rates_hold_every_parameter_exactly_once():
    toy = Toy()
    parts = module_groups(toy)
    groups = param_groups(toy, rate_groups(parts, 2e-4), lr=2e-4, weight_decay=1e-4)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in toy.parameters())
    found = {group["group"]: group["lr"] for group in groups}
    assert found == pytest.approx({**dict.fromkeys(parts, 2e-4), "backbone": 2e-5})
    less = {name: part for name, part in parts.items() if name != "heads"}
    with pytest.raises(ValueError, match="in no group"):
        param_groups(toy, rate_groups(less, 2e-4))
    twice = parts | {"all": [toy]}
    with pytest.raises(ValueError, match="claimed by two groups"):
        param_groups(toy, rate_groups(twice, 2e-4))
    assert "backbone" in message(ValueError, rate_groups, parts, 1e-3, {"backbon": 0.1})
    assert "factor" in message(ValueError, rate_groups, parts, 1e-3, {"heads": -1.0})


@pytest.mark.parametrize(
    "settings",
    [BASELINE, {"text_head": "unified_v3"}, {"refiner": "none", "depth": "v1_c3"}],
    ids=["baseline", "unified", "plain"],
)
def test_the_real_networks_parts_hold_every_parameter_once(settings):
    """Refiners and camera transformers both are transformers: names would mix them up."""
    small = {**DEMO, "backbone": "vov39", **settings}
    small |= {"backbone": "effb0"} if settings is BASELINE else {}
    model = build(**small)
    task = XadTask(model, recipe(4))
    groups = param_groups(task, task.groups(), lr=2e-4, weight_decay=1e-4)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates_of = {group["group"]: group["lr"] for group in groups}
    assert rates_of.pop("backbone") == pytest.approx(2e-5)
    assert set(rates_of.values()) == {2e-4}


def test_the_floor_is_absolute_and_no_step_is_lost():
    trunk, rest = zip(*rates(recipe(10), [2e-5, 2e-4], 80, 800))
    assert trunk[0] == pytest.approx(2e-5 / 50) and trunk[49] == pytest.approx(2e-5)
    assert trunk[50] == pytest.approx(2e-5) and rest[425] == pytest.approx((2e-4 + 1e-6) / 2)
    assert 1e-6 <= trunk[-1] < 1.001e-6 and 1e-6 <= rest[-1] < 1.01e-6


@pytest.mark.parametrize(
    "schedule", ["constant", "cosine", "step", "plateau", "onecycle", "warmup_cosine"]
)
def test_every_schedule_can_be_asked_for(schedule):
    made = recipe(4, lr=1e-3, schedule=schedule, warmup_epochs=1)
    found = rates(made, [1e-3, 1e-4], 8, 32)
    assert len(found) in (8, 32) and all(
        0 < rate <= 1e-3 + 1e-12 for pair in found for rate in pair
    )


# --- the task ---


class Scenes:
    """Frames whose colour decides everything."""

    def __init__(self, size, first):
        self.size, self.first = size, first

    def __len__(self):
        return self.size

    def label(self, index):
        kind = (self.first + index) % 4
        action = torch.tensor([kind == 0, kind == 1, kind > 1, kind == 3]).float()
        return {
            "bev": torch.full((2, 2), kind),
            "action": action,
            "description": torch.cat([action, 1 - action]),
        }

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        kind = (self.first + index) % 4
        images = torch.zeros(6, 3, 2, 2, dtype=torch.uint8)
        images[:, :2] = torch.tensor([kind % 2, kind // 2], dtype=torch.uint8).view(2, 1, 1) * 255
        eye = torch.eye(3).repeat(6, 1, 1)
        rig = {"rots": eye, "intrins": eye, "post_rots": eye}
        rig |= {"trans": torch.zeros(6, 3), "post_trans": torch.zeros(6, 3)}
        return {"id": f"frame{index}", "images": images, **rig, **self.label(index)}


def collate(items):
    return {
        name: [item[name] for item in items]
        if name == "id"
        else torch.stack([item[name] for item in items])
        for name in items[0]
    }


def batches(size=16, first=0, shuffle=True):
    return loader(Scenes(size, first), 4, seed=0, shuffle=shuffle, collate=collate)


def trained(folder, epochs=6, **how):
    torch.manual_seed(0)
    size = how.pop("size", 16)
    steps = how.pop("recipe", recipe(size // 4, lr=0.05, warmup_epochs=1))
    names = ("loss", "factors", "val_every", "cudnn_benchmark")
    task = XadTask(
        how.pop("model", None) or Toy(), steps, **{k: how.pop(k) for k in names if k in how}
    )
    settings = {"monitor": "valid_miou", "patience": 0, "progress": False, "device": "cpu"}
    result = fit(
        task,
        batches(size),
        batches(8, 1, False),
        epochs=epochs,
        folder=folder,
        seed=0,
        **settings | how,
    )
    return task, result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xad")
    task, result = trained(folder, 20, size=64, factors={"backbone": 1.0}, save_every=10, clip=10.0)
    return folder, task, result


def test_it_learns_and_says_what_it_measures(run):
    folder, task, result = run
    history = result.history
    for part in ("train", "valid"):
        assert {f"{part}_{n}" for n in ("loss", "bev_loss", "action_loss", "desc_loss")} <= set(
            history
        )
    assert history["valid_miou"][-1] == 1.0 and history["valid_action_f1"][-1] == 1.0
    assert {f"valid_{s}_{n}" for s in ("action", "desc") for n in NAMES} <= set(history)
    assert {"lr_backbone", "lr_heads"} <= set(history) and history["valid_epoch"][-1] == 20
    found = evaluate(task.model, batches(8, 1, False))
    assert found["miou"] == result.best_score and found["iou_vehicle"] == 1.0
    assert found["action_support"] == [2, 2, 4, 2] and len(found["desc_f1_by_label"]) == 8
    loss = history["valid_loss"][result.best_epoch]
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_validation_every_few_epochs_the_first_and_the_last(tmp_path):
    _, result = trained(tmp_path, 8, val_every=5, loss="head")
    assert result.history["valid_epoch"] == [1, 1, 1, 1, 5, 5, 5, 8]
    same = result.history["valid_miou"]
    assert same[0] == same[3] and same[4] == same[6] and result.best_epoch in (0, 4, 7)
    assert "val_every=0" in message(ValueError, XadTask, Toy(), recipe(4), val_every=0)


def test_resuming_between_validations_is_an_undisturbed_run(tmp_path):
    """Stopped after epoch 2 of 7 and gone on with: the same history, number by number."""
    _, whole = trained(tmp_path / "whole", 7, val_every=3)

    class Stop(Exception):
        """The power goes off."""

    task, seen = XadTask.on_train_epoch_start, []

    def cut(self):
        task(self)
        if self.current_epoch == 2 and not seen:
            seen.append(1)
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XadTask, "on_train_epoch_start", cut)
        with pytest.raises(Stop):
            trained(tmp_path / "cut", 7, val_every=3)
        _, later = trained(tmp_path / "cut", 7, val_every=3, resume="auto")
    assert later.history == whole.history and later.best_epoch == whole.best_epoch


def test_checkpoints_hold_what_the_guide_reads(run):
    """Its snippet, as it is printed: weights, optimiser, schedule, epoch; no pickled object."""
    folder, task, result = run
    best, tenth, _ = publish_files(folder)
    assert (best.name, tenth.name) == ("best_model.pth", "checkpoint_epoch_10.pth")
    checkpoint = torch.load(tenth, weights_only=True)
    model = Toy()
    model.load_state_dict(checkpoint["model_state_dict"])
    rates_ = rate_groups(module_groups(model), 0.05, {"backbone": 1.0})
    groups = param_groups(model, rates_, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0] * len(groups))
    scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
    assert checkpoint["epoch"] == 9 and checkpoint["scaler_state_dict"] == {}
    assert checkpoint["best_miou"] == max(result.history["valid_miou"][:10])
    assert set(checkpoint["val_info"]) == {"iou", "action_f1", "desc_f1"}
    assert checkpoint["val_info"]["action_f1"] == result.history["valid_action_f1_overall"][9]
    for name, value in task.model.state_dict().items():
        assert torch.equal(torch.load(best, weights_only=True)["model_state_dict"][name], value)
    assert publish_files(folder, "V3")[0].name == "best_model_V3.pth"
    assert publish_files(folder, pretrain=True)[0].name == "best_pretrained.pth"


def test_the_same_tensors_under_two_names_cost_nothing(run):
    kept = read_checkpoint(run[0] / "last.ckpt")
    pairs = [(kept["state_dict"][f"model.{n}"], w) for n, w in kept["model_state_dict"].items()]
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs) and MARK in kept


def test_a_first_stage_and_what_goes_on_from_it(tmp_path):
    """The map alone is learnt; its parts go on, from our file and from the published entries."""
    task, result = trained(tmp_path / "first", 2, loss="pretrain", model=Toy(pretrain=True))
    assert "train_action_loss" not in result.history and "valid_action_f1" not in result.history
    learnt = task.model.state_dict()
    file = write_pretrained(result.best_path, tmp_path / "best_pretrained.pth", "v1")
    held = torch.load(file, weights_only=True)
    assert held["lss_version"] == "v1" and held["miou"] == max(result.history["valid_miou"])
    model = Toy()
    modules = (model.camera.trunk, model.camera.head.depth_net, model.camera, model.bev_encoder)
    for entry, module in zip(STAGED, modules):
        module.load_state_dict(held[entry], strict=entry != "cam_encode_state_dict")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in learnt.items())
    still = recipe(4, lr=1e-9, schedule="constant")
    later, _ = trained(tmp_path / "second", 1, start=result.best_path, recipe=still)
    for name, value in learnt.items():
        if "trunk.1" not in name:  # batch norm counts what it sees
            assert torch.allclose(later.model.state_dict()[name], value, atol=1e-6)


def test_labels_of_a_network_without_text_head():
    task = XadTask(Toy(pretrain=True), recipe(4))
    assert "pretrain" in message(ValueError, task.step, collate([Scenes(1, 1)[0]]))


def test_pictures_of_bytes_are_normalised_and_others_left():
    batch = collate([Scenes(1, 1)[0]])
    bytes_, floats = (
        inputs_of(batch)[0],
        inputs_of(batch | {"images": torch.ones(1, 6, 3, 2, 2)})[0],
    )
    assert bytes_[0, 0, 0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229)
    assert torch.equal(floats, torch.ones(1, 6, 3, 2, 2)) and batch["images"].dtype == torch.uint8


def test_answers_leave_the_model_as_it_was(run):
    model = run[1].model.train()
    for batch, said in answers(model, batches(4, 0, False)):
        assert not model.training and len(said) == 3 and len(batch["id"]) == 4
    assert model.training


def test_who_sees_nothing():
    """The most frequent answer of training; a class of every cell of one frame in four."""
    found = blind_scores(Scenes(5, 0), Scenes(4, 0))
    assert found["miou"] == pytest.approx(1 / 16) and found["action_f1"] == 0.0
    assert found["desc_f1"] == pytest.approx((2 * 6 / 7 + 2 / 3 + 6 / 7) / 8, abs=0.2)


def test_published_tags(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run[2].history
    board = EventAccumulator(str(write_tags(tmp_path, published_tags(history), first=1)))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(TAGS)
    events = board.Scalars("val/bev_miou")
    assert [event.value for event in events] == pytest.approx(history["valid_miou"])
    assert [event.step for event in events] == list(range(1, len(events) + 1))


def test_unknown_losses_are_refused():
    assert "published" in message(ValueError, XadTask, Toy(), recipe(4), loss="publshed")
    assert "head" in message(ValueError, evaluate, Toy(), [], loss="heads")
