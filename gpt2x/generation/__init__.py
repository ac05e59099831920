"""Text generation over any runtime."""

__all__ = ["beams", "config", "generate", "loop", "many", "processors", "sampling", "text"]
