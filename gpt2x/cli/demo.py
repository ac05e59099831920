"""``gpt2x demo``."""

from __future__ import annotations

import os

import click

from .text import need

STEPS = (
    "inspect shakespeare",
    "convert shakespeare shakespeare.safetensors",
    "convert shakespeare shakespeare-hf",
    "convert shakespeare-hf pytorch_model.bin",
    "convert pytorch_model.bin back --to tf",
    "verify shakespeare back",
    "verify shakespeare-hf",
    "export shakespeare-hf --onnx shakespeare-onnx",
    "generate shakespeare-onnx 'ROMEO:' --max-new-tokens 120 --temperature 0.8 --top-k 40 --seed 3",
)


@click.command(short_help="Run an end-to-end demo.")
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Run an end-to-end demo with the small model that ships with gpt2x.

    It works in a temporary folder, and removes it at the end.
    """
    import shlex
    import shutil
    import tempfile

    from .. import SHAKESPEARE

    need("torch", "onnx", extra="export")
    group = ctx.find_root().command
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="gpt2x-demo-") as folder:
        shutil.copytree(SHAKESPEARE, os.path.join(folder, "shakespeare"))
        os.chdir(folder)
        try:
            for step in STEPS:
                click.secho(f"\n$ gpt2x {step}", bold=True)
                # Not standalone: click then returns, and does not end this process after the first command.
                code = group.main(shlex.split(step), prog_name="gpt2x", standalone_mode=False)
                if code:
                    ctx.exit(code)
        finally:
            os.chdir(before)
