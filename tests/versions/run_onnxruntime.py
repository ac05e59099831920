"""Run models in the installed ONNX Runtime: ``python run_onnxruntime.py TASK``. Prints the results as JSON.

TASK is a JSON file with ``models`` (paths of ONNX files), ``prompts`` (token ids), ``count`` and ``gpt2x``: whether gpt2x's
decoder runs them, too. A result is the new tokens for each prompt, or the error.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
CAPACITY = 128  # slots of a cache that stays in place
ROWS = 2  # of a batch


def main(task):
    results = {"version": ort.__version__, "plain": {}, "gpt2x": {}}
    for path in task["models"]:
        results["plain"][path] = attempt(run_plain, path, task)
        if task["gpt2x"]:
            results["gpt2x"][path] = attempt(run_gpt2x, path, task)
    return results


def attempt(run, path, task):
    try:
        return {"tokens": run(path, task["prompts"], task["count"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def run_plain(path, prompts, count):
    """As a client does that knows ONNX Runtime alone."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tokens = [generate(arrays(session, 1), prompt, 1, count)[0] for prompt in prompts]
    for prompt, row in zip(prompts, tokens, strict=True):
        assert generate(arrays(session, ROWS), prompt, ROWS, count) == [row] * ROWS, "other tokens in a batch"
        if session.get_outputs()[1].shape[2] == "present_sequence_length":
            in_place = generate(one_buffer(session, ROWS), prompt, ROWS, count)
            assert in_place == [row] * ROWS, "other tokens where past and present are one buffer"
    return tokens


def generate(run, prompt, rows, count):
    """The new tokens of each row of a batch, in which every row has the same prompt."""
    ids, seen, tokens = np.array([prompt] * rows), 0, []
    for _ in range(count):
        positions = np.tile(np.arange(seen, seen + ids.shape[1]), (rows, 1))
        seen += ids.shape[1]
        mask = np.ones((rows, seen), np.int64)
        logits = run({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return np.concatenate(tokens, 1).tolist()


def arrays(session, rows):
    """A run of the model, whose cache is arrays that are given and taken."""
    past = {i.name: np.zeros((rows, i.shape[1], 0, i.shape[3]), TYPES[i.type]) for i in session.get_inputs()[3:]}

    def run(feed):
        nonlocal past
        logits, *present = session.run(None, {**feed, **past})
        past = dict(zip(past, present, strict=True))
        return logits

    return run


def one_buffer(session, rows):
    """A run of the model, whose past and present are one buffer."""
    binding, buffers = session.io_binding(), []
    for i in session.get_inputs()[3:]:
        buffer = np.zeros((rows, i.shape[1], CAPACITY, i.shape[3]), TYPES[i.type])
        place = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        binding.bind_input(i.name, *place)
        binding.bind_output(i.name.replace("past_key_values", "present"), *place)
        buffers.append(buffer)

    def run(feed):
        assert buffers  # held while they are bound
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    return run


def run_gpt2x(path, prompts, count):
    """gpt2x's decoder: each prompt alone, all as one padded batch, and all as a running batch."""
    from gpt2x.generation.loop import Generation
    from gpt2x.generation.sampling import Sampling
    from gpt2x.runtimes.batching import RunningBatch
    from gpt2x.runtimes.onnxruntime import OnnxDecoder

    greedy = Sampling(temperature=0)
    with OnnxDecoder(path, threads=1) as decoder:
        alone = [[int(token) for (token,) in Generation(decoder, [prompt], count, greedy)] for prompt in prompts]
        rows = zip(*Generation(decoder, prompts, count, greedy), strict=True)
        assert [[int(token) for token in row] for row in rows] == alone, "other tokens in a batch"
        if decoder.in_place:
            with RunningBatch(decoder) as batch:
                assert running(batch, prompts, count) == alone, "other tokens in a running batch"
    return alone


def running(batch, prompts, count):
    joined = [batch.join(prompt) for prompt in prompts]
    logits = dict(joined)
    tokens = {sequence: [] for sequence, _ in joined}
    for _ in range(count):
        for sequence, found in logits.items():
            tokens[sequence].append(int(found.argmax()))
        logits = batch.step({sequence: row[-1] for sequence, row in tokens.items()})
    return list(tokens.values())


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
