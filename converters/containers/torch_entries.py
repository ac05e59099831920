"""The sets of named tensors in a saved object: dicts at any depth, and the modules of a model that was saved whole."""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FormatError
from ..tensors import LazyTensor
from ..values import all_are
from .container import Container, Entry
from .torch_values import SHOWN, Opaque, TensorRef, UnreadTensor, describe

MAX_DEPTH = 64  # of a set of tensors in the saved object, and of modules in a model
MAX_TENSORS = 100_000  # of a model that was saved whole
PARAMETERS = (".weight", ".bias")  # how the names of parameters end
SAVE = "save the state dict, torch.save(model.state_dict(), 'model.pt'), and pass that file"
TOP = "."  # the name of the entry that is the saved object itself


@dataclass(frozen=True)
class Place:
    """A value of the saved object, and the way to it."""

    value: Any
    key: str = ""
    parent: Place | None = None
    depth: int = 0

    @property
    def name(self) -> str:
        """The keys that lead to it."""
        keys = []
        place: Place | None = self
        while place and place.parent:
            keys.append(place.key[:SHOWN])
            place = place.parent
        return ".".join(reversed(keys)) or TOP

    def under(self, key: str) -> str:
        """The name of what this place has under a key."""
        return key if self.parent is None else f"{self.name}.{key}"


@dataclass(frozen=True)
class NamedTensors:
    """A set of named tensors, and its place."""

    place: Place
    tensors: Mapping[str, TensorRef | UnreadTensor]

    def beside(self) -> dict[str, Any]:
        """What the saved object holds beside it, by name. What is nearer wins."""
        found: dict[str, Any] = {}
        if is_module(self.place.value):
            found |= _configuration_of(self.place.value)
        for _, key, value in self._others():
            found.setdefault(str(key), value)
        return found

    def left_out(self) -> list[str]:
        """The names of what lies beside it, and the class of what is an object."""
        names = []
        for place, key, value in self._others():
            name = place.under(str(key)[:SHOWN])
            names.append(f"{name} ({value.name[:SHOWN]})" if isinstance(value, Opaque) else name)
        return names

    def _others(self) -> Iterator[tuple[Place, Any, Any]]:
        """Each place on the way, with a key and a value that do not lead here."""
        if not is_module(self.place.value):
            for key, value in _members(self.place.value):
                if not isinstance(value, TensorRef | UnreadTensor):
                    yield self.place, key, value
        place = self.place
        while place.parent:
            for key, value in _members(place.parent.value):
                if value is not place.value:
                    yield place.parent, key, value
            place = place.parent


def named_tensors(saved: Any, where: str) -> list[NamedTensors]:
    """Every set of named tensors in a saved object. One object in two places counts once.

    Raises:
        CheckpointError: if there is none.
        FormatError: if a model that was saved whole is not valid.
    """
    found = []
    seen: set[int] = set()
    # Breadth first, so that an object with several names is known by the shortest.
    places = deque([Place(saved)])
    while places:
        place = places.popleft()
        if id(place.value) in seen or place.depth > MAX_DEPTH:
            continue
        seen.add(id(place.value))
        if is_module(place.value):
            tensors = _tensors_of_module(place.value, where)
        else:
            tensors, inner = _divided(place)
            places += inner
        if tensors:
            found.append(NamedTensors(place, tensors))
    if not found:
        raise _no_tensors(saved, where)
    return found


def _divided(place: Place) -> tuple[dict[str, TensorRef | UnreadTensor], list[Place]]:
    """The tensors that a value holds by name, and the values in it that may hold more."""
    tensors: dict[str, TensorRef | UnreadTensor] = {}
    inner = []
    for key, value in _members(place.value):
        if isinstance(value, TensorRef | UnreadTensor) and isinstance(key, str):
            tensors[key] = value
        elif isinstance(value, dict | list | tuple | Opaque):
            inner.append(Place(value, str(key), place, place.depth + 1))
    return tensors, inner


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a value holds, with the keys: the items of a dict or a list, the fields and the arguments of an object."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, Opaque):
        yield from {**value.fields(), **(value.pairs or {})}.items()
        yield from enumerate(value.arguments)  # a compiled model is built from the model


def _no_tensors(saved: Any, where: str) -> CheckpointError:
    if not isinstance(saved, dict) or not saved:
        return CheckpointError(f"{where}: holds {describe(saved)}, not a dict of tensors; {SAVE}")
    key, value = next(iter(saved.items()))
    if isinstance(value, TensorRef | UnreadTensor):
        return CheckpointError(f"{where}: its tensors have no names: not a dict of tensors")
    return CheckpointError(
        f"{where}: {str(key)[:SHOWN]!r} is {describe(value)}, not a tensor, and nothing else in it is a dict of tensors; {SAVE}"
    )


# ------------------------------------------------------------------------------------------ models that were saved whole


def is_module(value: Any) -> bool:
    """Whether an object is a module of PyTorch's, by the fields that every one has (``torch/nn/modules/module.py``)."""
    if not isinstance(value, Opaque):
        return False
    fields = value.fields()
    return all_are(map(fields.get, ("_parameters", "_buffers", "_modules")), dict)


def _modules(module: Opaque, where: str) -> Iterator[tuple[str, Opaque]]:
    """A module and all modules in it, with the prefix of each one's names, in the order of ``state_dict``."""
    stack = [("", module, 0)]
    count = 0
    while stack:
        prefix, module, depth = stack.pop()
        count += 1
        if count > MAX_TENSORS or depth > MAX_DEPTH:
            raise FormatError(f"{where}: invalid model: too many modules, or a module that holds itself")
        yield prefix, module
        inner = []
        for name, child in module.fields()["_modules"].items():
            if is_module(child):
                inner.append((f"{prefix}{name}.", child, depth + 1))
        stack += reversed(inner)


def _tensors_of_module(module: Opaque, where: str) -> dict[str, TensorRef | UnreadTensor]:
    """The parameters and the persistent buffers of a model, named as its ``state_dict`` names them."""
    result: dict[str, TensorRef | UnreadTensor] = {}
    for prefix, inner in _modules(module, where):
        fields = inner.fields()
        transient = _items(fields.get("_non_persistent_buffers_set"))
        buffers = {key: value for key, value in fields["_buffers"].items() if key not in transient}
        for name, value in (*fields["_parameters"].items(), *buffers.items()):
            if isinstance(value, TensorRef | UnreadTensor):
                result[f"{prefix}{name}"] = value
        if len(result) > MAX_TENSORS:
            raise FormatError(f"{where}: invalid model: more than {MAX_TENSORS} tensors")
    return result


def _items(value: Any) -> set[str]:
    """The strings in a set."""
    if not isinstance(value, Opaque):
        return set()
    given = value.items
    if given is None:
        given = value.arguments[0] if value.arguments and isinstance(value.arguments[0], list) else []
    return {item for item in given if isinstance(item, str)}


def _configuration_of(module: Opaque) -> dict[str, Any]:
    """The attribute ``config`` of the outermost module that has one."""
    for _, inner in _modules(module, ""):
        config = inner.fields().get("config")
        if isinstance(config, Opaque | dict):
            return {"config": config}
    return {}


# ------------------------------------------------------------------------------------------------------- the container


def container_of(
    path: Path,
    found: Sequence[NamedTensors],
    make: Callable[[TensorRef], LazyTensor],
    records: Mapping[str, bytes] | None = None,
) -> Container:
    """The container of a file's only set of named tensors, or else one that offers each of them.

    Args:
        path: the file.
        found: the sets.
        make: returns a tensor of the file.
        records: what goes into the metadata besides.

    Raises:
        FormatError: if the only set has a tensor that cannot be read, or tensors that overlap.
    """
    if len(found) == 1:
        return _open(path, found[0], make, records)
    entries = []
    for one in found:
        opened = functools.partial(_open, path, one, make, records)
        entries.append(Entry(one.place.name, one.tensors, opened))
    return Container("bin", path, {}, entries=tuple(entries))


def _open(
    path: Path, one: NamedTensors, make: Callable[[TensorRef], LazyTensor], records: Mapping[str, bytes] | None
) -> Container:
    refs = _readable(one, str(path))
    check_overlaps(refs, str(path))
    metadata = {**one.beside(), **(records or {})}
    tensors = one_each(refs, make)
    return Container("bin", path, tensors, metadata, left_out=tuple(one.left_out()), entry=one.place.name)


def _readable(one: NamedTensors, where: str) -> dict[str, TensorRef]:
    """The tensors of a set. None may be of a kind that gpt2x does not read, or what an unknown function would return.

    Raises:
        FormatError: if one is.
    """
    refs = {}
    for name, tensor in one.tensors.items():
        if isinstance(tensor, UnreadTensor):
            raise FormatError(f"{where}: {name[:SHOWN]} is {tensor.reason}, which gpt2x does not read")
        refs[name] = tensor
    for key, value in _members(one.place.value):
        if isinstance(value, Opaque) and str(key).endswith(PARAMETERS):
            raise FormatError(f"{where}: {str(key)[:SHOWN]} is {describe(value)}, not a tensor that gpt2x reads")
    return refs


def one_each(refs: Mapping[str, TensorRef], make: Callable[[TensorRef], LazyTensor]) -> dict[str, LazyTensor]:
    """A tensor for each name. Two names of one tensor (a tied ``lm_head``) get the same object."""
    made = {ref: _made(ref, make) for ref in dict.fromkeys(refs.values())}
    return {name: made[ref] for name, ref in refs.items()}


def _made(ref: TensorRef, make: Callable[[TensorRef], LazyTensor]) -> LazyTensor:
    if ref.is_transposed:
        return make(replace(ref, shape=ref.shape[::-1], is_transposed=False)).transposed()
    return make(ref)


def check_overlaps(tensors: Mapping[str, TensorRef], where: str) -> None:
    """Refuse tensors that share a part of their values. One tensor may have several names."""
    spans = sorted(
        (ref.storage.key, ref.offset, ref.offset + math.prod(ref.shape))
        for ref in set(tensors.values())
        if math.prod(ref.shape)
    )
    for (key, _, end), (other, start, _) in itertools.pairwise(spans):
        if key == other and start < end:
            names = [n for n, t in tensors.items() if t.storage.key == key]
            raise FormatError(f"{where}: {' and '.join(names[:3])} overlap in one storage")
