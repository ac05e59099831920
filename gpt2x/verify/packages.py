"""What can be compared with the packages that are installed."""

from __future__ import annotations

import importlib.util

from ..precisions import precisions_in


def installed(module: str) -> bool:
    """Whether a package is installed, which is not imported."""
    return importlib.util.find_spec(module) is not None


def can_measure(precision: str) -> bool:
    """Whether the loss of a model in exact arithmetic can be computed: not for a pair of precisions, such as ``w8a8+int4``."""
    return installed("torch") and installed("onnx") and len(precisions_in(precision)) == 1
