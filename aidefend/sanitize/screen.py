"""Screen training data: find structured poison without being told rate, class or trigger, and say why."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aidefend._core.batches import Batch
from aidefend._core.checks import check_int, check_labels, check_tensor
from aidefend._core.modules import Model
from aidefend.sanitize.bend import Bend
from aidefend.sanitize.calibration import calibrated, facts_of_p_values
from aidefend.sanitize.caps import Cap, depleted, read_cap
from aidefend.sanitize.choose import Chosen, Detector, chosen_for, named_detectors
from aidefend.sanitize.confident_learning import ConfidentLearning
from aidefend.sanitize.decide import Decision, decide, undecided
from aidefend.sanitize.detectable import routes
from aidefend.sanitize.distinct import Distinct
from aidefend.sanitize.features import Features, Layer, predictor, readable_rows
from aidefend.sanitize.findings import ALPHA, SCORE, THREAT, RowVerdicts, facts_of, limits_of, unsearched
from aidefend.sanitize.items import Items
from aidefend.sanitize.material import Encoder, read_material
from aidefend.sanitize.out_of_fold import out_of_fold_logits
from aidefend.sanitize.provenance import read_names, read_trusted, removals
from aidefend.sanitize.remarks import Remarks, remarks_of
from aidefend.sanitize.rounding import rounded, rounded_facts
from aidefend.sanitize.screen_report import ScreenReport
from aidefend.sanitize.suspect import train_suspect
from aidefend.sanitize.view import IndependentView
from aidefend.sanitize.view_disagreement import (
    VIEW_SCORE,
    ViewReadings,
    no_readings,
    view_readings,
    words_of_views,
)
from aidefend.sanitize.world import World, shuffled, world_of
from aidefend.sanitize.written_verdicts import control_of_written, share_of, with_written

ON_ROWS = ("outliers", "confident_learning", "near_duplicates", "source_evidence", "influence")
_BLOCK = 1024


def screen(
    dataset: Any,
    model: Model | None = None,
    layer: Layer | None = None,
    detectors: Literal["auto"] | Sequence[Detector] = "auto",
    trusted: Any = None,
    sources: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    encoder: Encoder | None = None,
    max_removed: float | Mapping[Any, float] = 1.0,
    max_removed_group: float | Mapping[Any, float] = 1.0,
) -> ScreenReport:
    """Judge every row of a training set: quarantine structured poison, remark what else looks wrong, remove nothing.

    Detectors propose parts of each class; a part is quarantined as a whole if five hypotheses under which it would be
    harmless all fall: at most half of it fits another class and not its own (in a view of the inputs that does not use
    the model); it does not stand apart in the model's features; what it has in common turns at most a third of ordinary
    rows of other classes into its label, be it added, added twice, written into its spot, or, for pictures, a smooth
    displacement; it lies no nearer to other classes than the rest of its class, and with what either has in common
    taken off not by a fifth; and, with its pattern taken off or written on the others, it keeps to itself where wrongly
    labelled rows would mix with those that they look like. Where a trigger was proven in one class, it is looked for in
    the others, and a group that carries it need not show the third and the fourth again (all-to-all poison;
    `proven_in_another_class` in the report).
    Honest styles and rare groups have right labels and pass the first.
    Of pictures a group with right labels is quarantined, too (`right_labels` in the report), if four hypotheses fall:
    it does not stand apart in the features, with next to nothing in between; what it has beyond its own class turns at
    most a fifth of rows of other classes into its label; the same with its cells in another order turns as many; and
    with that mark on, the rest of the class still differs from the group, as it does from a style. Rows that were made
    hard to learn differ by more than the mark. So the cells that the group holds constant, and the rest of its class
    does not, are judged alone, too, where they are at most a fifth of the picture: there the second hypothesis is that
    they turn at most a twentieth, and the fourth that a twentieth of other classes holds the same (`elsewhere` in the
    report; `right_labels` is None, as their labels are not asked for).
    In tables (N, d) and texts patterns are sought as such, too: values, ranges, words or letters that rows of one class
    hold in common and that, taken off, leave rows of another class (`WrittenSearch`). Tables may have columns of text,
    bool or category, and gaps.

    Guarantee: the tests are intersection-union tests, corrected for the number of proposals (three tests act as a gate,
        Bonferroni; foreign rows and an empty gap share what is left among the classes with a group past the gate, in a
        fixed order): where in every proposal one of the five and one of the four hypotheses hold, something is
        quarantined with probability at most .01 as far as the tests' binomial models hold and, of harmless groups, the
        gate tells nothing of the other two; each proposal was chosen on the same rows, so read it as calibrated by
        measurement, not as a proof. Equal rows (input and label) count once. Rows that were varied and repeated
        (augmented, jittered, interpolated) count each time and are no independent rows: screen first, multiply then.
        Nothing is promised against an adversary who knows this screen; see the report's `limits`.
    Args:
        dataset: Data set of (x, y) samples, tensors (x, y), (DataFrame, Series), a table, a Parquet file, or any other
            form that `Samples` takes; of a DataLoader its data set is judged, in its own order. Inputs of any shape;
            integer labels >= 0 (where one is above 32,767 they are names: `parameters["classes"]` lists them in their
            order). Row i of the report is sample i: one that cannot be read (it raises, has another shape, no usable
            label) gets keep = False and the reason.
        model: Module or callable that was trained on this data, from x to logits. None: a small network is trained
            here, on the data as it is, so that a shortcut shows (of pictures (N, C, H, W) a convolutional one).
            Of texts it is asked with a list of str, or where `encoder` is given with what that makes of them; of a
            table with categories or gaps with a DataFrame, if that is what was passed, else a dict of columns.
        layer: Where features come from, see `extract_features`.
        detectors: Who proposes. "auto": all that this data has what they need for; `parameters["chosen_because"]` says
            which and why. What these say of single rows (wrong labels with the label that fits better, near duplicates,
            outliers) is then a remark. Given ones are copied, then fitted on this data, and what they say of single
            rows quarantines. Clusters of the features are proposed in any case.
        trusted: Rows that are known to be good: bool mask (N,), row numbers, or content ids. They are never quarantined
            (unless they hold NaN or infinity), and how many of them lay in a quarantined group is reported.
        sources: One name a row (who delivered it): the share of each source that was quarantined, with interval, goes
            to `parameters["sources"]`, and each source is scored as a whole.
        groups: One name a row (whom it concerns): the same in `parameters["groups"]`, where a group that loses more
            than twice the share of the rest is marked. Neither changes a verdict.
        seed: Everything that is drawn. Equal input and seed give an equal report: its numbers have six digits, which
            the number of threads does not change.
        encoder: From a list of texts to (N, d). None: `TextEncoder`, hashed words and letters.
        max_removed: Largest share of a class that structured poison takes out, in (0, 1], or a share for each class
            number (other classes have no cap); the least suspicious rows beyond it are kept, with a reason, and listed
            in `parameters["cap"]`. The default takes all: a group stands or falls as a whole, what a cap keeps of it is
            as much proven as the rest, and a few such rows are enough for a backdoor to work. A class that loses more
            than half of its rows is named in the report's `limits` and in `parameters["cap"]["depleted"]`, so that it
            does not vanish unnoticed.
        max_removed_group: The same for each of `groups`, counted after the caps of classes.
    Returns: A report with the scores `structured_poison` (probability-like, above .5 in quarantine), one for each
        detector, and `view_disagreement` (in [0, 1], how far five views of a row differ); p-values, corrected for
        `structured_poison`, conformal for the others (`parameters["p_values"]` says against which rows, and what that
        promises); reasons; and in `parameters` the target classes, the estimated poisoned share with interval, the
        smallest detectable group for each route, and what the same screen quarantines when labels are permuted.
    Raises: ConfigurationError: no labels, wrong lengths, unknown layer. IncompatibleModel: the model fails on the data.
        Rows with NaN or infinity never raise: they get keep = False and a reason.
    Cost: one forward pass of the data (21 where at most 10,000 rows are overlaid, see `TriggerConsistency`), about 300
        rows of transplants for each of some 36 proposals a class, a distance matrix of each class (at most 3,000 rows
        of it) with at most 1,000 rows of every other class for each of up to 18 groups, and for pictures up to 24 fits
        of a displacement to class means a class, and 800 more transplants at most for each part that stands apart.
    Source: Composition ours. Spectral signatures: Tran, Li, Madry 2018. Activation clustering: Chen et al. 2018.
        Neighbour labels: Peri et al. 2020. Transplants follow the idea of STRIP (Gao et al. 2019): a trigger works
        wherever it is put.

    Example:
        >>> x = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0.5).long()
        >>> report = screen((x, y), seed=0)
        >>> report.summary()
        'screen: 60 of 60 rows kept, 0 not'
    """
    check_int(seed, "seed", 0)
    material = read_material(dataset, encoder)
    samples = material.samples
    good = read_trusted(trusted, samples.ids)
    sides = {"sources": read_names(sources, len(good), "sources"), "groups": read_names(groups, len(good), "groups")}
    caps = _caps(samples.y, sides["groups"], max_removed, max_removed_group)
    if not (isinstance(detectors, str) and detectors == "auto"):
        named_detectors(detectors, copied=False)  # refused before a model is trained
    asked, layer = material.asked(model, layer)
    suspect = asked if asked is not None else _trained(samples, seed)
    found = material.features(suspect, layer, model is None)
    chosen = chosen_for(detectors, found, suspect, good, sides["sources"], overlaid=material.kind != "text")
    items = material.items(found, suspect, model is None, seed) if bool(found.usable.any()) else None
    scores, remarks, decision, control, readings = _judged(
        found, suspect, chosen, sides["sources"], seed, items, material.kind
    )
    views = readings.facts(decision.quarantined)
    seen = [words_of_views(group) for group in views["groups"]]
    rows = RowVerdicts(found, decision, good, remarks, quarantine=chosen.named, caps=caps, seen=seen)
    skipped = unsearched(found, decision)
    told = material.told(dataset)
    said = {SCORE: rows.scores, **scores, VIEW_SCORE: readings.disagreement}
    said, known = {name: rounded(values) for name, values in said.items()}, (found.labels, found.usable, good)
    p_values = {name: calibrated(values, *known) for name, values in said.items() if name != SCORE}
    facts = facts_of(decision, int(rows.removed.sum()), len(rows.removed)) | {
        "alpha": ALPHA,
        "seed": seed,
        "kind": material.kind,
        "cap": {**_facts_of_caps(caps, rows.spared), "depleted": depleted(found.labels, found.usable, rows.removed)},
        "views": views,
        "p_values": facts_of_p_values(*known),
        "detectable_by_route": routes(decision, pictures=Bend.possible(found.x)),
        "not_searched": {str(label): int((found.labels == label).sum()) for label in skipped},
        "model": "trained by screen" if model is None else type(model).__name__,
        "detectors": list(scores),
        "chosen_because": dict(chosen.why),
        "remarks": {name: int(said.flagged.sum()) for name, said in remarks.items()},
        "label_permuted_control": control,
        "trusted": {"rows": int(good.sum()), "in_quarantined_groups": int((good & rows.in_group).sum())},
        "bad_rows": int((~found.usable).sum()),
        "unreadable_rows": len(found.broken),
        "columns": told,
        "classes": None if told is None else told["classes"],
        "approximate": _approximate(chosen.detectors),
        "dtype": str(found.x.dtype).removeprefix("torch."),
        "shape": list(found.x.shape[1:]),
        **{name: removals(values, rows.removed) for name, values in sides.items() if values is not None},
    }
    return ScreenReport(
        found.ids,
        rows.keep,
        said,
        {SCORE: rounded(rows.p_values), **p_values},
        rows.reasons,
        "screen",
        rounded_facts(facts),
        THREAT,
        limits_of(facts, skipped),
        columns=rows.columns,
    )


def _caps(labels: Tensor | None, groups: Sequence[str] | None, by_class: Any, by_group: Any) -> list[Cap]:
    classes = [] if labels is None else [str(label) for label in labels.tolist()]
    caps = [read_cap(by_class, classes, "max_removed", "class")]
    caps.append(read_cap(by_group, groups, "max_removed_group", "group"))
    return [cap for cap in caps if cap is not None]


def _facts_of_caps(caps: Sequence[Cap], spared: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    """The caps, and by class (`spared`) and group (`spared_groups`) the rows that were kept for them."""
    names = {"class": ("max_removed", "spared"), "group": ("max_removed_group", "spared_groups")}
    found: dict[str, Any] = {}
    for cap, rows in zip(caps, spared, strict=True):
        share, kept = names[cap.kind]
        found |= {share: cap.share, kept: dict(rows)}
    return found


def _trained(samples: Batch, seed: int) -> nn.Module:
    """A suspect model of our own, from the rows that are finite."""
    usable = readable_rows(samples)
    labels = check_labels(samples.y, len(usable), name="labels")
    return train_suspect(samples.x[usable], labels[usable], seed) if bool(usable.any()) else nn.Identity()


def _judged(
    found: Features,
    suspect: Model,
    chosen: Chosen,
    sources: Sequence[str] | None,
    seed: int,
    items: Items | None,
    kind: str,
) -> tuple[dict[str, Tensor], dict[str, Remarks], Decision, dict[str, Any], ViewReadings]:
    """Detector scores (N,), remarks on single rows, the decision on the usable ones, the control, and the views."""
    if not bool(found.usable.any()):
        nothing = {name: torch.full((len(found),), torch.nan, dtype=torch.float64) for name in chosen.detectors}
        return nothing, {}, undecided(), {"quarantined": 0, "n": 0}, no_readings(found)
    view = IndependentView(found.x[found.usable], seed=seed)
    coordinates = torch.full((len(found), view.dimensions), torch.nan)
    coordinates[found.usable] = view.coordinates(found.x[found.usable])
    unseen = _unseen(found, coordinates, seed)
    scores, remarks = _scores(found, coordinates, unseen, chosen.detectors, sources)
    labels = found.labels[found.usable]
    if kind == "text":  # patterns are not added to numbers that stand for words
        decision = undecided(len(labels))
        control = {"quarantined": 0, "n": 0}
        alpha = ALPHA
    else:
        once = Distinct(found)
        rows = once.features.usable
        world = world_of(once.features, view, predictor(suspect), seed)
        proposing = [score[rows] for name, score in scores.items() if chosen.named or name not in ON_ROWS]
        alpha = ALPHA if items is None else ALPHA / 2
        decision = decide(world, proposing, alpha)
        control = _control(world, proposing, decision, alpha)
        decision = once.among_all(decision)
    if items is not None:
        decision = with_written(decision, items, labels, alpha, seed)
        control = control_of_written(control, decision, items, labels, alpha, seed)
    return scores, remarks, decision, control, view_readings(found, coordinates, unseen, seed)


def _scores(
    found: Features,
    coordinates: Tensor,
    unseen: Tensor,
    detectors: Mapping[str, Detector],
    sources: Sequence[str] | None,
) -> tuple[dict[str, Tensor], dict[str, Remarks]]:
    """Scores (N,) of every detector after one pass of fitting, NaN for rows that are not usable; and its remarks."""
    scores, remarks = {}, {}
    for name, detector in detectors.items():
        rows = dataclasses.replace(found, logits=unseen) if isinstance(detector, ConfidentLearning) else found
        blocks = [_with_sources(block, sources, at) for at, block in enumerate(rows.blocks(_BLOCK, coordinates))]
        fitted = detector
        for block in blocks:
            fitted = fitted.partial_fit(block) or fitted
        parts = [
            check_tensor(fitted.score(block), "score(block)", ndim=1, finite=False, rows=len(block["ids"]))
            for block in blocks
        ]
        scores[name] = torch.cat(parts).double()
        said = remarks_of(fitted, next(rows.blocks(len(rows), coordinates)), scores[name])
        if said is not None:
            remarks[name] = said
    return scores, remarks


def _unseen(found: Features, coordinates: Tensor, seed: int) -> Tensor:
    """(N, K) predictions of cross-validation in the independent view, NaN for rows that are not usable."""
    ids = [row_id for row_id, usable in zip(found.ids, found.usable.tolist(), strict=True) if usable]
    logits = out_of_fold_logits(ids, coordinates[found.usable], found.labels[found.usable], seed)
    classes = max(logits.shape[1], int(found.labels.max()) + 1)
    unseen = torch.full((len(found), classes), torch.nan, dtype=torch.float64)
    unseen[found.usable] = torch.nn.functional.pad(logits, (0, classes - logits.shape[1]), value=-100.0)
    return unseen


def _with_sources(block: dict[str, Any], sources: Sequence[str] | None, at: int) -> dict[str, Any]:
    return block if sources is None else {**block, "sources": list(sources[at * _BLOCK : (at + 1) * _BLOCK])}


def _control(world: World, scores: Sequence[Tensor], decision: Decision, alpha: float) -> dict[str, Any]:
    """What the same screen takes from the rows it kept if their labels are permuted: its false-positive cost."""
    kept = torch.ones(len(world.labels), dtype=torch.bool)
    for verdict in decision.poison:
        kept[verdict.group.rows[verdict.group.inside]] = False
    rows = kept.nonzero().flatten()
    if not len(rows):
        return {"quarantined": 0, "n": 0}
    found = decide(shuffled(world, rows), [score[rows] for score in scores], alpha)
    removed = sum(int(verdict.group.inside.sum()) for verdict in found.poison)
    return share_of(removed, len(rows))


def _approximate(detectors: Mapping[str, Any]) -> dict[str, Any]:
    """Of detectors that search neighbours approximately: the measured recall of each class."""
    named = {name: found for name, found in detectors.items() if getattr(found, "index", "exact") == "faiss"}
    return {
        name: {str(label): dict(recall._asdict()) for label, recall in found.recall().items()}
        for name, found in named.items()
    }
