"""Tensors that decide where things go: in 16 bits, of another type or length, they are named."""

import pytest
import torch

from conftest import message
from leansense.beam.missing import hide, presence
from leansense.layers.bev_loss import bev_loss
from leansense.layers.bev_metrics import BevScores, count_by_logit, count_overlap
from leansense.layers.bev_pool import STEPS, Grid
from leansense.layers.lift_splat import (
    LiftSplat,
    Rig,
    get_geometry,
    make_frustum,
    project,
    surround_rig,
)
from leansense.layers.lift_splat_shoot import check_cameras, check_images
from leansense.simbev.model import DEMO, build, example

SHORT = [torch.float16, torch.bfloat16]
GRID = {"xbound": [-16, 16, 4.0], "ybound": [-16, 16, 4.0], "zbound": [-10, 10, 20.0]}
TINY = DEMO | {"final_dim": (32, 96), "camC": 8, "up_width": 16, "bev_width": 8}
TINY |= {"grid_conf": GRID | {"dbound": [4.0, 12.0, 4.0]}}


@pytest.mark.parametrize("name", Rig._fields)
@pytest.mark.parametrize("dtype", SHORT)
def test_a_camera_matrix_in_16_bits_is_named(name, dtype):
    rig = surround_rig()
    short = rig._replace(**{name: getattr(rig, name).to(dtype)})
    lift = LiftSplat().eval()
    logits, features = torch.randn(1, 6, 41, 8, 22), torch.randn(1, 6, 8, 8, 22)
    for call in (
        lambda: get_geometry(make_frustum(Grid()), *short),
        lambda: check_cameras(**short._asdict()),
        lambda: project(torch.randn(1, 5, 3), *short),
        lambda: lift(logits, features, *short),
        lambda: lift.train().plan(*short),
    ):
        text = message(ValueError, call)
        assert text.startswith(f"{name} is {dtype}") and "float32" in text


def test_16_bits_would_have_moved_points():
    """What is refused is worth refusing: the same rig, rounded, fills other cells."""
    lift, rig = LiftSplat(), surround_rig()
    for dtype in SHORT:
        rounded = lift.plan(*(m.to(dtype).float() for m in rig))
        assert (rounded.cells != lift.plan(*rig).cells).float().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_a_camera_matrix_without_numbers_is_named(dtype):
    rig = surround_rig()
    text = message(ValueError, get_geometry, make_frustum(Grid()), rig.rots.to(dtype), *rig[1:])
    assert text.startswith("rots is ")


def test_double_matrices_are_welcome():
    rig = surround_rig()
    wide = get_geometry(make_frustum(Grid()), *(m.double() for m in rig))
    torch.testing.assert_close(wide, get_geometry(make_frustum(Grid()), *rig))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, *SHORT])
def test_images_of_another_type_are_named(dtype):
    model = build(**TINY).eval()
    images, *cameras = example(model, 1, 2)
    text = message(ValueError, model, images.to(dtype), *cameras)
    assert text == f"imgs is {dtype}: give normalised images as torch.float32"


def test_autocast_and_half_networks_take_the_images_they_took():
    model = build(**TINY).eval()
    images, *cameras = example(model, 1, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(images.bfloat16(), *cameras).isfinite().all()
    flat = check_images(images.half(), 1, 2, (32, 96), model.camencode.half())
    assert flat.dtype == torch.float16


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_depths_behind_the_camera_are_named(low):
    assert "behind the camera" in message(ValueError, make_frustum, Grid(dbound=(low, 44.0, 1.0)))
    grid = TINY["grid_conf"] | {"dbound": [low, low + 8.0, 4.0]}
    assert "dbound=" in message(ValueError, build, **TINY | {"grid_conf": grid})


def test_a_grid_has_bounds():
    for name in ("xbound", "dbound"):
        text = message(ValueError, Grid, **{name: (4.0, 45.0, 1e-6)})
        assert f"{name}=" in text and str(STEPS) in text


MAPS = {
    "mask of a row": ((2, 1, 4, 5), (2, 1, 4, 5), (5,), "mask is (5,)"),
    "mask without classes": ((2, 1, 4, 5), (2, 1, 4, 5), (2, 4, 5), "mask is (2, 4, 5)"),
    "mask of one sample": ((2, 1, 4, 5), (2, 1, 4, 5), (1, 1, 4, 5), "mask is (1, 1, 4, 5)"),
    "mask turned": ((2, 1, 4, 5), (2, 1, 4, 5), (2, 1, 5, 4), "mask is (2, 1, 5, 4)"),
    "target of one class": ((2, 3, 4, 5), (2, 1, 4, 5), (2, 1, 4, 5), "target is (2, 1, 4, 5)"),
    "logits flat": ((4, 5), (4, 5), (4, 5), "logits is (4, 5)"),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_map_is_never_spread_over_another(kind):
    """PyTorch spreads a short mask over all cells, and the score is of something else."""
    *shapes, said = MAPS[kind]
    maps = [torch.ones(shape) for shape in shapes]
    scores = [BevScores(1).update] if said.startswith("mask") else []
    for call in (bev_loss, count_overlap, count_by_logit, *scores):
        assert said in message(ValueError, call, *maps)


def test_right_masks_count_as_ever():
    logits, target = torch.randn(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    for shape in ((2, 1, 4, 5), (2, 3, 4, 5)):
        assert torch.equal(
            count_overlap(logits, target, torch.ones(shape)), count_overlap(logits, target)
        )


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 2, 5), (1, 3, 5)])
def test_a_presence_of_another_length_is_named(shape):
    batch = {"gps": torch.zeros(2, 2, 2), "image": torch.zeros(2, 5, 3, 8, 8)}
    batch["present"] = torch.ones(shape, dtype=torch.bool)
    for call in (lambda: presence(batch), lambda: hide(batch, "lidar")):
        text = message(ValueError, call)
        assert text.startswith(f"present is torch.bool {shape}") and "(2, 3, 5)" in text
    batch["present"] = torch.ones(2, 3, 5)
    assert "present is torch.float32" in message(ValueError, presence, batch)
    batch["present"] = torch.ones(2, 3, 5, dtype=torch.bool)
    assert presence(batch) is batch["present"]
