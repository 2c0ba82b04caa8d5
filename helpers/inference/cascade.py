"""The cascade at work: one stage after the other, all pictures through each, one component on the device at a time."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from helpers.config.inference import STAGES, is_file
from helpers.config.paths import portable
from helpers.config.problems import ConfigError
from helpers.files import printable
from helpers.images import loading as images
from helpers.images.geometry import covering, crop_box
from helpers.images.recipes import save_png
from helpers.inference import recipe as recipes
from helpers.inference.placement import MOST
from helpers.inference.plan import Batch, Group, Picture, Plan, text_place, told_as
from helpers.inference.recipe import Made, NotReplayable, Recipe, StageRecipe
from helpers.inference.safety import SafetyChecker, Watermark, fetch_switched_on
from helpers.inference.stages import Stage, decode, open_stage, sample, to_images
from helpers.inference.texts import Texts, give_back_memory
from helpers.models import bases
from helpers.models.fingerprints import fingerprint_file
from helpers.sizes import Size

DTYPE_WORDS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass
class Item:
    """A picture on its way through the stages.

    Attributes:
        group, index: the place of its group among the plan's, and its own in that.
        latents: what is still to be decoded.
        kept: what is not written before it was looked at, by the number of the stage that made it.
    """

    picture: Picture
    group: int
    index: int
    image: Image.Image | None = None
    latents: Tensor | None = None
    kept: dict[int, Image.Image] = field(default_factory=dict)


def render(plan: Plan, again: Recipe | None = None, tell: Callable[[str], None] = print) -> list[Path]:
    """Make all pictures of a plan; each is written as soon as the last stage has made it.

    Args:
        again: the recipe that the plan is of: of its pictures only the one is written.

    Returns:
        the files, those of the last stage last.

    Raises:
        WeightsError, AdapterError, NonFiniteEmbedding, NotReplayable, ConfigError: in words.
        DiskFull: there is no room for a picture; those before it are there.
    """
    gc.freeze()  # what is there already is no model of ours: looking through it takes half a second for each
    try:
        return _Cascade(plan, again, tell).run()
    except torch.OutOfMemoryError as error:
        words = f"found {plan.request.options.vram}, with which there was no room ({error}): type less, such as 6"
        raise ConfigError([f"--vram: {words}, or a smaller --size"]) from error
    finally:
        gc.unfreeze()


class _Cascade:
    def __init__(self, plan: Plan, again: Recipe | None, tell: Callable[[str], None]) -> None:
        self.plan, self.again, self.tell = plan, again, tell
        self.options = plan.request.options
        self.items = [
            Item(picture, number, index)
            for number, group in enumerate(plan.groups)
            for index, picture in enumerate(group.pictures)
        ]
        self.stages = plan.groups[0].stages  # of other groups only the sizes differ
        self.texts = Texts(self.stages, self.options.cache_dir)
        self.recipes: dict[str, StageRecipe] = {}
        self.written: list[Path] = []

    def run(self) -> list[Path]:
        prompts = [item.picture.prompt for item in self.items] + [self.options.negative_prompt]
        with told_as(self.stages[0].option):
            fetch_switched_on(self.stages[0].base, self.options.safety_checker, self.options.watermark)
        # All of it before anything is drawn: what cannot be had is not to be told after an hour.
        folders = [self._fetched(stage) for stage in self.stages]
        with told_as(self.stages[0].option):
            self.texts.encode(
                prompts, self.plan.device, lambda reader: text_place(reader.base, self.plan.budget), self.tell
            )
        for group in self.plan.groups:
            for item in (item for items in self._batches(group, 0) for item in items if item.picture.image):
                item.image = self._own_image(item)
        for number, (stage, folder) in enumerate(zip(self.stages, folders)):
            with told_as(stage.option):
                self._work(number, stage, folder)
        if self.options.safety_checker or self.options.watermark:
            with told_as(self.stages[0].option):
                self._last_look()
        return self.written

    def _own_image(self, item: Item) -> Image.Image:
        """The user's own image at the size that it goes in with.

        Raises:
            NotReplayable: it is gone, or another by now.
            ConfigError: its pixels are damaged.
        """
        start, path = self.plan.groups[item.group].start, item.picture.image
        if self.again and not (path.is_file() and fingerprint_file(path) == item.picture.content):
            raise NotReplayable(f"--replay: {printable(path)}, which the picture was made of, is gone or was changed.")
        with_excess = covering(images.inspect(path).size, start)
        box = crop_box(with_excess, start, "center")
        try:
            return Image.fromarray(images.load(path, with_excess)).crop(box)
        except images.Unreadable as error:
            raise ConfigError([f"--image: {printable(path)} {error.reason}"]) from error

    def _fetched(self, stage: Stage) -> Path:
        component = stage.base.spec.space.component
        with told_as(stage.option):
            folder = bases.fetch(stage.base, stage.variant, ("unet", component) if component else ("unet",))
            self._note(stage, folder)
        return folder

    def _work(self, number: int, stage: Stage, folder: Path) -> None:
        """Load a stage, have it make all pictures, and let go of it."""
        device, component = self.plan.device, stage.base.spec.space.component
        batches = [list(self._batches(group, number)) for group in self.plan.groups]
        by_groups = any(group.batches[number].unet.by_groups for group in self.plan.groups)
        pipeline = open_stage(stage, folder, device, self.plan.dtype, by_groups)
        pipeline.set_progress_bar_config(leave=False, desc="  steps")
        total = sum(len(items) for own in batches for items in own)
        with tqdm(total=total, desc=stage.option, unit="picture") as bar:
            for group, own in zip(self.plan.groups, batches):
                for items in own:
                    x = self._sampled(pipeline, group.stages[number], items)
                    for item, each in zip(items, x):
                        item.image, item.latents = (None, each) if component else (to_images(each[None])[0], None)
                    if not component:
                        self._finished(items, number)
                    bar.update(len(items))
        del pipeline
        give_back_memory(device)
        if component:
            self._decode(number, stage, folder)

    def _sampled(self, pipeline: Any, stage: Stage, items: Sequence[Item]) -> Tensor:
        prompts = self.texts.read(stage, [item.picture.prompt for item in items])
        negative = self.texts.read(stage, [self.options.negative_prompt]).expand_as(prompts)
        seeds = [seed_of(item.picture.seed, stage.option) for item in items]
        shown = [item.image for item in items] if stage.noise_level is not None else None
        return sample(pipeline, stage, prompts, negative, seeds, shown)

    def _decode(self, number: int, stage: Stage, folder: Path) -> None:
        """Have the VAE make pictures of latents, one at a time."""
        vae = stage.base.spec.space.load(folder, self.plan.device, stage.variant)
        items = [item for item in self.items if item.latents is not None]
        for item in tqdm(items, desc=f"{stage.option} VAE", unit="picture", leave=False):
            tiled = self.plan.groups[item.group].batches[number].vae.tiled
            (vae.enable_tiling if tiled else vae.disable_tiling)()
            [item.image] = to_images(decode(vae, item.latents))
            item.latents = None
            self._finished([item], number)
        del vae
        give_back_memory(self.plan.device)

    def _batches(self, group: Group, number: int) -> Iterator[list[Item]]:
        """The items of a group that a stage makes together; of a replay, those that the picture hangs on."""
        own = [item for item in self.items if self.plan.groups[item.group] is group]
        wanted = {self.again.index} if self.again else set(range(len(own)))
        for batch in reversed([batches.unet.batch for batches in group.batches[number:]]):
            wanted = {start + i for start in {at - at % batch for at in wanted} for i in range(batch)}
        size = group.batches[number].unet.batch
        for start in range(0, len(own), size):
            items = [item for item in own[start : start + size] if item.index in wanted]
            if items:
                yield items

    def _note(self, stage: Stage, folder: Path) -> None:
        """Remember what a stage is; of a replay, see that it is what it was.

        Raises:
            NotReplayable: it is not, and the user has not typed it.
        """
        model = recipes.fingerprints(stage, folder, self.texts.fingerprint(stage))
        adapters = recipes.adapter_fingerprints(stage)
        own = StageRecipe(stage=stage.option, model=model, adapters=adapters, size=str(stage.size), batch=1)
        self.recipes[stage.option] = own
        if self.again is None:
            return
        before = next((one for one in self.again.stages if one.stage == stage.option), own)
        for option, same, what in (
            (stage.option, before.model == model, f"the model {printable(stage.base.name)}"),
            (f"{stage.option}_lora", before.adapters == adapters, "an adapter"),
        ):
            if same:
                continue
            if option in self.plan.request.flags:
                self.tell(f"--{option}: {what} is another than the picture was made with: it will differ.")
                continue
            changed = [name for name in before.model if before.model[name] != model.get(name)]
            which = f" (its {', '.join(changed)})" if option == stage.option and changed else ""
            raise NotReplayable(
                f"--replay: {what}{which} is not what the picture was made with any more. Type --{option} with the one"
                " that it was, or with this one to see what comes of it."
            )

    def _finished(self, items: Sequence[Item], number: int) -> None:
        """Write what a stage made, if it is to be kept."""
        is_last = number == len(self.stages) - 1
        for item in items:
            wanted = self.again is None or item.index == self.again.index
            if wanted and (is_last or self.options.save_stages):
                looked_at = self.options.safety_checker or self.options.watermark
                if not looked_at:
                    self._write(item, number)
                else:  # kept until it was looked at
                    item.kept[number] = item.image

    def _last_look(self) -> None:
        """Black out what the safety checker names, put the watermark on, then write what was held back."""
        checker = SafetyChecker(self.stages[0].base, self.plan.device) if self.options.safety_checker else None
        named = [bool(checker and item.image and checker([item.image])[0]) for item in self.items]
        del checker
        give_back_memory(self.plan.device)
        mark = Watermark(self.stages[0].base) if self.options.watermark else None
        for item, black in zip(self.items, named):
            if black and item.kept:
                self.tell(f"The safety checker named the picture of seed {item.picture.seed}: it is black.")
            for number, image in item.kept.items():
                image = Image.new("RGB", image.size) if black else image
                item.image = mark(image) if mark and number == len(self.stages) - 1 else image
                self._write(item, number)

    def _write(self, item: Item, number: int) -> None:
        path = self._file(item, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(item.image, path, self._recipe(item, number).model_dump(exclude_none=True))
        self.written.append(path)

    def _file(self, item: Item, number: int) -> Path:
        output, picture = self.options.output, item.picture
        if is_file(output):
            return output
        return free_file(output, f"{picture.name}_{picture.seed}_{Size(*item.image.size)}")

    def _recipe(self, item: Item, number: int) -> Recipe:
        """How a stage's picture was made, with those that were made beside it."""
        group = self.plan.groups[item.group]
        begin = item.index - item.index % MOST
        together = group.pictures[begin : begin + MOST]
        stages = list(group.stages[: number + 1])
        made = [
            Made(
                name=one.name,
                prompt=one.prompt,
                seed=one.seed,
                image=portable(one.image.absolute(), whole=True) if one.image else None,
                content=one.content,
            )
            for one in together
        ]
        return Recipe(
            options=recipes.options_of(self.options, stages),
            pictures=made,
            index=item.index - begin,
            stages=[self._stage_recipe(stage, batch) for stage, batch in zip(stages, group.batches)],
            start=str(group.start) if group.start else None,
            dtype=DTYPE_WORDS[self.plan.dtype],
            device=recipes.device_name(self.plan.device),
            versions=recipes.versions(),
        )

    def _stage_recipe(self, stage: Stage, batch: Batch) -> StageRecipe:
        tiled = batch.vae is not None and batch.vae.tiled
        own = {"size": str(stage.size), "batch": batch.unet.batch, "tiled": tiled}
        return self.recipes[stage.option].model_copy(update=own)


def free_file(folder: Path, stem: str) -> Path:
    """A PNG's name that no file in the folder has yet."""
    path, count = folder / f"{stem}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.png"
    return path


def seed_of(seed: int, option: str) -> int:
    """The seed of a picture's noise in a stage: its own in the first, and of others one that has nothing in common.

    PyTorch's generators on the CPU look at 32 bits of it.
    """
    if option == STAGES[0]:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{option} {seed}".encode(), digest_size=4).digest())
