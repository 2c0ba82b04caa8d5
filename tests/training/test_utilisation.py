import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.data.collate import Batch
from helpers.data.sampler import Position, Use
from helpers.data.scan import Record
from helpers.images.geometry import Rules, plans
from helpers.models import loading
from helpers.models.bitfit import BitFit
from helpers.models.controlnet import ControlNet
from helpers.models.families import SPECS
from helpers.models.full import Full
from helpers.models.lora import LoRA
from helpers.sizes import Size
from helpers.training.loop import train
from helpers.training.memory import Setup
from helpers.training.step import training_loss
from helpers.training.utilisation import Utilisation, operations, peak_of, utilisation_of

SPEC = SPECS["deepfloyd-i"]
SIZE = Size(64, 48)


def setup_of(model, adapter, **changed) -> Setup:
    values = {
        "architecture": model / "unet" / "config.json", "adapter": adapter, "weights": torch.float32,
        "trained": torch.float32, "autocast": False, "optimizer": "adamw", "ema": False, "checkpointing": False,
        "batch_size": 4, "size": SIZE, "tokens": 77,
    }  # fmt: skip
    return Setup(**values | changed)


@pytest.mark.parametrize("adapter", [Full(), LoRA(4, 4, dropout=0.0, targets="attention")], ids=["full", "lora"])
def test_operations_are_those_of_a_real_step(tiny_model, adapter):
    parts = loading.load(SPEC, tiny_model, torch.float32)
    adapter.attach(parts.denoiser, torch.float32)
    images = torch.zeros(2, SIZE.height, SIZE.width, 3, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(2, 77, 64).bfloat16(), (None, None))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused one is not counted
        training_loss(parts, parts.denoiser.train(), batch, torch.Generator()).loss.backward()
    assert operations(setup_of(tiny_model, adapter)) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("adapter", [
    LoRA(4, 4, dropout=0.0, targets="attention+conv", dora=True), BitFit(), ControlNet(), Full(),
    LoRA(4, 4, dropout=0.0, targets="attention", base_precision="int8"),
], ids=["dora", "bitfit", "controlnet", "full", "int8"])  # fmt: skip
def test_they_are_the_same_in_whatever_precision_it_trains(tiny_sd, adapter):
    sizes = {"channels": 4, "size": Size(16, 16)}
    mixed = {"weights": torch.bfloat16, "trained": torch.float32, "autocast": True}
    assert operations(setup_of(tiny_sd, adapter, **sizes, **mixed)) == operations(setup_of(tiny_sd, adapter, **sizes))


def test_what_is_computed_twice_counts_once(tiny_model):
    assert operations(setup_of(tiny_model, Full(), checkpointing=True)) == operations(setup_of(tiny_model, Full()))


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 3090", 71),
    ("NVIDIA GH200 480GB", 989),
    ("NVIDIA GeForce GTX 1080", None), ("NVIDIA RTX A4000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA L40-8Q", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA H200 NVL", 835), ("NVIDIA H200", 989),
])  # fmt: skip
def test_the_peak_of_a_gpu_is_known_by_its_name(name, tera):
    assert peak_of(name) == (tera and tera * 1e12)


@pytest.mark.parametrize("name, precision, is_told", [
    ("NVIDIA A100-SXM4-80GB", {"autocast": True}, True),
    ("NVIDIA A100-SXM4-80GB", {}, False),  # float32 has other limits
    ("NVIDIA GeForce GTX 1080", {"autocast": True}, False),
])  # fmt: skip
def test_it_is_told_of_a_gpu_that_is_known_and_computes_in_two_bytes(
    tiny_model, monkeypatch, name, precision, is_told
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    setup = setup_of(tiny_model, Full(), **precision)
    told = utilisation_of(setup, SIZE, torch.device("cuda"))
    expected = Utilisation(312e12, operations(setup) / (SIZE.width * SIZE.height))
    assert told == (expected if is_told else None)


def test_nothing_is_told_where_the_peak_is_not_known(tiny_model):
    assert utilisation_of(setup_of(tiny_model, Full(), autocast=True), SIZE, torch.device("cpu")) is None


def test_the_progress_line_tells_the_share_of_the_peak(make_run, capsys):
    [plan] = plans(SIZE, Rules(0.003, "area", alignment=8))
    use = Use(Record("d", None, "0", SIZE, ("",)), plan, (0, 0, *plan.target), "", False)
    pixels = plan.target.width * plan.target.height
    run = make_run(steps=2)
    run.utilisation = Utilisation(peak=1.0, of_a_pixel=1 / pixels)  # a sample a second is all that it can do
    images = torch.zeros(2, plan.target.height, plan.target.width, 3, dtype=torch.uint8)
    batches = ((Position(0, n), Batch(images, torch.zeros(2, 77, 64).bfloat16(), (use, use))) for n in range(1, 3))
    train(run, batches)
    told = capsys.readouterr().err.rsplit("loss", 1)[1]
    samples = float(told.split(" samples/s")[0].rsplit(" ", 1)[1])
    share = float(told.split("MFU ")[1].split("%")[0])
    assert share == pytest.approx(100 * samples, rel=0.05, abs=6)
