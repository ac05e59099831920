"""The models of several benchmarks."""

from __future__ import annotations

import numpy as np

from converters import Checkpoint, GPT2Config, LazyTensor


def random_model(config: GPT2Config | None = None) -> Checkpoint:
    """Return a model with random weights, by default of GPT-2 small's shape."""
    config = config or GPT2Config()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in config.shapes().items():
        tensors[name] = LazyTensor.of(rng.standard_normal(shape, np.float32) * np.float32(0.02))
    return Checkpoint(config=config, tensors=tensors)
