"""Default deny, deny outweighs allow, no pattern tricks, and a file that cannot say two things."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidefend import ConfigurationError
from aidefend.monitor import AccessPolicy, Rule

POLICY = AccessPolicy(
    [
        Rule("analyst", ("predict",), ("model:*",)),
        Rule("analyst", ("*",), ("model:secret",), "deny"),
        Rule("admin", ("*",), ("*",)),
        Rule("auditor", ("read",), ("log", "model:digits")),
    ],
    {"team-a": ("analyst",), "root": ("admin", "analyst"), "eve": (), "ann": ("auditor",)},
)


@pytest.mark.parametrize(
    ("principal", "action", "resource", "allowed", "reason"),
    [
        ("team-a", "predict", "model:digits", True, "allowed by role analyst"),
        ("team-a", "predict", "model:", True, "allowed by role analyst"),
        ("team-a", "train", "model:digits", False, "no rule"),
        ("team-a", "predict", "models", False, "no rule"),
        ("team-a", "predict", "model:secret", False, "denied by a rule of role analyst"),
        ("root", "predict", "model:secret", False, "denied by a rule of role analyst"),
        ("root", "delete", "anything", True, "allowed by role admin"),
        ("ann", "read", "log", True, "allowed by role auditor"),
        ("ann", "read", "logs", False, "no rule"),
        ("eve", "predict", "model:digits", False, "no role is assigned"),
        ("nobody", "predict", "model:digits", False, "no role is assigned"),
        ("", "predict", "model:digits", False, "malformed"),
        (None, "predict", "model:digits", False, "malformed"),
        ("team-a", "pre*", "model:digits", False, "malformed"),
        ("team-a", "predict", "model:*", False, "malformed"),
        ("team-a\n", "predict", "model:digits", False, "malformed"),
        ("team-a", "predict", "x" * 300, False, "malformed"),
    ],
)
def test_decisions(principal, action, resource, allowed, reason):
    decision = POLICY.authorize(principal, action, resource)
    assert decision.allowed is allowed
    assert reason in decision.reason


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_nothing_is_allowed_by_accident(principal, action, resource):
    if principal not in POLICY.members:
        assert not POLICY.authorize(principal, action, resource).allowed
    assert not AccessPolicy([], {}).authorize(principal, action, resource).allowed


def test_file_round_trip_and_strictness(tmp_path):
    path = tmp_path / "policy.json"
    POLICY.save(path)
    again = AccessPolicy.load(path)
    assert again == POLICY == pickle.loads(pickle.dumps(POLICY))
    text = path.read_text()
    for bad in (
        text.replace('"rules"', '"rule"'),
        text[:-5],
        '{"schema": "aidefend.access-policy/1", "rules": [], "rules": [], "members": {}}',
        text.replace("access-policy/1", "access-policy/2"),
        json.dumps({"schema": "aidefend.access-policy/1", "rules": [{"role": "a"}], "members": {}}),
        json.dumps({"schema": "aidefend.access-policy/1", "rules": ["a"], "members": {}}),
    ):
        path.write_text(bad)
        with pytest.raises(ConfigurationError, match="Expected"):
            AccessPolicy.load(path)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Rule("a", ("*x",), ("r",)),
        lambda: Rule("a", ("x",), ("a*b*",)),
        lambda: Rule("a", "predict", ("r",)),
        lambda: Rule("a", (), ("r",)),
        lambda: Rule("", ("x",), ("r",)),
        lambda: Rule("a", ("x",), ("r",), "permit"),
        lambda: AccessPolicy([], {"a": ("ghost",)}),
        lambda: AccessPolicy([Rule("a", ("x",), ("r",))], {"p": "a"}),
        lambda: AccessPolicy([], {"": ()}),
    ],
)
def test_malformed_policies_are_refused(call):
    with pytest.raises(ConfigurationError, match="Expected"):
        call()
