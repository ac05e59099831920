"""The model from scratch: equal to transformers and to float64, cached or not, batched or not; and it learns."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import TINY, random_checkpoint
from torch.nn import functional as F

import gpt2x as package
from converters import (
    Checkpoint,
    CheckpointError,
    ConfigError,
    GPT2Config,
    LazyTensor,
    open_checkpoint,
    save_checkpoint,
)
from converters.config import SAME_FUNCTION
from converters.spec import ACTIVATIONS, TANH_GELU
from gpt2x.load import checkpoint_of, fill, from_pretrained, load_model, model_of
from gpt2x.model import GPT2, activation
from gpt2x.runtimes.reference import Reference
from gpt2x.runtimes.transformers import Transformers
from gpt2x.verify.scenarios import one_pass

BOUND = 1e-5  # of the largest logit


def random_config(seed):
    """A random configuration of every switch."""
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3, 5])
    width = heads * rng.choice([2, 4, 7])
    return GPT2Config(
        n_vocab=rng.randint(5, 40),
        n_ctx=rng.randint(8, 20),
        n_embd=width,
        n_layer=rng.randint(1, 4),
        n_head=heads,
        n_inner=rng.choice([None, 3 * width, 11]),
        activation_function=ACTIVATIONS[seed % len(ACTIVATIONS)],
        layer_norm_epsilon=rng.choice([1e-5, 1e-3]),
        scale_attn_weights=rng.random() < 0.5,
        scale_attn_by_inverse_layer_idx=rng.random() < 0.5,
        reorder_and_upcast_attn=rng.random() < 0.5,
        tie_word_embeddings=rng.random() < 0.7,
    )


def close(expected, actual):
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    assert np.abs(expected - actual).max() <= BOUND * np.abs(expected).max()


@pytest.fixture
def model():
    return model_of(random_checkpoint())


@pytest.mark.parametrize("seed", range(2 * len(ACTIVATIONS)))
def test_logits_equal_transformers_and_float64_whatever_the_switches(seed):
    checkpoint = random_checkpoint(random_config(seed), seed)
    ids = np.random.default_rng(seed).integers(checkpoint.config.n_vocab, size=checkpoint.config.n_ctx).tolist()
    ours = model_of(checkpoint)(torch.tensor([ids]))[0][0].detach().numpy()
    close(Reference(checkpoint)(ids), ours)
    close(one_pass(Transformers(checkpoint), ids), ours)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_that_of_transformers_and_of_the_reference(name):
    """Also far from zero, where some are cut off. In float64, with tolerances for transformers' rounded constants."""
    from transformers.activations import ACT2FN

    from gpt2x.runtimes.reference import ACTIVATIONS as REFERENCE

    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    ours = activation(name)(x)
    torch.testing.assert_close(ours, ACT2FN[name](x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours, REFERENCE[name](x.numpy()), rtol=1e-12, atol=1e-7)


def test_only_activations_with_parameters_of_their_own_are_missing():
    from transformers.activations import ACT2CLS

    assert set(ACT2CLS) - {*ACTIVATIONS, *SAME_FUNCTION} == {"prelu", "xielu"}


SWITCHED = [
    *({"activation_function": name} for name in ACTIVATIONS if name not in TANH_GELU), {"layer_norm_epsilon": 1e-2},
    {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHED, ids=str)
def test_every_switch_changes_the_logits(switch):
    """In float64, where rounding is far smaller than what the least of them, ``gelu_fast``, changes."""
    plain, ids = random_checkpoint(), list(range(10))
    switched = replace(plain, config=replace(TINY, **switch))
    before, after = (model_of(c, torch.float64)(torch.tensor([ids]))[0][0].detach().numpy() for c in (plain, switched))
    changed, wrong = (np.abs(after - other).max() for other in (before, Reference(switched)(ids)))
    assert changed > 20 * wrong


def test_the_output_is_tied_unless_the_configuration_says_otherwise():
    tied, untied = (GPT2(GPT2Config(**{**vars(TINY), "tie_word_embeddings": t})) for t in (True, False))
    assert "lm_head.weight" not in tied.state_dict()
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"lm_head.weight"}


def test_the_state_dict_is_the_canonical_form():
    assert {n: tuple(t.shape) for n, t in GPT2(TINY).state_dict().items()} == TINY.shapes()


# ------------------------------------------------------------------------------------------- cache and batches


@pytest.mark.parametrize("chunks", [[1] * 10, [3, 1, 6], [9, 1], [4, 4, 2]], ids=str)
def test_cached_decoding_equals_one_pass(model, chunks):
    ids = torch.randint(13, (2, 10), generator=torch.Generator().manual_seed(0))
    whole, whole_cache = model(ids)
    past, logits = None, []
    for chunk in ids.split(chunks, dim=1):
        out, past = model(chunk, past=past)
        logits.append(out)
    close(whole.detach(), torch.cat(logits, 1).detach())
    for (key, value), (other_key, other_value) in zip(past, whole_cache, strict=True):
        assert key.shape == (2, 2, 10, 3)
        close(other_key.detach(), key.detach())
        close(other_value.detach(), value.detach())


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_equal_single_rows(model, side):
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12]]
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    spans = [slice(6 - len(p), 6) if side == "left" else slice(0, len(p)) for p in prompts]
    for row, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        ids[row, span], mask[row, span] = torch.tensor(prompt), 1
    logits, past = model(ids, mask)
    step, _ = model(torch.tensor([[1], [2], [3]]), F.pad(mask, (0, 1), value=1), past=past)
    for row, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        close(model(torch.tensor([prompt]))[0][0].detach(), logits[row, span].detach())
        close(model(torch.tensor([[*prompt, row + 1]]))[0][0, -1].detach(), step[row, 0].detach())


def test_a_row_that_is_all_padding_is_no_nan(model):
    logits, past = model(torch.zeros(2, 4, dtype=torch.long), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(tensor).all() for layer in past for tensor in layer)


def test_positions_may_be_given(model):
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids)[0], model(ids, position_ids=torch.tensor([[0, 1, 2]]))[0])
    assert not torch.equal(model(ids)[0], model(ids, position_ids=torch.tensor([[3, 4, 5]]))[0])


def test_the_last_position_works_and_the_next_is_an_error(model):
    ids = torch.arange(10)[None]
    whole, _ = model(ids)
    _, past = model(ids[:, :9])
    last, past = model(ids[:, 9:], past=past)
    close(whole[:, -1].detach(), last[:, 0].detach())
    close(Reference(random_checkpoint())(list(range(10)))[-1], last[0, 0].detach())
    with pytest.raises(ValueError, match="10 \\+ 1 tokens do not fit into the context of 10"):
        model(ids[:, :1], past=past)


def test_nothing_looks_ahead(model):
    ids = torch.randint(13, (1, 10))
    changed = ids.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 13
    before, after = model(ids)[0][0], model(changed)[0][0]
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6], after[6])


# -------------------------------------------------------------------------------------------------- the square trap


@pytest.mark.parametrize("name", ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_a_transposed_projection_cannot_pass_the_logits(name, tmp_path):
    """``attn.c_proj`` is square: no shape shows its transpose, only the logits do."""
    config = GPT2Config(**{**vars(TINY), "n_inner": 6})
    checkpoint = random_checkpoint(config)
    ids = list(range(10))
    expected = Reference(checkpoint)(ids)
    model = model_of(checkpoint)
    close(expected, model(torch.tensor([ids]))[0][0].detach())
    with torch.no_grad():
        weight = dict(model.named_parameters())[f"h.1.{name}.weight"]
        assert weight.shape == (6, 6)
        weight.copy_(weight.t().clone())
    with pytest.raises(AssertionError):
        close(expected, model(torch.tensor([ids]))[0][0].detach())


# ------------------------------------------------------------------------------------------------------- training


def test_initialisation_is_openais():
    torch.manual_seed(0)
    model = GPT2(500, 96, 8, 4, 384, 200)
    state = model.state_dict()
    residual = 0.02 / math.sqrt(2 * 8)
    for name, std in [
        ("wte.weight", 0.02), ("wpe.weight", 0.01), ("h.3.attn.c_attn.weight", 0.02), ("h.3.mlp.c_fc.weight", 0.02),
        ("h.3.attn.c_proj.weight", residual), ("h.3.mlp.c_proj.weight", residual),
    ]:  # fmt: skip
        assert state[name].std().item() == pytest.approx(std, rel=0.05), name
    assert all((t == 0).all() for n, t in state.items() if n.endswith("bias"))
    assert all((t == 1).all() for n, t in state.items() if "ln_" in n and n.endswith("weight"))


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    model = GPT2(500, 96, 4, 4, 384, 64)
    ids = torch.randint(500, (4, 64))
    loss = F.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(500), rel=0.03)


def test_training_reaches_every_parameter_and_learns_a_sequence_by_heart():
    torch.manual_seed(0)
    model = GPT2(13, 12, 2, 3, 48, 10, 0.0).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert loss.item() < 0.02
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model(ids)[0][0, :-1].argmax(-1).tolist() == ids[0, 1:].tolist()


def test_gradients_equal_those_of_transformers():
    checkpoint = random_checkpoint()
    ours, theirs = model_of(checkpoint), Transformers(checkpoint).model
    ids = torch.arange(10)[None]
    for logits in (ours(ids)[0], theirs(ids).logits):
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    for name, parameter in ours.named_parameters():
        expected = dict(theirs.transformer.named_parameters())[name].grad
        assert (expected - parameter.grad).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("where", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_acts_in_training_alone_and_in_each_of_its_places(where):
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = GPT2(GPT2Config(**{**vars(TINY), **off, where: 0.5}))
    fill(model, random_checkpoint())
    ids = torch.arange(10)[None]
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids)[0], model(ids)[0])


def test_half_precision_runs():
    checkpoint = random_checkpoint(GPT2Config(**{**vars(TINY), "reorder_and_upcast_attn": True}))
    ids = torch.arange(10)[None]
    exact, half = model_of(checkpoint)(ids)[0], model_of(checkpoint, torch.bfloat16)(ids)[0]
    assert half.dtype == torch.bfloat16
    assert (exact - half.float()).abs().max() < 0.1 * exact.abs().max()


# -------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(params=["tf", "safetensors", "bin", "hf"])
def path(request, tmp_path):
    target = tmp_path / {"tf": "tf", "safetensors": "m.safetensors", "bin": "m.bin", "hf": "hf"}[request.param]
    save_checkpoint(random_checkpoint(), target, request.param)
    return target


def test_load_model_fills_the_same_object_and_puts_it_into_eval_mode(path):
    model = GPT2(13, 6, 2, 2, 24, 10, 0.1).train()
    assert load_model(model, path) is model
    assert not model.training
    for name, tensor in random_checkpoint().tensors.items():
        assert model.state_dict()[name].numpy().tobytes() == tensor.read().tobytes()
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_is_built_from_a_configuration_or_from_its_sizes():
    by_sizes = GPT2(13, 6, 2, 2, 24, 10, 0.2, activation_function="relu")
    model = GPT2(by_sizes.config)
    assert model.config == by_sizes.config
    assert GPT2.from_config(by_sizes.config).config == by_sizes.config
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in by_sizes.state_dict().items()}
    with pytest.raises(TypeError):
        GPT2(by_sizes.config, num_heads=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="max_len"):
        GPT2(13, 6, 2, 2, 24)  # type: ignore[call-overload]


def test_a_model_and_its_checkpoint_are_one(tmp_path):
    model = GPT2(TINY)
    save_checkpoint(checkpoint_of(model), tmp_path / "m.safetensors")
    back = from_pretrained(tmp_path / "m.safetensors")
    assert back.config == model.config
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_keeps_its_number_format_and_a_checkpoint_its_own(dtype, tmp_path):
    model = GPT2(TINY).to(dtype)
    save_checkpoint(checkpoint_of(model), tmp_path / "m.safetensors")
    assert load_model(GPT2(TINY), tmp_path / "m.safetensors").wte.weight.dtype == torch.float32
    assert torch.equal(load_model(GPT2(TINY).to(dtype), tmp_path / "m.safetensors").wte.weight, model.wte.weight)


def test_a_legacy_bin_needs_no_configuration(tmp_path):
    tensors = {n: torch.from_numpy(t.read()) for n, t in random_checkpoint().tensors.items()}
    torch.save(tensors, tmp_path / "gpt2-pytorch_model.bin", _use_new_zipfile_serialization=False)
    model = load_model(GPT2(13, 6, 2, 2, 24, 10, 0.1, activation_function="gelu"), tmp_path / "gpt2-pytorch_model.bin")
    assert torch.equal(model.wte.weight, tensors["wte.weight"])


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: GPT2(14, 6, 2, 2, 24, 10), "n_vocab is 13, not 14"),
        (lambda: GPT2(13, 8, 2, 2, 32, 10), "n_embd is 6, not 8"),
        (lambda: GPT2(13, 6, 3, 2, 24, 10), "n_layer is 2, not 3"),
        (lambda: GPT2(13, 6, 2, 3, 24, 10), "n_head is 2, not 3"),
        (lambda: GPT2(13, 6, 2, 2, 25, 10), "n_inner is 24, not 25"),
        (lambda: GPT2(13, 6, 2, 2, 24, 11), "n_ctx is 10, not 11"),
        (lambda: GPT2(13, 6, 2, 2, 24, 10, activation_function="gelu"), "activation_function is 'gelu_new', not 'gelu'"),
        (lambda: GPT2(13, 6, 2, 2, 24, 10, layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
        (lambda: GPT2(13, 6, 2, 2, 24, 10, scale_attn_weights=False), "scale_attn_weights"),
        (lambda: GPT2(13, 6, 2, 2, 24, 10, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (lambda: GPT2(13, 6, 2, 2, 24, 10, tie_word_embeddings=False), "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused(tmp_path, model, match):
    save_checkpoint(random_checkpoint(), tmp_path / "m.safetensors")
    with pytest.raises((CheckpointError, ConfigError), match=match):
        load_model(model(), tmp_path / "m.safetensors")


def in_a_map_of(path, address):
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(None, 5)
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= address < high:
            return name.strip() == str(path)
    return False


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "tf"])
def test_loading_maps_the_file_and_never_writes_it(tmp_path, name):
    save_checkpoint(random_checkpoint(), tmp_path / name, "tf" if name == "tf" else None)
    file = tmp_path / "tf" / "model.ckpt.data-00000-of-00001" if name == "tf" else tmp_path / name
    before = file.read_bytes()
    model = load_model(GPT2(13, 6, 2, 2, 24, 10), tmp_path / name)
    assert all(in_a_map_of(file, p.data_ptr()) for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before


def test_the_three_lines_work_as_written(tmp_path):
    """The interface that the README promises, with the constants of GPT-2 small."""
    from gpt2x import (
        DROP_RATE,
        EMBED_DIM,
        FFN_DIM,
        GPT2,
        MAX_LEN,
        NUM_HEADS,
        NUM_LAYERS,
        SHAKESPEARE,
        VOCAB_SIZE,
        Tokenizer,
        generate_text,
        load_model,
    )

    model_path = tmp_path / "gpt2.safetensors"
    shapes = GPT2Config().shapes()  # GPT-2 small's
    zeros = {name: LazyTensor.of(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    save_checkpoint(Checkpoint(config=GPT2Config(), tensors=zeros), model_path)
    input_text, max_len, temperature, top_k, top_p = "ROMEO:", 2, 0.8, 40, 0.9

    model = load_model(GPT2(VOCAB_SIZE, EMBED_DIM, NUM_LAYERS, NUM_HEADS, FFN_DIM, MAX_LEN, DROP_RATE), model_path)
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    output_text = generate_text(model, tokenizer, input_text, max_len, temperature, top_k, top_p)

    assert output_text.startswith("ROMEO:")
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_what_ships_is_a_real_model_of_about_two_million_parameters():
    files = list(package.SHAKESPEARE.iterdir())
    assert {"checkpoint", "hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) <= 10_000_000
    checkpoint = open_checkpoint(package.SHAKESPEARE)
    assert 1.8e6 < checkpoint.parameters < 2.4e6
    assert checkpoint.config.n_ctx >= 256
    assert 1000 <= checkpoint.config.n_vocab <= 2048


def test_the_shipped_model_speaks_shakespeare():
    """Text it was never trained on costs it far less than chance, and real words come out."""
    from gpt2x import Tokenizer, generate_text

    model, tokenizer = from_pretrained(package.SHAKESPEARE), Tokenizer.from_pretrained(package.SHAKESPEARE)
    text = "KING:\nMy lord, I will not stay to hear thee speak.\nGo to, and leave me with my thoughts.\n"
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.inference_mode():
        loss = F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:]).item()
    assert loss < 0.65 * math.log(model.config.n_vocab)
    words = generate_text(model, tokenizer, "ROMEO:", 200, 0.7, 40, seed=0).lower().replace("'", " ").split()
    common = {
        "the",
        "and",
        "to",
        "of",
        "i",
        "my",
        "you",
        "thou",
        "that",
        "is",
        "not",
        "a",
        "in",
        "with",
        "me",
        "be",
        "his",
        "her",
    }
    assert sum(word.strip(".,;:!?") in common for word in words) > 0.15 * len(words)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_token_alone_is_computed_like_the_last_of_all(cached, padded):
    model = model_of(random_checkpoint())
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) if padded else None
    past = model(ids[:, :2], None if mask is None else mask[:, :2])[1] if cached else None
    new = ids[:, 2:] if cached else ids
    whole, cache = model.hidden(new, mask, None, past)
    last, same = model.hidden(new, mask, None, past, last=True)
    torch.testing.assert_close(last, whole[:, -1:])
    for pair, other in zip(cache, same, strict=True):
        torch.testing.assert_close(pair, other)
