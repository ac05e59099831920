"""The text model of a Triton model repository: the tokenizer and the decoding loop, for Triton's Python backend.

``gpt2x export --triton`` copies this file. It needs numpy and tokenizers in the server's Python, and not gpt2x. The
parameter ``step`` of ``config.pbtxt`` says what runs the ONNX model: ``triton`` (the model ``gpt2_step`` of the
repository), or ``onnxruntime`` (this process).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # Triton's own
from tokenizers import Tokenizer

STEP = "gpt2_step"


class TritonStep:
    """The ONNX model, run by Triton."""

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        """Return the outputs of these names."""
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()]
        request = pb_utils.InferenceRequest(
            model_name=STEP,
            requested_output_names=outputs,
            inputs=tensors,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        )
        response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs]


@dataclass(frozen=True)
class Controls:
    """What a request asks for."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        _check(0 <= self.temperature < np.inf, "temperature", self.temperature, "a finite number of 0 or more")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (disabled) or more")
        _check(0 <= self.top_p <= 1, "top_p", self.top_p, "between 0 and 1")
        _check(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")


def _check(valid: bool | np.bool_, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value}; it must be {wanted}")


class TritonPythonModel:
    """What the Python backend constructs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tokenizer and the step."""
        config = json.loads(args["model_config"])
        facts = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"])
        self.streams = pb_utils.using_decoupled_model_transaction_policy(config)
        self.tokenizer = Tokenizer.from_file(str(folder / args["model_version"] / "tokenizer.json"))
        self.context = int(facts["context"])
        self.vocabulary = int(facts["vocabulary"])
        self.end_token = int(facts["end_token"])
        self.cache = (1, int(facts["heads"]), 0, int(facts["head_size"]))
        self.cache_dtype = np.dtype(facts["cache_dtype"])
        parts = [f"{layer}.{part}" for layer in range(int(facts["layers"])) for part in ("key", "value")]
        self.past = [f"past_key_values.{part}" for part in parts]
        self.outputs = ["logits", *(f"present.{part}" for part in parts)]
        self.step: Any = TritonStep()
        if facts["step"] == "onnxruntime":
            import onnxruntime

            file = folder.parent / STEP / "1" / "model.onnx"
            self.step = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        elif facts["step"] != "triton":
            raise ValueError(f"the parameter step is {facts['step']!r}; it must be triton or onnxruntime")

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Answer each request: with one response, or, if the model is decoupled, with the pieces of its text."""
        if not self.streams:
            return [self._whole(request) for request in requests]
        for request in requests:
            self._stream(request)
        return None

    def _whole(self, request: Any) -> Any:
        try:
            return _response("".join(self._pieces(request)))
        except Exception as error:
            return _failure(error)

    def _stream(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            for piece in self._pieces(request):
                sender.send(_response(piece))
                if sender.is_cancelled():
                    break
        except Exception as error:
            sender.send(_failure(error))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _pieces(self, request: Any) -> Iterator[str]:
        """The text in pieces that end with a whole character."""
        text = _value(request, "text").decode()
        given = {name: _value(request, name) for name in Controls.__dataclass_fields__}
        controls = Controls(**{name: value for name, value in given.items() if value is not None})
        pending: list[int] = []
        piece = ""
        for token in self._tokens(self._prompt(text, controls), controls):
            pending.append(token)
            piece = self.tokenizer.decode(pending, skip_special_tokens=False)
            # U+FFFD at the end: the last token has only some bytes of a character, and the next ones complete it.
            if not piece.endswith("\ufffd"):
                yield piece
                pending, piece = [], ""
        if piece:
            yield piece

    def _prompt(self, text: str, controls: Controls) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError("text is empty: it must have at least one token")
        if max(ids) >= self.vocabulary:
            raise ValueError(f"text has token id {max(ids)}; the model's vocabulary is {self.vocabulary}")
        if len(ids) + controls.max_tokens > self.context:
            raise ValueError(
                f"text has {len(ids)} tokens and max_tokens is {controls.max_tokens}; "
                f"together they exceed the context of {self.context}"
            )
        return ids

    def _tokens(self, prompt: list[int], controls: Controls) -> Iterator[int]:
        """New tokens: the prompt in one run, then a token in each, with a cache that grows."""
        # The random stream of the first row of gpt2x generate.
        random = np.random.default_rng(np.random.SeedSequence(controls.seed).spawn(1)[0])
        past = [np.empty(self.cache, self.cache_dtype)] * len(self.past)
        ids, seen = prompt, 0
        for _ in range(controls.max_tokens):
            positions = np.arange(seen, seen + len(ids), dtype=np.int64)[None]
            seen += len(ids)
            inputs = {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, seen), np.int64),
                "position_ids": positions,
                **dict(zip(self.past, past, strict=True)),
            }
            logits, *past = self.step.run(self.outputs, inputs)
            token = choose(logits[0, -1], controls, random)
            if token == self.end_token:
                return
            yield token
            ids = [token]


def choose(logits: Any, controls: Controls, random: np.random.Generator) -> int:
    """Choose a token from logits (V,), as ``gpt2x generate`` does."""
    if not np.isfinite(logits.max()):
        raise RuntimeError("the logits contain NaN or infinity")
    if controls.temperature == 0:
        return int(logits.argmax())
    scores = logits.astype(np.float64)
    # Dividing by a smaller temperature would give infinity, and NaN for the largest.
    scores = (scores - scores.max()) / max(controls.temperature, 1e-300)
    if 0 < controls.top_k < len(scores):
        scores[scores < np.partition(scores, -controls.top_k)[-controls.top_k]] = -np.inf
    p = np.exp(scores) / np.exp(scores).sum()
    if controls.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[1:][before[1:] >= controls.top_p]] = 0  # the likeliest token always stays
        p /= p.sum()
    return int(random.choice(len(p), p=p))


def _value(request: Any, name: str) -> Any:
    """The only element of an input; None if the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    value = tensor.as_numpy().reshape(-1)[0]
    return value if isinstance(value, bytes) else value.item()


def _response(text: str) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor("text", np.array([text.encode()], np.object_))])


def _failure(error: Exception) -> Any:
    return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))
