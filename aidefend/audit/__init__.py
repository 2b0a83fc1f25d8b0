"""The measured security audit: attacks any callable and writes down what was found, with intervals and limits.

It knows attacks and no defense, so it cannot be kind to ours. Every part can be called alone and returns Evidence.
"""

from aidefend.audit.artifacts import audit_artifacts
from aidefend.audit.comparison import Change, Comparison, compare
from aidefend.audit.drawing import plot_examples, plot_robustness
from aidefend.audit.evasion import audit_evasion
from aidefend.audit.extraction import DefaultStudent, audit_extraction
from aidefend.audit.guard import audit_guard, joint_margin, passes_and_fools
from aidefend.audit.inversion import Reconstructions, audit_inversion, reconstruct
from aidefend.audit.membership import audit_membership
from aidefend.audit.page import Figure, Section, SummaryRow, render_page
from aidefend.audit.plan import AuditPlan
from aidefend.audit.poisoning import audit_poisoning
from aidefend.audit.policy import Policy, PolicyResult, Problem, Rule
from aidefend.audit.privacy import EpsilonBound, audit_privacy, epsilon_lower_bound
from aidefend.audit.report import AuditReport
from aidefend.audit.robustness import evaluate_robustness
from aidefend.audit.robustness_result import CurvePoint, MaskingCheck, NormQuantile, Robustness, Stage
from aidefend.audit.run import audit
from aidefend.audit.storage import audit_storage

__all__ = [
    "AuditPlan",
    "AuditReport",
    "Change",
    "Comparison",
    "CurvePoint",
    "DefaultStudent",
    "EpsilonBound",
    "Figure",
    "MaskingCheck",
    "NormQuantile",
    "Policy",
    "PolicyResult",
    "Problem",
    "Reconstructions",
    "Robustness",
    "Rule",
    "Section",
    "Stage",
    "SummaryRow",
    "audit",
    "audit_artifacts",
    "audit_evasion",
    "audit_extraction",
    "audit_guard",
    "audit_inversion",
    "audit_membership",
    "audit_poisoning",
    "audit_privacy",
    "audit_storage",
    "compare",
    "epsilon_lower_bound",
    "evaluate_robustness",
    "joint_margin",
    "passes_and_fools",
    "plot_examples",
    "plot_robustness",
    "reconstruct",
    "render_page",
]
