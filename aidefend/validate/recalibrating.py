"""New calibration rows for a guard in service: asked for, checked, logged, and only then in force."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch

from aidefend._core.batches import iterate
from aidefend._core.checks import check_int, check_items, check_kind, check_not_empty, refuse
from aidefend._core.modules import Model, preserve
from aidefend.validate.calibrating import (
    Calibrated,
    check_mode,
    needs_inputs,
    predicted_classes,
    run_rows,
    score_rows_of,
)
from aidefend.validate.features import PassCapture
from aidefend.validate.row_reuse import count_inputs, reused_inputs


def recalibrated(
    model: Model,
    capture: PassCapture,
    parts: Calibrated,
    data: Any,
    reason: str,
    used_ids: Collection[str] | None,
    batch_size: int,
) -> tuple[Calibrated, Mapping[str, Any]]:
    """The parts with the calibration replaced, and the event for the log; see `Guard.recalibrate`."""
    if not check_kind(reason, str, "reason", "Say why in words").strip():
        raise refuse("a reason", "reason", reason, "Say why in words")
    check_int(batch_size, "batch_size")
    check_mode(model)
    batches = list(iterate(data, batch_size))
    counts = count_inputs(row for batch in batches for row in batch.ids)
    check_not_empty(len(counts), "calibration_loader")
    used = () if used_ids is None else check_items(used_ids, str, "used_ids", "Pass the content ids of used rows")
    if shared := reused_inputs(counts, used):
        rule = "calibration rows that neither trained the model nor fitted a detector: such rows score too low"
        raise refuse(rule, "calibration_loader", f"{len(shared)} shared inputs", "Calibrate on rows held out")
    with preserve(model), torch.no_grad():
        asks = needs_inputs(parts.detectors)
        rows = run_rows(model, capture, batches, parts.spec, batch_size, "calibration", asks)
        scores = score_rows_of(parts.detectors, rows, model, batch_size)
    old = parts.calibration
    new = old.replaced(scores, predicted_classes(rows), ())
    entry = {"reason": reason, "before": old.law.summary(), "after": new.law.summary()}
    new = old.replaced(scores, predicted_classes(rows), (*old.history, entry))
    facts = dataclasses.replace(parts.facts, calibration_n=len(scores), refused_n=rows.refused)
    return dataclasses.replace(parts, calibration=new, facts=facts), entry
