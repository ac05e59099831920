"""Configurations in the words of each world (Hugging Face's ``config.json``, OpenAI's ``hparams.json``, ...), to and
from GPT2Config.

Sources: ``configuration_gpt2.py`` and ``configuration_utils.py`` of transformers 4 and 5; OpenAI's ``model.py``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from .errors import ConfigError, UnknownHeadsError
from .spec import PUBLISHED, GPT2Config

# Hugging Face's key -> ours. The right-hand aliases are transformers' own (attribute_map).
HF_KEYS = {
    "vocab_size": "n_vocab",
    "n_positions": "n_ctx",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_inner": "n_inner",
    "activation_function": "activation_function",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn": "reorder_and_upcast_attn",
    "tie_word_embeddings": "tie_word_embeddings",
    "resid_pdrop": "resid_pdrop",
    "embd_pdrop": "embd_pdrop",
    "attn_pdrop": "attn_pdrop",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
ALIASES = {
    "n_ctx": "n_ctx",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_ctx",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
HPARAMS_KEYS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")

# nanoGPT's GPTConfig, the metadata of GGUF files (gguf-py's constants.py), and the header of llm.c's (its GPT2Config).
NANOGPT_KEYS = {
    "block_size": "n_ctx",
    "vocab_size": "n_vocab",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
GGUF_KEYS = {
    "gpt2.vocab_size": "n_vocab",
    "gpt2.context_length": "n_ctx",
    "gpt2.embedding_length": "n_embd",
    "gpt2.block_count": "n_layer",
    "gpt2.attention.head_count": "n_head",
    "gpt2.feed_forward_length": "n_inner",
    "gpt2.attention.layer_norm_epsilon": "layer_norm_epsilon",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
LLMC_KEYS = {
    "max_seq_len": "n_ctx",
    "vocab_size": "n_vocab",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "channels": "n_embd",
}

# Keys that do not touch the logits of a language model: generation, training, bookkeeping.
INERT = frozenset(
    """
    _commit_hash _name_or_path _attn_implementation _attn_implementation_autoset _num_labels afn architectures attn_implementation
    bad_words_ids begin_suppress_tokens chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label is_composition is_decoder is_encoder_decoder keys_to_ignore_at_inference
    label2id length_penalty max_length min_length model_type n_special name no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_scores predict_special_tokens
    prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id unk_token_id cls_token_id mask_token_id unsloth_fixed unsloth_version loss_type license
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version transformers.js_config typical_p use_bfloat16 use_cache xla_device
    """.split()  # noqa: SIM905  a table reads better as words
)
# Keys that change the arithmetic, which this GPT-2 does not have: refused unless they are off.
FOREIGN = frozenset(
    ["add_cross_attention", "attn_mult", "auto_map", "cross_attention_hidden_size", "embd_mult", "pruned_heads", "quantization_config", "rope_scaling", "sliding_window"]
)  # fmt: skip


def from_hf(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that a ``config.json`` states.

    Raises:
        ConfigError: if it is no GPT-2's, or holds a key that may change the arithmetic and is not known.
    """
    faults = []
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ConfigError(f"{where}: model_type is {raw['model_type']!r}, not 'gpt2'")
    fields: dict[str, Any] = {}
    for key, value in raw.items():
        name = HF_KEYS.get(key) or ALIASES.get(key)
        if name and not (value is None and name == "n_inner"):
            if fields.setdefault(name, value) != value:
                faults.append(f"{key} is {value!r}, another key says {fields[name]!r}")
        elif key in FOREIGN and value:
            faults.append(f"{key} is {str(value)[:60]!r}: it changes the arithmetic, and gpt2x does not have it")
        elif not name and key not in FOREIGN and key not in INERT:
            faults.append(
                f"{key} is not a key that gpt2x knows; if it does not change the arithmetic, remove it from the file"
            )
    if faults:
        raise ConfigError.listing(f"{where}: not a configuration that can be taken over as it is", faults)
    for name in ("bos_token_id", "eos_token_id"):
        if isinstance(fields.get(name), list):
            fields[name] = fields[name][0] if fields[name] else None
    return _with_inner(fields)


def config_of(raw: Mapping[str, Any], where: str) -> GPT2Config:
    """The configuration that a ``config.json`` states, in full.

    Raises:
        ConfigError: if it cannot make a GPT-2.
    """
    fields = from_hf(raw, where)
    try:
        return GPT2Config(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _with_inner(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of the feed-forward width says that it is four times the width."""
    width = fields.get("n_embd")
    return {"n_inner": 4 * width, **fields} if isinstance(width, int) else fields


def to_hf(config: GPT2Config) -> dict[str, Any]:
    """The ``config.json`` of a configuration, as ``GPT2LMHeadModel`` reads it."""
    values = {key: getattr(config, name) for key, name in HF_KEYS.items()}
    values["n_inner"] = None if config.n_inner == 4 * config.n_embd else config.n_inner
    if config.pad_token_id is None:
        del values["pad_token_id"]
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": config.n_ctx, **values}


def from_hparams(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that an ``hparams.json`` states.

    Raises:
        ConfigError: if a key is missing or not OpenAI's.
    """
    missing, unknown = sorted(set(HPARAMS_KEYS) - set(raw)), sorted(set(raw) - set(HPARAMS_KEYS))
    if missing or unknown:
        faults = [f"{key} is missing" for key in missing] + [
            f"{key} is not a key that OpenAI's GPT-2 has" for key in unknown
        ]
        raise ConfigError.listing(f"{where}: not the hparams of a GPT-2", faults)
    return _with_inner({key: raw[key] for key in HPARAMS_KEYS})


def from_model_args(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that the ``model_args`` of a nanoGPT checkpoint state (its ``GPTConfig``).

    Raises:
        ConfigError: if they hold a key that nanoGPT does not have and that is not off.
    """
    if strange := [key for key, value in raw.items() if key not in (*NANOGPT_KEYS, "dropout", "bias") and value]:
        facts = [f"{str(key)[:60]} is {str(raw[key])[:60]!r}" for key in strange]
        raise ConfigError.listing(f"{where}: arguments of another model than nanoGPT's", facts)
    fields = {name: raw[key] for key, name in NANOGPT_KEYS.items() if key in raw}
    if isinstance(dropout := raw.get("dropout"), float | int):
        fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return _with_inner(fields)


def to_model_args(config: GPT2Config) -> dict[str, Any]:
    """nanoGPT's ``model_args`` of a configuration."""
    sizes = {key: getattr(config, name) for key, name in NANOGPT_KEYS.items()}
    return {**sizes, "bias": True, "dropout": 0.0}


def from_gguf(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that the metadata of a GGUF file states.

    Raises:
        ConfigError: if it speaks of something that this GPT-2 does not have.
    """
    heads = raw.get("gpt2.attention.head_count")
    faults = [
        f"{key} is {str(value)[:60]}: it may change the arithmetic, and gpt2x does not know it"
        for key, value in raw.items()
        if key.startswith("gpt2.") and key not in GGUF_KEYS and (key, value) != ("gpt2.attention.head_count_kv", heads)
    ]
    if faults:
        raise ConfigError.listing(f"{where}: not a configuration that can be taken over as it is", faults)
    fields = {name: raw[key] for key, name in GGUF_KEYS.items() if key in raw}
    if isinstance(epsilon := fields.get("layer_norm_epsilon"), float):
        fields["layer_norm_epsilon"] = _shortest(epsilon)
    return _with_inner(fields)


def to_gguf(config: GPT2Config) -> dict[str, Any]:
    """The metadata of a GGUF file that stands for a configuration; ids that it does not have are absent."""
    values = {key: getattr(config, name) for key, name in GGUF_KEYS.items()}
    return {key: value for key, value in values.items() if value is not None}


def _shortest(value: float) -> float:
    """The decimal number that a float32 was made from: 1e-05 for 9.999999747378752e-06."""
    if not math.isfinite(value) or abs(value) > 3e38:
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((c for c in candidates if struct.pack("<f", c) == struct.pack("<f", value)), value)


def from_llmc(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that the header of an llm.c file states."""
    return _with_inner({name: raw[key] for key, name in LLMC_KEYS.items()})


def to_llmc(config: GPT2Config) -> dict[str, int]:
    """The header of an llm.c file that stands for a configuration, but for the padded vocabulary."""
    return {key: getattr(config, name) for key, name in LLMC_KEYS.items()}


def to_hparams(config: GPT2Config) -> dict[str, Any]:
    """The ``hparams.json`` of a configuration."""
    return {key: getattr(config, key) for key in HPARAMS_KEYS}


PARSERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "hf": from_hf,
    "nanogpt": from_model_args,
    "gguf": from_gguf,
    "llmc": from_llmc,
}


def resolve(
    stated: Mapping[str, Any], seen: Mapping[str, int], n_head: int | None, where: str, stated_in: str
) -> tuple[GPT2Config, list[str]]:
    """One configuration out of what a file states, what the shapes show, and what the user says; with notes.

    Raises:
        ConfigError: if they contradict one another, or ``n_head`` is nowhere.
    """
    faults = [
        f"{name} is {value} in the tensors, {stated_in} says {stated[name]!r}"
        for name, value in seen.items()
        if stated.get(name, value) != value
    ]
    if n_head is not None and stated.get("n_head", n_head) != n_head:
        faults.append(f"n_head is {stated['n_head']!r} in {stated_in}, but {n_head} is asked for")
    if faults:
        raise ConfigError.listing(f"{where}: the configuration and the tensors disagree", faults)
    fields, notes = {**stated, **seen}, []
    if "n_head" not in fields:
        fields["n_head"], note = _heads(seen, n_head, where)
        notes.append(note)
    try:
        return GPT2Config(**fields), notes
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _heads(seen: Mapping[str, int], n_head: int | None, where: str) -> tuple[int, str]:
    name, published = PUBLISHED.get((seen["n_embd"], seen["n_layer"], seen["n_vocab"], seen["n_ctx"]), (None, n_head))
    if published is None:
        raise UnknownHeadsError(
            f"{where}: the number of attention heads is not in the tensors, and no config.json or hparams.json is beside them.\n"
            f"Give it: --n-head N (published models have heads of 64, which would be {max(1, seen['n_embd'] // 64)} of them here)"
        )
    if n_head not in (None, published):
        raise ConfigError(
            f"{where}: the tensors have the shapes of the published {name}, which has {published} heads, but {n_head} are asked for.\n"
            "If it is another model, say so in a config.json beside it"
        )
    if name is None:
        return published, f"n_head is {published}, as asked for"
    return (
        published,
        f"n_head is {published}: no configuration is there, and the tensors have the shapes of the published {name}",
    )
