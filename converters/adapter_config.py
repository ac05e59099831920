"""PEFT's ``adapter_config.json``: the type of an adapter, its base, and the scale of its factors.

Sources: ``LoraConfig``, ``PeftType`` and ``get_pattern_key`` of peft 0.21, ``LoraConfig`` of peft 0.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError
from .io.json import MAX_CONFIG, read_json
from .io.reading import files_in, names_of
from .values import is_list_of

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LORA, TOKENS = "LORA", "TRAINABLE_TOKENS"  # the types that are merged
MAX_RANK = 1 << 16

# These add inputs, or choose among adapters for each token: no weights of a GPT-2 compute the same.
UNMERGEABLE = frozenset(
    ["ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "XLORA"]
)  # fmt: skip

# Keys that decide the arithmetic, and are read here.
READ = frozenset(
    ["alpha_pattern", "base_model_name_or_path", "enable_lora", "init_lora_weights", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "token_indices", "trainable_token_indices", "use_dora", "use_rslora"]
)  # fmt: skip
# Keys of training and bookkeeping, and those whose effect the names of the tensors show.
INERT = frozenset(
    """
    auto_mapping bias corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_weights layers_pattern layers_to_transform loftq_config lora_bias lora_dropout lora_ga_config megatron_config
    megatron_core merge_weights peft_version qalora_group_size revision runtime_config target_modules
    task_type velora_config
    """.split()  # noqa: SIM905  a table reads better as words
)
# Initialisations that subtract something from the base, so that the saved factors belong to another base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an ``adapter_config.json`` states.

    Args:
        path: the file.
        kind: PEFT's name of the type, such as LORA.
        base: the base model's name or path, as the file states it; empty if it does not.
        rank: the rank of the factors, if no pattern matches; 0 for an adapter that is not LoRA.
        alpha: the numerator of the scale, if no pattern matches.
        rank_pattern: pattern of a module's name -> rank.
        alpha_pattern: pattern of a module's name -> alpha.
        rank_stabilized: whether the scale is alpha / sqrt(rank), not alpha / rank.
        has_magnitudes: whether it is DoRA.
        enabled: peft before 0.3: which of query, key and value the factors of ``c_attn`` change; empty for all.
        copied: ends of the names of modules that are trained as copies (``modules_to_save``).
        token_indices: the rows that trained tokens replace; of one embedding, or by its name.
    """

    path: Path
    kind: str
    base: str
    rank: int = 0
    alpha: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    has_magnitudes: bool = False
    enabled: tuple[bool, ...] = ()
    copied: tuple[str, ...] = ()
    token_indices: Any = None

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors.

        Raises:
            ConfigError: if a pattern is not supported.
        """
        return self.rank_pattern.get(self._key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of a module's product B A.

        Raises:
            ConfigError: if a pattern is not supported.
        """
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(self._key(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def is_copied(self, module: str) -> bool:
        """Whether a module is trained as a copy. PEFT compares the ends of names."""
        return bool(self.copied) and f"transformer.{module}".endswith(self.copied)

    def _key(self, patterns: Mapping[str, Any], module: str) -> str:
        """The first pattern that matches the end of a module's name, as in peft; else the empty string."""
        for pattern in patterns:
            if not _is_plain(pattern):
                raise ConfigError(
                    f"{self.path}: the pattern {pattern[:100]!r} is not supported: write the module's name"
                )
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        return ""


def _is_plain(pattern: str) -> bool:
    """Whether a regular expression is a name, or a list of names, with two repetitions at most.

    Patterns come with the file. Others could take exponential time.
    """
    # A repeated group, as in (a*)*, and neighbouring repetitions are what takes exponential time.
    is_known = re.fullmatch(r"[\w.^$|()\[\]*+\\-]{1,200}", pattern)
    repeated = len(re.findall(r"[*+]", pattern))
    if not is_known or repeated > 2 or re.search(r"\)[*+]|\\[^.dw]|[*+][*+]", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an ``adapter_config.json`` of any type; the settings of LoRA are read where it is one.

    Raises:
        ConfigError: if it is not PEFT's, or states something that changes the arithmetic and is not supported.
        FormatError: if it is not valid JSON.
    """
    raw = read_json(path, MAX_CONFIG)
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Z0-9_]{1,40}", kind):
        raise ConfigError(f"{path}: {_foreign(raw)}")
    base = raw.get("base_model_name_or_path")
    config = AdapterConfig(path=path, kind=kind, base=base if isinstance(base, str) else "")
    if kind == TOKENS:
        return replace(config, token_indices=raw.get("token_indices"))
    if kind != LORA:
        return config
    _check_known(path, raw)
    # Settings that are missing have LoraConfig's defaults: 8 for both rank and alpha.
    ranks = _mapping(path, raw, "rank_pattern")
    alphas = _mapping(path, raw, "alpha_pattern")
    return replace(
        config,
        rank=_rank(path, "r", raw.get("r", 8)),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha", 8)),
        rank_pattern={key: _rank(path, key, value) for key, value in ranks.items()},
        alpha_pattern={key: _number(path, key, value) for key, value in alphas.items()},
        rank_stabilized=_flag(path, raw, "use_rslora"),
        has_magnitudes=_flag(path, raw, "use_dora"),
        enabled=_enabled(path, raw.get("enable_lora")),
        copied=_copied(path, raw.get("modules_to_save")),
        token_indices=raw.get("trainable_token_indices"),
    )


def _foreign(raw: Mapping[str, Any]) -> str:
    """Whose configuration it is, if not PEFT's."""
    if "lora_parameters" in raw or "fine_tune_type" in raw:
        return "an adapter of mlx-lm, which gpt2x does not read; merge it with mlx_lm.fuse, and convert the result"
    if isinstance(raw.get("config"), dict) and "model_class" in raw:
        return (
            "an adapter of AdapterHub's adapters, which gpt2x does not read; load it there, and save the result of "
            "model.merge_adapter(NAME) with save_pretrained"
        )
    return "not a configuration of PEFT: it has no peft_type; merge the adapter with the program that wrote it, and convert the result"


def _check_known(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse settings that change the arithmetic, and those that are unknown, unless they are off."""
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ConfigError(
            f"{path}: init_lora_weights is {init[:60]!r}, which changes the base before training, so that the adapter does not fit the base as published.\n"
            "Save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it with peft"
        )
    # A setting that is off changes nothing, whatever it is: peft writes every field of its version, most of them null.
    faults = [key for key, value in raw.items() if value and key not in READ and key not in INERT]
    if faults:
        raise ConfigError(
            f"{path}: sets {', '.join(key[:60] for key in faults[:5])}, which gpt2x does not support; "
            "if it does not change the arithmetic, remove it from the file, else merge the adapter with peft"
        )


def _rank(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_RANK:
        raise ConfigError(f"{path}: the rank in {key[:60]!r} is {str(value)[:60]}, not a positive integer")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not ">= 1e30", which is false for NaN.
    if not is_number or not abs(value) < 1e30:
        raise ConfigError(f"{path}: alpha in {key[:60]!r} is {str(value)[:60]}, not a finite number")
    return float(value)


def _flag(path: Path, raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise ConfigError(f"{path}: {key} is {str(value)[:60]}, not true or false")
    return value


def _mapping(path: Path, raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} is not an object")
    return value


def _enabled(path: Path, value: Any) -> tuple[bool, ...]:
    """``enable_lora`` of peft before 0.3, whose code computes exactly two of the three parts."""
    if not value:
        return ()
    if not is_list_of(value, bool) or len(value) != 3 or sum(value) != 2:
        raise ConfigError(f"{path}: enable_lora is {str(value)[:60]}; gpt2x supports two of query, key and value")
    return tuple(value)


def _copied(path: Path, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not is_list_of(value, str):
        raise ConfigError(f"{path}: modules_to_save is {str(value)[:60]}, not a list of names")
    return tuple(name for name in value if name)


def adapter_folder(path: Path) -> Path | None:
    """The directory of the adapter that a directory holds: itself, or its only subfolder with one; None if there is none.

    ``save_pretrained`` of peft puts adapters that are not called "default" into subfolders.

    Raises:
        ConfigError: if several subfolders hold one.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    found = sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}") if file.is_file())
    if len(found) > 1:
        raise ConfigError(f"{path}: several adapters ({names_of(found[:5])}); pass the directory of one of them")
    return found[0] if found else None


def lone_adapter(path: Path) -> CheckpointError | None:
    """The error for a directory that holds an adapter, where a whole model is expected; None if it holds none.

    Raises:
        ConfigError: if its configuration is not valid.
    """
    folder = adapter_folder(path)
    if folder is None or not files_in(folder, WEIGHT_FILES):
        return None
    return not_a_model(path, read_adapter_config(folder / CONFIG_FILE))


def not_a_model(path: Path, config: AdapterConfig) -> CheckpointError:
    """The error for an adapter without its base: what it is, and what to type."""
    base = f" of {config.base[:200]!r}" if config.base else ""
    return CheckpointError(f"{path}: {described(config.kind)}{base}, not a whole model. {how_to_merge(config, path)}")


def is_merged(kind: str) -> bool:
    """Whether gpt2x merges adapters of a type."""
    return kind in (LORA, TOKENS)


def described(kind: str) -> str:
    """A type for people: "a LoRA adapter"."""
    return "a LoRA adapter" if kind == LORA else f"a PEFT adapter of type {kind}"


def how_to_merge(config: AdapterConfig, path: Path) -> str:
    """What to type, to get one model of an adapter and its base."""
    if is_merged(config.kind):
        return f"Merge it into its base: gpt2x convert {_address(config.base)} OUT --adapter {path}"
    if config.kind in UNMERGEABLE:
        return "It cannot be merged: no change of a GPT-2's weights has the same effect"
    return (
        "gpt2x merges LoRA only. Merge it with peft, and convert the result: "
        f"PeftModel.from_pretrained(base, {str(path)!r}).merge_and_unload().save_pretrained('merged')"
    )


def _address(base: str) -> str:
    """The base as an argument: a path that exists, the address of a model on the Hub, or a placeholder."""
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", base):
        return f"hf://openai-community/{base}"
    if re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", base):
        return base if Path(base).is_dir() else f"hf://{base}"
    is_path = base.isprintable() and 0 < len(base) <= 400 and Path(base).is_dir()
    return base if is_path else "BASE"
