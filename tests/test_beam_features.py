"""Radar maps, lidar counts, positions and targets of the beam system: vectors and repairs."""

import numpy as np
import pytest

from conftest import message
from leansense.beam.features import (
    FIELDS,
    WHOLE,
    average_background,
    compute_radar,
    count_points,
    fill_cells,
    find_field,
    find_zone,
    make_gps,
    make_radar,
    make_target,
    measure_angle,
    normalise_map,
    project,
    read_place,
    read_points,
    read_power,
    read_radar,
    remove_background,
)


def wave(chirps: float = 50.0, shape=(4, 256, 250)) -> np.ndarray:
    a, s, c = np.ogrid[tuple(map(slice, shape))]
    return np.exp(2j * np.pi * (40 * s / 256 + 64 * a / 256 + chirps * c / 250))


# --- radar ---


def test_radar_vector():
    angle, velocity = compute_radar(wave().astype(np.complex64))
    assert angle.shape == velocity.shape == (256, 256)
    assert np.unravel_index(angle.argmax(), angle.shape) == (40, 64)
    assert np.unravel_index(velocity.argmax(), velocity.shape) == (40, 51)
    assert angle.max() == pytest.approx(256000, rel=1e-5)
    assert velocity.max() == pytest.approx(240236, rel=1e-5)
    maps = make_radar(wave())
    assert maps.dtype == np.float32 and maps.shape == (2, 256, 256)
    assert maps[0, 40, [32, 96]] == pytest.approx(0.6532815, abs=1e-6)
    assert maps[0, 40, 0] == pytest.approx(0, abs=1e-6)
    assert maps[1, 40, 50] == pytest.approx(0.14881, abs=1e-5)
    assert maps[1, 40, 52] == pytest.approx(0.27544, abs=1e-5)


def test_radar_axes_are_written_out():
    """Against the sums of the definition, on a small cube without structure."""
    rng = np.random.default_rng(0)
    cube = rng.normal(size=(4, 6, 5)) + 1j * rng.normal(size=(4, 6, 5))
    angle, velocity = compute_radar(cube, 8)
    s, r = np.ogrid[:6, :6]
    ranges = np.einsum("asc,sr->arc", cube, np.exp(-2j * np.pi * s * r / 6))
    moving = ranges - ranges.mean(2, keepdims=True)
    a, k = np.ogrid[:4, :8]
    beams = np.einsum("arc,ak->krc", moving, np.exp(-2j * np.pi * a * k / 8))
    assert np.allclose(angle, np.abs(beams).sum(2).T)
    c, v = np.ogrid[:5, :8]
    speeds = np.einsum("arc,cv->arv", ranges, np.exp(-2j * np.pi * c * v / 8))
    assert np.allclose(velocity, np.abs(speeds).sum(0))


def test_standing_still_is_a_map_of_zeros():
    """Without motion the published angle map is rounding, blown up to [0, 1], or 0/0."""
    still = wave(0.0)
    assert compute_radar(still)[0].max() < 1e-6
    maps = make_radar(still)
    assert not maps[0].any() and maps[1].max() == 1 and np.isfinite(maps).all()
    assert not normalise_map(np.full((3, 3), 7.0)).any()
    weak = wave(0.0) + 1e-3 * wave()
    assert make_radar(weak)[0].max() == 1 and make_radar(weak)[0].argmax() == 40 * 256 + 64


def test_radar_of_another_size():
    small = make_radar(wave(shape=(4, 64, 32)), 48)
    assert small.shape == (2, 48, 48) and small.min() == 0 and small.max() == 1
    large = make_radar(wave(), 64)[0]
    assert np.unravel_index(large.argmax(), large.shape) == (10, 16)


def test_radar_faults(tmp_path):
    path = tmp_path / "radar_data_7.npy"
    assert "is missing" in message(FileNotFoundError, read_radar, path)
    cube = wave(shape=(4, 16, 8))
    for wrong, said in [
        (cube.transpose(2, 1, 0), r"shape (8, 16, 4), not (4, samples, chirps)"),
        (cube.real, "is float64, not complex"),
        (cube * 0 + 3, "constant"),
        (cube * np.nan, "NaN"),
    ]:
        np.save(path, wrong)
        assert said in message(ValueError, read_radar, path) and str(path) in message(
            ValueError, read_radar, path
        )
    np.save(path, cube)
    assert "not (4, 256, 250)" in message(ValueError, read_radar, path, (4, 256, 250))
    assert read_radar(path).dtype == np.complex64
    path.write_text("nonsense")
    assert "not a numpy array" in message(ValueError, read_radar, path)


# --- lidar ---


def test_lidar_vector():
    cells = fill_cells(count_points(np.array([[-10.0, 0.0]] * 3), find_field(33)))
    assert np.argwhere(cells).tolist() == [[204, 161]]
    assert cells[204, 161] == pytest.approx(0.6) and cells.dtype == np.float32
    many = fill_cells(count_points(np.array([[-10.0, 0.0]] * 9), find_field(33)))
    assert many.max() == 1
    assert find_field(33, 0) == WHOLE == find_field(5) and find_field(31) == FIELDS[31]
    assert not count_points(np.array([[1.0, 0.0], [-10.0, 8.0]]), find_field(33)).any()


HEADER = """ply
format {} 1.0
comment of a tool
element vertex {}
property float x
property double y
property uchar ring
property float intensity
element face 1
property list uchar int vertex_indices
end_header
"""
ROWS = [(-10.5, 2.25, 3, 0.5), (-20.0, -3.5, 255, 1.0), (7.0, 8.0, 0, 0.0)]


def ply(encoding: str, rows=ROWS) -> bytes:
    header = HEADER.format(encoding, len(rows)).encode()
    if encoding == "ascii":
        return header + "".join(" ".join(map(str, r)) + "\n" for r in rows).encode() + b"3 0 1 2\n"
    order = "<" if "little" in encoding else ">"
    kinds = [("x", f"{order}f4"), ("y", f"{order}f8"), ("r", "u1"), ("i", f"{order}f4")]
    return header + np.array(rows, kinds).tobytes() + b"\3\0\0\0\0"


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply(tmp_path, encoding):
    path = tmp_path / "a.ply"
    path.write_bytes(ply(encoding))
    assert read_points(path).tolist() == [list(row[:2]) for row in ROWS]
    path.write_bytes(ply(encoding)[:-20] if encoding != "ascii" else ply(encoding)[:-26])
    assert "ends before its 3 points" in message(ValueError, read_points, path)
    path.write_bytes(ply(encoding, []))
    assert "has no points" in message(ValueError, read_points, path)


def test_ply_faults(tmp_path):
    path = tmp_path / "a.ply"
    lines = HEADER.split("element face")[0] + "end_header\n"
    rows = "".join(" ".join(f"{v:.9f}" for v in row) + "\n" for row in ROWS * 9)
    path.write_text(lines.format("binary_little_endian", 27) + rows)  # a tool's wrong header
    assert "bytes more than its 27 binary points" in message(ValueError, read_points, path)
    path.unlink()
    assert "lidar is missing" in message(FileNotFoundError, read_points, path)
    for text, said in [
        ("pcd\n", "is not a PLY file"),
        ("ply\nformat ascii 1.0\nelement vertex 1\nproperty int z\nend_header\n1\n", "no x and y"),
        ("ply\nformat zip 1.0\nelement vertex 1\nproperty float x\nproperty float y\nend_header\n",
         "in the format 'zip'"),
        ("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nend_header\n"
         "nan 2\n", "no finite points"),
    ]:  # fmt: skip
        path.write_text(text)
        assert said in message(ValueError, read_points, path)


def test_background_is_removed():
    rng = np.random.default_rng(0)
    wall = np.stack([np.full(100, -15.0), np.linspace(-8, 8, 100)], 1)
    frames = [wall + rng.normal(0, 0.05, wall.shape) for _ in range(6)]
    mean = average_background(frames)
    assert np.abs(mean - wall).mean() < np.abs(frames[0] - wall).mean()
    car = rng.uniform((-9, -1), (-7, 1), (40, 2))
    kept = remove_background(np.concatenate([frames[0], car]), mean)
    assert len(kept) == 40 and (kept == car).all()
    far = np.array([[-60.0, 0.0]])  # the threshold grows as the fourth power of the distance
    assert not len(remove_background(far, far + [75, 0]))
    assert len(remove_background(far, far + [76, 0]))


# --- positions ---


def snyder(latitude: float, longitude: float, zone: int) -> tuple[float, float]:
    """UTM by Snyder's series (Map Projections, USGS 1395, eq. 8-9 to 8-15): another method."""
    a, e2 = 6378137.0, (2 - 1 / 298.257223563) / 298.257223563
    phi, n = (
        np.radians(latitude),
        np.radians(longitude - (6 * zone - 183)) * np.cos(np.radians(latitude)),
    )
    e4, e6, second = e2**2, e2**3, e2 / (1 - e2)
    radius, t, c = (
        a / np.sqrt(1 - e2 * np.sin(phi) ** 2),
        np.tan(phi) ** 2,
        second * np.cos(phi) ** 2,
    )
    arc = a * (
        (1 - e2 / 4 - 3 * e4 / 64 - 5 * e6 / 256) * phi
        - (3 * e2 / 8 + 3 * e4 / 32 + 45 * e6 / 1024) * np.sin(2 * phi)
        + (15 * e4 / 256 + 45 * e6 / 1024) * np.sin(4 * phi)
        - 35 * e6 / 3072 * np.sin(6 * phi)
    )
    fifth = 5 - 18 * t + t**2 + 72 * c - 58 * second
    sixth = 61 - 58 * t + t**2 + 600 * c - 330 * second
    x = n + (1 - t + c) * n**3 / 6 + fifth * n**5 / 120
    y = n**2 / 2 + (5 - t + 9 * c + 4 * c**2) * n**4 / 24 + sixth * n**6 / 720
    return 0.9996 * radius * x + 5e5, 0.9996 * (arc + radius * np.tan(phi) * y) + 1e7 * (phi < 0)


@pytest.mark.parametrize(
    "place, zone",
    [((43.642567, -79.387139), 17), ((-33.856784, 151.215297), 56), ((33.42, -111.93), 12)],
)
def test_utm(place, zone):
    assert find_zone(place[1]) == zone
    assert project(place, zone) == pytest.approx(np.array(snyder(*place, zone)), abs=0.01)


def test_utm_of_a_known_place():
    assert project((43.642567, -79.387139), 17) == pytest.approx([630084, 4833438], abs=1)


def test_utm_is_exact_on_the_meridian():
    """Northing along the central meridian is 0.9996 of the arc of the ellipse, by quadrature."""
    from scipy.integrate import quad

    a, f = 6378137.0, 1 / 298.257223563
    e2 = f * (2 - f)

    def arc(latitude):
        return a * (1 - e2) / (1 - e2 * np.sin(latitude) ** 2) ** 1.5

    for degrees in (10.0, 33.42, 60.0):
        length = quad(arc, 0, np.radians(degrees), epsabs=1e-9, epsrel=1e-13)[0]
        assert project((degrees, 3.0), 31)[1] == pytest.approx(0.9996 * length, abs=1e-5)
    east = project([(33.42, -110.9), (33.42, -111.1)], 12) - (500000, 0)
    assert east[0, 0] == pytest.approx(-east[1, 0], abs=1e-6)


def test_angle_vector():
    found = measure_angle(np.array([[3.0, 3.0], [8.0, 8.0]]), 44.8)
    assert found.shape == (2, 2) and found.dtype == np.float32
    assert found == pytest.approx(np.radians(0.2), abs=1e-7)
    assert np.radians(0.2) == pytest.approx(0.0034907, abs=1e-7)


def test_angle_wraps_and_survives_north():
    north = measure_angle(np.array([[0.0, 5.0]]), 0.0)
    assert north == pytest.approx(np.pi / 2)
    assert measure_angle(np.array([[0.0, 0.0]]), 44.8) == pytest.approx(np.radians(-44.8))
    turned = measure_angle(np.array([[1.0, 1.0]]), -60.0)  # 105 degrees becomes -75
    assert turned == pytest.approx(np.radians(-75))
    assert measure_angle(np.array([[1.0, -1.0]]), 55.6) == pytest.approx(np.radians(79.4))


def test_atan2_tells_opposite_directions():
    pair = np.array([[2.0, 1.0], [-2.0, -1.0]])
    same, apart = measure_angle(pair, 10.0), measure_angle(pair, 10.0, angle="atan2")
    assert (same[0] == same[1]).all() and np.allclose(apart[0], -apart[1])
    assert np.linalg.norm(apart, axis=1) == pytest.approx(1)
    assert not measure_angle(np.zeros((1, 2)), 10.0, angle="atan2").any()


def test_metres_are_scaled_by_the_constants():
    ends = np.array([[40.20955233, 52.31386139], [-7.18029715, -97.55563452]])
    assert measure_angle(ends, 44.8, angle_norm=0).tolist() == [[1, 1], [0, 0]]


def test_gps_from_degrees():
    base = np.array([33.42, -111.93])
    car = base + np.array([[0.0001, 0.0], [0.0, 0.0001]])  # north, east
    found = make_gps(car, base, 99, angle="atan2")
    assert found == pytest.approx(np.array([[0, 1], [1, 0]]), abs=0.02)
    assert "angle='tan' is unknown" in message(ValueError, make_gps, car, base, 31, 1, "tan")


@pytest.mark.parametrize(
    "text, said",
    [("33.4\n", "1 line(s), not 2"), ("33.4\n-111.9\n5\n", "3 line(s)"),
     ("a\nb\n", "not two numbers"), ("nan\n0\n", "nowhere on Earth"),
     ("133\n0\n", "nowhere on Earth")],
)  # fmt: skip
def test_place_faults(tmp_path, text, said):
    path = tmp_path / "gps.txt"
    path.write_text(text)
    assert said in message(ValueError, read_place, path)


# --- target and power ---


def test_target_vector():
    found = make_target(31)
    assert found.dtype == np.float32 and found.shape == (64,)
    wanted = [0.99735570, 0.13497742, 3.345756e-4, 1.518971e-8]
    assert found[31:35] == pytest.approx(wanted, rel=1e-6)
    assert found[28:32][::-1] == pytest.approx(wanted, rel=1e-6)
    assert found.sum() == pytest.approx(1.26797972, rel=1e-6)
    assert make_target(0).sum() == pytest.approx(1.13266771, rel=1e-6)
    assert np.count_nonzero(found[:26]) == np.count_nonzero(found[37:]) == 0
    many = make_target(np.array([[3, 4], [31, 63]]))
    assert many.shape == (2, 2, 64) and (many[1, 0] == found).all()


def test_power(tmp_path):
    path = tmp_path / "mmWave_power_1.txt"
    words = ["0.001"] * 64
    words[9], words[40] = "9e-05", "0.2"
    path.write_text("\n".join(words))
    assert read_power(path).argmax() == 40
    for change, said in [({12: "nan"}, "power of beam 13 is nan"), ({3: "x"}, "not a list")]:
        path.write_text("\n".join(change.get(k, w) for k, w in enumerate(words)))
        assert said in message(ValueError, read_power, path)
    path.write_text("1\n2\n")
    assert "2 powers, not 64" in message(ValueError, read_power, path)
