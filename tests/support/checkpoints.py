"""Small GPT-2 models with random weights, and how two checkpoints are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters import Checkpoint, GPT2Config, LazyTensor
from converters.containers.container import Container
from converters.opening.assemble import assemble as last_step
from converters.opening.read_configuration import Stated
from converters.opening.recognise_dialect import recognise
from converters.opening.resolve import resolve
from converters.opening.unwrap import unwrap
from converters.spec import ACTIVATIONS, TANH_GELU

# No two dimensions are alike.
TINY = GPT2Config(n_layer=2, n_head=2, n_embd=6, n_ctx=10, n_vocab=13, bos_token_id=12, eos_token_id=12)
# Its matrices have whole blocks of 32 weights.
SMALL = GPT2Config(n_layer=2, n_head=2, n_embd=64, n_ctx=40, n_vocab=97, bos_token_id=0, eos_token_id=0)

# Each switch of the configuration, away from its default.
SWITCHES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    *({"activation_function": name} for name in ACTIVATIONS if name not in TANH_GELU),
    {"layer_norm_epsilon": 0.3},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
    {"n_inner": 11, "n_head": 3},
]


def random_checkpoint(config: GPT2Config = TINY, seed: int = 0) -> Checkpoint:
    """Every value random, biases and gains too."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.shapes().items()}
    return Checkpoint(config=config, tensors={name: LazyTensor.of(array) for name, array in arrays.items()})


def gentle(config: GPT2Config = SMALL, seed: int = 0) -> Checkpoint:
    """Random weights of the size that trained ones have."""
    tensors = {}
    for name, tensor in random_checkpoint(config, seed).tensors.items():
        is_matrix = len(tensor.shape) == 2
        array = tensor.read() * (0.1 if is_matrix else 0.02)
        gain = name.split(".")[-2].startswith("ln_") and name.endswith("weight")
        tensors[name] = LazyTensor.of((array + gain).astype(np.float32))
    return Checkpoint(config=config, tensors=tensors)


def assemble(
    container: Container,
    stated: Mapping[str, Any],
    stated_in: str,
    *,
    n_head: int | None = None,
    n_vocab: int | None = None,
    tie: bool | None = None,
) -> Checkpoint:
    """A checkpoint of an open container and a configuration: the steps of ``open_checkpoint`` between the two."""
    parameters = recognise(unwrap(container), n_vocab)
    return last_step(parameters, resolve(parameters, Stated(stated, stated_in), n_head), tie)


def arrays_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def assert_same_bytes(expected: Checkpoint, actual: Checkpoint) -> None:
    assert {n: (t.dtype, t.shape) for n, t in expected.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in actual.tensors.items()
    }
    for name, tensor in expected.tensors.items():
        assert tensor.read().tobytes() == actual.tensors[name].read().tobytes(), name
