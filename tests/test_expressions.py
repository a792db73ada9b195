"""Expressions of adapter files mean what `re` means by them, and matching them always ends."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lora.expressions import LONGEST, Expression
from fused_lora.targets import match_pattern

LAYERS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
PATHS = [f"model.layers.{i}.{name}" for i in (0, 2, 12) for name in LAYERS]
PATHS += ["lm_head", "base.layers.1.self_attn.q_proj", "model.vision.blocks.3.attn.proj-out"]
WRITTEN = [
    r".*\.(q_proj|v_proj)",
    r"^(?!.*lm_head).*$",
    r"(model|base)\.layers\.(0|1|2)\.self_attn\..*",
    r"^model\.layers\.12\.self_attn\.q_proj",
    r"layers\.(?:[0-9]|1[0-2])\.mlp\.\w+",
    r"(.*\.)?(self_attn\.)?[qv]_proj",
    r"(\w+\.)*layers\.\d{1,2}\.(self_attn|mlp)\.(?P<name>.+)",
    r".*vision.*blocks.*attn.*",
    r"model\.vision\.blocks\.3\.attn\.proj\-out",
    r"self_attn\.(?=q).*|lm_head",
    r"[^.]+",
]
ENDLESS = [
    *("(a|a)*b", "(a*)*b", "((a+))+b", "(.*)*b", "((a)+)+b", "(a+(c)?)+b", "(.*a+)+b", "(a|a?)+b"),
    *("(a?){60}a{60}b", "a?" * 60 + "a" * 60 + "b", "(a|a)" * 40 + "b", ".*" * 20 + "b"),
    *("((a{0,99}){0,99}){0,99}b", "(((((a*)*)*)*)*)*b", "([)]|a+)+b", "(?:a+)+b", "(a+)+?b"),
    *("(?=(a+)+b)a", "(?!(a*)*b)c"),
]


def specified(pattern, path):
    """PEFT's rule for the keys of rank_pattern and alpha_pattern."""
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_people_write_means_what_re_means(pattern):
    found = [path for path in PATHS if Expression(pattern).fits_end(path)]
    assert found == [path for path in PATHS if specified(pattern, path)] != []


@pytest.mark.parametrize("pattern", ENDLESS)
def test_matching_always_ends(pattern):
    assert not Expression(pattern).fits_end("a" * 300)


def test_what_would_take_long_all_the_same_is_given_up_in_words():
    slow = Expression("((((((a|b)*a)*b)*a)*b)*)*c")
    with pytest.raises(ValueError, match=r"takes more than 20000 steps"):
        slow.fits_end("a" * 300)
    with pytest.raises(ValueError, match=rf"a path has 1001 characters: at most {LONGEST} are"):
        Expression("a*").fits_end("a" * 1001)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "a)", "(a", "[a", "[z-a]", "*a", "a**", "a*+", "a{2}{3}", "a{3,2}", "\\"),
        *(r"(a)\1", r"(?<=a)b", "(?i)a", r"\ba", r"a\Z", "(?P<n>a)(?P=n)", "a{", "(?>a)"),
        *("(" * 100 + ")" * 100, "a" * 1001),
    ],
)
def test_what_cannot_be_read_is_refused(pattern):
    with pytest.raises(ValueError, match=r"an expression cannot be read at .*up to 1000 char"):
        Expression(pattern)


def parts(children):
    def join(*strategies):
        return st.tuples(*strategies).map("".join)

    repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "*?", "+?", "??"])
    return st.one_of(
        join(children, children),
        join(st.just("("), children, st.just("|"), children, st.just(")")),
        join(st.sampled_from(["(?:", "(?=", "(?!"]), children, st.just(")")),
        join(st.just("("), children, st.just(")"), repeats),
    )


ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", "^", "$", ""])


@settings(max_examples=500, deadline=None)
@given(pattern=st.recursive(ATOMS, parts, max_leaves=8), path=st.text("ab.", max_size=8))
def test_any_expression_means_what_re_means(pattern, path):
    assert Expression(pattern).fits_end(path) == specified(pattern, path)


@settings(max_examples=300, deadline=None)
@given(name=st.text("ab.-", min_size=1, max_size=4), path=st.text("ab.-", max_size=6))
def test_names_mean_what_re_means_without_being_compiled(name, path):
    def compiled(pattern, path):
        pytest.fail("a name was compiled")

    found = match_pattern([name], path, compiled)
    assert found == (name if specified(name, path) else None)
