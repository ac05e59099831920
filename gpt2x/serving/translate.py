"""OpenAI's requests to those of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..generation.prompts import check_tokens, check_vocabulary
from ..generation.sampling import Sampling
from ..runtimes.base import InputError, PromptError
from .faults import ServingError
from .models import EmbeddingModel, ServedModel, TextModel
from .protocol import ChatRequest, CompletionRequest, Controls, EmbeddingRequest, Message
from .requests import TextRequest
from .settings import MAX_INPUT_TOKENS, MAX_TEXTS

DEFAULT_TOKENS = 16  # OpenAI's, of completions


@dataclass(frozen=True)
class Prepared:
    """A request that can be given to the engine.

    Attributes:
        model: what runs it.
        requests: one for each prompt.
        n: how many texts of each prompt are returned.
        echoes: the text of each prompt, where it is returned, too.
        logprobs: how many alternatives are returned with each token; None for no log-probabilities.
        stream: whether the texts are streamed.
        usage: whether the stream ends with the number of tokens.
    """

    model: TextModel
    requests: tuple[TextRequest, ...]
    n: int
    echoes: tuple[str, ...] | None
    logprobs: int | None
    stream: bool
    usage: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, and as text if it came as text."""

    tokens: tuple[int, ...]
    text: str | None


def prepare_completion(body: CompletionRequest, model: TextModel) -> Prepared:
    """Check a request for completions against its model.

    Raises:
        ServingError: if it does not fit.
    """
    prompts = [_prompt(model, one) for one in _listed(body.prompt)]
    n = body.n or 1
    texts = body.best_of or n
    _check_texts(body, len(prompts), n, texts)
    scored = bool(body.echo) and body.logprobs is not None
    if scored and model.engine.decoder.last_only:
        raise ServingError(
            "unsupported_value",
            "echo with logprobs needs the logits of every token: export the model without --logits last",
            "echo",
        )
    # The likeliest texts are found by their log-probabilities.
    logprobs = 0 if body.logprobs is None and texts > n else body.logprobs
    requests = []
    for prompt in prompts:
        limit = _limit(model, prompt, body.max_tokens, DEFAULT_TOKENS)
        requests.append(_request(body, model, prompt, limit, texts, logprobs, scored))
    echoes = tuple(_text(model, prompt) for prompt in prompts) if body.echo else None
    return Prepared(model, tuple(requests), n, echoes, body.logprobs, bool(body.stream), _wants_usage(body))


def prepare_chat(body: ChatRequest, model: TextModel) -> Prepared:
    """Check a request for chat against its model.

    Raises:
        ServingError: if it does not fit, or the model has no chat template.
    """
    if model.chat is None:
        raise ServingError(
            "no_chat_template",
            f"the tokenizer of {model.name} has no chat template, as GPT-2's has none: use /v1/completions",
            "messages",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ServingError("invalid_value", "top_logprobs needs logprobs to be true", "top_logprobs")
    messages = [{"role": message.role, "content": _content(message)} for message in body.messages]
    prompt = _prompt(model, model.chat.render(messages))
    n = body.n or 1
    _check_texts(body, 1, n, n)
    limit = _limit(model, prompt, body.max_completion_tokens or body.max_tokens, model.context)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    request = _request(body, model, prompt, limit, n, logprobs, False)
    return Prepared(model, (request,), n, None, logprobs, bool(body.stream), _wants_usage(body))


def prepare_embeddings(body: EmbeddingRequest, model: EmbeddingModel) -> list[tuple[int, ...]]:
    """The tokens of each input of a request for embeddings.

    Raises:
        ServingError: if they do not fit the model, or are too many.
    """
    inputs = [_prompt(model, one, "input").tokens for one in _listed(body.input)]
    total = sum(map(len, inputs))
    if total > MAX_INPUT_TOKENS:
        raise ServingError(
            "invalid_value", f"the inputs have {total} tokens; a request has {MAX_INPUT_TOKENS} at most", "input"
        )
    return inputs


def tokens_of(model: ServedModel, text: str) -> tuple[int, ...]:
    """The tokens of a text."""
    return tuple(model.tokenizer.encode(text))


def _listed(prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[str | Sequence[int]]:
    """The prompts of a request."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def _prompt(model: ServedModel, prompt: str | Sequence[int], field: str = "prompt") -> Prompt:
    """A prompt, or an input, from a field of a request."""
    text = prompt if isinstance(prompt, str) else None
    tokens = tokens_of(model, prompt) if isinstance(prompt, str) else tuple(prompt)
    if not tokens:
        raise ServingError("invalid_value", f"the {field} is empty: it needs at least one token", field)
    if len(tokens) > model.context:
        raise ServingError(
            "context_length_exceeded",
            f"the {field} has {len(tokens)} tokens; the context is {model.context}: shorten it",
            field,
        )
    try:
        check_vocabulary(model, tokens)
    except PromptError as error:
        raise ServingError("invalid_value", str(error), field) from None
    return Prompt(tokens, text)


def _text(model: TextModel, prompt: Prompt) -> str:
    return model.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text


def _limit(model: TextModel, prompt: Prompt, wanted: int | None, default: int) -> int:
    """The limit of new tokens. Nothing follows the last one, so it needs no room."""
    room = model.context + 1 - len(prompt.tokens)
    if wanted is None:
        return min(default, room)
    if wanted > room:
        raise ServingError(
            "context_length_exceeded",
            f"the prompt has {len(prompt.tokens)} tokens and max_tokens is {wanted}; the context is {model.context}: "
            f"max_tokens can be {room} at most",
            "max_tokens",
        )
    return wanted


def _check_texts(body: Controls, prompts: int, n: int, texts: int) -> None:
    if texts < n:
        raise ServingError("invalid_value", f"best_of is {texts}, less than n, {n}", "best_of")
    if texts > n and body.stream:
        raise ServingError("invalid_value", "best_of cannot be streamed: leave out stream or best_of", "best_of")
    if prompts * texts > MAX_TEXTS:
        raise ServingError(
            "invalid_value", f"{prompts} prompts with {texts} texts each; a request has {MAX_TEXTS} texts at most", "n"
        )
    if body.stream_options is not None and not body.stream:
        raise ServingError("invalid_value", "stream_options needs stream to be true", "stream_options")


def _wants_usage(body: Controls) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _request(
    body: Controls, model: TextModel, prompt: Prompt, limit: int, texts: int, logprobs: int | None, scored: bool
) -> TextRequest:
    sampling = _sampling(body, model, limit)
    stop = body.stop or ()
    end_tokens = (*model.end_tokens, *(body.stop_token_ids or ()))
    try:
        check_tokens(model.engine.decoder, sampling, end_tokens)
    except InputError as error:
        raise ServingError("invalid_value", str(error)) from None
    return TextRequest(
        prompt=prompt.tokens,
        max_tokens=limit,
        sampling=sampling,
        end_tokens=end_tokens,
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
        texts=texts,
        logprobs=logprobs,
        score_prompt=scored,
    )


def _sampling(body: Controls, model: TextModel, limit: int) -> Sampling:
    least = body.min_tokens or 0
    if least > limit:
        raise ServingError("invalid_value", f"min_tokens is {least}, more than max_tokens, {limit}", "min_tokens")
    try:
        return Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            seed=None if body.seed is None else body.seed % (1 << 64),
            logit_bias=_biases(body),
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            min_new_tokens=least,
        )
    except ValueError as error:
        raise ServingError("invalid_value", str(error)) from None


def _biases(body: Controls) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    found = {}
    for key, bias in body.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ServingError("invalid_value", f"logit_bias: {key[:30]!r} is no token id", "logit_bias")
        found[int(key)] = bias
    return found


def _content(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)
