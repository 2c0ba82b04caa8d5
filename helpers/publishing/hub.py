"""Uploading to the Hugging Face hub what was trained: weights, model card, sample images, and nothing else."""

from __future__ import annotations

import os
import queue
import shlex
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from helpers.files import on_one_line
from helpers.training.accounts import hub_api, is_public, refusal
from helpers.training.checkpoints import weight_files

WAITING = ".uploads"
"""In the output folder: the weights of checkpoints that are still to be uploaded, by other names of the same files."""


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
        api = hub_api()
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

    def upload_result(self, folder: Path, patterns: tuple[str, ...], step: int) -> bool:
        """Upload what a training made. An error is told with the way to do it by hand; the result itself is safe.

        Args:
            patterns: what of the folder.
        """
        try:
            self.upload(folder, patterns, step)
        except NotPrivate:
            tqdm.write(
                f"{self.repository} is public by now, and HUB_PRIVATE (--hub_private) is true: nothing was uploaded."
            )
            return False
        except Exception as error:  # whatever it is, what was trained is on the disk
            words = f"{self.repository} could not be uploaded to: {refusal(error)}."
            tqdm.write(f"{words} {self.by_hand(folder, patterns)}")
            return False
        return True

    def by_hand(self, folder: Path, patterns: tuple[str, ...]) -> str:
        """What to tell of an upload that did not come to be."""
        words = ["hf", "upload", *(["--private"] if self.private else []), self.repository, str(folder), "."]
        words += [f"--include={pattern}" for pattern in patterns if "*" not in patterns]
        return f"Nothing is lost; to do it by hand:\n  {shlex.join(words)}"


def sweep(output: Path) -> None:
    """Delete what a run that was interrupted had still to upload: the checkpoints themselves are where they were."""
    shutil.rmtree(output / WAITING, ignore_errors=True)


class Uploads:
    """Uploads, one after the other: checkpoints while training goes on, then the result. One that fails is told.

    Their thread ends with the process: a run that is interrupted does not wait for it.
    """

    def __init__(self, hub: Hub, output: Path) -> None:
        self._hub, self._waiting = hub, output / WAITING
        self._queue: queue.Queue[Callable[[], object]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True, name="uploads").start()

    def add(self, checkpoint: Path) -> None:
        """Upload the weights of a checkpoint, which may be deleted meanwhile."""
        held = self._waiting / checkpoint.name
        shutil.rmtree(held, ignore_errors=True)
        try:
            for path in weight_files(checkpoint):
                other = held / path.relative_to(checkpoint)
                other.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, other)
                except OSError:  # a disk without such names
                    shutil.copy(path, other)
        except OSError as error:  # and without room: training goes on
            shutil.rmtree(held, ignore_errors=True)
            self._tell(checkpoint.name, str(error))
        else:
            self._queue.put(partial(self._upload, held))

    def finish(self, folder: Path, patterns: tuple[str, ...], step: int, stopped: Callable[[], bool]) -> bool:
        """Upload what a training made, once its checkpoints are there; returns whether it is there too.

        Args:
            patterns: what of the folder.
            stopped: whether to leave off, asked time and again.
        """
        repository, done = self._hub.repository, queue.Queue()
        tqdm.write(f"Uploading to {repository}: Ctrl-C leaves that off.")
        self._queue.put(lambda: done.put(self._hub.upload_result(folder, patterns, step)))
        uploaded = None
        while uploaded is None and not stopped():
            with suppress(queue.Empty):
                uploaded = done.get(timeout=0.2)
        shutil.rmtree(self._waiting, ignore_errors=True)
        if uploaded is None:
            tqdm.write(f"The upload to {repository} is left off. {self._hub.by_hand(folder, patterns)}")
        return bool(uploaded)

    def _work(self) -> None:
        while True:
            self._queue.get()()

    def _upload(self, held: Path) -> None:
        try:
            self._hub.upload(held, ("*",), int(held.name.rpartition("-")[2]), held.name)
        except Exception as error:  # whatever it is, training goes on
            self._tell(held.name, "the repository is public" if isinstance(error, NotPrivate) else refusal(error))
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def _tell(self, name: str, why: str) -> None:
        tqdm.write(on_one_line(f"{name} was not uploaded to {self._hub.repository}: {why}."))
