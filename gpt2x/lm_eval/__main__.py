"""``python -m gpt2x.lm_eval``: the command line of lm-evaluation-harness. Importing this package registers ``gpt2x`` there."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
