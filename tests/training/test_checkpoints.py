from pathlib import Path

import pytest
import torch

from helpers.training import checkpoints
from helpers.training.checkpoints import CheckpointError

STATE = {
    "identity": {"lora_rank": 4, "model_type": "deepfloyd-lora"},
    "data": {"dogs": "1a", "cats": "2b"},
    "run": {"step": 3, "rates": (1e-5, 0.1), "state": {0: {"exp_avg": torch.arange(4.0), "kahan": None}}, "empty": []},
}


class NoWeights:
    """Saves nothing, so that only the folder's handling is looked at."""

    def save_weights(self, unet, folder):
        (folder / "weights").write_text("w")


def save(output: Path, step: int, keep: int = 0, state=STATE) -> Path:
    return checkpoints.save(output, step, NoWeights(), None, state, keep)


def test_state_comes_back_as_it_was(tmp_path):
    found = checkpoints.load_state(save(tmp_path, 3))
    assert found["identity"] == STATE["identity"]
    assert found["run"]["rates"] == (1e-5, 0.1) and isinstance(found["run"]["rates"], tuple)
    assert found["run"]["state"][0]["kahan"] is None
    assert torch.equal(found["run"]["state"][0]["exp_avg"], torch.arange(4.0))


def test_the_newest_ones_are_kept_in_order_of_steps_not_of_names(tmp_path):
    for step in (2, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert checkpoints.choose(tmp_path, "latest").name == "checkpoint-100"
    assert checkpoints.choose(tmp_path, "checkpoint-10").name == "checkpoint-10"


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(tmp_path):
    save(tmp_path, 5)
    (tmp_path / ".checkpoint-6.partial").mkdir()
    assert checkpoints.choose(tmp_path, "latest").name == "checkpoint-5"


def test_an_old_checkpoint_goes_only_when_the_new_one_is_there(tmp_path):
    save(tmp_path, 5, keep=1)
    unsaveable = {"run": object()}
    with pytest.raises(TypeError):
        save(tmp_path, 6, keep=1, state=unsaveable)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-5"]


def test_a_run_that_goes_back_keeps_the_later_checkpoints_aside_and_its_own_new_ones(tmp_path):
    for step in (100, 200, 1000):
        save(tmp_path, step)
    moved = checkpoints.set_aside_later(tmp_path, tmp_path / "checkpoint-100")
    assert [path.relative_to(tmp_path).as_posix() for path in moved] == [
        "abandoned/checkpoint-200",
        "abandoned/checkpoint-1000",
    ]
    assert save(tmp_path, 200, keep=1).exists()
    assert checkpoints.choose(tmp_path, "latest").name == "checkpoint-200"
    save(tmp_path, 300)
    again = checkpoints.set_aside_later(tmp_path, tmp_path / "checkpoint-200")
    assert [path.name for path in again] == ["checkpoint-300"]
    save(tmp_path, 300)
    assert [path.name for path in checkpoints.set_aside_later(tmp_path, tmp_path / "checkpoint-200")] == [
        "checkpoint-300-1"
    ]


def test_what_an_interrupted_save_left_is_swept_away(tmp_path):
    (tmp_path / ".checkpoint-4.partial").mkdir(parents=True)
    save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("spoil", ["no state", "damaged state", "no tensors", "no identity"])
def test_a_checkpoint_of_another_trainer_is_refused_in_words(tmp_path, spoil):
    folder = save(tmp_path, 5)
    if spoil == "no state":
        (folder / checkpoints.STATE).unlink()
    elif spoil == "damaged state":
        (folder / checkpoints.STATE).write_text("{")
    elif spoil == "no tensors":
        (folder / checkpoints.TENSORS).unlink()
    else:
        (folder / checkpoints.STATE).write_text('{"dict": []}')
    with pytest.raises(CheckpointError, match="OUTPUT_DIR"):
        checkpoints.require_same(folder, STATE["identity"], STATE["data"])
        checkpoints.load_state(folder)


def test_starting_anew_over_checkpoints_is_refused_with_both_ways_out(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="RESUME_CHECKPOINT.*checkpoint-5.*latest.*OUTPUT_DIR"):
        checkpoints.choose(tmp_path, "none")
    with pytest.raises(CheckpointError, match="checkpoint-7.*It has: checkpoint-5"):
        checkpoints.choose(tmp_path, "checkpoint-7")


def test_without_checkpoints_latest_and_none_start_anew(tmp_path):
    assert checkpoints.choose(tmp_path / "absent", "latest") is None
    assert checkpoints.choose(tmp_path, "none") is None


def test_other_settings_are_refused_by_name_with_both_values(tmp_path):
    folder = save(tmp_path, 5)
    checkpoints.require_same(folder, STATE["identity"], STATE["data"])
    with pytest.raises(CheckpointError, match="--lora_rank .export LORA_RANK.* was 4 and is now 8"):
        checkpoints.require_same(folder, {**STATE["identity"], "lora_rank": 8}, STATE["data"])


def test_an_option_that_a_checkpoint_does_not_know_yet_was_its_default(tmp_path):
    folder = save(tmp_path, 5)
    checkpoints.require_same(folder, {**STATE["identity"], "revision": None, "use_dora": False}, STATE["data"])
    with pytest.raises(CheckpointError, match="MODEL_REVISION.* was None and is now 'fp32'"):
        checkpoints.require_same(folder, {**STATE["identity"], "revision": "fp32"}, STATE["data"])


@pytest.mark.parametrize(
    "data, words",
    [
        ({"dogs": "1a"}, "'cats' is gone"),
        ({"dogs": "1a", "cats": "2b", "owls": "3c"}, "'owls' is new"),
        ({"dogs": "1a", "cats": "9z"}, "of dataset 'cats' changed"),
    ],
)
def test_other_data_is_refused_by_the_dataset(tmp_path, data, words):
    with pytest.raises(CheckpointError, match=words):
        checkpoints.require_same(save(tmp_path, 5), STATE["identity"], data)
