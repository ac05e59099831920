"""The part of an ONNX model that fills a cache: the model without its logits, for tokens that are only context.

At GPT-2 small's size, the logits are a third of the products.
"""

from __future__ import annotations

import dataclasses

import onnx

from .onnx_model import OnnxModel, SessionSettings, session_of_bytes

LOGITS = "logits"


def without_logits(model: OnnxModel, settings: SessionSettings) -> OnnxModel:
    """The same model with no outputs but those of the cache, in a session of its own, which has its weights again.

    Raises:
        FormatError: if ONNX Runtime cannot load it.
    """
    whole = onnx.load(model.path, load_external_data=False)
    graph = whole.graph
    outputs = [output for output in graph.output if output.name in set(model.present_names)]
    needed = {output.name for output in outputs}
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
    session = session_of_bytes(whole.SerializeToString(), model.path, model.metadata, settings)
    return dataclasses.replace(model, session=session, last_only=True)
