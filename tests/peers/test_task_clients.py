"""optimum's and transformers.js's pipelines run exports for tasks, from a disk and from a Hub, and return transformers' results.

``make test-clients`` installs the clients. Tests of a client that is not installed are skipped.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
import transformers
from client_programs import CLIENTS, OPTIMUM, PACKAGES, PROGRAMS, clients
from hub_server import HANGS, environment, running
from task_models import CLASSES, LABELS, TASKS
from transformers_models import randomize, their_config

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, Tokenizer, contract, export_onnx
from gpt2x.precisions import PRECISIONS as ALL_PRECISIONS
from gpt2x.runtimes.onnx_task import OnnxTask

IDS = {name: i for i, name in LABELS.items()}
TEXTS = ["My lord, I", "O, my good lord, not so", "No"]
PRECISIONS = "fp32", "int8"

pytestmark = pytest.mark.slow  # make test-clients and CI run these


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(SHAKESPEARE)


@pytest.fixture(scope="module")
def models(tokenizer):
    """Task -> a model of transformers with random weights and the shipped model's vocabulary."""
    found = {}
    sizes = {"vocab_size": open_checkpoint(SHAKESPEARE).config.n_vocab, "n_positions": 32, "n_embd": 64}
    end = tokenizer.eos_token_id
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    for task, name in CLASSES.items():
        config = their_config(**sizes, **tokens, id2label=LABELS, label2id=IDS)
        found[task] = getattr(transformers, name)(config).eval()
        randomize(found[task])
    return found


@pytest.fixture(scope="module")
def root(models, tmp_path_factory):
    """A folder with an export of each model: me/TASK."""
    folder = tmp_path_factory.mktemp("repositories")
    for task, model in models.items():
        model.save_pretrained(folder / "source" / task)
        source = open_checkpoint(folder / "source" / task, tokenizer=SHAKESPEARE)
        export_onnx(source, folder / "hub/me" / task, ExportOptions(PRECISIONS, task=task))
    return folder / "hub"


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [tokenizer.encode(text) for text in TEXTS]


def wanted(models, rows, root, task, precision):
    """For each text, the first output of transformers, or of gpt2x's runtime if the precision is not fp32: (T, D) or (D,)."""
    if precision != "fp32":
        model = OnnxTask(root / "me" / task, precision=precision, optimize=False)
        return [next(iter(model.run(np.array([row])).values()))[0] for row in rows]
    with torch.inference_mode():
        return [models[task](torch.tensor([row]))[0][0].numpy() for row in rows]


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def check(task, found, expected, *, left, within):
    """Compare what a pipeline returned with the outputs for each text alone."""
    for row, output in zip(found, expected, strict=True):
        if task == "text-classification":
            assert [row[name] for name in LABELS.values()] == pytest.approx(softmax(output), abs=within)
        elif task == "token-classification":
            row = row[-len(output) :] if left else row[: len(output)]
            scores = softmax(output)
            assert [score for _, score in row] == pytest.approx(scores.max(-1), abs=within)
            assert all(
                score[IDS[entity]] > score.max() - 2 * within for (entity, _), score in zip(row, scores, strict=True)
            )
        else:
            states = np.array(row)
            states = states[-len(output) :] if left else states[: len(output)]
            np.testing.assert_allclose(states, output, rtol=0, atol=within * np.abs(output).max())


# (precision, side of padding, the largest error)
CASES = [("fp32", "right", 1e-4), ("fp32", "left", 1e-4), ("int8", "right", 0.15)]


def run_client(program, folder, directories, env, **more):
    """Run a client on each case of each directory; return what it printed, by task and case."""
    named = []
    for task, directory in directories.items():
        for precision, side, _ in CASES:
            names = {"file": contract.model_file(precision).removeprefix("onnx/")}
            dtype = ALL_PRECISIONS[precision].transformers_js
            named.append({"directory": str(directory), "task": task, "dtype": dtype, "side": side, **names})
    file = folder / "task.json"
    file.write_text(json.dumps({"models": named, "texts": TEXTS, **more}))
    command = [str(part) for part in (*program[:2], file, *program[2:])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    answers = iter(json.loads(result.stdout.splitlines()[-1]))
    return {task: [next(answers) for _ in CASES] for task in directories}


def check_all(answers, models, rows, root):
    for task, found in answers.items():
        for (precision, side, within), result in zip(CASES, found, strict=True):
            expected = wanted(models, rows, root, task, precision)
            check(task, result, expected, left=side == "left", within=within)


def programs(folder):
    return {
        "optimum": [OPTIMUM, PROGRAMS / "task_pipelines.py"],
        "transformers.js": ["node", PROGRAMS / "task_pipelines.mjs", PACKAGES, folder / "cache"],
    }


@clients("optimum", "transformers.js")
def test_pipelines_run_every_task_from_a_disk(client, root, models, rows, tmp_path):
    directories = {task: root / "me" / task for task in TASKS}
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    answers = run_client(programs(tmp_path)[client], tmp_path, directories, env)
    check_all(answers, models, rows, root)


@clients("optimum", "transformers.js")
def test_pipelines_run_every_task_from_a_hub(client, root, models, rows, tmp_path):
    directories = {task: f"me/{task}" for task in TASKS}
    with running(root) as hub:
        env = environment(hub.url, tmp_path / "hf-home", OMP_NUM_THREADS="1")
        more = {"hub": hub.url} if client == "transformers.js" else {}
        answers = run_client(programs(tmp_path)[client], tmp_path, directories, env, **more)
    check_all(answers, models, rows, root)


def test_another_head_would_be_seen(models, rows, root):
    (first, *_) = wanted(models, rows, root, "text-classification", "fp32")
    found = [dict(zip(LABELS.values(), softmax(-first), strict=True))]
    with pytest.raises(AssertionError):
        check("text-classification", found, [first], left=False, within=1e-4)


@pytest.mark.parametrize("cache", ["growing", "inplace"])
@clients("onnxruntime-genai", "optimum", "transformers.js", "onnxruntime-node")
def test_hidden_states_change_nothing_for_clients_that_generate(client, cache, tmp_path):
    source = open_checkpoint(SHAKESPEARE)
    for name, outputs in (("plain", ("logits",)), ("more", ("logits", "hidden_states"))):
        export_onnx(source, tmp_path / name, ExportOptions(cache=cache, outputs=outputs))
    named = [
        {"directory": str(tmp_path / n), "file": contract.model_file(), "dtype": "fp32"} for n in ("plain", "more")
    ]
    file = tmp_path / "task.json"
    file.write_text(json.dumps({"models": named, "batches": [[TEXTS[0]]], "count": 16}))
    command = [str(part) for part in (*CLIENTS[client], file, PACKAGES)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    plain, more = json.loads(result.stdout.splitlines()[-1])
    assert plain == more
    assert len(plain[0][0]) == 16
