import random

import numpy as np
import pytest

from aidefend.sanitize.id_keys import id_keys

ALL = 2**64 - 1


def one_key(row_id, seed):
    """The naive twin: one id, in Python's integers."""

    def mix(key):
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & ALL
        key = (key ^ key >> 27) * 0x94D049BB133111EB & ALL
        return key ^ key >> 31

    data = row_id.encode()
    key = mix((len(data) + (seed + 1) * 0x9E3779B97F4A7C15) & ALL)
    for place in range(0, len(data), 8):
        key = mix((key + int.from_bytes(data[place : place + 8], "little")) & ALL)
    return key


def texts(alphabet):
    stream = random.Random(0)
    drawn = ["".join(stream.choice(alphabet) for _ in range(stream.randrange(40))) for _ in range(200)]
    return ["", "a", "12345678", "123456789", *drawn]


@pytest.mark.parametrize("seed", [0, 7, 2**62])
@pytest.mark.parametrize("alphabet", ["abc", "aé漢", "a\0", "\0"])
def test_keys_are_those_of_the_naive_twin(alphabet, seed):
    ids = texts(alphabet)
    assert id_keys(ids, seed).tolist() == [one_key(row_id, seed) for row_id in ids]


def test_an_id_has_its_key_in_any_block():
    ids = texts("abé")
    assert id_keys(ids[::-1], 3).tolist() == id_keys(ids, 3).tolist()[::-1]
    assert id_keys(ids[7:8], 3).tolist() == id_keys(ids, 3).tolist()[7:8]
    assert id_keys([], 0).tolist() == []


def test_keys_of_a_counter_are_spread_evenly_and_differ_by_seed():
    ids = list(map(str, range(20_000)))
    keys = id_keys(ids, 0)
    assert len(set(keys.tolist())) == len(ids)
    counts = np.histogram(keys.astype(float), 20, (0, 2.0**64))[0]
    assert abs(counts - 1000).max() < 5 * 1000**0.5
    bits = np.unpackbits((keys ^ id_keys(ids, 1)).view(np.uint8)).mean()
    assert 0.49 < bits < 0.51
