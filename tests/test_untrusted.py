"""Files and texts of anyone: no code in them runs, nothing is written elsewhere, no log line or file name breaks."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.captions.cleaning import clean, erased_words
from helpers.captions.strategies import MissingCaption, captions_for
from helpers.config.families import DEEPFLOYD_I
from helpers.config.jsonfile import MAX_BYTES, MAX_DEPTH, load_json, read_json
from helpers.config.load import load_all, read_prompt_library
from helpers.config.problems import ConfigError
from helpers.data.audit import text_side
from helpers.files import printable
from helpers.models import loading
from helpers.models.errors import WeightsError
from helpers.models.families import SPECS
from helpers.models.results import AdapterError, load_adapter
from helpers.models.text import T5
from helpers.training import checkpoints
from helpers.training.checkpoints import CheckpointError
from helpers.validation.eval_images import choose
from helpers.validation.prompts import named_prompts

ROOT = Path(__file__).resolve().parents[1]
SPEC = SPECS[DEEPFLOYD_I.key]
CPU = torch.device("cpu")


class Malice:
    """Whatever unpickles one of these makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def poison(mark) -> bytes:
    return pickle.dumps(Malice(mark))


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_the_poison_of_these_tests_works(poison, mark):
    pickle.loads(poison)
    assert mark.is_dir()


# No pickle

def sources() -> list[Path]:
    return [path for folder in ("helpers", "examples") for path in sorted((ROOT / folder).rglob("*.py"))] + [
        ROOT / "train_sd2x.py"
    ]


PICKLES = re.compile(
    r"\b(torch\.(load|save|jit\.load|package)|pickle|cPickle|cloudpickle|joblib|dill|shelve|marshal|"
    r"(unsafe|full)_load|save_state|load_state\(|allow_pickle=True|safe_serialization=False|use_safetensors=False|"
    r"trust_remote_code=True|eval|exec|os\.system|shell=True)\b"
)


def test_our_own_code_has_nothing_that_unpickles_or_executes():
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            said = [*names, *(f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords)] if call else names
            wrong = [text for text in [*said, called] if PICKLES.fullmatch(text)]
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {text}" for text in wrong]
    assert found == []


def calls_of(*functions: str) -> list[str]:
    """Every call in the code of a function whose name ends so."""
    nodes = [node for path in sources() for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith(functions)]


def test_every_model_is_loaded_from_safetensors_only():
    calls = calls_of("Model.from_pretrained", "Pipeline.from_pretrained", "kind.from_pretrained")
    assert calls and all("use_safetensors=True" in call for call in calls), calls


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"])
def test_a_model_of_pickled_weights_is_refused_and_not_executed(trainer, model, mark, poison, capsys, name):
    (weights,) = (model / name).parent.glob("*.safetensors")
    weights.unlink()
    (model / name).write_bytes(poison)
    assert trainer(pretrained_model_name_or_path=model) == 2
    told = capsys.readouterr().err
    assert "MODEL_NAME" in told and Path(name).name in told and "must be converted first" in told
    assert not mark.exists()


def test_pickles_beside_the_weights_are_ignored_and_stay_behind(
    trainer, model, tmp_path, photos, mark, poison, dataloader
):
    names = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "tokenizer/tokenizer.pt", "evil.pkl"]
    data = Path(shutil.copytree(photos, tmp_path / "images"))
    (entry,) = json.loads(dataloader.read_text())
    dataloader.write_text(json.dumps([entry | {"instance_data_dir": str(data)}]))
    output = tmp_path / "output"
    places = [model / name for name in names] + [data / "0000.pt", data / "a.ckpt", data / "b.npy"]
    places += [output / name for name in ("checkpoint.pt", "optimizer.bin", "checkpoint-9.pt")]
    places += [tmp_path / "cache" / "embeds.pt"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(poison)
    flags = {"model_type": "deepfloyd-full", "lora_rank": None, "pretrained_model_name_or_path": model}
    assert trainer(**flags, max_train_steps=1) == 0
    assert trainer(**flags, max_train_steps=2) == 0
    assert not mark.exists()
    written = [path for path in (output / "pipeline").rglob("*") if path.is_file()]
    assert written and not [path for path in written if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_safetensors_file_that_is_a_pickle_is_refused(trainer, model, mark, poison, capsys, component):
    (weights,) = (model / component).glob("*.safetensors")
    weights.write_bytes(poison)
    assert trainer(pretrained_model_name_or_path=model) == 2
    told = capsys.readouterr().err
    assert "MODEL_NAME" in told and str(weights) in told and "no safetensors file" in told
    assert not mark.exists()


@pytest.mark.parametrize("shard", ["evil.bin", "../../evil.safetensors", "/etc/passwd", 3])
def test_a_list_of_shards_cannot_lead_to_a_pickle_or_elsewhere(model, mark, poison, shard):
    (weights,) = (model / "unet").glob("*.safetensors")
    names = list(load_file(weights))
    (model / "unet" / "evil.bin").write_bytes(poison)
    index = {"metadata": {}, "weight_map": {name: shard for name in names}}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="index.json names"):
        loading.check_weight_files(model, None, SPEC)
    assert not mark.exists()


def test_a_checkpoint_whose_state_is_a_pickle_is_refused(trainer, tmp_path, mark, poison, capsys):
    assert trainer(max_train_steps=1) == 0
    folder = tmp_path / "output" / "checkpoint-1"
    for name in (checkpoints.STATE, checkpoints.TENSORS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(poison)
        with pytest.raises(CheckpointError):
            checkpoints.load_state(folder)
        capsys.readouterr()
        assert trainer(max_train_steps=2) == 2
        assert "OUTPUT_DIR" in capsys.readouterr().err
        (folder / name).write_bytes(content)
    assert not mark.exists()


def test_an_adapter_that_is_a_pickle_is_refused(tmp_path, mark, poison):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(poison)
    (tmp_path / "other.bin").write_bytes(poison)
    for path in (tmp_path, tmp_path / "other.bin"):
        with pytest.raises(AdapterError, match="pickled file"):
            load_adapter(None, path)
    assert not mark.exists()


def test_a_tokenizer_brings_no_code_along_and_asks_nothing(model, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked at the console"))
    path = model / "tokenizer" / "tokenizer_config.json"
    (model / "tokenizer" / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    auto = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | auto))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        T5().load(model, CPU)
    assert text_side(T5(), str(model), None).length_of is None, "a check looks at the tokenizer too"
    assert not mark.exists()


def test_every_tokenizer_is_loaded_without_code_of_its_own():
    """Left open, transformers asks at the console, and runs it after a "y"."""
    calls = calls_of("AutoTokenizer.from_pretrained")
    assert calls and all("trust_remote_code=False" in call for call in calls), calls


@pytest.mark.parametrize("name", ["../private", "tokenizer/../../private", "{private}", "private"])
def test_a_list_of_components_cannot_lead_out_of_its_model(trainer, model, tmp_path, name):
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    path = model / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {name.format(private=private): ["diffusers", "UNet2DConditionModel"]}))
    flags = {"model_type": "deepfloyd-full", "lora_rank": None, "pretrained_model_name_or_path": model}
    assert trainer(**flags, max_train_steps=1) == 0
    output = tmp_path / "output"
    assert [file for file in output.rglob("*") if file.name == "key"] == []
    assert json.loads((output / "pipeline" / "model_index.json").read_text()).keys() == index.keys()


def test_a_text_encoder_that_is_an_adapter_of_another_one_is_refused(model):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/else"}
    (model / "text_encoder" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(WeightsError, match="merge it first"):
        loading.check(DEEPFLOYD_I, SPEC, model)


# JSON

DEEP = b"[" * 10_000 + b"]" * 10_000
BAD_JSON = {
    "100 MB": (None, "100.0 MB large, where at most 5 MB are read"),
    "10,000 deep": (DEEP, "deep in each other"),
    "10,000 deep in an object": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "deep in each other"),
    f"{MAX_DEPTH + 1} deep": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "deep in each other"),
    "open": (b"[" * 10_000, "deep in each other"),
    "a key twice": (b'{"a": 1, "b\\n": 2, "b\\n": 3}', 'key "b\\n" is there twice'),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no number"),
    "beyond a float": (b'{"a": 1e999}', "1e999 is too large"),
    "digits": (b'{"a": ' + b"9" * 100_000 + b"}", "a number of 100,000 digits"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 text, at byte 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "save it as UTF-8"),
    "half a pair": (b'{"a": "\\ud800"}', "half of a UTF-16 pair"),
    "empty": (b"", "not JSON"),
    "NUL": (b'{"a": "\0"}', "not JSON"),
    "words": (b"<html>", "not JSON"),
}


def write(path: Path, content: bytes | None) -> Path:
    if content is not None:
        path.write_bytes(content)
        return path
    with path.open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(100_000_000)
    return path


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused_in_words_quickly_and_in_little_memory(tmp_path, name):
    content, words = BAD_JSON[name]
    path = write(tmp_path / "any.json", content)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_json(path, "--config")
    taken, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (problem,) = caught.value.problems
    assert problem.startswith("--config") and words in problem and len(problem) < 400 and "\n" not in problem
    assert taken < 2 and peak < 50e6


def test_the_largest_file_that_is_read_takes_bounded_memory(tmp_path):
    path = write(tmp_path / "any.json", b"[" + b",".join([b"{}"] * (MAX_BYTES // 30)) + b"]")
    tracemalloc.start()
    assert len(load_json(path)) > 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 10 * peak < 300e6  # a tenth of the largest file, as full of objects as one can be


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    path = write(tmp_path / "any.json", b'\xef\xbb\xbf{"a": 1}')
    assert load_json(path) == {"a": 1}


def test_a_pipe_a_folder_and_no_path_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="--config.*not a regular file"):
        read_json(tmp_path / "pipe", "--config")
    with pytest.raises(ConfigError, match="--config.*cannot be read"):
        read_json(tmp_path, "--config")
    with pytest.raises(ConfigError, match="--config.*no such file"):
        read_json(Path("a\0b"), "--config")


# The files of a run, each with the words that say where it came from.
WRONG_TYPES = [b"null", b"3", b'"a"', b"[]", b"[[1]]", b"{}", b'{"a": [1]}', b'[{"a": {"b": []}}]']


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 80), "red").save(tmp_path / "images" / "a.png")
    return tmp_path / "images"


@pytest.mark.parametrize("option", ["CONFIG_FILE", "DATALOADER_CONFIG", "USER_PROMPT_LIBRARY"])
@pytest.mark.parametrize("name", BAD_JSON)
def test_a_bad_file_of_the_user_is_named_with_its_option(tmp_path, images, option, name):
    content, words = BAD_JSON[name]
    path, sound = write(tmp_path / "bad.json", content), tmp_path / "data.json"
    sound.write_text(json.dumps([{"id": "a", "instance_data_dir": str(images)}]))
    flags = {"CONFIG_FILE": "config", "DATALOADER_CONFIG": "data_backend_config"}
    given = {"data_backend_config": sound, flags.get(option, "validation_prompt_library"): path}
    with pytest.raises(ConfigError) as caught:
        load_all(["--model_type=deepfloyd-lora", *(f"--{flag}={value}" for flag, value in given.items())])
    (problem,) = caught.value.problems
    assert option in problem and str(path) in problem and words in problem


@pytest.mark.parametrize("content", WRONG_TYPES)
def test_json_of_a_wrong_type_is_refused_in_words(tmp_path, images, content):
    path = write(tmp_path / "bad.json", content)
    common = ["--model_type=deepfloyd-lora", f"--data_backend_config={path}"]
    with pytest.raises(ConfigError, match="bad.json"):
        load_all(common)
    if content != b"{}":
        with pytest.raises(ConfigError, match="bad.json"):
            load_all([*common, f"--config={path}"])
        with pytest.raises(ConfigError, match="needs one object of texts"):
            read_prompt_library(path)


def test_a_file_of_a_million_wrong_keys_is_refused_at_once(tmp_path):
    keys = write(tmp_path / "keys.json", json.dumps({f"k{i}": 1 for i in range(100_000)}).encode())
    entries = write(tmp_path / "entries.json", b"[" + b",".join([b'{"x":1}'] * 200_000) + b"]")
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_all(["--model_type=deepfloyd-lora", f"--config={keys}", f"--data_backend_config={entries}"])
    assert time.process_time() - began < 15 and len(str(caught.value)) < 30_000


MODEL_FILES = [
    "model_index.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.mark.parametrize("file", MODEL_FILES)
@pytest.mark.parametrize("content", [
    None, DEEP, b"[]", b"null", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1, "a": 2}', b"\xff", b"{",
])
def test_a_bad_file_of_a_model_is_named_before_anything_loads(model, file, content):
    write(model / file, content)
    with pytest.raises(WeightsError) as caught:
        loading.check(DEEPFLOYD_I, SPEC, model)
    assert "MODEL_NAME" in str(caught.value) and (file in str(caught.value) or "are not DeepFloyd" in str(caught.value))


@pytest.mark.parametrize("file, key, value", [
    ("unet/config.json", "block_out_channels", "wide"),
    ("unet/config.json", "block_out_channels", [4]),
    ("unet/config.json", "attention_head_dim", {"a": 1}),
    ("unet/config.json", "out_channels", None),
    ("unet/config.json", "act_fn", "evil"),
    ("unet/config.json", "_class_name", "os.system"),
    ("text_encoder/config.json", "num_layers", "two"),
    ("text_encoder/config.json", "d_ff", 7),
    ("scheduler/scheduler_config.json", "beta_schedule", "evil"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", "many"),
    ("scheduler/scheduler_config.json", "beta_start", -math.inf),
    ("tokenizer/tokenizer_config.json", "extra_ids", {}),
    ("tokenizer/tokenizer.json", "model", {"type": "evil"}),
])
def test_a_model_whose_values_make_no_sense_trains_or_is_refused(trainer, model, capsys, file, key, value):
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code = trainer(pretrained_model_name_or_path=model, max_train_steps=1)
    assert code == 0 or (code == 2 and "MODEL_NAME" in capsys.readouterr().err)


@pytest.fixture(scope="module")
def forgeries() -> list[bytes | None]:
    """States that this trainer does not write; those of the second kind, nearly."""
    near = [["since", {"list": [0, 0, 0, {"list": []}]}], ["options", {"dict": []}], ["data", {"dict": []}], ["processes", 1]]
    packed = [{"tensor": "1"}, {"dict": near}, {"dict": [*near, ["run", {"dict": []}]]}, {"dict": [*near, ["run", 1]]}, {"dict": []}]
    bad = [None, DEEP, b"[]", b'{"a": [1]}', b'{"dict": 1}', b'{"dict": [[1]]}', b"3", b"\xff", b'"a"']
    return bad + [json.dumps(state).encode() for state in packed]


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_bad_state_left_in_the_output_folder_is_refused(trainer, tmp_path, capsys, forgeries, with_manifest):
    folder = tmp_path / "output" / "checkpoint-1"
    for content in forgeries:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder / checkpoints.STATE, content)
        save_file({"0": torch.zeros(1)}, folder / checkpoints.TENSORS)
        if with_manifest:
            checkpoints._write_manifest(folder, 1)
        assert trainer(max_train_steps=2) == 2
        assert "OUTPUT_DIR" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    None, DEEP, b"[]", b'{"a": 1}', b'{"a": ["../../x"]}', b"\xff", b'{"a": ["x"], "a": []}',
])
def test_bad_eval_images_are_chosen_anew(tmp_path, content):
    write(tmp_path / "eval_images.json", content)
    assert choose([], [], 1, 0, tmp_path).images == {}
    assert isinstance(json.loads((tmp_path / "eval_images.json").read_text()), dict)


# Names and texts

NAMES = [
    "a/b", "../../escape", "/etc/passwd", "a\nb\r\x1b[2Jc", "it's \"quoted\"", "$(touch executed)", "`touch executed`",
    "🐈🏳️‍🌈" * 40, "-rf", "--help", "漢" * 300, "𠀀" * 300, "x" * 300, ".", "..", "~", "*[1]?", "", " ", "a\0b",
    "CON", "%s%n{0}",
    "</script><b>", "\u202egnp.exe", "\u2028", "\\..\\..", "#", "&& rm", "A", "a",
]


def test_names_of_files_are_made_of_any_text(tmp_path):
    named = named_prompts(None, {name: "prompt" for name in NAMES})
    assert len(named) == len(NAMES)
    for name in named:
        path = tmp_path / f"{name}_{name}_1024x1024.png" if len(name) < 110 else tmp_path / f"{name}_1024x1024.png"
        path.write_bytes(b"")
        assert path.parent == tmp_path and re.fullmatch(r"\w+", name)


def test_no_prompt_of_a_library_takes_anothers_place():
    key = named_prompts(None, {"A": "1", "a": "2"})
    (twin,) = set(key) - {"a"}
    assert sorted(named_prompts(None, {twin: "0", "A": "1", "a": "2"}).values()) == ["0", "1", "2"]


@pytest.mark.parametrize("name", NAMES)
def test_the_id_of_a_dataset_is_one_folder_of_the_cache_or_refused(tmp_path, images, name):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": name, "instance_data_dir": str(images)}]))
    cache = tmp_path / "cache"
    try:
        _, backends = load_all([f"--data_backend_config={path}", "--model_type=deepfloyd-lora", f"--cache_dir={cache}"])
    except ConfigError as error:
        (problem,) = error.problems
        assert '"id"' in problem and problem.isprintable() and len(problem) < 1000
        return
    (backend,) = backends.images
    backend.cache_dir.mkdir(parents=True)
    assert backend.cache_dir.parent == cache / "pixels" and backend.cache_dir.name == name
    assert name.isprintable() or "\u200d" in name or "\u202e" in name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["tracker_project_name", "tracker_run_name"])
def test_a_trackers_name_is_a_folder_of_the_logs_or_refused(tmp_path, images, option, name):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "a", "instance_data_dir": str(images)}]))
    try:
        resolved, _ = load_all([f"--data_backend_config={path}", "--model_type=deepfloyd-lora", f"--{option}={name}"])
    except ConfigError as error:
        assert f"--{option}" in str(error)
        return
    logs = tmp_path / "logs" / (getattr(resolved.config.run, option) or "run")
    logs.mkdir(parents=True)
    assert logs.resolve().parent == tmp_path / "logs"


def test_the_path_of_a_file_is_shown_on_one_line():
    assert printable("a\nb\x1b[2J\x9b\u2028\udcff🐈é") == "a\\nb\\x1b[2J\\x9b\\u2028\\xff🐈é"



@pytest.mark.parametrize("caption", [
    "x" * 1_000_000, "<b>" * 300_000, "<" * 500_000, "." * 500_000, "http://" * 100_000, "&amp;" * 100_000,
    "漢" * 300_000,
    "-" * 500_000, "word " * 200_000, "<!--" * 100_000, "\ufffd" * 100_000, "a\0b\x1b[2J", "🐈", "http://x.com", "a.jpg",
])
def test_cleaning_takes_any_caption_and_little_time(caption):
    clean("warm")
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cleaned = clean(caption)
    erased_words(caption, cleaned)
    assert time.process_time() - began < 3 and len(cleaned) <= 25_000


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"\n \n", b"x" * 1_000_001])
def test_a_caption_file_that_is_none_is_said_in_words(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MissingCaption, match="a.txt"):
        captions_for(tmp_path / "a.png", "textfile")


def test_a_whole_run_on_hostile_names_and_texts_stays_in_its_folders(trainer, tmp_path, capsys):
    inside = tmp_path / "in side"
    data = inside / "$(touch executed) 'images'"
    data.mkdir(parents=True)
    hostile = ["-rf", "a\nb\x1b[2J", "it's \"$(touch executed)\"", "🐈" * 50, "x" * 250, "..a", "*[1]?", "a;b&&c|d"]
    for place, name in enumerate(hostile):
        Image.new("RGB", (80, 80 + place), (place, 0, 0)).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(f"{name} \0 </b> $(touch executed) {'漢' * 50}\n", "utf-8")
    (data / "cut\nshort.png").write_bytes(b"\x89PNG\r\n")
    (data / os.fsdecode(b"\xff.png")).write_bytes(b"")
    path, library = tmp_path / "data.json", tmp_path / "prompts.json"
    path.write_text(json.dumps([{
        "id": "-🐈 $(touch executed) 'it'", "instance_data_dir": str(data), "caption_strategy": "textfile",
    }]))
    library.write_text(json.dumps({name: f"{name} {name}" for name in NAMES if "\0" not in name}))
    output = inside / "out\n$(touch executed) 🐈"
    code = trainer(
        data_backend_config=path, cache_dir=inside / "cache", output_dir=output, max_train_steps=1,
        report_to="tensorboard",
        tracker_project_name="$(touch executed) 🐈", tracker_run_name="-rf", validation_prompt="../../x\n" + "漢" * 300,
        validation_prompt_library=library, validation_num_inference_steps=1,
    )
    told = capsys.readouterr()
    assert code == 0, told.err
    assert {path.name for path in tmp_path.iterdir()} <= {"in side", "data.json", "prompts.json"}
    assert {path.name for path in inside.iterdir()} == {data.name, "cache", output.name}
    assert not list(ROOT.glob("executed*")) and not list(tmp_path.rglob("executed"))
    assert "\x1b" not in told.out and "failed" not in told.out + told.err
    left_out = json.loads((output / "left_out.json").read_text("utf-8"))
    assert len(next(iter(left_out.values()))) == 2
    json.loads((output / "run.json").read_text("utf-8"))
    names = [path.name for path in (output / "validation_images" / "step_1").glob("*_64x64.png")]
    assert len(names) == len(NAMES)
    assert list((output / "logs").rglob("events*"))


@pytest.mark.parametrize("value", [name for name in NAMES if "\0" not in name])
def test_the_line_that_train_sh_evaluates_holds_any_value(tmp_path, images, value):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "a", "instance_data_dir": str(images)}]))
    exports = {"MODEL_TYPE": "deepfloyd-lora", "DATALOADER_CONFIG": str(path), "VALIDATION_PROMPT": value}
    environ = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", **exports}
    script = f'cd {ROOT}; line=$("$PYTHON" -m helpers.config.env) || exit; cd {tmp_path}; eval "set -- $line"; '
    script += 'printf "%s\\0" "$@"'
    ended = subprocess.run(
        ["bash", "-c", script], env=environ, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    words = os.fsdecode(ended.stdout).split("\0")[:-1]
    given = [word.partition("=")[2] for word in words if word.startswith("--validation_prompt=")]
    assert given == ([value] if value.strip() else [])
    assert {entry.name for entry in tmp_path.iterdir()} == {"data.json", "images"}
