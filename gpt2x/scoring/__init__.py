"""The log-likelihood of text, over any ``Decoder``. numpy only."""

__all__ = ["score"]
