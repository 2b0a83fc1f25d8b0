"""The benchmark of outputs: a network answers equal batches once, and figures over seeds are mean, least and most."""

import torch

from benchmarks.validate_outputs import MODES, Remembered, answers_of, summary


def test_equal_batches_are_computed_once_and_answers_are_the_callers_own():
    calls = []
    network = torch.nn.Linear(3, 2)
    remembered = Remembered(lambda x: calls.append(len(x)) or network(x))
    x = torch.rand(2500, 3, generator=torch.Generator().manual_seed(0))
    first = remembered(x)
    assert calls == [1000, 1000, 500] and torch.equal(first, torch.cat([network(part) for part in x.split(1000)]))
    kept = first.clone()
    first.zero_()
    assert torch.equal(remembered(x.clone()), kept) and len(calls) == 3
    assert len(remembered(x[:1000])) == 1000 and len(calls) == 4
    assert not torch.equal(remembered(x + 1e-6), kept) and len(calls) == 7


def test_every_mode_shows_the_class_of_the_logits():
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    kinds = {name.split("(")[0] for name in MODES}
    assert kinds == {"logits", "LabelOnly", "TopK", "Rounded", "Tempered", "KeyedNoise", "ReverseSigmoid"}
    for name, output in MODES.items():
        shown = answers_of(lambda _: logits, output)(x)
        assert shown.shape == (50, 10)
        assert "free" in name or torch.equal(shown.argmax(dim=1), logits.argmax(dim=1)), name


def test_figures_over_seeds():
    def row(seed, agreement, lira):
        copies = [{"budget": 250, "agreement": agreement, "clone_accuracy": agreement / 2}]
        return {"mode": "logits", "seed": seed, "accuracy": 0.5, "clones": copies, "membership": {"lira": lira}}

    (found,) = summary([row(0, 0.6, 0.5), row(1, 0.8, 0.75), row(2, 1.0, 1.0)])
    assert found["seeds"] == 3 and found["accuracy"] == [0.5, 0.5, 0.5]
    assert [round(v, 9) for v in found["clones"][0]["agreement"]] == [0.8, 0.6, 1.0]
    assert found["clones"][0]["budget"] == 250 and found["membership"]["lira"] == [0.75, 0.5, 1.0]
