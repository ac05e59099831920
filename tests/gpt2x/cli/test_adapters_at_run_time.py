"""``export --adapter NAME=DIR``, and the commands that choose an adapter by its name."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from adapters import write_adapter
from commands import assert_refused, done
from paths import FIXTURES

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, OnnxDecoder

ADAPTERS = FIXTURES / "adapters"
BASE = ADAPTERS / "base"
EXPECTED = dict(np.load(ADAPTERS / "expected.npz"))
GREEDY = ["--max-new-tokens", 20, "--temperature", 0]
BARE = ["--no-tokenizer", "--no-verify"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of the model that ships with gpt2x, with two adapters, and their directories beside it."""
    from click.testing import CliRunner

    from gpt2x.cli import main

    folder = tmp_path_factory.mktemp("exported")
    base = open_checkpoint(SHAKESPEARE)
    for name, size in (("one", 0.2), ("two", 0.25)):
        write_adapter(folder / f"lora-{name}", base, size=size, rank=2 if name == "one" else 4)
    named = [f"--adapter={name}={folder}/lora-{name}" for name in ("one", "two")]
    done(CliRunner().invoke(main, ["export", str(SHAKESPEARE), "--onnx", f"{folder}/onnx", "--no-verify", *named]))
    return folder


# ----------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("cache", ["growing", "inplace"])
def test_export_compares_each_adapter_with_the_merged_model(gpt2x, cache):
    named = ["--adapter", f"a={ADAPTERS / 'all_linear'}", "--adapter", f"b={ADAPTERS / 'patterns'}"]
    result = done(gpt2x("export", BASE, "--onnx", "x", "--no-tokenizer", "--cache", cache, *named, "--json"))
    reports = json.loads(result.stdout)["verify"]
    assert [report["b"] for report in reports] == ["x (fp32)", "x (fp32, adapter a)", "x (fp32, adapter b)"]
    factors = [check for report in reports for check in report["checks"] if check["name"] == "factors"]
    assert [check["result"] for check in factors] == ["the same: 8 projections"] * 2


def test_a_directory_alone_is_merged_as_before_and_has_no_optional_inputs(gpt2x):
    done(gpt2x("export", BASE, "--onnx", "x", *BARE, "--adapter", ADAPTERS / "patterns"))
    decoder = OnnxDecoder("x")
    assert decoder.adapters == () and not list(Path("x/onnx").glob("*.onnx_adapter"))
    positions = np.tile(np.arange(12), (2, 1))
    logits, _ = decoder.run(EXPECTED["ids"], None, positions, None)
    assert np.abs(logits - EXPECTED["patterns"]).max() <= 1e-5 * np.abs(logits).max()


def test_an_existing_directory_with_an_equals_sign_in_its_name_is_merged(gpt2x):
    shutil.copytree(ADAPTERS / "c_attn", "lr=3")
    done(gpt2x("export", BASE, "--onnx", "x", *BARE, "--adapter", "lr=3"))
    assert OnnxDecoder("x").adapters == ()
    done(gpt2x("export", BASE, "--onnx", "y", *BARE, "--adapter", "name=lr=3"))
    assert OnnxDecoder("y").adapters == ("name",)


def test_one_adapter_can_be_merged_and_others_chosen_over_it(gpt2x):
    merged = ["--adapter", ADAPTERS / "c_attn"]
    done(gpt2x("export", BASE, "--onnx", "x", "--no-tokenizer", *merged, "--adapter", f"a={ADAPTERS / 'one_layer'}"))
    assert OnnxDecoder("x").adapters == ("a",)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter", "a=x", "--adapter", "a=y"], "two adapters are called a"),
        (["--adapter", "a=x", "--adapter", "A=y"], "two adapters are called A"),
        (["--adapter", "../a=x"], "'../a' cannot be the name of an adapter"),
        (["--adapter", "=x"], "'' cannot be the name of an adapter"),
        (["--adapter", "a="], "no directory after the name"),
        (["--adapter", "x", "--adapter", "y"], "only one adapter can be merged, not 2"),
    ],
)
def test_names_that_cannot_be_used_are_usage_errors(gpt2x, options, said):
    result = gpt2x("export", BASE, "--onnx", "x", *options)
    assert result.exit_code == 2 and said in result.stderr and not list(Path().iterdir())


@pytest.mark.parametrize("target", [["--torchscript", "x.pt"], ["--pt2", "x.pt2"]])
def test_an_adapter_with_a_name_needs_onnx(gpt2x, target):
    result = gpt2x("export", BASE, *target, "--adapter", f"a={ADAPTERS / 'c_attn'}")
    assert result.exit_code == 2 and "--adapter NAME=DIR applies to --onnx only" in result.stderr


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (ADAPTERS / "dora", "by DoRA, which cannot be done at run time. Merge the adapter"),
        (ADAPTERS / "saved_embedding", "it replaces wte.weight"),
        (ADAPTERS / "lm_head", "it changes lm_head.weight"),
        (ADAPTERS / "base", "no adapter_config.json"),
        ("missing", "missing: no such file or directory"),
        ("wide", "wide: does not fit"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_before_anything_is_written(gpt2x, adapter, said):
    write_adapter(Path("wide"), open_checkpoint(SHAKESPEARE))
    result = gpt2x("export", BASE, "--onnx", "x", "--no-tokenizer", "--adapter", f"a={adapter}")
    assert_refused(result, said)
    assert len(result.stderr.splitlines()) == 1 and [path.name for path in Path().iterdir()] == ["wide"]


# ---------------------------------------------------------------------------------------------------------- generate


def test_generate_takes_a_stored_adapter_by_its_name(gpt2x, exported):
    texts = {}
    for name in ("one", "two"):
        texts[name] = done(gpt2x("generate", exported / "onnx", "ROMEO:", "--adapter", name, *GREEDY)).stdout
        merged = done(gpt2x("generate", SHAKESPEARE, "ROMEO:", "--adapter", exported / f"lora-{name}", *GREEDY)).stdout
        assert texts[name] == merged
    base = done(gpt2x("generate", exported / "onnx", "ROMEO:", *GREEDY)).stdout
    assert len({base, *texts.values()}) == 3


def test_generate_of_weights_merges_a_directory_even_if_it_has_the_name_of_no_adapter(gpt2x, exported):
    shutil.copytree(exported / "lora-one", "two")
    merged = done(gpt2x("generate", SHAKESPEARE, "ROMEO:", "--adapter", "two", *GREEDY)).stdout
    stored = done(gpt2x("generate", exported / "onnx", "ROMEO:", "--adapter", "one", *GREEDY)).stdout
    assert merged == stored


def test_a_stored_name_comes_before_a_directory_of_that_name_unless_torch_is_asked_for(gpt2x, exported):
    shutil.copytree(exported / "lora-one", "two")
    command = ("generate", exported / "onnx", "ROMEO:", *GREEDY)
    one, two = (done(gpt2x(*command, "--adapter", name)).stdout for name in ("one", "two"))
    assert one != two
    assert done(gpt2x(*command, "--adapter", "./two")).stdout == one
    assert done(gpt2x(*command, "--adapter", "two", "--runtime", "torch")).stdout == one


@pytest.mark.parametrize("more", [[], ["--runtime", "onnx"], ["--precision", "fp32"]])
def test_an_unknown_adapter_is_refused_with_the_known_ones(gpt2x, exported, more):
    result = gpt2x("generate", exported / "onnx", "a", "--adapter", "three", *more)
    assert_refused(result, "no adapter 'three' in this directory; it holds one, two")
    assert len(result.stderr.splitlines()) == 1


def test_a_stored_adapter_runs_in_batches_of_prompts_and_is_scored(gpt2x, exported):
    Path("in.jsonl").write_text('{"prompt": "ROMEO:"}\n{"prompt": "My lord"}\n')
    prompts = ("--prompts", "in.jsonl", "--output")
    done(gpt2x("generate", exported / "onnx", *prompts, "stored.jsonl", "--adapter", "one", *GREEDY))
    merged = ("--adapter", exported / "lora-one")
    done(gpt2x("generate", SHAKESPEARE, *prompts, "merged.jsonl", *merged, *GREEDY))
    assert Path("stored.jsonl").read_text() == Path("merged.jsonl").read_text()
    Path("text.txt").write_text("O, my good lord, not so much as a word of it.\n")
    stored = json.loads(done(gpt2x("score", exported / "onnx", "text.txt", "--adapter", "one", "--json")).stdout)
    other = json.loads(done(gpt2x("score", SHAKESPEARE, "text.txt", *merged, "--json")).stdout)
    numbers = [np.array(re.findall(r"-?\d+\.\d{3,}", json.dumps(facts)), float) for facts in (stored, other)]
    assert numbers[0].size and np.allclose(numbers[0], numbers[1], rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------ verify and inspect


@pytest.mark.slow
def test_verify_compares_a_stored_adapter_with_the_merged_model(gpt2x, exported):
    command = ("verify", SHAKESPEARE, exported / "onnx", "--adapter")
    report = done(gpt2x(*command, f"one={exported}/lora-one")).stdout
    assert "lora-one against" in report and "(adapter one)" in report and "The same." in report
    wrong = gpt2x(*command, f"one={exported}/lora-two")
    assert wrong.exit_code == 1 and "DIFFERENT: factors" in wrong.stdout
    assert_refused(gpt2x(*command, f"three={exported}/lora-one"), "it holds one, two")
    assert_refused(gpt2x("verify", SHAKESPEARE, SHAKESPEARE, "--adapter", f"one={exported}/lora-one"), "no ONNX model")


@pytest.mark.parametrize("more", [["--rounded"], ["--runtime", "torch"]])
def test_verify_of_a_stored_adapter_excludes_options_on_weights_of_the_second_model(gpt2x, exported, more):
    result = gpt2x("verify", SHAKESPEARE, exported / "onnx", "--adapter", f"one={exported}/lora-one", *more)
    assert result.exit_code == 2 and "--adapter NAME=DIR compares with B" in result.stderr


def test_inspect_lists_stored_adapters_with_ranks_and_targets(gpt2x, exported):
    text = done(gpt2x("inspect", exported / "onnx")).stdout
    assert re.search(r"adapter +one: attn.c_attn in \d+ layers, rank 2\n", text)
    facts = json.loads(done(gpt2x("inspect", exported / "onnx", "--json")).stdout)["onnx"]["adapters"]
    assert [fact["name"] for fact in facts] == ["one", "two"]
    assert set(facts[1]["ranks"].values()) == {4} and "h.0.attn.c_attn" in facts[1]["ranks"]


def test_a_damaged_adapter_file_is_named_by_inspect_and_generate(gpt2x, exported):
    shutil.copytree(exported / "onnx", "damaged")
    Path("damaged/onnx/one.onnx_adapter").write_bytes(b"nothing")
    for command in (("inspect", "damaged"), ("generate", "damaged", "a", "--adapter", "one")):
        assert_refused(gpt2x(*command), "one.onnx_adapter: not an adapter of ONNX Runtime")
    done(gpt2x("generate", "damaged", "a", "--adapter", "two", *GREEDY))


# ---------------------------------------------------------------------------------------------------- the model card


@pytest.mark.parametrize("cache", ["growing", "inplace"])
def test_the_programs_of_the_model_card_run(gpt2x, cache, monkeypatch):
    done(gpt2x("export", BASE, "--onnx", "x", *BARE, "--cache", cache, "--adapter", f"a={ADAPTERS / 'patterns'}"))
    card = Path("x/README.md").read_text()
    assert (
        "| a | `onnx/a.onnx_adapter` | attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj in 2 layers, rank 2, 4, 6 |"
        in card
    )
    client, program = re.findall(r"```python\n(.*?)```", card, re.S)
    expected, _ = OnnxDecoder("x", adapter="a").step(np.array([[0]]), None, np.array([[0]]), None)
    monkeypatch.chdir("x")
    exec(client, {})
    printed = io.StringIO()
    names: dict = {}
    with contextlib.redirect_stdout(printed):
        exec(program, names)
    assert printed.getvalue() == f"{expected.argmax()}\n"
    assert np.allclose(names["logits"][0, -1], expected[0], rtol=0, atol=1e-4)


def test_the_model_cards_way_with_a_binding_gives_the_same_logits(gpt2x, monkeypatch):
    """ONNX Runtime ignores an active adapter there: if this fails because it no longer does, the card can say so."""
    import onnxruntime as ort

    done(gpt2x("export", BASE, "--onnx", "x", *BARE, "--adapter", f"a={ADAPTERS / 'patterns'}"))
    (_, program) = re.findall(r"```python\n(.*?)```", Path("x/README.md").read_text(), re.S)
    monkeypatch.chdir("x")
    names: dict = {}
    exec(program, names)
    session = names["session"]

    def run(bind=lambda binding: None):
        binding = session.io_binding()
        for name, array in {**names["feed"], **names["past"]}.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        bind(binding)
        session.run_with_iobinding(binding, names["options"])
        return binding.get_outputs()[0].numpy()

    factors = ort.AdapterFormat.read_adapter("onnx/a.onnx_adapter")

    def bind(binding):
        for name, value in factors.get_parameters().items():
            binding.bind_ortvalue_input(name, value)

    assert np.allclose(run(bind), names["logits"], rtol=0, atol=1e-5)
    assert not np.allclose(run(), names["logits"], rtol=0, atol=1e-2)
