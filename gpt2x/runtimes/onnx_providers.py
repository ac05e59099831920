"""ONNX Runtime's execution providers: their short names, the packages that have them, and where they keep a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from converters import FormatError

from .. import contract
from .base import InputError
from .onnx_memory import CPU_NAMES, DEVICE_TYPES, CpuMemory, DeviceMemory, Memory, Place

Provider = str | tuple[str, dict[str, Any]]
# Allocators of devices whose GroupQueryAttention is right. That of WebGPU in ONNX Runtime 1.27 is wrong for rows of different
# lengths.
IN_PLACE = {"Cuda"}
OLDEST = "1.23"  # has InferenceSession.get_input_memory_infos


@dataclass(frozen=True)
class Known:
    """An execution provider that gpt2x knows."""

    name: str
    package: str
    entries: dict[str, str] = field(default_factory=dict)  # of a session's configuration


CPU = "cpu"
KNOWN = {
    CPU: Known("CPUExecutionProvider", "onnxruntime"),
    "cuda": Known("CUDAExecutionProvider", "onnxruntime-gpu"),
    # Its And fails for tensors of different ranks, such as those of the mask of a growing cache (ONNX Runtime 1.27).
    "webgpu": Known(
        "WebGpuExecutionProvider", "onnxruntime-webgpu", {"ep.webgpuexecutionprovider.forceCpuNodeNames": "And"}
    ),
}


def checked_providers(providers: str | Sequence[Provider]) -> tuple[Provider, ...]:
    """Providers as ONNX Runtime takes them. Short names, the keys of ``KNOWN``, are replaced.

    Raises:
        InputError: if this ONNX Runtime does not have one; it names the package that does. Also if one is neither a name
            nor a pair of a name and its options.
    """
    named = [_named(provider) for provider in ([providers] if isinstance(providers, str) else providers)]
    available = ort.get_available_providers()
    for provider in named:
        if provider_name(provider) not in available:
            raise InputError(_missing(provider_name(provider), available))
    return tuple(named)


def _named(provider: Any) -> Provider:
    """A provider with ONNX Runtime's name of it."""
    if isinstance(provider, str):
        return _full_name(provider)
    if isinstance(provider, tuple) and [type(part) for part in provider] == [str, dict]:
        return _full_name(provider[0]), provider[1]
    raise InputError(
        f'providers: {str(provider)[:100]} is neither a name, such as "cuda", nor a name with options, such as '
        '("cuda", {"device_id": 0})'
    )


def _full_name(name: str) -> str:
    known = KNOWN.get(name)
    return name if known is None else known.name


def session_entries(providers: Sequence[Provider]) -> dict[str, str]:
    """What a session's configuration needs for these providers."""
    names = [provider_name(provider) for provider in providers]
    entries: dict[str, str] = {}
    for known in KNOWN.values():
        if known.name in names:
            entries |= known.entries
    return entries


def provider_name(provider: Provider) -> str:
    """ONNX Runtime's name of a provider."""
    return provider if isinstance(provider, str) else provider[0]


def runtime_name(providers: Sequence[Provider]) -> str:
    """ONNX Runtime with its version, and with the first provider if that is not the CPU's."""
    name = f"ONNX Runtime {ort.__version__}"
    first = provider_name(providers[0])
    return name if first == KNOWN[CPU].name else f"{name} with {first}"


def _missing(name: str, available: Sequence[str]) -> str:
    message = f"this ONNX Runtime has no {name}; it has {', '.join(available)}"
    packages = [known.package for known in KNOWN.values() if known.name == name]
    if not packages:
        return message
    # All packages of ONNX Runtime install the same module, and the one installed last would win.
    return f"{message}. Install another package in its place: pip uninstall onnxruntime; pip install {packages[0]}"


def check_used(session: ort.InferenceSession, providers: Sequence[Provider], path: Path) -> None:
    """Refuse a session without a provider that was asked for: ONNX Runtime leaves out one that it cannot start.

    Raises:
        FormatError: with the provider's name.
    """
    used = session.get_providers()
    for provider in providers:
        name = provider_name(provider)
        if name not in used:
            raise FormatError(
                f"{path}: ONNX Runtime {ort.__version__} cannot start {name}, and would use {', '.join(used)}: "
                "there is no such device here, or its driver or libraries are missing or too old"
            )


def memory_of(session: Any, providers: Sequence[Provider], in_place: bool, path: Path) -> Memory:
    """Where a session needs its cache.

    Raises:
        FormatError: if a cache in place would be where no step can use it.
    """
    name, number = _memory_of_input(session, contract.past_names(1)[0])
    if name in CPU_NAMES:
        return CpuMemory()
    if name in DEVICE_TYPES and (name in IN_PLACE or not in_place):
        return DeviceMemory(Place(DEVICE_TYPES[name], number), providers)
    if not in_place:
        return CpuMemory()  # ONNX Runtime copies the whole cache in each step
    raise FormatError(
        f"{path}: gpt2x cannot keep a cache in place in {name}, the memory that this provider needs: use another provider, or export the "
        "model with --cache growing"
    )


def reads_on_cpu(session: Any, names: Sequence[str]) -> bool:
    """Whether a session needs these inputs in the CPU's memory. Else ONNX Runtime copies them, when they are bound.

    The cache may be in another memory: CUDA has no attention in place to a float32 cache, which then is in the CPU's.
    """
    return all(_memory_of_input(session, name)[0] in CPU_NAMES for name in names)


def _memory_of_input(session: Any, wanted: str) -> tuple[str, int]:
    """ONNX Runtime's name of the memory that an input is needed in, and the number of the device."""
    if not hasattr(session, "get_input_memory_infos"):
        only_cpu = session.get_providers() == [KNOWN[CPU].name]
        return ("Cpu" if only_cpu else f"an unknown memory (ONNX Runtime {OLDEST} or newer states it)"), 0
    names = [argument.name for argument in session.get_inputs()]
    if wanted not in names:
        return "Cpu", 0
    info = session.get_input_memory_infos()[names.index(wanted)]
    return info.name, info.device_id
