"""The command line: a thin face over the library's functions, with stable exit codes.

0: done, nothing wrong. 1: done, something wrong was found. 2: the call was malformed or a file unusable. 130: Ctrl-C.
"""

import _thread
import argparse
import contextlib
import inspect
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from aidefend import __version__
from aidefend._core.errors import AidefendError, UnsafeArtifact

_EXIT_CODES = "Exit codes: 0 nothing wrong, 1 something wrong found, 2 malformed call or unusable file, 130 Ctrl-C."
OK, FOUND, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        with _remembering_interrupts(inspect.currentframe()) as interrupts:
            return _run(arguments, interrupts)
    except KeyboardInterrupt:  # also one that came while the handler was put in place or taken away
        print("\nInterrupted. Nothing was written.", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Sequence[str] | None, interrupts: list[int]) -> int:
    try:
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except Exception as error:
        if interrupts:
            raise KeyboardInterrupt from error
        if not isinstance(error, AidefendError):
            raise
        print(f"aidefend: {error}", file=sys.stderr)
        return USAGE


@contextlib.contextmanager
def _remembering_interrupts(outside: FrameType | None) -> Iterator[list[int]]:
    """Ctrl-C; one that comes in the middle of an import waits for its end, as extension modules lose it or abort."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if not _importing(frame, outside):
            raise KeyboardInterrupt
        again = threading.Timer(0.05, _interrupt_again)
        again.daemon = True
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_again() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # ends a wait of the main thread too
    else:
        _thread.interrupt_main()


def _importing(frame: FrameType | None, outside: FrameType | None) -> bool:
    """Whether a frame between the interrupted one and `outside` belongs to the import system."""
    while frame is not None and frame is not outside:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aidefend",
        description="Defenses for AI systems: screen data, inspect and verify model files, audit models, see a demo.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"aidefend {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(verbs)
    _add_audit(verbs)
    _add_screen(verbs)
    _add_inspect(verbs)
    _add_verify(verbs)
    return parser


def _add_demo(verbs: Any) -> None:
    about = "Attack real digits, defend them with every part of the library, and write the evidence (about 5 minutes)."
    verb = verbs.add_parser(
        "demo", help="attack and defend real data, and show the evidence", description=about, epilog=_EXIT_CODES
    )
    data = "mnist or fashion-mnist (searched in the usual places), an .npz file, or a folder of IDX files"
    verb.add_argument("--data", metavar="NAME|PATH", help=f"{data}; default: the embedded digits")
    verb.add_argument(
        "--out", metavar="DIR", default="aidefend-demo", help="folder for the report (default: %(default)s)"
    )
    verb.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the run (default: %(default)s)")
    _add_json(verb)
    verb.set_defaults(command=_demo)


def _add_audit(verbs: Any) -> None:
    about = "Audit the files of a model: every file's verdict, and the folder's permissions, secrets and leftovers."
    more = "Auditing a model's behaviour needs your code: call aidefend.audit.audit(model, ...) from Python."
    verb = verbs.add_parser(
        "audit", help="audit a folder of model files", description=about, epilog=f"{more} {_EXIT_CODES}"
    )
    verb.add_argument("path", metavar="PATH", help="file or folder to audit")
    verb.add_argument("--policy", metavar="FILE", help="TOML policy that decides the exit code")
    verb.add_argument("--html", metavar="FILE", help="also write a page for readers")
    verb.add_argument("--sarif", metavar="FILE", help="also write SARIF 2.1.0 for code scanning")
    verb.add_argument("--junit", metavar="FILE", help="also write JUnit XML for CI")
    _add_json(verb)
    verb.set_defaults(command=_audit)


def _add_screen(verbs: Any) -> None:
    about = "Screen training data for structured poison, without a model and without hints. The data is not changed."
    verb = verbs.add_parser("screen", help="look for poison in training data", description=about, epilog=_EXIT_CODES)
    verb.add_argument("path", metavar="PATH", help=".npz file with train_x and train_y, or a folder of IDX files")
    verb.add_argument("--out", metavar="FILE", help="also save the report of every row (safetensors)")
    verb.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the run (default: %(default)s)")
    _add_json(verb)
    verb.set_defaults(command=_screen)


def _add_inspect(verbs: Any) -> None:
    about = "Say of every file whether it could be loaded safely, and why not. Nothing is loaded or executed."
    verb = verbs.add_parser("inspect", help="give a verdict on model files", description=about, epilog=_EXIT_CODES)
    verb.add_argument("path", metavar="PATH", help="file or folder")
    _add_json(verb)
    verb.set_defaults(command=_inspect)


def _add_verify(verbs: Any) -> None:
    about = "Compare files with a manifest. A signed manifest needs the trusted key."
    verb = verbs.add_parser("verify", help="check files against a manifest", description=about, epilog=_EXIT_CODES)
    verb.add_argument("path", metavar="PATH", help="file or folder that the manifest covers")
    verb.add_argument("--manifest", metavar="FILE", required=True, help="the manifest")
    verb.add_argument(
        "--key", metavar="FILE", help="trusted key: an Ed25519 public key (PEM), or the bytes of an HMAC key"
    )
    _add_json(verb)
    verb.set_defaults(command=_verify)


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")


def _demo(options: argparse.Namespace) -> int:
    from aidefend.demo import run

    if not options.json:
        return run(options.data, options.out, options.seed)
    with contextlib.redirect_stdout(sys.stderr):
        code = run(options.data, options.out, options.seed)
    if code == OK:
        print(Path(options.out, "report.json").read_text("utf-8"), end="")
    return code


def _audit(options: argparse.Namespace) -> int:
    from aidefend import Severity
    from aidefend._core.checks import check_path
    from aidefend.artifacts import inspect_artifact
    from aidefend.audit import AuditReport, Policy, audit_artifacts, audit_storage

    path = check_path(options.path)
    policy = Policy.read(options.policy) if options.policy else None
    evidence = audit_artifacts(path=path, inspector=inspect_artifact)
    if path.is_dir():
        evidence += audit_storage(path)
    report = AuditReport(evidence)
    for name in ("html", "sarif", "junit"):
        if getattr(options, name):
            getattr(report, f"to_{name}")(getattr(options, name))
    print(evidence.to_json() if options.json else evidence.to_markdown(), end="")
    if policy is not None:
        result = report.passed(policy)
        for problem in result.problems:
            print(problem, file=sys.stderr)
        return int(result.exit_code)
    return FOUND if evidence.worst >= Severity.MEDIUM else OK


def _screen(options: argparse.Namespace) -> int:
    from aidefend.datasets import load
    from aidefend.sanitize import screen

    report = screen(load(Path(options.path)).train, seed=options.seed)
    if options.out:
        report.save(options.out)
    print(report.to_evidence().to_json() if options.json else report.summary() + "\n", end="")
    return OK if bool(report.keep.all()) else FOUND


def _inspect(options: argparse.Namespace) -> int:
    from aidefend import Severity
    from aidefend.artifacts import inspect_artifact

    evidence = inspect_artifact(options.path)
    print(evidence.to_json() if options.json else evidence.to_markdown(), end="")
    return FOUND if evidence.worst >= Severity.MEDIUM else OK


def _verify(options: argparse.Namespace) -> int:
    from aidefend.artifacts import Manifest

    manifest = Manifest.load(options.manifest)
    problem = ""
    try:
        manifest.verify(options.path, key=_key(options.key))
    except UnsafeArtifact as error:
        problem = str(error)
    if options.json:
        print(json.dumps({"ok": not problem, "problem": problem}))
    else:
        print(problem or f"{options.path}: as the manifest says, {'signed' if options.key else 'not signed'}")
    return FOUND if problem else OK


def _key(path: str | None) -> Any:
    """A public key if the file is PEM, else the bytes themselves."""
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise AidefendError(f"Expected a readable key file, got key={path!r}. {error}.") from error
    if not content.startswith(b"-----BEGIN"):
        return content
    try:
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        from aidefend._core.errors import MissingExtra

        raise MissingExtra("cryptography", "sign") from error
    try:
        return load_pem_public_key(content)
    except Exception as error:  # ValueError, UnsupportedAlgorithm: whatever a damaged file meets
        message = f"Expected a PEM file with a public key, got key={path!r}. Could not read it ({error})."
        raise AidefendError(message) from error


if __name__ == "__main__":
    sys.exit(main())
