"""LoRA adapters that are chosen for each run of one exported base: equal to the merged models, in every way they are run."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import safetensors.numpy
from paths import FIXTURES

from converters import CheckpointError, ConversionError, DestinationError, FormatError, open_checkpoint
from converters.containers.onnx_adapter import open_onnx_adapter, write_onnx_adapter
from converters.heads import Head
from converters.io.publishing import new_file
from converters.tensors import LazyTensor
from gpt2x import contract
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation.loop import Generation
from gpt2x.generation.sampling import Sampling
from gpt2x.precisions import PRECISIONS
from gpt2x.runtimes.base import InputError
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.opening import gpt2x_model, open_decoder
from gpt2x.verify.report import verify_adapter, verify_export

ADAPTERS = FIXTURES / "adapters"
NAMES = {"all": "all_linear", "ranks": "patterns", "upper": "one_layer"}  # name at run time -> fixture
EXPECTED = dict(np.load(ADAPTERS / "expected.npz"))
IDS = EXPECTED["ids"]
POSITIONS = np.tile(np.arange(IDS.shape[1]), (len(IDS), 1))
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def base():
    return open_checkpoint(ADAPTERS / "base")


@pytest.fixture(scope="module", params=["growing", "inplace"])
def folder(request, base, tmp_path_factory):
    """An export of the base in every precision, with three adapters."""
    path = tmp_path_factory.mktemp("export") / request.param
    export(base, path, cache=request.param, precisions=tuple(PRECISIONS))
    return path


@pytest.fixture(scope="module")
def growing(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "growing"
    export(base, path)
    return path


def export(base, path, names=tuple(NAMES), force=False, **options):
    adapters = {name: ADAPTERS / NAMES[name] for name in names}
    export_onnx(base, path, ExportOptions(adapters=adapters, **options), need_tokenizer=False, force=force)
    return path


def close(found, expected, bound=1e-4):
    return np.abs(found - expected).max() <= bound * np.abs(expected).max()


def merged(name):
    """The model with an adapter merged into its weights, in torch."""
    return gpt2x_model(open_checkpoint(ADAPTERS / "base", adapter=ADAPTERS / NAMES[name] if name else None))


# ---------------------------------------------------------------------------------------------------- the same logits


def test_each_adapter_gives_the_logits_that_peft_gives_and_none_gives_those_of_the_base(folder):
    decoder = OnnxDecoder(folder)
    plain, _ = merged(None).run(IDS, None, POSITIONS, None)
    for name in (None, "all", None, "ranks", "upper", "all", None):
        logits, _ = decoder.run(IDS, None, POSITIONS, None, adapter=name)
        assert close(logits, EXPECTED[NAMES[name]] if name else plain, 1e-5)
    assert not close(EXPECTED["all_linear"], plain, 0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_within_the_bounds_of_the_precision_in_every_scenario(folder, base, precision, name):
    report = verify_adapter(base, ADAPTERS / NAMES[name], folder, name, precision=precision)
    assert report.passed, report.to_json()


def test_verify_tells_one_adapter_from_another_in_every_precision(folder, base):
    for precision in PRECISIONS:
        report = verify_adapter(base, ADAPTERS / "patterns", folder, "all", precision=precision)
        failed = [check.name for check in report.checks if check.passed is False]
        assert "factors" in failed and "full context" in failed


def test_the_base_is_verified_without_an_adapter(folder, base):
    assert verify_export(base, folder).passed


@pytest.mark.parametrize("name", [None, *NAMES])
def test_greedy_tokens_are_those_of_the_merged_model(folder, name):
    prompts = [[1, 2, 3], [5], [9, 8, 7, 6, 5]]
    expected = list(Generation(merged(name), prompts, 8, GREEDY))
    assert list(Generation(OnnxDecoder(folder, adapter=name), prompts, 8, GREEDY)) == expected
    assert list(Generation(OnnxDecoder(folder).with_adapter(name), prompts, 8, GREEDY)) == expected


def test_only_the_last_logits_and_a_single_file_take_adapters_too(base, tmp_path):
    export(base, tmp_path / "x", last=True, single_file=True, cache="inplace")
    logits, _ = OnnxDecoder(tmp_path / "x", adapter="ranks").run(IDS, None, POSITIONS, None)
    assert close(logits[:, -1], EXPECTED["patterns"][:, -1], 1e-5)


@pytest.mark.parametrize("opset", [20, 23])
def test_every_opset_takes_adapters(base, tmp_path, opset):
    export(base, tmp_path / "x", opset=opset)
    logits, _ = OnnxDecoder(tmp_path / "x", adapter="ranks").run(IDS, None, POSITIONS, None)
    assert close(logits, EXPECTED["patterns"], 1e-5)


def test_one_model_in_memory_takes_all_adapters(folder):
    decoder = OnnxDecoder(folder)
    other = decoder.with_adapter("all")
    assert decoder.adapters == ("all", "ranks", "upper") and (decoder.adapter, other.adapter) == (None, "all")
    assert other._model is decoder._model
    assert other.runtime == decoder.runtime + " with the adapter all"
    assert other.with_adapter(None).run(IDS, None, POSITIONS, None)[0].tobytes() == (
        decoder.run(IDS, None, POSITIONS, None)[0].tobytes()
    )


def test_the_graph_with_inputs_is_loaded_when_the_first_adapter_is_chosen(folder):
    decoder = OnnxDecoder(folder)
    before, _ = decoder.step(IDS, None, POSITIONS, None)
    assert decoder._model.graph == folder / contract.model_file()
    assert not decoder._model.session.get_overridable_initializers()
    with pytest.raises(FormatError, match="no adapter 'none'"):
        decoder.with_adapter("none")
    assert decoder._model.graph == folder / contract.model_file()
    other = decoder.with_adapter("all")
    assert decoder._model.graph == with_inputs(folder)
    session = decoder._model.session
    other.with_adapter("ranks").step(IDS, None, POSITIONS, None)
    assert decoder._model.session is session
    assert close(decoder.step(IDS, None, POSITIONS, None)[0], before, 1e-5)


def test_a_decoder_of_an_adapter_loads_only_the_graph_with_inputs(folder):
    assert OnnxDecoder(folder, adapter="all")._model.graph == with_inputs(folder)


def test_a_cache_of_the_base_is_continued_after_an_adapter_is_chosen(folder):
    expected, _ = OnnxDecoder(folder).step(IDS, None, POSITIONS, None)
    decoder = OnnxDecoder(folder)
    _, cache = decoder.step(IDS[:, :4], None, POSITIONS[:, :4], None)
    for i in range(4, IDS.shape[1]):
        logits, cache = decoder.step(IDS[:, i : i + 1], None, POSITIONS[:, i : i + 1], cache)
        decoder.step(IDS, None, POSITIONS, None, adapter="all")
    assert close(logits, expected, 1e-5)


def test_two_models_that_share_a_cache_both_take_an_adapter(base, tmp_path):
    path = export(base, tmp_path / "x", cache="inplace", precisions=("w8a8", "fp32"))
    logits, _ = OnnxDecoder(path, prefill="w8a8", decode="fp32").step(IDS[:1], None, POSITIONS[:1], None, adapter="all")
    expected, _ = OnnxDecoder(path, precision="w8a8", adapter="all").step(IDS[:1], None, POSITIONS[:1], None)
    assert logits.tobytes() == expected.tobytes()


def test_an_export_whose_model_takes_adapters_itself_is_read(folder, tmp_path):
    """As in a single file: the second graph is missing, and not needed."""
    folder = shutil.copytree(folder, tmp_path / "copy")
    (folder / contract.model_file()).write_bytes(with_inputs(folder).read_bytes())
    with_inputs(folder).unlink()
    decoder = OnnxDecoder(folder)
    logits, _ = decoder.run(IDS, None, POSITIONS, None, adapter="ranks")
    assert close(logits, EXPECTED["patterns"], 1e-5)
    assert decoder._model.graph == folder / contract.model_file()


@pytest.mark.parametrize("base_first", [True, False])
def test_closing_a_decoder_closes_those_that_share_its_memory_in_any_order(folder, base_first):
    decoder = OnnxDecoder(folder)
    first, second = decoder, decoder.with_adapter("all")
    if not base_first:
        first, second = second, first
    first.close()
    with pytest.raises(InputError, match="this decoder is closed"):
        second.run(IDS, None, POSITIONS, None)
    second.close()
    first.close()


@pytest.mark.parametrize("name", [None, *NAMES])
def test_context_is_filled_by_one_session_for_all_adapters_which_closes_with_the_model(folder, name):
    decoder = OnnxDecoder(folder)
    other = decoder.with_adapter(name)
    expected = EXPECTED[NAMES[name]] if name else merged(None).run(IDS, None, POSITIONS, None)[0]
    decoder.extend(IDS[:, :2], None, POSITIONS[:, :2], None)
    cache = other.extend(IDS[:, :-1], None, POSITIONS[:, :-1], None)
    logits, _ = other.step(IDS[:, -1:], None, POSITIONS[:, -1:], cache)
    assert close(logits, expected[:, -1], 1e-5)
    context = decoder._context.model
    assert context and context is other._context.model
    assert context.inputs == decoder._model.inputs and context.factor_inputs == decoder._model.factor_inputs
    other.close()
    assert context.session is None


def test_context_is_not_continued_with_another_adapter(folder):
    decoder = OnnxDecoder(folder)
    cache = decoder.with_adapter("all").extend(IDS[:, :5], None, POSITIONS[:, :5], None)
    for new in (1, 5):
        with pytest.raises(InputError, match="computed with the adapter all, and this step has no adapter"):
            decoder.extend(IDS[:, 5 : 5 + new], None, POSITIONS[:, 5 : 5 + new], cache)


# ------------------------------------------------------------------------------------------------------------ caches


def test_steps_with_different_adapters_alternate_each_with_its_own_cache(folder):
    decoder = OnnxDecoder(folder)
    caches = dict.fromkeys((None, *NAMES))
    found = {name: [] for name in caches}
    for i in range(IDS.shape[1]):
        for name in caches:
            logits, caches[name] = decoder.step(IDS[:, i : i + 1], None, POSITIONS[:, i : i + 1], caches[name], name)
            found[name].append(logits)
    for name, fixture in NAMES.items():
        assert close(np.stack(found[name], 1), EXPECTED[fixture], 1e-5)


def test_a_cache_is_not_continued_with_another_adapter(folder):
    decoder = OnnxDecoder(folder)
    _, cache = decoder.step(IDS, None, POSITIONS, None, adapter="all")
    for other, said in (("ranks", "the adapter ranks"), (None, "no adapter")):
        with pytest.raises(InputError, match=f"computed with the adapter all, and this step has {said}"):
            decoder.step(IDS[:, :1], None, POSITIONS[:, :1] + IDS.shape[1], cache, adapter=other)
    logits, _ = decoder.step(IDS[:, :1], None, POSITIONS[:, :1] + IDS.shape[1], cache, adapter="all")
    assert np.isfinite(logits).all()


def test_reordered_rows_stay_those_of_their_adapter(folder):
    decoder = OnnxDecoder(folder)
    _, cache = decoder.step(IDS, None, POSITIONS, None, adapter="all")
    cache = decoder.reorder(cache, np.array([1, 0, 1]))
    assert cache.adapter == "all"


def test_a_cache_in_place_takes_the_adapter_of_its_first_step(base, tmp_path):
    export(base, tmp_path / "x", cache="inplace")
    decoder = OnnxDecoder(tmp_path / "x")
    logits, _ = decoder.step(IDS, None, POSITIONS, decoder.row_cache(2), adapter="all")
    assert close(logits, EXPECTED["all_linear"][:, -1], 1e-5)


def test_a_running_batch_has_the_adapter_of_its_decoder(base, tmp_path):
    decoder = OnnxDecoder(export(base, tmp_path / "x", cache="inplace"))
    batches = {name: RunningBatch(decoder.with_adapter(name)) for name in (None, *NAMES)}
    for name, batch in batches.items():
        expected = EXPECTED[NAMES[name]] if name else merged(None).run(IDS, None, POSITIONS, None)[0]
        first, logits = batch.join(IDS[0, :5].tolist())
        assert close(logits, expected[0, 4], 1e-5)
        second, logits = batch.join(IDS[1, :9].tolist())
        assert close(logits, expected[1, 8], 1e-5)
        after = batch.step({first: int(IDS[0, 5]), second: int(IDS[1, 9])})
        assert close(after[first], expected[0, 5], 1e-5) and close(after[second], expected[1, 9], 1e-5)


# ------------------------------------------------------------------------------------------------------- the export


def graph_of(file):
    return onnx.load(file, load_external_data=False).graph


def with_inputs(folder, precision="fp32"):
    """The graph that takes adapters."""
    return folder / contract.lora_file(contract.model_file(precision))


def test_only_projections_that_an_adapter_changes_have_inputs(base, tmp_path):
    export(base, tmp_path / "x", names=("upper",))
    assert [i.name for i in graph_of(with_inputs(tmp_path / "x")).input][-2:] == list(
        contract.factor_names("h.1.attn.c_attn")
    )
    assert OnnxDecoder(tmp_path / "x").metadata[contract.LORA] == '["h.1.attn.c_attn"]'


def test_the_inputs_that_a_model_requires_are_the_same_with_adapters(base, growing, tmp_path):
    export(base, tmp_path / "x", names=())
    assert OnnxDecoder(growing).inputs == OnnxDecoder(tmp_path / "x").inputs


def test_three_nodes_are_added_for_each_projection(base, growing, tmp_path):
    export(base, tmp_path / "x", names=())
    plain = graph_of(tmp_path / "x" / contract.model_file())
    assert len(graph_of(with_inputs(growing)).node) == len(plain.node) + 3 * 8


def test_the_model_itself_has_the_graph_that_it_has_without_adapters(base, folder, tmp_path):
    export(base, tmp_path / "x", names=(), cache=folder.name, precisions=tuple(PRECISIONS))
    for precision in PRECISIONS:
        file = contract.model_file(precision)
        assert graph_of(folder / file) == graph_of(tmp_path / "x" / file)


def test_only_the_graph_with_inputs_needs_the_onnx_runtime_that_has_adapters(growing):
    assert OnnxDecoder(with_inputs(growing)).metadata[contract.RUNTIME] == "1.20.0"
    assert OnnxDecoder(growing).metadata[contract.RUNTIME] == "1.17.0"


@pytest.mark.parametrize(("single_file", "first"), [(False, "model_lora.onnx"), (True, "model.onnx")])
def test_the_model_card_names_the_graph_that_takes_adapters(base, tmp_path, single_file, first):
    path = export(base, tmp_path / "x", single_file=single_file)
    said = f'ort.InferenceSession("onnx/{first}", settings)'
    assert said in (path / "README.md").read_text()
    export(base, path, precisions=("int8",), single_file=not single_file)  # the card names the first precision
    assert said in (path / "README.md").read_text()
    assert OnnxDecoder(path / "onnx" / first)._model.has_inputs
    OnnxDecoder(path, precision="int8", adapter="all").step(IDS, None, POSITIONS, None)


def test_a_single_file_holds_the_inputs_for_adapters_itself(base, tmp_path):
    path = export(base, tmp_path / "x", single_file=True)
    assert [file.name for file in (path / "onnx").glob("*.onnx")] == ["model.onnx"]
    assert OnnxDecoder(path)._model.has_inputs


def test_more_precisions_are_added_with_the_same_adapters_only(base, tmp_path):
    path = export(base, tmp_path / "x")
    before = (path / "onnx/all.onnx_adapter").stat().st_ino
    for names in ((), ("upper",)):
        with pytest.raises(DestinationError, match="its adapters are others"):
            export(base, path, names=names, precisions=("int8",))
    export(base, path, precisions=("int8",))
    assert (path / "onnx/all.onnx_adapter").stat().st_ino == before
    assert OnnxDecoder(path, precision="int8").adapters == ("all", "ranks", "upper")
    assert "| upper | `onnx/upper.onnx_adapter` | attn.c_attn in 1 layer, rank 4 |" in (path / "README.md").read_text()


def test_another_adapter_of_the_same_name_is_not_replaced_without_force(base, tmp_path):
    path = export(base, tmp_path / "x", names=("all",))
    changed = ExportOptions(precisions=("int8",), adapters={"all": ADAPTERS / "patterns"})
    with pytest.raises(DestinationError, match="all.onnx_adapter: already exists; pass --force"):
        export_onnx(base, path, changed, need_tokenizer=False)


def test_adapters_of_an_earlier_export_are_not_left_beside_a_new_one(base, tmp_path):
    path = export(base, tmp_path / "x")
    with pytest.raises(DestinationError, match="ranks.onnx_adapter, which would be read together with the new files"):
        export(base, path, names=("all",), force=True)


def test_an_export_with_adapters_is_reproducible(base, growing, tmp_path):
    export(base, tmp_path / "x")
    files = [file.relative_to(growing) for file in growing.rglob("*") if file.is_file()]
    assert all((growing / name).read_bytes() == (tmp_path / "x" / name).read_bytes() for name in files)


def test_the_weights_in_a_model_with_adapters_are_read_as_those_of_any_export(growing, base):
    checkpoint = open_checkpoint(growing)
    assert checkpoint.tensors.keys() == base.tensors.keys() and not checkpoint.left_out


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "-a", "a b", "a\n", "é", "a" * 101, "a\\b", "a:b"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        ExportOptions(adapters={name: "x"})


def test_names_that_differ_in_capital_letters_only_are_refused():
    with pytest.raises(ValueError, match="two adapters are called A"):
        ExportOptions(adapters={"a": "x", "A": "y"})


@pytest.mark.parametrize("fixture", ["dora", "saved_head", "embeddings", "lm_head", "tokens", "bias_all"])
def test_an_adapter_that_can_only_be_merged_is_refused_before_anything_is_written(base, tmp_path, fixture):
    with pytest.raises(CheckpointError, match="cannot be done at run time"):
        export_onnx(base, tmp_path / "x", ExportOptions(adapters={"a": ADAPTERS / fixture}), need_tokenizer=False)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_replaces_the_head_of_an_output_is_refused_at_run_time(base, tmp_path):
    adapter = shutil.copytree(ADAPTERS / "one_layer", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    head = {"base_model.model.v_head.weight": np.ones((1, 16), np.float32)}
    safetensors.numpy.save_file({**safetensors.numpy.load_file(file), **head}, file)
    source = replace(base, heads=(Head("value", {"v_head.weight": LazyTensor.of(np.ones((1, 16), np.float32))}),))
    options = ExportOptions(adapters={"a": adapter}, outputs=("logits", "values"))
    with pytest.raises(ConversionError, match="it replaces the head of values, which cannot be done at run time"):
        export_onnx(source, tmp_path / "x", options, need_tokenizer=False)
    assert not (tmp_path / "x").exists()
    export_onnx(source, tmp_path / "x", replace(options, outputs=("logits",)), need_tokenizer=False)


# -------------------------------------------------------------------------------------------------------- bad input


def test_an_unknown_name_lists_the_names_that_there_are(growing, base, tmp_path):
    decoder = OnnxDecoder(growing)
    for use in (
        lambda: decoder.step(IDS, None, POSITIONS, None, adapter="none"),
        lambda: decoder.with_adapter("none"),
        lambda: OnnxDecoder(growing, adapter="none"),
        lambda: open_decoder(growing, adapter="none"),
    ):
        with pytest.raises(FormatError, match="no adapter 'none' in this directory; it holds all, ranks, upper"):
            use()
    export(base, tmp_path / "x", names=())
    with pytest.raises(FormatError, match="it holds none: export the model with --adapter NAME=DIR"):
        OnnxDecoder(tmp_path / "x", adapter="all")


@pytest.fixture
def copy(growing, tmp_path):
    shutil.copytree(growing, tmp_path / "copy")
    return tmp_path / "copy"


A, B = contract.factor_names("h.0.attn.c_attn")


def without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({A: np.ones((17, 4), np.float32)}), "h.0.attn.c_attn.lora_A.weight is [17, 4]; [16, h."),
        (lambda t: t.update({B: np.ones((4, 47), np.float32)}), "lora_B.weight is [4, 47]; [h.0.attn.c_attn.rank, 48] is needed"),
        (lambda t: t.update({A: np.ones((16, 3), np.float32)}), "lora_A.weight is [16, 3], but h.0.attn.c_attn.lora_B.weight is [4, 48]"),
        (lambda t: t.update({A: np.ones(16, np.float32)}), "lora_A.weight is [16]"),
        (lambda t: t.update({A: np.ones((16, 4), np.float64)}), "lora_A.weight is F64; F32 is needed"),
        (lambda t: t.update({"wte.weight": np.ones((48, 16), np.float32)}), "unknown   'wte.weight': the model has no such input"),
        (lambda t: t.update({"input_ids": np.ones((2, 2), np.float32)}), "unknown   'input_ids'"),
        (without(A), f"missing   {A}"),
        (without(B), f"missing   {B}"),
        (lambda t: t.clear(), "it has no parameters"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_the_model_is_refused_with_what_differs(copy, change, said):
    file = copy / "onnx/all.onnx_adapter"
    tensors = {name: tensor.read() for name, tensor in open_onnx_adapter(file).tensors.items()}
    change(tensors)
    with new_file(file, force=True) as out:
        write_onnx_adapter(out, {name: LazyTensor.of(array) for name, array in tensors.items()})
    decoder = OnnxDecoder(copy)  # the others can still be used
    decoder.step(IDS, None, POSITIONS, None, adapter="ranks")
    with pytest.raises(CheckpointError) as raised:
        decoder.step(IDS, None, POSITIONS, None, adapter="all")
    assert said in str(raised.value)


@pytest.mark.parametrize("end", [0, 3, 20, 100, 1000, -1])
def test_a_truncated_adapter_is_refused_in_one_line(copy, end):
    file = copy / "onnx/all.onnx_adapter"
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(FormatError) as raised:
        OnnxDecoder(copy, adapter="all")
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_a_missing_graph_with_inputs_is_named_and_the_base_still_runs(copy):
    with_inputs(copy).unlink()
    decoder = OnnxDecoder(copy)
    for use in (lambda: decoder.with_adapter("all"), lambda: OnnxDecoder(copy, adapter="all")):
        with pytest.raises(FormatError, match="model_lora.onnx: no such file"):
            use()
    decoder.step(IDS, None, POSITIONS, None)


def test_a_graph_with_inputs_of_another_model_is_refused_and_the_base_still_runs(copy, base, tmp_path):
    export(base, tmp_path / "x", names=("upper",))
    shutil.copy(with_inputs(tmp_path / "x"), with_inputs(copy))
    decoder = OnnxDecoder(copy)
    before, _ = decoder.step(IDS, None, POSITIONS, None)
    with pytest.raises(CheckpointError, match="model_lora.onnx: not of the same export as model.onnx"):
        decoder.with_adapter("all")
    assert decoder.step(IDS, None, POSITIONS, None)[0].tobytes() == before.tobytes()


@pytest.mark.parametrize("text", ["", "1", "{}", '"h.0.attn.c_attn"', "[", "[" * 9999])
def test_metadata_that_name_no_list_of_projections_are_refused(copy, text):
    model = onnx.load(copy / "onnx/model.onnx", load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == contract.LORA).value = text
    onnx.save(model, copy / "onnx/model.onnx")
    with pytest.raises(ConversionError, match="gpt2x.lora"):
        OnnxDecoder(copy)


def test_a_model_whose_optional_input_has_another_width_is_refused(copy):
    model = onnx.load(with_inputs(copy), load_external_data=False)
    for value in (*model.graph.input, *model.graph.initializer):
        if value.name == A and isinstance(value, onnx.ValueInfoProto):
            value.type.tensor_type.shape.dim[1].dim_value = 0
    onnx.save(model, with_inputs(copy))
    for use in (lambda: OnnxDecoder(copy, adapter="all"), lambda: OnnxDecoder(copy).with_adapter("all")):
        with pytest.raises(CheckpointError, match=r"lora_A.weight is float32 \[16, 0\]"):
            use()
