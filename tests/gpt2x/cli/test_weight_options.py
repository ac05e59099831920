"""The options that say how weights are opened are the same in every command."""

import click
import pytest
import safetensors.numpy
from checkpoints import TINY, arrays_of, random_checkpoint
from commands import assert_refused, done
from paths import FIXTURES

from gpt2x.cli import main
from gpt2x.weight_options import OF_WEIGHTS, WeightOptions

COMMANDS = ("convert", "export", "generate", "verify", "inspect")
CRITIC = ("--prefix", "critic", "--n-head", 2)
TOKENIZER = ("--tokenizer", FIXTURES / "keras_hub")


@pytest.fixture
def pair(tmp_path):
    """Two GPT-2s in one file, without a configuration."""
    models = {"actor": arrays_of(random_checkpoint(TINY, 1)), "critic": arrays_of(random_checkpoint(TINY, 2))}
    path = tmp_path / "pair.safetensors"
    tensors = {f"{part}.{name}": array for part, arrays in models.items() for name, array in arrays.items()}
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_opens_weights_has_every_option_on_them(name):
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert WeightOptions.__annotations__.keys() <= {parameter.name for parameter in command.params}


@pytest.mark.slow
def test_one_of_two_models_is_converted_verified_exported_and_generates(gpt2x, pair, tmp_path):
    assert_refused(gpt2x("inspect", pair, "--n-head", 2), "'actor.' and 'critic.'", "--prefix actor")
    assert "prefix critic." in done(gpt2x("inspect", pair, *CRITIC)).stdout
    done(gpt2x("convert", pair, tmp_path / "critic.safetensors", *CRITIC))
    done(gpt2x("verify", pair, tmp_path / "critic.safetensors", *CRITIC))
    assert gpt2x("verify", pair, tmp_path / "critic.safetensors", "--prefix", "actor", "--n-head", 2).exit_code == 1
    done(gpt2x("export", pair, "--pt2", tmp_path / "critic.pt2", "--no-verify", *CRITIC))
    prompt = ("a", "--temperature", 0, "--max-new-tokens", 4, *TOKENIZER)
    alone = done(gpt2x("generate", tmp_path / "critic.safetensors", *prompt))
    assert done(gpt2x("generate", pair, *prompt, *CRITIC)).stdout == alone.stdout


@pytest.fixture
def untied(tmp_path):
    """A GPT-2 with an output layer of its own, of which no configuration says so."""
    arrays = arrays_of(random_checkpoint(TINY, 1))
    path = tmp_path / "untied.safetensors"
    safetensors.numpy.save_file({**arrays, "lm_head.weight": arrays["wte.weight"] + 1}, path)
    return path


@pytest.mark.parametrize("option", ["--tie", "--untie"])
def test_verify_keeps_the_output_layer_of_the_second_model_where_the_first_ones_is_dropped(
    gpt2x, untied, tmp_path, option
):
    done(gpt2x("convert", untied, tmp_path / "b.safetensors", "--untie", "--n-head", 2))
    result = gpt2x("verify", untied, tmp_path / "b.safetensors", "--n-head", 2, option)
    assert result.exit_code == (1 if option == "--tie" else 0), result.output


def test_two_files_without_a_configuration_are_compared_with_their_own_output_layers(gpt2x, untied, tmp_path):
    (tmp_path / "copy.safetensors").write_bytes(untied.read_bytes())
    done(gpt2x("verify", untied, tmp_path / "copy.safetensors", "--n-head", 2, "--untie"))


VALUES = {"prefix": ("--prefix", "x"), "entry": ("--entry", "x"), "tie": ("--untie",), "adapter": ("--adapter", ".")}


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_an_option_on_weights_is_refused_for_an_onnx_model(gpt2x, name):
    model = ("generate", FIXTURES / "keras_hub", "a", "--runtime", "onnx", *TOKENIZER)
    assert_refused(gpt2x(*model, *VALUES[name]), OF_WEIGHTS[name], "would be run as ONNX")
