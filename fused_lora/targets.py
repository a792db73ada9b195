"""Which layers a list of names, an expression or a pattern speaks of, and the way back: PEFT's
rules, on paths alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def match_pattern(patterns: Iterable[str], path: str) -> str | None:
    """The first of `patterns` that fits the end of `path` at a dot, None if none does (PEFT's rule
    for rank_pattern and alpha_pattern). Raises ValueError for one that is no expression."""
    for pattern in patterns:
        if path == pattern or path.endswith(f".{pattern}") or _match(rf"(.*\.)?({pattern})", path):
            return pattern
    return None


def named(names: str | Sequence[str], path: str) -> bool:
    """PEFT's rule for target_modules: a list of ends of paths, or an expression for whole ones."""
    if isinstance(names, str):
        return _match(names, path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def describe_targets(targets: Sequence[str], paths: Iterable[str]) -> str | list[str]:
    """The shortest target_modules that means `targets` and nothing else among `paths`."""
    wanted, paths = set(targets), list(paths)
    for names in (sorted({path.rpartition(".")[2] for path in targets}), sorted(targets)):
        if {path for path in paths if named(names, path)} == wanted:
            return names
    return "|".join(re.escape(path) for path in targets)


def describe_values(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the most common value, a pattern for the others) from {path: value}."""
    default = Counter(values.values()).most_common(1)[0][0]
    pattern = {path: value for path, value in values.items() if value != default}
    found = {path: pattern.get(match_pattern(pattern, path) or "", default) for path in values}
    if found != values:  # one path is the end of another
        pattern = {f"^{re.escape(path)}": value for path, value in pattern.items()}
    return default, pattern


def _match(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
