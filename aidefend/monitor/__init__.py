"""Access control, query budgets, a tamper-evident log, metrics and drift for a model in service.

Threat: exploitation of the running system (extraction by mass queries, misuse by insiders, silent change of the inputs,
an intruder who edits the records). Nothing here authenticates anybody: the principal is what your front end verified.
"""

from aidefend.monitor.access_policy import AccessDecision, AccessPolicy, Rule
from aidefend.monitor.audit_log import AuditLog
from aidefend.monitor.drift_monitor import DriftMonitor, FeatureDrift
from aidefend.monitor.log_verification import LogVerification
from aidefend.monitor.martingale import CalibrationMartingale, DriftState
from aidefend.monitor.metrics import Metrics
from aidefend.monitor.query_budget import Bucket, BudgetVerification, QueryBudget, Reservation

__all__ = [
    "AccessDecision",
    "AccessPolicy",
    "AuditLog",
    "Bucket",
    "BudgetVerification",
    "CalibrationMartingale",
    "DriftMonitor",
    "DriftState",
    "FeatureDrift",
    "LogVerification",
    "Metrics",
    "QueryBudget",
    "Reservation",
    "Rule",
]
