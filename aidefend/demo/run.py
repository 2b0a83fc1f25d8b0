"""Runs the chapters, prints what happens, and writes the report: all of it or nothing."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from aidefend import __version__
from aidefend._core.checks import check_int, check_path, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.evidence import Evidence
from aidefend._core.storage import write_atomic
from aidefend.audit import Section, render_page
from aidefend.demo.evasion import evasion
from aidefend.demo.explaining import explaining
from aidefend.demo.files import files
from aidefend.demo.inputs import inputs
from aidefend.demo.inverting import inverting
from aidefend.demo.operations import operations
from aidefend.demo.poisoning import poisoning
from aidefend.demo.private import membership
from aidefend.demo.sharing import sharing
from aidefend.demo.terminal import summary_table
from aidefend.demo.world import Chapter, Tell, World, open_world

CHAPTERS: tuple[tuple[str, Callable[[World, Tell], Chapter]], ...] = (
    ("data poisoning", poisoning),
    ("adversarial examples", evasion),
    ("privacy and membership inference", membership),
    ("model inversion", inverting),
    ("input validation", inputs),
    ("model files", files),
    ("access, budget and log", operations),
    ("explainability", explaining),
    ("collaboration", sharing),
)
INTERRUPTED = 130


def run(data: str | None = None, out: str = "aidefend-demo", seed: int = 0) -> int:
    """Run the whole demo and write report.html and report.json into `out`.

    Args:
        data: None for the embedded digits, "mnist" or "fashion-mnist" for a copy in the usual places, or a path.
        out: Folder of the report, made if missing.
        seed: Of everything but the noise of differential privacy and the keys, which are never seeded.
    Returns: Exit code: 0, or 130 after Ctrl-C, when nothing was written.
    Raises: AidefendError: data not found or malformed, folder cannot be made.
    """
    check_int(seed, "seed", 0)
    folder = check_path(out, "out")
    _check_folder(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny: more threads mostly wait for one another
    try:
        return _run(data, folder, seed)
    except KeyboardInterrupt:
        print(f"\nInterrupted. No report was written to {folder}.", file=sys.stderr)
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)


def _check_folder(folder: Path) -> None:
    """Refuse at once what could not be written minutes later; nothing is made yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        rule = "out to be a folder that can be made or written"
        raise refuse(rule, "out", str(folder), f"{there} is none: pass another --out", AidefendError)


def _run(data: str | None, folder: Path, seed: int) -> int:
    started = time.monotonic()
    world = open_world(data, seed)
    _say(f"aidefend {__version__}: {world.source}")
    _say(f"{len(world.train)} training and {len(world.test)} test samples, seed {seed}")
    chapters = []
    for number, (name, play) in enumerate(CHAPTERS, start=1):
        _say(f"\n[{number}/{len(CHAPTERS)}] {name}")
        begun = time.monotonic()
        chapters.append(play(world, _tell))
        _tell(f"({time.monotonic() - begun:.0f} s)")
    _say("\n" + summary_table([row for chapter in chapters for row in chapter.rows]))
    seconds = time.monotonic() - started
    _write(folder, chapters, world, seconds)
    _say(f"\n{folder / 'report.html'} and {folder / 'report.json'} written, {seconds:.0f} s in all")
    return 0


def _write(folder: Path, chapters: list[Chapter], world: World, seconds: float) -> None:
    metadata = {"version": __version__, "data": world.source, "seed": world.seed, "run": {"seconds": round(seconds)}}
    evidence = Evidence((finding for chapter in chapters for finding in chapter.evidence.findings), metadata)
    page = render_page(
        "What aidefend measured",
        [row for chapter in chapters for row in chapter.rows],
        [Section(c.title, c.text, figures=c.figures, findings=c.evidence.findings) for c in chapters],
        subtitle=f"{world.source}; {len(world.train)} training and {len(world.test)} test samples; seed {world.seed}",
        metadata={"aidefend": __version__, "evidence digest": evidence.digest, "seconds": f"{seconds:.0f}"},
        notes=["Every number was measured in this run, on held-out data, with its interval and n beside it below."],
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AidefendError(f"Expected a folder that can be made, got out={str(folder)!r}. {error}.") from error
    evidence.to_json(folder / "report.json")
    write_atomic(folder / "report.html", page)


def _say(text: str) -> None:
    print(text, flush=True)


def _tell(text: str) -> None:
    print(f"      {text}", flush=True)
