"""A backdoored model, afterwards: triggers reversed, the model repaired, the repair tested."""

from aidefend.sanitize.repair.repair import repair
from aidefend.sanitize.repair.retest import RepairTest, retest
from aidefend.sanitize.repair.reverse_trigger import ReversedTriggers, reverse_trigger

__all__ = ["RepairTest", "ReversedTriggers", "repair", "retest", "reverse_trigger"]
