"""train.sh by real runs of bash, in a copy of the project whose trainer only says what it was told."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HARD = "a \"b\" 'c' $HOME `date` \\ * ;\n ünï漢字 -- #x\n"
TRAINER = """\
import json, os, sys, time
from helpers.config.load import as_json, load
if os.environ.get("STAND_IN") == "sleep":
    print(os.getpid(), flush=True)
    time.sleep(30)
resolved = load(sys.argv[1:], os.environ)
print(json.dumps({**as_json(resolved), "token": os.environ.get("HF_TOKEN"), "torch": "torch" in sys.modules}))
sys.exit(int(os.environ.get("STAND_IN", "0")))
"""


@pytest.fixture
def project(tmp_path):
    """A copy of what train.sh needs, with a trainer that prints its options."""
    for name in ("train.sh", "requirements.txt", "constraints.txt", "helpers/environment.sh", "helpers/__init__.py",
                 "helpers/files.py", "helpers/heartbeat.py", "helpers/launch.py", "helpers/libraries.py",
                 "helpers/sizes.py", "helpers/console.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "helpers/config", tmp_path / "helpers/config", ignore=shutil.ignore_patterns("*.pyc"))
    (tmp_path / "train_sd2x.py").write_text(TRAINER, encoding="utf-8")
    (tmp_path / "images").mkdir()
    (tmp_path / "multidatabackend_deepfloyd.json").write_text('[{"id": "a", "instance_data_dir": "images"}]')
    return tmp_path


def environ(**more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "SSL_CERT_FILE") if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def run(project: Path, *flags: str, env_file: str | None = None, **more: str) -> subprocess.CompletedProcess:
    if env_file is not None:
        (project / "sd2x-env.sh").write_text(env_file, encoding="utf-8")
    return subprocess.run(
        ["bash", str(project / "train.sh"), *flags], env=environ(**more), cwd="/", text=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=60, check=False, encoding="utf-8",
    )


def options(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["options"]


LORA = "export MODEL_TYPE=deepfloyd-lora\n"


def test_values_arrive_whatever_they_hold(project):
    (project / "prompt.txt").write_text(HARD, encoding="utf-8")
    body = LORA + "export VALIDATION_PROMPT=\"$(cat prompt.txt; printf x)\"\nVALIDATION_PROMPT=${VALIDATION_PROMPT%x}\n"
    result = run(project, "--validation_negative_prompt", HARD, f"--instance_prompt={HARD}", env_file=body)
    values = options(result)
    assert values["validation_prompt"] == values["validation_negative_prompt"] == values["instance_prompt"] == HARD


def test_bytes_arrive_in_a_locale_without_utf8(project):
    result = run(project, "--validation_prompt=ünï", env_file=LORA, LC_ALL="C")
    assert options(result)["validation_prompt"] == "ünï"


def test_precedence_and_sources(project):
    (project / "config.json").write_text('{"seed": 1, "lora_rank": 1, "lr_end": 1e-6, "train_batch_size": 1}')
    body = LORA + "export TRAINING_SEED=2 #@param {type:\"number\"}\nLORA_RANK=2 # plain\nexport LEARNING_RATE_END=\n"
    result = run(project, "--config", "config.json", "--seed=3", env_file=body, HF_TOKEN="secret")
    values, said = options(result), json.loads(result.stdout)
    assert [values[name] for name in ("seed", "lora_rank", "lr_end", "lora_dropout")] == [3, 2, 1e-6, 0.0]
    assert [said["sources"][name] for name in ("seed", "lora_rank", "lr_end", "lora_dropout")] == [
        "flag", "export LORA_RANK (sd2x-env.sh)", "config.json", "default",
    ]
    assert said["token"] == "secret" and not said["torch"]
    assert "--lora_rank=2" in result.stderr and "--seed=2" not in result.stderr


def test_another_env_file_and_paths_from_the_projects_root(project):
    (project / "my env.sh").write_text(LORA + 'BASE_DIR=runs\nexport OUTPUT_DIR="${BASE_DIR}/a b"\ncd /tmp; set -eu\n')
    values = options(run(project, env_file="exit 9", ENV_FILE="my env.sh"))
    assert values["output_dir"] == str(project / "runs/a b")


def test_an_env_file_may_begin_with_a_dash_and_hold_quotes(project):
    name = "-q $(touch executed) 'x'.sh"
    (project / name).write_text(LORA + "TRAINING_SEED=9\n")
    assert options(run(project, ENV_FILE=name))["seed"] == 9
    (project / name).write_text(LORA + "TRAINING_SEED=9\r\n")
    assert "Windows line ends" in run(project, ENV_FILE=name).stderr
    assert not (project / "executed").exists()


def test_config_json_alone_is_found(project):
    (project / "config.json").write_text('{"model_family": "deepfloyd", "seed": 1}')
    assert options(run(project))["seed"] == 1


def test_neither_file_nor_flags_says_both_ways(project):
    result = run(project)
    assert result.returncode == 2
    assert "sd2x-env.sh" in result.stderr and "--config config.json" in result.stderr and "--demo" in result.stderr


@pytest.mark.parametrize("body, words", [
    ("export LEARNING_RATE_END=abc", '--lr_end (export LEARNING_RATE_END, key "lr_end"): found \'abc\', needs a num'),
    ("export VALIDATION_STEP=5", "export VALIDATION_STEP: not an option; did you mean VALIDATION_STEPS?"),
    ("VALIDATION_STEP=5", "did you mean VALIDATION_STEPS?"),
    ("LEARNING_RATE = 4e-5\nexport LORA_RANK=8", "near line 2: LEARNING_RATE = 4e-5"),
    ("export LORA_RANK=(8", "a command in it failed"),
    ("export LORA_RANK=8\r", "Windows line ends"),
])
def test_a_wrong_env_file_stops_before_the_trainer(project, body, words):
    result = run(project, env_file=LORA + body + "\n")
    assert result.returncode == 2 and result.stdout == ""
    assert words in result.stderr


def test_a_wrong_flag_and_a_wrong_outer_name_stop_too(project):
    result = run(project, "--lr_ned=1", env_file=LORA, VALIDATION_STEP="5", SEED="1")
    assert result.returncode == 2 and result.stdout == ""
    assert "did you mean --lr_end?" in result.stderr and "did you mean VALIDATION_STEPS?" in result.stderr


def test_a_missing_env_file_is_named(project):
    result = run(project, ENV_FILE="none.sh")
    assert result.returncode == 2 and "none.sh" in result.stderr


@pytest.mark.parametrize("code", ["0", "3"])
def test_the_exit_code_is_the_trainers(project, code):
    assert run(project, env_file=LORA, STAND_IN=code).returncode == int(code)


def test_the_trainer_takes_the_shells_place_so_that_signals_reach_it(project):
    (project / "sd2x-env.sh").write_text(LORA)
    command, silent = ["bash", str(project / "train.sh")], subprocess.DEVNULL
    with subprocess.Popen(command, env=environ(STAND_IN="sleep"), stdout=subprocess.PIPE, stderr=silent) as run:
        assert int(run.stdout.readline()) == run.pid
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=10) == -signal.SIGTERM


def test_the_demo_runs_its_own_env_file_with_flags_behind_it(project):
    demo = project / "examples/demo"
    demo.mkdir(parents=True)
    (demo / "sd2x-env.sh").write_text(LORA + "export TRAINING_SEED=5\n")
    (demo / "sd2x-env-other.sh").write_text(LORA + "export TRAINING_SEED=6\n")
    assert options(run(project, "--demo", "--lora_rank=3", env_file="exit 9"))["seed"] == 5
    assert options(run(project, "--demo", "other"))["seed"] == 6
    assert "there is no such demo" in run(project, "--demo", "none").stderr


@pytest.mark.parametrize("typed, words", [
    ("--lora_rank=3 --demo", "./train.sh --demo --lora_rank=3"),
    ("--lora_rank 3 --demo other --dry_run", "./train.sh --demo other --lora_rank 3 --dry_run"),
    ("--validation_prompt='a cat' --demo", r"./train.sh --demo --validation_prompt=a\ cat"),
    ("--demo other --seed=1 --demo", "./train.sh --demo other --seed=1"),
])
def test_a_demo_typed_late_is_answered_with_a_command_that_works(project, typed, words):
    demo = project / "examples/demo"
    demo.mkdir(parents=True)
    for name in ("sd2x-env.sh", "sd2x-env-other.sh"):
        (demo / name).write_text(LORA)
    result = run(project, *shlex.split(typed))
    assert result.returncode == 2 and result.stderr.endswith(f": {words}\n")
    assert run(project, *shlex.split(words)[1:]).returncode == 0


def test_help_prints_the_table(project):
    result = run(project, "--help")
    assert result.returncode == 0
    assert "--lr_end" in result.stdout and "LEARNING_RATE_END" in result.stdout
