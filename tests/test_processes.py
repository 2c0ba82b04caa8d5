"""Several processes train what one would, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from helpers.config.paths import ROOT
from helpers.launch import LOST
from helpers.processes import Processes
from helpers.training import checkpoints
from tests.several import Seen
from tests.test_trainer import ADAPTER, assert_equal

FLAGS = {
    "model_type": "deepfloyd-lora",
    "lora_rank": 2,
    "learning_rate": 1e-3,
    "mixed_precision": "no",
    "train_batch_size": 2,
    "max_train_steps": 8,
    "checkpointing_steps": 4,
    "resolution": 32,
    "caption_dropout_probability": 0.3,
    "text_encoder_batch_size": 1,
    "validation_prompt": "a cat",
    "validation_resolution": 32,
    "validation_steps": 4,
    "validation_num_inference_steps": 1,
    "validation_guidance": 1,
    "report_to": "none",
}
ONE = {"train_batch_size": 4}
FULL = {
    "model_type": "deepfloyd-full", "lora_rank": None, "gradient_accumulation_steps": 2, "use_ema": True,
    "gradient_checkpointing": True, "max_train_steps": 3,
}
DROPOUT = {"lora_dropout": 0.3, "lr_scheduler": "constant"}
STAGE_2 = {"model_type": "deepfloyd-stage2-lora", "resolution": 64, "validation_resolution": 64, "max_train_steps": 3}
LATENTS = {
    "model_type": "lora", "resolution": 64, "validation_resolution": 64, "max_train_steps": 3, "vae_batch_size": 2
}
STAGE_3 = {
    "model_type": "deepfloyd-stage3-lora", "resolution": 64, "num_eval_images": 0, "max_train_steps": 2,
    "validation_resolution": 64,
}
TEXT_ENCODER = LATENTS | {"train_text_encoder": True, "text_encoder_batch_size": None}
KINDS = ("", "full", "stage 2", "stage 3", "latents", "text encoder")
# The processes, the flags beside FLAGS, and which step is spoilt, of each run. Those of one `output` go on from each other.
RUNS: dict[str, tuple[int, dict[str, object], int | str | None]] = {
    "one": (1, ONE, None),
    "two": (2, {}, None),
    "three": (3, {"train_batch_size": 1, "max_train_steps": 5}, None),
    "full one": (1, FULL | ONE, None),
    "full two": (2, FULL, None),
    "stage 2 one": (1, STAGE_2 | ONE, None),
    "stage 2 two": (2, STAGE_2, None),
    "stage 3 one": (1, STAGE_3 | ONE, None),
    "stage 3 two": (2, STAGE_3, None),
    "latents one": (1, LATENTS | ONE, None),
    "latents two": (2, LATENTS, None),
    "text encoder one": (1, TEXT_ENCODER | ONE, None),
    "text encoder two": (2, TEXT_ENCODER, None),
    "dropout": (2, DROPOUT, None),
    "dropout begun": (2, DROPOUT | {"max_train_steps": 4, "output": "resumed"}, None),
    "dropout resumed": (2, DROPOUT | {"output": "resumed"}, None),
    "fewer": (2, {"max_train_steps": 4, "output": "fewer"}, None),
    "fewer resumed": (1, {"output": "fewer"}, None),
    "asked": (2, {"checkpointing_steps": 100}, None),
    "spoilt": (2, {"max_train_steps": 3}, 1),
    "refused": (2, {"lr_scheduler": "constant", "resume_from_checkpoint": "checkpoint-9"}, None),
    "changing": (2, {}, "broken.txt"),  # the last one, since all share the dataset
}


@dataclass(frozen=True)
class Result:
    """What a run's processes saw, its output folder, and what each printed."""

    ranks: list[Seen]
    output: Path
    logs: list[str]

    @property
    def codes(self) -> set[int]:
        return {seen.code for seen in self.ranks}

    def uses(self) -> list[list[str]]:
        """By pass, the images of all processes."""
        return [sum(parts, []) for parts in zip(*(seen.uses for seen in self.ranks))]


@pytest.fixture(scope="module")
def images(tmp_path_factory, photos) -> Path:
    """A dataloader JSON of the photos, with one file that is no image."""
    folder = tmp_path_factory.mktemp("several")
    data = folder / "photos"
    data.mkdir()
    for path in photos.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (90, 90)).save(data / "broken.png")
    (data / "broken.png").write_bytes((data / "broken.png").read_bytes()[:-30])
    (data / "broken.txt").write_text("a red circle", "utf-8")
    path = folder / "data.json"
    path.write_text(json.dumps([{"id": "photos", "instance_data_dir": str(data), "caption_strategy": "textfile"}]))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory, smaller_model, tiny_stage2, tiny_stage3, tiny_sd, images) -> Mapping[str, Result]:
    """All of RUNS, run once."""
    root = tmp_path_factory.mktemp("runs")
    runs, outputs = [], {}
    for name, (count, flags, spoil) in RUNS.items():
        models = {"deepfloyd-stage2-lora": tiny_stage2, "deepfloyd-stage3-lora": tiny_stage3, "lora": tiny_sd}
        model = models.get(flags.get("model_type"), smaller_model)
        folder = root / name.replace(" ", "-")
        outputs[name] = root / "outputs" / str(flags.get("output", name)).replace(" ", "-")
        values = FLAGS | {"pretrained_model_name_or_path": model, "data_backend_config": images} | flags
        values |= {"output_dir": outputs[name], "cache_dir": folder / "cache", "output": None}
        words = [f"--{option}={value}" for option, value in values.items() if value is not None]
        spoil = str(images.parent / "photos" / spoil) if isinstance(spoil, str) else spoil
        asked = {"1": "SIGUSR1", "3": str(outputs[name] / "stop")} if name == "asked" else {}
        runs.append({"folder": str(folder), "count": count, "flags": words, "spoil": spoil, "asked": asked})
    command = [sys.executable, "-m", "tests.several", json.dumps(runs)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def result(run: dict, name: str) -> Result:
        folder, ranks = Path(run["folder"]), range(run["count"])
        seen = [Seen(**json.loads((folder / f"rank-{rank}.json").read_text())) for rank in ranks]
        return Result(seen, outputs[name], [(folder / f"log-{rank}").read_text() for rank in ranks])

    return {name: result(run, name) for name, run in zip(RUNS, runs)}


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("asked", "refused", "changing")])
def test_all_of_them_finish_with_the_same_weights(results, name):
    result = results[name]
    assert result.codes == {0}, result.logs
    assert len({seen.weights for seen in result.ranks}) == 1
    assert len({seen.generator for seen in result.ranks}) == 1


@pytest.mark.parametrize("one, two", [(f"{kind} one".strip(), f"{kind} two".strip()) for kind in KINDS])
def test_the_loss_curve_and_the_weights_are_those_of_one_process_with_the_same_global_batch(results, one, two):
    single, double = results[one], results[two]
    assert [sorted(uses) for uses in double.uses()] == [sorted(uses) for uses in single.uses()]
    for seen in double.ranks:
        assert seen.losses == pytest.approx(single.ranks[0].losses, rel=1e-4), "each process knows the loss of all"
    step = max(int(path.name.removeprefix("checkpoint-")) for path in checkpoints.found(single.output))
    folders = [result.output / f"checkpoint-{step}" for result in (single, double)]
    [weights, other] = [next(path for path in folder.rglob("*weights*.safetensors") if path) if one != "full one"
                        else folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in folders]
    ours, theirs = load_file(weights), load_file(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).abs().max() < 2e-4, key


@pytest.mark.parametrize("name, epochs, last", [("two", 2, [1, 1]), ("three", 1, [0, 1, 1])])
def test_every_image_is_seen_once_an_epoch_by_one_of_them(results, name, epochs, last):
    uses = results[name].uses()
    seen = Counter(image for images in uses for image in images)
    assert len(seen) == 14, "the one that cannot be decoded is left out by all of them"
    assert set(seen.values()) == {epochs}
    in_first = uses[: len(uses) // epochs]
    assert Counter(image for images in in_first for image in images) == dict.fromkeys(seen, 1)
    shares = [[len(rank.uses[step]) for rank in results[name].ranks] for step in range(len(uses))]
    assert all(max(share) - min(share) <= 1 for share in shares)
    assert last in map(sorted, shares), "the batch of the last two images is shared out too"


def test_caching_is_shared_out(results):
    result = results["two"]
    assert sum(seen.decoded for seen in result.ranks) == 15 and min(seen.decoded for seen in result.ranks) > 0
    alone = results["one"].ranks[0]
    assert sum(seen.encoded for seen in result.ranks) == alone.encoded
    assert min(seen.encoded for seen in result.ranks) > 0
    assert json.loads((result.output / "left_out.json").read_text()) == json.loads(
        (results["one"].output / "left_out.json").read_text()
    )


def test_the_first_one_alone_saves_draws_and_speaks(results):
    result = results["two"]
    assert [seen.saved for seen in result.ranks] == [2, 0]
    assert [path.name for path in checkpoints.found(result.output)] == ["checkpoint-4", "checkpoint-8"]
    assert "Finished after 8 steps" in result.logs[0] and (result.output / ADAPTER).exists()
    assert result.logs[1] == ""
    steps = sorted(path.name for path in (result.output / "validation_images").glob("step_*"))
    assert steps == ["step_0", "step_4", "step_8"]


def test_resumed_they_end_with_the_same_bits_with_dropout_of_their_own(results):
    whole, resumed = results["dropout"], results["dropout resumed"]
    assert whole.ranks[0].weights == resumed.ranks[0].weights
    for name in ("checkpoint-4", "checkpoint-8"):
        states = [checkpoints.load_state(result.output / name)["run"] for result in (whole, resumed)]
        assert_equal(*states)
        first, second = states[0]["rng"]
        assert not (first[0] == second[0]).all(), "each draws dropout of its own"


def test_with_fewer_processes_the_epoch_goes_on_with_what_it_has_not_seen(results):
    seen = Counter(image for uses in [*results["fewer"].uses(), *results["fewer resumed"].uses()] for image in uses)
    assert max(seen.values()) - min(seen.values()) <= 1
    assert "processes: 2 -> 1" in results["fewer resumed"].logs[0]


def test_a_loss_of_one_that_is_not_finite_is_skipped_by_all_and_told_with_its_images(results):
    result = results["spoilt"]
    said = result.logs[0]
    assert "Step 2 is skipped" in said and result.logs[1] == ""
    [spoilt, others] = result.ranks[1].uses[1], result.ranks[0].uses[1]
    assert all(name in said for name in spoilt) and not any(name in said for name in others)


def test_what_one_of_them_is_asked_for_all_of_them_do(results):
    """The second one gets a SIGUSR1 in the second step; a file `stop` is there in the fourth."""
    result = results["asked"]
    assert result.codes == {143}
    assert [path.name for path in checkpoints.found(result.output)] == ["checkpoint-2", "checkpoint-4"]
    assert result.logs[0].count("To go on:") == 1 and result.logs[1] == ""
    assert not (result.output / "stop").exists()


def test_what_the_first_one_refuses_ends_the_others_too(results):
    first, second = results["refused"].ranks
    assert (first.code, second.code) == (2, LOST)
    assert "RESUME_CHECKPOINT" in results["refused"].logs[0]


def test_processes_that_found_different_files_do_not_train(results):
    result = results["changing"]
    assert [seen.code for seen in result.ranks] == [2, 2] and not any(seen.uses for seen in result.ranks)
    assert "dataset 'photos': its files changed" in result.logs[0] and "Traceback" not in result.logs[0]


def test_shares_are_near_equal_and_weigh_as_their_images_do():
    for count in range(1, 6):
        for total in range(1, 20):
            shares = [Processes(rank, count).share(total) for rank in range(count)]
            own = [list(range(share.start, share.stop)) for share in shares if share.weight]
            assert sum(own, []) == list(range(total))
            assert max(map(len, own)) - min(map(len, own)) <= 1
            assert all(share.weight == pytest.approx(len(range(share.start, share.stop)) * count / total)
                       for share in shares if share.weight)
            assert sum(share.weight for share in shares) == pytest.approx(count)
            assert all(share.stop == share.start + 1 for share in shares if not share.weight), "one stands in"


@pytest.fixture
def project(tmp_path, smaller_model, images) -> Callable[..., subprocess.Popen]:
    """`./train.sh` with two processes, by an env file; started again, it is the same command."""
    env_file = tmp_path / "env.sh"
    exports = {
        "MODEL_TYPE": "deepfloyd-lora", "MODEL_NAME": smaller_model, "DATALOADER_CONFIG": images, "LORA_RANK": 2,
        "OUTPUT_DIR": tmp_path / "output", "CACHE_DIR": tmp_path / "cache", "TRAINING_NUM_PROCESSES": 2,
        "MIXED_PRECISION": "no", "TRAIN_BATCH_SIZE": 2, "MAX_NUM_STEPS": 100, "CHECKPOINTING_STEPS": 7,
        "RESOLUTION": 32, "REPORT_TO": "none", "OMP_NUM_THREADS": 1,
    }
    env_file.write_text("".join(f"export {name}='{value}'\n" for name, value in exports.items()))

    def start(*flags: str) -> subprocess.Popen:
        environ = {**os.environ, "ENV_FILE": str(env_file)}
        return subprocess.Popen(["./train.sh", *flags], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)

    return start


def test_after_a_signal_and_a_process_that_was_killed_and_named_it_ends_with_the_same_bits(project, tmp_path):
    running = project()
    heard = list(until(running, "loss"))
    running.send_signal(signal.SIGTERM)
    said = "".join(heard) + running.stderr.read()
    assert running.wait(60) == 143, said
    saved = checkpoints.found(tmp_path / "output")[-1]
    assert said.count("To go on:") == 1 and "Traceback" not in said

    again = project()
    heard = list(until(again, "loss"))
    [second] = [pid for pid in children(again.pid) if rank_of(pid) == "1"]
    began = time.monotonic()
    os.kill(second, signal.SIGKILL)
    said = "".join(heard) + again.stderr.read()
    assert again.wait(60) == LOST and time.monotonic() - began < 60
    assert f"Process 2 of 2 (rank 1, pid {second}) was killed by SIGKILL" in said and "Traceback" not in said
    assert saved in checkpoints.found(tmp_path / "output")

    for flags in ([], [f"--output_dir={tmp_path / 'whole'}"]):
        last = project(*flags)
        said = last.stderr.read()
        assert last.wait(60) == 0, said
    ended, whole = (load_file(tmp_path / folder / ADAPTER) for folder in ("output", "whole"))
    assert_equal(ended, whole)


def until(process: subprocess.Popen, word: str) -> Iterator[str]:
    """What a process says on its stderr, up to this word."""
    said = ""
    while word not in said:
        letter = process.stderr.read(1)
        assert letter, said
        said += letter
        yield letter


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def rank_of(pid: int) -> str:
    pairs = (pair.partition(b"=") for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return {name: value for name, _, value in pairs}[b"RANK"].decode()
