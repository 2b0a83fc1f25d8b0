"""What the benchmark of time says of attacks: who was seen before success, by length, and how long hiding takes."""

import torch

from benchmarks import validate_queries_time
from benchmarks.validate_queries_time import BETWEEN, PACES, hidden, quick


class World:
    """Attacks of known lengths (success at the end, or none), and a monitor that flags at the 20th query it sees."""

    life = 100.0
    natural = torch.zeros(500, 1)

    def __init__(self, ends):
        self.ends, self.spaces = ends, []

    def attacks(self, arms, arm, most):
        return ((torch.ones(min(n, most), 1), n <= most) for n in self.ends)

    def flag_at(self, queries, seconds):
        self.spaces.append(seconds)
        return 20 if len(queries) >= 20 and seconds < 50 else 0


def test_attacks_are_counted_by_the_queries_they_need():
    line = quick(World([3, 15, 20, 21, 300, 301, 5000, 7]), {}, "any", 7)
    assert line["by_queries_needed"] == {
        "1 to 10": [0, 1],
        "11 to 30": [1, 3],
        "31 to 60": [0, 0],
        "more than 60": [3, 3],
    }
    assert line["survivors_succeed_at"] == [3, 15, 20] and line["earliest_flag"] == 20
    assert line["attacks"] == 7 and line["before"][0] == 4 / 7 and line["never_flagged_in_300"] == 0


def test_hidden_attacks_keep_their_pace():
    world = World([100, 200, 300])
    lines = hidden(world, list(world.attacks({}, "any", 1000)))
    assert len(lines) == 1 + len(PACES) + len(BETWEEN)
    assert lines["at once"]["before"][0] == 1 and lines["0.9 queries a life"]["survive"][0] == 1
    assert lines["10 queries a life"]["lives_to_success"] == 20 and lines["10 queries a life"]["before"][0] == 1
    assert set(world.spaces) == {0.0} | {100 / pace for pace in PACES}
    assert lines["9 natural queries after each"]["flag_query"] == 2  # the 20th of all


def test_what_is_hidden_among_others_is_followed_for_so_long(monkeypatch):
    monkeypatch.setattr(validate_queries_time, "MOST_BETWEEN", 15)
    world = World([100])
    lines = hidden(world, list(world.attacks({}, "any", 1000)))
    assert lines["9 natural queries after each"]["survive"][0] == 1
