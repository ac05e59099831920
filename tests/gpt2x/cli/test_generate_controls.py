"""The controls of ``gpt2x generate``, and ``--prompts``."""

import json
from pathlib import Path

import pytest
from checkpoints import random_checkpoint
from click.testing import CliRunner
from commands import assert_refused, done
from library import open_library, text_of

from converters import open_checkpoint, save_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, Tokenizer, export_onnx
from gpt2x.cli.running import open_draft


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def library():
    return open_library()


@pytest.mark.parametrize(
    ("options", "controls"),
    [
        (["--temperature", 0, "--repetition-penalty", 1.3], {"temperature": 0, "repetition_penalty": 1.3}),
        (["--temperature", 0, "--no-repeat-ngram-size", 2], {"temperature": 0, "no_repeat_ngram_size": 2}),
        (["--temperature", 0, "--stop", " my", "--stop", "?"], {"temperature": 0, "stop_strings": [" my", "?"]}),
        (["--temperature", 0, "--logit-bias", "13=-50", "--bad-words-ids", "11,198"],
         {"temperature": 0, "logit_bias": {13: -50}, "bad_words_ids": [[11, 198]]}),
        (["--temperature", 0, "--stop-token-id", 198], {"temperature": 0, "stop_token_ids": [198]}),
        (["--min-p", 0.1, "--typical-p", 0.9, "--seed", 4], {"min_p": 0.1, "typical_p": 0.9, "seed": 4}),
        (["--presence-penalty", 0.5, "--frequency-penalty", 0.5, "--seed", 4],
         {"presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 4}),
        (["--num-beams", 3, "--length-penalty", 0.5, "--early-stopping"],
         {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_is_the_control_of_the_library(gpt2x, library, options, controls):
    found = done(gpt2x("generate", SHAKESPEARE, "ROMEO:", "--max-new-tokens", 30, *options)).stdout
    assert found == text_of(library, "ROMEO:", 30, **controls) + "\n"


def test_several_texts_are_numbered(gpt2x, library):
    found = done(gpt2x("generate", SHAKESPEARE, "ROMEO:", "--max-new-tokens", 9, "-n", 2, "--seed", 5)).stdout
    one, two = text_of(library, "ROMEO:", 9, seed=5, num_return_sequences=2)
    assert found == f"--- 1 of 2\n{one}\n--- 2 of 2\n{two}\n"
    assert one != two


def test_the_prompt_can_come_from_standard_input(gpt2x):
    from gpt2x.cli import main

    options = [str(SHAKESPEARE), "--temperature", "0", "--max-new-tokens", "5"]
    piped = CliRunner().invoke(main, ["generate", *options, "-"], input="ROMEO:")
    assert done(piped).stdout == done(gpt2x("generate", *options, "ROMEO:")).stdout


@pytest.mark.parametrize("command", ["generate", "score"])
def test_standard_input_that_is_not_utf_8_is_refused(command):
    from gpt2x.cli import main

    refused = CliRunner().invoke(main, [command, str(SHAKESPEARE), "-"], input=b"caf\xe9")
    assert_refused(refused, "standard input: not UTF-8 at byte 3")


def test_a_fault_of_generation_config_names_the_file(gpt2x):
    save_checkpoint(open_checkpoint(SHAKESPEARE), "hf")
    Path("hf/generation_config.json").write_text('{"do_sample": true, "top_p": 7.0}')
    refused = gpt2x("generate", "hf", "ROMEO:")
    assert_refused(refused, "hf/generation_config.json: top_p is 7.0", "set the control with an option")
    assert refused.exit_code == 1
    assert done(gpt2x("generate", "hf", "ROMEO:", "--top-p", 0.9, "--max-new-tokens", 1)).stdout


def test_threads_are_set(gpt2x):
    export_onnx(open_checkpoint(SHAKESPEARE), "m")
    options = ["--temperature", 0, "--max-new-tokens", 5]
    found = done(gpt2x("generate", "m", "ROMEO:", *options, "--threads", 1)).stdout
    assert found == done(gpt2x("generate", "m", "ROMEO:", *options)).stdout


def test_generation_config_beside_the_model_is_used_and_said(gpt2x, library):
    save_checkpoint(open_checkpoint(SHAKESPEARE), "hf")
    settings = json.loads(Path("hf/generation_config.json").read_text())
    settings |= {"do_sample": False, "repetition_penalty": 1.4, "max_new_tokens": 12, "penalty_alpha": 0.6}
    Path("hf/generation_config.json").write_text(json.dumps(settings))
    result = done(gpt2x("generate", "hf", "ROMEO:"))
    assert result.stdout == text_of(library, "ROMEO:", 12, 0, repetition_penalty=1.4) + "\n"
    assert "from generation_config.json: repetition_penalty 1.4, max_new_tokens 12, temperature 0.0" in result.stderr
    assert "penalty_alpha, which gpt2x does not support" in result.stderr
    result = done(gpt2x("generate", "hf", "ROMEO:", "--repetition-penalty", 1, "--max-new-tokens", 7))
    assert result.stdout == text_of(library, "ROMEO:", 7, 0) + "\n"
    assert "from generation_config.json: temperature 0.0" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ROMEO:", "--num-beams", 3, "--temperature", 2], "beam search does not sample"),
        (["ROMEO:", "--stop", ""], "a stop string is empty"),
        (["ROMEO:", "--logit-bias", "a=1"], "is not a list of token ids"),
        (["ROMEO:", "--prompts", "in.jsonl", "--output", "out.jsonl"], "either PROMPT or --prompts"),
        ([], "either PROMPT or --prompts"),
        (["--prompts", "in.jsonl"], "go together"),
        (["ROMEO:", "--resume"], "--resume continues an --output"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_wrong_usage(gpt2x, options, words):
    Path("in.jsonl").write_text("")
    result = gpt2x("generate", SHAKESPEARE, *options)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-beams", 3, "--seed", 2], "beam search does not sample"),
        (["--stop", ""], "a stop string is empty"),
        (["--repetition-penalty", 0], "repetition_penalty is 0"),
    ],
    ids=str,
)
def test_contradicting_controls_are_refused_before_a_download(gpt2x, monkeypatch, options, words):
    monkeypatch.setattr("gpt2x.cli.running.Running.of", None)
    result = gpt2x("generate", "hf://me/model", "ROMEO:", *options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_guesses_for_beams_are_refused_before_the_model_is_opened(gpt2x, monkeypatch):
    monkeypatch.setattr("gpt2x.cli.running.Running.open", None)
    result = gpt2x("generate", SHAKESPEARE, "ROMEO:", "--num-beams", 2, "--prompt-lookup")
    assert result.exit_code == 2
    assert "leave out --prompt-lookup, or --num-beams" in result.stderr


def test_a_token_outside_the_vocabulary_is_refused(gpt2x):
    assert_refused(gpt2x("generate", SHAKESPEARE, "ROMEO:", "--stop-token-id", 50256), "token id 50256", "2048")


def test_an_n_gram_longer_than_the_text_is_refused_before_the_model_is_opened(gpt2x, monkeypatch):
    monkeypatch.setattr("gpt2x.cli.running.Running.open", None)
    options = ["ROMEO:", "--no-repeat-ngram-size"]
    refused = gpt2x("generate", SHAKESPEARE, *options, 9, "--max-new-tokens", 4)
    assert_refused(refused, "no_repeat_ngram_size is 9", "at most 6 tokens")
    assert refused.exit_code == 1


def test_an_n_gram_as_long_as_the_text_is_taken(gpt2x):
    options = ["ROMEO:", "--no-repeat-ngram-size", 6, "--max-new-tokens", 4]
    assert done(gpt2x("generate", SHAKESPEARE, *options)).stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-repeat-ngram-size", 257], ["no_repeat_ngram_size is 257", "at most 256 tokens"]),
        (["--bad-words-ids", "1,9999"], ["token id 9999"]),
    ],
    ids=str,
)
def test_a_control_that_does_not_fit_the_model_leaves_no_empty_output(gpt2x, options, words):
    Path("in.jsonl").write_text('{"prompt": "A"}\n')
    command = ["generate", SHAKESPEARE, "--prompts", "in.jsonl", "--output", "out.jsonl"]
    assert_refused(gpt2x(*command, *options), *words)
    assert not Path("out.jsonl").exists()


def test_an_n_gram_size_of_a_file_does_not_refuse_a_short_text(gpt2x):
    save_checkpoint(open_checkpoint(SHAKESPEARE), "hf")
    Path("hf/generation_config.json").write_text('{"no_repeat_ngram_size": 20}')
    assert done(gpt2x("generate", "hf", "ROMEO:", "--max-new-tokens", 1)).stdout


def test_standard_input_is_checked_before_the_model_is_opened(monkeypatch):
    from gpt2x.cli import main

    monkeypatch.setattr("gpt2x.cli.running.Running.open", None)
    refused = CliRunner().invoke(main, ["generate", str(SHAKESPEARE), "-"], input=b"\xff")
    assert_refused(refused, "standard input: not UTF-8 at byte 0")


# ------------------------------------------------------------------------------------------------------- prompts


LINES = [
    '{"prompt": "ROMEO:", "id": 7}',
    "nonsense",
    '{"prompt": "JULIET: caf\\u00e9"}',
    '{"prompt": ""}',
    '{"text": "no prompt"}',
    '["a list"]',
    json.dumps({"prompt": "love " * 400}),
    '{"prompt": "My lord,"}',
    '{"prompt": "What light through yonder window"}',
]
OPTIONS = ["--max-new-tokens", 12, "--seed", 3]


@pytest.fixture(scope="module", params=["growing", "inplace"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "m"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(cache=request.param))
    return folder


@pytest.fixture
def prompts():
    Path("in.jsonl").write_text("\n".join(LINES) + "\n")


def results(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(gpt2x, model, output, *options):
    return gpt2x("generate", model, "--prompts", "in.jsonl", "--output", output, *OPTIONS, *options)


def test_each_prompt_has_its_line_in_order_and_bad_lines_are_said(gpt2x, model, prompts):
    result = done(run(gpt2x, model, "out.jsonl", "--batch-size", 2))
    found = results("out.jsonl")
    assert [line["line"] for line in found] == [1, 3, 8, 9]
    assert found[0]["id"] == 7
    assert all(line["finish"] == "length" for line in found)
    for line, words in {2: "not JSON", 4: "empty", 5: "no text", 6: "not an object", 7: "256"}.items():
        assert any(said.startswith(f"in.jsonl:{line}: ") and words in said for said in result.stderr.splitlines())
    assert "Skipped 5 of 9 lines" in result.stderr


def test_a_text_does_not_depend_on_the_batch(gpt2x, model, prompts):
    for size in (1, 3, 16):
        done(run(gpt2x, model, f"{size}.jsonl", "--batch-size", size))
    assert results("1.jsonl") == results("3.jsonl") == results("16.jsonl")


def test_several_texts_of_a_prompt_have_an_index(gpt2x, model, prompts):
    done(run(gpt2x, model, "out.jsonl", "-n", 2))
    assert [(line["line"], line["index"]) for line in results("out.jsonl")] == [
        (line, index) for line in (1, 3, 8, 9) for index in (0, 1)
    ]


@pytest.mark.parametrize("options", [[], ["-n", 2]], ids=["one", "two"])
def test_an_interrupted_output_is_continued(gpt2x, model, prompts, options):
    done(run(gpt2x, model, "out.jsonl", *options))
    whole = Path("out.jsonl").read_bytes()
    for end in (0, 40, len(whole) // 2, len(whole) - 1, len(whole)):
        Path("part.jsonl").write_bytes(whole[:end])
        done(run(gpt2x, model, "part.jsonl", *options, "--resume"))
        assert Path("part.jsonl").read_bytes() == whole


def test_an_output_is_never_overwritten(gpt2x, model, prompts):
    Path("out.jsonl").write_text("mine\n")
    assert_refused(run(gpt2x, model, "out.jsonl"), "out.jsonl exists", "--resume")
    assert_refused(run(gpt2x, model, "out.jsonl", "--resume"), "does not hold results")
    done(run(gpt2x, model, "first.jsonl"))
    Path("in.jsonl").write_text('{"prompt": "another"}\n' * 9)
    before = Path("first.jsonl").read_bytes()
    assert_refused(run(gpt2x, model, "first.jsonl", "--resume"), "continues another prompt")
    assert Path("first.jsonl").read_bytes() == before


def test_beams_work_on_a_file_of_prompts(gpt2x, model, prompts, library):
    done(
        gpt2x(
            "generate", model, "--prompts", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", 9, "--num-beams", 3
        )
    )
    expected = text_of(library, "ROMEO:", 9, num_beams=3)
    first = results("out.jsonl")[0]
    assert first["prompt"] + first["text"] == expected
    assert first["score"] < 0


def test_a_limit_with_the_prompt_is_that_of_each_prompt(gpt2x, model, prompts):
    """A short prompt has room for more new tokens than a long one, in any batch."""
    settings = json.loads((model / "generation_config.json").read_text())
    config = model / "generation_config.json"
    before = config.read_text()
    config.write_text(json.dumps(settings | {"max_length": 12}))
    try:
        for size in (1, 16):
            path = f"{size}.jsonl"
            arguments = ["--prompts", "in.jsonl", "--output", path, "--batch-size", size, "--seed", 3]
            done(gpt2x("generate", model, *arguments))
    finally:
        config.write_text(before)
    assert results("1.jsonl") == results("16.jsonl")
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    for line in results("1.jsonl"):
        assert len(tokenizer.encode(line["prompt"])) < 12
        assert len(tokenizer.encode(line["prompt"] + line["text"])) <= 12


def test_speculative_decoding_prints_the_same_text(gpt2x, tmp_path):
    text = "First Citizen:\nSpeak, speak.\n\nAll:\nSpeak,"
    options = ["--max-new-tokens", 40, "--temperature", 0]
    expected = done(gpt2x("generate", SHAKESPEARE, text, *options)).stdout
    for guesses in (["--prompt-lookup"], ["--prompt-lookup", 3], ["--draft", SHAKESPEARE]):
        assert done(gpt2x("generate", SHAKESPEARE, text, *options, *guesses)).stdout == expected


def test_a_draft_model_has_one_thread_in_onnx_runtime(tmp_path):
    export_onnx(random_checkpoint(), tmp_path / "draft", need_tokenizer=False)
    assert open_draft(str(tmp_path / "draft"), 3).threads == 1


def test_speculative_decoding_says_in_one_line_where_it_cannot_be(gpt2x, tmp_path):
    def run(*options):
        return gpt2x("generate", SHAKESPEARE, "ROMEO:", "--max-new-tokens", 3, *options)

    assert "pass either --prompt-lookup or --draft" in run("--prompt-lookup", "--draft", SHAKESPEARE).stderr
    assert "leave out --prompt-lookup, or --num-beams" in run("--num-beams", 2, "--prompt-lookup").stderr
    note = "Note: --prompt-lookup works for one text at a time; several are decoded without it\n"
    assert done(run("-n", 2, "--prompt-lookup")).stderr == note
    save_checkpoint(random_checkpoint(), tmp_path / "other.safetensors")
    assert_refused(
        run("--draft", tmp_path / "other.safetensors"), "the draft model's vocabulary is 13, the model's 2048"
    )


# ------------------------------------------------------------------------------------------------- odd files of prompts


def continue_lines(gpt2x, model, data, *options):
    Path("in.jsonl").write_bytes(data)
    return gpt2x("generate", model, "--prompts", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", 2, *options)


def test_a_byte_order_mark_and_blank_lines_are_no_bad_lines(gpt2x, model):
    result = done(continue_lines(gpt2x, model, b'\xef\xbb\xbf{"prompt": "A"}\r\n\r\n \t\r\n{"prompt": "B"}\r\n\n'))
    assert [(line["line"], line["prompt"]) for line in results("out.jsonl")] == [(1, "A"), (4, "B")]
    assert result.stderr == ""
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole.splitlines(keepends=True)[0])
    done(continue_lines(gpt2x, model, Path("in.jsonl").read_bytes(), "--resume"))
    assert [line["line"] for line in results("out.jsonl")] == [1, 4]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_json_does_not_have_is_a_bad_line(gpt2x, model, number):
    data = f'{{"prompt": "A", "weight": [{number}]}}\n{{"prompt": "B"}}\n'
    result = done(continue_lines(gpt2x, model, data.encode()))
    assert "in.jsonl:1: not JSON (a number is NaN, infinite, or too large); skipped" in result.stderr
    assert [line["prompt"] for line in results("out.jsonl")] == ["B"]


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 3)])
def test_an_output_with_another_number_of_texts_is_not_continued(gpt2x, model, prompts, first, second):
    done(run(gpt2x, model, "out.jsonl", "-n", first))
    before = Path("out.jsonl").read_bytes()
    assert_refused(
        run(gpt2x, model, "out.jsonl", "-n", second, "--resume"), f"has {first} results", f"and {second} are"
    )
    assert Path("out.jsonl").read_bytes() == before


def test_an_incomplete_output_of_other_prompts_loses_nothing(gpt2x, model, prompts):
    done(run(gpt2x, model, "out.jsonl", "-n", 2))
    before = b"".join(Path("out.jsonl").read_bytes().splitlines(keepends=True)[:-1])
    Path("out.jsonl").write_bytes(before)
    Path("in.jsonl").write_text("\n".join([*LINES[:-1], '{"prompt": "another"}']) + "\n")
    assert_refused(run(gpt2x, model, "out.jsonl", "-n", 2, "--resume"), "continues another prompt")
    assert Path("out.jsonl").read_bytes() == before


def test_a_line_number_that_is_infinite_is_not_of_this_command(gpt2x, model, prompts):
    Path("out.jsonl").write_text('{"prompt": "ROMEO:", "line": 1e999}\n')
    assert_refused(run(gpt2x, model, "out.jsonl", "--resume"), "does not hold results")
