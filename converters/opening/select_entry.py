"""Select the model's tensors in a file that holds several sets of named tensors, such as a checkpoint of a training run."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..containers.container import Container, Entry
from ..dialects import DIALECTS
from ..errors import CheckpointError

MAX_NAME = 256  # of a tensor that may be a parameter
SHOWN = 8  # names in a message
OPTIMIZER = "optim"  # in the keys that lead to an optimizer's state, which may have the names of parameters


def select_entry(container: Container, name: str | None = None) -> Container:
    """The container of the one set of tensors that has the names of a GPT-2's parameters.

    Args:
        container: an open file.
        name: the place of the set to take, whatever its names.

    Raises:
        CheckpointError: if several sets have them, or none is at ``name``.
    """
    if name is not None:
        return _named(container, name)
    if not container.entries:
        return container
    entries = [entry for entry in container.entries if OPTIMIZER not in entry.name.lower()] or container.entries
    scores = [_scores(entry) for entry in entries]
    best = max(range(len(entries)), key=lambda i: max(scores[i].values(), default=0))
    if not scores[best]:
        return max(entries, key=lambda entry: len(entry.tensors)).open()
    most = max(scores[best].values())
    dialects = [dialect for dialect, score in scores[best].items() if score == most]
    rivals = []
    for entry, score in zip(entries, scores, strict=True):
        if any(score[dialect] for dialect in dialects) and not _is_part(entry, entries[best]):
            rivals.append(entry)
    if rivals:
        raise _ambiguous(container, [entries[best], *rivals])
    return entries[best].open()


def _named(container: Container, name: str) -> Container:
    if container.entries:
        for entry in container.entries:
            if entry.name == name:
                return entry.open()
        places = [entry.name for entry in container.entries]
    elif container.entry == name:
        return container
    else:
        places = [container.entry] if container.entry else []
    known = f"it has tensors at {_listed(places)}" if places else "it is not a file of torch.save with several"
    raise CheckpointError(f"{container.path}: no entry {name!r}: {known}")


def _is_part(entry: Entry, whole: Entry) -> bool:
    """Whether every tensor of an entry is one of another's, too: the same object under two keys, or a part of it."""
    return set(entry.tensors.values()) <= set(whole.tensors.values())


def _ambiguous(container: Container, entries: Sequence[Entry]) -> CheckpointError:
    places = [entry.name for entry in entries]
    number = "both" if len(places) == 2 else "all"
    return CheckpointError(
        f"{container.path}: {_listed(places)} {number} hold tensors of a model.\n"
        f"Pass --entry NAME to take one of them, for example --entry {places[0]}"
    )


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return " and ".join(repr(place) for place in places[:SHOWN]) + more


def _scores(entry: Entry) -> Counter[str]:
    """Dialect -> how many of an entry's tensors have the name of one of its parameters, after any prefix."""
    scores: Counter[str] = Counter()
    for name in entry.tensors:
        scores.update(_dialects_of(name))
    return scores


@functools.lru_cache(maxsize=4096)
def _dialects_of(name: str) -> frozenset[str]:
    """The dialects that have a parameter of this name, after any prefix."""
    if len(name) > MAX_NAME:
        return frozenset()
    endings = list(_endings(name))
    found = []
    for dialect in DIALECTS:
        if any(dialect.locate(ending) is not None for ending in endings):
            found.append(dialect.name)
    return frozenset(found)


def _endings(name: str) -> Iterable[str]:
    """The name, and what follows each dot or slash in it."""
    yield name
    for mark in re.finditer(r"[./]", name):
        yield name[mark.end() :]
