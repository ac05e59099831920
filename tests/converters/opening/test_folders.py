"""Folders that training programs and the Hub's cache leave, from which one checkpoint is read."""

import os
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from checkpoints import arrays_of, assert_same_bytes, random_checkpoint
from paths import FIXTURES

from converters import FormatError, open_checkpoint, save_checkpoint
from converters.dialects import HF

SNAPSHOTS = ("607a30d783dfa663caf39e06633721c8d4cfcd7e", "11c5a3d5811f50298f278a704980280950aedb10")


def saved(path, seed=0):
    save_checkpoint(random_checkpoint(seed=seed), path)
    return path


def assert_holds(path, seed):
    """What is opened are the weights of this seed."""
    checkpoint = open_checkpoint(path)
    assert_same_bytes(random_checkpoint(seed=seed), checkpoint)
    return checkpoint


# ------------------------------------------------------------------------------------------------------------- Trainer


def trainer(path, numbers=(500, 1000)):
    """Source: ``Trainer._save_checkpoint`` of transformers."""
    for seed, number in enumerate(numbers):
        folder = saved(path / f"checkpoint-{number}", seed)
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
        torch.save({}, folder / "scheduler.pt")
        torch.save({"python": 1}, folder / "rng_state.pth")
        torch.save({"output_dir": "out"}, folder / "training_args.bin")
        (folder / "trainer_state.json").write_text("{}")
    (path / "runs").mkdir()
    return path


def test_the_newest_checkpoint_of_a_trainer_is_read_by_number_not_by_name(tmp_path):
    checkpoint = assert_holds(trainer(tmp_path / "out"), seed=1)
    assert any("read checkpoint-1000, the newest of 2" in note for note in checkpoint.notes)


def test_inspect_shows_which_checkpoint_of_a_trainer_was_read(tmp_path, gpt2x):
    assert "read checkpoint-1000, the newest of 2" in gpt2x("inspect", trainer(tmp_path / "out")).output


def test_weights_at_the_top_of_a_trainers_output_win(tmp_path):
    path = trainer(tmp_path / "out")
    save_checkpoint(random_checkpoint(seed=7), path / "model.safetensors")
    assert not any("read checkpoint" in note for note in assert_holds(path, seed=7).notes)


def test_the_state_of_a_training_run_is_not_taken_for_weights(tmp_path):
    path = trainer(tmp_path / "out") / "checkpoint-500"
    (path / "model.safetensors").rename(path / "mine.safetensors")
    (path / "._mine.safetensors").write_bytes(b"\0\5\x16\7" + bytes(60))
    assert_holds(path, seed=0)


def test_a_folder_that_contains_itself_ends(tmp_path):
    (tmp_path / "checkpoint-1").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="no weights"):
        open_checkpoint(tmp_path)


# --------------------------------------------------------------------------------------------------- the Hub's cache


def hub(path, snapshots=SNAPSHOTS[:1]):
    """Source: huggingface_hub's guide "Understand caching": snapshots are links to blobs, refs name snapshots."""
    (path / "blobs").mkdir(parents=True)
    (path / "refs").mkdir()
    for seed, name in enumerate(snapshots):
        snapshot = saved(path / "snapshots" / name, seed)
        for i, file in enumerate(sorted(snapshot.iterdir())):
            blob = path / "blobs" / f"{seed}{i:063d}"
            file.rename(blob)
            file.symlink_to(os.path.relpath(blob, snapshot))
    (path / "refs" / "main").write_text(snapshots[0])
    return path


def test_the_snapshot_that_main_names_is_read_from_the_hubs_cache(tmp_path):
    path = hub(tmp_path / "models--gpt2", SNAPSHOTS)
    checkpoint = assert_holds(path, seed=0)
    assert any(f"read snapshots/{SNAPSHOTS[0]}, which refs/main names" in note for note in checkpoint.notes)
    assert checkpoint.config.n_head == 2
    (path / "refs" / "main").write_text(SNAPSHOTS[1] + "\n")
    assert_holds(path, seed=1)


def test_a_file_of_a_snapshot_which_is_a_link_is_read(tmp_path):
    path = hub(tmp_path / "models--gpt2") / "snapshots" / SNAPSHOTS[0]
    assert_holds(path, seed=0)
    assert_holds(path / "model.safetensors", seed=0)


def test_a_single_snapshot_is_read_without_refs(tmp_path):
    path = hub(tmp_path / "models--gpt2")
    shutil.rmtree(path / "refs")
    assert any("the only one" in note for note in assert_holds(path, seed=0).notes)


@pytest.mark.parametrize("main", [None, "", "..", "../../outside", "v1.0", "x" * 1000])
def test_several_snapshots_without_a_valid_main_are_named(tmp_path, main):
    path = hub(tmp_path / "models--gpt2", SNAPSHOTS)
    (path / "refs" / "main").unlink()
    if main is not None:
        (path / "refs" / "main").write_text(main)
    with pytest.raises(FormatError) as found:
        open_checkpoint(path)
    assert all(name in str(found.value) for name in SNAPSHOTS)


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


def deepspeed(path, step=100, seed=0):
    """A run of ZeRO 0, 1 or 2 inside a Trainer's checkpoint: the weights are whole in ``module``.

    Source: ``DeepSpeedEngine._save_checkpoint`` and ``save_checkpoint`` in DeepSpeed's ``runtime/engine.py``.
    """
    checkpoint = random_checkpoint(seed=seed)
    arrays = {name: tensor.read() for name, tensor in HF.write(checkpoint.tensors, checkpoint.config).items()}
    module = OrderedDict((f"transformer.{name}", torch.from_numpy(array)) for name, array in arrays.items())
    folder = path / f"global_step{step}"
    folder.mkdir(parents=True)
    state = {"module": module, "buffer_names": [], "optimizer": None, "lr_scheduler": None, "skipped_steps": 0,
             "global_steps": step, "dp_world_size": 1, "mp_world_size": 1, "ds_config": {"train_batch_size": 1},
             "ds_version": "0.16.0"}  # fmt: skip
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"optimizer_state_dict": {}}, folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    (path / "latest").write_text(folder.name)
    (path / "zero_to_fp32.py").write_text("# of DeepSpeed\n")
    if not (path / "config.json").exists():
        shutil.copy(saved(path.parent / "hf") / "config.json", path)
    return path


def test_the_model_of_a_deepspeed_run_is_read_with_the_configuration_above_it(tmp_path):
    path = deepspeed(deepspeed(tmp_path / "run", 99, seed=3), 100, seed=0)
    checkpoint = assert_holds(path, seed=0)
    assert checkpoint.config.n_head == 2
    assert any("read the model in global_step100" in note for note in checkpoint.notes)


def test_the_file_latest_decides_between_steps(tmp_path):
    path = deepspeed(deepspeed(tmp_path / "run", 100, seed=0), 99, seed=3)
    assert_holds(path, seed=3)
    (path / "latest").write_text("../run")
    assert_holds(path, seed=0)


def test_a_deepspeed_run_inside_a_trainers_checkpoint_is_found(tmp_path):
    deepspeed(tmp_path / "out" / "checkpoint-5", 5, seed=4)
    notes = assert_holds(tmp_path / "out", seed=4).notes
    assert "read checkpoint-5" in notes[-2]
    assert "global_step5" in notes[-1]


# ---------------------------------------------------------------------------------------------------------- SavedModel


def test_a_saved_model_with_gpt2s_names_is_read(tmp_path):
    """TensorFlow 1 exported variables by name: ``variables/variables`` is a checkpoint like OpenAI's."""
    save_checkpoint(random_checkpoint(), tmp_path / "tf", "tf")
    (tmp_path / "saved" / "variables").mkdir(parents=True)
    for file in (tmp_path / "tf").glob("model.ckpt.*"):
        file.rename(tmp_path / "saved" / "variables" / file.name.replace("model.ckpt", "variables"))
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
    shutil.copy(tmp_path / "tf" / "hparams.json", tmp_path / "saved")
    checkpoint = assert_holds(tmp_path / "saved", seed=0)
    assert any("read variables/variables" in note for note in checkpoint.notes)
    assert checkpoint.config.n_head == 2


# -------------------------------------------------------------------------------------------------------------- shards


def shards(path, suffix):
    """A checkpoint in shards, without its index."""
    if suffix == "safetensors":
        save_checkpoint(random_checkpoint(), path, max_shard_size="2KB")
        (path / "model.safetensors.index.json").unlink()
        return path
    arrays = {name: torch.from_numpy(array) for name, array in arrays_of(random_checkpoint()).items()}
    names = sorted(arrays)
    shutil.copytree(saved(path.parent / "hf"), path, ignore=shutil.ignore_patterns("*.safetensors"))
    for i in range(3):
        part = {name: arrays[name] for name in names[i::3]}
        torch.save(part, path / f"pytorch_model-{i + 1:05d}-of-00003.bin")
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_complete_set_of_shards_is_read_without_an_index(tmp_path, suffix):
    checkpoint = assert_holds(shards(tmp_path / "m", suffix), seed=0)
    assert any("has no index of its shards" in note for note in checkpoint.notes)
    assert len(checkpoint.files) > 1


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_missing_shards_of_an_incomplete_set_are_named(tmp_path, suffix):
    path = shards(tmp_path / "m", suffix)
    gone = sorted(path.glob(f"*.{suffix}"))[1]
    gone.unlink()
    with pytest.raises(FormatError, match=f"1 of .* shards missing .{gone.name}"):
        open_checkpoint(path)


def test_one_tensor_in_two_shards_is_refused_without_an_index(tmp_path):
    path = shards(tmp_path / "m", "bin")
    shutil.copy(path / "pytorch_model-00001-of-00003.bin", path / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(FormatError, match="duplicate tensor"):
        open_checkpoint(path)


def test_all_files_that_an_index_names_and_that_are_missing_are_listed(tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / "hf", max_shard_size="2KB")
    gone = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1:3]
    for file in gone:
        file.unlink()
    with pytest.raises(
        FormatError,
        match=f"missing: 2 of the 3 files that model.safetensors.index.json names: {gone[0].name}, {gone[1].name}",
    ):
        open_checkpoint(tmp_path / "hf")


# ------------------------------------------------------------------------------------------------------ unusual suffixes


@pytest.mark.parametrize("name", ["epoch=3-step=100.ckpt", "checkpoint.pth.tar", "weights"])
def test_a_single_file_with_an_unusual_suffix_is_read_from_its_folder(tmp_path, name):
    """Sources: Lightning's ModelCheckpoint; PyTorch's ImageNet example, which saves ``checkpoint.pth.tar``."""
    folder = saved(tmp_path / "hf")
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in arrays_of(random_checkpoint()).items()}
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": arrays, "epoch": 3}, folder / name)
    assert_holds(folder, seed=0)


def test_a_fixture_is_still_read_from_its_folder():
    assert open_checkpoint(FIXTURES / "flax").format == "msgpack"


@pytest.mark.parametrize("name", ["ft-model-00001-of-00001.safetensors", "step_100.pt", "best.pth"])
def test_weights_below_under_any_name_are_pointed_at(tmp_path, name):
    """torchtune writes ``epoch_0/ft-model-00001-of-00001.safetensors`` beside the base's configuration, and ``recipe_state``."""
    (tmp_path / "epoch_0").mkdir()
    shutil.copy(
        saved(tmp_path / "m.safetensors" if name.endswith("safetensors") else tmp_path / "m.bin"),
        tmp_path / "epoch_0" / name,
    )
    for file in tmp_path.glob("m.*"):
        file.unlink()
    (tmp_path / "recipe_state").mkdir()
    torch.save({}, tmp_path / "recipe_state" / "recipe_state.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=f"but below it; pass {tmp_path / 'epoch_0'}$"):
        open_checkpoint(tmp_path)
    assert_holds(tmp_path / "epoch_0", 0)
