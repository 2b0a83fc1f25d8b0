"""`import aidefend` costs milliseconds, and a room loads no optional library and no other room before it is used."""

import json
import re
import subprocess
import sys

import pytest

SECONDS = 0.3  # for `import aidefend`, the best of three; about 0.01 on an idle machine
ALONE = """
import importlib, json, sys
found = {}
for room in sys.argv[1:]:
    for name in [name for name in sys.modules if name.startswith("aidefend")]:
        del sys.modules[name]
    importlib.import_module(f"aidefend.{room}".rstrip("."))
    found[room] = sorted(sys.modules)
print(json.dumps(found))
"""
OPTIONAL = {
    *(
        "opacus",
        "matplotlib",
        "jinja2",
        "cryptography",
        "prometheus_client",
        "pandas",
        "pyarrow",
        "PIL",
        "ray",
        "faiss",
    ),
    *(
        "redis",
        "datasets",
        "lightning",
        "transformers",
        "accelerate",
        "stix2",
        "jsonschema",
        "sklearn",
        "dp_accounting",
    ),
}
ROOMS = [
    *("adversarial", "artifacts", "attacks", "audit", "collaborate", "datasets", "explain", "monitor", "privacy"),
    *("sanitize", "validate"),
]


def run(*arguments, folder):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def loaded(repository):
    """Per room, and for the top level (""), the modules that are there after its import."""
    rooms = [room for room in ROOMS if (repository / "aidefend" / room).is_dir()]
    result = run("-c", ALONE, "", *rooms, folder=repository)
    assert result.returncode == 0, result.stderr
    return {room: set(names) for room, names in json.loads(result.stdout).items()}


def rooms_in(names):
    return {name.split(".")[1] for name in names if name.startswith("aidefend.")} - {"_core"}


def test_the_top_level_loads_neither_torch_nor_a_subpackage(loaded):
    assert "aidefend" in loaded[""]
    assert [name for name in loaded[""] if name.startswith("aidefend.")] == []
    assert loaded[""] & {"torch", "numpy", "scipy", "tqdm", "safetensors", *OPTIONAL} == set()


def test_import_takes_milliseconds(repository):
    runs = [run("-X", "importtime", "-c", "import aidefend", folder=repository).stderr for _ in range(3)]
    microseconds = [int(re.search(r"\| +(\d+) \| aidefend$", text, re.MULTILINE)[1]) for text in runs]
    assert min(microseconds) < SECONDS * 1e6


def test_a_room_loads_no_optional_library(loaded):
    assert "torch" in loaded["attacks"]
    assert {room: names & OPTIONAL for room, names in loaded.items() if names & OPTIONAL} == {}


def test_a_room_loads_no_other_room(loaded):
    assert "aidefend.monitor.audit_log" in loaded["monitor"]
    allowed = {room: {room, "attacks"} if room == "audit" else {room} for room in loaded}
    assert {
        room: rooms_in(names) - allowed[room] for room, names in loaded.items() if rooms_in(names) - allowed[room]
    } == {}
