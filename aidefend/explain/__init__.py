"""Why a model decided as it did: attributions and influential training samples, for auditors.

Explanations leak: gradients and influential samples tell an outsider about the training data. They belong into the
auditor's hands, not into a service's answers. An attribution is a hint, never a proof: check it with `sanity_check`.
"""

from aidefend.explain.anomaly import attribution_anomaly
from aidefend.explain.attribution import Attribution, attribute
from aidefend.explain.influence import Influence, influence
from aidefend.explain.sanity import SanityCheck, sanity_check

__all__ = [
    "Attribution",
    "Influence",
    "SanityCheck",
    "attribute",
    "attribution_anomaly",
    "influence",
    "sanity_check",
]
