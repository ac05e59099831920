"""What training leaves in files of ``torch.save``: objects beside the weights, wrappers, models that were saved whole.

Each expected result is computed by transformers from the weights that were saved. The kinds are those that people report
in public; the source is beside each.
"""

import argparse
import collections
import dataclasses
import datetime
import enum
import io
import json
import os
import pathlib
import pickle
import random
import types
import uuid
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from commands import assert_refused, done
from paths import FIXTURES
from transformers import GPT2Config, GPT2LMHeadModel

from converters import CheckpointError, ConfigError, FormatError, UnsafeError, open_checkpoint
from converters.containers.torch_pickle import load_pickle
from converters.containers.torch_values import Opaque
from gpt2x.load import model_of

both_ages = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
IDS = torch.arange(10)[None]
SIZES: dict[str, Any] = {"vocab_size": 13, "n_positions": 10, "n_embd": 6, "n_layer": 2, "n_head": 2}


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=12, eos_token_id=12)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3)
    return made


def save(value: Any, path: pathlib.Path, zipped: bool = True, **options: Any) -> pathlib.Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def assert_logits(path: pathlib.Path, model: GPT2LMHeadModel, **options: Any) -> Any:
    """The file has the model's logits, to rounding. Returns the checkpoint."""
    checkpoint = open_checkpoint(path, **options)
    with torch.no_grad():
        expected = model(IDS).logits
        found = model_of(checkpoint)(IDS)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    return checkpoint


# ------------------------------------------------------------------------------------------ objects beside the weights


class Schedule(enum.Enum):
    COSINE = "cosine"


@dataclasses.dataclass
class RunConfig:
    lr: float = 1e-3
    out: pathlib.Path = pathlib.Path("runs/1")


@dataclasses.dataclass
class SlotConfig:
    __slots__ = ("lr",)
    lr: float


class ListOfMine(list):
    pass


class Like:
    """An object whose pickle names a global of another system or version."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def optimizer_of(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return optimizer


OBJECTS = {
    "a Namespace (mlcommons/mlperf-automations#465)": lambda: argparse.Namespace(lr=1e-3, out=pathlib.Path("runs")),
    "a PosixPath (microsoft/ai4g-flood#15)": lambda: pathlib.PosixPath("runs/1"),
    "a WindowsPath (RCVLab-AiimLab/crowd_counting#3)": lambda: Like(pathlib.WindowsPath, "C:\\", "runs"),
    "a NumPy number (deepmodeling/deepmd-kit#4147)": lambda: np.mean([3.1, 3.2]),
    "a NumPy array": lambda: np.array([3.1, 3.2]),
    "an array of objects": lambda: np.array([None, {"a": 1}], dtype=object),
    "random states (accelerate's random_states_0.pkl)": lambda: [random.getstate(), np.random.get_state(), torch.get_rng_state()],
    "a NumPy generator": lambda: np.random.default_rng(0),
    "a dataclass": RunConfig,
    "a dataclass with slots": lambda: SlotConfig(1e-3),
    "an enumeration": lambda: Schedule.COSINE,
    "a date": lambda: datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
    "a time span": lambda: datetime.timedelta(hours=1),
    "a set": lambda: {1, 2},
    "a frozenset": lambda: frozenset(["a"]),
    "a Counter": lambda: collections.Counter("abca"),
    "a defaultdict": lambda: collections.defaultdict(list, {"loss": [1.0]}),
    "a deque": lambda: collections.deque([1.0], maxlen=5),
    "a SimpleNamespace": lambda: types.SimpleNamespace(lr=1e-3),
    "a UUID": lambda: uuid.UUID(int=7),
    "a class of lists": lambda: ListOfMine([1, 2]),
    "a class": lambda: RunConfig,
    "a type": lambda: type(None),
    "bytes": lambda: [b"abc", bytearray(b"abc")],
    "keys of other types": lambda: {(1, 2): 0, 1.5: 0, Schedule.COSINE: 0, 140_123_456_789_000: 0},
    "torch's own": lambda: [torch.float32, torch.device("cpu"), torch.Size([2]), torch.float16],
    "a bound method": lambda: RunConfig().__repr__ and ListOfMine([1]).append,
    "a sparse tensor": lambda: torch.zeros(3, 3).to_sparse(),
    "a complex tensor": lambda: torch.zeros(3, dtype=torch.complex64),
    "a view that is not contiguous": lambda: torch.zeros(1).expand(5),
    "a function of torch": lambda: torch.nn.functional.gelu,
}  # fmt: skip


@both_ages
@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_beside_the_weights_is_left_out(tmp_path, model, zipped, kind):
    saved = {"model_state_dict": model.state_dict(), "epoch": 3, "extra": OBJECTS[kind]()}
    path = save(saved, tmp_path / "checkpoint.pt", zipped)
    checkpoint = assert_logits(path, model, n_head=2)
    assert [name.partition(" ")[0] for name in checkpoint.left_out] == ["epoch", "extra", "lm_head.weight"]
    assert checkpoint.entry == "model_state_dict"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_are_left_out_in_every_protocol(tmp_path, model, protocol):
    extras = [OBJECTS[kind]() for kind in OBJECTS if "method" not in kind]
    path = save({"model": model.state_dict(), "extra": extras}, tmp_path / "m.pt", pickle_protocol=protocol)
    assert_logits(path, model, n_head=2)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_objects_is_described_in_every_protocol(protocol):
    kinds = ("a Namespace", "a dataclass", "a date", "a set", "a Counter", "a UUID", "an enumeration")
    values = [make() for kind, make in OBJECTS.items() if kind.startswith(kinds) and "slots" not in kind]
    found = load_pickle(io.BytesIO(pickle.dumps(values, protocol)), "x")
    assert len(found) == len(values)
    namespace = found[0]
    assert isinstance(namespace, Opaque)
    assert (namespace.name, namespace.fields()["lr"]) == ("argparse.Namespace", 1e-3)


def test_the_class_of_an_object_that_is_left_out_is_shown(tmp_path, model, gpt2x):
    save({"model": model.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    shown = done(gpt2x("inspect", tmp_path / "m.pt")).output
    assert "args (argparse.Namespace)" in shown
    assert "dialect hf, entry model\n" in shown
    assert json.loads(done(gpt2x("inspect", tmp_path / "m.pt", "--json")).output)["entry"] == "model"


@both_ages
def test_an_optimizer_that_was_saved_whole_is_left_out(tmp_path, model, zipped):
    optimizer = optimizer_of(model)
    path = save({"model": model.state_dict(), "optimizer": optimizer}, tmp_path / "m.pt", zipped)
    checkpoint = assert_logits(path, model, n_head=2)
    assert "optimizer (torch.optim.adamw.AdamW)" in checkpoint.left_out


def test_an_optimizers_state_under_the_names_of_parameters_is_not_a_second_model(tmp_path, model):
    names = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    path = save({"model": model.state_dict(), "optimizer": {"exp_avg": names}}, tmp_path / "m.pt")
    assert_logits(path, model, n_head=2)


def test_the_checkpoint_of_lightning_with_omegaconf_is_read():
    """A real file: weecology/DeepForest#1217. Lightning saves ``hyper_parameters`` that are a DictConfig."""
    checkpoint = open_checkpoint(FIXTURES / "torch_runs/lightning.ckpt", n_head=2)
    saved = torch.load(FIXTURES / "torch_runs/lightning_weights.pt", weights_only=True)
    assert checkpoint.entry == "state_dict"
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(tensor.read(), saved[f"model.transformer.{name}"].numpy())


def test_numbers_of_numpy_1_are_left_out():
    """A real file of NumPy 1.26, whose module is called ``numpy.core``: ``{"loss": np.mean(losses)}``."""
    path = FIXTURES / "torch_runs/numpy_1.pt"
    assert b"numpy.core.multiarray" in path.read_bytes()
    checkpoint = open_checkpoint(path, n_head=2)
    assert "loss (numpy.core.multiarray.scalar)" in checkpoint.left_out
    assert "losses (numpy.ndarray)" in checkpoint.left_out


def test_a_file_of_objects_alone_is_refused_by_the_name_of_their_class():
    """A real file of transformers' Trainer, which writes it beside the weights."""
    with pytest.raises(CheckpointError, match="the state of a training run, not weights"):
        open_checkpoint(FIXTURES / "torch_runs/training_args.bin")


@both_ages
def test_a_parameter_that_an_unknown_function_would_return_is_refused(tmp_path, model, zipped):
    state = dict(model.state_dict())
    state["transformer.wte.weight"] = Like(RunConfig, 1.0)
    path = save({"model": state}, tmp_path / "m.pt", zipped)
    with pytest.raises(FormatError, match=r"transformer.wte.weight is an object of .*RunConfig, not a tensor"):
        open_checkpoint(path, n_head=2)


@both_ages
@pytest.mark.parametrize(
    "harmful",
    [
        lambda: Like(os.system, "touch executed"),
        lambda: Like(eval, "1"),
        lambda: Like(torch.load, "x"),
        lambda: Like(np.load, "x"),
        lambda: Like(getattr, "", "upper"),
        lambda: Like(getattr, RunConfig, "__class__"),
        lambda: Like(type, "x", (), {}),
        lambda: types.SimpleNamespace(f=os.system),
        lambda: os.system,
    ],
)
def test_a_harmful_global_beside_the_weights_is_refused(tmp_path, model, monkeypatch, zipped, harmful):
    monkeypatch.chdir(tmp_path)
    path = save({"model": model.state_dict(), "extra": harmful()}, tmp_path / "m.pt", zipped)
    with pytest.raises(UnsafeError):
        open_checkpoint(path, n_head=2)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]


TRICKS = {
    "a method that is found and called": b"cbuiltins\ngetattr\nc__main__\nA\nX\x01\0\0\0f\x86R)R.",
    "a way back into the standard library": b"\x8c\x06torch.\x8c\x09os.system\x93.",
    "six.moves": b"csix.moves.builtins\neval\n.",
    "a dotted name": b"\x8c\x05torch\x8c\x17serialization.os.system\x93.",
    "another package that runs code": b"cpip\nmain\n.",
    "a module of another version of Python": b"c_pyrepl.pager\npipe_pager\n.",
    "the extension registry": b"\x83\x01\x00.",
    "an object of a call": b"c__main__\nf\n)R)\x81.",
    "a buffer out of band": b"\x97.",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_of_a_pickle_is_refused(trick):
    with pytest.raises(FormatError):
        load_pickle(io.BytesIO(b"\x80\x04" + TRICKS[trick]), "x")


# --------------------------------------------------------------------------------------------- the configuration beside


@dataclasses.dataclass
class GPTConfig:
    """karpathy/build-nanogpt's, whose ``train_gpt2.py`` saves the object itself."""

    block_size: int = 10
    vocab_size: int = 13
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 6


def linear(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """The state dict with matrices as ``nn.Linear`` has them."""
    result = {}
    for name, tensor in model.state_dict().items():
        is_projection = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        result[name] = tensor.t().contiguous() if is_projection else tensor
    return result


CONFIGS: dict[str, Callable[[], Any]] = {
    "an object": lambda: GPTConfig(),
    "a dict": lambda: vars(GPTConfig()),
    "a Namespace": lambda: argparse.Namespace(**vars(GPTConfig())),
    "NumPy's numbers": lambda: argparse.Namespace(
        **{**vars(GPTConfig()), "n_head": np.int64(3), "vocab_size": np.int32(13)}
    ),
}


@both_ages
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("key", ["config", "model_args", "args"])
def test_the_sizes_in_a_configuration_object_are_read(tmp_path, zipped, kind, key):
    if (kind, key) == ("NumPy's numbers", "model_args"):
        pytest.skip("the same as under another key")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, "n_head": 3}, bos_token_id=12, eos_token_id=12)).eval()
    saved = {"model": linear(model), key: CONFIGS[kind](), "step": 19072, "val_loss": 3.07}
    path = save(saved, tmp_path / "model_19072.pt", zipped)
    checkpoint = assert_logits(path, model, activation_function="gelu_new")
    assert (checkpoint.config.n_head, checkpoint.stated) == (3, True)
    assert checkpoint.left_out == ("step", "val_loss", "lm_head.weight")


@pytest.mark.parametrize(
    "beside",
    [
        {"cfg": GPTConfig(n_head=2)},
        {"gpt_config": vars(GPTConfig(n_head=2))},
        {"cfg": {"model": vars(GPTConfig(n_head=2)), "trainer": {"lr": 1e-3}}},
        {"hyper_parameters": {"config": GPT2Config(**SIZES), "lr": 1e-3}},
    ],
    ids=["an object as cfg", "gpt_config", "a configuration of Hydra", "hyperparameters of Lightning"],
)
def test_a_configuration_is_found_under_other_keys_and_one_level_below(tmp_path, model, beside):
    """Lightning's ``save_hyperparameters()`` keeps the arguments of a module by name; Hydra has a group for the model."""
    path = save({"state_dict": model.state_dict(), "step": 1, **beside}, tmp_path / "m.ckpt")
    checkpoint = assert_logits(path, model)
    assert (checkpoint.config.n_head, checkpoint.stated) == (2, True)


@both_ages
def test_transposed_views_are_read(tmp_path, model, zipped):
    """``.t()`` without ``.contiguous()``, as scripts that convert weights write it."""
    views = {}
    for name, tensor in model.state_dict().items():
        views[name] = tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    assert not views["transformer.wpe.weight"].is_contiguous()
    assert_logits(save(views, tmp_path / "m.bin", zipped), model, n_head=2)


def test_a_file_without_a_state_dict_says_how_to_save_one(tmp_path, model):
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for saved in (arrays, list(model.state_dict().items())):
        with pytest.raises(
            CheckpointError, match=r"save the state dict, torch.save\(model.state_dict\(\), 'model.pt'\)"
        ):
            open_checkpoint(save(saved, tmp_path / "m.pt"))


def test_what_else_a_configuration_object_states_is_noted(tmp_path, model):
    config = argparse.Namespace(**{**vars(GPTConfig()), "n_head": 2}, warmup=200, lr=1e-3, rotary=False)
    checkpoint = open_checkpoint(save({"model": linear(model), "args": config}, tmp_path / "m.pt"))
    assert "of args, only the sizes are read, and not warmup, lr" in checkpoint.notes


def test_a_configuration_object_that_changes_the_arithmetic_is_refused(tmp_path, model):
    config = argparse.Namespace(**{**vars(GPTConfig()), "n_head": 2}, rotary=True, lr=1e-3)
    with pytest.raises(ConfigError, match="rotary is 'True'\n.*--ignore-config-key rotary$"):
        open_checkpoint(save({"model": linear(model), "args": config}, tmp_path / "m.pt"))


def test_a_configuration_of_transformers_beside_the_weights_is_read(tmp_path, model):
    path = save({"model": model.state_dict(), "config": model.config}, tmp_path / "m.pt")
    checkpoint = assert_logits(path, model)
    assert (checkpoint.config.activation_function, checkpoint.config.n_head) == ("gelu_new", 2)


# --------------------------------------------------------------------------------------------- wrappers, by their place


WRAPPERS = {
    "module": lambda state: {"module": state},
    "net": lambda state: {"net": state, "best_acc": 0.5},
    "deep": lambda state: {"checkpoint": {"model": {"weights": state}, "epoch": 1}},
    "a list": lambda state: [3, state],
    "a tuple": lambda state: (state, {"lr": 0.1}),
    "an object": lambda state: argparse.Namespace(weights=state),
    "beside plain values": lambda state: {**state, "epoch": 3, "_extra_state": {"lr": np.float64(1.0)}},
    "the same twice": lambda state: {"model": state, "state_dict": state},
    "the same in another dict": lambda state: {"model": state, "copy": {f"module.{key}": t for key, t in state.items()}},
    "a head of it apart": lambda state: {"model": state, "head": {"lm_head.weight": state["lm_head.weight"]}},
    "scheduled": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "rng": torch.ones(9)},
    "a dict of a class": lambda state: {"model": collections.defaultdict(dict, state)},
}  # fmt: skip


@both_ages
@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_weights_are_found_wherever_they_are(tmp_path, model, zipped, kind):
    assert_logits(save(WRAPPERS[kind](model.state_dict()), tmp_path / "m.pt", zipped), model, n_head=2)


@both_ages
def test_of_two_models_one_has_to_be_chosen(tmp_path, model, gpt2x, zipped):
    """Sense-X/UniFormer#87: model, optimizer, model_ema, args, max_accuracy."""
    other = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    saved = {"model": other, "optimizer": optimizer_of(model).state_dict(), "model_ema": model.state_dict(), "args": argparse.Namespace()}  # fmt: skip
    path = save(saved, tmp_path / "m.pt", zipped)
    with pytest.raises(CheckpointError, match=r"'model' and 'model_ema' both hold tensors of a model.\nPass --entry"):
        open_checkpoint(path, n_head=2)
    assert assert_logits(path, model, n_head=2, entry="model_ema").entry == "model_ema"
    done(gpt2x("convert", path, tmp_path / "ema", "--entry", "model_ema", "--n-head", 2))
    assert_logits(tmp_path / "ema", model)
    assert "entry model_ema" in done(gpt2x("inspect", path, "--entry", "model_ema")).output
    refused = gpt2x("convert", path, tmp_path / "x", "--entry", "ema")
    assert_refused(refused, "no entry 'ema'")
    assert "'model_ema'" in refused.output


def test_an_entry_of_a_file_that_has_none_is_refused(tmp_path, model):
    path = save(model.state_dict(), tmp_path / "m.pt")
    assert_logits(path, model, n_head=2, entry=".")
    with pytest.raises(CheckpointError, match="no entry 'model': it has tensors at '.'"):
        open_checkpoint(path, n_head=2, entry="model")
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="no entry 'model': it is not a file of torch.save"):
        open_checkpoint(tmp_path / "hf", entry="model")


def test_a_saved_object_in_itself_is_read_at_once(tmp_path):
    loop: list[Any] = [torch.zeros(2)]
    loop.append(loop)
    with pytest.raises(CheckpointError, match="a list, not a dict of tensors"):
        open_checkpoint(save(loop, tmp_path / "m.pt"))


# --------------------------------------------------------------------------------------------- models saved whole


class Engine(torch.nn.Module):
    """A user's own module around the model, as in pytorch/pytorch#7812."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.act = torch.nn.functional.gelu
        self.register_buffer("step", torch.zeros(1), persistent=False)


def distributed(model, meeting):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    try:
        file = io.BytesIO()
        torch.save(torch.nn.parallel.DistributedDataParallel(model), file)
        return file.getvalue()
    finally:
        torch.distributed.destroy_process_group()


WHOLE: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "without the head": lambda model: model.transformer,
    "DataParallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "a module of one's own": Engine,
    "in a dict": lambda model: {"model": model, "epoch": 3},
    "in a dict with its state": lambda model: {"model": model, "state_dict": model.state_dict()},
    "in half precision": lambda model: model.double(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.compile
@both_ages
@pytest.mark.parametrize(
    "kind", [*(kind for kind in WHOLE if kind != "compiled"), pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_a_model_that_was_saved_whole_is_read_with_its_configuration(tmp_path, model, zipped, kind):
    whole = WHOLE[kind](model)
    checkpoint = open_checkpoint(save(whole, tmp_path / "model.pt", zipped))
    assert (checkpoint.config.n_head, checkpoint.config.activation_function, checkpoint.stated) == (2, "gelu_new", True)
    state = model.transformer.state_dict()
    for name, tensor in checkpoint.tensors.items():
        assert tensor.read().tobytes() == state[name].numpy().tobytes()


def test_a_distributed_model_that_was_saved_whole_is_read(tmp_path, model):
    (tmp_path / "model.pt").write_bytes(distributed(model, tmp_path / "meeting"))
    assert_logits(tmp_path / "model.pt", model)


def test_a_model_in_itself_is_refused(tmp_path):
    module = torch.nn.Linear(2, 2)
    module._modules["again"] = module
    with pytest.raises(FormatError, match="a module that holds itself"):
        open_checkpoint(save(module, tmp_path / "m.pt"))


def test_nothing_is_imported_for_the_classes_in_a_file(tmp_path, model):
    """The classes need not exist where the file is read."""
    path = save({"model": model.state_dict(), "config": GPTConfig(n_head=2)}, tmp_path / "m.pt")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(__name__.encode(), b"n" * len(__name__)))
    assert open_checkpoint(path).config.n_head == 2
