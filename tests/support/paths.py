"""Where the tests find files."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
RELEASE = ROOT.parent / "shared/data/openai-117M"  # OpenAI's own; others may have a folder shared/, too

needs_shared = pytest.mark.skipif(not RELEASE.is_dir(), reason="the folder shared/ with OpenAI's own files is not here")


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
