"""Run tools of others over ONNX files: ``python run_tools.py TASK``. Prints the results as JSON.

TASK is a JSON file with ``models`` (paths of ONNX files), ``folder`` (for what the tools write), ``prompts`` (token ids) and
``count``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
import onnxslim
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from run_onnxruntime import TYPES, run_plain

DIMENSION = 2**31 - 1  # the largest that symbolic shape inference supposes


def main(task):
    return {path: of_model(Path(path), task, Path(task["folder"]) / str(i)) for i, path in enumerate(task["models"])}


def of_model(path, task, folder):
    folder.mkdir()
    tokens = run_plain(str(path), task["prompts"], task["count"])
    text = task["prompts"][-1] + tokens[-1]
    expected = log_probabilities(path, text)

    def facts(made):
        found = log_probabilities(made, text)
        return {
            "tokens": run_plain(str(made), task["prompts"], task["count"]),
            "kl": float((np.exp(expected) * (expected - found)).sum(-1).mean()),
            "bytes": size(made),
        }

    results = {"tokens": tokens, "bytes": size(path)}
    for name, tool in TOOLS.items():
        results[name] = attempt(tool, path, folder)
    for name, tool in WRITERS.items():
        made = folder / f"{name}.onnx"
        results[name] = attempt(lambda tool=tool, made=made: tool(path, made) or facts(made))
    return results


def attempt(run, *arguments):
    try:
        return run(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def size(path):
    """The bytes of a model with its weights."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def log_probabilities(path, text):
    """After each token of a text, (T, V)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = np.array([text])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for i in session.get_inputs()[3:]:
        feed[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), TYPES[i.type])
    (logits,) = session.run(["logits"], feed)
    shifted = logits[0].astype(np.float64) - logits[0].max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def unknown(model):
    """The values without a shape."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    known = {value.name for value in values if value.type.tensor_type.HasField("shape")}
    return [name for node in model.graph.node for name in node.output if name and name not in known]


def check(path, folder):
    onnx.checker.check_model(str(path), full_check=True)
    return "passed"


def infer(path, folder):
    model = onnx.load(path, load_external_data=False)
    return unknown(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True))


def infer_path(path, folder):
    made = folder / "inferred.onnx"
    onnx.shape_inference.infer_shapes_path(str(path), str(made), True, True, True)
    return unknown(onnx.load(made, load_external_data=False))


def infer_symbolically(path, folder):
    inferred = SymbolicShapeInference.infer_shapes(onnx.load(path), int_max=DIMENSION)
    return unknown(inferred)


def slim(path, made):
    onnx.save(onnxslim.slim(str(path)), made)


def simplify(path, made):
    model, same = onnxsim.simplify(onnx.load(path))
    assert same
    onnx.save(model, made)


def quantize(path, made):
    quantize_dynamic(str(path), str(made), weight_type=QuantType.QInt8)


def quantize_per_channel(path, made):
    quantize_dynamic(str(path), str(made), weight_type=QuantType.QUInt8, per_channel=True)


def preprocess(path, made):
    quant_pre_process(str(path), str(made))


def preprocess_and_quantize(path, made):
    quantize(made.with_name("quant_pre_process.onnx"), made)


TOOLS = {
    "checker": check,
    "infer_shapes": infer,
    "infer_shapes_path": infer_path,
    "symbolic": infer_symbolically,
}
WRITERS = {
    "onnxslim": slim,
    "onnxsim": simplify,
    "quantize_dynamic": quantize,
    "quantize_dynamic per channel": quantize_per_channel,
    "quant_pre_process": preprocess,
    "preprocessed and quantized": preprocess_and_quantize,
}

if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
