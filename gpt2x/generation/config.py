"""All controls of text generation under one name each, and ``generation_config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from converters import ConfigError
from converters.io.json import read_json

from .beams import Beams
from .guesses import Speculate
from .sampling import Sampling
from .stop_strings import check_stop_strings

SAMPLING = tuple(item.name for item in fields(Sampling))
BEAMS = tuple(item.name for item in fields(Beams))
ONLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
"""Controls of the random choice, which beam search does not make."""
MAX_ROWS = 1024
"""The most beams or texts of one prompt: each is a row of the cache, and the number may come from a file."""


@dataclass(frozen=True)
class GenerationConfig:
    """How a text is continued.

    ``GenerationConfig.of(temperature=0.7, stop_strings=["\\n"])`` takes every control by its own name.

    Args:
        max_new_tokens: the limit of new tokens.
        max_length: if given, the limit of tokens with the prompt, in place of ``max_new_tokens``.
        sampling: how a token is chosen.
        beams: beam search, in place of sampling.
        num_return_sequences: how many texts continue each prompt.
        stop_strings: the text ends before the first of them.
        eos_token_id: the tokens that end a text; None for the tokenizer's own.
        stop_token_ids: further tokens that end a text.
        speculate: speculative decoding of single texts; several at once decode plainly.

    Raises:
        ValueError: if a value is out of range, or two of them contradict each other.
    """

    max_new_tokens: int = 100
    max_length: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    beams: Beams | None = None
    num_return_sequences: int = 1
    stop_strings: Sequence[str] = ()
    eos_token_id: Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    speculate: Speculate | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be 0 or more")
        if self.max_length is not None and self.max_length < 0:
            raise ValueError(f"max_length is {self.max_length}; it must be 0 or more")
        if self.sampling.min_new_tokens > self.max_new_tokens and self.max_length is None:
            raise ValueError(
                f"min_new_tokens is {self.sampling.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}"
            )
        if not 1 <= self.num_return_sequences <= MAX_ROWS:
            raise ValueError(f"num_return_sequences is {self.num_return_sequences}; it must be 1 to {MAX_ROWS}")
        if self.beams and self.num_return_sequences > self.beams.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams, {self.beams.num_beams}"
            )
        if not self.beams and self.num_return_sequences > 1 and self.sampling.greedy:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, but greedy decoding has one result: set "
                "temperature above 0, or num_beams"
            )
        if self.beams and self.speculate:
            raise ValueError("speculative decoding does not do beam search: leave out speculate, or num_beams")
        check_stop_strings(self.stop_strings)

    @classmethod
    def of(cls, **values: Any) -> GenerationConfig:
        """A configuration of controls by name: those of this class, of ``Sampling``, and of ``Beams``.

        Raises:
            ValueError: if a name is unknown, a value is out of range, or two of them contradict each other.
        """
        own = {item.name for item in fields(cls)} - {"sampling", "beams"}
        unknown = sorted(set(values) - own - set(SAMPLING) - set(BEAMS))
        if unknown:
            raise ValueError(f"unknown control: {', '.join(unknown)}")
        chosen = {name: value for name, value in values.items() if name in own}
        return cls(**chosen, sampling=_sampling(values), beams=_beams(values))

    def end_tokens(self, default: int | None) -> tuple[int, ...]:
        """The tokens that end a text, where the tokenizer's own is ``default``."""
        own = self.eos_token_id
        if own is None:
            own = () if default is None else (default,)
        return (*own, *self.stop_token_ids)

    def new_tokens(self, prompt_length: int) -> int:
        """The limit of new tokens after a prompt."""
        if self.max_length is None:
            return self.max_new_tokens
        return max(0, self.max_length - prompt_length)

    def most_tokens(self, prompt_length: int) -> int:
        """How many tokens a text has at most, with its prompt."""
        return prompt_length + self.new_tokens(prompt_length)


def check_given(given: Mapping[str, Any]) -> None:
    """Refuse controls by name that are invalid, whatever a ``generation_config.json`` adds to them.

    Raises:
        ValueError: if a value is out of range, or two of them contradict each other.
    """
    _sampling(given)
    check_stop_strings(given.get("stop_strings", ()))


def _sampling(values: Mapping[str, Any]) -> Sampling:
    given = {name: value for name, value in values.items() if name in SAMPLING}
    if "min_new_tokens" in given:  # transformers then ignores min_length, also where the number is 0
        given.pop("min_length", None)
    if values.get("num_beams", 1) <= 1:
        return Sampling(**given)
    random = [name for name in ONLY_SAMPLING if name in given]
    if random:
        raise ValueError(f"beam search does not sample: leave out {', '.join(random)}, or num_beams")
    return Sampling(**given, temperature=0)


def _beams(values: Mapping[str, Any]) -> Beams | None:
    given = {name: value for name, value in values.items() if name in BEAMS}
    number = given.get("num_beams", 1)
    if not 1 <= number <= MAX_ROWS:
        raise ValueError(f"num_beams is {number}; it must be 1 to {MAX_ROWS}")
    if number > 1:
        return Beams(**given)
    alone = [name for name in given if name != "num_beams"]
    if alone:
        raise ValueError(f"{' and '.join(alone)} only affects beam search: set num_beams to 2 or more")
    return None


# ------------------------------------------------------------------------------------------- generation_config.json

NAME = "generation_config.json"
MAX_SIZE = 1 << 20
TOP_K = 50  # transformers' own default where do_sample is true
# Keys that change no text, or that are read elsewhere.
WITHOUT_EFFECT = {
    "_from_model_config", "bos_token_id", "cache_config", "cache_implementation", "decoder_start_token_id", "do_sample",
    "low_memory", "output_attentions", "output_hidden_states", "output_logits", "output_scores", "pad_token_id",
    "return_dict_in_generate", "transformers_version", "use_cache",
}  # fmt: skip
NUMBERS = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "typical_p": float, "repetition_penalty": float,
    "no_repeat_ngram_size": int, "min_new_tokens": int, "min_length": int, "max_new_tokens": int, "max_length": int,
    "num_beams": int, "length_penalty": float, "num_return_sequences": int,
}  # fmt: skip
NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, [], {}, "")  # what a control is set to where it is off


@dataclass(frozen=True)
class FileControls:
    """What a ``generation_config.json`` says.

    Attributes:
        values: controls by name, as ``GenerationConfig.of`` takes them.
        unsupported: keys with an effect in transformers that gpt2x does not have.
        path: the file; None if there is none.
    """

    values: dict[str, Any] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    path: Path | None = None

    def config(self, given: Mapping[str, Any]) -> GenerationConfig:
        """The configuration of these controls and the given ones, which take precedence.

        Raises:
            ValueError: if a given control is out of range, or two of them contradict each other.
            ConfigError: if a control of the file is, or contradicts a given one.
        """
        try:
            return GenerationConfig.of(**self.merged(given))
        except ValueError as error:
            GenerationConfig.of(**given)  # what is wrong without the file is not the file's fault
            raise ConfigError(f"{self.path}: {error}; correct the file, or set the control with an option") from None

    def merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """These controls and the given ones, which take precedence: also over those that contradict them."""
        values = {**self.values, **given}
        own = set(self.values) - set(given)
        beams = given.get("num_beams", 1)
        if beams > 1:
            own -= set(ONLY_SAMPLING)
        elif any(name in given for name in ONLY_SAMPLING) or given.get("num_beams") == 1:
            own -= set(BEAMS)
        if given.get("temperature") == 0 or 1 < beams < values.get("num_return_sequences", 1):
            own -= {"num_return_sequences"}
        if "max_new_tokens" in values:
            own -= {"max_length"}
        if values.get("min_new_tokens", 0) > given.get("max_new_tokens", math.inf):
            own -= {"min_new_tokens"}
        return {name: value for name, value in values.items() if name in own or name in given}


def controls_beside(folder: Path) -> FileControls:
    """Read ``generation_config.json`` in a folder, as transformers does; nothing if there is none.

    Sampling controls count only where ``do_sample`` is true; ``top_k`` is then 50 by default. Where ``do_sample`` is
    false, decoding is greedy. Beams are not sampled: with ``num_beams``, a true ``do_sample`` is unsupported.

    Raises:
        ConfigError: if the file is not JSON, or a value has the wrong type.
    """
    path = folder / NAME
    if not path.is_file():
        return FileControls()
    stated = {key: value for key, value in read_json(path, MAX_SIZE).items() if value is not None}
    values: dict[str, Any] = {}
    unsupported = []
    for key, value in stated.items():
        if key in WITHOUT_EFFECT:
            continue
        if key in NUMBERS or key in READERS:
            values[key] = _read(path, key, value)
        elif value not in NEUTRAL:
            unsupported.append(key)
    if stated.get("do_sample") is True and values.get("num_beams", 1) > 1:
        unsupported.append("do_sample with num_beams")
    return FileControls(_as_transformers(values, stated.get("do_sample")), unsupported, path)


def _as_transformers(values: dict[str, Any], do_sample: Any) -> dict[str, Any]:
    """Drop what has no effect in transformers beside the others."""
    beams = values.get("num_beams", 1) > 1
    if not beams:
        values = {name: value for name, value in values.items() if name not in BEAMS}
    if do_sample is True and not beams:
        return {"top_k": TOP_K, **values}
    values = {name: value for name, value in values.items() if name not in ONLY_SAMPLING}
    if do_sample is False and not beams:
        values["temperature"] = 0.0
    return values


def _read(path: Path, key: str, value: Any) -> Any:
    try:
        if key in READERS:
            return READERS[key](value)
        return _number(value, NUMBERS[key])
    except (TypeError, ValueError, OverflowError):
        shown = repr(value)[:60]
        raise ConfigError(f"{path}: {key} is {shown}, which is not valid; correct it or remove the key") from None


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
        raise TypeError
    return kind(value)


def _tokens(value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(_number(token, int) for token in listed)


def _end_tokens(value: Any) -> tuple[int, ...]:
    """End tokens. A negative one, such as trl's -1, means in transformers that the text never ends with it."""
    return tuple(token for token in _tokens(value) if token >= 0)


def _biases(value: Any) -> dict[tuple[int, ...], float]:
    return {_tokens(sequence): _number(bias, float) for sequence, bias in value}


def _strings(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(string, str) for string in listed):
        raise TypeError
    return tuple(listed)


def _early_stopping(value: Any) -> bool | str:
    if value not in (True, False, "never"):
        raise ValueError
    return value  # type: ignore[no-any-return]


READERS = {
    "eos_token_id": _end_tokens,
    "suppress_tokens": _tokens,
    "bad_words_ids": lambda value: tuple(map(_tokens, value)),
    "sequence_bias": _biases,
    "stop_strings": _strings,
    "early_stopping": _early_stopping,
}
