"""What clients read beside the graph: the model's metadata, ``genai_config.json``, and a part of ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import Checkpoint, ConfigError, GPT2Config
from converters.config import to_hf
from converters.head_config import Labels
from converters.io.json import parse_json
from converters.saving import to_json

from .. import contract
from .._version import __version__
from ..precisions import PRECISIONS, Precision
from ..precisions.quantize import PAIR
from ..task_heads import config_json
from ..tasks import GENERATION, LOGITS
from .options import ExportOptions

TRANSFORMERS_JS = "transformers.js_config"  # a key of config.json
MANAGED = ("use_external_data_format", "kv_cache_dtype")  # its keys that an export sets
Locations = Mapping[str, "str | None"]  # precision -> the file with a model's weights; None if the model holds them
Checksums = Mapping[str, str]  # base name -> SHA-256


def metadata(
    checkpoint: Checkpoint,
    checksums: Checksums,
    precision: Precision,
    options: ExportOptions,
    lora: Sequence[str] = (),
    labels: Labels | None = None,
) -> dict[str, str]:
    """The model's ``metadata_props``: what it is, and what it was made from.

    Args:
        lora: the projections that take factors of adapters.
        labels: of a classifier.
    """
    is_generation = options.task == GENERATION
    config = to_hf(checkpoint.config) if is_generation else config_json(checkpoint, options.task, labels)
    facts = {
        contract.CONTRACT: contract.CACHES[options.cache] if is_generation else contract.OF_TASKS,
        contract.WRITER: __version__,
        contract.SOURCE: source_name(checkpoint),
        contract.CHECKSUMS: json.dumps(checksums, sort_keys=True),
        contract.CONFIG: json.dumps(config, sort_keys=True),
        contract.PRECISION: precision.name,
        **(_of_generation(options) if is_generation else {contract.TASK: options.task}),
        **_of_precision(precision, options),
    }
    if lora:
        facts[contract.LORA] = json.dumps(list(lora))
    return facts


def _of_generation(options: ExportOptions) -> dict[str, str]:
    facts = {contract.CACHE: options.cache, contract.LOGITS: "last" if options.last else "all"}
    if options.outputs != (LOGITS,):
        facts[contract.OUTPUTS] = ",".join(options.outputs)
    return facts


def _of_precision(precision: Precision, options: ExportOptions) -> dict[str, str]:
    facts = {}
    if precision.block_sizes:
        facts[contract.BLOCK] = str(options.block)
    if precision.integer_products:
        facts[contract.PAIRS] = str(PAIR)
    if precision.bits:
        facts[contract.ROUNDING] = "calibrated" if options.calibration else "nearest"
    return facts


def source_name(checkpoint: Checkpoint) -> str:
    """The base name of the source, and of an adapter that was merged into it, as text: a file name may hold bytes that are not UTF-8."""
    name = checkpoint.source.name if checkpoint.source else "memory"
    if checkpoint.adapter:
        name += f" + {checkpoint.adapter.name}"
    return name.encode("utf-8", "backslashreplace").decode()


def genai_config(config: GPT2Config, model: str, cache: str = "growing", *, lora: bool = False) -> dict[str, Any]:
    """The ``genai_config.json`` of onnxruntime-genai, which refuses unknown keys.

    Args:
        model: the path of the ONNX file in the directory.
        lora: whether it has optional inputs for adapters. ONNX Runtime warns of each.
    """
    end = config.eos_token_id if config.eos_token_id is not None else config.n_vocab - 1
    begin = config.bos_token_id if config.bos_token_id is not None else end
    pad = config.pad_token_id if config.pad_token_id is not None else end
    session_options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if lora:
        session_options["log_severity_level"] = 3  # errors
    decoder = {
        "session_options": session_options,
        "filename": model,
        "head_size": config.head_dim,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    tokens = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad, "vocab_size": config.n_vocab}
    return {
        "model": {"type": "decoder", **tokens, "context_length": config.n_ctx, "decoder": decoder},
        "search": {"max_length": config.n_ctx, "num_beams": 1, "past_present_share_buffer": contract.stays(cache)},
    }


def with_transformers_js(config: bytes, where: Path, locations: Locations, cache: str) -> bytes:
    """``config.json`` with what transformers.js must know of the models: which have their weights in a file beside
    them, and which have a float16 cache. Everything else stays as it is.

    Args:
        where: the path for messages.

    Raises:
        ConfigError: if the file has a setting for transformers.js that is not an object.
    """
    facts = parse_json(config, str(where))
    found = facts.get(TRANSFORMERS_JS, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {TRANSFORMERS_JS} is not an object: correct it, or remove it")
    settings = {key: value for key, value in found.items() if key not in MANAGED}
    external = [name for name, file in locations.items() if file == contract.data_file(name)]
    # true holds for every model that transformers.js loads, a table for those that it names.
    if len(external) == len(locations):
        settings["use_external_data_format"] = True
    elif external:
        files = [contract.model_file(name).removeprefix("onnx/") for name in external]
        settings["use_external_data_format"] = dict.fromkeys(files, True)
    dtypes = {PRECISIONS[name].transformers_js: contract.cache_type(name, cache) for name in locations}
    halves = {name: dtype for name, dtype in dtypes.items() if dtype == "float16"}
    if halves:
        settings["kv_cache_dtype"] = halves  # transformers.js before version 4 does not ask the model
    if settings == found:
        return config
    facts.pop(TRANSFORMERS_JS, None)
    return to_json({**facts, TRANSFORMERS_JS: settings} if settings else facts)
