"""Sketches, trails and crowds against naive twins."""

import numpy as np
import pytest

from aidefend import ConfigurationError
from aidefend.validate import MemoryStore
from aidefend.validate.queries.crowds import Crowd, join_crowd
from aidefend.validate.queries.norms import Answered, Norms
from aidefend.validate.queries.sketch import MARKS, WIDTH, Sketcher
from aidefend.validate.queries.trail import STATISTICS, Shared, Trail

STREAM = np.random.Generator(np.random.Philox(key=1))


def sketcher(features, key=b"k" * 32, **options):
    return Sketcher(key, np.zeros(features, np.float32), np.ones(features, np.float32), **options)


def norms(radius=1.0, classes=3):
    centres, spreads = np.zeros((classes, WIDTH)), np.ones((classes, WIDTH))
    radii, shares = radius * np.array([0.5, 1.0, 1.6]), np.full(classes, 1 / classes)
    return Norms(
        radii, np.arange(1.0, 16.0), shares, centres, spreads, np.arange(33.0), np.ones((classes, 1)) * np.arange(33.0)
    )


def answered(points, labels=None, margins=None):
    sketches = np.zeros((len(points), WIDTH), np.float32)
    sketches[:, : np.array(points).reshape(len(points), -1).shape[1]] = np.array(points).reshape(len(points), -1)
    labels = np.zeros(len(points), np.int64) if labels is None else np.array(labels)
    margins = np.full(len(points), 9.0) if margins is None else np.array(margins, dtype=np.float64)
    return Answered(sketches, [b"%08d" % i for i in range(len(points))], labels, margins)


def walked(rows, contents=None, ring=64, radius=1.0):
    trail, law = Trail.new(3), norms(radius)
    rows = rows if contents is None else rows._replace(contents=contents)
    distances = []
    for i in range(len(rows.labels)):
        trail.fade(1.0, 1e9)
        distances.append(trail.add(rows, i, law, (1.0, 1.0), Shared(), ring))
    return trail, dict(zip(STATISTICS, trail.statistics(law), strict=True)), distances


@pytest.mark.parametrize("features", [12, 784, 5000])
def test_a_sketch_keeps_distances(features):
    x = STREAM.normal(size=(200, features)).astype(np.float32)
    z = sketcher(features).sketch(x)
    ratios = np.linalg.norm(z[::2] - z[1::2], axis=1) / np.linalg.norm(x[::2] - x[1::2], axis=1)
    assert z.shape == (200, WIDTH) and 0.85 < np.median(ratios) < 1.15 and ratios.min() > 0.4 and ratios.max() < 1.8


def test_centre_scale_and_unit_are_a_change_of_units():
    x = STREAM.normal(size=(5, 20)).astype(np.float32)
    moved = Sketcher(b"k" * 32, np.full(20, 3.0, np.float32), np.full(20, 2.0, np.float32), 0.5)
    assert np.allclose(moved.sketch(2 * x + 3), 2 * sketcher(20).sketch(x), atol=1e-4)


def test_fingerprints_are_equal_within_a_quantum_and_apart_beyond_it():
    one = sketcher(100, step=1.0)
    z = STREAM.normal(size=(50, WIDTH)).astype(np.float32) * 5
    assert one.marks(z) == one.marks(z.copy()) and all(len(set(row)) == MARKS for row in one.marks(z))
    near, far = one.marks(z + 0.01), one.marks(z + 3.0)
    shared = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(one.marks(z), near, strict=True)]
    assert np.mean(shared) > 0.8 * MARKS
    assert not any(a == b for x, y in zip(one.marks(z), far, strict=True) for a, b in zip(x, y, strict=True))


def test_edges_of_quanta_are_secret():
    z = np.linspace(-5, 5, 200, dtype=np.float32)[:, None] * np.ones((1, WIDTH), np.float32)
    edges = []
    for key in (b"a" * 32, b"b" * 32):
        marks = [row[0] for row in sketcher(10, key, step=4.0).marks(z)]
        edges.append([i for i in range(1, 200) if marks[i] != marks[i - 1]])
    assert edges[0] != edges[1]


def test_a_key_is_secret_and_long():
    with pytest.raises(ConfigurationError) as caught:
        sketcher(3, b"short-secret")
    assert "short-secret" not in str(caught.value)


def test_near_rows_are_counted_as_a_naive_twin_counts_them():
    points = STREAM.normal(size=(60, 3))
    rows = answered(points)
    _, found, distances = walked(rows)
    z = rows.sketches.astype(np.float16).astype(np.float32)
    apart = np.linalg.norm(rows.sketches[:, None] - z[None], axis=2)
    for name, radius in (("burst", 0.5), ("crowd", 1.0), ("haze", 1.6)):
        assert found[name] == max((apart[i, :i] <= radius).sum() for i in range(1, 60))
    nearest = [apart[i, :i].min() for i in range(1, 60)]
    assert found["near"] == sum(distance <= 1.0 for distance in nearest)
    assert np.allclose(distances[1:], nearest, atol=1e-5) and np.isnan(distances[0])


def test_a_straight_path_is_not_lateral_and_a_zigzag_is():
    straight = walked(answered([[0.5 * i] for i in range(30)]))[1]
    zigzag = walked(answered([[0.25 * i, 0.1 * (-1) ** i] for i in range(30)]))[1]
    assert straight["near"] == zigzag["near"] == 29
    assert straight["lateral"] == pytest.approx(0.5, abs=0.05) and zigzag["lateral"] > 15


def test_changed_answers_and_new_lows_count_among_near_rows_alone():
    near = [[0.01 * i] for i in range(10)]
    far = [[50.0 * i] for i in range(10)]
    labels, falling = [i % 2 for i in range(10)], list(range(20, 10, -1))
    assert walked(answered(near, labels))[1]["flips"] == 9 and walked(answered(far, labels))[1]["flips"] == 0
    assert (
        walked(answered(near, margins=falling))[1]["lows"] == 8
        and walked(answered(far, margins=falling))[1]["lows"] == 0
    )
    assert walked(answered(near, margins=falling[::-1]))[1]["lows"] == 0


def test_the_same_row_again_is_volume_alone():
    rows = answered([[0.0]] * 20)
    _, found, distances = walked(rows, [b"same-row"] * 20)
    assert found["volume"] == pytest.approx(20) and found["near"] == found["crowd"] == 0
    assert np.isnan(distances).all()


def test_the_ring_is_bounded_and_keeps_what_others_came_close_to():
    rows = answered([[0.0], [0.1], *([100.0 * i] for i in range(1, 200)), [0.05]])
    trail, found, distances = walked(rows, ring=16)
    assert len(trail.entries) == 16 and distances[-1] < 0.1 and found["near"] == 2  # 199 rows later


def test_a_trail_survives_its_bytes_and_other_bytes_are_refused():
    trail, _, _ = walked(answered(STREAM.normal(size=(20, 3))))
    trail.flagged, trail.acts = 5.0, 9.0
    back = Trail.from_bytes(trail.to_bytes(), 3)
    assert back.to_bytes() == trail.to_bytes() and (back.flagged, back.acts, back.updated) == (5.0, 9.0, trail.updated)
    assert np.allclose(back.statistics(norms()), trail.statistics(norms()), rtol=1e-6)
    for bad in (trail.to_bytes()[:-1], b"x" * 500, trail.to_bytes() + b"\0"):
        with pytest.raises(ValueError, match="another kind"):
            Trail.from_bytes(bad, 3)
    with pytest.raises(ValueError, match="another kind"):
        Trail.from_bytes(trail.to_bytes(), 4)


def join(store, i, sketch, now=0.0, content=None, label=0, who=None):
    one = sketcher(10, step=2.0)
    z = np.asarray(sketch, dtype=np.float32)
    marks = one.marks(z[None])[0]
    content, who = content or b"%08d" % i, who or b"%08d" % i
    return store.run(lambda session: join_crowd(session, marks, z, content, label, now, 1.0, 100.0, who), now, 100.0)


def test_a_crowd_counts_different_rows_near_one_another_over_accounts():
    store, z = MemoryStore(), np.zeros(WIDTH)
    sizes = [join(store, i, z + 0.01 * STREAM.normal(size=WIDTH), label=i % 2).size for i in range(10)]
    assert sizes == list(range(10))
    assert join(store, 10, z).flips == 9  # the tenth change is its own
    assert join(store, 11, z + 50.0).size == 0  # far away: a crowd of its own


def test_a_crowd_says_nothing_of_what_a_principal_put_in_itself():
    """Bursts of benign cameras would otherwise set the unit of what others do, and hide many accounts behind it."""
    store, z = MemoryStore(), np.zeros(WIDTH)
    near = lambda i: z + 0.001 * i  # noqa: E731
    assert {join(store, i, near(i), label=i % 2, who=b"camera--") for i in range(30)} == {Shared(0.0, 0.0)}
    assert join(store, 30, near(30), who=b"somebody").size == 30
    assert join(store, 31, near(31), who=b"camera--") == Shared(1.0, 0.0 + 1.0)


def test_of_many_principals_a_crowd_remembers_the_busiest():
    store, z = MemoryStore(), np.zeros(WIDTH)
    for i in range(10):
        join(store, i, z + 0.001 * i, who=b"busy----")
    for i in range(10, 60):
        join(store, i, z + 0.001 * i)
    assert join(store, 60, z, who=b"busy----").size == 50


def test_the_same_row_from_everybody_makes_no_crowd():
    store, z = MemoryStore(), np.zeros(WIDTH)
    assert {join(store, i, z, content=b"the-same").size for i in range(50)} == {0.0}


def test_a_crowd_fades():
    store, z = MemoryStore(), np.zeros(WIDTH)
    for i in range(20):
        join(store, i, z + 0.001 * i)
    assert join(store, 20, z, now=50.0).size == pytest.approx(19 * np.exp(-0.5) + 1)
    assert join(store, 21, z + 0.002, now=500.0).size == 0


def test_a_crowd_survives_its_bytes():
    owners = {b"12345678": (2.0, 1.0), b"abcdefgh": (1.0, 0.0)}
    ends = (np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32))
    crowd = Crowd(*ends, 2, 7.0, 3.0, 1.0, b"12345678abcdefgh", owners)
    assert Crowd.from_bytes(crowd.to_bytes()).owners == owners
    assert Crowd.from_bytes(crowd.to_bytes()).to_bytes() == crowd.to_bytes() and crowd.knows(b"abcdefgh")
    with pytest.raises(ValueError, match="another kind"):
        Crowd.from_bytes(b"x" * 200)


def test_surprises_average_one_on_what_they_were_read_off():
    rows = answered(STREAM.normal(size=(2000, WIDTH)), STREAM.integers(0, 3, 2000), STREAM.exponential(size=2000))
    law = Norms.of(rows, np.ones(10), np.ones(10), 3)
    odd, thin = law.surprises(rows)
    assert 0.9 < odd.mean() < 1.1 and 0.9 < thin.mean() < 1.1
    strange = answered(10 + STREAM.normal(size=(5, WIDTH)), margins=np.zeros(5))
    assert (law.surprises(strange)[0] > 4).all() and (law.surprises(strange)[1] > 3).all()
    back = Norms.from_dict(law.to_dict())
    assert all(np.array_equal(getattr(back, name), getattr(law, name)) for name in law.to_dict())


def test_a_crowd_of_many_accounts_stays_small():
    """Planted violation: a crowd that remembered all who ever joined would grow without end."""
    store, sizes = MemoryStore(), []
    for i in range(100):
        row = (np.full(WIDTH, 1e-4 * i, np.float32), b"%08d" % i, 0, float(i), 9.0, 1e6, b"%08d" % i)
        shared = store.run(lambda session, row=row: join_crowd(session, [b"mark"], *row), float(i), 1e6)
        name = store.run(lambda session: session.get("shared", b"mark"), float(i), 1e6)
        sizes.append(len(store.run(lambda session, name=name: session.get("shared", name), float(i), 1e6)))
    assert max(sizes) == sizes[-1] == sizes[30] and shared.size > 90
