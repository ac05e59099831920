"""The part of an ONNX model that fills a cache: the model without its logits, for tokens that are only context.

At GPT-2 small's size, the logits are a third of the products.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from functools import cached_property

from converters import FormatError
from converters.containers.onnx import external_files

from .onnx_model import OnnxModel, SessionSettings, session_of_bytes

log = logging.getLogger(__name__)

MOST_TWICE = 1 << 30
"""Bytes of a model that may be in memory twice, so that context needs no logits."""


class Context:
    """A model with no outputs but those of the cache, in a session of its own, which has its weights again.

    It has the inputs for adapters that the whole model has when it is first needed, or after ``close``.

    Args:
        whole: the model with its logits.
        settings: how the session is made.
    """

    def __init__(self, whole: OnnxModel, settings: SessionSettings) -> None:
        self.whole = whole
        self.settings = settings

    @cached_property
    def model(self) -> OnnxModel | None:
        """It is opened when it is first needed.

        None where onnx is not installed, the model has more than ``MOST_TWICE`` bytes, or ONNX Runtime cannot load it.
        """
        path, metadata = self.whole.graph, self.whole.metadata
        files = [path, *(path.with_name(name) for name in external_files(path))]
        size = sum(file.stat().st_size for file in files)
        if importlib.util.find_spec("onnx") is None or size > MOST_TWICE:
            return None
        try:
            settings = dataclasses.replace(self.settings, phase="prompts")
            session = session_of_bytes(_without_logits(self.whole), path, metadata, settings)
        except FormatError as error:  # an older ONNX Runtime
            log.info("context has logits, too: %s", error)
            return None
        return dataclasses.replace(self.whole, session=session, last_only=True)

    def close(self) -> None:
        """Free its memory, if it was opened."""
        opened = vars(self).pop("model", None)
        if opened:
            opened.session = None


def _without_logits(model: OnnxModel) -> bytes:
    """The graph with all its inputs, and what the outputs of the cache need. Its weights stay in their file."""
    import onnx

    whole = onnx.load(model.graph, load_external_data=False)
    graph = whole.graph
    outputs = [output for output in graph.output if output.name in set(model.present_names)]
    # An input for factors of an adapter is optional because there is an initializer of its name.
    needed = {value.name for value in [*graph.input, *outputs]}
    nodes = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            nodes.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, kept in (("node", nodes[::-1]), ("output", outputs), ("initializer", initializers)):
        kept = list(kept)
        graph.ClearField(field)
        getattr(graph, field).extend(kept)
    return bytes(whole.SerializeToString())
