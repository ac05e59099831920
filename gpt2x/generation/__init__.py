"""Text generation over any runtime."""

__all__ = ["beams", "config", "generate", "guesses", "loop", "many", "processors", "sampling", "text"]
