"""The radar's cube and the radio channel, held to geometry and to linearity."""

import math

import numpy as np
import pytest

from leansense.world.channel import Array, Paths, codebook, find_beam, find_paths, receive
from leansense.world.radar import (
    Radar,
    Scatterers,
    box_points,
    cross_boxes,
    join_scatterers,
    mix,
    record,
    resize_radar,
)
from leansense.world.scene import boxes, join, make_scene, still


def maps(cube):
    """Range-angle and range-velocity maps (256, 256) as beam prediction makes them."""
    spectrum = np.fft.fft(cube, 256, axis=1)
    moving = spectrum - spectrum.mean(2, keepdims=True)
    angle = abs(np.fft.fft(moving, 256, axis=0)).sum(2).T
    return angle, abs(np.fft.fft(spectrum, 256, axis=2)).sum(0)


def points(*rows):
    """Scatterers from rows of distance, angle to the right in degrees, speed, amplitude."""
    distance, angle, speed, amplitude = np.array(rows, float).T
    return Scatterers(distance, np.sin(np.radians(angle)), speed, amplitude)


@pytest.mark.parametrize("radar", [Radar(), resize_radar(Radar(), 64, 32)])
@pytest.mark.parametrize("distance, angle, speed", [(20, 15, 5), (33.3, -30, -7.5), (8, 40, 1.5)])
def test_one_point_lands_in_its_bins(radar, distance, angle, speed):
    angles, speeds = maps(mix(points((distance, angle, speed, 1)), radar))
    row, column = np.unravel_index(angles.argmax(), (256, 256))
    assert abs(row - 256 * distance / radar.reach) <= 1
    turn = 256 * radar.spacing * math.sin(math.radians(angle))
    assert abs((column - turn + 128) % 256 - 128) <= 1
    row, column = np.unravel_index(speeds.argmax(), (256, 256))
    assert abs(row - 256 * distance / radar.reach) <= 1
    assert abs((column - 128 * speed / radar.speed_limit + 128) % 256 - 128) <= 1


def test_steps_follow_from_the_physics():
    radar = Radar()
    assert radar.range_step == pytest.approx(299792458 / 1.2e9)
    assert radar.speed_step * radar.chirps / 2 == pytest.approx(radar.speed_limit)
    small = resize_radar(radar, 64, 32)
    assert small.reach == pytest.approx(radar.reach) and small.speed_limit == radar.speed_limit
    cube = mix(points((10, 0, 1, 1)), small)
    assert cube.shape == (4, 64, 32) and cube.dtype == np.complex64
    assert not mix(points((radar.reach + 1, 0, 1, 1)), radar).any()


def test_what_stands_vanishes_from_the_angle_map():
    wall = join(boxes("building", (20, 3), (4, 20, 8)), boxes("pole", (9, -4), (0.3, 0.3, 6)))
    radar = Radar(noise=0.0)
    spectrum = np.fft.fft(record(still(wall), radar), axis=1)
    assert abs(spectrum).max() > 10
    assert abs(spectrum - spectrum.mean(2, keepdims=True)).max() < 1e-4 * abs(spectrum).max()
    car = boxes("car", (12, 0), (4.5, 1.8, 1.5), np.pi / 2, (2.0, 6.0))
    angles, _ = maps(record(still(join(wall, car)), radar))
    assert abs(angles.argmax() // 256 * radar.range_step - 11.1) < 1  # its near side


def test_cube_is_linear_in_its_points():
    one, two = points((12, 10, 3, 1)), points((25, -20, 0, 0.5), (14, 3, -4, 2))
    radar = resize_radar(Radar(), 64, 32)
    both = mix(join_scatterers(one, two), radar)
    assert abs(both - mix(one, radar) - mix(two, radar)).max() < 1e-5
    louder = Scatterers(one.distance, one.sine, one.speed, 3 * one.amplitude)
    assert abs(mix(louder, radar) - 3 * mix(one, radar)).max() < 1e-5


def test_cube_is_reproducible_and_noise_follows_the_seed():
    view = make_scene(22, ego="roadside").snapshot(3.0)
    radar = resize_radar(Radar(), 64, 32)
    cube = record(view, radar, seed=5)
    assert cube.tobytes() == record(view, radar, seed=5).tobytes()
    noise = cube - record(view, resize_radar(Radar(noise=0.0), 64, 32), seed=5)
    assert abs(noise).std() > 0 and np.sqrt((abs(noise) ** 2).mean()) == pytest.approx(
        0.5, rel=0.05
    )
    assert cube.tobytes() != record(view, radar, seed=6).tobytes()


def test_hidden_and_far_cars_are_fainter():
    car = boxes("car", (14, 0), (1.8, 4.5, 1.5))
    far = boxes("car", (28, 0), (1.8, 4.5, 1.5))
    truck = boxes("truck", (7, 0), (2.5, 7, 3.2))

    def power(view, low):
        found = box_points(view, Radar())
        return (abs(found.amplitude[found.distance > low]) ** 2).sum()

    free = power(still(car), 11)
    assert 12 < free / power(still(far), 20) < 20  # distance doubled: a sixteenth
    assert power(still(join(car, truck)), 11) < 0.1 * free


def test_lines_through_boxes():
    cube = boxes("car", (10, 0), (2, 2, 2), np.pi / 2)
    inside = cross_boxes((0, 0, 1), np.array([[20, 0, 1], [10, 0, 1], [20, 9, 1.0]]), cube)
    assert np.allclose(inside[:, 0], [2, 1, 0])


def test_radar_says_what_is_wrong():
    with pytest.raises(ValueError, match="must be positive"):
        Radar(samples=0)


def at(angle, distance=12.0):
    """A place at an angle to the left, at the height of a roof."""
    return distance * math.cos(angle), distance * math.sin(angle), 1.6


def test_best_beam_follows_the_angle():
    array, empty = Array(jitter=0.0), still(boxes("pole", (-50, 0), (0.2, 0.2, 5)))
    angles = np.linspace(44, -44, 89)
    best = [
        receive(find_paths(empty, at(math.radians(a)), array), array, 1).argmax() for a in angles
    ]
    assert (np.diff(best) >= 0).all() and best[0] <= 1 and best[-1] >= 62
    assert abs(np.array(best) - find_beam(angles, array)).max() <= 1
    assert np.allclose(np.linalg.norm(codebook(array), axis=1), 1)
    assert find_beam(np.array([80.0, -80.0])).tolist() == [0, 63]


def test_power_is_that_of_the_gain():
    array = Array(jitter=0.0, floor=1e-12)
    one = Paths(np.sin(np.radians(array.angles[20:21])), np.array([10.0]), np.array([1.0]))
    power = receive(one, array)
    assert power[20] == pytest.approx(1, abs=1e-6) and power.argmax() == 20 and (power > 0).all()


def test_a_truck_in_the_way_costs_power():
    wall = boxes("building", (40, 0), (4, 60, 10))
    truck = boxes("truck", (7, 0), (2.4, 7, 3.4))
    free, hidden = (
        receive(find_paths(still(view), at(0.0)), seed=1) for view in (wall, join(wall, truck))
    )
    assert hidden.max() < 0.1 * free.max() and (hidden > 0).all()
    car = boxes("car", (7, 0), (1.8, 4.5, 1.4))  # low: the line passes over it
    assert receive(find_paths(still(join(wall, car)), at(0.0)), seed=1).max() > 0.9 * free.max()


def test_a_wall_mirrors():
    wall = boxes("building", (20, 0), (2, 30, 10))  # its front is at x = 19
    place = np.array([10.0, 6.0, 1.6])
    paths = find_paths(still(wall), place)
    image = np.array([28.0, 6.0, 1.6]) - np.array(Array().centre)
    length = np.linalg.norm(image)
    assert np.allclose(paths.length[1:], length) and np.allclose(paths.sine[1:], image[1] / length)
    assert paths.amplitude[1] == pytest.approx(0.3 * 10 / length)
    short = boxes("building", (20, 0), (2, 1, 10))  # too short to show the mirror image
    assert len(find_paths(still(short), place).length) == 1
    own = join(boxes("truck", place[:2] + [0, 0.0], (6, 2.5, 3)), wall)
    assert find_paths(still(own), place, own=0).amplitude[0] == pytest.approx(paths.amplitude[0])


def test_powers_are_reproducible():
    view = make_scene(22, ego="roadside").snapshot(3.0)
    paths = find_paths(view, at(0.2))
    assert receive(paths, seed=[1, 2]).tobytes() == receive(paths, seed=[1, 2]).tobytes()
    assert receive(paths, seed=[1, 2]).tobytes() != receive(paths, seed=[1, 3]).tobytes()
    assert len(find_paths(still(view.objects[:0]), at(0.2)).length) == 1


def test_array_says_what_is_wrong():
    with pytest.raises(ValueError, match="span"):
        Array(span=180)
    with pytest.raises(ValueError, match="floor=0"):
        Array(floor=0)
