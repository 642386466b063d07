"""Bounds on metrics: reading them, which numbers they concern, and when they hold."""

import pytest

from mambactl.errors import UsageError
from mambactl.report.thresholds import failures, parse_checks, require_known

SCORES = {
    "novels": {"kl": 0.5, "agreement": 0.62, "perplexity_ratio": 1.1},
    "code": {"kl": 0.2, "agreement": 0.7, "perplexity_ratio": float("nan")},
    "copa": {"acc": 0.4, "acc_norm": 0.5, "acc_stderr": 0.05},
}


@pytest.mark.parametrize(
    ("check", "failing"),
    [
        ("agreement>=0.6", []),
        ("agreement=0.6", []),
        ("agreement >= 0.62", []),
        ("agreement>=0.65", ["novels.agreement is 0.62, asked was >= 0.65"]),
        ("code.agreement=0.65", []),
        ("novels=0.65", ["novels.agreement is 0.62, asked was >= 0.65"]),
        ("kl<=0.5", []),
        ("kl<=0.1", ["novels.kl is 0.5, asked was <= 0.1", "code.kl is 0.2, asked was <= 0.1"]),
        ("kl>=0.3", ["code.kl is 0.2, asked was >= 0.3"]),
        ("copa=0.45", ["copa.acc is 0.4, asked was >= 0.45"]),
        ("copa.acc_norm=0.45", []),
        ("perplexity_ratio<=2", ["code.perplexity_ratio is nan, asked was <= 2"]),
    ],
)
def test_which_bounds_hold(check, failing):
    assert failures(parse_checks([check]), SCORES) == failing


@pytest.mark.parametrize("text", ["agreement", "=0.5", "agreement>0.5", "kl<=low", "a=b=1", ""])
def test_what_is_no_bound(text):
    with pytest.raises(UsageError, match="not a bound on a metric"):
        parse_checks([text])


def test_equals_is_refused_where_lower_is_better():
    with pytest.raises(UsageError) as raised:
        parse_checks(["kl=0.5"])
    assert "kl<=0.5" in raised.value.hint


def test_unknown_metric_lists_the_known():
    known = {group: list(metrics) for group, metrics in SCORES.items()}
    require_known(parse_checks(["copa=1", "code.kl<=1", "acc_norm=0"]), known)
    for name in ("accuracy", "copa.kl", "other.acc"):
        with pytest.raises(UsageError, match=f"nothing called {name}") as raised:
            require_known(parse_checks([f"{name}>=1"]), known)
        assert "perplexity_ratio" in raised.value.hint and "copa" in raised.value.hint
