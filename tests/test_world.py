"""The synthetic world: what is painted, hit by the lidar and filled in the label is the same."""

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leansense.layers.conventions import quaternion_to_matrix
from leansense.layers.lift_splat import surround_rig
from leansense.world import scene as module
from leansense.world.bev import (
    CVT_GRID,
    LSS_GRID,
    SIMBEV_GRID,
    Grid,
    find_cells,
    rasterise,
    render_sample,
    resample_label,
)
from leansense.world.camera import (
    CAMERAS,
    OPTICAL,
    Rig,
    front_rig,
    look_along,
    nuscenes_rig,
    project,
    project_boxes,
    project_edges,
    render,
    resize_rig,
    simbev_rig,
    to_quaternion,
    unproject,
)
from leansense.world.lidar import Lidar, scan
from leansense.world.scene import (
    CLASSES,
    CONDITIONS,
    EGO_SIZE,
    SIMBEV_CLASSES,
    VEHICLES,
    Objects,
    Street,
    boxes,
    class_id,
    find_overlaps,
    join,
    make_scene,
    paint,
    still,
)

RIGS = {
    "simbev": simbev_rig(112, 240),
    "simbev-native": simbev_rig(),
    "nuscenes": nuscenes_rig(112, 240),
    "front": front_rig(120, 200),
    "tilted": front_rig(120, 200, 95.0, (0.0, 0.0, 3.0), 30.0, 25.0),
}


def within(**ranges: tuple[float, float]) -> dict[str, st.SearchStrategy[float]]:
    """Numbers to draw for each name, between its two bounds."""
    return {name: st.floats(*bounds) for name, bounds in ranges.items()}


def pixel_centres(rig: Rig) -> np.ndarray:
    u, v = np.meshgrid(np.arange(rig.width) + 0.5, np.arange(rig.height) + 0.5)
    return np.broadcast_to(np.stack([u, v], -1), (len(rig.names), rig.height, rig.width, 2))


def surface(snapshot, rig) -> tuple[np.ndarray, np.ndarray]:
    """Ego points and instance ids of all object pixels, by the true depth."""
    images, points, instances = render(snapshot, rig), [], []
    for n, name in enumerate(rig.names):
        row, column = np.nonzero(images.instance[n])
        pixel = np.stack([column + 0.5, row + 0.5], -1)
        points.append(
            unproject(pixel[None], images.depth[n, row, column][None], rig.select(name))[0]
        )
        instances.append(images.instance[n, row, column])
    return np.concatenate(points), np.concatenate(instances)


def local(points: np.ndarray, objects: Objects, row: np.ndarray) -> np.ndarray:
    """Points in the frames of their objects."""
    d, c, s = points - objects.centre[row], np.cos(objects.yaw[row]), np.sin(objects.yaw[row])
    return np.stack([c * d[:, 0] + s * d[:, 1], c * d[:, 1] - s * d[:, 0], d[:, 2]], -1)


def slab(start: np.ndarray, way: np.ndarray, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """The slow oracle: distance (in `way`) and row of the nearest box of rays, or inf, -1."""
    best, row = np.full(len(way), np.inf), np.full(len(way), -1)
    for n in range(len(objects)):
        c, s = math.cos(objects.yaw[n]), math.sin(objects.yaw[n])
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        o, d = turn @ (start - objects.centre[n]), way @ turn.T
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.stack([(side * objects.size[n] / 2 - o) / d for side in (-1, 1)])
        enter, leave = t.min(0).max(1), t.max(0).min(1)
        hit = (enter <= leave) & (enter > 0) & (enter < best)
        best[hit], row[hit] = enter[hit], n
    return best, row


# --- the scene ---


@pytest.mark.parametrize("ego", module.EGOS)
@pytest.mark.parametrize("seed", range(4))
def test_nobody_collides(ego, seed):
    scene = make_scene(seed, ego=ego)
    for t in np.arange(0.0, 16.01, 2.0):
        o = scene.snapshot(t).objects
        o = o[o.kind != class_id("rider")]
        pose = np.column_stack([o.centre[:, :2], o.yaw])
        assert (find_overlaps(pose[:, None], o.size[:, None], pose, o.size, 0.0).sum(1) == 1).all()
        assert not find_overlaps(np.zeros(3), np.array(EGO_SIZE), pose, o.size, 0.0).any()


def test_same_seed_same_bytes_another_seed_another_scene():
    one, two, other = make_scene(5), make_scene(5), make_scene(6)
    for field in fields(Objects):
        assert (
            getattr(one.objects, field.name).tobytes() == getattr(two.objects, field.name).tobytes()
        )
    assert one.street == two.street and one.street != other.street
    a, b = (render_sample(s, 1.5, RIGS["simbev"], LSS_GRID) for s in (one, two))
    assert (
        a.images.image.tobytes() == b.images.image.tobytes()
        and a.label.tobytes() == b.label.tobytes()
    )
    assert scan(a.snapshot).xyz.tobytes() == scan(b.snapshot).xyz.tobytes()


def test_global_random_state_is_neither_used_nor_moved():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = make_scene(2).objects.centre
    np.random.seed(2)
    assert np.array_equal(make_scene(2).objects.centre, first)
    np.random.seed(1)
    render_sample(make_scene(2), 0.0, RIGS["front"], LSS_GRID)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("seed", range(5))
def test_scenes_are_asymmetric(seed):
    """No flip of the label looks like the label: vehicles hardly overlap their mirror images."""
    label = rasterise(make_scene(seed).snapshot(4.0), LSS_GRID, VEHICLES).max(0).astype(bool)
    for flipped in (label[::-1], label[:, ::-1], label[::-1, ::-1], label.T):
        assert (label & flipped).sum() < 0.5 * (label | flipped).sum()


def test_no_vehicles_on_request_and_objects_beyond_the_grid():
    rolling = ("car", "truck", "bus", "motorcycle", "bicycle", "rider")
    for seed in range(4):
        empty = make_scene(seed, vehicles=False)
        assert len(empty.objects.select(*rolling)) == 0 and len(empty.objects) > 0
        assert rasterise(empty.snapshot(3.0), SIMBEV_GRID, rolling).sum() == 0
        assert abs(make_scene(seed).snapshot(0.0).objects.select(*VEHICLES).centre[:, 0]).max() > 72
    assert set(np.unique(make_scene(0, density=0.0).objects.kind)) <= {class_id("building")}


def test_every_class_occurs():
    seen = set()
    for seed in range(12):
        scene = make_scene(seed)
        seen |= {CLASSES[k] for k in np.unique(scene.objects.kind)}
        seen |= {
            name
            for name, channel in zip(
                SIMBEV_CLASSES[14], rasterise(scene.snapshot(0.0), SIMBEV_GRID, SIMBEV_CLASSES[14])
            )
            if channel.any()
        }
    assert seen >= set(SIMBEV_CLASSES[14])


def test_motion_is_the_integral_of_velocity():
    scene = make_scene(3, ego="turn")
    for t in (1.0, 5.0, 9.0):
        before, after = scene.tracks.poses(t - 1e-4), scene.tracks.poses(t + 1e-4)
        view = scene.snapshot(t)
        step = (after - before)[:, :2] / 2e-4
        yaw = view.pose[2]
        c, s = math.cos(yaw), math.sin(yaw)
        expected = np.stack([c * step[:, 0] + s * step[:, 1], c * step[:, 1] - s * step[:, 0]], -1)
        assert np.allclose(view.objects.velocity, expected, atol=1e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make_scene(0, condition="rain"), "condition='rain'"),
        (lambda: make_scene(0, ego="fly"), "ego='fly'"),
        (lambda: make_scene(0, density=-1), "density=-1"),
        (lambda: class_id("lorry"), "'lorry'"),
        (lambda: boxes("car", (1, 2), (0, 1, 1)), "size"),
        (lambda: boxes("car", (1, 2, 3, 4), (1, 1, 1)), "centre"),
        (lambda: simbev_rig().select("CAM_TOP"), "CAM_TOP"),
        (lambda: front_rig(fov=0), "fov=0"),
        (lambda: resize_rig(simbev_rig(), 0), "scale=0"),
        (
            lambda: Rig(("a",), np.zeros((1, 3)), np.ones((1, 3, 3)), np.eye(3)[None], 4, 4),
            "rotation",
        ),
        (
            lambda: Rig(("a",), np.zeros((2, 3)), np.eye(3)[None], np.eye(3)[None], 4, 4),
            "translation",
        ),
        (lambda: Grid(0, 4, 0.5, 1, 1), "rows=0"),
        (lambda: Grid(4, 4, 0.5, 2, 1), "row_sense=2"),
        (lambda: rasterise(still(boxes("car", (9, 0), (4, 2, 1))), LSS_GRID, ("van",)), "'van'"),
        (
            lambda: rasterise(
                still(boxes("car", (9, 0), (4, 2, 1))), LSS_GRID, ("car",), fill="half"
            ),
            "fill='half'",
        ),
        (lambda: resample_label(np.zeros((2, 9, 9)), LSS_GRID, CVT_GRID), "9"),
        (lambda: Lidar(rings=0), "rings=0"),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


# --- conventions ---


def test_published_vectors_of_the_rig():
    rig = simbev_rig()
    uv, depth = project(np.array([10, 4, 0.8]), rig)
    assert np.allclose(uv[1], [394.30, 531.14], atol=0.006) and np.isclose(depth[1], 9.4)
    assert np.allclose(unproject(uv, depth, rig), [10, 4, 0.8])
    assert np.allclose(
        rig.rotation, surround_rig().rots[0], atol=1e-6
    )  # published: test_lift_splat
    assert np.allclose([quaternion_to_matrix(q) for q in to_quaternion(rig.rotation)], rig.rotation)
    assert np.allclose(rig.K[0], [[953.4029, 0, 800], [0, 953.4029, 450], [0, 0, 1]], atol=1e-4)
    assert rig.names == CAMERAS and np.allclose(look_along(0), OPTICAL)


@pytest.mark.parametrize(
    "camera, index, expected",
    [
        (1, (0, 0, 0), (4.6, 3.3564, 2.5726)),
        (1, (40, 7, 21), (44.6, -36.7106, -14.3429)),
        (0, (10, 3, 10), (7.9458, 12.2072, 1.3712)),
        (4, (6, 4, 5), (-11.0, -4.4066, 0.5716)),
    ],
)
def test_published_frustum_points(camera, index, expected):
    """Lift-Splat-Shoot's frustum at 128 x 352 after scaling by .22 and cropping 48 rows."""
    d, h, w = index
    u, v = np.linspace(0, 351, 22)[w], np.linspace(0, 127, 8)[h]
    pixel = np.array([u / 0.22, (v + 48) / 0.22])
    found = unproject(np.tile(pixel, (6, 1)), np.full(6, 4.0 + d), simbev_rig())[camera]
    assert np.allclose(found, expected, atol=1e-3)


def test_extrinsics_are_the_inverse():
    for rig in RIGS.values():
        pose = np.tile(np.eye(4), (len(rig.names), 1, 1))
        pose[:, :3, :3], pose[:, :3, 3] = rig.rotation, rig.translation
        assert np.allclose(rig.extrinsics @ pose, np.eye(4), atol=1e-12)


@given(**within(yaw=(-180, 180), pitch=(-80, 80)))
@settings(max_examples=50, deadline=None)
def test_quaternion_is_the_rotation(yaw, pitch):
    rotation = look_along(math.radians(yaw), math.radians(pitch))
    w, x, y, z = to_quaternion(rotation)
    again = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    assert np.allclose(again, rotation, atol=1e-9) and w >= 0
    assert np.isclose(np.linalg.det(rotation), 1)


def test_scaling_the_image_is_scaling_K():
    """The same ray through the same relative place of the picture, cropped and scaled."""
    small = resize_rig(simbev_rig(), 0.3, (0, 46), (224, 480))
    assert np.array_equal(small.K, simbev_rig(224, 480).K)
    assert np.allclose(
        small.K[0], [[953.4029 * 0.3, 0, 240], [0, 953.4029 * 0.3, 135 - 46], [0, 0, 1]], atol=1e-4
    )
    point = np.array([10, 4, 0.8])
    assert np.allclose(
        project(point, small)[0][1], project(point, simbev_rig())[0][1] * 0.3 - [0, 46]
    )


def test_published_cells():
    box = still(boxes("car", (10, 4), (4, 2, 1.6)))
    native = rasterise(box, SIMBEV_GRID, ("car",))[0]
    row, column = np.nonzero(native)
    assert (row.min(), row.max(), column.min(), column.max(), len(row)) == (150, 160, 167, 172, 66)
    row, column = np.nonzero(resample_label(native, SIMBEV_GRID, LSS_GRID))
    assert (row.min(), row.max(), column.min(), column.max(), len(row)) == (115, 123, 106, 109, 36)
    assert [int(v) for v in LSS_GRID.cell(10.0, 4.0)] == [120, 108]


def test_cvt_grid_is_the_lss_grid_turned_by_180_degrees():
    view = make_scene(4, street=Street(arms="left")).snapshot(3.0)
    a, b = (
        rasterise(view, grid, SIMBEV_CLASSES[14], fill="centre") for grid in (LSS_GRID, CVT_GRID)
    )
    assert (a != b[:, ::-1, ::-1]).sum() <= 2e-4 * a.size  # points exactly on a border
    for wrong in (b, b[:, ::-1], b[:, :, ::-1]):
        assert (a != wrong).sum() > 2000


def test_channels_are_chosen_by_name():
    view = make_scene(4).snapshot(3.0)
    full = dict(zip(SIMBEV_CLASSES[14], rasterise(view, SIMBEV_GRID, SIMBEV_CLASSES[14])))
    for version in (8, 11):
        for name, channel in zip(
            SIMBEV_CLASSES[version], rasterise(view, SIMBEV_GRID, SIMBEV_CLASSES[version])
        ):
            assert np.array_equal(channel, full[name]), name
    assert (full["road"] >= full["road_line"]).all() and (
        full["road"] & full["sidewalk"]
    ).sum() == 0


# --- one world ---


VIEWS = [
    (name, *view)
    for name in RIGS
    for view in ((0, "drive"), (7, "turn"), (2, "roadside"))
    if name != "simbev-native" or view[0] == 0
]  # one scene is enough at 8.6 million pixels


@pytest.mark.parametrize("name, seed, ego", VIEWS)
def test_camera_and_label_agree(name, seed, ego):
    """Lifted with its true depth, every pixel of an object lands in its class's label."""
    rig, view = RIGS[name], make_scene(seed, ego=ego).snapshot(2.5)
    points, instance = surface(view, rig)
    checked = 0
    for grid in (SIMBEV_GRID, CVT_GRID, LSS_GRID):
        for kind in ("car", "truck", "bus", "pedestrian", "motorcycle", "bicycle", "barrier"):
            label = rasterise(view, grid, (kind,))[0]
            mine = points[view.objects.kind[instance - 1] == class_id(kind)]
            row, column = grid.cell(mine[:, 0], mine[:, 1])
            inside = (row >= 0) & (row < grid.rows) & (column >= 0) & (column < grid.columns)
            row, column = row[inside], column[inside]
            lands = label[row, column] > 0
            if not lands.all():  # float32 depth: at most a hair over the border of a cell
                x, y = grid.centres()
                r, c = row[~lands], column[~lands]
                near = np.zeros(len(r), bool)
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        near |= (
                            label[(r + i).clip(0, grid.rows - 1), (c + j).clip(0, grid.columns - 1)]
                            > 0
                        )
                assert near.all() and (~lands).mean() < 0.02
            checked += len(row)
    assert checked > 200


CROOKED = join(
    boxes("car", [(12, 5), (22, -7)], (4.2, 1.9, 1.5), [0.3, 1.2]),
    boxes("truck", [(-9, 8), (-25, -2)], (8, 2.5, 3), [2.0, 0.1]),
    boxes("bus", (4, -15), (11, 2.5, 3), 0.2),
)


@pytest.mark.parametrize(
    "rig",
    [simbev_rig(224, 480), nuscenes_rig(224, 480), front_rig(224, 480)],
    ids=["simbev", "nuscenes", "front"],
)
def test_every_wrong_convention_is_found(rig):
    """Only the right flip and only camera -> ego make pixels and label meet."""
    view = still(CROOKED)
    points, _ = surface(view, rig)
    row, column = LSS_GRID.cell(points[:, 0], points[:, 1])
    label = rasterise(view, LSS_GRID, VEHICLES).max(0)
    assert label[row, column].mean() > 0.99
    for wrong in (label[::-1], label[:, ::-1], label[::-1, ::-1], label.T):
        assert wrong[row, column].mean() < 0.15
    for name in rig.names:  # ego -> camera, taken for camera -> ego
        one = rig.select(name)
        swapped = Rig(
            one.names,
            one.extrinsics[:, :3, 3],
            one.extrinsics[:, :3, :3],
            one.K,
            rig.height,
            rig.width,
        )
        uv, depth = project(surface(view, one)[0], one)
        if depth.size:
            row, column = (
                v.clip(0, 199) for v in LSS_GRID.cell(*unproject(uv, depth, swapped)[0, :, :2].T)
            )
            assert label[row, column].mean() < 0.3


@pytest.mark.parametrize(
    "rig",
    [simbev_rig(), nuscenes_rig(), front_rig(360, 640, 95.0, (0, 0, 3.0), 30.0, 25.0)],
    ids=["simbev", "nuscenes", "tilted"],
)
def test_visible_footprints_are_covered(rig):
    """Flat boxes, onto whose top every camera looks: pixels reach each cell of the footprint."""
    checked = 0
    for x, y, yaw in ((9, 2, 0.4), (6, 4, -0.3), (-7, 6, 1.2), (-9, -3, 2.0), (7, -6, 0.1)):
        view = still(boxes("car", (x, y), (4.2, 1.9, 0.2), yaw))
        uv, depth = project_boxes(view.objects, rig)
        whole = ((depth > 0) & (uv >= 0).all(-1) & (uv <= [rig.width, rig.height]).all(-1)).all(-1)[
            :, 0
        ]
        if whole.any():
            points, _ = surface(view, rig.select(*(n for n, w in zip(rig.names, whole) if w)))
            _, row, column = find_cells(view.objects, LSS_GRID, "centre")
            reached = set(zip(*(v.tolist() for v in LSS_GRID.cell(points[:, 0], points[:, 1]))))
            assert set(zip(row.tolist(), column.tolist())) <= reached, (x, y)
            checked += 1
    assert checked >= (1 if len(rig.names) == 1 else 3)


@pytest.mark.parametrize("name", ["simbev", "nuscenes", "front", "tilted"])
def test_pixels_are_what_a_slow_ray_caster_sees(name):
    rig, view = RIGS[name], make_scene(1, ego="turn").snapshot(4.0)
    images = render(view, rig)
    pick = np.random.default_rng(0).integers(0, images.depth.size, 4000)
    camera, row, column = np.unravel_index(pick, images.depth.shape)
    for n in range(len(rig.names)):
        mine = camera == n
        uv1 = np.stack([column[mine] + 0.5, row[mine] + 0.5, np.ones(mine.sum())], -1)
        rays = uv1 @ (rig.rotation[n] @ np.linalg.inv(rig.K[n])).T
        depth, owner = slab(rig.translation[n], rays, view.objects)
        with np.errstate(divide="ignore"):
            ground = np.where(rays[:, 2] < 0, -rig.translation[n, 2] / rays[:, 2], np.inf)
        expected = np.minimum(depth, ground)
        found = images.depth[camera[mine], row[mine], column[mine]]
        same = np.isclose(found, expected, rtol=2e-5) | (np.isinf(found) & np.isinf(expected))
        assert same.mean() > 0.9995, (rig.names[n], same.mean())  # the rest: a ray along an edge
        instance = images.instance[camera[mine], row[mine], column[mine]]
        wanted = np.where(depth < ground, view.objects.instance[owner], 0)
        assert (instance == wanted)[same].mean() > 0.9995
        seen = np.isfinite(expected) & (wanted == 0) & (instance == 0)
        points = rays[seen] * expected[seen, None] + rig.translation[n]
        kind = images.kind[camera[mine], row[mine], column[mine]][seen]
        assert (
            kind == view.ground_kind(points[:, 0], points[:, 1])
        ).mean() > 0.99  # float32 at the border of a line


@given(
    **within(
        x=(-3, 12), y=(-6, 6), yaw=(-3.2, 3.2), length=(0.3, 14), width=(0.3, 3), height=(0.3, 4)
    )
)
@settings(max_examples=60, deadline=None)
def test_any_box_close_to_the_camera(x, y, yaw, length, width, height):
    """Boxes that surround, touch or pass the image plane: right without any clipping."""
    rig, objects = front_rig(24, 32, 90.0), boxes("truck", (x, y), (length, width, height), yaw)
    images = render(still(objects), rig)
    rays = np.concatenate([pixel_centres(rig)[0], np.ones((24, 32, 1))], -1).reshape(-1, 3)
    rays = rays @ (rig.rotation[0] @ np.linalg.inv(rig.K[0])).T
    depth, owner = slab(rig.translation[0], rays, objects)
    inside = (abs(local(rig.translation, objects, np.array([0]))) < objects.size / 2 + 1e-3).all()
    if inside:
        assert not images.instance.any()
    else:
        depth = np.where(depth < 1e9, depth, np.inf)
        wrong = (images.instance.ravel() > 0) != np.isfinite(depth)
        assert wrong.sum() <= 2  # rays along an edge
        both = (images.instance.ravel() > 0) & np.isfinite(depth)
        assert np.allclose(images.depth.ravel()[both], depth[both], rtol=1e-4)


def test_lidar_camera_and_label_agree():
    """An echo that a camera sees too has its pixel's depth and instance, and lies in its label."""
    view, rig = make_scene(0).snapshot(2.0), simbev_rig(450, 800)
    points, images = scan(view, Lidar(centre=(0.6, 0.0, 1.6), azimuths=2048)), render(view, rig)
    uv, depth = project(points.xyz, rig.select("CAM_FRONT"))
    column, row = np.floor(uv[0]).astype(int).T
    seen = (depth[0] > 0) & (row >= 0) & (row < rig.height) & (column >= 0) & (column < rig.width)
    found, instance = (
        images.depth[1, row[seen], column[seen]],
        images.instance[1, row[seen], column[seen]],
    )
    agree = instance == points.instance[seen]
    assert (
        seen.sum() > 2000 and agree.mean() > 0.98
    )  # beams and pixel centres differ by half a pixel
    on_object = agree & (instance > 0)
    assert np.median(abs(found - depth[0, seen])[on_object] / found[on_object]) < 0.01
    vehicles = np.isin(points.kind, [class_id(v) for v in VEHICLES])
    row, column = LSS_GRID.cell(points.xyz[vehicles, 0], points.xyz[vehicles, 1])
    inside = (row >= 0) & (row < 200) & (column >= 0) & (column < 200)
    assert rasterise(view, LSS_GRID, VEHICLES).max(0)[row[inside], column[inside]].mean() > 0.98


def test_lidar_is_a_slow_ray_caster_too():
    view, lidar = make_scene(5).snapshot(1.0), Lidar(rings=16, azimuths=256, reach=1e9)
    points = scan(view, lidar)
    azimuth = np.arange(256) * (2 * math.pi / 256)
    elevation = np.radians(np.linspace(-25, 5, 16))
    flat = np.stack([np.cos(azimuth), np.sin(azimuth)], -1)[:, None] * np.cos(elevation)[:, None]
    way = np.concatenate(
        [flat, np.broadcast_to(np.sin(elevation)[:, None], (256, 16, 1))], -1
    ).reshape(-1, 3)
    distance, _ = slab(np.array(lidar.centre), way, view.objects)
    ground = np.where(way[:, 2] < -1e-12, -lidar.centre[2] / np.minimum(way[:, 2], -1e-12), np.inf)
    expected = np.minimum(distance, ground).reshape(256, 16)
    found = np.full((256, 16), np.inf)
    found[points.azimuth, points.ring] = np.linalg.norm(
        points.xyz - np.array(lidar.centre, np.float32), axis=1
    )
    assert np.isclose(found, expected, rtol=1e-4).mean() > 0.999


def test_dropout_and_noise_are_seeded():
    view, lossy = make_scene(0).snapshot(2.0), Lidar(dropout=0.3, noise=0.05)
    clean, a, b, other = (
        scan(view),
        scan(view, lossy, 1),
        scan(view, lossy, 1),
        scan(view, lossy, 2),
    )
    assert np.array_equal(a.xyz, b.xyz) and not (
        len(a.xyz) == len(other.xyz) and np.array_equal(a.xyz, other.xyz)
    )
    assert abs(len(a.xyz) / len(clean.xyz) - 0.7) < 0.03
    assert (np.linalg.norm(clean.xyz - [0, 0, 1.8], axis=1) <= 100.001).all()


@pytest.mark.parametrize("grid", [SIMBEV_GRID, LSS_GRID], ids=["simbev", "lss"])
def test_no_line_slips_between_the_cells(grid):
    """The solid centre line is in every row, wherever it falls between the columns."""
    for y in np.linspace(-2.0, -1.0, 11):
        view = still(
            boxes("car", (10, 4), (4, 2, 1.6)),
            Street(crossing=None, zebra=None),
            pose=(0.0, float(y), 0.0),
        )
        column = grid.cell(0.0, -y)[1]
        line = rasterise(view, grid, ("road", "road_line"))[1][:, column - 1 : column + 2]
        assert line.any(1).all() and line.sum(1).max() <= 2


@given(**within(x=(-30, 30), y=(-30, 30), yaw=(-3.2, 3.2), length=(0.2, 12), width=(0.2, 3)))
@settings(max_examples=60, deadline=None)
def test_touched_cells_are_exact(x, y, yaw, length, width):
    """Against a dense cloud: cells with a point of the box are filled, and none clear of it."""
    box = boxes("car", (x, y), (length, width, 1.5), yaw)
    _, row, column = find_cells(box, LSS_GRID)
    filled = set(zip(row.tolist(), column.tolist()))
    a, b = np.meshgrid(
        np.linspace(-length / 2, length / 2, 90), np.linspace(-width / 2, width / 2, 90)
    )
    px, py = x + math.cos(yaw) * a - math.sin(yaw) * b, y + math.sin(yaw) * a + math.cos(yaw) * b
    row, column = LSS_GRID.cell(px.ravel(), py.ravel())
    touched = {
        (r, c) for r, c in zip(row.tolist(), column.tolist()) if 0 <= r < 200 and 0 <= c < 200
    }
    assert touched - filled == set() or all(  # a point that rounding puts over a border
        any((r + i, c + j) in filled for i in (-1, 0, 1) for j in (-1, 0, 1))
        for r, c in touched - filled
    )
    gx, gy = LSS_GRID.centres()
    for r, c in (
        filled - touched
    ):  # its square must meet the box, if only at a corner the cloud misses
        cell = np.array([gx[r, 0], gy[0, c], 0.0])
        assert find_overlaps(
            np.array([x, y, yaw]), np.array([length, width]), cell, np.array([0.5, 0.5]), 1e-6
        )
    _, row, column = find_cells(box, LSS_GRID, "centre")
    assert set(zip(row.tolist(), column.tolist())) <= filled


def test_empty_world():
    nothing = still(boxes("car", (10, 0), (4, 2, 1.5))[:0])
    images = render(nothing, RIGS["simbev"])
    assert not images.instance.any() and np.isinf(images.depth).any()
    assert rasterise(nothing, LSS_GRID, VEHICLES).sum() == 0 and len(scan(nothing).xyz) > 0
    assert all(len(owner) == 0 for owner, _ in project_edges(nothing.objects, RIGS["simbev"]))


def test_light_changes_colours_only():
    views = [render(make_scene(1, condition=c).snapshot(2.0), RIGS["simbev"]) for c in CONDITIONS]
    means = [v.image.mean() for v in views]
    for view in views[1:]:
        for name in ("depth", "kind", "instance"):
            assert np.array_equal(getattr(view, name), getattr(views[0], name))
    assert means[3] < means[1] < means[0]
    again = render(make_scene(1).snapshot(2.0), RIGS["simbev"], seed=9)
    difference = abs(again.image.astype(int) - views[0].image.astype(int))
    assert 0 < difference.mean() < 8  # the sensor's noise, and nothing else


def test_nearer_hides_farther_whatever_the_order():
    near, far = boxes("car", (10, 0), (4, 2, 1.5)), boxes("bus", (25, 0.5), (11, 2.5, 3))
    a, b = (
        render(still(join(near, far)), RIGS["front"]),
        render(still(join(far, near)), RIGS["front"]),
    )
    assert np.array_equal(a.depth, b.depth) and np.array_equal(a.kind, b.kind)
    assert {CLASSES[k] for k in np.unique(a.kind)} >= {"car", "bus"}
    assert (
        np.array_equal(a.instance > 0, b.instance > 0)
        and ((a.instance == 1) == (b.instance == 2)).all()
    )


def test_segments_are_inside_and_behind_is_cut():
    objects = boxes("bus", (0, 3), (20, 2.5, 3))  # begins behind the front camera and ends ahead
    rig = simbev_rig()
    for owner, ends in project_edges(objects, rig):
        assert np.isfinite(ends).all() and len(owner) == len(ends)
    ahead = project_edges(boxes("car", (15, 0), (4, 2, 1.5)), rig)
    assert [len(owner) for owner, _ in ahead] == [0, 12, 0, 0, 0, 0]
    uv, _ = project_boxes(boxes("car", (15, 0), (4, 2, 1.5)), rig)
    assert np.isclose(ahead[1][1].min(), uv[1].min()) and np.isclose(ahead[1][1].max(), uv[1].max())


def test_ground_look_up_is_the_street():
    """The painted classes against the street's measures, at random points off the borders."""
    street = Street(crossing=None, zebra=None)
    ground, (outer_r, bay, right, left, outer_l) = paint(street), street.edges
    y = np.random.default_rng(0).uniform(-20, 20, 5000)
    kind = ground.kind(np.full(5000, 4.0), y)  # between two dashes
    expected = np.full(5000, class_id("road"))
    expected[(y < outer_r) | (y > outer_l)] = class_id("terrain")
    expected[(y > outer_r) & (y < bay) | (y > left) & (y < outer_l)] = class_id("sidewalk")
    expected[abs(y) < 0.15] = class_id("road_line")
    clear = (
        np.abs(y[:, None] - np.array([outer_r, bay, right, left, outer_l, -0.15, 0.15])).min(1)
        > 0.03
    )
    assert np.array_equal(kind[clear], expected[clear])
