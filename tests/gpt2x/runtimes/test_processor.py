"""Which kernels a session takes, by what the processor is."""

from __future__ import annotations

import builtins
import io
import platform

import pytest

from gpt2x.runtimes import processor

WINDOWS = "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"


@pytest.fixture(autouse=True)
def forget():
    processor.is_amd.cache_clear()
    yield
    processor.is_amd.cache_clear()


def described(monkeypatch, text):
    """Let /proc/cpuinfo hold a text; None for no such file."""
    opened = builtins.open

    def found(path, *args, **options):
        if path != "/proc/cpuinfo":
            return opened(path, *args, **options)
        if text is None:
            raise FileNotFoundError(path)
        return io.StringIO(text)

    monkeypatch.setattr(builtins, "open", found)


@pytest.mark.parametrize(("cpuinfo", "name", "expected"), [
    ("vendor_id\t: AuthenticAMD\n", "", True), ("vendor_id\t: GenuineIntel\n", WINDOWS, False),
    (None, WINDOWS, True), (None, "arm", False),
])  # fmt: skip
def test_the_vendor_of_the_processor_is_found(monkeypatch, cpuinfo, name, expected):
    described(monkeypatch, cpuinfo)
    monkeypatch.setattr(platform, "processor", lambda: name)
    assert processor.is_amd() is expected


@pytest.mark.parametrize(("amd", "saturates", "expected"), [
    (True, True, True), (True, False, False), (False, True, False),
])  # fmt: skip
def test_prompts_are_read_in_tiles_only_where_that_was_measured_to_be_as_fast(monkeypatch, amd, saturates, expected):
    monkeypatch.setattr(processor, "is_amd", lambda: amd)
    monkeypatch.setattr(processor, "saturates", lambda: saturates)
    assert processor.tiles_read_prompts_well() is expected
