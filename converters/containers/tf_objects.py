"""The graph of objects in a TensorFlow 2 or Keras checkpoint, which says what variable each of its keys is.

The keys are paths of attributes: ``transformer/h/0/ln_1/gamma/.ATTRIBUTES/VARIABLE_VALUE``, or ``variables/0/...`` in a
SavedModel. The graph has each variable's own name. Sources: ``trackable_object_graph.proto`` and ``tensor_bundle.cc`` of
TensorFlow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from ..errors import FormatError
from ..io.checksums import crc32c
from ..io.protobuf import Fields, read_varint
from ..io.sstable import mask

KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
MAX_GRAPH = 1 << 24  # bytes: a hundred times that of GPT-2 XL
MAX_NAME = 1000
# Parts of the keys of an optimizer's moments, whose names contain those of the model's variables: in the optimizers of
# TensorFlow 2 before 2.11, and since.
APART = frozenset({b".OPTIMIZER_SLOT", b"_variables"})


def variable_names(stored: bytes, crc: int, keys: Iterable[bytes], where: str) -> dict[bytes, str]:
    """Key -> the name of its variable, as ``tf.Variable.name`` spells it: ``model/transformer/wte/embeddings:0``.

    Args:
        stored: the bytes of the graph's tensor.
        crc: its checksum.
        keys: those of the tensors. An optimizer's moments, and what is no variable, get no name.

    Raises:
        FormatError: if the graph is invalid, or two variables have the same name.
    """
    known = set(keys)
    names: dict[bytes, str] = {}
    for node in Fields(_text_of(stored, crc, where), where).all_bytes(1):
        for attribute in Fields(node, where).all_bytes(2):
            fields = Fields(attribute, where)
            key, name = fields.bytes(3), fields.bytes(2)
            if key in known and name and APART.isdisjoint(key.split(b"/")):
                names[key] = f"{_decoded(name, where)}:0"
    if len(set(names.values())) < len(names):
        raise FormatError(
            f"{where}: an object-based TensorFlow 2 or Keras checkpoint, in which several variables have the same name. "
            "Save the model with transformers 4's save_pretrained, and pass its tf_model.h5"
        )
    return names


def _text_of(stored: bytes, crc: int, where: str) -> bytes:
    """The one string of a tensor of strings: its length, the checksum of the length, and its bytes.

    The checksum of the whole is that of the length as a uint32, not as it is stored.
    """
    length, position = read_varint(stored, 0, where)
    if len(stored) != position + 4 + length:
        raise FormatError(f"{where}: {len(stored)} bytes, but a string of {length} needs {position + 4 + length}")
    check, text = stored[position : position + 4], stored[position + 4 :]
    of_length = crc32c(0, struct.pack("<I", length))
    if int.from_bytes(check, "little") != mask(of_length) or mask(crc32c(crc32c(of_length, check), text)) != crc:
        raise FormatError(f"{where}: its checksum does not match: the file is damaged")
    return text


def _decoded(name: bytes, where: str) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: a name of a variable that is not UTF-8") from None
    if len(text) > MAX_NAME:
        raise FormatError(f"{where}: a name of a variable of {len(text)} characters")
    return text
