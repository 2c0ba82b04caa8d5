"""What `--check` finds in real files: each thing by name, with what to do, and nothing in silence."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.config.backends import ImageBackend
from helpers.data.audit import Audited, Finding, TextSide, audit_captions, audit_images, text_side
from helpers.data.preparation import cache_pixels, prepare_captions, scan_and_plan
from helpers.data.scan import DatasetError
from helpers.models.text import T5

ROOT = Path(__file__).parents[2]
NO_TEXT_SIDE = TextSide(77, None, None, ())


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (120, 100), **options: object) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 10 + 1, size[0] // 10 + 1, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path, **options)
    return path


def captioned(path: Path, seed: int = 0, caption: str = "a photo of a dog", **options: object) -> Path:
    picture(path, seed, **options).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dogs").mkdir()
    captioned(tmp_path / "dogs" / "good.png")
    return tmp_path / "dogs"


def backend(folder: Path, **keys: object) -> ImageBackend:
    keys = {"resolution": 64, "caption_strategy": "textfile", **keys}
    return ImageBackend(id="dogs", instance_data_dir=folder, cache_dir=folder.parent / "cache", **keys)


def audit(folder: Path, **keys: object) -> Audited:
    return audit_images(backend(folder, **keys), 8)


def findings(folder: Path, **keys: object) -> dict[tuple[str | None, str], Finding]:
    """All that is found, by the file's name and the kind; captions included."""
    audited = audit(folder, **keys)
    prepared = prepare_captions(T5(), audited.dataset.captions())
    found = [*audited.findings, *audit_captions(audited, backend(folder, **keys), prepared, NO_TEXT_SIDE)]
    by_name = {(finding.file and finding.file.name, finding.kind): finding for finding in found}
    assert len(by_name) == len(found), "nothing is told twice"
    assert all(finding.reason and finding.remedy and finding.dataset == "dogs" for finding in found)
    return by_name


def only(folder: Path, name: str | None, kind: str, **keys: object) -> Finding:
    found = findings(folder, **keys)
    assert set(found) == {(name, kind)}
    return found[name, kind]


def test_a_sound_dataset_has_no_findings(folder):
    for seed in range(1, 4):
        captioned(folder / f"{seed}.jpg", seed)
    assert findings(folder) == {}


@pytest.mark.parametrize("present", [
    "a.caption", "a.txt.txt", "a.TXT", "A.txt", "a.jpg.txt", "a.captions", "a.tags", "a.caption.txt",
])
def test_a_caption_that_nobody_reads_is_named_with_what_to_rename_it_to(folder, present):
    picture(folder / "a.jpg", 1)
    (folder / present).write_text("a cat")
    finding = only(folder, "a.jpg", "no caption")
    assert "there is no a.txt" in finding.reason and f"there is {present}, which is not read" in finding.reason
    assert finding.remedy == f"rename {present} to a.txt"


def test_captions_among_other_data_are_named_but_not_to_be_renamed(folder):
    picture(folder / "a.jpg", 1)
    (folder / "a.json").write_text('{"caption": "a cat"}')
    finding = only(folder, "a.jpg", "no caption")
    assert "a.json" in finding.reason and finding.remedy == "write the caption in a.json to a.txt"


def test_another_images_caption_is_not_taken_for_a_misnamed_one(folder):
    picture(folder / "a.jpg", 1)
    captioned(folder / "a.2.jpg", 2)
    assert "which is not read" not in only(folder, "a.jpg", "no caption").reason


def test_misnamed_captions_of_a_large_dataset_are_looked_up_in_no_time(folder):
    picture(folder / "0.png", 1)
    for number in range(4_000):
        (folder / f"{number}.caption").write_text("a cat")
        if number:
            (folder / f"{number}.png").hardlink_to(folder / "0.png")
    began = time.perf_counter()
    remedies = {finding.remedy for finding in audit(folder).findings if finding.kind == "no caption"}
    assert {f"rename {number}.caption to {number}.txt" for number in range(4_000)} == remedies
    assert time.perf_counter() - began < 20, "one look at the folder for each of them took a minute"


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_caption_is_told(folder, content):
    captioned(folder / "a.png", 1, content)
    assert "a.txt is empty" in only(folder, "a.png", "no caption").reason


def test_a_caption_of_another_encoding_is_to_be_saved_as_utf_8(folder):
    picture(folder / "a.png", 1).with_suffix(".txt").write_bytes("ein Kätzchen".encode("latin-1"))
    finding = only(folder, "a.png", "no caption")
    assert "a.txt is not UTF-8" in finding.reason and finding.remedy == "save it as UTF-8"


def test_text_files_that_are_not_read_because_names_are_the_captions_are_told(folder):
    finding = only(folder, "good.txt", "unread captions", caption_strategy="filename")
    assert finding.reason.startswith("1 images") and "textfile" in finding.remedy


@pytest.mark.parametrize("caption, keys, words", [
    ("a photo of jc6640 dog", {}, ["the word 'jc6640'", "a photo of jc6640 dog"]),
    ("a dog", {"instance_prompt": "JC6640", "prepend_instance_prompt": True}, ["the trigger word 'jc6640'"]),
    ("a dog", {"instance_prompt": "<sks>", "prepend_instance_prompt": True}, ["the trigger word 'sks'"]),
])
def test_a_word_that_cleaning_erases_is_named(folder, caption, keys, words):
    (folder / "good.txt").write_text(caption)
    finding = only(folder, "good.png", "erased word", **keys)
    assert all(word in finding.reason for word in words)


def test_a_caption_of_which_cleaning_leaves_nothing_is_told(folder):
    (folder / "good.txt").write_text("写真\na dog", encoding="utf-8")
    assert "'写真'" in only(folder, "good.png", "empty caption").reason


def test_a_caption_that_is_cut_is_told_with_its_length(folder, tiny_model):
    captioned(folder / "long.png", 1, "a " + "very " * 120 + "small dog")
    audited = audit(folder)
    prepared = prepare_captions(T5(), audited.dataset.captions())
    side = text_side(T5(), str(tiny_model), None)
    [finding] = audit_captions(audited, backend(folder), prepared, side)
    assert (finding.file.name, finding.kind) == ("long.png", "cut caption")
    tokens = side.length_of(prepared["a " + "very " * 120 + "small dog"])
    assert tokens > 77 and f"has {tokens} tokens, of which 77 are read" in finding.reason


def test_without_a_tokenizer_it_is_said_that_lengths_were_not_looked_at(tmp_path, tiny_model):
    broken = tmp_path / "model" / "tokenizer"
    broken.mkdir(parents=True)
    (broken / "tokenizer_config.json").write_text("{}")
    for model in ("someone/their-if", str(tmp_path / "model")):
        side = text_side(T5(), model, None)
        assert side.length_of is None and any("77 tokens" in words and model in words for words in side.not_looked_at)
        assert side.embed_bytes(["a"], "bf16") is None
    side = text_side(T5(), str(tiny_model), None)
    width = json.loads((tiny_model / "text_encoder" / "config.json").read_text())["d_model"]
    assert side.embed_bytes(["a", "b", "a"], "bf16") == 2 * 77 * width * 2
    assert side.embed_bytes(["a", "b", "a"], "int8") == 2 * 77 * (width + 2 * math.ceil(width / 64))


def test_images_that_cannot_be_decoded_are_found_by_decoding_them(folder):
    cut = captioned(folder / "cut.jpg", 1)
    cut.write_bytes(cut.read_bytes()[:-900])
    (folder / "page.jpg").write_text("<html>")
    found = findings(folder)
    assert set(found) == {("cut.jpg", "unreadable"), ("page.jpg", "unreadable")}
    assert "truncated" in found["cut.jpg", "unreadable"].reason and "web page" in found["page.jpg", "unreadable"].reason


def test_what_a_disk_or_a_permission_holds_back_is_not_to_be_replaced(folder):
    (folder / "a.png").symlink_to("nowhere")
    finding = only(folder, "a.png", "unreadable")
    assert "No such file" in finding.reason and "permissions" in finding.remedy


def test_duplicates_are_named_with_what_they_are_duplicates_of(folder):
    captioned(folder / "z_resaved.bmp")
    (folder / "h_copy.png").write_bytes((folder / "good.png").read_bytes())
    (folder / "h_copy.txt").write_text("a dog")
    found = findings(folder)
    assert set(found) == {("h_copy.png", "duplicate"), ("z_resaved.bmp", "duplicate")}
    assert "is the same file as" in found["h_copy.png", "duplicate"].reason
    assert "has the same pixels as" in found["z_resaved.bmp", "duplicate"].reason
    assert all("good.png" in finding.reason for finding in found.values())


def test_sizes_that_train_badly_are_told(folder):
    captioned(folder / "tiny.png", 1, size=(32, 20))
    captioned(folder / "wide.png", 2, size=(500, 100))
    captioned(folder / "strip.png", 3, size=(2000, 100))
    found = findings(folder)
    assert set(found) == {("tiny.png", "enlarged"), ("wide.png", "extreme aspect"), ("strip.png", "extreme aspect")}
    assert "enlarged 3.2 times" in found["tiny.png", "enlarged"].reason
    assert "shows 20% of it" in found["wide.png", "extreme aspect"].reason
    assert found["strip.png", "extreme aspect"].reason.startswith("left out")
    too_small = findings(folder, minimum_image_size=48)["tiny.png", "too small"]
    assert too_small.reason.startswith("left out") and too_small.remedy.endswith("or lower minimum_image_size")
    assert ("wide.png", "extreme aspect") not in findings(folder, crop_aspect="preserve")


@pytest.mark.parametrize("resolution, remedy", [(64, "by a larger one"), (96, ", or lower resolution")])
def test_a_resolution_is_not_to_be_lowered_below_what_the_model_needs(folder, resolution, remedy):
    """An upscaler enlarges no image, and needs 64 px here."""
    captioned(folder / "tiny.png", 1, size=(40, 40))
    audited = audit_images(backend(folder, resolution=resolution), 8, enlarge=False, smallest=64)
    [finding] = [finding for finding in audited.findings if finding.file and finding.file.name == "tiny.png"]
    assert finding.kind == "too small" and finding.remedy.endswith(remedy)


def test_transparency_is_told_with_how_much_of_it_there_is(folder):
    for name, alpha in {"half": 0, "opaque": 255}.items():
        path = captioned(folder / f"{name}.png", len(name))
        image = Image.open(path).convert("RGBA")
        image.paste((255, 0, 0, alpha), (0, 0, 60, 100))
        image.save(path)
    palette = Image.open(captioned(folder / "palette.png", 9)).quantize(8)
    palette.save(folder / "palette.png", transparency=palette.getpixel((0, 0)))
    found = findings(folder)
    assert set(found) == {("half.png", "transparent"), ("palette.png", "transparent")}
    assert "50% of its pixels" in found["half.png", "transparent"].reason


def test_a_dataset_of_which_nothing_can_be_used_is_a_finding_not_an_error(folder):
    (folder / "good.txt").unlink()
    found = findings(folder)
    assert set(found) == {("good.png", "no caption"), (None, "unusable dataset")}
    (folder / "good.png").unlink()
    assert "holds no images" in only(folder, None, "unusable dataset").reason


KINDS = {
    "sound": lambda path, seed: captioned(path.with_suffix(".jpg"), seed),
    "no caption": lambda path, seed: picture(path.with_suffix(".png"), seed),
    "empty caption": lambda path, seed: captioned(path.with_suffix(".png"), seed, ""),
    "cut": lambda path, seed: (p := captioned(path.with_suffix(".jpg"), seed)).write_bytes(p.read_bytes()[:-900]),
    "cut header": lambda path, seed: (p := captioned(path.with_suffix(".png"), seed)).write_bytes(p.read_bytes()[:20]),
    "page": lambda path, seed: path.with_suffix(".jpg").write_text("<html>"),
    "nothing": lambda path, seed: path.with_suffix(".webp").write_bytes(b""),
    "strip": lambda path, seed: captioned(path.with_suffix(".png"), seed, size=(1500, 100)),
    "tiny": lambda path, seed: captioned(path.with_suffix(".png"), seed, size=(12, 12)),
    "small": lambda path, seed: captioned(path.with_suffix(".png"), seed, size=(60, 50)),
    "twin": lambda path, seed: captioned(path.with_suffix(".png"), 0),
    "dangling": lambda path, seed: path.with_suffix(".png").symlink_to("nowhere"),
}


@pytest.mark.parametrize("seed", range(12))
def test_used_and_left_out_are_what_was_found_and_what_training_uses(tmp_path, seed):
    draw = random.Random(seed)
    folder = tmp_path / "images"
    kinds = [draw.choice(list(KINDS)) for _ in range(draw.randint(1, 14))]
    for number, kind in enumerate(kinds):
        place = folder / draw.choice(["", "sub", "sub/deeper"])
        place.mkdir(parents=True, exist_ok=True)
        KINDS[kind](place / f"{number}", seed=number)
    strategy = draw.choice(["textfile", "filename"])
    keys = {"minimum_image_size": draw.choice([None, 16, 64]), "caption_strategy": strategy}
    audited = audit(folder, **keys)
    used = {record.path for record in audited.dataset.records}
    left_out = {entry.path for entry in audited.dataset.left_out}
    assert len(used) + len(left_out) == audited.found == len(kinds) and not used & left_out
    assert left_out == {finding.file for finding in audited.findings if finding.reason.startswith("left out")}
    try:
        planned, _ = scan_and_plan(backend(folder, **keys), 8)
        trained, _ = cache_pixels(planned, backend(folder, **keys))
    except DatasetError:
        assert not used
        return
    assert {record.path for record in trained.records} == used
    assert set(trained.left_out) == set(audited.dataset.left_out)
    assert audited.dataset.plans == trained.plans


# --- The whole of it, as a user types it


@pytest.fixture
def dogs(folder: Path, tmp_path: Path) -> Path:
    """A dataloader JSON of one dataset with a caption that is not read."""
    picture(folder / "line\nbreak ü.jpg", 1)
    (folder / "line\nbreak ü.caption").write_text("a cat")
    captioned(folder / "wide.png", 2, size=(200, 100))
    path = tmp_path / "dogs.json"
    entry = {"id": "dogs", "instance_data_dir": str(folder), "caption_strategy": "textfile", "repeats": 2}
    path.write_text(json.dumps([entry]), "utf-8")
    return path


def test_a_check_ends_before_weights_load_and_writes_only_the_index(trainer, dogs, tmp_path, capfd):
    weights = {"pretrained_model_name_or_path": "someone/their-if"}  # which is nowhere
    assert trainer(data_backend_config=dogs, check="table", **weights) == 0
    text = capfd.readouterr().out
    assert "no caption: 1" in text and "line\\nbreak ü.caption to line\\nbreak ü.txt" in text
    assert "1 finding\n" in text and "not looked at: whether captions are cut at 77 tokens" in text
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [
        path.name for path in (tmp_path / "cache").rglob("scan-*.jsonl")
    ]
    assert not (tmp_path / "output").exists()


def test_strict_turns_findings_into_an_exit_code_of_their_own(trainer, dogs, folder, capfd):
    assert trainer(data_backend_config=dogs, check="table", strict=True) == 6
    (folder / "line\nbreak ü.caption").rename(folder / "line\nbreak ü.txt")
    assert trainer(data_backend_config=dogs, check="table", strict=True) == 0
    assert "Nothing was found." in capfd.readouterr().out


def test_the_json_is_one_object_and_says_what_the_table_says(trainer, dogs, folder, tiny_model, capfd):
    flags = {"data_backend_config": dogs, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert trainer(**flags, check="json", max_train_steps=0, num_train_epochs=3) == 0
    content = json.loads(capfd.readouterr().out)
    [dataset], [finding] = content["datasets"], content["findings"]
    assert dataset | {"folder": ""} == {
        "id": "dogs", "folder": "", "found": 3, "used": 2, "left_out": 1, "enlarged": 0, "repeats": 2,
        "batches_per_epoch": 3, "buckets": {"64x64": 2}, "image_bytes": 3 * (77 * 64 + 128 * 64),
    }
    assert finding["file"].endswith("line\\nbreak ü.jpg") and finding["kind"] == "no caption" and finding["remedy"]
    assert (content["steps_per_epoch"], content["steps"], content["captions"]) == (2, 5, 1)
    width = json.loads((tiny_model / "text_encoder" / "config.json").read_text())["d_model"]
    assert content["caches"]["embed_bytes"] == 2 * 77 * width * 2, "the caption and the empty one"
    assert all("77 tokens" not in words for words in content["not_looked_at"])


def test_a_check_of_unusable_data_says_so_instead_of_failing(trainer, dogs, folder, capfd):
    for path in folder.glob("*.txt"):
        path.unlink()
    assert trainer(data_backend_config=dogs, check="json") == 0
    content = json.loads(capfd.readouterr().out)
    assert content["steps"] is None and content["datasets"][0]["used"] == 0
    assert "unusable dataset" in {finding["kind"] for finding in content["findings"]}


def test_the_standard_output_of_the_real_command_is_the_json_alone(dogs, tmp_path):
    command = [sys.executable, "train_sd2x.py", "--model_type=deepfloyd-lora", f"--data_backend_config={dogs}"]
    command += [f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'output'}", "--check", "json"]
    result = subprocess.run([*command, "--strict"], cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert result.returncode == 6, result.stderr
    assert len(json.loads(result.stdout)["findings"]) == 1


def test_strict_without_a_check_is_refused(trainer, capsys):
    assert trainer(strict=True) == 2
    assert "CHECK_STRICT" in capsys.readouterr().err
