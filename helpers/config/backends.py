"""The dataloader JSON: an array of datasets and of folders for their text embeds, typed and checked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from helpers.config.checks import resolution_problem
from helpers.config.jsonfile import read_json
from helpers.config.options import (
    LONGEST_FOLDER,
    ROWS,
    CaptionStrategy,
    Config,
    DownsampleMethod,
    Extent,
    FromRoot,
    Group,
    Real,
    ResolutionType,
    Switch,
    Text,
    Whole,
    folder_name,
)
from helpers.config.problems import MOST_PROBLEMS, ConfigError, did_you_mean, found, invalid_values, key_name

REFUSED: Mapping[tuple[str, str], str] = MappingProxyType({
    ("type", "aws"): "only local folders are read: download it and type local",
    ("type", "csv"): "only local folders are read: download it and type local",
    ("type", "huggingface"): "only local folders are read: download it and type local",
    ("caption_strategy", "parquet"): ROWS["caption_strategy"].refused["parquet"],
    ("crop_style", "face"): "needs a face detector, which is not offered: type center, or crop around faces beforehand",
    ("dataset_type", "image_embeds"): "pixels are cached without it: remove the entry",
    ("dataset_type", "eval"): "validation draws prompts, or upscales images of the other datasets: remove the entry",
})
"""Values that users are known to try, with what to do instead."""


@dataclass(frozen=True)
class AspectBucket:
    """An aspect ratio (width / height) that random crops may have, and how often relative to the others."""

    aspect: float
    weight: float = 1.0


def _to_aspects(value: object) -> tuple[AspectBucket, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError('a list of aspect ratios like [1.0, 0.75] or [{"aspect": 1.0, "weight": 2}]')
    return tuple(entry if isinstance(entry, AspectBucket) else _to_aspect(entry) for entry in value)


def _to_aspect(entry: object) -> AspectBucket:
    fields = entry if isinstance(entry, dict) else {"aspect": entry}
    numbers = [v for v in fields.values() if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0]
    if len(numbers) != len(fields) or not {"aspect"} <= set(fields) <= {"aspect", "weight"}:
        raise ValueError(f'aspect ratios above 0, like 0.75 or {{"aspect": 0.75, "weight": 2}}, not {found(entry)}')
    return AspectBucket(**{name: float(number) for name, number in fields.items()})


Aspects = Annotated[tuple[AspectBucket, ...], BeforeValidator(_to_aspects, json_schema_input_type=list[Any])]


def _inherited(name: str, **limits: float) -> Any:
    """A key that overrides the flag of the same name."""
    row = ROWS[name]
    return Field(row.field.default, description=f"{row.field.description} Overrides --{name}.", **limits)


class ImageBackend(Group):
    """A folder of images with captions, and how they are prepared. Every value is resolved.

    Sizes are pixels of an edge, or megapixels where `resolution_type` is "area". `cache_dir` (key `cache_dir_vae`) is
    the folder of its pixels or latents; `text_embeds` the id of a `TextEmbedsBackend`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    id: Text = Field(description="Unique name of the dataset.")
    type: Literal["local"] = Field("local", description="Where the images lie: in a local folder.")
    dataset_type: Literal["image"] = Field("image", description="What the entry is: a dataset of images.")
    disabled: Switch = Field(False, description="Leave the dataset out. `disable` says the same.")
    instance_data_dir: FromRoot = Field(description="The folder of images; it is only read.")
    cache_dir: FromRoot = Field("", alias="cache_dir_vae", validate_default=False, description=(
        "Folder of the cached pixels or latents; default: pixels/<id>, or latents/<id>, in --cache_dir."))
    crop: Switch = Field(True, description="Crop to the target size; false: keep the aspect, trim centred.")
    crop_aspect: Literal["square", "preserve", "random"] = Field(
        "square", description="The aspect of crops: square, the image's own, or drawn from crop_aspect_buckets.")
    crop_aspect_buckets: Aspects = Field((), description=(
        'Aspects (width / height) of random crops: `[1.0, 0.75]`, or `[{"aspect": 1.0, "weight": 2}, ...]`.'))
    crop_style: Literal["random", "center", "centre", "corner"] = Field(
        "random", description="Where a crop is taken.")
    resolution: Extent = _inherited("resolution", gt=0)
    resolution_type: ResolutionType = _inherited("resolution_type")
    minimum_image_size: Extent | None = _inherited("minimum_image_size", gt=0)
    maximum_image_size: Extent | None = _inherited("maximum_image_size", gt=0)
    target_downsample_size: Extent | None = _inherited("target_downsample_size", gt=0)
    aspect_bucket_rounding: Whole = _inherited("aspect_bucket_rounding", ge=1, le=9)
    downsample_method: DownsampleMethod = _inherited("downsample_method")
    caption_strategy: CaptionStrategy = _inherited("caption_strategy")
    instance_prompt: Text | None = _inherited("instance_prompt")
    prepend_instance_prompt: Switch = Field(False, description="Put instance_prompt and a space before each caption.")
    only_instance_prompt: Switch = Field(False, description="Use instance_prompt in place of every caption.")
    repeats: Whole = Field(0, ge=0, description="How many more times an epoch sees each image: 0 is once, 1 twice.")
    probability: Real = Field(1.0, gt=0, description="Weight in drawing which dataset the next batch comes from.")
    text_embeds: Text = Field("", description="Id of the text_embeds entry to use; default: the default one.")
    conditioning_data: Text = Field("", description=(
        "With a ControlNet: id of the conditioning entry with the pictures that go with these images; default, for an "
        "only dataset: the only one."))


class ConditioningBackend(Group):
    """A folder of conditioning images, which a ControlNet is shown beside the images of the same names.

    They are brought to size and cropped as their images; `cache_dir` is the folder of their pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text = Field(description="Unique name of the conditioning images.")
    type: Literal["local"] = Field("local", description="Where they lie: in a local folder.")
    dataset_type: Literal["conditioning"] = Field(description="What the entry is: conditioning images of a dataset.")
    disabled: Switch = Field(False, description="Leave the entry out. `disable` says the same.")
    instance_data_dir: FromRoot = Field(description=(
        "The folder; it is only read. `a/b.png` in it belongs to the image `a/b.jpg` of the dataset's folder."))
    cache_dir: FromRoot = Field("", validate_default=False, description=(
        "Folder of their cached pixels; default: conditioning/<id> in --cache_dir."))


class TextEmbedsBackend(Group):
    """A folder that text embeds are cached in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text = Field(description="Unique name of the cache.")
    type: Literal["local"] = Field("local", description="Where the cache lies: in a local folder.")
    dataset_type: Literal["text_embeds"] = Field(description="What the entry is: a folder of text embeds.")
    disabled: Switch = Field(False, description="Leave the entry out. `disable` says the same.")
    default: Switch = Field(False, description="Used by the datasets that name none; an only one is the default.")
    cache_dir: FromRoot = Field("", validate_default=False, description="The folder; default: text in --cache_dir.")


@dataclass(frozen=True)
class Backends:
    """The enabled entries of a dataloader JSON, in its order; at least one of images, and one of text embeds.

    With a ControlNet, and only then, each of the images names one of `conditioning`.
    """

    images: tuple[ImageBackend, ...]
    text_embeds: tuple[TextEmbedsBackend, ...]
    conditioning: tuple[ConditioningBackend, ...] = ()

    def conditioning_of(self, image: ImageBackend) -> ConditioningBackend | None:
        """The conditioning images of a dataset; None where no ControlNet is trained."""
        return next((entry for entry in self.conditioning if entry.id == image.conditioning_data), None)


Backend = ImageBackend | ConditioningBackend | TextEmbedsBackend
KINDS: Mapping[object, type[Backend]] = MappingProxyType({
    "conditioning": ConditioningBackend, "text_embeds": TextEmbedsBackend,
})
"""By `dataset_type`; anything else is an entry of images."""


def load_backends(path: Path, config: Config, refused: AbstractSet[str] = frozenset()) -> Backends:
    """Read a dataloader JSON; keys that an entry lacks come from the flags of the same name.

    Args:
        refused: options whose values are wrong: what an entry inherits from them is not held against it.

    Raises:
        ConfigError: with all problems, each naming the file, the entry's id and the key.
    """
    entries = read_json(path, ROWS["data_backend_config"].label)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError([f'{path}: needs an array of objects: [{{"id": ..., "instance_data_dir": ...}}]'])
    problems = _id_problems(entries)
    parsed = []
    for place, entry in enumerate(entries, start=1):
        parsed.append(_parse(entry, place, config, refused, problems))
        if len(problems) > MOST_PROBLEMS:  # no more are shown, and there may be a million entries
            break
    enabled = [item for item in parsed if item is not None and not item.disabled]
    images = [item for item in enabled if isinstance(item, ImageBackend)]
    texts = [item for item in enabled if isinstance(item, TextEmbedsBackend)]
    conditioning = [item for item in enabled if isinstance(item, ConditioningBackend)]
    if not images and not problems:
        problems.append("there is no dataset of images that is not disabled: add one with instance_data_dir")
    texts = texts or [_implicit_texts(config)]
    problems += _default_problems(texts)
    images = [_with_text_embeds(image, texts, problems) for image in images]
    if not refused & {"controlnet", "model_type"} and len(parsed) == len(entries) and None not in parsed:
        images = _with_conditioning(images, conditioning, config.training.controlnet, problems)
    if problems:
        raise ConfigError([f"{path.name}, {problem}" for problem in problems])
    return Backends(tuple(images), tuple(texts), tuple(conditioning))


def _place(entry_id: object) -> str:
    return f"entry {found(entry_id)}, "


def _id_problems(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = Counter(entry["id"] for entry in entries if isinstance(entry.get("id"), str))
    return [
        f'{_place(entry_id)}key "id": {count} entries have it, give each its own'
        for entry_id, count in counts.items() if count > 1
    ]


def _parse(
    entry: Mapping[str, Any], place: int, config: Config, refused: AbstractSet[str], problems: list[str]
) -> Backend | None:
    """The typed entry, or None with what is wrong added to `problems`."""
    where = _place(entry["id"]) if isinstance(entry.get("id"), str) else f"entry number {place}, "
    kind = entry.get("dataset_type")
    model = KINDS.get(kind, ImageBackend) if isinstance(kind, str) else ImageBackend
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    own, words = _own_values(entry, fields)
    inherited = {name: getattr(config.data, name) for name in fields if name in _FLAGS_OF_DATA}
    defaults = _default_folder(model, own["id"], config) if _names_a_folder(own.get("id")) else {}
    item, wrong = _validated(model, own, {**defaults, **inherited})
    words += [f'key "{key}": {sentence}' for key, sentence in wrong.items()]
    if isinstance(item, (ImageBackend, ConditioningBackend)) and not item.disabled:
        unsure = set(wrong) | (refused - set(own))
        seen = [*_folder_problems(item, config), *(_image_problems(item, config) if model is ImageBackend else ())]
        words += [sentence for keys, sentence in seen if not keys & unsure]
    problems += [where + sentence for sentence in words]
    return item


def _validated(
    model: type[Backend], own: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[Backend | None, dict[str, str]]:
    """The entry made of the values that are right (None if it cannot be), and what is wrong with the others."""
    try:
        return model.model_validate({**defaults, **own}), {}
    except ValidationError as error:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        wrong = _value_problems(error, fields)
        possible = all(key in own and not fields[key].is_required() for key in wrong)
        right = {key: value for key, value in own.items() if key not in wrong}
        return model.model_validate({**defaults, **right}) if possible else None, wrong


_FLAGS_OF_DATA = tuple(name for name, row in ROWS.items() if row.group == "data" and name != "cache_dir")


def _own_values(entry: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> tuple[dict[str, Any], list[str]]:
    """An entry's values by key, null counting as absent, and its unknown keys."""
    own = {key: value for key, value in entry.items() if value is not None}
    words = []
    if "disable" in own:
        disable = own.pop("disable")
        if own.setdefault("disabled", disable) != disable:
            words.append(f'key "disable": found {found(disable)} beside the opposite "disabled": remove one')
    unknown = [key for key in own if key not in fields]
    for key in unknown[:MOST_PROBLEMS]:
        hint = did_you_mean(key, fields) or f"; known: {', '.join(fields)}"
        words.append(f"key {key_name(key)}: not known here{hint}")
    return {key: value for key, value in own.items() if key in fields}, words


def _names_a_folder(entry_id: object) -> bool:
    try:
        return isinstance(entry_id, str) and bool(folder_name(entry_id))
    except ValueError:
        return False


def _default_folder(model: type[Backend], entry_id: object, config: Config) -> dict[str, str]:
    if model is TextEmbedsBackend:
        return {"cache_dir": str(config.data.cache_dir / "text")}
    if model is ConditioningBackend:
        return {"cache_dir": str(config.data.cache_dir / "conditioning" / str(entry_id))}
    kind = "latents" if config.family.pixels_per_latent else "pixels"
    return {"cache_dir_vae": str(config.data.cache_dir / kind / str(entry_id))}


def _value_problems(error: ValidationError, fields: Mapping[str, FieldInfo]) -> dict[str, str]:
    missing = [item["loc"][0] for item in error.errors() if item["type"] == "missing"]
    tried = {str(item["loc"][0]): str(item["input"]).lower() for item in error.errors()}
    words = {}
    for key, sentence in invalid_values(error, fields).items():
        if key in missing:
            sentence = f"is not set: {fields[key].description}"
        elif (key, tried[key]) in REFUSED:
            sentence = f"found {found(tried[key])}; {REFUSED[key, tried[key]]}"
        words[key] = sentence
    return words


def _folder_problems(
    entry: ImageBackend | ConditioningBackend, config: Config
) -> Iterator[tuple[set[str], str]]:
    """What is wrong with an entry's folders: the keys that were looked at, and the words."""
    if not _names_a_folder(entry.id):
        words = f"it names a folder of the cache, so it needs letters, at most {LONGEST_FOLDER} bytes, and no slashes"
        yield {"id"}, f'key "id": {words} or line breaks'
    folder = entry.instance_data_dir
    if not os.path.isdir(folder):
        reason = "which is a file" if os.path.exists(folder) else "which does not exist"
        words = f"found {found(str(folder))}, {reason}: type the folder of your images"
        yield {"instance_data_dir"}, f'key "instance_data_dir": {words}'
    elif Path(os.path.realpath(config.run.output_dir)).is_relative_to(os.path.realpath(folder)):
        output = f"{ROWS['output_dir'].label}, {found(str(config.run.output_dir))}"
        words = f"found {found(str(folder))}, which holds {output}: the run's own pictures would be trained on, so name"
        words += " an output folder outside of it"
        yield {"instance_data_dir", "output_dir"}, f'key "instance_data_dir": {words}'


def _image_problems(image: ImageBackend, config: Config) -> Iterator[tuple[set[str], str]]:
    """What else is wrong between the keys of an entry of images."""
    words = resolution_problem(image.resolution, image.resolution_type, config)
    if words:
        yield {"resolution", "resolution_type", "model_type"}, f'key "resolution": {words}'
    if (image.crop_aspect == "random") != bool(image.crop_aspect_buckets):
        yield {"crop_aspect", "crop_aspect_buckets"}, (
            f'key "crop_aspect_buckets": found {len(image.crop_aspect_buckets)} aspects beside crop_aspect '
            f"{image.crop_aspect!r}: they need crop_aspect random, and random needs at least one"
        )
    yield from _size_problems(image)
    yield from _prompt_problems(image)


def _size_problems(image: ImageBackend) -> Iterator[tuple[set[str], str]]:
    maximum, target = image.maximum_image_size, image.target_downsample_size
    pair = {"maximum_image_size", "target_downsample_size"}
    if maximum is None and target is None:
        return
    if maximum is None or target is None:
        lacking = "maximum_image_size" if maximum is None else "target_downsample_size"
        yield pair, f'key "{lacking}": is not set, but "{(pair - {lacking}).pop()}" needs it: set both or none'
        return
    found_words = f'key "target_downsample_size": found {target:g}, needs at'
    if target > maximum:
        yield pair, f'{found_words} most "maximum_image_size", {maximum:g}'
    if target < image.resolution:
        yield {*pair, "resolution"}, f'{found_words} least "resolution", {image.resolution:g}'


def _prompt_problems(image: ImageBackend) -> Iterator[tuple[set[str], str]]:
    wanted = {
        "prepend_instance_prompt": image.prepend_instance_prompt,
        "only_instance_prompt": image.only_instance_prompt,
        "caption_strategy": image.caption_strategy == "instanceprompt",
    }
    wanting = [key for key, on in wanted.items() if on]
    if wanting and not (image.instance_prompt or "").strip():
        words = f'is not set or empty, but "{wanting[0]}" needs one: type your prompt'
        yield {"instance_prompt", *wanted}, f'key "instance_prompt": {words}'


def _implicit_texts(config: Config) -> TextEmbedsBackend:
    folder = config.data.cache_dir / "text"
    return TextEmbedsBackend(id="text-embeds", dataset_type="text_embeds", default=True, cache_dir=folder)


def _default_problems(texts: Sequence[TextEmbedsBackend]) -> list[str]:
    defaults = [text.id for text in texts if text.default]
    if len(defaults) > 1:
        return [f'key "default": {", ".join(found(name) for name in defaults)} are all the default: leave it to one']
    if len(texts) > 1 and not defaults:
        return ['key "default": of several text_embeds entries none is the default: set it to true for one']
    return []


def _with_text_embeds(
    image: ImageBackend, texts: Sequence[TextEmbedsBackend], problems: list[str]
) -> ImageBackend:
    """`image` with the id of the embed cache that it uses."""
    ids = [text.id for text in texts]
    if image.text_embeds and image.text_embeds not in ids:
        hint = did_you_mean(image.text_embeds, ids) or f"; there is {', '.join(found(name) for name in ids)}"
        problems.append(f'{_place(image.id)}key "text_embeds": found {found(image.text_embeds)}, no such entry{hint}')
    default = next((text.id for text in texts if text.default), ids[0])
    return image.model_copy(update={"text_embeds": image.text_embeds or default})


def _with_conditioning(
    images: Sequence[ImageBackend],
    conditioning: Sequence[ConditioningBackend],
    is_trained: bool,
    problems: list[str],
) -> list[ImageBackend]:
    """`images` with the ids of their conditioning images, which all have where a ControlNet is trained, else none."""
    option = ROWS["controlnet"].label
    if not is_trained:
        only = f"which only a ControlNet is shown: set {option} to true"
        problems += [
            f'{_place(entry.id)}key "dataset_type": found "conditioning", {only}, or disabled to true'
            for entry in conditioning
        ] + [
            f'{_place(image.id)}key "conditioning_data": found {found(image.conditioning_data)}, {only}, or remove it'
            for image in images if image.conditioning_data
        ]
        return list(images)
    if not conditioning:
        problems.append(
            f"{option} is true, but there are no conditioning images: add an entry with dataset_type conditioning,"
            " whose instance_data_dir has a picture of the same name for each image, or set it to false"
        )
        return list(images)
    wrong: list[str] = []
    named = [_with_its_conditioning(image, conditioning, len(images) == 1, wrong) for image in images]
    used = {image.conditioning_data for image in named}
    problems += wrong or [
        f"{_place(entry.id)}no dataset names it: set conditioning_data of one to {found(entry.id)}, or disabled to true"
        for entry in conditioning if images and entry.id not in used
    ]
    return named


def _with_its_conditioning(
    image: ImageBackend, conditioning: Sequence[ConditioningBackend], is_only: bool, problems: list[str]
) -> ImageBackend:
    entries = {entry.id: entry for entry in conditioning}
    name = image.conditioning_data or (conditioning[0].id if is_only and len(entries) == 1 else "")
    where, there = f'{_place(image.id)}key "conditioning_data": ', ", ".join(map(found, entries))
    if not name:
        problems.append(f"{where}is not set, and a ControlNet needs conditioning images for all: type one of {there}")
    elif name not in entries:
        hint = did_you_mean(name, entries) or f"; there is {there}"
        problems.append(f"{where}found {found(name)}, no such conditioning entry{hint}")
    else:
        own, others = (os.path.realpath(item.instance_data_dir) for item in (image, entries[name]))
        if Path(others).is_relative_to(own):
            words = f"found {found(others)}, which is, or is in, the folder of {found(image.id)}: its pictures would be"
            words += " trained on as images, so move them out of it"
            problems.append(f'{_place(name)}key "instance_data_dir": {words}')
    return image.model_copy(update={"conditioning_data": name})
