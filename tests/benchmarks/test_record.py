import json

import pytest

from benchmarks import record


def test_the_file_names_versions_seeds_and_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    path = record.write_result("planted", {"value": 0.5}, seeds=[0, 1], packages=["pytest", "no-such-package"])
    written = json.loads(path.read_text())
    assert written["result"] == {"value": 0.5}
    assert written["setting"]["seeds"] == [0, 1]
    assert written["setting"]["versions"]["pytest"] == pytest.__version__
    assert written["setting"]["versions"]["no-such-package"] is None
    assert written["setting"]["hardware"]["cores"] >= 1
    assert written["setting"]["hardware"]["processor"]
