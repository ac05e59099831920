"""Exports for tasks other than text generation, and further outputs of text generation, against transformers."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import assert_refused, done
from onnx import numpy_helper
from paths import FIXTURES
from task_models import (
    LABELS,
    PAD,
    TASKS,
    assert_close,
    expected,
    rows,
    save_with_value_head,
    task_model,
    without_padding,
)
from transformers import AutoModel, GPT2DoubleHeadsModel, GPT2ForSequenceClassification, GPT2ForTokenClassification
from transformers_models import language_model, randomize, their_config

from converters import CheckpointError, ConfigError, DestinationError, FormatError, open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, InputError, OnnxDecoder, OnnxTask, export_onnx, pad_rows
from gpt2x.contract import model_file
from gpt2x.export.torch_program import export_pt2, export_torchscript
from gpt2x.precisions import PRECISIONS
from gpt2x.runtimes.opening import open_decoder, open_task
from gpt2x.runtimes.reference import ReferenceTask
from gpt2x.verify.report import verify, verify_export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model for each task, and an ONNX export of each in all precisions."""
    root = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        task_model(task).save_pretrained(root / task)
        options = ExportOptions(tuple(PRECISIONS), task=task)
        export_onnx(open_checkpoint(root / task), root / f"{task}-onnx", options, need_tokenizer=False)
    return root


def in_onnx(folder, task):
    session = onnxruntime.InferenceSession(str(folder / f"{task}-onnx" / model_file()))
    names = [output.name for output in session.get_outputs()]

    def run(ids, mask):
        return dict(zip(names, session.run(None, {"input_ids": ids, "attention_mask": mask}), strict=True))

    return run


def in_torchscript(folder, task):
    export_torchscript(open_checkpoint(folder / task), folder / f"{task}.pt", force=True, task=task)
    return open_task(folder / f"{task}.pt").run


def in_pt2(folder, task):
    export_pt2(open_checkpoint(folder / task), folder / f"{task}.pt2", force=True, task=task)
    return open_task(folder / f"{task}.pt2").run


@pytest.mark.parametrize("opened", [in_onnx, in_torchscript, pytest.param(in_pt2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
def test_each_row_of_a_padded_batch_is_what_transformers_returns_for_it_alone(folder, task, opened):
    run = opened(folder, task)
    for left in (False, True):
        ids, mask = pad_rows(rows(), 5, left=left)
        found = run(ids, mask)
        for i, row in enumerate(rows()):
            wanted = expected(task_model(task), row)
            assert found.keys() == wanted.keys()
            for name, array in wanted.items():
                assert_close(without_padding(task, name, found[name][i], mask[i]), array)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_padded_on_the_right_is_what_transformers_returns_for_the_batch(folder, task):
    ids, mask = pad_rows(rows(), PAD)
    with torch.inference_mode():
        theirs = task_model(task)(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    found = in_onnx(folder, task)(ids, mask)
    for i in range(len(ids)):
        wanted = theirs[0][i].numpy()
        name = next(iter(found))
        assert_close(without_padding(task, name, found[name][i], mask[i]), without_padding(task, name, wanted, mask[i]))


@pytest.mark.parametrize("row", [[3, 7, PAD], [PAD, 4, PAD, PAD], [PAD], [PAD, PAD]])
def test_padding_tokens_at_the_end_do_not_count_even_where_the_mask_is_1_as_in_transformers(folder, row):
    run = in_onnx(folder, "text-classification")
    wanted = expected(task_model("text-classification"), row)["logits"]
    for left in (False, True):
        ids, mask = pad_rows([[1, 2, 3, 4, 5], row], 5, left=left)
        assert_close(run(ids, mask)["logits"][1], wanted)
    reference = ReferenceTask(open_checkpoint(folder / "text-classification"), "text-classification")
    assert_close(reference.run(np.array([row]))["logits"][0], wanted)


@pytest.mark.parametrize("task", TASKS)
def test_an_opset_with_attention_gives_the_same(folder, task, tmp_path):
    options = ExportOptions(task=task, opset=23)
    export_onnx(open_checkpoint(folder / task), tmp_path / "m", options, need_tokenizer=False)
    ids, mask = pad_rows(rows(), left=True)
    found, wanted = OnnxTask(tmp_path / "m").run(ids, mask), in_onnx(folder, task)(ids, mask)
    for name, array in wanted.items():
        assert_close(found[name], array)


def test_the_class_of_transformers_opens_the_directory_with_its_labels(folder, tmp_path):
    for task, cls in (
        ("text-classification", GPT2ForSequenceClassification),
        ("token-classification", GPT2ForTokenClassification),
        ("feature-extraction", AutoModel),
    ):
        path = tmp_path / task
        options = ExportOptions(task=task, safetensors=True)
        export_onnx(open_checkpoint(folder / task), path, options, need_tokenizer=False)
        model = cls.from_pretrained(path)
        assert type(model).__name__ == type(task_model(task)).__name__
        assert model.state_dict().keys() == task_model(task).state_dict().keys()
        for name, tensor in task_model(task).state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert task == "feature-extraction" or model.config.id2label == LABELS
        assert model.config.pad_token_id == PAD


def test_a_task_has_no_files_of_text_generation(folder):
    names = {path.name for path in (folder / "text-classification-onnx").iterdir()}
    assert names == {"README.md", "config.json", "onnx"}


@pytest.mark.parametrize("task", TASKS)
def test_every_precision_passes_the_comparison_with_its_source(folder, task):
    for precision in PRECISIONS:
        report = verify_export(open_checkpoint(folder / task), folder / f"{task}-onnx", precision=precision)
        assert report.passed, report.to_json()
        assert report.inexact == (precision != "fp32")
        run = next(check.result for check in report.checks if check.name == "run")
        assert f"against {type(task_model(task)).__name__} of transformers" in run
        assert "gpt2x's reference in float64" in run


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_another_head_does_not_pass(folder, task, tmp_path):
    model = type(task_model(task))(task_model(task).config)
    model.load_state_dict(task_model(task).state_dict())
    head = model.score if task == "text-classification" else model.classifier
    with torch.no_grad():
        head.weight[1, 3] += 0.01
    model.save_pretrained(tmp_path / "other")
    report = verify(tmp_path / "other", folder / f"{task}-onnx")
    assert not report.passed
    assert {check.name for check in report.checks if check.passed is False} == {
        check.name for check in report.checks if check.name.endswith("logits")
    }


def test_other_labels_do_not_pass(folder, tmp_path):
    model = task_model("text-classification")
    model.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["id2label"]["1"] = "other"
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    report = verify(tmp_path / "other", folder / "text-classification-onnx")
    assert [check.name for check in report.checks if check.passed is False] == ["labels"]


def test_the_command_exports_compares_and_refuses_what_the_task_does_not_have(folder, gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = folder / "text-classification"
    result = done(gpt2x("export", source, "--onnx", "m", "--task", "text-classification", "--no-tokenizer"))
    assert "transformers: left padding, logits" in result.stdout
    assert "The same." in result.stdout
    done(gpt2x("verify", source, "m"))
    shown = done(gpt2x("inspect", "m")).stdout
    assert "contract   3: fp32, text-classification" in shown
    assert "labels     negative, neutral, positive" in shown
    before = sorted(tmp_path.iterdir())
    assert_refused(
        gpt2x("export", source, "--onnx", "n", "--task", "token-classification", "--no-tokenizer"),
        "has no head for token classification",
    )
    assert_refused(gpt2x("export", source, "--torchscript", "n.pt", "--outputs", "logits,values"), "has no value head")
    assert_refused(gpt2x("export", source, "--onnx", "m", "--no-tokenizer"), "m")
    for options in (
        ("--task", "summarization"),
        ("--outputs", "values"),
        ("--outputs", "logits,nonsense"),
        ("--outputs", ""),
        ("--task", "text-classification", "--outputs", "logits,hidden_states"),
        ("--task", "text-classification", "--cache", "growing"),
        ("--task", "text-classification", "--logits", "last"),
    ):
        result = gpt2x("export", source, "--onnx", "n", "--no-tokenizer", *options)
        assert result.exit_code == 2, result.output
    assert sorted(tmp_path.iterdir()) == before


def test_labels_that_do_not_fit_the_head_are_refused_before_anything_is_written(folder, gpt2x, tmp_path):
    task_model("text-classification").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    del config["id2label"]["2"]
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    command = ["export", tmp_path / "source", "--onnx", tmp_path / "m", "--no-tokenizer"]
    result = gpt2x(*command, "--task", "text-classification")
    assert_refused(result, "the head has 3 outputs, but id2label has 2 labels")
    assert not (tmp_path / "m").exists()
    done(gpt2x(*command, "--task", "feature-extraction", "--no-verify"))


def test_a_classifier_without_a_padding_token_is_exported_with_a_warning(gpt2x, tmp_path):
    model = GPT2ForSequenceClassification(their_config(pad_token_id=None))
    randomize(model)
    model.save_pretrained(tmp_path / "source")
    command = ["export", tmp_path / "source", "--onnx", tmp_path / "m", "--no-tokenizer"]
    result = done(gpt2x(*command, "--task", "text-classification"))
    assert result.stderr.startswith("Warning: the source's configuration has no pad_token_id")
    ids, mask = pad_rows(rows(), left=True)
    found = OnnxTask(tmp_path / "m").run(ids, mask)["logits"]
    for logits, row in zip(found, rows(), strict=True):
        assert_close(logits, expected(model.eval(), row)["logits"])


def test_an_adapter_of_a_classifier_is_exported_with_the_head_that_was_trained_with_it(gpt2x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, adapter = FIXTURES / "adapters/base", FIXTURES / "adapter_of_classifier"
    wanted = np.load(adapter / "expected.npz")
    options = ("--task", "text-classification", "--no-tokenizer", "--adapter", adapter)
    result = done(gpt2x("export", base, "--onnx", "m", "--torchscript", "m.pt", *options))
    assert "The same." in result.stdout
    for model in (OnnxTask("m"), open_task("m.pt")):
        assert_close(model.run(wanted["ids"])["logits"], wanted["logits"])
    done(gpt2x("verify", base, "m", "--adapter", adapter))
    assert_refused(gpt2x("verify", base, "m"), "has no head for text classification")


def test_an_adapter_of_a_classifier_whose_labels_do_not_fit_is_refused(gpt2x, tmp_path):
    shutil.copytree(FIXTURES / "adapters/base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "id2label": {"0": "no", "1": "yes"}}))
    options = ("--task", "text-classification", "--adapter", FIXTURES / "adapter_of_classifier")
    result = gpt2x("export", tmp_path / "base", "--onnx", tmp_path / "m", "--no-tokenizer", *options)
    assert_refused(result, "the head has 3 outputs, but id2label has 2 labels")
    assert not (tmp_path / "m").exists()


def test_a_model_of_one_task_does_not_go_into_the_directory_of_another(folder, tmp_path):
    task_model("text-classification").save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    export_onnx(source, tmp_path / "m", ExportOptions(task="text-classification"), need_tokenizer=False)
    with pytest.raises(DestinationError, match="its task is text-classification, this export's feature-extraction"):
        export_onnx(source, tmp_path / "m", ExportOptions(("int8",), task="feature-extraction"), need_tokenizer=False)
    export_onnx(source, tmp_path / "m", ExportOptions(("int8",), task="text-classification"), need_tokenizer=False)
    assert OnnxTask(tmp_path / "m", precision="int8").labels == OnnxTask(tmp_path / "m", precision="fp32").labels


def test_the_decoder_and_the_task_each_refuse_what_the_other_runs(folder, tmp_path):
    with pytest.raises(FormatError, match="a model for text-classification, which generates no text"):
        OnnxDecoder(folder / "text-classification-onnx")
    export_torchscript(open_checkpoint(folder / TASKS[0]), tmp_path / "m.pt", task=TASKS[0])
    with pytest.raises(FormatError, match="a model for feature-extraction, which generates no text"):
        open_decoder(tmp_path / "m.pt")
    export_onnx(open_checkpoint(SHAKESPEARE), tmp_path / "generation")
    with pytest.raises(FormatError, match="a model for text generation; open it with OnnxDecoder"):
        OnnxTask(tmp_path / "generation")


def test_a_task_checks_its_input_before_it_runs(folder):
    model = OnnxTask(folder / "text-classification-onnx")
    assert model.labels is not None
    assert model.labels.names == tuple(LABELS.values())
    for ids, mask, message in (
        ([[40]], None, "token id"),
        ([[1, 2]], [[0, 0]], "row 0 has no token"),
        ([[1, 2]], [[1]], "attention_mask has the shape"),
        ([[1] * 17], None, "a row has 17 tokens; the context is 16"),
    ):
        with pytest.raises(InputError, match=message):
            model.run(np.array(ids), None if mask is None else np.array(mask))
    with pytest.raises(InputError, match="each row a token"):
        pad_rows([[1], []])
    assert model.run(*pad_rows([[1] * 16, [2]], left=True))["logits"].shape == (2, 3)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("labels", [None, {}, ["no", "yes"], {"0": 1}, {"5": "no"}])
def test_a_program_whose_labels_are_damaged_is_refused_in_one_line(folder, tmp_path, labels):
    export_torchscript(open_checkpoint(folder / "text-classification"), tmp_path / "m.pt", task="text-classification")
    extra = {"config.json": ""}
    module = torch.jit.load(tmp_path / "m.pt", _extra_files=extra)
    config = {**json.loads(extra["config.json"]), "id2label": labels}
    torch.jit.save(module, tmp_path / "n.pt", _extra_files={"config.json": json.dumps(config)})
    with pytest.raises(ConfigError, match="id2label") as raised:
        open_task(tmp_path / "n.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", ["output", "task", "labels", "block"])
def test_a_model_whose_metadata_do_not_fit_its_graph_is_refused(folder, tmp_path, change):
    model = onnx.load(folder / "text-classification-onnx" / model_file(), load_external_data=False)
    facts = {entry.key: entry for entry in model.metadata_props}
    if change == "output":
        facts["gpt2x.task"].value = "token-classification"
    elif change == "task":
        facts["gpt2x.task"].value = "summarization"
    elif change == "block":
        model.metadata_props.add(key="gpt2x.block_size", value="many")
    else:
        facts["gpt2x.config"].value = facts["gpt2x.config"].value.replace('"2": "positive"', '"5": "positive"')
    (tmp_path / "onnx").mkdir()
    data = "onnx/model.onnx_data"
    (tmp_path / data).write_bytes((folder / "text-classification-onnx" / data).read_bytes())
    onnx.save(model, tmp_path / "onnx/model.onnx")
    with pytest.raises(
        (CheckpointError, FormatError, ConfigError), match=r"other inputs|unknown task|id2label|block_size"
    ):
        OnnxTask(tmp_path)


def test_a_file_of_a_task_with_the_name_of_another_precision_is_refused(folder, tmp_path):
    shutil.copytree(folder / "text-classification-onnx", tmp_path / "m")
    (tmp_path / "m" / model_file("int8")).write_bytes((tmp_path / "m" / model_file()).read_bytes())
    with pytest.raises(FormatError, match="its metadata says fp32, not int8"):
        OnnxTask(tmp_path / "m", precision="int8")


@pytest.mark.parametrize("task", TASKS)
def test_the_program_in_the_model_card_runs(task, tmp_path):
    """With a tokenizer, in the directory, and without one."""
    checkpoint = open_checkpoint(SHAKESPEARE)
    model = type(task_model(task))(their_config(**json_config(checkpoint)))
    model.save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source", tokenizer=SHAKESPEARE)
    for name, needed in (("with", True), ("without", False)):
        path = tmp_path / name
        found = source if needed else open_checkpoint(tmp_path / "source")
        export_onnx(found, path, ExportOptions(task=task), need_tokenizer=needed)
        (program,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.S)
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=path)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()


# (number of labels, problem_type, what the card says, what it does not say)
PROBLEMS = [
    (1, None, "trained for regression", "softmax."),
    (2, "regression", "trained for regression", "softmax."),
    (2, None, "Probabilities are their softmax", "sigmoid"),
    (1, "multi_label_classification", "the sigmoid of its logit", "Probabilities are"),
]


@pytest.mark.parametrize(("count", "problem", "said", "unsaid"), PROBLEMS)
def test_the_model_card_says_what_the_logits_of_a_classifier_mean(tmp_path, count, problem, said, unsaid):
    sizes = json_config(open_checkpoint(SHAKESPEARE))
    GPT2ForSequenceClassification(their_config(**sizes, num_labels=count, problem_type=problem)).save_pretrained(
        tmp_path / "source"
    )
    options = ExportOptions(task="text-classification")
    export_onnx(open_checkpoint(tmp_path / "source"), tmp_path / "m", options, need_tokenizer=False)
    card = (tmp_path / "m/README.md").read_text()
    assert said in card and unsaid not in card
    assert ("TextClassificationPipeline" in card) == (said != "trained for regression")
    (program,) = re.findall(r"```python\n(.*?)```", card, re.S)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path / "m")
    assert run.returncode == 0, run.stderr
    assert ("LABEL_0" in run.stdout or "LABEL_1" in run.stdout) == (said != "trained for regression")


def json_config(checkpoint):
    return {"vocab_size": checkpoint.config.n_vocab, "n_embd": 8, "n_positions": 32}


@pytest.mark.parametrize("task", TASKS)
def test_an_export_can_be_the_source_of_another(folder, task, tmp_path):
    export_onnx(
        open_checkpoint(folder / f"{task}-onnx"), tmp_path / "again", ExportOptions(task=task), need_tokenizer=False
    )
    ids, mask = pad_rows(rows())
    first, second = (OnnxTask(path).run(ids, mask) for path in (folder / f"{task}-onnx", tmp_path / "again"))
    for name, array in first.items():
        assert np.array_equal(array, second[name])


def test_a_language_model_with_an_untied_lm_head_is_exported_without_it(tmp_path):
    model = language_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    export_onnx(source, tmp_path / "m", ExportOptions(task="feature-extraction"), need_tokenizer=False)
    assert verify_export(source, tmp_path / "m").passed
    found = OnnxTask(tmp_path / "m").run(np.array([rows()[0]]))
    assert_close(found["last_hidden_state"][0], expected(model.transformer, rows()[0])["last_hidden_state"])
    names = {tensor.name for tensor in onnx.load(tmp_path / "m/onnx/model.onnx").graph.initializer}
    assert "lm_head.weight" not in names


def test_one_file_holds_the_head_too(folder, tmp_path):
    task = "token-classification"
    options = ExportOptions(task=task, single_file=True)
    export_onnx(open_checkpoint(folder / task), tmp_path / "m", options, need_tokenizer=False)
    found = onnxruntime.InferenceSession((tmp_path / "m/onnx/model.onnx").read_bytes())
    ids, mask = pad_rows(rows())
    (logits,) = found.run(None, {"input_ids": ids, "attention_mask": mask})
    assert np.array_equal(logits, in_onnx(folder, task)(ids, mask)["logits"])


# --------------------------------------------------------------------------------- further outputs of text generation


def extras_of(path, row):
    return {name: array[0] for name, array in open_decoder(path).extra_outputs(np.array([row])).items()}


@pytest.mark.parametrize("cache", ["growing", "inplace"])
@pytest.mark.parametrize("last", [False, True])
def test_hidden_states_are_those_of_transformers_and_the_logits_stay(cache, last, tmp_path):
    model = language_model(n_embd=64)
    model.save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    for name, outputs in (("plain", ("logits",)), ("more", ("hidden_states", "logits"))):
        options = ExportOptions(cache=cache, last=last, outputs=outputs)
        export_onnx(source, tmp_path / name, options, need_tokenizer=False)
    (row, *_) = rows()
    with torch.inference_mode():
        states = model.transformer(torch.tensor([row])).last_hidden_state[0].numpy()
    found = extras_of(tmp_path / "more", row)
    assert list(found) == ["hidden_states"]
    assert_close(found["hidden_states"], states[-1:] if last else states)
    plain, more = (
        OnnxDecoder(tmp_path / name).run(np.array([row]), None, np.arange(len(row))[None], None)[0]
        for name in ("plain", "more")
    )
    assert np.array_equal(plain, more)
    assert verify_export(source, tmp_path / "more").passed
    assert "`hidden_states`" in (tmp_path / "more/README.md").read_text()


def test_hidden_states_with_a_cache_are_those_of_a_single_pass(tmp_path):
    language_model(n_embd=64).save_pretrained(tmp_path / "source")
    options = ExportOptions(outputs=("logits", "hidden_states"))
    export_onnx(open_checkpoint(tmp_path / "source"), tmp_path / "m", options, need_tokenizer=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m/onnx/model.onnx"))
    names = [output.name for output in session.get_outputs()]
    assert names[0] == "logits"
    assert names[-1] == "hidden_states"
    (row, *_) = rows()
    past = {i.name: np.zeros((1, 2, 0, 32), np.float32) for i in session.get_inputs()[3:]}
    pieces, seen = [], 0
    for piece in (row[:4], row[4:]):
        positions = np.arange(seen, seen + len(piece))[None]
        seen += len(piece)
        feed = {"input_ids": [piece], "attention_mask": np.ones((1, seen), np.int64), "position_ids": positions}
        _, *present, states = session.run(None, {**feed, **past})
        past = dict(zip(past, present, strict=True))
        pieces.append(states[0])
    assert_close(np.concatenate(pieces), extras_of(tmp_path / "m", row)["hidden_states"])


def test_values_are_those_of_the_value_head_in_every_export(tmp_path):
    model, weight, bias = save_with_value_head(tmp_path)
    source = open_checkpoint(tmp_path)
    (row, *_) = rows()
    with torch.inference_mode():
        states = model.transformer(torch.tensor([row])).last_hidden_state[0]
    wanted = (states @ weight.T + bias)[:, 0].numpy()
    outputs = ("logits", "values")
    export_onnx(source, tmp_path / "m", ExportOptions(("fp32", "int4"), outputs=outputs), need_tokenizer=False)
    export_torchscript(source, tmp_path / "m.pt", outputs=outputs)
    for path in (tmp_path / "m", tmp_path / "m.pt"):
        assert_close(extras_of(path, row)["values"], wanted)
        assert verify(tmp_path / "model.safetensors", path).passed
    assert verify(tmp_path / "model.safetensors", tmp_path / "m", precision="int4").passed


@pytest.mark.slow
def test_values_are_those_of_the_value_head_in_a_program_of_torch_export(tmp_path):
    save_with_value_head(tmp_path)
    source = open_checkpoint(tmp_path)
    export_pt2(source, tmp_path / "m.pt2", outputs=("logits", "values"))
    assert verify(tmp_path / "model.safetensors", tmp_path / "m.pt2").passed


def test_values_with_another_head_do_not_pass(tmp_path):
    save_with_value_head(tmp_path)
    options = ExportOptions(outputs=("logits", "values"))
    export_onnx(open_checkpoint(tmp_path), tmp_path / "m", options, need_tokenizer=False)
    model = onnx.load(tmp_path / "m/onnx/model.onnx", load_external_data=False)
    (head,) = (tensor for tensor in model.graph.initializer if tensor.name == "v_head.summary.bias")
    head.CopyFrom(numpy_helper.from_array(np.array([0.51], np.float32), head.name))
    onnx.save(model, tmp_path / "m/onnx/model.onnx")
    report = verify(tmp_path / "model.safetensors", tmp_path / "m")
    failed = [check.name for check in report.checks if check.passed is False]
    assert failed == ["transformers, values", "float64, values"]


def test_outputs_of_a_pair_of_precisions_out_of_its_bounds_are_a_difference(tmp_path, monkeypatch):
    """What a pair loses in exact arithmetic is not measured."""
    language_model(n_embd=64).save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    options = ExportOptions(("int8", "int4"), cache="inplace", outputs=("logits", "hidden_states"))
    export_onnx(source, tmp_path / "m", options, need_tokenizer=False)
    monkeypatch.setattr("gpt2x.verify.tasks.bounds_for", lambda name, bounds: replace(bounds, max_abs_error=0.0))
    report = verify_export(source, tmp_path / "m", precision="int8+int4")
    failed = {check.name for check in report.checks if check.passed is False}
    assert {"transformers, hidden_states", "float64, hidden_states"} <= failed


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("cache", ["growing", "inplace"])
def test_mc_logits_at_a_position_are_those_of_transformers_for_it(cache, activation, tmp_path):
    model = GPT2DoubleHeadsModel(their_config(n_embd=64, summary_activation=activation)).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    options = ExportOptions(cache=cache, outputs=("logits", "mc_logits"))
    export_onnx(source, tmp_path / "m", options, need_tokenizer=False)
    (row, *_) = rows()
    found = extras_of(tmp_path / "m", row)["mc_logits"]
    scores = []
    with torch.inference_mode():
        for place in range(len(row)):
            out = model(torch.tensor([[row]]), mc_token_ids=torch.tensor([[place]]))
            scores.append(float(out.mc_logits))
    assert_close(found, np.array(scores))
    assert verify_export(source, tmp_path / "m").passed


def test_outputs_of_one_directory_are_the_same(tmp_path):
    language_model(n_embd=64).save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    export_onnx(source, tmp_path / "m", ExportOptions(outputs=("logits", "hidden_states")), need_tokenizer=False)
    with pytest.raises(DestinationError, match="its outputs are logits,hidden_states"):
        export_onnx(source, tmp_path / "m", ExportOptions(("int8",)), need_tokenizer=False)


def test_options_that_make_no_sense_are_refused_in_python():
    with pytest.raises(ValueError, match="task is 'summarization'"):
        ExportOptions(task="summarization")
    for options in ({"cache": "inplace"}, {"last": True}):
        with pytest.raises(ValueError, match="has no cache"):
            ExportOptions(task="text-classification", **options)
    with pytest.raises(ConfigError, match="outputs can be chosen for text-generation only"):
        ExportOptions(task="text-classification", outputs=("logits", "hidden_states"))


def test_convert_writes_the_language_model_without_heads_as_before(tmp_path):
    task_model("text-classification").save_pretrained(tmp_path / "source")
    save_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").heads == ()
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
