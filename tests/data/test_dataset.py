"""What a dataset holds, what is left out of it and why, and how that is told."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.config.backends import AspectBucket, ImageBackend
from helpers.data.dataset import Dataset, plan_dataset, plan_images, rules_for
from helpers.data.sampler import Sampler
from helpers.data.scan import DatasetError, LeftOut, Record, Scan
from helpers.images.geometry import Rules, plans
from helpers.sizes import Size

SQUARE = Rules(64, minimum_image_size=64, maximum_image_size=256, target_downsample_size=128)


def record(name: str, size: Size, captions: tuple[str, ...] = ("a caption",)) -> Record:
    return Record("set", Path("/images") / name, name.encode().hex(), size, captions)


def found(*records: Record, left_out: tuple[LeftOut, ...] = ()) -> Scan:
    return Scan(records, left_out, ())


def dataset(rules: Rules, *records: Record, left_out: tuple[LeftOut, ...] = (), **options) -> Dataset:
    return plan_images("set", Path("/images"), rules, found(*records, left_out=left_out), **options)


def backend(tmp_path: Path, **keys) -> ImageBackend:
    return ImageBackend(id="set", instance_data_dir=tmp_path, cache_dir=tmp_path / "cache", **keys)


VALUES = {
    "resolution": 96,
    "resolution_type": "area",
    "crop": False,
    "crop_aspect": "preserve",
    "crop_style": "center",
    "aspect_bucket_rounding": 3,
    "minimum_image_size": 0.1,
    "maximum_image_size": 4.0,
    "target_downsample_size": 1.0,
}


def test_every_key_of_an_entry_reaches_the_rules(tmp_path):
    rules = rules_for(backend(tmp_path, **VALUES), alignment=16)
    assert {name: getattr(rules, name) for name in VALUES} == VALUES and rules.alignment == 16


def test_an_epoch_that_no_memory_holds_is_refused():
    images = [record("a.png", Size(200, 200)), record("b.png", Size(200, 200))]
    with pytest.raises(DatasetError, match="'set': found 999,999,999 repeats.* sees 2 images 2,000,000,000 times"):
        dataset(SQUARE, *images, repeats=999_999_999)
    assert dataset(SQUARE, *images, repeats=99_999_999).repeats == 99_999_999


def test_aspects_reach_the_rules_with_their_weights(tmp_path):
    aspects = [1.0, {"aspect": 0.5, "weight": 3}]
    entry = backend(tmp_path, resolution=64, crop_aspect="random", crop_aspect_buckets=aspects)
    assert entry.crop_aspect_buckets == (AspectBucket(1.0, 1.0), AspectBucket(0.5, 3.0))
    assert rules_for(entry, 8).crop_aspect_buckets == ((1.0, 1.0), (0.5, 3.0))


def test_an_entry_becomes_a_dataset_with_its_repeats_and_probability(tmp_path):
    entry = backend(tmp_path, resolution=64, repeats=3, probability=0.25)
    planned = plan_dataset(entry, found(record("a.jpg", Size(640, 480))), alignment=8)
    assert (planned.id, planned.folder, planned.repeats, planned.probability) == ("set", tmp_path, 3, 0.25)
    assert planned.plans == (plans(Size(640, 480), planned.rules),)


def test_images_that_the_rules_refuse_are_left_out_with_the_reason_beside_those_of_the_scan():
    unread = LeftOut(Path("/images/c.jpg"), "is empty")
    planned = dataset(SQUARE, record("a.jpg", Size(640, 480)), record("b.jpg", Size(63, 700)), left_out=(unread,))
    assert [entry.path.name for entry in planned.records] == ["a.jpg"] and len(planned.plans) == 1
    assert planned.left_out[0] == unread
    assert planned.left_out[1].path.name == "b.jpg" and "63x700" in planned.left_out[1].reason


def test_pixels_are_wanted_once_for_each_size_that_an_image_is_cropped_from():
    aspects = replace(SQUARE, crop_aspect="random", crop_aspect_buckets=((1.0, 1), (0.5, 1), (2.0, 1)))
    planned = dataset(aspects, record("large.jpg", Size(4000, 3000)), record("small.jpg", Size(200, 150)))
    assert [(job.path.name, job.size, job.method) for job in planned.pixel_jobs("single")] == [
        ("large.jpg", Size(171, 128), "single"), ("small.jpg", Size(200, 150), "single")]
    covering = replace(aspects, maximum_image_size=None, target_downsample_size=None)
    sizes = [job.size for job in dataset(covering, record("a.jpg", Size(400, 300))).pixel_jobs("stepwise")]
    assert sizes == [Size(85, 64), Size(171, 128), Size(128, 96)]


def test_files_that_fail_to_decode_leave_the_dataset_before_an_epoch_is_planned():
    names = ("a.jpg", "b.jpg", "c.jpg")
    planned = dataset(SQUARE, *(record(name, Size(200 + i, 200)) for i, name in enumerate(names)))
    rest = planned.without({Path("/images/b.jpg"): "is damaged"})
    assert [entry.path.name for entry in rest.records] == ["a.jpg", "c.jpg"]
    assert [choices[0].source.width for choices in rest.plans] == [200, 202]
    assert rest.left_out == (LeftOut(Path("/images/b.jpg"), "is damaged"),)
    assert len(planned.records) == 3 and planned.without({}) == planned


def test_a_dataset_without_images_left_says_why_by_several_examples():
    reasons = ["is empty", "is empty", "is damaged: a", "is damaged: b", "is damaged: c"]
    lost = tuple(LeftOut(Path(f"/images/{number}.jpg"), reason) for number, reason in enumerate(reasons))
    with pytest.raises(DatasetError) as caught:
        dataset(SQUARE, left_out=lost).require_images()
    said = str(caught.value)
    for words in ("'set'", "none of its 5 files", "0.jpg: is empty", "2.jpg: is damaged: a", "3.jpg: is damaged: b"):
        assert words in said
    assert "1.jpg" not in said and "damaged: c" not in said


def test_captions_are_listed_once_each():
    planned = dataset(SQUARE, *(record(name, Size(99, 99), captions) for name, captions in
                                [("a", ("one", "two")), ("b", ("two",)), ("c", ("three",))]))
    assert planned.captions() == ["one", "two", "three"]


def test_images_of_one_size_share_their_plans():
    planned = dataset(SQUARE, *(record(f"{number}.jpg", Size(640, 480)) for number in range(3)))
    assert planned.plans[0] is planned.plans[2]


def report():
    preserve = Rules(64, crop_aspect="preserve")
    planned = dataset(
        preserve,
        *(record(f"{number}.jpg", Size(640, 480)) for number in range(5)),
        record("tall.jpg", Size(480, 640)),
        record("tiny.jpg", Size(32, 24)),
        left_out=(LeftOut(Path(os.fsdecode(b"/images/b\xe4d.jpg")), "is empty"),),
        repeats=1,
    )
    return planned.report(Sampler([planned], 4, 42, 0.1).batches_by_dataset(0)["set"])


def test_the_report_counts_everything():
    counted = report()
    assert (counted.dataset_id, counted.found, counted.used, counted.upsampled, counted.repeats) == ("set", 8, 7, 1, 1)
    assert counted.batches_per_epoch == 4  # 12 landscapes in threes of four, 2 portraits
    assert counted.buckets == {Size(64, 88): 1, Size(88, 64): 6}
    assert [entry.reason for entry in counted.left_out] == ["is empty"]


def test_the_report_tells_a_person_the_same():
    text = report().describe()
    for words in ("'set'", "8 files found", "7 images used", "2 times an epoch", "4 batches", "88x64 (6)",
                  "1 are smaller", "1 left out", "b\\xe4d.jpg: is empty"):
        assert words in text
    text.encode("utf-8")


def test_the_report_is_silent_about_what_did_not_happen():
    planned = dataset(SQUARE, record("a.jpg", Size(640, 480)))
    assert planned.report(1).describe() == (
        "dataset 'set': 1 files found, 1 images used, once an epoch, in 1 batches\n  buckets: 64x64 (1)")


BASE = (record("a.jpg", Size(640, 480)), record("sub/b.jpg", Size(300, 500), ("one", "two")))
CHANGES = {
    "an image more": lambda: dataset(SQUARE, *BASE, record("c.jpg", Size(640, 480))),
    "an image less": lambda: dataset(SQUARE, BASE[0]),
    "another order": lambda: dataset(SQUARE, *BASE[::-1]),
    "other content": lambda: dataset(SQUARE, replace(BASE[0], content="ff"), BASE[1]),
    "another name": lambda: dataset(SQUARE, replace(BASE[0], path=Path("/images/z.jpg")), BASE[1]),
    "another caption": lambda: dataset(SQUARE, replace(BASE[0], captions=("another",)), BASE[1]),
    "a caption less": lambda: dataset(SQUARE, BASE[0], replace(BASE[1], captions=("one",))),
    "another size": lambda: dataset(SQUARE, replace(BASE[0], size=Size(600, 480)), BASE[1]),
    "another target": lambda: dataset(replace(SQUARE, resolution=72), *BASE),
    "other intermediate": lambda: dataset(replace(SQUARE, target_downsample_size=136), *BASE),
    "another crop style": lambda: dataset(replace(SQUARE, crop_style="center"), *BASE),
    "repeats": lambda: dataset(SQUARE, *BASE, repeats=1),
    "probability": lambda: dataset(SQUARE, *BASE, probability=0.5),
    "id": lambda: replace(dataset(SQUARE, *BASE), id="another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_batches_changes_the_digest(change):
    assert CHANGES[change]().digest() != dataset(SQUARE, *BASE).digest()


def test_the_digest_survives_a_move_of_the_folder_and_what_was_left_out():
    planned = dataset(SQUARE, *BASE)
    moved = tuple(replace(r, path=Path("/elsewhere") / r.path.relative_to("/images")) for r in planned.records)
    other = replace(planned, folder=Path("/elsewhere"), records=moved, left_out=(LeftOut(Path("x"), "is empty"),))
    assert other.digest() == planned.digest()


def test_weights_of_random_aspects_change_the_digest():
    def weighted(weight: float) -> str:
        aspects = ((1.0, 1.0), (0.5, weight))
        return dataset(Rules(64, crop_aspect="random", crop_aspect_buckets=aspects), *BASE).digest()

    assert weighted(1) == weighted(1.0) != weighted(2)


def test_the_digest_is_the_same_in_every_release():
    """A checkpoint of an older release must find its data unchanged: this value may never change."""
    odd = replace(BASE[0], path=Path(os.fsdecode(b"/images/caf\xe9.jpg")))
    assert dataset(SQUARE, *BASE, odd).digest() == "9a9772367e841a58f98f270ceffda664"


def test_a_hundred_thousand_images_are_digested_in_well_under_two_seconds():
    few = dataset(SQUARE, *(record(f"{number}.jpg", Size(400 + number, 300)) for number in range(100)))
    many = few.taken([*range(100)] * 1000)
    began = time.process_time()
    many.digest()
    assert time.process_time() - began < 2
