"""Proof that two GPT-2s are the same."""

__all__ = ["metrics", "report", "report_page", "scenarios", "weights"]
