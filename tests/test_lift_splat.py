"""Geometry of the lift: golden numbers, the published formula, real image operations, conventions,
types, tracing.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leansense.layers.bev_pool import PoolPlan, bev_pool
from leansense.layers.lift_splat import (
    Frustum,
    Grid,
    LiftSplat,
    Rig,
    augmentation_matrix,
    camera_matrix,
    frustum_points,
    get_geometry,
    inverse3,
    looking_along,
    make_frustum,
    project,
    surround_rig,
)

SMALL = Grid((-8, 8, 1), (-8, 8, 1), (-2, 2, 1), (1, 7, 1))


def random_rig(batch=2, cameras=3, seed=0) -> Rig:
    """Cameras turned every way, with skewed K and full image augmentation."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return float(low + (high - low) * torch.rand((), generator=draw))

    rots = torch.linalg.qr(torch.randn(batch, cameras, 3, 3, generator=draw)).Q
    trans = 2 * torch.randn(batch, cameras, 3, generator=draw)
    intrins = torch.eye(3).repeat(batch, cameras, 1, 1)
    post = [
        augmentation_matrix(
            (uniform(0.2, 0.4), uniform(0.2, 0.4)),
            (uniform(-9, 9), uniform(-9, 9), 60, 40),
            uniform(0, 1) < 0.5,
            uniform(-20, 20),
        )
        for _ in range(batch * cameras)
    ]
    for b in range(batch):
        for n in range(cameras):
            intrins[b, n, :2] = torch.tensor(
                [
                    [uniform(90, 120), uniform(-3, 3), uniform(60, 90)],
                    [0, uniform(90, 120), uniform(50, 70)],
                ]
            )

    def shape(x):
        return torch.stack(x).view(batch, cameras, *x[0].shape)

    return Rig(rots, trans, intrins, shape([r for r, _ in post]), shape([t for _, t in post]))


def published(frustum, rig):
    """The published order of operations, point by point, in double precision."""
    rots, trans, intrins, post_rots, post_trans = (m.double() for m in rig)
    points = frustum_points(frustum).double() - post_trans[:, :, None, None, None]
    points = torch.einsum("bnij,bndhwj->bndhwi", torch.linalg.inv(post_rots), points)
    points = torch.cat((points[..., :2] * points[..., 2:], points[..., 2:]), -1)
    return (
        torch.einsum("bnij,bndhwj->bndhwi", rots @ torch.linalg.inv(intrins), points)
        + trans[:, :, None, None, None]
    )


# ---- golden numbers


@pytest.mark.parametrize(
    "resize, crop, flip, rotate, matrix, shift",
    [
        (0.22, (0, 48, 352, 176), False, 0, [[0.22, 0], [0, 0.22]], [0, -48]),
        (
            0.2,
            (0, 40, 352, 168),
            True,
            5.4,
            [[-0.1991124, 0.0188217], [0.0188217, 0.1991124]],
            [341.43164, -56.10151],
        ),
        (0.73333, (0, 36, 352, 164), False, 0, [[0.73333, 0], [0, 0.73333]], [0, -36]),
        ((0.3, 0.25), (10, 20, 110, 70), False, 0, [[0.3, 0], [0, 0.25]], [-10, -20]),
    ],
)
def test_augmentation_matrices(resize, crop, flip, rotate, matrix, shift):
    post_rot, post_tran = augmentation_matrix(resize, crop, flip, rotate)
    torch.testing.assert_close(post_rot[:2, :2], torch.tensor(matrix), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        post_tran, torch.tensor([*map(float, shift), 0.0]), rtol=0, atol=1e-4
    )
    assert post_rot[2].tolist() == [0, 0, 1] and post_rot[:2, 2].tolist() == [0, 0]
    assert post_rot.dtype == post_tran.dtype == torch.float32


def test_geometry_of_simbev():
    frustum, rig = make_frustum(Grid(), frustum_sampling="lss"), surround_rig()
    assert abs(float(rig.intrins[0, 0, 0, 0]) - 953.4029) < 1e-3
    points = get_geometry(frustum, *rig)
    golden = {
        (1, 0, 0, 0): (4.6, 3.3564, 2.5726),
        (1, 40, 7, 21): (44.6, -36.7106, -14.3429),
        (0, 10, 3, 10): (7.9458, 12.2072, 1.3712),
        (4, 6, 4, 5): (-11.0, -4.4066, 0.5716),
    }
    for (camera, d, h, w), expected in golden.items():
        torch.testing.assert_close(
            points[0, camera, d, h, w], torch.tensor(expected), rtol=0, atol=1e-4
        )
    written_out = frustum_points(frustum)
    torch.testing.assert_close(written_out[0, 3, 10], torch.tensor([167.142853, 54.428570, 4.0]))
    assert written_out[40, 7, 21].tolist() == [351, 127, 44] and written_out.shape == (41, 8, 22, 3)


def test_rig_is_simbevs():
    """Its rotations as published quaternions (w, x, y, z)."""
    quaternions = [
        (0.6743797, -0.6743797, 0.2126311, -0.2126311),
        (0.5, -0.5, 0.5, -0.5),
        (0.2126311, -0.2126311, 0.6743797, -0.6743797),
        (0.6963642, -0.6963642, -0.1227878, 0.1227878),
        (0.5, -0.5, -0.5, 0.5),
        (0.1227878, -0.1227878, -0.6963642, 0.6963642),
    ]
    for R, (w, x, y, z) in zip(surround_rig().rots[0], quaternions):
        expected = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        torch.testing.assert_close(R, torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_known_point():
    """An ego point, its pixel, its depth, its cell.

    What two common mistakes would make of it is elsewhere.
    """
    point, rig = torch.tensor([[[10.0, 4.0, 0.8]]]), surround_rig(resize=1.0, crop=(0, 0))
    uv, depth = project(point, *rig)
    torch.testing.assert_close(uv[0, 1, 0], torch.tensor([394.30, 531.14]), rtol=0, atol=0.01)
    torch.testing.assert_close(depth[0, 1, 0], torch.tensor(9.4))
    back = get_geometry(
        Frustum(uv[0, 1, 0, :1], uv[0, 1, 0, 1:], depth[0, 1]), *(m[:, 1:2] for m in rig)
    )
    torch.testing.assert_close(back.view(3), point.view(3), rtol=0, atol=1e-4)
    assert PoolPlan.build(back, Grid()).cells.item() == 120 * 200 + 108
    camera_frame = PoolPlan.build(get_geometry(make_frustum(Grid()), rig.rots.mT, *rig[1:]), Grid())
    assert not torch.equal(camera_frame.cells, LiftSplat().plan(*rig).cells)


def test_share_of_points_kept():
    for sampling, binning, share in (("lss", "lss", 0.9587), ("lss", "floor", 0.9182)):
        plan = LiftSplat(frustum_sampling=sampling, binning=binning).plan(*surround_rig())
        assert abs(float((plan.inside < 0).float().mean()) - share) < 1e-4


# ---- the formula


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from(["lss", "cell_center"]),
)
def test_equals_published_formula_and_projects_back(seed, batch, cameras, sampling):
    rig = random_rig(batch, cameras, seed)
    frustum = make_frustum(SMALL, (40, 60), 8, sampling)
    points = get_geometry(frustum, *rig)
    assert points.shape == (batch, cameras, 6, 5, 8, 3) and points.dtype == torch.float32
    torch.testing.assert_close(points.double(), published(frustum, rig), rtol=1e-5, atol=1e-4)
    uv, depth = project(points.flatten(2, 4), *rig)
    written_out = frustum_points(frustum).flatten(0, 2)
    torch.testing.assert_close(uv, written_out[:, :2].expand_as(uv), rtol=1e-4, atol=2e-2)
    torch.testing.assert_close(depth, written_out[:, 2].expand_as(depth), rtol=1e-4, atol=1e-3)


def test_planes_are_contiguous():
    """x, y and z are three planes with the depth running fastest: what the plan reads without a
    copy.
    """
    points = get_geometry(make_frustum(Grid()), *surround_rig(2))
    assert points.movedim((-1, 2), (0, -1)).is_contiguous()


@pytest.mark.parametrize(
    "size, stride, expected",
    [((128, 352), 16, (8, 22)), ((112, 308), 16, (7, 20)), ((7, 9), 4, (2, 3))],
)
def test_feature_sizes(size, stride, expected):
    frustum = make_frustum(Grid(), size, stride)
    assert (len(frustum.v), len(frustum.u)) == expected
    assert frustum.u[0] == (stride - 1) / 2 and frustum.u.diff().eq(stride).all()
    assert frustum.d.tolist() == list(range(4, 45))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotate", [0.0, 5.4, -12.0])
def test_matrix_is_what_an_image_library_does(flip, rotate):
    """A bright blob goes through PIL's resize, crop, mirror, rotate.

    The matrix says where it is afterwards.
    """
    from PIL import Image

    u, v, resize, crop = 150, 60, 0.5, (20, 10, 120, 60)
    picture = np.zeros((160, 240), np.uint8)
    picture[v - 2 : v + 3, u - 2 : u + 3] = 255
    image = Image.fromarray(picture).resize((120, 80), Image.Resampling.BILINEAR).crop(crop)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = np.asarray(image.rotate(rotate, Image.Resampling.BILINEAR), float)
    y, x = np.mgrid[:50, :100]
    found = np.array([(x * image).sum(), (y * image).sum()]) / image.sum()
    post_rot, post_tran = augmentation_matrix(resize, crop, flip, rotate)
    expected = (post_rot[:2, :2] @ torch.tensor([float(u), float(v)]) + post_tran[:2]).numpy()
    assert (
        np.abs(found - expected).max() < 1.1
    )  # pixel centres are half a pixel off, and flipping counts from the edge


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inverse(dtype):
    m = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )
    torch.testing.assert_close(inverse3(m), torch.linalg.inv(m), rtol=1e-3, atol=1e-3)


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_moves_no_point(dtype):
    lift, rig = LiftSplat(), surround_rig()
    expected = lift.plan(*rig)
    with torch.autocast("cpu", dtype):
        assert torch.equal(lift.plan(*rig).cells, expected.cells)
        uv, depth = project(torch.randn(1, 5, 3), *rig)
        assert uv.dtype == depth.dtype == torch.float32
    converted = LiftSplat().to(dtype)
    assert converted.u.dtype == torch.float32 and torch.equal(
        converted.plan(*rig).cells, expected.cells
    )
    logits, features = torch.randn(1, 6, 41, 8, 22), torch.randn(1, 6, 8, 8, 22)
    exact = lift(logits, features, *rig)
    half = lift(logits.to(dtype), features.to(dtype), *rig)
    assert half.dtype == dtype and (half.float() - exact).abs().max() < 0.03 * exact.abs().max()


# ---- the module


def inputs(batch=2, cameras=3, channels=4, seed=0, size=(5, 8)):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, cameras, 6, *size, generator=draw)
    return (
        logits,
        torch.randn(batch, cameras, channels, *size, generator=draw),
        *random_rig(batch, cameras, seed),
    )


def make(**changes) -> LiftSplat:
    return LiftSplat(SMALL, (40, 60), 8, **changes)


@pytest.mark.parametrize("batch, cameras", [(1, 1), (2, 3), (3, 1), (1, 7), (0, 2)])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_any_number_of_samples_and_cameras(batch, cameras, merged, training):
    lift = make().train(training)
    logits, features, *rig = inputs(max(batch, 1), cameras)
    logits, features, *rig = (x[:batch] for x in (logits, features, *rig))
    plan = lift.plan(*rig)
    expected = bev_pool(logits.softmax(2), features, plan, "reference")
    given = (x.flatten(0, 1) if merged else x for x in (logits, features))
    out = lift(*given, *rig)
    torch.testing.assert_close(out, expected)
    assert out.shape == (batch, 4 * 4, 16, 16) and out.is_contiguous(
        memory_format=torch.channels_last
    )


def test_holds_nothing_that_a_checkpoint_would_see():
    lift = make()
    assert not lift.state_dict() and not list(lift.parameters()) and len(list(lift.buffers())) == 3
    lift.eval()(*inputs())
    for other in (copy.deepcopy(lift), pickle.loads(pickle.dumps(lift))):
        assert not other.memory.plans and other.memory.size == 4
        torch.testing.assert_close(other(*inputs()), lift(*inputs()))


def test_what_is_remembered(monkeypatch):
    made = []
    build = PoolPlan.build
    monkeypatch.setattr(
        PoolPlan, "build", staticmethod(lambda *a, **kw: made.append(1) or build(*a, **kw))
    )
    lift, x = make(remember=2).eval(), inputs()

    def count(*given, **kw):
        return (lift(*given, **kw), len(made))[1]

    assert count(*x) == 1 and count(*x) == 1 and count(*(t.clone() for t in x)) == 1
    changed = [t.clone() for t in x]
    changed[3] += torch.tensor([0, 0, 1e-6])  # a different rig, however little
    assert count(*changed) == 2 and count(*x) == 2
    x[3].add_(1)  # the same tensor with other numbers
    assert count(*x) == 3 and len(lift.memory.plans) == 2
    plan = lift.plan(*x[2:])
    assert count(*x, plan=plan) == 4 == len(made)
    lift.train()
    assert count(*x) == 5 and count(*x) == 6
    forgetful = make(remember=0).eval()
    forgetful(*x), forgetful(*x)
    assert len(made) == 8 and not forgetful.memory.plans


def test_remembered_in_validation_used_in_training():
    lift, x = make().eval(), inputs()
    with torch.inference_mode():
        lift(*x)
    x[0].requires_grad_()
    lift(*x).square().sum().backward()
    assert x[0].grad.isfinite().all() and x[0].grad.any()


def test_gradcheck():
    logits, features, *rig = inputs(1, 2, 2)
    plan = make().plan(*rig)
    small = [x[..., :2, :2].double().requires_grad_() for x in (logits, features)]
    cells = plan.cells.view(1, 2, 5, 8, 6).permute(0, 1, 4, 2, 3)[..., :2, :2]
    plan = PoolPlan.build(cells, SMALL)
    assert torch.autograd.gradcheck(lambda d, f: bev_pool(d.softmax(2), f, plan), small)


@pytest.mark.parametrize("backend", ["auto", "index_add"])
def test_compile_and_export_with_the_geometry(backend):
    """Matrices are inputs of the traced graph: no plan outside."""
    lift, x = make(backend=backend).eval(), inputs()
    expected = lift(*x)
    torch.testing.assert_close(
        torch.compile(lift, backend="aot_eager", fullgraph=True)(*x), expected
    )
    program = torch.export.export(lift, x)
    other = inputs(seed=5)
    torch.testing.assert_close(program.module()(*other), lift(*other))


def test_onnx_with_the_geometry(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    lift, x, path = make(backend="index_add").eval(), inputs(), tmp_path / "lift.onnx"
    names = ["logits", "features", *Rig._fields]
    torch.onnx.export(lift, x, path, dynamo=True, input_names=names, verbose=False)
    other = inputs(seed=5)
    (found,) = runtime.InferenceSession(path).run(
        None, {name: t.numpy() for name, t in zip(names, other)}
    )
    torch.testing.assert_close(torch.from_numpy(found), lift(*other), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    lift, x = make().eval(), inputs()
    on_gpu = lift.cuda()(*(t.cuda() for t in x))
    torch.testing.assert_close(on_gpu.cpu(), make().eval()(*x), rtol=1e-4, atol=1e-4)


# ---- errors


def geometry(**changes):
    rig = surround_rig()._replace(**changes)
    return get_geometry(make_frustum(Grid()), *rig)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda: geometry(trans=torch.zeros(1, 5, 3)),
            r"trans is \(1, 5, 3\); with rots .* it must be \(1, 6, 3\)",
        ),
        (lambda: geometry(rots=torch.zeros(6, 3, 3)), r"rots is \(6, 3, 3\)"),
        (lambda: geometry(intrins=torch.eye(4).expand(1, 6, 4, 4)), "intrins is"),
        (lambda: geometry(post_trans=torch.zeros(1, 6, 2)), "post_trans is"),
        (
            lambda: geometry(intrins=torch.zeros(1, 6, 3, 3)),
            "singular or not finite: check intrins and post_rots",
        ),
        (
            lambda: geometry(post_rots=torch.full((1, 6, 3, 3), float("nan"))),
            "singular or not finite",
        ),
        (lambda: make_frustum(Grid(), (0, 4)), r"input_size=\(0, 4\)"),
        (lambda: make_frustum(Grid(), (8, 8), 0), "downsample=0"),
        (lambda: make_frustum(Grid(), frustum_sampling="center"), "choose from cell_center, lss"),
        (lambda: augmentation_matrix(0, (0, 0, 1, 1)), "resize=0"),
        (lambda: augmentation_matrix(1, (5, 0, 5, 1)), "must be > 0"),
        (lambda: make(binning="round"), "binning='round' is unknown"),
        (
            lambda: make()(*inputs(size=(5, 7))),
            r"depth_logits is \(2, 3, 6, 5, 7\); \(40, 60\) pixels at stride 8",
        ),
        (lambda: make()(*inputs()[:1], *inputs(1)[1:]), "depth_logits is"),
        (
            lambda: make()(torch.zeros(2, 3, 6, 5, 8), torch.zeros(5, 8), *random_rig()),
            "features is",
        ),
    ],
)
def test_errors_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_a_level_camera_looks_where_it_should():
    for yaw in (0, 55, 180, -110):
        R = looking_along(yaw)
        ahead = torch.tensor([math.cos(math.radians(yaw)), math.sin(math.radians(yaw)), 0.0])
        assert torch.allclose(R[:, 2], ahead, atol=1e-6)
        assert (
            torch.allclose(R[:, 1], torch.tensor([0.0, 0, -1]))
            and abs(float(torch.linalg.det(R)) - 1) < 1e-6
        )
    assert camera_matrix(*surround_rig()[2:]).dtype == torch.float64
