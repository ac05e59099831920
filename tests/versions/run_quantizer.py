"""Quantize a directory with optimum's ORTQuantizer, and run it: ``python run_quantizer.py TASK``. Prints the results as JSON.

TASK is a JSON file with ``model`` (a directory), ``folder`` (for what is written), ``prompts`` (token ids) and ``count``.
"""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from run_optimum import generate


def main(task):
    source = ORTModelForCausalLM.from_pretrained(task["model"])
    expected = [generate(source, prompt, task["count"]) for prompt in task["prompts"]]
    quantizer = ORTQuantizer.from_pretrained(source)
    config = AutoQuantizationConfig.avx2(is_static=False, per_channel=True)
    quantizer.quantize(save_dir=task["folder"], quantization_config=config)
    (made,) = Path(task["folder"]).glob("*.onnx")
    model = ORTModelForCausalLM.from_pretrained(task["folder"], file_name=made.name)
    tokens = [generate(model, prompt, task["count"]) for prompt in task["prompts"]]
    pairs = [a == b for row, other in zip(tokens, expected, strict=True) for a, b in zip(row, other, strict=True)]
    before = sum(file.stat().st_size for file in Path(task["model"], "onnx").iterdir())
    return {"tokens": tokens, "same": sum(pairs) / len(pairs), "bytes": made.stat().st_size, "before": before}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
