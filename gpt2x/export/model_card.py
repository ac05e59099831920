"""The model card of an exported directory: the contract, the files, and how each client loads them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from converters.spec import GPT2Config

from .. import contract
from .._version import __version__
from ..contract import Slot
from ..precisions import DEFAULT, PRECISIONS
from ..runtimes.adapter_files import AdapterFile
from ..tasks import LOGITS

CARD = """\
---
library_name: onnx
pipeline_tag: text-generation
tags: [gpt2, onnx]
---

# GPT-2{size} for ONNX Runtime

GPT-2 with a KV cache: {n_layer} layers, {n_head} heads, an embedding dimension of {n_embd}, a vocabulary of
{n_vocab:,} tokens and a context of {n_ctx:,} tokens. {operators}. PyTorch is not needed.

{precisions}
The last column is the minimum version of ONNX Runtime. The ONNX file's metadata state it as `gpt2x.onnxruntime`.

## Contract

{table}
`{{i}}` is the layer: there are {n_layer}, counted from 0. The order is key and value of layer 0, key and value of
layer 1, and so on.

{cache}- `position_ids` count the tokens of a row from 0, without padding. For padding, any valid position is accepted.
- A row can have at most {n_ctx} tokens, prompt and continuation together. Positions from {n_ctx} on are an error.
- A prompt has at least one token. A prompt{chunks} can be given in one run or in several chunks.
- `logits` are not normalized. To sample, use the softmax of `logits / temperature`.
{padding}- {tokens}

## Client

Run this in the directory that contains `onnx/`.

```python
{client}```

## Files

{files}
| client | how to load it |
| --- | --- |
| onnxruntime | `InferenceSession("{model}")`{from_bytes} |
| onnxruntime-genai {genai} | `og.Model(directory)` (`genai_config.json` names the model){needs} |
| optimum {optimum} | `ORTModelForCausalLM.from_pretrained(directory{file_name})`{single} |
| transformers.js {transformers_js} | `pipeline("text-generation", directory, {{ dtype: "{dtype}" }})`{single}{needs} |
{transformers}{adapters}
The versions are minimum versions. To load from the Hugging Face Hub, pass the repository's name to optimum and
transformers.js instead of `directory`.

Written by gpt2x {version} from {source}. The ONNX file's `metadata_props` contain the SHA-256 of its source.
`gpt2x inspect` shows the contract. `gpt2x verify SRC DIR` compares the model with its source.
"""

TRANSFORMERS = "| transformers | `AutoModelForCausalLM.from_pretrained(directory)` (`model.safetensors`) |\n"
ADAPTERS = """
## Adapters

LoRA adapters are chosen for each run of `{model}`, which has optional inputs for them and needs ONNX Runtime 1.20:
{modules}, for example, takes `{a}`, float32 `[{inputs}, rank]`, and `{b}`, `[rank, {outputs}]`. {where}

| adapter | file | changes |
| --- | --- | --- |
{rows}
```python
import numpy as np, onnxruntime as ort

settings = ort.SessionOptions()
settings.log_severity_level = 3  # ONNX Runtime warns of each optional input
session = ort.InferenceSession("{model}", settings)
adapter, options = ort.LoraAdapter(), ort.RunOptions()
adapter.Load("{file}")
options.add_active_adapter(adapter)
past = {{i.name: np.zeros((1, {n_head}, 0, {head_dim}), np.{cache_type}) for i in session.get_inputs()[3:]}}
token = {{"input_ids": [[0]], "attention_mask": [[1]], "position_ids": [[0]]}}
feed = {{name: np.array(value, np.int64) for name, value in token.items()}}
logits = session.run(["logits"], feed | past, options)[0]
print(logits[0, -1].argmax())
```

- A run with a binding (`run_with_iobinding`) ignores `add_active_adapter`. Bind the factors instead, and keep `factors`:
  `factors = ort.AdapterFormat.read_adapter("{file}")`, then for each `name, value` of `factors.get_parameters().items()`
  `binding.bind_ortvalue_input(name, value)`.
- A cache belongs to the adapter that computed it: begin with an empty cache to change the adapter.
- onnxruntime-genai: `adapters = og.Adapters(model)`, `adapters.load("{file}", "{name}")`, and
  `generator.set_active_adapter(adapters, "{name}")` before the prompt is appended.
- gpt2x: `gpt2x generate DIR "..." --adapter {name}`.

"""
WITHOUT_INPUTS = """Every precision has such a graph beside it, `*_lora.onnx`, which
shares its file of weights. Without an adapter, both compute the same, and the graph without these inputs is faster."""
FROM_BYTES = {
    True: "; or from the file's bytes",
    False: """; from bytes: `options.add_external_initializers_from_files_in_memory(["{data}"], [data], [len(data)])`, then \
`InferenceSession(model, options)`""",
}

GROWING = """\
- Start with an empty cache: `{past}` is 0. Each run returns the whole cache as `present.{{i}}.*`; pass it to
  the next run as `past_key_values.{{i}}.*`.
- `attention_mask` is 1 for a token and 0 for padding. It covers the cache and the new tokens. The graph applies the
  causal mask.
"""
IN_PLACE = """\
- This is contract 2: the cache can stay in place. Bind `past_key_values.{{i}}.*` and `present.{{i}}.*` to one buffer,
  `[batch_size, {n_head}, capacity, {head_dim}]`, with any capacity up to {n_ctx}. A run writes the new keys and values
  after the tokens of each row. Separate arrays work too: start with empty ones; each run then returns a longer cache.
- `attention_mask` is `[batch_size, total_sequence_length]`, 1 for a token and 0 for padding **on the right**. The sum
  of a row is its number of tokens, with the new ones. `total_sequence_length` is that of the longest row, never the
  buffer's capacity. Left padding, or padding between tokens, gives silently wrong results.
- A batch of several rows needs its prompts in one run. After that, each run takes one token per row, and writes it
  after the row's tokens, over the padding.
"""

# Cache kind -> what applies to it only.
OF_CACHE = {
    "growing": "",
    "inplace": """\
- On an Intel CPU, set `ORT_GQA_DISABLE_FLASH_ATTENTION=1` in the environment before the session is created: attention
  to a long prompt then takes half the time (ONNX Runtime 1.31). On AMD's Zen 3, leave it out: decoding is faster.
""",
    "inplace-int8": """\
- The cache holds int8 values; their scales are stored in the model. It takes a quarter of the memory of float32.
""",
}

LAST_IN_PLACE = """\
- `logits` are returned for the last slot only, `[batch_size, 1, vocab_size]`, and a cache in place does not support
  left padding: all prompts of one run must have the same length. Run prompts of different lengths one at a time.
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
- `logits` are returned for every new token. Padding can be on the left, on the right, or between tokens. For a row with
  padding on the right, continue from the logits of its last token.
"""
RIGHT_PADDING = """\
- `logits` are returned for every new token. For a row with padding, continue from the logits of its last token.
"""
LAST_ONLY = """\
- `logits` are returned for the last slot only, `[batch_size, 1, vocab_size]`: pad on the left or not at all.
  onnxruntime-genai pads on the right: pass it prompts of the same length, or one prompt at a time.
"""


# Output -> what it is.
OF_OUTPUTS = {
    "hidden_states": """\
- `hidden_states` are those after the last norm, which the logits are computed from.
""",
    "values": """\
- `values` are the value head's, one for each position, as `AutoModelForCausalLMWithValueHead` of trl returns them.
""",
    "mc_logits": """\
- `mc_logits` are the multiple-choice head's scores at each position, one choice a row. `GPT2DoubleHeadsModel` returns the score at
  one position of each row, `mc_token_ids`, by default the last one.
""",
}


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
    adapters: Sequence[AdapterFile] = (),
    adapter_model: str = "",
    outputs: Sequence[str] = (LOGITS,),
) -> str:
    """Return the README.md of an exported directory.

    Args:
        precisions: those in the directory; the example client runs the first.
        source: the source's name, which may be any text.
        runtimes: precision -> minimum version of ONNX Runtime.
        locations: precision -> the file in ``onnx/`` that has its weights; None if they are inside the model.
        safetensors: whether the directory has ``model.safetensors``, which ``transformers`` loads.
        adapters: those in the directory.
        adapter_model: the path of the ONNX file that takes them, of the first precision.
        outputs: the logits, and any of ``EXTRAS``.
    """
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_ctx", "head_dim")}
    newest = max(runtimes.values(), key=contract.numbers)
    first, growing = precisions[0], not contract.stays(cache)
    return CARD.format(
        **sizes,
        size=f" {config.size_name}" if config.size_name else "",
        operators=_operators(growing),
        precisions=precision_table(precisions, runtimes),
        table=contract_table(config, last, precisions, cache, outputs),
        cache=(GROWING if growing else IN_PLACE).format(**sizes, past=contract.PAST) + OF_CACHE[cache],
        padding=_padding(growing, last) + "".join(OF_OUTPUTS[name] for name in outputs if name != LOGITS),
        chunks="" if growing else " in a batch of one row",
        tokens=_special_tokens(config),
        client=client(config, tokenizer, first, cache),
        files=file_lines(precisions, locations),
        from_bytes=FROM_BYTES[locations[first] is None].format(data=locations[first]),
        genai=_since("onnxruntime-genai", cache, newest),
        optimum=_since("optimum", cache, newest),
        transformers_js=_since("transformers.js", cache, newest),
        model=contract.model_file(first),
        file_name=_file_name(precisions),
        dtype=PRECISIONS[first].transformers_js,
        single="" if growing else ", one prompt at a time (batches are padded on the left)",
        needs="" if tokenizer else ", once a tokenizer is added",
        transformers=TRANSFORMERS if safetensors else "",
        adapters=_adapters(config, adapters, adapter_model, first, cache),
        version=__version__,
        source=as_markdown(source),
    )


def _file_name(precisions: Sequence[str]) -> str:
    """The argument that optimum needs, unless the only model has the usual name."""
    if tuple(precisions) == (DEFAULT,):
        return ""
    return f', file_name="{contract.model_file(precisions[0]).removeprefix("onnx/")}"'


def _operators(growing: bool) -> str:
    if growing:
        return "It uses standard ONNX operators only"
    return "It uses ONNX operators, and GroupQueryAttention of com.microsoft"


def _padding(growing: bool, last: bool) -> str:
    if last:
        return LAST_ONLY if growing else LAST_IN_PLACE
    return ANY_PADDING if growing else RIGHT_PADDING


def precision_table(precisions: Sequence[str], runtimes: Mapping[str, str]) -> str:
    """Return a table of the models in a directory."""
    rows = []
    for name in precisions:
        p = PRECISIONS[name]
        rows.append(f"| {name} | `{p.model_file}` | {p.transformers_js} | {p.about} | {runtimes[name]} |\n")
    return "| precision | model | transformers.js's dtype | | ONNX Runtime |\n" + "| --- " * 5 + "|\n" + "".join(rows)


def _since(client: str, cache: str, runtime: str) -> str:
    return f">= {contract.client_version(client, cache, runtime)}"


def file_lines(precisions: Sequence[str], locations: Mapping[str, str | None]) -> str:
    """Return where the weights of each model are, one line each."""
    return "".join(_file_line(precision, locations[precision]) for precision in precisions)


def _file_line(precision: str, location: str | None) -> str:
    model, data = contract.model_file(precision), f"onnx/{location}"
    if location is None:
        return f"`{model}` contains its weights.\n"
    return f"`{model}` is the graph; its weights are in `{data}` (by offset), which must stay in the same folder.\n"


def _adapters(config: GPT2Config, adapters: Sequence[AdapterFile], model: str, precision: str, cache: str) -> str:
    """The section on adapters; nothing if there are none."""
    if not adapters:
        return ""
    first = adapters[0]
    projection = next(iter(first.ranks))
    a, b = contract.factor_names(projection)
    inputs, outputs = config.shapes()[f"{projection}.weight"]
    return ADAPTERS.format(
        modules=f"`{projection}`",
        a=a,
        b=b,
        inputs=inputs,
        outputs=outputs,
        rows="".join(f"| {one.name} | `onnx/{one.path.name}` | {one.summary()} |\n" for one in adapters),
        model=model,
        where=WITHOUT_INPUTS if model != contract.model_file(precision) else "",
        file=f"onnx/{first.path.name}",
        name=first.name,
        n_head=config.n_head,
        head_dim=config.head_dim,
        cache_type=contract.cache_type(precision, cache),
    )


def _special_tokens(config: GPT2Config) -> str:
    end, begin = config.eos_token_id, config.bos_token_id
    if end is None:
        return "There is no end-of-text token."
    start = (
        " To generate without a prompt, use it as the prompt: a prompt needs at least one token."
        if begin == end
        else ""
    )
    return f"The end-of-text token is {end}.{start}"


def client(config: GPT2Config, tokenizer: bool, precision: str = DEFAULT, cache: str = "growing") -> str:
    """Return a program that continues a text, to run in the directory."""
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
    config: GPT2Config,
    last: bool,
    precisions: Sequence[str] = (DEFAULT,),
    cache: str = "growing",
    names: Sequence[str] = (LOGITS,),
) -> str:
    """Return a table of the inputs and outputs, with one line for all layers of the cache."""
    first = precisions[0]
    inputs = contract.inputs(config, first, cache)
    outputs = contract.outputs(config, last, first, cache, names)
    mixed = len({contract.cache_type(p, cache) for p in precisions}) > 1
    note = "\nThe cache of `model_fp16.onnx` is float16, that of the others float32.\n" if mixed else ""
    return slot_table(inputs, outputs) + note


def slot_table(inputs: Mapping[str, Slot], outputs: Mapping[str, Slot]) -> str:
    """Return a table of inputs and outputs, with one line for all layers of a cache."""
    rows = [_row("input", name, slot) for name, slot in inputs.items() if _shown(name)]
    rows += [_row("output", name, slot) for name, slot in outputs.items() if _shown(name)]
    return "| | name | type | shape |\n| --- | --- | --- | --- |\n" + "".join(rows)


def _shown(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 1 or (parts[-2], parts[-1]) == ("0", "key")


def _row(kind: str, name: str, slot: Slot) -> str:
    name = name.replace(".0.key", ".{i}.key`, `.value")
    return f"| {kind} | `{name}` | {slot.dtype} | `[{', '.join(map(str, slot.shape))}]` |\n"


def as_markdown(text: str) -> str:
    """Return any text as safe Markdown: one line of code."""
    plain = "".join(c for c in text if c.isprintable() and c not in "`|")
    return f"`{html.escape(plain) or '?'}`"
