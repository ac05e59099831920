"""The model card of a directory for a task other than text generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.head_config import PROBLEM_TYPES, Labels
from converters.spec import GPT2Config

from .. import contract
from .._version import __version__
from ..precisions import PRECISIONS
from .model_card import as_markdown, file_lines, precision_table, slot_table

CARD = """\
---
library_name: onnx
pipeline_tag: {task}
tags: [gpt2, onnx]
---

# GPT-2{size} for {task} in ONNX Runtime

GPT-2: {n_layer} layers, {n_head} heads, an embedding dimension of {n_embd}, a vocabulary of {n_vocab:,} tokens and a context of
{n_ctx:,} tokens. {what} It uses standard ONNX operators only. PyTorch is not needed.

{precisions}
The last column is the minimum version of ONNX Runtime. The ONNX file's metadata state it as `gpt2x.onnxruntime`.

## Contract

{table}
- This is contract 3: there is no KV cache, and positions are computed from `attention_mask`.
- `attention_mask` is 1 for a token and 0 for padding. Padding can be on the left or on the right. The token ids at padding do not
  matter, if the vocabulary has them. Each row returns what it returns without padding.
- A row can have at most {n_ctx} tokens, without padding, and has at least one.
{rules}
## Client

Run this in the directory that contains `onnx/`.

```python
{client}```

## Files

{files}
| client | how to load it |
| --- | --- |
| onnxruntime | `InferenceSession("{model}")` |
| optimum | `{optimum}.from_pretrained(directory{file_name})`{needs} |
| transformers.js | {transformers_js}{needs} |
{transformers}
To load from the Hugging Face Hub, pass the repository's name to optimum and transformers.js instead of `directory`.

Written by gpt2x {version} from {source}. The ONNX file's `metadata_props` contain the SHA-256 of its source.
`gpt2x inspect` shows the contract. `gpt2x verify SRC DIR` compares the model with its source.
"""

WHAT = {
    "feature-extraction": "It returns the last hidden states, and embeddings of texts.",
    "text-classification": "It returns a logit of each label for a text.",
    "token-classification": "It returns a logit of each label for every token.",
}
EMBEDDINGS = """\
- `last_hidden_state` are the hidden states after the last norm. At padding they have no meaning.
- `mean_embedding` is their mean over the tokens of a row, `last_token_embedding` that of its last token. They are not normalized.
"""
CLASSES = """\
- `logits` are not normalized. {apply}
- The labels are {labels}.
"""
REGRESSION, SINGLE_LABEL, MULTI_LABEL = PROBLEM_TYPES
MEANING = {
    REGRESSION: "The model was trained for regression: they are the values themselves.",
    MULTI_LABEL: "The probability of each label is the sigmoid of its logit.",
    SINGLE_LABEL: "Probabilities are their softmax.",
}
LAST_TOKEN = """\
- The logits are those of the row's last token whose `attention_mask` is 1{but}.
"""
OPTIMUM = {
    "feature-extraction": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
}
PIPELINE = """`pipeline("feature-extraction", directory, {{ dtype: "{dtype}" }})`"""
PIPELINE_CLASS = """\
`new {name}({{ task: "{task}", model: await AutoModel.from_pretrained(directory, {{ dtype: "{dtype}" }}), tokenizer: await \
AutoTokenizer.from_pretrained(directory) }})`; its `pipeline` function has no such task for GPT-2"""
MODEL_ALONE = """\
`AutoModel.from_pretrained(directory, {{ dtype: "{dtype}" }})`, whose `logits` are the values; its pipeline returns their \
softmax"""
PIPELINES = {
    "text-classification": "TextClassificationPipeline",
    "token-classification": "TokenClassificationPipeline",
}

CLIENT = """\
import json

import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding()  # on the right, with any id
batch = tokenizer.encode_batch(["Once upon a time", "The end"])
input_ids = np.array([row.ids for row in batch], np.int64)
attention_mask = np.array([row.attention_mask for row in batch], np.int64)
{run}"""
BARE = """\
import json

import numpy as np, onnxruntime as ort

input_ids = np.array([[0, 0], [0, 0]], np.int64)
attention_mask = np.array([[1, 1], [1, 0]], np.int64)
{run}"""
RUN = {
    "feature-extraction": """\
session = ort.InferenceSession("{model}")
states, mean, last = session.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})
mean /= np.linalg.norm(mean, axis=1, keepdims=True)
print(mean @ mean.T)  # cosine similarities
""",
    "text-classification": """\
session = ort.InferenceSession("{model}")
(logits,) = session.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})
labels = json.load(open("config.json"))["id2label"]
print([labels[str(i)] for i in logits.argmax(-1)])
""",
    "token-classification": """\
session = ort.InferenceSession("{model}")
(logits,) = session.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})
labels = json.load(open("config.json"))["id2label"]
for classes, mask in zip(logits.argmax(-1), attention_mask):
    print([labels[str(i)] for i in classes[mask == 1]])
""",
}

TEXT_CLASSES = {
    SINGLE_LABEL: RUN["text-classification"],
    MULTI_LABEL: """\
session = ort.InferenceSession("{model}")
(logits,) = session.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})
labels = json.load(open("config.json"))["id2label"]
for probabilities in 1 / (1 + np.exp(-logits)):
    print({{labels[str(i)]: float(p) for i, p in enumerate(probabilities)}})
""",
    REGRESSION: """\
session = ort.InferenceSession("{model}")
(values,) = session.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})
print(values)
""",
}


def task_card(
    config: GPT2Config,
    task: str,
    labels: Labels | None,
    *,
    precisions: Sequence[str],
    tokenizer: bool,
    source: str,
    runtimes: Mapping[str, str],
    locations: Mapping[str, str | None],
    safetensors: bool,
) -> str:
    """Return the README.md of an exported directory. Arguments as of ``model_card``."""
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_ctx")}
    first, file = precisions[0], contract.model_file(precisions[0])
    inputs = contract.task_inputs()
    outputs = contract.task_outputs(task, config, len(labels.names) if labels else 0)
    return CARD.format(
        **sizes,
        task=task,
        size=f" {config.size_name}" if config.size_name else "",
        what=WHAT[task],
        precisions=precision_table(precisions, runtimes),
        table=slot_table(inputs, outputs),
        rules=_rules(config, task, labels),
        client=client(task, first, tokenizer, labels),
        files=file_lines(precisions, locations),
        model=file,
        optimum=OPTIMUM[task],
        file_name="" if file == contract.model_file() else f', file_name="{file.removeprefix("onnx/")}"',
        transformers_js=_transformers_js(task, PRECISIONS[first].transformers_js, labels),
        needs="" if tokenizer else ", once a tokenizer is added",
        transformers=_transformers(task) if safetensors else "",
        version=__version__,
        source=as_markdown(source),
    )


def _rules(config: GPT2Config, task: str, labels: Labels | None) -> str:
    if labels is None:
        return EMBEDDINGS
    apply = MEANING[problem_of(task, labels)]
    shown = ", ".join(as_markdown(name) for name in labels.names[:20])
    more = f" and {len(labels.names) - 20} more, in `config.json`" if len(labels.names) > 20 else ""
    rules = CLASSES.format(apply=apply, labels=shown + more)
    if task == "token-classification":
        return rules
    pad = config.pad_token_id
    but = "" if pad is None else f" and that is not the padding token {pad}, as in transformers"
    return LAST_TOKEN.format(but=but) + rules


def problem_of(task: str, labels: Labels) -> str:
    """The problem that a classifier was trained for, which says what its logits mean.

    As in transformers, one label of a text is a regression by default, and classes of tokens exclude each other.
    """
    if task == "token-classification":
        return SINGLE_LABEL
    usual = REGRESSION if len(labels.names) == 1 else SINGLE_LABEL
    return labels.problem_type or usual


def client(task: str, precision: str, tokenizer: bool, labels: Labels | None = None) -> str:
    """Return a program that runs two texts, in the directory."""
    template = RUN[task]
    if task == "text-classification" and labels:
        template = TEXT_CLASSES[problem_of(task, labels)]
    run = template.format(model=contract.model_file(precision))
    program = (CLIENT if tokenizer else BARE).format(run=run)
    return program if "json." in run else program.replace("import json\n\n", "")


def _transformers_js(task: str, dtype: str, labels: Labels | None) -> str:
    if task == "feature-extraction":
        return PIPELINE.format(dtype=dtype)
    if labels and problem_of(task, labels) == REGRESSION:
        return MODEL_ALONE.format(dtype=dtype)
    return PIPELINE_CLASS.format(name=PIPELINES[task], task=task, dtype=dtype)


def _transformers(task: str) -> str:
    names = {
        "feature-extraction": "AutoModel",
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
    }
    return f"| transformers | `{names[task]}.from_pretrained(directory)` (`model.safetensors`) |\n"
