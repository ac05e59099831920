"""``python -m gpt2x`` is ``gpt2x``."""

from gpt2x.cli import main

main(prog_name="gpt2x")
