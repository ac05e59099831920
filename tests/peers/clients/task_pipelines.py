"""transformers' pipelines over optimum's models, for tasks other than text generation. The argument is the task's file."""

import json
import sys
from pathlib import Path

import optimum.onnxruntime
from transformers import AutoTokenizer, pipeline

CLASSES = {
    "feature-extraction": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
}
OPTIONS = {
    "feature-extraction": {},
    "text-classification": {"top_k": None},
    "token-classification": {"ignore_labels": []},
}

task = json.loads(Path(sys.argv[1]).read_text())


def results(directory, name, file, side):
    """What a pipeline returns for all texts in one batch, which is padded on a side."""
    kind = getattr(optimum.onnxruntime, CLASSES[name])
    model = kind.from_pretrained(directory, **({} if file == "model.onnx" else {"file_name": file}))
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side)
    tokenizer.pad_token_id = model.config.pad_token_id
    run = pipeline(name, model=model, tokenizer=tokenizer, batch_size=len(task["texts"]))
    found = run(task["texts"], **OPTIONS[name])
    if name == "feature-extraction":
        return [row[0] for row in found]
    if name == "text-classification":
        return [{each["label"]: each["score"] for each in row} for row in found]
    return [[[each["entity"], float(each["score"])] for each in row] for row in found]


models = task["models"]
print(json.dumps([results(each["directory"], each["task"], each["file"], each["side"]) for each in models]))
