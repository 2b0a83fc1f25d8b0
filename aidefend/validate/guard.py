"""A model with input validation in front of it and hardened outputs behind it."""

import contextlib
import dataclasses
import functools
import os
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_choice, check_kind, refuse
from aidefend._core.evidence import Evidence
from aidefend._core.modules import Model
from aidefend._core.stats import Interval
from aidefend.validate.attackable import AttackableGuard, refused_share
from aidefend.validate.calibrating import Calibrated, calibrate, check_mode
from aidefend.validate.calibration_record import calibration_evidence, in_force, summarise
from aidefend.validate.collaborators import (
    Admission,
    Budget,
    Collaborators,
    Drift,
    Log,
    MetricsSink,
    Policy,
    Queries,
    check_band,
    failure,
    plain_principal,
)
from aidefend.validate.conformal_law import Mode as Promise
from aidefend.validate.decision import GuardDecision, Verdict, all_answered, barred, decide, refuse_whole
from aidefend.validate.detector import Detector, unique_names
from aidefend.validate.exact_calibration import kept_dtypes
from aidefend.validate.features import PassCapture
from aidefend.validate.guard_file import read_guard, write_guard
from aidefend.validate.judging import Mode, Panel, blank_row, judge
from aidefend.validate.logit_scores import Energy
from aidefend.validate.model_identity import layer_of, served
from aidefend.validate.nearest_neighbours import NearestNeighbours
from aidefend.validate.outputs import Output
from aidefend.validate.recalibrating import recalibrated
from aidefend.validate.settling import Call, settle
from aidefend.validate.spec import InputSpec
from aidefend.validate.spec_header import count_rows
from aidefend.validate.tasks import TASKS, Task, blank_answer, check_company

_MODES = ("enforce", "monitor", "shadow")
_DETECTORS = (Energy(), NearestNeighbours(k=50))


class _Asked(NamedTuple):
    """Who asks, what was reserved, and what was in force when the call began."""

    principal: str | None
    admission: Admission
    collaborators: Collaborators
    panel: Panel


class Guard(nn.Module):
    """A model behind input checks, detectors with an exact rate of false positives, and hardened outputs.

    Build one with `Guard.calibrate` or `Guard.load`. A call goes through these steps, and stops at the first refusal of
    the whole batch: policy, budget, input specification, one pass of the model with all detectors, query monitor,
    hardening of the outputs, drift monitor, audit log, settlement of the budget, metrics.

    | mode | refused rows get no answer if they fail | outputs |
    |---|---|---|
    | enforce | access, budget, specification, finite outputs, detectors, query monitor | hardened |
    | monitor | access, budget, specification, finite outputs; detectors and query monitor only remark | hardened |
    | shadow | access, budget, faults of the batch (shape, dtype, caps); all else only remarks | as the bare model's |

    In every mode, what is not on record is not delivered: a log or metrics that fail refuse the call.

    Guarantee: (1) A clean row that is exchangeable with the calibration rows and satisfies the specification is
        refused by the detectors with probability at most alpha: on average, in each predicted class, or for this very
        calibration set, as `promise` says (see `Calibration`); drift voids it. (2) No input
        raises, whatever its type or content. Outside mode "shadow", a row that breaks a rule of the specification never
        reaches the model, so it cannot harm its batch mates. A row that makes the model itself raise refuses its whole
        batch. (3) It fails closed: an exception in policy, budget, monitors, log, metrics, model, detectors or
        hardening refuses every row; the units are returned if the model had not run. In the modes "monitor" and
        "shadow", one in monitors or detectors is a remark on every row, and changes no answer. (4) Nothing about
        adversarial inputs: an attacker who knows the detectors can pass them. Measure how far with `attackable()`.
    Threads may call one guard at the same time. Verdicts, and the time they take, tell an attacker what passes: give
    clients `accepted` and `outputs` alone, and a budget.
    """

    def __init__(
        self,
        model: Model,
        parts: Calibrated,
        mode: Mode = "enforce",
        output: Output | None = None,
        collaborators: Collaborators | None = None,
    ) -> None:
        super().__init__()
        check_choice(mode, _MODES, "mode")
        check_mode(model)
        facts = parts.facts
        model, layer = served(model), layer_of(model, facts.layer)
        self.model, self.spec, self.mode, self.output = model, parts.spec, mode, output
        self.collaborators = collaborators or Collaborators()
        self.facts, self.detectors, self.calibration = facts, parts.detectors, parts.calibration
        for name, detector in zip(unique_names(parts.detectors), parts.detectors, strict=True):
            if isinstance(detector, nn.Module):
                self.add_module(f"detector_{name}", detector)
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self._switches = [module for module in modules if hasattr(module, "training")]  # frozen TorchScript has none
        check_company(facts.task, output, self.collaborators.queries)
        check_band(self.collaborators.drift, parts.calibration.n)
        answer = blank_answer(facts.num_classes, getattr(torch, facts.logits_dtype))
        self._blank = blank_row(answer, parts.spec.smallest_row(), output, mode)
        self._capture = PassCapture(model, layer, facts.task)
        weakref.finalize(self, self._capture.close)  # a guard that is dropped without close leaves no hook either
        self._closed = False
        self.eval()

    @classmethod
    def calibrate(
        cls,
        model: Model,
        calibration_loader: Any,
        spec: InputSpec | None = None,
        detectors: Sequence[Detector] = _DETECTORS,
        alpha: float = 0.01,
        fit: Any = None,
        layer: str | nn.Module | None = None,
        train_ids: Collection[str] | None = None,
        *,
        seed: int = 0,
        mode: Mode = "enforce",
        output: Output | None = None,
        policy: Policy | None = None,
        budget: Budget | None = None,
        log: Log | None = None,
        metrics: MetricsSink | None = None,
        queries: Queries | None = None,
        drift: Drift | None = None,
        resource: str = "model",
        promise: Promise = "marginal",
        delta: float = 0.05,
        batch_size: int = 256,
        task: Task = "classification",
    ) -> "Guard":
        """Fit the detectors and calibrate the decision on clean rows.

        The calibration rows are split by content and seed. Without `fit`, 40 % of them fit the detectors. With several
        detectors, a fifth of the rest (20 to 500 rows) puts their scores on one scale. All others calibrate: they are
        the n of the guarantee. Equal inputs stay in one part, but for those that occur more than ten times as often as
        the median input: traffic brings them again and again, so they are in every part.
        Args:
            model: Returns logits (N, K >= 2); in eval mode. May be compiled; if it ran before, call
                torch.compiler.reset(), since compiled code keeps no place for a new hook. Any callable will do where
                no detector reads features.
            calibration_loader: Clean rows that were held out from training, in any form that `Dataset`s, loaders and
                tensors have; labels are optional. Held in memory. Rows that break `spec` are counted and left out.
            spec: Hard rules; None infers them from the rows that fit the detectors.
            detectors: Configurations, at least one.
            alpha: Rate of false positives of the whole decision, in (0, 1).
            fit: Other clean rows for the detectors, for example training data; none of the calibration rows, but for
                inputs that traffic brings again and again (see above).
            layer: The module whose input is the feature vector, or its name; None = the Linear that runs last.
            train_ids: Content ids of the training rows: calibration rows among them are refused, again but for such
                inputs. An id depends on dtype and shape, so take ids of rows as the model sees them.
            seed: Of the split.
            mode: See the class.
            output: A callable from logits (N, K) to N rows, such as `LabelOnly()`; None = the logits themselves. One
                with `uses_inputs = True`, such as `KeyedNoise`, is called with (logits, x).
            policy: Has the method of `Policy`; with one, a call without a principal is refused.
            budget: Has the methods of `Budget`; one unit a row; with one, a call without a principal is refused.
            log: Has the method of `Log`.
            metrics: Has the method of `MetricsSink`.
            queries: Has the method of `Queries`, such as `QueryMonitor`; with one, a call without a principal is
                refused.
            drift: Has the method of `Drift`, such as `DriftMonitor(calibration_n=...)`; see `follow`.
            resource: What the policy is asked about (the action is "predict").
            promise: What holds at alpha, a mode of `Calibration`: "marginal", "class-conditional" (of the predicted
                classes) or "calibration-conditional" (for this very calibration set).
            delta: How often the last of these may fail over calibration sets, in (0, 1).
            batch_size: Rows a pass during calibration.
            task: "regression" for a model that returns numbers (N,) or (N, K): detectors then read features or inputs
                alone (by default `NearestNeighbours`), and what reads classes is refused.
        Returns: An open guard.
        Raises: ConfigurationError: too few rows for alpha (says how many), rows shared with `fit` or `train_ids`, data
                that contradicts `spec`.
            IncompatibleModel: layers in train mode, probabilities in place of logits, no such layer, outputs that
                are not finite; lists the offenders.
        Cost: One forward pass over all rows, the detectors' fits, a hash of rows and weights.
        Example:
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
            >>> rows = torch.rand(400, 4, generator=torch.Generator().manual_seed(0))
            >>> guard = Guard.calibrate(model, rows, detectors=[Energy(), NearestNeighbours(k=5)], alpha=0.05)
            >>> decision = guard(torch.stack([rows.mean(dim=0), rows[1] + 9, rows[2] * float("nan")]))
            >>> decision.accepted.tolist(), decision.reasons[1:]
            ([True, False, False], (('input: out of range',), ('input: not finite',)))
        """
        collaborators = Collaborators(policy, budget, log, metrics, resource, queries, drift)
        check_choice(mode, _MODES, "mode")
        check_choice(task, TASKS, "task")
        detectors = _DETECTORS[1:] if task == "regression" and detectors is _DETECTORS else detectors
        rows = (calibration_loader, spec, detectors, alpha, fit, layer, train_ids, seed, batch_size)
        with torch.inference_mode(False):  # tensors of that mode could never take part in a gradient
            parts = calibrate(model, *rows, promise, delta, task)
            return cls(model, parts, mode, output, collaborators)

    def forward(self, x: object, principal: str | None = None) -> GuardDecision:
        """Judge and answer one batch. Never raises because of x or of a collaborator.

        Args:
            x: (N, ...); anything else is refused as one row.
            principal: Who asks, as verified by your front end.
        Returns: A decision on every row.
        Raises: ConfigurationError: the guard was closed.
        Cost: One forward pass, a reduction over x, the detectors; a hash of each row when `report` is read.
        """
        started = time.perf_counter()
        # one look for the whole call, the monitors first: recalibration replaces them last, so that a new drift monitor
        # never sees a rank among the old calibration rows
        collaborators = self.collaborators
        panel = self._panel()
        rows, principal = count_rows(x), plain_principal(principal)
        admission = collaborators.admit(principal, rows)
        try:
            verdict, spent = self._verdict(x, rows, _Asked(principal, admission, collaborators, panel))
        except BaseException:  # an interrupt: nothing is delivered, nothing is charged
            collaborators.settle(admission, spent=False)
            raise
        call = Call(
            principal,
            admission,
            spent,
            time.perf_counter() - started,
            in_force(panel.calibration, verdict.drifted),
        )
        final = settle(collaborators, call, verdict, self._refuse)
        return decide(x, final, self.mode, call.setting, call.seconds)

    __call__: Callable[..., GuardDecision]

    def predict(self, x: object, principal: str | None = None) -> Tensor:
        """The outputs, if every row is answered.

        Raises: InputRejected: a row was refused; `.report` says which and why (for the operator, not for the client).
        """
        return all_answered(self(x, principal=principal))

    def _verdict(self, x: object, rows: int, asked: "_Asked") -> tuple[Verdict, bool]:
        """The verdict, and whether the model has run."""
        if asked.admission.refusal is not None:
            return self._refuse(rows, asked.admission.refusal), False
        step, ran, collaborators = "specification", False, asked.collaborators
        try:
            with torch.no_grad():
                checked = self.spec.check(x)
                if checked.fault is not None or checked.x is None or type(x) is not Tensor:
                    return self._refuse(rows, checked.fault or "input: not a plain tensor"), False
                if any(module.training for module in self._switches):
                    check_mode(self.model)
                shadow = self.mode == "shadow"
                every = shadow or not any(checked.reasons)
                chosen = None if every and rows else checked.accepted.nonzero().flatten()
                if chosen is not None and len(chosen) == 0:
                    nothing = self._refuse(rows, "")
                    return dataclasses.replace(nothing, reasons=checked.reasons), False
                step, ran = "model", True
                watch = functools.partial(collaborators.watch, asked.principal)
                found = judge(asked.panel, checked, Tensor.detach(x) if shadow else checked.x, chosen, watch)
                step = "drift"
                try:
                    return dataclasses.replace(found, drifted=collaborators.drifted(found.ranks)), True
                except Exception as error:
                    if self.mode == "enforce":
                        raise
                    return barred(found, failure(step, error)), True
        except Exception as error:
            return self._refuse(rows, failure(step, error)), ran

    def _check_open(self) -> None:
        if self._closed:
            raise refuse("an open guard", "guard", "closed", "Calibrate or load it again")

    def _panel(self) -> Panel:
        self._check_open()
        return Panel(self.model, self._capture, self.detectors, self.calibration, self.output, self.mode, self._blank)

    def _refuse(self, rows: int, reason: str) -> Verdict:
        return refuse_whole(rows, reason, self._blank, [*self.calibration.names, "combined"])

    def attackable(self) -> AttackableGuard:
        """The whole as one differentiable classifier (N, ...) -> (N, K + 1), whose last class is the refusal."""
        return AttackableGuard(self, self._panel, self.spec, self.facts.classes)

    def follow(self, drift: Drift | None) -> None:
        """Show a drift monitor the p-values of all rows that are scored from now on; None = no longer.

        The p-values are those of the combined statistic among all calibration rows, whatever the promise, so
        `DriftMonitor(calibration_n=guard.calibration.n)` fits. Once it raises its alarm, every decision says `drifted`
        and every event of the log "drift_alarm": the rates no longer hold, until you `recalibrate`.
        Raises: ConfigurationError: a monitor made for more calibration rows, or for none: its alarms mean nothing.
        """
        check_band(drift, self.calibration.n)
        self.collaborators = dataclasses.replace(self.collaborators, drift=drift)

    def recalibrate(
        self,
        calibration_loader: Any,
        *,
        reason: str,
        used_ids: Collection[str] | None = None,
        drift: Drift | None = None,
        batch_size: int = 256,
    ) -> None:
        """Replace the calibration rows, never the detectors. Logged first, if there is a log; then in force.

        Args:
            calibration_loader: Clean rows of today, as in `calibrate`; all of them calibrate. Rows that this guard
                accepted are no sample of clean rows.
            reason: Why, in words: for the log, and for `calibration.history`.
            used_ids: Content ids of rows that trained the model or fitted the detectors; rows among them are refused.
            drift: A new drift monitor, made for at most the new number of rows; a guard that has one needs one, since
                the old one watched the old calibration.
            batch_size: Rows a pass.
        Raises: ConfigurationError: too few rows for alpha, rows that were used, no reason, no new drift monitor; the
            old calibration stays in force.
        Cost: One forward pass over the rows, and the detectors' scores.
        """
        self._check_open()
        collaborators = self.collaborators
        given = collaborators.watched_anew(drift)
        with torch.inference_mode(False):
            parts, entry = recalibrated(
                self.model, self._capture, self._parts(), calibration_loader, reason, used_ids, batch_size
            )
        check_band(drift, parts.calibration.n)
        if collaborators.log is not None:
            collaborators.log.append({"event": "guard.recalibrated", "resource": collaborators.resource, **entry})
        self.facts, self.calibration, self.collaborators = parts.facts, parts.calibration, given

    def detection(self, x: Tensor, confidence: float = 0.95, *, batch_size: int = 256) -> Interval:
        """Share of strange rows x (N, ...) that mode "enforce" refuses, with Wilson's interval; nothing is logged."""
        return refused_share(self.attackable(), x, confidence, batch_size)

    def summary(self, rows_a_day: float | None = None) -> str:
        """What is refused, how often that happens to clean rows and, at this traffic, the false alarms a day."""
        return summarise(self.facts, self.calibration, self.mode, rows_a_day)

    def to_evidence(
        self, rows_a_day: float | None = None, strange: Mapping[str, Tensor] | None = None, *, batch_size: int = 256
    ) -> Evidence:
        """The rate of false positives with its interval, the share that the specification refused, alarms, detections.

        Args:
            rows_a_day: Clean rows a day; None leaves the alarms out.
            strange: Name to rows (N, ...) that should be refused: what share is, at the operating point.
            batch_size: Rows a pass over these.
        """
        named = check_kind({} if strange is None else strange, Mapping, "strange", "Pass {name: x}")
        found = {name: (self.detection(x, batch_size=batch_size), len(x)) for name, x in named.items()}
        return calibration_evidence(self.facts, self.calibration, self.spec, self.mode, rows_a_day, found)

    def _parts(self) -> Calibrated:
        return Calibrated(self.spec, self.detectors, self.calibration, self.facts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the model to one safetensors file: calibration, detectors, specification, output.

        The collaborators are not written, only that they were there. The file is not signed: sign it like a model.
        Raises: ConfigurationError: a detector or an output is not one of this package.
        """
        write_guard(path, self._parts(), self.mode, self.output, self.collaborators)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Model,
        *,
        output: Output | None = None,
        autoencoder: nn.Module | Sequence[nn.Module] | None = None,
        policy: Policy | None = None,
        budget: Budget | None = None,
        log: Log | None = None,
        metrics: MetricsSink | None = None,
        queries: Queries | None = None,
        drift: Drift | None = None,
    ) -> "Guard":
        """The guard back from `save`, around the very model that it was calibrated for.

        Args:
            path: A file written by `save`; nothing in it is executed.
            model: Same structure and weights as at calibration.
            output: Only where the guard was saved with `KeyedNoise`: the same again, since its key is not in the file.
            autoencoder: That of `Reconstruction`, with the same weights; a list where detectors have several.
            policy: The one that the guard had; a missing one is refused.
            budget: The same.
            log: The same.
            metrics: The same.
            queries: The same.
            drift: The same.
        Raises: ConfigurationError: another model, autoencoder or other weights, a missing collaborator, another key, a
            file of another kind.
        """
        given = Collaborators(policy, budget, log, metrics, queries=queries, drift=drift)
        with torch.inference_mode(False):
            parts, mode, output, collaborators = read_guard(path, model, given, output, autoencoder)
            return cls(model, parts, mode, output, collaborators)

    def train(self, mode: bool = True) -> "Guard":
        """A guard stays in eval mode: its calibration holds for no other."""
        self.training = False
        for child in self.children():
            with contextlib.suppress(NotImplementedError):  # an exported model knows one mode alone
                child.train(False)
        return self

    def close(self) -> None:
        """Remove the hook from the model. A closed guard refuses to be called, attacked and recalibrated."""
        self._capture.close()
        self._closed = True

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Guard":
        """Move everything, but change the dtype of the model alone: the calibration stays exact."""
        children = [child for name, child in self.named_children() if name != "model"]
        with kept_dtypes([module for child in children for module in child.modules()]):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        return self
