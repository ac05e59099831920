"""Hugging Face's ``config.json``, to and from GPT2Config.

Sources: ``configuration_gpt2.py`` and ``configuration_utils.py`` of transformers 4 and 5; OpenAI's ``model.py``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import ConfigError
from .spec import GPT2Config, spelled, with_inner
from .values import all_are

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
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_ctx",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
OLD_CONTEXT = "n_ctx"  # written until transformers 4.9, which sizes the position embedding by n_positions alone
# Other names in transformers' ACT2FN for a function that gpt2x has.
SAME_FUNCTION = {
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_new",
    "swish": "silu",
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
# Keys that change the arithmetic and are not supported: refused unless they are off. Sources: transformers' GPT2Config and
# PretrainedConfig; forks of GPT-2 that keep its model_type, and the keys of related models that such forks take over.
FOREIGN = frozenset(
    """
    add_cross_attention alibi attention_type attn_mult attn_type cross_attention_hidden_size embd_mult
    final_logit_softcapping head_dim layer_types lm_head_bias logits_scaling mup multi_query n_kv_head num_key_value_heads
    parallel_attn parallel_residual post_layer_norm post_norm pruned_heads qk_layernorm qk_norm quantization_config
    relative_attention residual_multiplier rms_norm scale_embedding scale_embeddings sliding_window softcap use_alibi
    use_cross_attention use_parallel_residual use_rms_norm use_swiglu
    """.split()  # noqa: SIM905  a table reads better as words
)
# Of these, transformers' own GPT-2 uses neither without the states of an encoder.
CROSS_ATTENTION = ("add_cross_attention", "cross_attention_hidden_size")
FOREIGN_PARTS = ("expert", "lora", "moe_", "rope", "rotary")  # in the names of more such keys
# Keys that other models use for what GPT-2 states under another key: refused where the two differ.
NAMESAKES = {
    "hidden_act": "activation_function",
    "activation": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
}
# Values that say what GPT-2 does; any other value of such a key is refused.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "logit_scale": (1, None),
    "norm_type": ("layernorm", "layer_norm", "LayerNorm", None),
    "position_embedding_type": ("absolute", "learned", "learned_absolute", None),
    "use_bias": (True, None),
}
# The classes of transformers whose language model is GPT-2's; TensorFlow's and Flax's have TF and Flax before the name.
STOCK = frozenset(
    """
    GPT2Model GPT2LMHeadModel GPT2DoubleHeadsModel GPT2ForSequenceClassification GPT2ForTokenClassification
    GPT2ForQuestionAnswering
    """.split()  # noqa: SIM905
)
CODE = (
    "AutoConfig",
    "AutoModel",
)  # beginnings of the classes in auto_map that replace the model; others are tokenizers

UNSUPPORTED = "unsupported configuration"


def from_hf(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that a ``config.json`` states.

    A key that GPT2Config of transformers does not have is passed over where transformers' own class loads the model, which
    ignores it; ``ignored_keys`` lists them.

    Raises:
        ConfigError: if it is not a GPT-2's, or has a key that changes or may change the arithmetic.
    """
    # The first versions of transformers wrote no model_type.
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ConfigError(
            f"{where}: model_type is {str(raw['model_type'])[:60]!r}, not 'gpt2'; if the model is a GPT-2 all the same, pass "
            "--ignore-config-key model_type"
        )
    fields: dict[str, Any] = {}
    faults = list(_collect(raw, fields))
    refused = [key for key in raw if _changes_arithmetic(key, raw)]
    for key in refused:
        faults.append(f"{key} is {str(raw[key])[:60]!r}: it changes the arithmetic, and gpt2x does not support it")
    if not _is_stock(raw):
        unknown = _unknown(raw)
        refused += unknown
        faults += [f"{key} is unknown to gpt2x" for key in unknown]
    if faults:
        raise ConfigError.listing(f"{where}: {UNSUPPORTED}", faults, how_to_ignore(refused))
    return with_inner(_in_our_spelling(fields))


def _collect(raw: Mapping[str, Any], fields: dict[str, Any]) -> Iterator[str]:
    """Put what the keys state into ``fields``. Two that contradict each other are a fault."""
    for key, value in raw.items():
        name = _field_of(key, raw)
        # transformers writes null for a feed-forward width of 4 x n_embd.
        if not name or (value is None and name == "n_inner"):
            continue
        if fields.setdefault(name, value) != value:
            yield f"{key} is {value!r}, but another key states {fields[name]!r}"


def _in_our_spelling(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields with one end token, and the usual name of the activation function."""
    spelled = dict(fields)
    # transformers accepts several end tokens. The first one is kept, as all other formats store one.
    for name in ("bos_token_id", "eos_token_id"):
        ids = fields.get(name)
        if isinstance(ids, list):
            spelled[name] = ids[0] if ids else None
    activation = fields.get("activation_function")
    if isinstance(activation, str):
        spelled["activation_function"] = SAME_FUNCTION.get(activation, activation)
    return spelled


def notes_on_hf(raw: Mapping[str, Any], where: str) -> list[str]:
    """What the user should know of a ``config.json`` that ``from_hf`` reads."""
    notes = []
    context = raw.get(OLD_CONTEXT)
    positions = raw.get("n_positions", raw.get("max_position_embeddings"))
    if None not in (context, positions) and context != positions:
        notes.append(
            f"{where}: n_ctx is {context!r}, but n_positions is {positions!r}; n_positions decides, as in transformers"
        )
    if raw.get("add_cross_attention"):
        notes.append(
            f"{where}: add_cross_attention is true, and taken for false: without the states of an encoder, the logits are the same"
        )
    unknown = _unknown(raw)
    if unknown:
        names = ", ".join(key[:60] for key in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        notes.append(f"{where}: ignored keys that GPT-2 does not have, as transformers ignores them: {names}{more}")
    return notes


def how_to_ignore(keys: Sequence[str]) -> str:
    """The advice on keys that are refused."""
    if not keys:
        return ""
    options = " ".join(f"--ignore-config-key {shlex.quote(key)}" for key in keys[:5])
    return f"If the model computes what GPT-2 computes all the same, pass {options}"


def _field_of(key: str, raw: Mapping[str, Any]) -> str | None:
    """The field of GPT2Config that a key states; None if it states none."""
    if key == OLD_CONTEXT:
        is_stated = raw.get("n_positions") is not None or raw.get("max_position_embeddings") is not None
        return None if is_stated else "n_ctx"
    return HF_KEYS.get(key) or ALIASES.get(key)


def _changes_arithmetic(key: str, raw: Mapping[str, Any]) -> bool:
    value = raw[key]
    if key == "auto_map" and isinstance(value, Mapping):
        return any(str(name).startswith(CODE) for name in value)
    if key in NAMESAKES:
        name = NAMESAKES[key]
        return bool(value != raw.get(name, getattr(GPT2Config, name)))
    if key in HARMLESS:
        return value not in HARMLESS[key]
    if key in CROSS_ATTENTION and not _names_another_class(raw):
        return False
    return is_foreign(key, raw) or (key == "auto_map" and bool(value))


def is_foreign(key: str, raw: Mapping[str, Any]) -> bool:
    """Whether a configuration has a key that is set and that changes the arithmetic, in any program's spelling."""
    if not raw[key]:
        return False
    if key in ("head_dim", "n_kv_head", "num_key_value_heads"):
        return not _is_plain_attention(key, raw)
    return key in FOREIGN or _has_foreign_part(key)


def _has_foreign_part(key: str) -> bool:
    return any(part in key.lower() for part in FOREIGN_PARTS)


def _is_plain_attention(key: str, raw: Mapping[str, Any]) -> bool:
    """Whether a key on heads states what holds for every GPT-2: as many key-value heads as heads, of n_embd / n_head each."""
    n_head = raw.get("n_head", raw.get("num_attention_heads"))
    n_embd = raw.get("n_embd", raw.get("hidden_size"))
    if not all_are((raw[key], n_head, n_embd), int):
        return False
    return bool(raw[key] * n_head == n_embd if key == "head_dim" else raw[key] == n_head)


def _is_stock(raw: Mapping[str, Any]) -> bool:
    """Whether transformers' own GPT-2 loads the model: its class is named, and no code beside the weights replaces it."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return False
    return all(str(name).removeprefix("TF").removeprefix("Flax") in STOCK for name in architectures)


def _names_another_class(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("architectures")) and not _is_stock(raw)


def _unknown(raw: Mapping[str, Any]) -> list[str]:
    """The keys of which gpt2x knows neither that they matter, nor that they do not."""
    known = {*HF_KEYS, *ALIASES, *INERT, *FOREIGN, *NAMESAKES, *HARMLESS, OLD_CONTEXT, "auto_map"}
    return [key for key in raw if key not in known and not _has_foreign_part(key)]


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
    values = spelled(config, HF_KEYS)
    values["n_inner"] = None if config.n_inner == 4 * config.n_embd else config.n_inner
    if config.pad_token_id is None:
        del values["pad_token_id"]
    # transformers no longer reads n_ctx, but convert_hf_to_gguf.py of llama.cpp takes the context length from it.
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": config.n_ctx, **values}
