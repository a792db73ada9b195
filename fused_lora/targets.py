"""Which layers a list of names, an expression or a pattern speaks of, and the way back: PEFT's
rules, on paths alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

try:  # gives up on an expression that would run for ever; comes with the extra that reads files
    import regex
except ImportError:
    regex = None

LONGEST_MATCH = 0.25  # s; people's expressions take microseconds
_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+")


def match_pattern(patterns: Iterable[str], path: str) -> str | None:
    """The first of `patterns` that fits the end of `path` at a dot, None if none does (PEFT's rule
    for rank_pattern and alpha_pattern). Raises ValueError for one that is not an expression, or
    that takes too long."""
    for pattern in patterns:
        if path == pattern or path.endswith(f".{pattern}"):
            return pattern
        if is_name(pattern):
            if _names_end(pattern, path):
                return pattern
        elif _match(pattern, path, r"(.*\.)?({})"):
            return pattern
    return None


def is_name(pattern: str) -> bool:
    """Whether an expression is names and dots, with or without a backslash, and perhaps ^."""
    return _NAME.fullmatch(pattern) is not None


def _names_end(name: str, path: str) -> bool:
    characters = re.findall(r"\\?.", name.removeprefix("^"))
    start = len(path) - len(characters)
    if start < 0 or (start > 0 and (name[0] == "^" or path[start - 1] != ".")):
        return False
    # a dot stands for any character
    return all(c in (".", p, "\\" + p) for c, p in zip(characters, path[start:], strict=True))


def named(names: str | Sequence[str], path: str) -> bool:
    """PEFT's rule for target_modules: a list of ends of paths, or an expression for whole ones."""
    if isinstance(names, str):
        return _match(names, path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def whole(names: Sequence[str], path: str) -> bool:
    """PEFT's rule for modules_to_save: a list of ends of paths, at a dot or not."""
    return any(path.endswith(name) for name in names)


def in_whole(names: Sequence[str], path: str) -> bool:
    """Whether `path` is, or is inside of, a module that modules_to_save names."""
    above = path.split(".")
    return any(whole(names, ".".join(above[:n])) for n in range(1, len(above) + 1))


def layer_indices(path: str) -> set[int]:
    """The numbers of the layer that `path` is in, for layers_to_transform, none if it is in none:
    PEFT takes the first in the path, older ones took the last, an expert's say."""
    found = (re.match(rf"{start}\.[^.]*\.(\d+)\.", path) for start in (".*?", ".*"))
    return {int(match[1]) for match in found if match is not None}


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
    # the first match counts, and files hold patterns in this order
    pattern = {path: values[path] for path in sorted(values) if values[path] != default}
    found = {path: pattern.get(match_pattern(pattern, path) or "", default) for path in values}
    if found != values:  # one path is the end of another
        pattern = {f"^{re.escape(path)}": value for path, value in pattern.items()}
    return default, pattern


def _match(pattern: str, path: str, around: str = "{}") -> bool:
    whole = around.replace("{}", pattern)
    try:
        if regex is not None:
            return regex.fullmatch(whole, path, timeout=LONGEST_MATCH) is not None
        return re.fullmatch(whole, path) is not None
    except TimeoutError:
        raise ValueError(
            f"{pattern!r} takes more than {LONGEST_MATCH} s to match {path!r}: write it without "
            "repetitions of repetitions"
        ) from None
    except (re.error, getattr(regex, "error", re.error), RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from error
