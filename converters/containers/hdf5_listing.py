"""List the data sets of an HDF5 file: a program of its own, run by ``hdf5.py``.

The HDF5 library is large, written in C, and not made for untrusted files. In a process of its own it may crash, hang or
exhaust its memory without harm to gpt2x. It reads no values, only where they are.

    python hdf5_listing.py FILE [FOLDER ...]     ->  {"datasets": [[name, type, shape, offset], ...]} or {"error": "..."}
"""

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

MAX_OBJECTS = 100_000
MAX_DEPTH = 32
MAX_NAME = 1024
SECONDS = 20
MEMORY = 200 << 20


class Refused(Exception):
    """The file holds something that is not read."""


def main(path: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    # Not RLIMIT_AS, which also counts what libraries and stacks reserve without using it.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    result: dict[str, Any]
    try:
        import h5py

        with h5py.File(path, "r") as file:
            result = {"datasets": list(walk(h5py, file, "", 0, set()))}
    except ImportError as error:
        result = {"error": f"h5py cannot be imported: {error}"}
    except Refused as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"error": f"not a valid HDF5 file: {str(error)[:200]}; download or copy it again"}
    json.dump(result, sys.stdout)


def walk(h5py: Any, group: Any, above: str, depth: int, seen: set[int]) -> Iterator[list[Any]]:
    """Every data set below a group. Links to other places, and two names of one object, are refused."""
    if depth > MAX_DEPTH or len(above) > MAX_NAME:
        raise Refused(f"groups are nested more than {MAX_DEPTH} deep")
    for key in group:
        name = f"{above}{key}"
        # The link before the item: to open an external link is to open the file that it names.
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise Refused(f"{name!r} is a link to another place ({type(link).__name__})")
        item = group[key]
        info = h5py.h5o.get_info(item.id)
        if info.addr in seen or len(seen) > MAX_OBJECTS:
            raise Refused(f"{name!r} is another name of the same object, or there are more than {MAX_OBJECTS} objects")
        seen.add(info.addr)
        if isinstance(item, h5py.Group):
            yield from walk(h5py, item, f"{name}/", depth + 1, seen)
        elif isinstance(item, h5py.Dataset):
            yield describe(h5py, name, item.id)
        else:
            raise Refused(f"{name!r} is neither a group nor a data set")


def describe(h5py: Any, name: str, dataset: Any) -> list[Any]:
    """Name, type, shape and offset of a contiguous data set."""
    plan = dataset.get_create_plist()
    if plan.get_external_count():
        raise Refused(f"{name!r} keeps its data in another file")
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        raise Refused(f"{name!r} is a virtual data set, made of others")
    if plan.get_layout() != h5py.h5d.CONTIGUOUS or plan.get_nfilters():
        raise Refused(f"{name!r} is chunked, compressed or compact; Keras stores weights contiguously")
    offset = dataset.get_offset()
    if offset is None:
        raise Refused(f"{name!r} has no data")
    dtype = dataset.dtype
    # HDF5 also describes values with padding or fewer significant bits, for which h5py returns the plain dtype.
    if dtype.kind in "fiu" and not dataset.get_type().equal(h5py.h5t.py_create(dtype)):
        raise Refused(f"{name!r} stores its values in a custom layout")
    size = dtype.itemsize
    for extent in dataset.shape:
        size *= extent
    if dataset.get_storage_size() != size:
        raise Refused(f"{name!r} has {dataset.get_storage_size()} bytes, but its shape needs {size}")
    return [name, dtype.str, list(dataset.shape), offset]


if __name__ == "__main__":
    sys.path += sys.argv[2:]  # where h5py and numpy are
    main(sys.argv[1])
