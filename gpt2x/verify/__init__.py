"""Proof that two GPT-2s are the same."""
