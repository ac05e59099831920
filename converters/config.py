"""Hugging Face's ``config.json``, to and from GPT2Config.

Sources: ``configuration_gpt2.py`` and ``configuration_utils.py`` of transformers 4 and 5; OpenAI's ``model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .spec import GPT2Config, with_inner

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
# Keys that change the arithmetic and are not supported: refused unless they are off.
FOREIGN = frozenset(
    ["add_cross_attention", "attn_mult", "auto_map", "cross_attention_hidden_size", "embd_mult", "pruned_heads", "quantization_config", "rope_scaling", "sliding_window"]
)  # fmt: skip

UNSUPPORTED = "unsupported configuration"


def from_hf(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that a ``config.json`` states.

    Raises:
        ConfigError: if it is not a GPT-2's, or has an unknown key, which may change the arithmetic.
    """
    faults = []
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ConfigError(f"{where}: model_type is {raw['model_type']!r}, not 'gpt2'")
    fields: dict[str, Any] = {}
    for key, value in raw.items():
        name = HF_KEYS.get(key) or ALIASES.get(key)
        if name and not (value is None and name == "n_inner"):
            if fields.setdefault(name, value) != value:
                faults.append(f"{key} is {value!r}, but another key states {fields[name]!r}")
        elif key in FOREIGN and value:
            faults.append(f"{key} is {str(value)[:60]!r}: it changes the arithmetic, and gpt2x does not support it")
        elif not name and key not in FOREIGN and key not in INERT:
            faults.append(f"{key} is unknown to gpt2x; if it does not change the arithmetic, remove it from the file")
    if faults:
        raise ConfigError.listing(f"{where}: {UNSUPPORTED}", faults)
    for name in ("bos_token_id", "eos_token_id"):
        if isinstance(fields.get(name), list):
            fields[name] = fields[name][0] if fields[name] else None
    return with_inner(fields)


def config_of(raw: Mapping[str, Any], where: str) -> GPT2Config:
    """The complete configuration of a ``config.json``.

    Raises:
        ConfigError: if it is invalid.
    """
    fields = from_hf(raw, where)
    try:
        return GPT2Config(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_hf(config: GPT2Config) -> dict[str, Any]:
    """The ``config.json`` of a configuration, as ``GPT2LMHeadModel`` reads it."""
    values = {key: getattr(config, name) for key, name in HF_KEYS.items()}
    values["n_inner"] = None if config.n_inner == 4 * config.n_embd else config.n_inner
    if config.pad_token_id is None:
        del values["pad_token_id"]
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": config.n_ctx, **values}
