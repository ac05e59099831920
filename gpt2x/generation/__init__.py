"""Text generation over any runtime."""
