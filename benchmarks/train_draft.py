"""Train a larger target and a small draft model for ``benchmarks/speculate.py``, and save both in Hugging Face's layout.

    python benchmarks/train_draft.py tinyshakespeare.txt OUT [--minutes 10]

The text is the "tiny Shakespeare" text of ``examples/train_shakespeare.py``. Both models have the tokenizer and the context of
the model that ships with gpt2x. The first scene of Coriolanus, from which the benchmark takes its prompts, is left out.

The *target* (11.5 million parameters) starts from the shipped model, with twice the width and new blocks, such that it computes
the same function (Net2Net, https://arxiv.org/abs/1511.05641), and is trained further. The *draft* (1.3 million) starts from the
first and the last block of the shipped model and learns the target's distribution (https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from converters import save_checkpoint
from gpt2x import GPT2, SHAKESPEARE, Tokenizer, checkpoint_of
from gpt2x.load import from_pretrained
from gpt2x.verify.sample_text import default_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from train_shakespeare import batch, held_out_loss, loss_of, optimizer_of, schedule

RESOLUTION = 1000  # the learning rate follows the time that has passed, in so many parts
WARMUP = 20  # steps
ANSWERS = 32  # the most probable tokens, which have nearly all of the probability


def twice_the_outputs(weight: Tensor) -> Tensor:
    """Return the weight (..., N) as (..., 2N): each output twice."""
    return torch.cat((weight, weight), dim=-1)


def twice_the_inputs(weight: Tensor) -> Tensor:
    """Return the weight (N, M) as (2N, M), for inputs that come twice: each pair of rows adds up to the old row.

    The shares are random, so that the two copies of a unit get different gradients.
    """
    share = 0.25 + 0.5 * torch.rand_like(weight)
    return torch.cat((weight * share, weight * (1 - share)))


def widened(name: str, weight: Tensor) -> Tensor:
    """Return a parameter of the shipped model for twice the width."""
    if name.startswith("ln_f."):
        return twice_the_outputs(weight / 2)  # the product with wte then adds up both copies
    if name.endswith("c_attn.bias"):
        return torch.cat([twice_the_outputs(part) for part in weight.chunk(3)])
    if name.endswith("c_attn.weight"):
        parts = weight.chunk(3, dim=-1)
        return torch.cat([twice_the_inputs(twice_the_outputs(part)) for part in parts], dim=-1)
    if name.startswith("h.") and weight.dim() == 2:
        return twice_the_inputs(twice_the_outputs(weight))
    return twice_the_outputs(weight)


@torch.no_grad()
def grown(small: GPT2, layers: int, dropout: float) -> GPT2:
    """Return a model of twice the width and of more blocks that computes the same logits."""
    sizes = small.config
    width = 2 * sizes.n_embd
    model = GPT2(sizes.n_vocab, width, layers, 2 * sizes.n_head, 4 * width, sizes.n_ctx, dropout, attn_pdrop=0.0)
    state = model.state_dict()
    for name, weight in small.state_dict().items():
        state[name].copy_(widened(name, weight))
    for block in model.h[sizes.n_layer :]:
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()
    return model


@torch.no_grad()
def shortened(model: GPT2) -> GPT2:
    """Return a model with only the first and the last block of another."""
    short = GPT2(replace(model.config, n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    last = f"h.{model.config.n_layer - 1}."
    state = model.state_dict()
    for name, weight in short.state_dict().items():
        weight.copy_(state[name.replace("h.1.", last)])
    return short


@torch.no_grad()
def answers(target: GPT2, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's most probable next tokens after each token of the windows (N, T): probabilities and ids (N, T, K)."""
    found = [target(part)[0].softmax(-1).topk(ANSWERS) for part in windows.split(8)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def distillation_loss(draft: GPT2, inputs: Tensor, probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of the draft (N, T) with the target's answers (N, T, K)."""
    logits, _ = draft(inputs)
    return -(probabilities * logits.log_softmax(-1).gather(-1, tokens)).sum(-1).mean()


def train(model: GPT2, next_loss: Callable[[], Tensor], rate: float, seconds: float, save: Callable[[], None]) -> None:
    """Train for some time, and save every two minutes and at the end."""
    optimizer = optimizer_of(model.train(), rate)
    start = saved = time.monotonic()
    passed = 0.0
    step = 0
    while passed < seconds:
        factor = min(schedule(int(RESOLUTION * passed / seconds), RESOLUTION), (step + 1) / WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = next_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        passed = time.monotonic() - start
        if step % 20 == 0:
            click.echo(f"step {step}, {passed:.0f} s: loss {loss.item():.3f}")
        if time.monotonic() - saved > 120:
            save()
            saved = time.monotonic()
    save()


def train_target(ids: Tensor, held_out: Tensor, layers: int, minutes: float, out: Path) -> None:
    """Train the target on the text, and write it to ``out``."""
    target = grown(from_pretrained(SHAKESPEARE), layers, dropout=0.1)
    click.echo(f"target: starts from a held-out loss of {held_out_loss(target, held_out):.3f}")
    generator = torch.Generator().manual_seed(1)

    def next_loss() -> Tensor:
        return loss_of(target, *batch(ids, 4, target.n_ctx, generator))

    train(target, next_loss, 3e-4, 60 * minutes, lambda: save_model(target, out))
    click.echo(f"target: held-out loss {held_out_loss(target, held_out):.3f}")


def train_draft(target: GPT2, ids: Tensor, held_out: Tensor, count: int, minutes: float, out: Path) -> None:
    """Train a draft model on the target's answers, and write it to ``out``."""
    draft = shortened(from_pretrained(SHAKESPEARE))
    n_ctx = target.n_ctx
    windows = ids[: len(ids) // n_ctx * n_ctx].view(-1, n_ctx)
    windows = windows[torch.randperm(len(windows))[:count]]
    start = time.monotonic()
    probabilities, tokens = answers(target, windows)
    click.echo(f"draft: {time.monotonic() - start:.0f} s for the target's answers")
    generator = torch.Generator().manual_seed(1)

    def next_loss() -> Tensor:
        chosen = torch.randint(len(windows), (8,), generator=generator)
        return distillation_loss(draft, windows[chosen], probabilities[chosen], tokens[chosen])

    train(draft, next_loss, 2e-3, 60 * minutes, lambda: save_model(draft, out))
    click.echo(f"draft: held-out loss {held_out_loss(draft, held_out):.3f}")


def save_model(model: GPT2, out: Path) -> None:
    """Write a model with the tokenizer of the shipped one."""
    save_checkpoint(checkpoint_of(model, SHAKESPEARE), out, "hf", force=True)


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target-minutes", default=20.0, show_default=True)
@click.option("--draft-minutes", default=20.0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--layers", default=6, show_default=True, help="Blocks of the target.")
@click.option("--windows", default=1000, show_default=True, help="Windows of the text that the draft learns from.")
def main(
    text: Path, out: Path, target_minutes: float, draft_minutes: float, threads: int, layers: int, windows: int
) -> None:  # fmt: skip
    """Write OUT/target and OUT/draft. A target that is there already is kept."""
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    words = text.read_text(encoding="utf-8").replace(default_text(), "")
    cut = len(words) * 9 // 10
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    ids, held_out = (torch.tensor(tokenizer.encode(part)) for part in (words[:cut], words[cut:]))
    held_out = held_out[:4097]
    if not (out / "target").exists():
        train_target(ids, held_out, layers, target_minutes, out / "target")
    target = from_pretrained(out / "target")
    train_draft(target, ids, held_out, windows, draft_minutes, out / "draft")


if __name__ == "__main__":
    main()
