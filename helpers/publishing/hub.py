"""Uploading to the Hugging Face hub what was trained: weights, model card, sample images, and nothing else."""

from __future__ import annotations

import os
import queue
import shlex
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from tqdm import tqdm

from helpers.files import on_one_line
from helpers.models.adapters import Adapter
from helpers.models.bitfit import BIASES_FILE
from helpers.models.controlnet import CONTROLNET
from helpers.models.full import Full
from helpers.models.kohya import KOHYA_FILE
from helpers.models.lora import LORA_FILE
from helpers.publishing.card import README, SAMPLES
from helpers.training.accounts import is_public, refusal
from helpers.training.checkpoints import weight_files

WAITING = ".uploads"
"""In the output folder: the weights of checkpoints that are still to be uploaded, by other names of the same files."""

RESULTS = (LORA_FILE, KOHYA_FILE, BIASES_FILE, f"{CONTROLNET}/*")


class NotPrivate(Exception):
    """The repository is public, and was to be private."""


@dataclass(frozen=True)
class Hub:
    """A repository of the hub.

    Attributes:
        repository: owner/name.
        private: whether only its owner may see it.
    """

    repository: str
    private: bool

    def upload(self, folder: Path, patterns: tuple[str, ...], step: int, place: str = "") -> None:
        """Upload the files of a folder that fit, into the folder `place` of the repository, which is made if needed.

        Raises:
            NotPrivate: others could see them, and should not.
            Exception: whatever the hub, or the way to it, makes huggingface_hub raise.
        """
        api = HfApi()
        api.create_repo(self.repository, private=self.private, exist_ok=True)
        if self.private and is_public(self.repository):
            raise NotPrivate
        api.upload_folder(
            repo_id=self.repository,
            folder_path=folder,
            path_in_repo=place,
            allow_patterns=list(patterns),
            commit_message=f"FloydTuner: step {step:,}",
        )

    def upload_result(self, adapter: Adapter, folder: Path, step: int, samples: bool) -> bool:
        """Upload what a training made. An error is told with the way to do it by hand; the result itself is safe.

        Args:
            folder: see `card.folder_of`.
            samples: with sample images, of earlier trainings too.
        """
        tqdm.write(f"Uploading to {self.repository}.")
        patterns = ("*",) if isinstance(adapter, Full) else (README, *RESULTS)
        patterns += (f"{SAMPLES}/*",) if samples else ()
        try:
            self.upload(folder, patterns, step)
        except NotPrivate:
            tqdm.write(
                f"{self.repository} is public by now, and HUB_PRIVATE (--hub_private) is true: nothing was uploaded."
            )
            return False
        except Exception as error:  # whatever it is, what was trained is on the disk
            words = f"{self.repository} could not be uploaded to: {refusal(error)}."
            tqdm.write(f"{words} Nothing is lost; to do it by hand:\n  {self._by_hand(folder, patterns)}")
            return False
        return True

    def _by_hand(self, folder: Path, patterns: tuple[str, ...]) -> str:
        words = ["hf", "upload", *(["--private"] if self.private else []), self.repository, str(folder), "."]
        words += [f"--include={pattern}" for pattern in patterns if "*" not in patterns]
        return shlex.join(words)


class Uploads:
    """Uploads of checkpoints, one after the other, while training goes on. One that fails is told, and left out.

    Its thread ends with the process: a run that is interrupted does not wait for it.
    """

    def __init__(self, hub: Hub, output: Path) -> None:
        self._hub, self._waiting = hub, output / WAITING
        self._queue: queue.Queue[Path] = queue.Queue()
        shutil.rmtree(self._waiting, ignore_errors=True)
        threading.Thread(target=self._work, daemon=True, name="uploads").start()

    def add(self, checkpoint: Path) -> None:
        """Upload the weights of a checkpoint, which may be deleted meanwhile."""
        held = self._waiting / checkpoint.name
        shutil.rmtree(held, ignore_errors=True)
        for path in weight_files(checkpoint):
            other = held / path.relative_to(checkpoint)
            other.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, other)
            except OSError:  # a disk without such names
                shutil.copy(path, other)
        self._queue.put(held)

    def finish(self) -> None:
        """Wait until all are uploaded, or told to have failed."""
        if self._queue.unfinished_tasks:
            tqdm.write(f"Waiting for the last checkpoints to be uploaded to {self._hub.repository}.")
        self._queue.join()
        with suppress(OSError):
            self._waiting.rmdir()

    def _work(self) -> None:
        while True:
            held = self._queue.get()
            try:
                self._hub.upload(held, ("*",), int(held.name.rpartition("-")[2]), held.name)
            except Exception as error:  # whatever it is, training goes on
                why = "the repository is public" if isinstance(error, NotPrivate) else refusal(error)
                tqdm.write(on_one_line(f"{held.name} was not uploaded to {self._hub.repository}: {why}."))
            finally:
                shutil.rmtree(held, ignore_errors=True)
                self._queue.task_done()
