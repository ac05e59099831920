"""Proof that two GPT-2s are one: the same weights, the same logits, the same words.

Weights are compared as bytes and need no torch. Logits and greedy words are compared where torch is installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters import Checkpoint, GPT2Config
from converters.arrays import as_array, cast_array
from converters.checkpoint import crc_of, zip_chunks
from converters.tensors import F32, F64, LazyTensor, whole_items

from .generate import Decoder, Generation, Sampling
from .tokenizer import Tokenizer

RELATIVE_BOUND = 1e-5  # of the largest logit, for float32
GREEDY_TOKENS = 200
LOGIT_TOKENS = 128

# Real text, so that a real model is compared where it lives.
TEXT = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
Resolved. resolved.

First Citizen:
First, you know Caius Marcius is chief enemy to the people.
"""

Array = NDArray[Any]


class Subject(Decoder, Protocol):
    """Something to compare: a step of decoding, and all logits of one sequence at once."""

    def logits(self, ids: Sequence[int]) -> Array:
        """(T,) -> (T, V)."""
        ...


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    passed: bool | None  # None: not asked, for the reason in ``result``
    result: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was compared, and what came out."""

    a: str
    b: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differed."""
        answers = [check.passed for check in self.checks]
        return True in answers and False not in answers

    def to_json(self) -> str:
        """The report for machines."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2)


# ------------------------------------------------------------------------------------------------- whole reports


def verify_checkpoints(a: Checkpoint, b: Checkpoint) -> Report:
    """Two checkpoints: configuration, weights, tokenizer, logits and words."""
    checks = [compare_configs(a, b), compare_weights(a, b), compare_tokenizers(a, b)]
    if a.config.differences(b.config, ("n_vocab", "n_ctx")):
        reason = "not compared: the models take different tokens"
        checks += [Check("logits", None, reason), Check("greedy words", None, reason)]
    elif not _installed("torch"):
        checks += [Check(name, None, needs_torch()) for name in ("logits", "greedy words")]
    else:
        checks += compare_runs(gpt2x_model(a), gpt2x_model(b), sample_ids(a))
    return Report(str(a.source), str(b.source), checks)


def verify_alone(a: Checkpoint) -> Report:
    """A checkpoint run by gpt2x against transformers, or the float64 reference where that is missing."""
    if not _installed("torch"):
        return Report(str(a.source), "nothing", [Check("logits", None, needs_torch())])
    if _installed("transformers"):
        return Report(str(a.source), "transformers", compare_runs(gpt2x_model(a), Transformers(a), sample_ids(a)))
    from .reference import Reference

    reference = Uncached(Reference(a), a.config)
    return Report(str(a.source), "float64 reference", compare_runs(gpt2x_model(a), reference, sample_ids(a)))


def verify_release(a: Checkpoint) -> Report:
    """A checkpoint against the checksums of OpenAI's 124M release: needs nothing but the table."""
    return Report(str(a.source), "openai-124M", [compare_release(a)])


def needs_torch() -> str:
    """What to say where torch is missing."""
    return "not compared: needs torch (pip install 'gpt2x[torch]')"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------------------- single checks


def compare_configs(a: Checkpoint, b: Checkpoint) -> Check:
    """Everything that decides shapes and arithmetic."""
    differences = a.config.differences(b.config)
    return Check("configuration", not differences, "; ".join(differences) or "the same", {"differences": differences})


def compare_weights(a: Checkpoint, b: Checkpoint) -> Check:
    """Every tensor, byte for byte. Each file is read once."""
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    faults = {name: fault for name in names if (fault := _difference(a.tensors.get(name), b.tensors.get(name)))}
    result = f"{len(names) - len(faults)} of {len(names)} tensors bit-identical"
    if faults:
        result += "; " + "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:3])
    return Check(
        "weights",
        not faults,
        result,
        {"tensors": len(names), "identical": len(names) - len(faults), "different": faults},
    )


def _difference(a: LazyTensor | None, b: LazyTensor | None) -> str | None:
    if a is None or b is None:
        return "is only in " + ("the second" if a is None else "the first")
    if a.shape != b.shape:
        return f"is {list(a.shape)}, not {list(b.shape)}"
    if a.dtype != b.dtype:
        return f"is {a.dtype}, not {b.dtype} (largest difference {_largest(a, b):.3g})"
    count, largest, size = 0, 0.0, a.dtype.itemsize
    for x, y in zip_chunks(whole_items(a.chunks(), size), whole_items(b.chunks(), size)):
        if x != y:
            apart = (np.frombuffer(x, np.uint8) != np.frombuffer(y, np.uint8)).reshape(-1, size).any(1)
            count += int(apart.sum())
            u, v = (cast_array(as_array(z, a.dtype, (-1,))[apart], a.dtype, F64, "") for z in (x, y))
            largest = max(largest, float(np.abs(u - v).max()))
    return f"differs in {count} values (by {largest:.3g} at most)" if count else None


def _largest(a: LazyTensor, b: LazyTensor) -> float:
    return float(np.abs(cast_array(a.read(), a.dtype, F64, "") - cast_array(b.read(), b.dtype, F64, "")).max(initial=0))


def compare_tokenizers(a: Checkpoint, b: Checkpoint) -> Check:
    """The vocabularies and merges beside the two."""
    if not a.tokenizer or not b.tokenizer:
        return Check(
            "tokenizer",
            None,
            "not compared: " + ("neither has one" if not (a.tokenizer or b.tokenizer) else "only one has one"),
        )
    same = a.tokenizer.vocabulary() == b.tokenizer.vocabulary()
    return Check("tokenizer", same, "the same vocabulary and merges" if same else "the vocabularies or merges differ")


def compare_release(a: Checkpoint) -> Check:
    """CRC-32C of every tensor against the index of OpenAI's 124M checkpoint."""
    table = release_checksums()
    faults = [name for name, expected in table.items() if not _meets(a.tensors.get(name), expected)]
    extra = [name for name in a.tensors if name not in table]
    result = f"{len(table) - len(faults)} of {len(table)} tensors bit-identical to OpenAI's release"
    if faults or extra:
        result += f"; other: {', '.join((faults + extra)[:3])}{' ...' if len(faults + extra) > 3 else ''}"
    return Check(
        "weights",
        not faults and not extra,
        result,
        {"tensors": len(table), "identical": len(table) - len(faults), "different": faults + extra},
    )


def release_checksums() -> dict[str, dict[str, Any]]:
    """Canonical name -> shape and CRC-32C (of float32 bytes, row-major) in OpenAI's 124M release."""
    text = resources.files("converters").joinpath("openai_124M.json").read_text()
    return {name: {"shape": tuple(shape), "crc32c": int(crc, 16)} for name, (shape, crc) in json.loads(text).items()}


def _meets(tensor: LazyTensor | None, expected: dict[str, Any]) -> bool:
    return (
        tensor is not None
        and tensor.dtype == F32
        and tensor.shape == expected["shape"]
        and crc_of(tensor) == expected["crc32c"]
    )


# -------------------------------------------------------------------------------------------- logits and words


def compare_runs(a: Subject, b: Subject, ids: Sequence[int]) -> list[Check]:
    """Logits and greedy words of two models on the same tokens."""
    check, error = compare_logits(a, b, ids)
    return [check, compare_words(a, b, ids, error)]


def sample_ids(a: Checkpoint) -> list[int]:
    """Tokens to compare on: real text where the tokenizer is there and fits, else the same arbitrary ids each time."""
    if a.tokenizer:
        ids = Tokenizer.from_files(a.tokenizer).encode(TEXT)
        if max(ids) < a.config.n_vocab:
            return ids[: min(LOGIT_TOKENS, a.config.n_ctx)]
    return [int(i) for i in np.random.default_rng(0).integers(a.config.n_vocab, size=min(LOGIT_TOKENS, a.config.n_ctx))]


def compare_logits(a: Subject, b: Subject, ids: Sequence[int]) -> tuple[Check, float]:
    """Logits at every position, against a bound relative to the largest; also gives the largest error."""
    x, y = (np.asarray(model.logits(ids), np.float64) for model in (a, b))
    largest, error = float(np.abs(y).max()), float(np.abs(x - y).max())
    passed = bool(np.isfinite([error, largest]).all() and error <= RELATIVE_BOUND * largest)
    kind = (
        "bit-identical"
        if np.array_equal(x, y)
        else f"largest error {error:.2e}, {error / largest:.1e} of the largest logit"
    )
    details = {"tokens": len(ids), "max_abs_error": error, "max_logit": largest, "bound": RELATIVE_BOUND * largest}
    return Check("logits", passed, f"{kind} (bound {RELATIVE_BOUND:g}), {len(ids)} positions", details), error


def compare_words(a: Decoder, b: Decoder, prompt: Sequence[int], error: float) -> Check:
    """Greedy tokens, as long as the context allows, up to 200.

    A divergence counts where b's gap between first and second exceeds twice the logits' largest error; under that it is
    a near tie, which rounding may decide either way.
    """
    prompt = list(prompt[: max(1, min(32, a.n_ctx // 2))])
    n = min(GREEDY_TOKENS, a.n_ctx - len(prompt))
    ours, theirs = (greedy(decoder, prompt, n) for decoder in (a, b))
    first = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), None)
    if first is None:
        return Check("greedy words", True, f"{n} of {n} tokens the same", {"tokens": n, "first_difference": None})
    gap = top_gap(b, [*prompt, *theirs[:first]])
    tie = gap <= 2 * error
    result = f"differ from token {first} of {n} (gap {gap:.2e}{', a near tie' if tie else ''})"
    return Check("greedy words", tie, result, {"tokens": n, "first_difference": first, "gap": gap, "near_tie": tie})


def greedy(decoder: Decoder, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens after a prompt; never stops at an end of text."""
    generation = Generation(decoder, [prompt], n, Sampling(temperature=0))
    return [token for (token,) in generation if token is not None]


def top_gap(decoder: Decoder, ids: list[int]) -> float:
    """How far the likeliest next token's logit is from the second's."""
    logits, _ = decoder.step(np.array([ids]), None, np.arange(len(ids))[None], None)
    second, first = np.sort(logits[0])[-2:]
    return float(first - second)


# ------------------------------------------------------------------------------------------- things to compare


def gpt2x_model(checkpoint: Checkpoint) -> Subject:
    """gpt2x's own model of a checkpoint."""
    from .load import model_of
    from .torch_runtime import TorchDecoder

    return TorchDecoder(model_of(checkpoint))


class Uncached:
    """A function from ids to logits as a decoder that computes everything anew at each step."""

    def __init__(self, logits: Callable[[Sequence[int]], Array], config: GPT2Config) -> None:
        self.logits, self.n_ctx, self.n_vocab = logits, config.n_ctx, config.n_vocab

    def step(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.step``, for one row."""
        ids = [*(cache or []), *input_ids[0].tolist()]
        return np.asarray(self.logits(ids))[None, -1], ids


class Transformers:
    """transformers' ``GPT2LMHeadModel`` with the weights of a checkpoint, as a decoder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        from converters.config import to_hf

        from .load import state_of

        config = GPT2Config(
            **{k: v for k, v in to_hf(checkpoint.config).items() if k not in ("architectures", "model_type", "n_ctx")}
        )
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self.model = GPT2LMHeadModel(config)
        state = {
            name if name.startswith("lm_head") else f"transformer.{name}": t.float()
            for name, t in state_of(checkpoint).items()
        }
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        self.model.load_state_dict(state, assign=True, strict=True)
        self.model.tie_weights()
        self.model.eval()
        self.n_ctx, self.n_vocab = checkpoint.config.n_ctx, checkpoint.config.n_vocab

    def logits(self, ids: Sequence[int]) -> Array:
        """(T,) -> (T, V)."""
        import torch

        with torch.inference_mode():
            result: Array = self.model(torch.tensor([list(ids)])).logits[0].numpy()
        return result

    def step(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """As ``Decoder.step``."""
        import torch

        mask = None if attention_mask is None else torch.from_numpy(attention_mask)
        with torch.inference_mode():
            out = self.model(
                torch.from_numpy(input_ids),
                attention_mask=mask,
                position_ids=torch.from_numpy(position_ids),
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits[:, -1].numpy(), out.past_key_values
