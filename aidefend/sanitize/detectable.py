"""The smallest group that each route of a screen would have found: no evidence of it, at this power, and no more."""

from collections.abc import Callable
from typing import Any

from aidefend.sanitize.decide import POWER, Decision, smallest_detectable, smallest_kin

_APART = (
    "the group is proposed, stands apart in the model's features (four in five of its rows at their peak, none in the "
    "gap), 95 % of its rows are recognised as foreign"
)
ASSUMED = {
    "pattern": f"{_APART}, and 95 % of transplants of its pattern (added, added twice, or written) turn",
    "displacement": f"{_APART}, and 95 % of pictures turn when they are bent; telling the displacement from the means "
    "of the classes takes rows, too, which this figure leaves out (about 1 % of the data went unseen when measured)",
    "proven in another class": f"{_APART}, and it carries a trigger that stands in another class",
    "written": "the rows hold one value, range, word or kind of letter, nine in ten of them look foreign without it",
}


def routes(decision: Decision, *, pictures: bool) -> dict[str, dict[str, Any]]:
    """For each way in which the data were searched: power, what it assumes, and the smallest rows for each class.

    None for rows: no size up to half of the class would do, so nothing was shown.
    """

    def whole(n: int) -> int | None:
        return smallest_detectable(n, decision.threshold, decision.gate)

    found = {}
    if decision.searched:
        found["pattern"] = _route("pattern", decision, whole)
        if pictures:
            found["displacement"] = _route("displacement", decision, whole)
        if decision.poison:
            found["proven in another class"] = _route(
                "proven in another class", decision, lambda n: smallest_kin(n, decision.kin_threshold)
            )
    if decision.written_detectable:
        sizes = {str(label): {"rows": rows} for label, rows in decision.written_detectable.items()}
        found["written"] = {"power": POWER, "assumes": ASSUMED["written"], "classes": sizes}
    return found


def _route(name: str, decision: Decision, smallest: Callable[[int], int | None]) -> dict[str, Any]:
    sizes = {label: smallest(n) for label, n in decision.searched.items()}
    classes = {
        str(label): {"rows": rows, "share_of_class": None if rows is None else rows / decision.searched[label]}
        for label, rows in sizes.items()
    }
    return {"power": POWER, "assumes": ASSUMED[name], "classes": classes}
