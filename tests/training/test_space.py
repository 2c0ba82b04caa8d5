import shutil

import pytest

from helpers.config.load import load
from helpers.models.published import architecture
from helpers.models.text import T5
from helpers.training.memory import Saved
from helpers.training.space import Need, describe, embed_size, output_needs, shortages


def test_what_there_is_no_room_for_is_told_by_disk_and_the_rest_is_not(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    fitting, large = Need("result", 1, tmp_path), Need("checkpoints", 2 * free, tmp_path / "not" / "made" / "yet")
    assert shortages([fitting]) == []
    [line] = shortages([fitting, large])
    for words in ("checkpoints (", "result (", str(tmp_path), " will be needed", " free"):
        assert words in line


def test_needs_on_one_disk_are_added_up(tmp_path):
    lines = describe([Need("pixels", 2_000_000, tmp_path), Need("result", 3_000_000, tmp_path / "output")])
    assert "2.0 MB  pixels" in lines[1] and "3.0 MB  result" in lines[2] and "5.0 MB  in all" in lines[3]


@pytest.mark.parametrize("storage, size", [("bf16", 630_784), ("int8", 325_248)])
def test_an_embed_of_t5_xxl_takes_what_its_storage_says(storage, size):
    assert embed_size(T5(), architecture("DeepFloyd/IF-I-M-v1.0"), storage) == size
    assert embed_size(T5(), None, storage) == 0


def test_a_second_format_takes_the_result_once_more(tmp_path):
    saved = Saved(trained=10, state=20, unet=500)
    flags = ["--model_type=lora", f"--output_dir={tmp_path}"]
    once, twice = (
        output_needs(load([*flags, f"--export={name}"]).config, saved, None)[-1] for name in ("diffusers", "kohya")
    )
    assert (once.nbytes, twice.nbytes) == (10, 20)


def test_of_a_base_that_is_not_here_it_is_told_that_the_result_copies_it(tmp_path):
    saved = Saved(trained=10, state=20, unet=500)
    config = load(["--model_type=full", f"--output_dir={tmp_path / 'output'}"]).config
    (tmp_path / "base" / "vae").mkdir(parents=True)
    (tmp_path / "base" / "vae" / "config.json").write_bytes(bytes(7))
    known, unknown = (output_needs(config, saved, base)[-1] for base in (tmp_path / "base", None))
    assert (known.what, known.nbytes) == ("result", 507)
    assert unknown.nbytes == 500 and "besides what it copies of the base" in unknown.what
