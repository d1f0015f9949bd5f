"""The only reason for which a test may be skipped, in all of tests/."""

import ast

import pytest
from checkout import ROOT

pytestmark = pytest.mark.quick

SKIPS = {"skip", "skipif", "importorskip", "xfail", "skipTest", "SkipTest"}
ALLOWED = ("no browser", "no node")


def skips(source: str) -> list[str]:
    """Every call that may leave a test out, but those that say that there is no browser or no node."""
    if not any(name in source for name in SKIPS):
        return []  # spares most files their parsing
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = [ast.unparse(call) for call in calls if ast.unparse(call.func).rpartition(".")[2] in SKIPS]
    return [call for call in found if not any(reason in call for reason in ALLOWED)]


def test_only_a_missing_browser_or_node_skips_a_test() -> None:
    assert [call for path in (ROOT / "tests").rglob("*.py") for call in skips(path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ('pytest.skip("no card")', 1),
        ('x = pytest.mark.skipif(not HAS_CARD, reason="no card")', 1),
        ('torch = pytest.importorskip("torch")', 1),
        ('pytest.skip("no browser")', 0),
        ('pytest.mark.skipif(NODE is None, reason="no node")', 0),
        ("list.skipped(3)", 0),
    ],
)
def test_a_skip_is_found_wherever_it_is_called(source: str, number: int) -> None:
    assert len(skips(source)) == number
