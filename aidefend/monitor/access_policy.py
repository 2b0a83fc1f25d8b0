"""Who may do what to which resource: roles, default deny, and a reason for every answer."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aidefend._core.checks import check_choice, check_items, check_kind, check_path, refuse
from aidefend._core.storage import pretty_json, write_atomic


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one role may do, or may not.

    Args:
        role: Name of the role.
        actions: Action names, such as "predict"; "*" alone means every action.
        resources: Resource names, such as "model:digits"; a trailing "*" matches every longer name.
        effect: "allow" or "deny". One matching deny outweighs every allow.
    Raises: ConfigurationError: an empty name, a "*" in the middle of a pattern.
    Example:
        >>> Rule("analyst", ("predict",), ("model:*",)).covers("predict", "model:digits")
        True
    """

    role: str
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    effect: Literal["allow", "deny"] = "allow"

    def __post_init__(self) -> None:
        check_choice(self.effect, ("allow", "deny"), "effect")
        _check_name(self.role, "role")
        for name, patterns in (("actions", self.actions), ("resources", self.resources)):
            kept = check_items(patterns, str, name, f'Write {name}=("...",)')
            if not kept:
                raise refuse(f"{name} to be a tuple of names", name, patterns, f'Write {name}=("...",)')
            object.__setattr__(self, name, kept)
            for pattern in kept:
                _check_pattern(pattern, name)

    def covers(self, action: str, resource: str) -> bool:
        """Whether the rule speaks about this action on this resource."""
        return any(_matches(p, action) for p in self.actions) and any(_matches(p, resource) for p in self.resources)


@dataclasses.dataclass(frozen=True)
class AccessDecision:
    """The answer, and why; `role` is the role that decided, empty where none did."""

    allowed: bool
    reason: str
    role: str = ""


@dataclasses.dataclass(frozen=True)
class AccessPolicy:
    """Rules for roles, and the roles of each principal. What no rule allows is denied.

    Guarantee: `authorize` allows only if a role of the principal has an allow rule that covers the request and none of
        its roles has a deny rule that does. A malformed request is denied, never an exception. It does not
        authenticate: pass a principal that your front end has verified, never one that the client names itself.
    Args:
        rules: The rules of all roles.
        members: Principal to its roles. Every role must have a rule.
    Raises: ConfigurationError: a role without rules, an empty name.
    Cost: Linear in the rules of the principal's roles.
    Example:
        >>> policy = AccessPolicy([Rule("analyst", ("predict",), ("model:*",))], {"team-a": ("analyst",)})
        >>> policy.authorize("team-a", "predict", "model:digits").allowed
        True
        >>> policy.authorize("team-b", "predict", "model:digits").reason
        'no role is assigned to this principal'
    """

    rules: tuple[Rule, ...]
    members: Mapping[str, tuple[str, ...]]

    def __init__(self, rules: Sequence[Rule], members: Mapping[str, Sequence[str]]) -> None:
        rules = check_items(rules, Rule, "rules", "Pass a list of Rule(...)")
        check_kind(members, Mapping, "members", 'Write members={"name": ("role",)}')
        known = {rule.role for rule in rules}
        cleaned: dict[str, tuple[str, ...]] = {}
        for principal, roles in members.items():
            _check_name(principal, "members")
            cleaned[principal] = check_items(roles, str, "members", 'Write members={"name": ("role",)}')
            if unknown := sorted(set(cleaned[principal]) - known):
                raise refuse(f"roles among {sorted(known)}", "members", unknown, "Add a rule for each role")
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "members", cleaned)

    def authorize(self, principal: str, action: str, resource: str) -> AccessDecision:
        """Allow or deny one action of one principal on one resource."""
        if not all(_is_name(part) for part in (principal, action, resource)):
            return AccessDecision(False, "the request is malformed")
        roles = self.members.get(principal)
        if not roles:
            return AccessDecision(False, "no role is assigned to this principal")
        found = [rule for rule in self.rules if rule.role in roles and rule.covers(action, resource)]
        for rule in found:
            if rule.effect == "deny":
                return AccessDecision(False, f"denied by a rule of role {rule.role}", rule.role)
        if found:
            return AccessDecision(True, f"allowed by role {found[0].role}", found[0].role)
        return AccessDecision(False, "no rule of this principal's roles allows it")

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON types."""
        return {
            "schema": "aidefend.access-policy/1",
            "rules": [dataclasses.asdict(rule) for rule in self.rules],
            "members": {principal: list(roles) for principal, roles in self.members.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AccessPolicy":
        """The policy back from `to_dict`; unknown keys are refused."""
        if not isinstance(data, Mapping) or set(data) != {"schema", "rules", "members"}:
            raise refuse("keys schema, rules, members", "data", data, "Write what AccessPolicy.to_dict returns")
        check_choice(data["schema"], ("aidefend.access-policy/1",), "schema")
        try:
            rules = [Rule(**{**rule, "effect": rule.get("effect", "allow")}) for rule in data["rules"]]
        except (TypeError, AttributeError) as error:
            raise refuse(
                "rules with role, actions, resources, effect", "rules", str(error), "Correct the keys"
            ) from error
        return cls(rules, data["members"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON, whole or not at all."""
        write_atomic(path, pretty_json(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AccessPolicy":
        """Read a policy that `save` wrote, or one written by hand in the same form."""
        try:
            data = json.loads(check_path(path).read_text("utf-8"), object_pairs_hook=_unique_keys)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise refuse("a readable JSON policy", "path", str(path), f"Could not read it ({error})") from error
        return cls.from_dict(data)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated key could show a reader another policy than the one in force."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise refuse("each key once", "path", [key for key, _ in pairs], "Remove the repeated key")
    return dict(pairs)


def _is_name(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 256 and text.isprintable() and "*" not in text


def _check_name(text: object, name: str) -> None:
    if not _is_name(text):
        raise refuse(f"{name}: 1 to 256 printable characters without *", name, text, "Choose a plain name")


def _check_pattern(text: object, name: str) -> None:
    if text != "*" and not (isinstance(text, str) and _is_name(text.removesuffix("*"))):
        raise refuse(f"{name}: a name, with * at its end at most", name, text, "Write one pattern for each prefix")


def _matches(pattern: str, text: str) -> bool:
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern
