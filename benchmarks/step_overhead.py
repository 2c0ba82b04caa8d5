#!/usr/bin/env python3
"""How much this project's training step costs beyond a bare loop: same UNet, batch and optimizer, in one run.

    python -m benchmarks.step_overhead [--steps 20] [--rounds 5] [--output FILE]

The bare loop noises a batch that is already a tensor, runs the UNet, its loss and AdamW, and nothing else. Ours reads
each batch from the caches, clips, sets the rate, logs and draws the progress bar. The two take turns, so that a busy
machine slows both alike; the overhead is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from examples.demo.draw import write as draw_pictures
from helpers import trainer
from helpers.config.backends import load_backends
from helpers.config.load import load
from helpers.data import preparation
from helpers.diffusion.noising import add_noise
from helpers.models.families import SPECS
from helpers.training import assembly, loop
from helpers.training.loop import Run

ROOT = Path(__file__).resolve().parents[1]
