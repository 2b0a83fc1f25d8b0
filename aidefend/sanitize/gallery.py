"""The page with the rows in quarantine. Needs the extra `report`."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_int
from aidefend._core.collate import why
from aidefend._core.errors import MissingExtra
from aidefend._core.report import Report
from aidefend.sanitize.decisions import Decisions, decisions_of

_TEMPLATE = Path(__file__).with_name("templates") / "quarantine.html"
_NUMBERS = 24
_LETTERS = 600


def page(report: Report, suspects: Any, texts: Sequence[str] | None, limit: int) -> str:
    """The page as text; `suspects` are the samples of the rows in quarantine, in order, or None."""
    check_int(limit, "limit")
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "report") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    rows = report.quarantine_indices.tolist()
    order = sorted(range(len(rows)), key=lambda at: (-_suspicion(report, rows[at]), rows[at]))[:limit]
    cards = [_card(report, rows[at], None if suspects is None else _input(suspects, at), texts) for at in order]
    facts, table = report.parameters, decisions_of(report)
    return template.render(
        summary=report.summary(),
        cards=cards,
        counts=table.counts(),
        proposals=_proposals(table, limit),
        hidden=len(rows) - len(cards),
        groups=facts.get("poison", ()),
        control=facts.get("label_permuted_control", {}),
        releases=facts.get("releases", ()),
        threat=report.threat,
        limits=report.limits,
    )


def _proposals(table: Decisions, limit: int) -> list[dict[str, Any]]:
    """Rows that stay with a proposal: relabelled ones first, then the lightest."""
    rows = [*table.rows("relabel").tolist(), *table.rows("down-weight").tolist()]
    order = sorted(rows, key=lambda row: (table.actions[row] != "relabel", float(table.weights[row]), row))
    return [{"row": row, "id": table.ids[row], "reasons": table.reasons[row]} for row in order[:limit]]


def _suspicion(report: Report, row: int) -> float:
    score = float(report.scores["structured_poison"][row]) if "structured_poison" in report.scores else 0.0
    return score if score == score else 0.0


def _card(report: Report, row: int, sample: Any, texts: Sequence[str] | None) -> dict[str, Any]:
    card = {"row": row, "id": report.ids[row], "reasons": report.reasons[row], "picture": "", "words": ""}
    card["scores"] = [(name, f"{float(values[row]):.3g}") for name, values in sorted(report.scores.items())]
    if texts is not None or isinstance(sample, str):
        words = sample if texts is None else texts[row]
        card["words"] = words[:_LETTERS] + ("…" if len(words) > _LETTERS else "")
    elif isinstance(sample, Mapping):
        card["words"] = ", ".join(f"{name} = {value}" for name, value in sample.items())[:_LETTERS]
    elif sample is not None:
        if sample.ndim == 3 and sample.shape[0] in (1, 3):
            card["picture"] = _picture(sample)
        else:
            card["words"] = _numbers(sample, (report.parameters.get("columns") or {}).get("inputs"))
    return card


def _input(suspects: Any, at: int) -> Any:
    """The input of a sample, or why it cannot be read: that is what many are in quarantine for."""
    try:
        found = suspects[at][0]
        return found if found is None or isinstance(found, str | Mapping) else torch.as_tensor(found).detach().cpu()
    except MemoryError:
        raise
    except Exception as error:
        return why(error).reason


def _numbers(values: Tensor, names: Any) -> str:
    """The first numbers of a row, with the names of its columns where it has some."""
    numbers = [f"{float(value):.4g}" for value in values.flatten()[:_NUMBERS]]
    more = ", …" if values.numel() > _NUMBERS else ""
    if isinstance(names, list | tuple) and values.ndim == 1 and len(names) == len(values):
        return ", ".join(f"{name} = {value}" for name, value in zip(names, numbers, strict=False)) + more
    return f"{', '.join(numbers)}{more} (shape {tuple(values.shape)})"


def _picture(values: Tensor) -> str:
    """PNG of a picture (C, H, W) in base64, stretched to the full range."""
    try:
        from matplotlib import image
    except ImportError as error:
        raise MissingExtra("matplotlib", "report") from error
    wide = values.double().nan_to_num(0.0, 0.0, 0.0)
    low, high = float(wide.min()), float(wide.max())
    shown = ((wide - low) / (high - low if high > low else 1.0)).permute(1, 2, 0)
    shown = shown.expand(-1, -1, 3) if shown.shape[2] == 1 else shown
    file = io.BytesIO()
    image.imsave(file, (shown * 255).round().to(torch.uint8).contiguous().numpy(), format="png")
    return base64.b64encode(file.getvalue()).decode()
