"""The dataloader JSON: inheritance from flags, defaults, and every problem with its entry and key."""

from __future__ import annotations

import json

import pytest

from helpers.config.backends import AspectBucket, load_backends
from helpers.config.load import ConfigError, load


@pytest.fixture
def read(tmp_path):
    """Writes entries to a file and loads it under the given flags; FOLDER in an entry is a folder that exists."""

    def read(*entries, flags=()):
        entries = [{"instance_data_dir": str(tmp_path)} | entry if "dataset_type" not in entry else entry
                   for entry in entries]
        path = tmp_path / "backends.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        config = load(["--model_type=deepfloyd-lora", f"--cache_dir={tmp_path}/cache", *flags]).config
        return load_backends(path, config)

    return read


def problems_of(read, *entries, flags=()):
    with pytest.raises(ConfigError) as caught:
        read(*entries, flags=flags)
    return list(caught.value.problems)


TEXT = {"id": "t", "dataset_type": "text_embeds"}
EDGES = {"id": "edges", "dataset_type": "conditioning", "instance_data_dir": "/usr"}
CONTROLNET = ["--model_type=full", "--controlnet"]


def test_a_key_overrides_the_flag_of_the_same_name(read):
    flags = ["--caption_strategy=textfile", "--maximum_image_size=256", "--target_downsample_size=128"]
    backends = read({"id": "a"}, {"id": "b", "caption_strategy": "filename", "maximum_image_size": 512}, flags=flags)
    a, b = backends.images
    assert (a.caption_strategy, a.maximum_image_size, a.target_downsample_size) == ("textfile", 256, 128)
    assert (b.caption_strategy, b.maximum_image_size, b.target_downsample_size) == ("filename", 512, 128)


def test_a_minimal_entry_has_working_defaults(read, tmp_path):
    (image,) = read({"id": "a"}).images
    assert (image.crop, image.crop_aspect, image.repeats, image.probability) == (True, "square", 0, 1.0)
    assert image.resolution == 64 and isinstance(image.resolution, int)
    assert image.cache_dir == tmp_path / "cache" / "pixels" / "a"


def test_cache_folders_come_from_the_keys_else_from_the_flag(read, tmp_path):
    backends = read({"id": "a", "cache_dir_vae": "/pixels"}, TEXT | {"cache_dir": "/text"})
    assert (str(backends.images[0].cache_dir), str(backends.text_embeds[0].cache_dir)) == ("/pixels", "/text")
    assert read({"id": "a"}, TEXT).text_embeds[0].cache_dir == tmp_path / "cache" / "text"


def test_without_a_text_entry_there_is_one_anyway(read, tmp_path):
    backends = read({"id": "a"})
    assert [text.cache_dir for text in backends.text_embeds] == [tmp_path / "cache" / "text"]
    assert backends.images[0].text_embeds == backends.text_embeds[0].id


def test_datasets_find_their_text_embeds(read):
    backends = read({"id": "a"}, {"id": "b", "text_embeds": "u"}, TEXT | {"default": True}, TEXT | {"id": "u"})
    assert [image.text_embeds for image in backends.images] == ["t", "u"]


@pytest.mark.parametrize("key", ["disable", "disabled"])
def test_disabled_entries_are_left_out_and_their_folder_may_be_missing(read, key):
    backends = read({"id": "a"}, {"id": "b", key: True, "instance_data_dir": "/nowhere"})
    assert [image.id for image in backends.images] == ["a"]


def test_results_that_would_become_training_images_are_refused(read, tmp_path):
    flag = f"--output_dir={tmp_path}/link/output"
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for folder in ("images", "images/../images", "."):
        [problem] = problems_of(read, {"id": "a", "instance_data_dir": str(tmp_path / folder)}, flags=[flag])
        assert "OUTPUT_DIR" in problem and "pictures would be trained on" in problem
    assert read({"id": "a", "instance_data_dir": str(tmp_path / "images")}, flags=[f"--output_dir={tmp_path}/images2"])


def test_aspects_are_numbers_or_weighted(read):
    entry = {"id": "a", "crop_aspect": "random", "crop_aspect_buckets": [1, {"aspect": 0.75, "weight": 2}]}
    assert read(entry).images[0].crop_aspect_buckets == (AspectBucket(1.0, 1.0), AspectBucket(0.75, 2.0))


@pytest.mark.parametrize("entry, words", [
    ({"crop_styl": "x"}, 'key "crop_styl": not known here; did you mean crop_style?'),
    ({"crop_style": "centr"}, "did you mean cent"),
    ({"crop_style": "face"}, "type center"),
    ({"crop": "maybe"}, 'key "crop": found \'maybe\', needs true or false'),
    ({"type": "aws"}, "type local"),
    ({"caption_strategy": "parquet"}, "type textfile"),
    ({"repeats": -1}, "needs a whole number of at least 0"),
    ({"probability": 0}, "needs a number above 0"),
    ({"resolution": 60}, "type 56 or 64"),
    ({"resolution": 512}, "needs at most 256"),
    ({"instance_data_dir": "/nowhere"}, 'key "instance_data_dir": found \'/nowhere\', which does not exist'),
    ({"maximum_image_size": 256}, '"target_downsample_size": is not set, but "maximum_image_size" needs it'),
    ({"target_downsample_size": 128}, '"maximum_image_size": is not set, but "target_downsample_size" needs it'),
    ({"maximum_image_size": 128, "target_downsample_size": 256}, 'needs at most "maximum_image_size", 128'),
    ({"maximum_image_size": 256, "target_downsample_size": 32}, 'needs at least "resolution", 64'),
    ({"prepend_instance_prompt": True}, 'key "instance_prompt": is not set or empty'),
    ({"caption_strategy": "instanceprompt", "instance_prompt": " "}, 'key "instance_prompt": is not set or empty'),
    ({"crop_aspect": "random"}, "random needs at least one"),
    ({"crop_aspect": "random", "crop_aspect_buckets": 0.75}, "found 0.75, needs a list of aspect ratios like [1.0"),
    ({"crop_aspect_buckets": [1.0]}, "they need crop_aspect random"),
    ({"crop_aspect": "random", "crop_aspect_buckets": [-1]}, "aspect ratios above 0"),
    ({"text_embeds": "nope"}, 'key "text_embeds": found \'nope\', no such entry'),
    ({"disable": True, "disabled": False}, "remove one"),
    ({"id": "a/b"}, "no slashes"),
])
def test_a_wrong_key_is_named_with_its_entry(read, entry, words):
    problems = problems_of(read, {"id": "a"} | entry)
    assert len(problems) == 1 and words in problems[0]
    assert f"entry '{entry.get('id', 'a')}'" in problems[0]


@pytest.mark.parametrize("entries, words", [
    ([{"id": "a"}, {"id": "a"}], "2 entries have it"),
    ([{"id": "a"}, TEXT | {"default": True}, TEXT | {"id": "u", "default": True}], "are all the default"),
    ([{"id": "a"}, TEXT, TEXT | {"id": "u"}], "none is the default"),
    ([TEXT], "there is no dataset of images"),
    ([{"id": "a", "disabled": True}], "there is no dataset of images"),
    ([{}], "entry number 1, key \"id\": is not set"),
    ([{"id": "a"}, EDGES], "key \"dataset_type\": found \"conditioning\", which only a ControlNet is shown"),
    ([{"id": "a", "conditioning_data": "x"}], "key \"conditioning_data\": found 'x', which only a ControlNet is shown"),
])
def test_entries_must_fit_together(read, entries, words):
    problems = problems_of(read, *entries)
    assert len(problems) == 1 and words in problems[0]


@pytest.mark.parametrize("entries, words", [
    ([{"id": "a"}], "(export CONTROLNET, key \"controlnet\") is true, but there are no conditioning images: add"),
    ([{"id": "a"}, EDGES | {"disabled": True}], "there are no conditioning images"),
    ([{"id": "a"}, {"id": "b", "conditioning_data": "edges"}, EDGES],
     "entry 'a', key \"conditioning_data\": is not set, and a ControlNet needs conditioning images for all: type"),
    ([{"id": "a", "conditioning_data": "edge"}, EDGES], "no such conditioning entry; did you mean edges?"),
    ([{"id": "a", "conditioning_data": "edges"}, EDGES, EDGES | {"id": "depth"}], "entry 'depth', no dataset names it"),
    ([{"id": "a"}, EDGES | {"instance_data_dir": "/nowhere"}], "entry 'edges', key \"instance_data_dir\": found"),
    ([{"id": "a"}, EDGES | {"crop": True}], "entry 'edges', key \"crop\": not known here"),
    ([{"id": "a", "instance_data_dir": "/usr"}, EDGES | {"instance_data_dir": "/usr/bin"}], "trained on as images"),
    ([{"id": "a", "instance_data_dir": "/usr"}, EDGES], "its pictures would be trained on as images"),
])
def test_a_controlnet_needs_conditioning_images_for_each_dataset(read, entries, words):
    problems = problems_of(read, *entries, flags=CONTROLNET)
    assert len(problems) == 1 and words in problems[0]


def test_a_dataset_names_its_conditioning_images_or_the_only_one_has_the_only_ones(read, tmp_path):
    backends = read({"id": "a"}, EDGES, flags=CONTROLNET)
    assert [image.conditioning_data for image in backends.images] == ["edges"]
    [edges] = backends.conditioning
    assert backends.conditioning_of(backends.images[0]) == edges
    assert edges.cache_dir == tmp_path / "cache" / "conditioning" / "edges"
    two = [{"id": "a", "conditioning_data": "edges"}, {"id": "b", "conditioning_data": "depth"}]
    backends = read(*two, EDGES, EDGES | {"id": "depth"}, flags=CONTROLNET)
    assert [backends.conditioning_of(image).id for image in backends.images] == ["edges", "depth"]
    assert read({"id": "a"}).conditioning_of(read({"id": "a"}).images[0]) is None


def test_all_problems_of_all_entries_come_at_once(read):
    problems = problems_of(
        read,
        {"id": "a", "crop_styl": 1, "resolution": 60, "repeats": -1},
        {"id": "b", "instance_data_dir": "/nowhere"},
        TEXT | {"cache": "x"},
    )
    assert len(problems) == 5


def test_a_missing_file_is_named_with_its_option(tmp_path):
    with pytest.raises(ConfigError, match="DATALOADER_CONFIG.*there is no file"):
        load_backends(tmp_path / "none.json", load(["--model_type=deepfloyd-lora"]).config)
