"""Writes a benchmark's result with everything that the figures depend on."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from aidefend._core.storage import pretty_json, write_atomic

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("aidefend", "torch", "numpy", "scipy", "opacus")


def write_result(name: str, result: Mapping[str, Any], *, seeds: Sequence[int], packages: Sequence[str] = ()) -> Path:
    """Write `result` with versions, seeds and hardware to benchmarks/results/NAME.json and return the path.

    Args:
        name: Of the benchmark: its module's name.
        result: JSON values, such as `{"timing": comparison.rows(), "accuracy": ...}`.
        seeds: All seeds that the run used.
        packages: Distributions, beyond those always named, whose versions matter: the peers.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    versions = {package: _version(package) for package in (*PACKAGES, *packages)}
    setting = {"versions": versions, "seeds": list(seeds), "hardware": hardware(), "commit": _commit()}
    write_atomic(path, pretty_json({"benchmark": name, "setting": setting, "result": dict(result)}))
    return path


def earlier(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The last result of a benchmark if its settings were these, else an empty one: for runs that add to it."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())["result"] if path.exists() else {}
    return found if all(found.get(key) == value for key, value in settings.items()) else {}


def hardware() -> dict[str, Any]:
    """What the figures depend on besides versions; nothing that names the machine or its owner."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the working tree, with "+" when files differ from it."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True)  # noqa: S607
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=root, text=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed else "")
