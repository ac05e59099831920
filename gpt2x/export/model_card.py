"""The model card of an exported directory: its contract, its files, and how each client loads it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from converters.spec import GPT2Config

from .. import contract
from .._version import __version__
from ..contract import Slot
from ..precisions import DEFAULT, PRECISIONS

CARD = """\
---
library_name: onnx
pipeline_tag: text-generation
tags: [gpt2, onnx]
---

# GPT-2{size} for ONNX Runtime

A GPT-2 with a KV cache: {n_layer} layers, {n_head} heads, {n_embd} wide, {n_vocab:,} tokens, a context of {n_ctx:,}.
{operators}. PyTorch is not needed.

{precisions}
The last column is the first version of ONNX Runtime that runs it; `gpt2x.onnxruntime` in the metadata of the ONNX file says it, too.

## Contract

{table}
There are {n_layer} layers `{{i}}`, counted from 0: first key, then value of each layer in turn.

{cache}- `position_ids` count the real tokens of a row from 0, whatever the padding. In padding, any value from 0 will do.
- A row holds {n_ctx} tokens at most, prompt and continuation together; positions from {n_ctx} on are an error.
- A prompt has at least one token; one{chunks} may come in one run or in several chunks.
- `logits` are not normalised: softmax of `logits / temperature` is what to sample from.
{padding}- {tokens}

## Client

To be run in the directory that holds `onnx/`.

```python
{client}```

## Files

{files}
| client | how |
| --- | --- |
| onnxruntime | `InferenceSession("{model}")`{from_bytes} |
| onnxruntime-genai {genai} | `og.Model(directory)` (`genai_config.json` names the model){needs} |
| optimum {optimum} | `ORTModelForCausalLM.from_pretrained(directory{file_name})`{single} |
| transformers.js {transformers_js} | `pipeline("text-generation", directory, {{ dtype: "{dtype}" }})`{single}{needs} |
{transformers}
The versions are the first that load it. On the Hugging Face Hub, optimum and transformers.js take the repository's name
instead of `directory`.

Written by gpt2x {version} from {source}. The ONNX file's `metadata_props` hold the SHA-256 of its source.
`gpt2x inspect` shows the contract, and `gpt2x verify SRC DIR` proves that nothing changed.
"""

TRANSFORMERS = "| transformers | `AutoModelForCausalLM.from_pretrained(directory)` (`model.safetensors`) |\n"
FROM_BYTES = {
    True: "; or of its bytes",
    False: """; from bytes: `options.add_external_initializers_from_files_in_memory(["{data}"], [data], [len(data)])`, then \
`InferenceSession(model, options)`""",
}

GROWING = """\
- At first, `{past}` is 0: the cache is given empty. Each run returns the whole cache, `present.{{i}}.*`, which is
  given to the next run as `past_key_values.{{i}}.*`.
- `attention_mask` is 1 for a token and 0 for padding; it covers the cache and the new tokens. Causality is the graph's.
"""
IN_PLACE = """\
- This is contract 2: the cache can stay in place. Bind `past_key_values.{{i}}.*` and `present.{{i}}.*` to one buffer,
  `[batch_size, {n_head}, capacity, {head_dim}]`, of any capacity up to {n_ctx}: a run writes what is new behind what each row
  holds. A client that gives and takes separate arrays, at first empty ones, works too; each run then returns a longer cache.
- `attention_mask` is `[batch_size, total_sequence_length]`, 1 for a token and 0 for padding **on the right**: a row's sum
  is how many tokens it holds with the new ones. `total_sequence_length` is the longest row's, never the buffer's capacity.
  Left padding, or holes, give wrong results without a word.
- A batch of several rows takes its prompts in one run; after that, one token a row and run, which goes where a row's tokens
  end, over what was padding.
"""

# Cache kind -> what is to be said of it alone.
OF_CACHE = {
    "growing": "",
    "inplace": """\
- On a CPU, set `ORT_GQA_DISABLE_FLASH_ATTENTION=1` in the environment before the session is made: attention to a
  long prompt then takes half the time (ONNX Runtime 1.31).
""",
    "inplace-int8": """\
- The cache holds 8-bit numbers; the scales are the model's own. It takes a quarter of the memory of float32.
""",
}

LAST_IN_PLACE = """\
- `logits` are given for the last slot only, `[batch_size, 1, vocab_size]`, and a cache in place knows no padding on the left:
  all prompts of one run must have one length. Prompts of other lengths go one at a time.
"""

CLIENT_IN_PLACE = """\
import numpy as np, onnxruntime as ort
{load}
session = ort.InferenceSession("{model}")
binding, cache = session.io_binding(), {{}}
for name in [i.name for i in session.get_inputs()[3:]]:
    cache[name] = np.zeros((1, {n_head}, {n_ctx}, {head_dim}), np.{cache_type})
    here = ("cpu", 0, np.{cache_type}, cache[name].shape, cache[name].ctypes.data)
    binding.bind_input(name, *here)
    binding.bind_output(name.replace("past_key_values", "present"), *here)
ids, seen, made = np.array([{prompt}], np.int64), 0, []
while len(made) < {count} and {end} not in made:
    new, seen = np.arange(seen, seen + ids.shape[1])[None], seen + ids.shape[1]
    feed = {{"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), "position_ids": new}}
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    logits = binding.get_outputs()[-1].numpy()
    ids = logits[:, -1:].argmax(-1)  # greedy
    made.append(int(ids[0, 0]))
print({show})
"""

CLIENT = """\
import numpy as np, onnxruntime as ort
{load}
session = ort.InferenceSession("{model}")
past = {{i.name: np.zeros((1, {n_head}, 0, {head_dim}), np.{cache_type}) for i in session.get_inputs()[3:]}}
ids, seen, made = np.array([{prompt}], np.int64), 0, []
while len(made) < {count} and {end} not in made:
    new, seen = np.arange(seen, seen + ids.shape[1])[None], seen + ids.shape[1]
    feed = {{"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), "position_ids": new}}
    logits, *present = session.run(None, feed | past)
    past, ids = dict(zip(past, present)), logits[:, -1:].argmax(-1)  # greedy
    made.append(int(ids[0, 0]))
print({show})
"""

ANY_PADDING = """\
- `logits` are given for every new token. Padding may be left, right, or in the middle; of a row that is padded on the
  right, the logits of its last real token are the ones that go on.
"""
RIGHT_PADDING = """\
- `logits` are given for every new token; of a row that is padded, the logits of its last real token are the ones that go on.
"""
LAST_ONLY = """\
- `logits` are given for the last slot only, `[batch_size, 1, vocab_size]`: pad on the left or not at all.
  onnxruntime-genai pads on the right: with it, give prompts of one length, or one prompt at a time.
"""


def model_card(
    config: GPT2Config,
    *,
    precisions: Sequence[str] = (DEFAULT,),
    cache: str = "growing",
    last: bool,
    tokenizer: bool,
    source: str,
    runtimes: Mapping[str, str],
    locations: Mapping[str, str | None],
    safetensors: bool = False,
) -> str:
    """The README.md of an exported directory.

    Args:
        precisions: what the directory holds; the client runs the first.
        source: what it was made from; any text.
        runtimes: precision -> the first version of ONNX Runtime that runs it.
        locations: precision -> the file in ``onnx/`` that its weights are in; None where they are in the model.
        safetensors: whether ``model.safetensors`` lies beside, which ``transformers`` loads.
    """
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_ctx", "head_dim")}
    first, growing = precisions[0], not contract.stays(cache)
    return CARD.format(
        **sizes,
        size=f" {config.size_name}" if config.size_name else "",
        operators="Standard ONNX operators only"
        if growing
        else "ONNX operators, and GroupQueryAttention of com.microsoft",
        precisions=_precisions(precisions, runtimes),
        table=contract_table(config, last, precisions, cache),
        cache=(GROWING if growing else IN_PLACE).format(**sizes, past=contract.PAST) + OF_CACHE[cache],
        padding=(LAST_ONLY if growing else LAST_IN_PLACE) if last else ANY_PADDING if growing else RIGHT_PADDING,
        chunks="" if growing else " of a batch of one row",
        tokens=_special_tokens(config),
        client=client(config, tokenizer, first, cache),
        files="".join(_file_line(precision, locations[precision]) for precision in precisions),
        from_bytes=FROM_BYTES[locations[first] is None].format(data=locations[first]),
        genai=_since("onnxruntime-genai", cache),
        optimum=_since("optimum", cache),
        transformers_js=_since("transformers.js", cache),
        model=contract.model_file(first),
        file_name=""
        if tuple(precisions) == (DEFAULT,)
        else f', file_name="{contract.model_file(first).removeprefix("onnx/")}"',
        dtype=PRECISIONS[first].transformers_js,
        single="" if growing else ", one prompt at a time (batches are padded on the left)",
        needs="" if tokenizer else ", once a tokenizer is added",
        transformers=TRANSFORMERS if safetensors else "",
        version=__version__,
        source=as_markdown(source),
    )


def _precisions(precisions: Sequence[str], runtimes: Mapping[str, str]) -> str:
    rows = []
    for name in precisions:
        p = PRECISIONS[name]
        rows.append(f"| {name} | `{p.model_file}` | {p.transformers_js} | {p.about} | {runtimes[name]} |\n")
    return "| precision | model | transformers.js's dtype | | ONNX Runtime |\n" + "| --- " * 5 + "|\n" + "".join(rows)


def _since(client: str, cache: str) -> str:
    return f">= {contract.CLIENTS[client][cache]}"


def _file_line(precision: str, location: str | None) -> str:
    model, data = contract.model_file(precision), f"onnx/{location}"
    if location is None:
        return f"`{model}` holds its weights itself.\n"
    return f"`{model}` is a graph; its weights lie in `{data}` (by offset), which must stay beside it.\n"


def _special_tokens(config: GPT2Config) -> str:
    end, begin = config.eos_token_id, config.bos_token_id
    if end is None:
        return "No token ends a text."
    start = " Give it alone to begin a new text, for an empty prompt has no tokens." if begin == end else ""
    return f"Token {end} ends a text.{start}"


def client(config: GPT2Config, tokenizer: bool, precision: str = DEFAULT, cache: str = "growing") -> str:
    """A program that continues a text, to be run in the directory."""
    parts = {
        "load": 'from tokenizers import Tokenizer\n\ntokenizer = Tokenizer.from_file("tokenizer.json")',
        "prompt": 'tokenizer.encode("Once upon a time").ids',
        "show": "tokenizer.decode(made)",
    }
    bare = {"load": "", "prompt": "[0]", "show": "made"}
    numbers = {"n_ctx": config.n_ctx, "n_head": config.n_head, "head_dim": config.head_dim, "end": config.eos_token_id}
    names = {"model": contract.model_file(precision), "cache_type": contract.cache_type(precision, cache)}
    program = CLIENT_IN_PLACE if contract.stays(cache) else CLIENT
    return program.format(count=min(64, max(1, config.n_ctx - 8)), **numbers, **names, **(parts if tokenizer else bare))


def contract_table(
    config: GPT2Config, last: bool, precisions: Sequence[str] = (DEFAULT,), cache: str = "growing"
) -> str:
    """The inputs and outputs, one line for all layers of the cache."""
    first = precisions[0]
    takes, gives = contract.inputs(config, first, cache), contract.outputs(config, last, first, cache)
    rows = [_row("input", name, slot) for name, slot in takes.items() if _shown(name)]
    rows += [_row("output", name, slot) for name, slot in gives.items() if _shown(name)]
    mixed = len({contract.cache_type(p, cache) for p in precisions}) > 1
    note = "\nThe cache of `model_fp16.onnx` is float16, of the others float32.\n" if mixed else ""
    return "| | name | type | shape |\n| --- | --- | --- | --- |\n" + "".join(rows) + note


def _shown(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 1 or (parts[-2], parts[-1]) == ("0", "key")


def _row(kind: str, name: str, slot: Slot) -> str:
    name = name.replace(".0.key", ".{i}.key`, `.value")
    return f"| {kind} | `{name}` | {slot.dtype} | `[{', '.join(map(str, slot.shape))}]` |\n"


def as_markdown(text: str) -> str:
    """Any text as harmless Markdown: one line of code."""
    plain = "".join(c for c in text if c.isprintable() and c not in "`|")
    return f"`{html.escape(plain) or '?'}`"
