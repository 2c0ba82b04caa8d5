"""A tiny real cascade, a tiny Stable Diffusion, a folder of real image files, and the trainer run in this process."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import libraries

libraries.prepare()  # as train_sd2x.py does, and before anything imports them
os.environ["HF_HUB_OFFLINE"] = "1"
if "FLOYDTUNER_TEST_GPU" not in os.environ:  # see tests/gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_sessionstart() -> None:
    gc.disable()  # as in `libraries.importing`, until all tests are imported


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


LONGEST = ("test_trainer", "test_stable_diffusion", "test_kill_anywhere", "test_processes")
"""The files that take minutes. They begin, so that no process is left with one of them while all others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests into the order in which `tests/run.sh` deals files to its processes."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """An untrained stage I pipeline of IF's architecture: a folder as MODEL_NAME takes it."""
    from examples.demo.make_model import make

    folder = tmp_path_factory.mktemp("model")
    make(folder)
    return folder


@pytest.fixture(scope="session")
def smaller_model(tmp_path_factory, tiny_model) -> Path:
    """The tiny model with half the blocks of its UNet, for tests that load it many times."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("smaller") / "model")
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    config |= {
        name: config[name][:1] + config[name][-1:]
        for name in ("block_out_channels", "down_block_types", "up_block_types")
    }
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def tiny_stage2(tmp_path_factory) -> Path:
    """The same of stage II: from 16 px to 64."""
    from examples.demo.make_model import make

    folder = tmp_path_factory.mktemp("stage2")
    make(folder, stage=2)
    return folder


@pytest.fixture(scope="session")
def tiny_stage3(tmp_path_factory) -> Path:
    """The same of stage III, but for the demo's trained VAE: its latents are as those of a real one."""
    from examples.demo.make_stage3 import make

    folder = tmp_path_factory.mktemp("stage3")
    make(folder)
    demo = Path(__file__).resolve().parents[1] / "examples" / "demo"
    shutil.copytree(demo / "stage3" / "vae", folder / "vae", dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """An untrained Stable Diffusion 1.x, but for the demo's trained VAE: its latents are as those of a real one."""
    from examples.demo.make_sd import make

    folder = tmp_path_factory.mktemp("sd")
    make(folder)
    demo = Path(__file__).resolve().parents[1] / "examples" / "demo"
    shutil.copytree(demo / "sd" / "vae", folder / "vae", dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of 14 captioned JPEG and PNG files of odd sizes."""
    from examples.demo.draw import write

    folder = tmp_path_factory.mktemp("photos")
    write(folder, "known", 14, seed=3, edges=(80, 300))
    return folder


@pytest.fixture
def dataloader(tmp_path, photos) -> Path:
    """A dataloader JSON of one dataset with random crops."""
    path = tmp_path / "data.json"
    dataset = {
        "id": "photos",
        "instance_data_dir": str(photos),
        "crop": True,
        "resolution": 64,
        "maximum_image_size": 128,
        "target_downsample_size": 96,
        "caption_strategy": "textfile",
    }
    path.write_text(json.dumps([dataset]), "utf-8")
    return path


@pytest.fixture
def trainer(tmp_path, tiny_model, dataloader) -> Iterator[Callable[..., int]]:
    """Run the trainer on the tiny model and the photos; keyword arguments are flags that win. Returns the exit code."""
    import train_sd2x

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(**flags: object) -> int:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)  # one process, several trainings: accelerate keeps its state for good
        GradientState._reset_state()
        values = {
            "model_type": "deepfloyd-lora",
            "pretrained_model_name_or_path": tiny_model,
            "data_backend_config": dataloader,
            "cache_dir": tmp_path / "cache",
            "output_dir": tmp_path / "output",
            "train_batch_size": 2,
            "max_train_steps": 2,
            "mixed_precision": "no",
            "lora_rank": 4,
            "validation_num_inference_steps": 2,
            "report_to": "none",
            **flags,
        }
        return train_sd2x.main([f"--{name}={value}" for name, value in values.items() if value is not None])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
