import pytest
import torch

from helpers.config.load import load
from helpers.training.assembly import precision_of, total_steps


def options(**values: object):
    return load(["--model_type=deepfloyd-lora", *(f"--{name}={value}" for name, value in values.items())]).config


@pytest.mark.parametrize(
    "values, frozen, trained, autocast",
    [
        ({"mixed_precision": "no"}, torch.float32, torch.float32, "no"),
        ({"mixed_precision": "bf16"}, torch.bfloat16, torch.float32, "bf16"),
        ({"mixed_precision": "bf16", "pure_bf16": True}, torch.bfloat16, torch.bfloat16, "no"),
    ],
)
def test_precision_says_what_is_kept_in_which_dtype(values, frozen, trained, autocast):
    precision = precision_of(options(**values).training)
    assert (precision.frozen, precision.trained, precision.autocast) == (frozen, trained, autocast)


@pytest.mark.parametrize(
    "values, batches, steps",
    [
        ({"max_train_steps": 100}, 7, 100),
        ({"num_train_epochs": 3}, 7, 21),
        ({"max_train_steps": 100, "num_train_epochs": 3}, 7, 21),
        ({"max_train_steps": 10, "num_train_epochs": 3}, 7, 10),
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 4}, 7, 6),
    ],
)
def test_a_run_ends_by_steps_or_epochs_whichever_comes_first(values, batches, steps):
    assert total_steps(options(**values).training, batches) == steps
