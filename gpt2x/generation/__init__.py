"""Text generation over any runtime."""

__all__ = ["beams", "config", "generate", "loop", "processors", "sampling", "text"]
