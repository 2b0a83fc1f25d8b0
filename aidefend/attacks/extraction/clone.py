"""Model extraction: train a copy from the answers to a limited number of queries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aidefend._core.checks import check_int, check_not_empty, check_number, check_tensor, refuse
from aidefend._core.errors import BudgetExceeded
from aidefend._core.modules import Model
from aidefend._core.random import derive_seed
from aidefend._core.stats import Interval, wilson
from aidefend.attacks.membership.outputs import ask, joined
from aidefend.attacks.membership.training import isolated_streams

StudentFn = Callable[[int], nn.Module]


@dataclasses.dataclass(frozen=True, eq=False)
class ExtractionResult:
    """The copy and what it cost.

    Args:
        student: The trained copy in eval mode; None if the victim answered nothing.
        queries_used: Rows that the victim answered.
        stopped: Why the queries ended early, empty if they did not.
    """

    student: nn.Module | None
    queries_used: int
    stopped: str

    def agreement(self, victim: Model, x: Tensor) -> Interval:
        """Share of rows on which copy and victim name the same class, with its Wilson interval.

        The rows must not be among the queries. Without a copy the share is 0.
        """
        check_not_empty(len(check_tensor(x, "x", finite=False)), "x")
        if self.student is None:
            return wilson(0, len(x))
        same = ask(victim, x).argmax(dim=1) == ask(self.student, x).argmax(dim=1)
        return wilson(int(same.sum()), len(x))


@dataclasses.dataclass(frozen=True)
class Extraction:
    """Asks the victim about samples of the adversary's own and fits a copy to the answers.

    Guarantee: none. The agreement is a lower bound on what an adversary with such samples and so many queries reaches.
    Args:
        student_fn: `student_fn(seed) -> nn.Module`, an untrained copy; any architecture.
        queries: Rows that the adversary may ask about, >= 1.
        query_batch: Rows a call to the victim.
        epochs: Passes over the answers.
        batch_size: Rows a training step.
        learning_rate: Of Adam.
    Raises: ConfigurationError: numbers out of range; fewer samples than queries.
    Cost: `queries` rows through the victim, epochs * queries rows through the copy and back.

    Source: Tramer, Zhang, Juels, Reiter, Ristenpart 2016; Orekondy, Schiele, Fritz 2019 (random strategy).

    Example:
        >>> attack = Extraction(lambda seed: torch.nn.Linear(1, 2), queries=64, epochs=60, learning_rate=0.1)
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> result = attack(lambda x: torch.cat([x, -x], dim=1), x, seed=0)
        >>> result.queries_used, result.agreement(lambda x: torch.cat([x, -x], dim=1), x + 0.01).value > 0.9
        (64, True)
    """

    student_fn: StudentFn
    queries: int
    query_batch: int = 64
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not callable(self.student_fn):
            raise refuse("student_fn to be callable", "student_fn", self.student_fn, "Pass student_fn(seed) -> module")
        for name in ("queries", "query_batch", "epochs", "batch_size"):
            check_int(getattr(self, name), name)
        check_number(self.learning_rate, "learning_rate", 0.0, open_low=True)

    def __call__(self, victim: Model, x: Tensor, *, seed: int = 0) -> ExtractionResult:
        """Steal the victim.

        Args:
            victim: Any callable from (N, ...) to logits or probabilities (N, K). `BudgetExceeded` ends the queries.
            x: (M, ...) the adversary's samples, M >= queries; a random part of them is asked.
            seed: Chooses the samples, the copy's start and its batches.
        """
        check_tensor(x, "x")
        if len(x) < self.queries:
            raise refuse(f"at least {self.queries} samples", "x", x, "Pass more samples or lower queries")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(derive_seed(seed, "queries")))
        asked = x[order[: self.queries]]
        answers, stopped = self._query(victim, asked)
        if not len(answers):
            return ExtractionResult(None, 0, stopped)
        student = self._fit(asked[: len(answers)], answers, seed)
        return ExtractionResult(student, len(answers), stopped)

    def _query(self, victim: Model, x: Tensor) -> tuple[Tensor, str]:
        answers: list[Tensor] = []
        stopped = ""
        for part in x.split(self.query_batch):
            try:
                answers.append(ask(victim, part, len(part)))
            except BudgetExceeded as error:
                stopped = f"BudgetExceeded: {error}"
                break
        return (joined(answers) if answers else torch.zeros(0, 0)), stopped

    def _fit(self, x: Tensor, answers: Tensor, seed: int) -> nn.Module:
        """Cross-entropy against the answered probabilities; the user's random streams stay as they are."""
        chosen = derive_seed(seed, "student") % 2**31
        with torch.inference_mode(False), torch.enable_grad(), isolated_streams(chosen):
            student = self.student_fn(chosen)
            answers = _check_student(student, x, answers)
            student.train()
            optimizer = torch.optim.Adam(student.parameters(), lr=self.learning_rate)
            for _ in range(self.epochs):
                for rows in torch.randperm(len(x)).split(self.batch_size):
                    if len(rows) == 1 < len(x):
                        continue  # batch normalisation cannot train on one row
                    loss = functional.cross_entropy(student(x[rows]), answers[rows].exp().to(x))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return student.eval()


def _check_student(student: Any, x: Tensor, answers: Tensor) -> Tensor:
    """The answers with a column for each class of the copy; refuses a copy that cannot learn them."""
    if not isinstance(student, nn.Module) or not any(True for _ in student.parameters()):
        cure = "Return a fresh nn.Module with parameters"
        raise refuse("student_fn to return a module that can be trained", "student_fn(...)", student, cure)
    classes = ask(student.eval(), x[:1]).shape[1]
    if classes < answers.shape[1]:
        rule = f"student_fn to return a module with at least {answers.shape[1]} classes, as the victim has"
        raise refuse(rule, "student_fn(...)", f"{classes} classes", "Give the copy one output for each class")
    return joined([answers], classes)
