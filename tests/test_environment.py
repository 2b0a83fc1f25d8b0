"""What `make` does before it runs anything: .venv is made once, stamped last, and never trusted half-built.

The real script runs with a stand-in for Python whose `-m venv` and `-m pip` only take notes.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

STAND_IN = """#!/bin/sh
case "$*" in
*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> notes ;;
*"-m pip install"*constraints.txt*) echo "pip $*" >> notes; cat .pip-does 2>/dev/null | sh -s; exit $? ;;
*"-m pip install"*) ;;
*version_info*) [ ! -e .too-old ] && exec {python} "$@"; exit 1 ;;
*ensurepip*) [ ! -e .no-ensurepip ] ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path, repository):
    """A folder with spaces and a quote in its name that holds what the script reads."""
    root = tmp_path / "a dir  with 'spaces"
    (root / "scripts").mkdir(parents=True)
    for name in ("Makefile", "scripts/environment.sh"):
        (root / name).write_text((repository / name).read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_text("as it is\n")
    stand_in = root / "stand-in"
    stand_in.write_text(STAND_IN.format(python=f"'{sys.executable}'"))
    stand_in.chmod(0o755)
    return root


def environment(clone):
    return {**os.environ, "PYTHON": "./stand-in"}


def install(clone, extra="dev"):
    command = ["sh", "scripts/environment.sh", extra]
    return subprocess.run(command, cwd=clone, env=environment(clone), capture_output=True, text=True, check=False)


def notes(clone):
    """The words venv and pip in the order in which they ran, since the last look."""
    path = clone / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[0] for line in lines]


def test_the_second_run_installs_nothing(clone):
    first = install(clone)
    assert first.returncode == 0, first.stderr
    assert notes(clone) == ["venv", "pip"]
    second = install(clone)
    assert (second.returncode, second.stdout, notes(clone)) == (0, "", [])


def test_an_extra_serves_those_it_contains_and_no_others(clone):
    install(clone, "dev")
    notes(clone)
    assert install(clone, "demo").returncode == 0
    assert notes(clone) == []
    assert install(clone, "dev-docs").returncode == 0
    assert notes(clone) == ["pip"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(name, clone):
    install(clone)
    notes(clone)
    (clone / name).write_text("changed\n")
    assert install(clone).returncode == 0
    assert notes(clone) == ["pip"]


def test_a_moved_clone_is_installed_again(clone):
    install(clone)
    notes(clone)
    moved = clone.rename(clone.parent / "moved")
    assert install(moved).returncode == 0
    assert notes(moved) == ["pip"]


def test_a_refused_installation_is_tried_again_in_the_same_environment(clone):
    (clone / ".pip-does").write_text("exit 1\n")
    failed = install(clone)
    assert failed.returncode == 1
    assert "The installation was refused" in failed.stderr
    assert notes(clone) == ["venv", "pip"]
    (clone / ".pip-does").unlink()
    assert install(clone).returncode == 0
    assert notes(clone) == ["pip"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_installation_cut_short_is_not_trusted(sent, clone):
    (clone / ".pip-does").write_text("touch running; sleep 60\n")
    command = ["sh", "scripts/environment.sh", "dev"]
    process = subprocess.Popen(
        command,
        cwd=clone,
        env=environment(clone),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (clone / "running").exists():
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    assert process.wait() != 0
    assert notes(clone) == ["venv", "pip"]
    (clone / ".pip-does").unlink()
    again = install(clone)
    assert again.returncode == 0
    assert "cut short" in again.stdout
    assert notes(clone) == ["venv", "pip"]
    assert install(clone).stdout == ""


def test_a_broken_interpreter_is_replaced(clone):
    install(clone)
    notes(clone)
    (clone / ".venv" / "bin" / "python").write_text("#!/no/such/python\n")
    assert install(clone).returncode == 0
    assert notes(clone) == ["venv", "pip"]


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        (".too-old", "Expected Python 3.10 or newer, got PYTHON=./stand-in"),
        (".no-ensurepip", "apt install python3-venv"),
    ],
)
def test_an_unfit_python_is_named_with_the_cure(obstacle, message, clone):
    (clone / obstacle).touch()
    result = install(clone)
    assert result.returncode == 1
    assert message in result.stderr
    assert not (clone / ".venv").exists()


def test_make_works_from_elsewhere_and_says_what_is_missing(clone, tmp_path):
    command = ["make", "-f", str(clone / "Makefile"), "PYTHON=/no/such/python"]
    listed = subprocess.run(
        ["make", "-f", str(clone / "Makefile")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "make demo" in listed.stdout
    refused = subprocess.run([*command, "test"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "got PYTHON=/no/such/python, which does not run" in refused.stderr


@pytest.mark.parametrize("name", ["", "nope", "no pe'x", "../tests/worlds"])
def test_an_unknown_benchmark_is_named_before_anything_is_installed(clone, repository, name):
    (clone / "benchmarks").mkdir()
    (clone / "benchmarks" / "speed.py").write_text('if __name__ == "__main__": ...\n')
    command = ["make", "bench", f"NAME={name}"]
    run = subprocess.run(command, cwd=clone, env=environment(clone), capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert f'got NAME="{name}"' in run.stdout and "  speed\n" in run.stdout
    assert notes(clone) == []
