"""Downloads of hf:// and openai:// addresses."""

__all__ = ["fetch", "hub", "openai"]
