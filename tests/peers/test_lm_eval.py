"""lm-evaluation-harness runs its tasks on gpt2x, with the results of its own model ``hf``. ``make test-eval``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converters import open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, InputError, export_onnx

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (make test-eval installs it)")
pytest.importorskip("accelerate", reason="the harness's model hf needs accelerate (make test-eval installs it)")

pytestmark = pytest.mark.filterwarnings("default")  # those of the harness and its libraries are not ours

TEXT = (SHAKESPEARE.parent / "coriolanus.txt").read_text(encoding="utf-8")
CHOICES = [
    {"context": "ROMEO:\nIs the day so", "choices": [" young?", " long?", " table?"], "answer": 0},
    {"context": "To be, or not to be, that is the ", "choices": ["question", "answer", "a"], "answer": 0},
    {
        "context": "O Romeo, Romeo! wherefore art thou",
        "choices": [" Romeo?", " there, my lord and my king?"],
        "answer": 0,
    },
    {"context": TEXT[:2500], "choices": [" my lord", " the people", "\n\nMENENIUS:"], "answer": 2},  # cut from the left
]
TASKS = {
    "gpt2x_choices": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "gpt2x_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "gpt2x_until": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n\\n", "my lord"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The shipped model as a Hugging Face and an ONNX directory, and three tasks."""
    home: Path = tmp_path_factory.mktemp("eval")
    checkpoint = open_checkpoint(SHAKESPEARE)
    save_checkpoint(checkpoint, home / "hf")
    export_onnx(checkpoint, home / "onnx", ExportOptions(("fp32", "int8"), cache="inplace"))
    data = home / "docs.json"
    data.write_text("".join(json.dumps(line) + "\n" for line in CHOICES))
    (home / "tasks").mkdir()
    for name, task in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        (home / "tasks" / f"{name}.yaml").write_text(head + task)
    return home


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module", params=["hf", "onnx"])
def ours(request, folder) -> Any:
    from gpt2x.lm_eval import GPT2XLM

    return GPT2XLM(str(folder / request.param), batch_size=2)


def requests_of(kind, *arguments) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("ROMEO:", " What say you"),
    ("", "First Citizen:"),
    ("", "<|endoftext|>ROMEO:"),
    ("a space at the end ", "of the context"),
    (TEXT[:3000], " is longer than the context"),
    ("JULIET:", TEXT[:700]),
    ("caf\u00e9", " \u65e5\u672c"),
]


def test_log_likelihoods_are_those_of_hf(ours, theirs):
    expected = theirs.loglikelihood(requests_of("loglikelihood", *PAIRS))
    found = ours.loglikelihood(requests_of("loglikelihood", *PAIRS))
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-5)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_the_greedy_continuation_is_known_as_such(ours):
    text = ours.generate_until(requests_of("generate_until", ("ROMEO:", {"max_gen_toks": 5})))[0]
    ((_, greedy), (_, other)) = ours.loglikelihood(
        requests_of("loglikelihood", ("ROMEO:", text), ("ROMEO:", text + " x"))
    )
    assert greedy
    assert not other


def test_rolling_log_likelihoods_are_those_of_hf(ours, theirs):
    texts = [(TEXT[:20],), (TEXT[:5000],), (TEXT[300:1300],), ("a",)]
    expected = theirs.loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts))
    found = ours.loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts))
    assert found == pytest.approx(expected, rel=1e-5)


def test_generated_texts_are_those_of_hf(ours, theirs):
    arguments: list[tuple[str, dict[str, Any]]] = [
        ("ROMEO:", {"until": ["\n\n"], "max_gen_toks": 40}),
        ("First Citizen:\nBefore we proceed", {"until": ["\n\n"], "max_gen_toks": 40}),
        ("JULIET:", {"until": "the", "max_new_tokens": 30}),
        ("My lord,", {"until": [], "max_gen_toks": 20, "do_sample": False}),
        (TEXT[:4000], {"until": ["."], "max_gen_toks": 30}),  # longer than the context
    ]
    expected = theirs.generate_until(requests_of("generate_until", *arguments))
    assert ours.generate_until(requests_of("generate_until", *arguments)) == expected


def test_more_new_tokens_than_the_context_are_refused(ours):
    with pytest.raises(ValueError, match="max_gen_toks is 256; it must be below the context of 256"):
        ours.generate_until(requests_of("generate_until", ("ROMEO:", {"until": ["\n"]})))


def test_a_model_with_only_the_last_logits_is_refused(tmp_path):
    from gpt2x.lm_eval import GPT2XLM

    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "m", ExportOptions(last=True))
    with pytest.raises(InputError, match="without --logits last"):
        GPT2XLM(str(tmp_path / "m"))


def test_another_device_is_refused(folder):
    from gpt2x.lm_eval import GPT2XLM

    with pytest.raises(ValueError, match="device is 'cuda'"):
        GPT2XLM(str(folder / "hf"), device="cuda")


def evaluated(folder, model, *arguments) -> dict[str, dict[str, Any]]:
    """The results of all tasks, by the harness's command line with our model registered."""
    output = folder / f"results-{model}-{len(arguments)}-{abs(hash(arguments))}"
    command = [
        sys.executable, "-m", "gpt2x.lm_eval", "run", "--model", model, "--model_args", ",".join(arguments), "--tasks",
        ",".join(TASKS), "--include_path", str(folder / "tasks"), "--output_path", str(output), "--batch_size", "2",
        "--device", "cpu",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = output.rglob("results*.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def test_whole_tasks_have_the_results_of_hf_and_the_command_line_knows_the_model(folder):
    expected = evaluated(folder, "hf", f"pretrained={folder / 'hf'}", "dtype=float32")
    found = evaluated(folder, "gpt2x", f"pretrained={folder / 'onnx'}", "precision=fp32", f"tokenizer={folder / 'hf'}")
    assert set(found) == set(TASKS)
    for task, values in expected.items():
        for name, value in values.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-5), (task, name)
    int8 = evaluated(folder, "gpt2x", f"pretrained={folder / 'onnx'}", "precision=int8")
    name = "bits_per_byte,none"
    assert int8["gpt2x_rolling"][name] == pytest.approx(found["gpt2x_rolling"][name], rel=1e-2)
    assert int8["gpt2x_rolling"][name] != found["gpt2x_rolling"][name]
