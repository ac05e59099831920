"""gpt2x as a model of EleutherAI's lm-evaluation-harness (``pip install 'gpt2x[eval]'``).

    python -m gpt2x.lm_eval run --model gpt2x --model_args pretrained=gpt2-onnx/,precision=int8 --tasks hellaswag

``python -m gpt2x.lm_eval`` is the harness's own command line with this model registered. In Python, import this module, or pass
a ``GPT2XLM`` to ``lm_eval.simple_evaluate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import lm_eval.models  # noqa: F401 - the harness registers its own models only where there are none yet
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..generation.config import GenerationConfig
from ..generation.generate import Prompt, continuations, end_token_of
from ..runtimes.opening import home_of, open_decoder
from ..scoring.spans import Span, check_can_score, score_unordered
from ..tokenizer import Tokenizer

# The harness's names of the limit of new tokens, in its order of priority.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("gpt2x")
class GPT2XLM(TemplateLM):
    """A GPT-2 in any format or runtime of gpt2x.

    Args:
        pretrained: weights, an ONNX directory or file, TorchScript, or a ``.pt2`` file.
        tokenizer: the directory (or GGUF file) of the tokenizer; by default beside the model.
        precision: which ONNX model of a directory; by default fp32, or else the only one.
        runtime: "torch" or "onnx", if a directory has weights and ONNX.
        batch_size: how many texts are generated at once. What is scored goes into batches by its length.
        max_gen_toks: the limit of new tokens of requests that state none.
        max_length: a context shorter than the model's.
        threads: threads of each operator; by default one for each core.

    Raises:
        ConversionError: if the model or its tokenizer cannot be opened.
        InputError: if the model returns only the last logits.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        precision: str | None = None,
        runtime: str | None = None,
        batch_size: int | str | None = 1,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if device not in (None, "cpu"):
            raise ValueError(f"device is {device!r}; gpt2x runs on the CPU")
        self.decoder = open_decoder(pretrained, runtime, precision=precision, threads=threads)
        check_can_score(self.decoder)
        self.text_tokenizer = Tokenizer.from_pretrained(tokenizer or home_of(pretrained))
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size or 1)
        self.max_gen_toks = max_gen_toks
        self.max_length = min(max_length or self.decoder.n_ctx, self.decoder.n_ctx)

    @property
    def eot_token_id(self) -> int:
        """The token ``<|endoftext|>``."""
        end = end_token_of(self.decoder, self.text_tokenizer)
        if end is None:
            raise ValueError(
                "neither the tokenizer nor the configuration has an end token, which starts each text here"
            )
        return end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text. GPT-2 adds no special tokens."""
        return self.text_tokenizer.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """Return what ran, for the harness's report."""
        return {"runtime": self.decoder.runtime, "precision": self.decoder.precision}

    # --------------------------------------------------------------------------------------------------- scoring

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether greedy decoding would return it.

        A context that does not fit is cut from the left.
        """
        spans = [self._span(context, continuation) for _, context, continuation in requests]
        results = []
        for request, found in zip(requests, score_unordered(self.decoder, spans), strict=True):
            result = float(found.log_probabilities.sum()), bool(found.greedy.all())
            if request[0] is not None:  # the texts, which a rolling window has not
                self.cache_hook.add_partial("loglikelihood", request[0], result)
            results.append(result)
        return results

    def _span(self, context: list[int], continuation: list[int]) -> Span:
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(f"a continuation has {len(continuation)} tokens; 1 to {self.max_length} are possible")
        # The last token is not an input of the model.
        tokens = np.array([*context, *continuation][-(self.max_length + 1) :], np.int64)
        return Span(tokens, len(tokens) - len(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, all its tokens scored, in windows that do not overlap."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            total = sum(part for part, _ in parts)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
        return results

    # ------------------------------------------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a stop string, an end token or the limit."""
        results = [""] * len(requests)
        # Controls are dicts, which can be neither sorted nor compared by groupby; equal ones have the same text.
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        for _, same_controls in groupby(order, key=lambda i: repr(requests[i].args[1])):
            numbers = list(same_controls)
            config = self._config(requests[numbers[0]].args[1])
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                prompts: list[Prompt] = [self._prompt(requests[i].args[0], config) for i in batch]
                texts = continuations(self.decoder, self.text_tokenizer, prompts, config)
                for i, (one,) in zip(batch, texts, strict=True):
                    results[i] = one.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, one.text)
        return results

    def _prompt(self, context: str, config: GenerationConfig) -> list[int]:
        """The end of a context, with room for the new tokens."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-(self.max_length - config.max_new_tokens) :]

    def _config(self, given: dict[str, Any]) -> GenerationConfig:
        """The controls of a request, in the harness's names. Decoding is greedy unless it asks for sampling."""
        controls = dict(given)
        stop = controls.pop("until", None) or []
        limits = [controls.pop(name) for name in LIMITS if controls.get(name) is not None]
        limit = int(limits[0]) if limits else self.max_gen_toks
        if not limit < self.max_length:
            raise ValueError(
                f"max_gen_toks is {limit}; it must be below the context of {self.max_length}: pass --gen_kwargs "
                "max_gen_toks=N"
            )
        if not controls.pop("do_sample", float(controls.get("temperature") or 0) > 0):
            controls["temperature"] = 0
        strings = [stop] if isinstance(stop, str) else stop
        return GenerationConfig.of(
            max_new_tokens=limit, stop_strings=[string for string in strings if string], **controls
        )


__all__ = ["GPT2XLM"]
