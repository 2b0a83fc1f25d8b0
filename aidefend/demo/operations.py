"""Chapter 6: access, budget and log in front of the model; an extraction attempt runs dry, an edited log is caught."""

import tempfile
from pathlib import Path

from torch import Tensor, nn

from aidefend._core.errors import BudgetExceeded
from aidefend._core.evidence import Evidence
from aidefend._core.random import secure_uniform
from aidefend.attacks import Extraction
from aidefend.audit import SummaryRow
from aidefend.demo.world import Chapter, Tell, World, between, measured, seeded
from aidefend.monitor import AccessPolicy, AuditLog, Bucket, QueryBudget, Rule
from aidefend.validate import Energy, Guard, LabelOnly, NearestNeighbours

QUERIES, BUDGET = 500, 64


def operations(world: World, tell: Tell) -> Chapter:
    """Copy the model with 500 queries, first without and then through a guard with a budget of 64."""
    model = world.models["guarded"]
    x, _ = world.rows("test")
    pool, compared = x[:QUERIES], x[QUERIES:]
    attack = Extraction(_student, queries=QUERIES, query_batch=32)
    naive = attack(model, pool, seed=world.seed_of("extraction"))
    free = naive.agreement(model, compared)
    key = secure_uniform(4).tobytes()
    with tempfile.TemporaryDirectory(prefix="aidefend-") as folder:
        log_path, anchors = Path(folder) / "audit.jsonl", Path(folder) / "anchors.jsonl"
        log = AuditLog(log_path, key)
        with QueryBudget(Path(folder) / "budget.sqlite", Bucket(BUDGET)) as budget:
            guard = _guard(world, budget, log)
            stranger = guard(pool[:1], principal="nobody")
            limited = attack(_Client(guard, "mallory"), pool, seed=world.seed_of("extraction"))
            honest = guard(compared[:8], principal="alice")
        log.anchor(anchors)
        log.close()
        intact = AuditLog(log_path, key).verify(anchors)
        edited = _edited(log_path, key)
    copied = limited.agreement(model, compared)
    tell(f"copy from {naive.queries_used} answers agrees on {between(*free)} of new digits")
    tell(
        f"through the guard: {limited.queries_used} answers, then {limited.stopped or 'no stop'}; "
        f"agrees on {between(*copied)}"
    )
    tell(f"stranger refused: {stranger.reasons[0][0]}; honest client answered: {int(honest.accepted.sum())} of 8")
    tell(f"log of {intact.entries} entries verifies: {intact.ok}; one edited line: {edited}")
    findings = [
        measured(
            "extraction.agreement.undefended",
            "Copy agrees with the model",
            free,
            len(compared),
            setting={"queries": naive.queries_used},
        ),
        measured(
            "extraction.agreement.guarded",
            "Copy made through the guard agrees",
            copied,
            len(compared),
            setting={"queries": limited.queries_used, "budget": BUDGET, "outputs": "labels only"},
        ),
        measured("monitor.access_denied", "A principal without a role is refused", not bool(stranger.accepted.any())),
        measured("monitor.log_verifies", "The audit log verifies up to its anchor", intact.ok, n=intact.entries),
        measured(
            "monitor.edited_line_caught",
            "One edited line of the log is caught",
            bool(edited),
            setting={"problem": edited},
        ),
    ]
    row = SummaryRow(
        "exploitation in service",
        f"model extraction with {QUERIES} queries; an edited log",
        f"copy agrees on {between(*free)}",
        f"stopped after {limited.queries_used} answers, labels only: {between(*copied)}; "
        f"edit {'caught' if edited else 'NOT CAUGHT'}",
        "a budget slows one principal; many false identities need a total limit",
    )
    return Chapter("Access, budget and log", _TEXT, (row,), Evidence(findings))


_TEXT = (
    "Whoever may ask without end can copy a model. Here a policy decides who may ask, a budget how much, the answers "
    "are labels only, and a log keeps every call in a form that later edits cannot hide."
)


class _Client:
    """An adversary's view of the guarded model: answers, or a refusal when the budget is spent."""

    def __init__(self, guard: Guard, principal: str) -> None:
        self._guard, self._principal = guard, principal

    def __call__(self, x: Tensor) -> Tensor:
        decision = self._guard(x, principal=self._principal)
        if not bool(decision.accepted.any()):
            raise BudgetExceeded(decision.reasons[0][0])
        return decision.outputs


def _guard(world: World, budget: QueryBudget, log: AuditLog) -> Guard:
    x, _ = world.rows("train")
    held = len(x) // 3
    return Guard.calibrate(
        world.models["guarded"],
        x[:held],
        detectors=[Energy(), NearestNeighbours(k=50)],
        fit=x[held:],
        seed=world.seed,
        output=LabelOnly(),
        policy=AccessPolicy(
            [Rule("client", ("predict",), ("model",))], dict.fromkeys(("alice", "mallory"), ("client",))
        ),
        budget=budget,
        log=log,
    )


def _student(seed: int) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def _edited(path: Path, key: bytes) -> str:
    """Change one verdict in the log, as an intruder would; what verification says."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"mallory", b"alice--")
    path.write_bytes(b"".join(lines))
    return "; ".join(AuditLog(path, key).verify().problems)
