"""One test for each defect that public copies of well-known filters have: ours must not have it."""

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import aidefend
from aidefend import sanitize
from aidefend._core.batches import content_ids
from aidefend.sanitize import (
    ActivationClustering,
    NeighbourDisagreement,
    PartitionEnsemble,
    Scan,
    SourceEvidence,
    SpectralSignature,
    Spectre,
    extract_features,
    screen,
)
from tests.worlds import poisoned_clusters

TARGET = 0
OF_GROUPS = [SpectralSignature, ActivationClustering, Scan, Spectre]


@pytest.fixture(scope="module")
def screened():
    """By rows of poison: the truth, the labels as poisoned, and a report that was told nothing."""
    worlds = {poison: poisoned_clusters(poison=poison) for poison in (0, 40, 80)}
    return {n: (one.is_poison, one.y, screen((one.x, one.y), seed=0)) for n, one in worlds.items()}


def blocks_of(features, labels, size=None):
    size = size or len(labels)
    ids = tuple(map(str, range(len(labels))))
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield {"ids": ids[part], "features": features[part], "labels": labels[part]}


def clean_features(n=900, d=16, classes=3):
    stream = torch.Generator().manual_seed(5)
    labels = torch.arange(n) % classes
    return torch.randn(n, d, generator=stream) + 6.0 * torch.nn.functional.one_hot(labels, d), labels


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return found


def test_d1_the_spectral_score_is_centred():
    """An uncentred score is blind where the class mean lies against the shift of the poison."""
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 64, generator=stream)
    features[:100, 0] += 5.0
    features[:, 0] -= 5.0
    (block,) = blocks_of(features, torch.zeros(1000, dtype=torch.int64))
    top = SpectralSignature().partial_fit(block).score(block).topk(100).indices
    assert int((top < 100).sum()) >= 90


def test_d2_a_shuffling_loader_does_not_mix_rows_and_labels():
    x, y = torch.randn(64, 1, 4, 4), torch.arange(64) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(1))
    found = extract_features(loader, lambda rows: rows.flatten(1)[:, :2], lambda rows: rows.flatten(1))
    assert torch.equal(found.x, x)
    assert torch.equal(found.labels, y)
    assert torch.equal(found.features, x.flatten(1))
    assert [one.partition("#")[0] for one in found.ids] == [one.partition("#")[0] for one in content_ids(x, y)]


@pytest.mark.parametrize("detector", OF_GROUPS)
def test_d3_blocks_and_a_partial_last_one_give_every_row_the_score_of_one_pass(detector):
    features, labels = clean_features(200)
    (whole,) = blocks_of(features, labels)
    expected = detector().partial_fit(whole).score(whole)
    streamed, parts = detector(), list(blocks_of(features, labels, 64))  # the last block has 8 rows
    for block in parts:
        streamed.partial_fit(block)
    scores = torch.cat([streamed.score(block) for block in parts])
    assert len(scores) == 200
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_d4_clean_data_lose_nothing_in_any_class(screened):
    _, _, report = screened[0]
    assert report.keep.all()
    assert report.parameters["target_classes"] == []


def test_d5_only_the_suspect_class_loses_rows_and_all_of_its_poison(screened):
    """A cut at one percentile of all classes caps what can be found, and takes its share of every clean class."""
    for is_poison, labels, report in (screened[40], screened[80]):
        assert report.parameters["target_classes"] == [TARGET]
        assert set(labels[~report.keep].tolist()) == {TARGET}
        assert float((~report.keep)[is_poison].double().mean()) >= 0.9


def test_d6_nothing_can_be_told_the_answer():
    """No door takes the poisoned share, the target class or which rows are poison."""
    told = re.compile("poison|target|rate$|share_of_poison|contaminat|eps|expected")
    doors = [screen, *(getattr(sanitize, name) for name in sanitize.__all__ if name[0].isupper())]
    named = {
        (door.__name__, name)
        for door in doors
        if not hasattr(door, "_fields") and not issubclass(type(door), type(Exception))
        for name in inspect.signature(door).parameters
        if told.search(name)
    }
    assert named <= {("PartitionEnsemble", "rate")}  # the learning rate of its networks


def test_d7_what_is_removed_follows_the_poison_not_a_budget(screened):
    for is_poison, _, report in (screened[40], screened[80]):
        removed, planted = int((~report.keep).sum()), int(is_poison.sum())
        assert 0.9 * planted <= removed <= 1.1 * planted


def test_d8_rows_are_numbered_as_in_the_data_set(screened):
    """Numbers inside a class that are compared with numbers of the data set make every precision wrong."""
    is_poison, _, report = screened[80]
    found = set(report.quarantine_indices.tolist())
    planted = set(is_poison.nonzero().flatten().tolist())
    assert len(found & planted) >= 0.9 * len(found | planted)


def test_d9_scan_is_one_sided_and_does_not_loop_over_rows():
    """An unusually clean class is no anomaly; twice the rows do not mean twice the operations."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 6
    features = torch.randn(600, 8, generator=stream)
    rows = (labels == 5).nonzero().flatten()
    features[rows] *= 0.05  # far less spread than any other class
    (block,) = blocks_of(features, labels)
    scan = Scan().partial_fit(block)
    evidence = scan.evidence()
    assert evidence[5].anomaly <= max(evidence[label].anomaly for label in range(5))
    assert scan.score(block)[rows].max() <= 1.0
    calls = [_operations(Scan, n) for n in (600, 1200)]
    assert calls[1] < 1.5 * calls[0]


def _operations(detector, n):
    features, labels = clean_features(n)

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Counting.count += 1
            return function(*args, **(kwargs or {}))

    (block,) = blocks_of(features, labels)
    with Counting():
        detector(limit=200).partial_fit(block).score(block)
    return Counting.count


def test_d10_sources_are_judged_without_refitting_for_each_row(monkeypatch):
    """One solution of a linear system for each source (twice: its loss, its harm) and one for all, whatever N is."""
    solved, solve = [], torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda *args: solved.append(1) or solve(*args))
    features, labels = clean_features(900)
    (block,) = blocks_of(features, labels)
    sources = [f"source-{i % 4}" for i in range(900)]
    SourceEvidence().partial_fit({**block, "sources": sources}).evidence()
    assert len(solved) <= 2 * 4 + 1


def test_d11_neighbours_need_no_matrix_of_all_pairs():
    n = 3000
    features, labels = clean_features(n, 8)
    with LargestTensor() as seen:
        detector = NeighbourDisagreement(k=5)
        for block in blocks_of(features, labels, 500):
            detector.partial_fit(block)
        for block in blocks_of(features, labels, 500):
            detector.score(block)
    assert seen.numel < n * n / 2


def test_d12_partitions_depend_on_content_alone_and_come_with_a_certificate():
    """The sum of a row's values is no hash: whoever chooses the sum chooses the part for all of their rows."""
    stream = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(300, 6, generator=stream) + 5.0 * torch.nn.functional.one_hot(y, 6)
    query = x[:40] + 0.1
    order = torch.randperm(300, generator=stream)
    one = PartitionEnsemble(partitions=20, seed=4).fit((x, y)).certify(query)
    other = PartitionEnsemble(partitions=20, seed=4).fit((x[order], y[order])).certify(query)
    assert torch.equal(one.votes, other.votes)
    assert bool((one.radius >= 0).all()) and int(one.radius.max()) > 3
    same_sum = torch.zeros(40, 6)
    same_sum[torch.arange(40), torch.arange(40) % 6] += 1.0 + torch.arange(40.0)
    same_sum[torch.arange(40), (torch.arange(40) + 1) % 6] -= 1.0 + torch.arange(40.0)
    parts = PartitionEnsemble(partitions=20, seed=4)
    names = sanitize.partition_ensemble._digests(same_sum, 4)
    used = {int.from_bytes(name, "big") % parts.models for name in names}
    assert len(used) > 10


def test_d13_no_device_is_hard_wired():
    folder = Path(aidefend.__file__).parent / "sanitize"
    wired = [path.name for path in folder.rglob("*.py") if re.search(r"\.cuda\(|device=[\"']cuda", path.read_text())]
    assert wired == []


def test_the_list_is_complete():
    names = [name for name in globals() if re.match(r"test_d\d+_", name)]
    assert sorted(int(re.match(r"test_d(\d+)", name)[1]) for name in names) == list(range(1, 14))
    assert all(a != b for a, b in itertools.pairwise(names))
