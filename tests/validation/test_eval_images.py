"""Which images are upscaled at each validation, and how they are scored."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.data.dataset import Dataset, plan_images
from helpers.data.scan import Record, Scan
from helpers.images.geometry import Rules
from helpers.sizes import Size
from helpers.validation.eval_images import MOST_DB, REMEMBERED, Choice, choose, psnr

SMALL, LARGE = Size(64, 64), Size(256, 256)


def dataset(name: str = "set", small: int = 0, large: int = 20) -> Dataset:
    sizes = {f"small{i:02}.png": Size(100, 80) for i in range(small)}
    sizes |= {f"large{i:02}.png": Size(256, 300) for i in range(large)}
    folder = Path("/images") / name
    records = [Record(name, folder / file, file, size, ("a caption",)) for file, size in sizes.items()]
    return plan_images(name, folder, Rules(64, alignment=16), Scan(tuple(records), (), ()))


def names(choice: Choice, size: Size = LARGE, dataset_id: str = "set") -> list[str]:
    return [record.path.name for record, sizes in choice.images[dataset_id].items() if size in sizes]


def test_the_choice_is_the_seeds_without_replacement_and_another_for_another_seed(tmp_path):
    chosen = []
    for folder, seed in (("one", 1), ("two", 1), ("three", 2)):
        (tmp_path / folder).mkdir()
        chosen.append(names(choose([dataset()], [LARGE], 5, seed, tmp_path / folder)))
    assert len(set(chosen[0])) == 5
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_choice_is_remembered_in_its_output_folder_whatever_the_seed_becomes(tmp_path):
    first = choose([dataset()], [LARGE], 5, 1, tmp_path)
    assert choose([dataset()], [LARGE], 5, 2, tmp_path) == first
    assert set(names(first)) < set(names(choose([dataset()], [LARGE], 8, 3, tmp_path)))


def test_a_run_that_shows_fewer_or_none_does_not_forget(tmp_path):
    first = choose([dataset()], [LARGE], 5, 1, tmp_path)
    assert names(choose([dataset()], [LARGE], 0, 2, tmp_path)) == []
    assert names(choose([dataset()], [LARGE], 2, 2, tmp_path)) == names(first)[:2]
    assert choose([dataset("other")], [LARGE], 3, 2, tmp_path).images.keys() == {"other"}
    assert choose([dataset()], [LARGE], 5, 2, tmp_path) == first


def test_images_whose_files_are_gone_are_replaced_by_others(tmp_path):
    first = names(choose([dataset()], [LARGE], 8, 1, tmp_path))
    there = {record.path.name for record in dataset(large=10).records}
    then = names(choose([dataset(large=10)], [LARGE], 8, 2, tmp_path))
    kept = [name for name in first if name in there]
    assert 0 < len(kept) < 8 == len(set(then)) and then[: len(kept)] == kept and set(then) <= there


def test_each_dataset_has_its_own(tmp_path):
    choice = choose([dataset("one"), dataset("two")], [LARGE], 4, 1, tmp_path)
    assert len(names(choice, dataset_id="one")) == len(names(choice, dataset_id="two")) == 4
    assert names(choice, dataset_id="one") != names(choice, dataset_id="two")
    assert {record.dataset_id for record in choice.images["two"]} == {"two"}


def test_fewer_images_than_asked_for_are_all_shown(tmp_path):
    choice = choose([dataset(large=3)], [LARGE], 4, 1, tmp_path)
    assert sorted(names(choice)) == ["large00.png", "large01.png", "large02.png"]
    assert choice.notes == ()


def test_no_image_is_shown_at_a_size_that_it_does_not_fill(tmp_path):
    both = [SMALL, LARGE]
    choice = choose([dataset(small=30, large=3)], both, 2, 1, tmp_path)
    assert len(names(choice, SMALL)) == len(names(choice, LARGE)) == 2
    assert all(name.startswith("large") for name in names(choice, LARGE))
    assert choice.notes == (), "nothing is missed"
    assert choose([dataset(small=30, large=3)], both, 2, 9, tmp_path) == choice


def test_too_few_that_fill_a_size_are_told_with_those_passed_over(tmp_path):
    choice = choose([dataset(small=30, large=3)], [SMALL, LARGE], 4, 1, tmp_path)
    [note] = choice.notes
    assert len(names(choice, LARGE)) == 3 and len(names(choice, SMALL)) == 4
    assert "'set': 3 of 4 eval images at 256x256 (NUM_EVAL_IMAGES, --num_eval_images): 30 images do not fill it" in note
    assert "small00.png (100x80)" in note


@pytest.mark.parametrize("content", ["", "{", "[]", '{"set": "large00.png"}', '{"set": [1]}', "\xff"])
def test_a_damaged_memory_is_chosen_anew_which_is_said(tmp_path, content):
    (tmp_path / REMEMBERED).write_text(content, "latin-1")
    choice = choose([dataset()], [LARGE], 2, 1, tmp_path)
    assert len(names(choice)) == 2
    [note] = choice.notes
    assert REMEMBERED in note and "chosen anew" in note
    assert choose([dataset()], [LARGE], 2, 5, tmp_path) == Choice(choice.images, ())


def test_names_that_are_no_utf_8_are_remembered(tmp_path):
    strange = Record("set", Path("/images/set/\udcff.png"), "x", Size(256, 256), ("a caption",))
    made = plan_images("set", Path("/images/set"), Rules(64), Scan((strange, *dataset().records), (), ()))
    first = choose([made], [LARGE], 21, 1, tmp_path)
    assert choose([made], [LARGE], 21, 2, tmp_path) == first


def picture(value: int, edge: int = 64) -> Image.Image:
    return Image.new("RGB", (edge, edge), (value, value, value))


def test_psnr_is_that_of_its_formula():
    assert psnr(picture(0), picture(255)) == pytest.approx(0)
    assert psnr(picture(100), picture(110)) == pytest.approx(10 * np.log10(255**2 / 100))


def test_equal_pictures_score_finitely_and_above_all_others():
    almost = picture(100)
    almost.putpixel((0, 0), (101, 100, 100))
    assert psnr(almost, picture(100)) < psnr(picture(100), picture(100)) == MOST_DB
    json.dumps(psnr(picture(100), picture(100)), allow_nan=False)
