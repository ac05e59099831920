"""An OpenAI-compatible server for models that ``gpt2x export --onnx --cache inplace`` wrote. It never imports torch.

``engine`` runs a model in a thread of its own, without HTTP. ``app`` is the HTTP side.
"""

__all__ = ["app", "engine", "faults", "http", "metrics", "opening", "settings"]
