"""The version of gpt2x, here and nowhere else."""

__version__ = "0.1.0"
