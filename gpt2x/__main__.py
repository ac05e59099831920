"""``python -m gpt2x`` is ``gpt2x``."""

from .cli import main

main(prog_name="gpt2x")
