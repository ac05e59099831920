"""Text generation over any runtime."""

__all__ = ["loop", "sampling", "text"]
