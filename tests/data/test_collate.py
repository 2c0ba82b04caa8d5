"""A batch holds exactly the pixels and embeddings that were planned, in buffers that are used again."""

import hashlib
import threading
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.caching.embeds import EmbedCache
from helpers.caching.pixels import PixelCache
from helpers.data.collate import Buffer, CachedPixels, Collator, Source, prefetch
from helpers.data.dataset import Dataset, plan_images
from helpers.data.sampler import Sampler
from helpers.data.scan import Captions, scan
from helpers.images.geometry import Rules
from helpers.images.loading import load
from helpers.sizes import Size

RULES = {
    "crops": Rules(64, maximum_image_size=100, target_downsample_size=72),
    "whole": Rules(64, crop_aspect="preserve", aspect_bucket_rounding=1),
}


def embedding(text: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return torch.randn(77, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()


def prepared(dataset: Dataset) -> dict[str, str]:
    return {caption: caption.lower() for caption in ["", *dataset.captions()]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven photos of three shapes; their names are their captions."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(7):
        width, height = ((120, 90), (90, 120), (130, 130))[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"Photo_Number_{number}.jpg")
    return folder


@pytest.fixture(scope="module", params=RULES)
def data(request, folder, tmp_path_factory) -> tuple[Dataset, Source]:
    cache = tmp_path_factory.mktemp("cache")
    found = scan("set", folder, cache / "index", Captions("filename"))
    dataset = plan_images("set", folder, RULES[request.param], found)
    pixels, embeds = PixelCache(cache / "pixels"), EmbedCache(cache / "text", {"text_encoder": "test"})
    assert pixels.build(dataset.pixel_jobs("stepwise")) == {}
    texts = prepared(dataset).values()
    embeds.build(texts, lambda batch: torch.stack([embedding(text) for text in batch]), len, 4)
    return dataset, Source(CachedPixels(pixels, "stepwise"), embeds)


def sampler(dataset: Dataset) -> Sampler:
    return Sampler([dataset], 3, 42, 0.3)


def test_a_batch_holds_the_planned_crops_and_embeddings_exactly(data):
    dataset, source = data
    collate, dropped = Collator({"set": source}, prepared(dataset)), 0
    for _, plan in islice(sampler(dataset).batches(), 40):
        batch = collate(plan)
        size = (len(plan.uses), plan.target.height, plan.target.width, 3)
        assert batch.images.dtype == torch.uint8 and tuple(batch.images.shape) == size and batch.images.is_contiguous()
        assert batch.prompt_embeds.dtype == torch.bfloat16 and batch.uses == plan.uses
        for image, embeds, use in zip(batch.images, batch.prompt_embeds, plan.uses, strict=True):
            left, top, right, bottom = use.box
            decoded = load(use.record.path, use.plan.intermediate)
            np.testing.assert_array_equal(image.numpy(), decoded[top:bottom, left:right])
            assert torch.equal(embeds, embedding("" if use.dropped else use.record.captions[0].lower()))
            dropped += use.dropped
    assert dropped


def test_buffers_are_used_again_but_not_before_their_time(data):
    dataset, source = data
    collate = Collator({"set": source}, prepared(dataset), ahead=2)
    plans = [plan for _, plan in islice(sampler(dataset).batches(), 30)]
    warm = [collate(plan) for plan in plans][-9:]
    pointers = {batch.prompt_embeds.data_ptr() for batch in warm}
    assert len(pointers) == 3
    kept = collate(plans[0])
    images, embeds = kept.images.clone(), kept.prompt_embeds.clone()
    collate(plans[1]), collate(plans[2])
    assert torch.equal(kept.images, images) and torch.equal(kept.prompt_embeds, embeds)


def test_the_stream_gives_the_same_batches_as_reading_one_by_one(data):
    dataset, source = data
    stream = Collator({"set": source}, prepared(dataset)).stream(sampler(dataset).batches())
    one_by_one = Collator({"set": source}, prepared(dataset))
    for (position, batch), (expected_position, plan) in islice(zip(stream, sampler(dataset).batches()), 30):
        expected = one_by_one(plan)
        assert position == expected_position and batch.uses == plan.uses
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.prompt_embeds, expected.prompt_embeds)
    stream.close()


def test_a_caption_that_was_not_prepared_is_an_error_that_names_it(data):
    dataset, source = data
    with pytest.raises(KeyError, match="Photo Number"):
        for _, plan in islice(sampler(dataset).batches(), 10):
            Collator({"set": source}, {"": ""})(plan)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages")
def test_a_large_buffer_is_asked_to_be_in_huge_pages():
    tensor = Buffer(torch.bfloat16)(16, 77, 4096)
    tensor.fill_(1)
    assert bool((tensor == 1).all()) and "hg" in flags_of_memory(tensor.data_ptr())


def flags_of_memory(address: int) -> list[str]:
    """The kernel's flags (VmFlags) of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            start, end = (int(edge, 16) for edge in words[0].split("-"))
            inside = start <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    return []


def test_a_buffer_grows_and_then_stays_where_it_is():
    buffer = Buffer(torch.uint8)
    buffer(2, 3)
    large = buffer(4, 5)
    large.copy_(torch.arange(20).view(4, 5))
    assert buffer(3, 2).tolist() == [[0, 1], [2, 3], [4, 5]] and buffer(4, 5).data_ptr() == large.data_ptr()


def test_prefetching_keeps_the_order_and_ends():
    assert list(prefetch(range(20), 3)) == list(range(20))
    assert list(prefetch([], 3)) == []


def test_prefetching_makes_just_the_next_items_and_in_one_thread():
    made, threads, third = [], set(), threading.Event()

    def items():
        for number in count():
            threads.add(threading.get_ident())
            made.append(number)
            if number == 3:
                third.set()
            yield number

    stream = prefetch(items(), 3)
    assert next(stream) == 0 and third.wait(20)
    assert made == [0, 1, 2, 3] and len(threads) == 1 and threading.get_ident() not in threads
    stream.close()


def test_an_error_comes_up_after_the_items_before_it():
    def items():
        yield from range(3)
        raise KeyError("no embedding")

    stream = prefetch(items(), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="no embedding"):
        next(stream)


def test_a_stream_that_is_closed_leaves_no_thread():
    before = threading.active_count()
    stream = prefetch(count(), 3)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_sizes_may_change_from_batch_to_batch(data):
    dataset, source = data
    sizes = {plan.target for _, plan in islice(sampler(dataset).batches(), 20)}
    assert len(sizes) == (1 if dataset.rules == RULES["crops"] else 3) and all(isinstance(size, Size) for size in sizes)
