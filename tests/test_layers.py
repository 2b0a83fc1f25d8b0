"""The import contracts of pyproject.toml hold, and each catches a planted violation."""

import os
import subprocess
import sys

import pytest

CHECK = "from importlinter.cli import lint_imports_command as check; check()"
HOUSE = ["__init__", "__main__", "_core/__init__", "attacks/__init__", "audit/__init__", "monitor/__init__"]
HOUSE += ["privacy/__init__", "sanitize/__init__", "demo/__init__"]
ALLOWED = {
    "__main__": "import aidefend.audit, aidefend.demo, aidefend.privacy",
    "demo/__init__": "import aidefend.audit, aidefend.attacks, aidefend.monitor",
    "audit/__init__": "import aidefend._core, aidefend.attacks",
    "privacy/__init__": "import aidefend._core\n\n\ndef work():\n    import opacus",
}
FORBIDDEN = {
    "_core knows a room": ("_core/__init__", "import aidefend.attacks"),
    "a room knows another": ("sanitize/__init__", "import aidefend.monitor"),
    "a room knows another inside a function": ("sanitize/__init__", "def work():\n    import aidefend.monitor"),
    "a room knows another for its types": (
        "sanitize/__init__",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import aidefend.monitor",
    ),
    "attacks know a defense": ("attacks/__init__", "import aidefend.sanitize"),
    "a defense knows attacks": ("sanitize/__init__", "import aidefend.attacks"),
    "audit knows a defense": ("audit/__init__", "import aidefend.privacy"),
    "a defense knows audit": ("privacy/__init__", "import aidefend.audit"),
    "a room knows the program": ("monitor/__init__", "import aidefend.demo"),
    "opacus outside privacy": ("sanitize/__init__", "def work():\n    from opacus import GradSampleModule"),
    "a room that no contract lists": ("novelty", "import aidefend._core"),
}


def judge(folder):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", CHECK, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def house(tmp_path, repository):
    """A house of the same rooms, whose imports are all allowed."""
    for name in HOUSE:
        path = tmp_path / "aidefend" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ALLOWED.get(name, "") + "\n")
    (tmp_path / "pyproject.toml").write_text((repository / "pyproject.toml").read_text())
    return tmp_path


def test_the_house_keeps_its_contracts(repository):
    result = judge(repository)
    assert result.returncode == 0, result.stdout


def test_what_is_allowed_passes(house):
    result = judge(house)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("violation", FORBIDDEN)
def test_a_planted_violation_is_caught(violation, house):
    name, line = FORBIDDEN[violation]
    with (house / "aidefend" / f"{name}.py").open("a") as file:
        file.write(line + "\n")
    result = judge(house)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout or "missing layers" in result.stdout + result.stderr
