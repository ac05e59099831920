"""The marker ``untraced``: coverage pauses in a test, and goes on after it."""

import sys

import pytest


@pytest.fixture
def tracer():
    before = sys.gettrace()
    yield before
    assert sys.gettrace() is before


@pytest.mark.untraced
def test_a_marked_test_is_not_traced(tracer):
    assert sys.gettrace() is None


def test_any_other_test_is_traced_if_coverage_is_on(tracer):
    assert sys.gettrace() is tracer
