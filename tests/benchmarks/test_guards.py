"""What must not become slower or larger, by ratios in one run: no figure of this machine is in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from accelerate import Accelerator

from benchmarks import data, scan, step_overhead
from benchmarks.machine import ROOT
from benchmarks.synthetic import create_run, random_batch, random_parts
from examples.demo.make_model import UNETS
from helpers.caching.embeds import EmbedCache
from helpers.models.lora import LoRA
from helpers.training.step import training_loss

DEMO = ROOT / "examples" / "demo" / "model" / "unet" / "config.json"


def seconds(work: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def test_the_loop_costs_little_beside_a_bare_one():
    """About 5 % on a quiet machine."""
    assert step_overhead.measure(DEMO, batch_size=4, steps=3, rounds=5)["overhead"] < 0.3


def test_cached_samples_come_at_a_good_part_of_the_speed_of_copying_them(tmp_path):
    """Of T5-XXL's width, so that bytes count; on a quiet machine about a third of it, and in 8 bits half of that."""
    store = data._Store(tmp_path, samples=64, width=4096)
    stream, in_8_bits = store.samples(store.embeds), store.samples(store.int8)
    batch = next(stream)
    parts = [batch.images, batch.prompt_embeds]
    copies = [torch.empty_like(part) for part in parts]

    def copy() -> None:
        for part, other in zip(parts, copies):
            other.copy_(part)

    ratios = [seconds(lambda: next(stream), 20) / seconds(copy, 20) for _ in range(5)]
    assert median(ratios) < 6, ratios
    ratios = [seconds(lambda: next(in_8_bits), 10) / seconds(lambda: next(stream), 10) for _ in range(5)]
    assert median(ratios) < 4, ratios


@pytest.mark.parametrize("storage, most", [("bf16", 0.64e6), ("int8", 0.33e6)])
def test_an_embedding_takes_its_bytes_on_the_disk_and_little_more(tmp_path, storage, most):
    """Of T5-XXL: 77 x 4096 x 2 bytes are 0.631 MB, 77 x (4096 + 64 x 2) are 0.325."""
    cache = EmbedCache(tmp_path, {"text_encoder": "test"}, storage)
    texts = [f"caption {number}" for number in range(40)]
    cache.build(texts, lambda some: torch.randn(len(some), 77, 4096).bfloat16(), len, 8)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert taken / len(texts) < most


def test_an_image_takes_few_bytes_and_a_scan_is_linear(tmp_path):
    """As objects an image took 700 bytes in the scan, 190 in the plan and 230 in each cache."""
    seconds_each = []
    for count in (500, 2000):
        images = scan.Images(tmp_path / str(count), count, workers=2)
        start = time.process_time()
        images.scan()
        seconds_each.append((time.process_time() - start) / count)
    assert seconds_each[1] < 2 * seconds_each[0], seconds_each
    scan._fill(scan.PixelCache(tmp_path / "2000" / "cache"), images.plan(images.scan()))
    taken = scan._memory(images)
    assert taken["scan with captions"] < 250 and taken["plan and epoch"] < 50 and taken["cache"] < 60, taken


def test_a_compiled_step_is_one_graph_of_so_many_operations():
    """Each is a launch on a GPU where nothing is fused: more of them, or a break between them, is time lost there."""
    graphs: list[int] = []

    def counting(module: torch.fx.GraphModule, inputs: object) -> Callable:
        graphs.append(sum(node.op in ("call_function", "call_method", "call_module") for node in module.graph.nodes))
        return module.forward

    device = torch.device("cpu")
    parts = random_parts("deepfloyd-i", dict(UNETS[1]), torch.float32, device)
    run = create_run(parts, LoRA(4, 4, dropout=0.0, targets="attention"), torch.float32, "adamw", Accelerator())
    batch = random_batch(parts, 2, device)
    torch._dynamo.reset()
    parts.unet.compile(backend=counting, fullgraph=True)
    for _ in range(3):  # what changes between steps compiles nothing anew
        training_loss(run.parts, run.denoiser, batch, run.generator).loss.backward()
    torch._dynamo.reset()
    assert len(graphs) == 1 and graphs[0] < 1000, graphs

