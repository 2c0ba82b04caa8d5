"""Which images, crops and captions make the next batch: a pure function of seed and position.

Nothing here opens a file. Every draw of a use comes from a hash of (seed, dataset, image, epoch, repeat), so it does
not depend on the order of the images, on the number of workers, or on which other images there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from struct import Struct
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from helpers.data.dataset import Dataset
from helpers.data.records import Record
from helpers.data.scan import DatasetError
from helpers.images import bucketing
from helpers.images.geometry import Plan, crop_box
from helpers.processes import Processes, Share
from helpers.sizes import Size

_USE = Struct("<QQ")
_DRAWS = Struct("<5Q")
_IDENTITY = 16


class Position(NamedTuple):
    """Where training stands: `batch` batches of epoch `epoch` (both from 0) are done."""

    epoch: int = 0
    batch: int = 0


class Dealt(NamedTuple):
    """The part of an epoch that was trained in batches of another size: the first `batches` of those."""

    batch_size: int
    batches: int


class Use(NamedTuple):
    """One image in one batch. `box` is (left, top, right, bottom) inside the plan's intermediate size."""

    record: Record
    plan: Plan
    box: tuple[int, int, int, int]
    caption: str  # "" where dropped
    dropped: bool


@dataclass(frozen=True)
class BatchPlan:
    """What a batch holds: images of one dataset, all of the size `target`; with a share, those of one process."""

    dataset_id: str
    target: Size
    uses: tuple[Use, ...]
    share: Share | None = None

    def part(self, processes: Processes) -> BatchPlan:
        """What one of several processes trains of a batch."""
        share = processes.share(len(self.uses))
        return replace(self, uses=self.uses[share.start : share.stop], share=share)


class Sampler:
    """Batches of several datasets, endless over epochs, from any position on.

    An epoch sees every image (repeats + 1) times. A batch holds one target size of one dataset; what remains of a size
    makes a smaller batch. The order is new in each epoch. `probability` weighs which dataset the next batch comes
    from, among those that still have batches in this epoch.

    Args:
        dealt: by epoch, what of it was trained before in batches of other sizes, one after another. The epoch then has
            its other images only, in batches of this size, and position 0 is the first of these.

    Raises:
        DatasetError: there are no datasets, or one is empty; the message names it.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        batch_size: int,
        seed: int,
        caption_dropout_probability: float,
        dealt: Mapping[int, Sequence[Dealt]] = MappingProxyType({}),
    ) -> None:
        if not datasets:
            raise DatasetError("there is no image dataset: the dataloader JSON needs at least one that is not disabled")
        for dataset in datasets:
            dataset.require_images()
        self._batch_size = batch_size
        self._caption_dropout_probability = caption_dropout_probability
        self._seed = seed
        self._dealt = dealt
        self._decks = [_Deck(dataset, seed) for dataset in datasets]
        self._epoch: tuple[int, _Epoch] | None = None  # the plan of the epoch asked for last

    def batches(self, start: Position = Position()) -> Iterator[tuple[Position, BatchPlan]]:
        """Each batch with the position after it: resuming there goes on with the next one.

        Raises:
            ValueError: the epoch has fewer batches than `start` says, so it is of other data.
        """
        if start.batch > self.batches_in_epoch(start.epoch):
            raise ValueError(
                f"epoch {start.epoch} has {self.batches_in_epoch(start.epoch)} batches, not the {start.batch} that "
                "were done: the datasets or the batch size changed since the checkpoint was made"
            )
        return self._batches(start)

    def batches_in_epoch(self, epoch: int) -> int:
        """Differs between epochs only where `crop_aspect` is "random"."""
        return len(self._planned(epoch).deck)

    def batches_by_dataset(self, epoch: int) -> dict[str, int]:
        """How many batches of the epoch come from each dataset, by its id."""
        counts = np.bincount(self._planned(epoch).deck, minlength=len(self._decks))
        return {deck.dataset.id: number for deck, number in zip(self._decks, counts.tolist())}

    def _batches(self, start: Position) -> Iterator[tuple[Position, BatchPlan]]:
        first = start.batch
        for epoch in count(start.epoch):
            planned = self._planned(epoch)
            for batch in range(first, len(planned.deck)):
                is_last = batch + 1 == len(planned.deck)
                after = Position(epoch + 1, 0) if is_last else Position(epoch, batch + 1)
                yield after, self._batch(planned, epoch, batch)
            first = 0

    def _planned(self, epoch: int) -> _Epoch:
        known = self._epoch
        if known is None or known[0] != epoch:
            known = self._epoch = (epoch, self._plan(epoch))
        return known[1]

    def _plan(self, epoch: int) -> _Epoch:
        done = [deck.none_done() for deck in self._decks]
        for batch_size, batches in self._dealt.get(epoch, ()):
            planned = self._plan_of_rest(epoch, batch_size, done)
            for number, within in zip(planned.deck[:batches], planned.within[:batches]):
                hand = planned.hands[number]
                done[number][hand.cards[hand.starts[within] : hand.stops[within]]] = True
        return self._plan_of_rest(epoch, self._batch_size, done)

    def _plan_of_rest(self, epoch: int, batch_size: int, done: Sequence[np.ndarray]) -> _Epoch:
        hands = [deck.deal(epoch, batch_size, cards) for deck, cards in zip(self._decks, done)]
        lengths = [len(hand.starts) for hand in hands]
        deck = np.repeat(np.arange(len(hands)), lengths)
        within = np.concatenate([np.arange(length) for length in lengths])
        times = [_arrivals(self._seed, d.dataset, epoch, length) for d, length in zip(self._decks, lengths)]
        order = np.argsort(np.concatenate(times), kind="stable")
        return _Epoch(hands, deck[order], within[order])

    def _batch(self, planned: _Epoch, epoch: int, batch: int) -> BatchPlan:
        number, within = planned.deck[batch], planned.within[batch]
        deck, hand = self._decks[number], planned.hands[number]
        cards = hand.cards[hand.starts[within] : hand.stops[within]]
        choices = hand.choices[cards] if hand.choices is not None else np.zeros(len(cards), int)
        uses = tuple(
            deck.use(card, choice, epoch, self._caption_dropout_probability)
            for card, choice in zip(cards.tolist(), choices.tolist())
        )
        return BatchPlan(deck.dataset.id, uses[0].plan.target, uses)


class _Draws(NamedTuple):
    """Uniform numbers in [0, 1), one for each thing that is drawn for a use."""

    aspect: float
    crop_u: float
    crop_v: float
    caption: float
    dropout: float


@dataclass(frozen=True)
class _Hand:
    """An epoch of one dataset: batch k is cards[starts[k]:stops[k]], a card being record * (repeats + 1) + repeat."""

    cards: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    choices: np.ndarray | None  # the plan drawn for each card, where images have several


@dataclass(frozen=True)
class _Epoch:
    """An epoch of all datasets: batch k is number within[k] of the hand of deck[k]."""

    hands: list[_Hand]
    deck: np.ndarray
    within: np.ndarray


class _Deck:
    """One dataset, ready to be dealt out epoch by epoch."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self._seed = seed
        self._times = dataset.repeats + 1
        self._style = dataset.rules.box_style
        self._identities = _identities(seed, dataset)
        targets = dataset.plans.targets()
        buckets = bucketing.numbered(targets)
        self._buckets = np.array([buckets[target] for target in targets], np.int32)  # by plan
        self._has_choices = dataset.plans.has_choices()

    def none_done(self) -> np.ndarray:
        """For each card whether it is done in an epoch that begins."""
        return np.zeros(len(self.dataset.records) * self._times, bool)

    def deal(self, epoch: int, batch_size: int, done: np.ndarray) -> _Hand:
        """The epoch's cards that are not done."""
        choices = self._choices(epoch) if self._has_choices else None
        first = np.repeat(self.dataset.plans.first_rows(), self._times)
        buckets = self._buckets[first if choices is None else first + choices]
        shuffled = _shuffled(len(buckets), self._seed, self.dataset.id, epoch, "cards")
        cards, starts, stops = bucketing.batches(shuffled[~done[shuffled]], buckets, batch_size)
        order = _shuffled(len(starts), self._seed, self.dataset.id, epoch, "batches")
        return _Hand(cards, starts[order], stops[order], choices)

    def use(self, card: int, choice: int, epoch: int, caption_dropout_probability: float) -> Use:
        index, repeat = divmod(card, self._times)
        record, plan = self.dataset.records[index], self.dataset.plans[index][choice]
        draws = _draws(self._identity(index), epoch, repeat)
        if self.dataset.rules.crops_once:
            box = self.dataset.settled_box(record, plan, repeat)
        else:
            box = crop_box(plan.intermediate, plan.target, self._style, draws.crop_u, draws.crop_v)
        dropped = draws.dropout < caption_dropout_probability
        caption = "" if dropped else record.captions[int(draws.caption * len(record.captions))]
        return Use(record, plan, box, caption, dropped)

    def _choices(self, epoch: int) -> np.ndarray:
        """Which of its plans each card uses, drawn by the plans' weights."""
        plans = self.dataset.plans
        drawn = [
            plans.drawn(index, _draws(self._identity(index), epoch, repeat).aspect)
            for index in range(len(plans))
            for repeat in range(self._times)
        ]
        return np.array(drawn, np.int16)

    def _identity(self, index: int) -> bytes:
        return self._identities[_IDENTITY * index : _IDENTITY * (index + 1)]


def _identities(seed: int, dataset: Dataset) -> bytes:
    """What each image's draws hang on: its content and its path inside the dataset, which may be moved as a whole.

    They are 16 bytes an image, one after another; to compute them at each draw would take 3 us of a cached sample's 90.
    """
    start = blake2b(digest_size=_IDENTITY)
    for word in (seed, dataset.id):
        start.update(_measured(word))

    def identity(record: Record) -> bytes:
        digest = start.copy()
        digest.update(_measured(record.content) + _measured(dataset.relative(record)))
        return digest.digest()

    return b"".join(map(identity, dataset.records))


def _draws(identity: bytes, epoch: int, repeat: int) -> _Draws:
    digest = blake2b(identity + _USE.pack(epoch, repeat), digest_size=_DRAWS.size).digest()
    return _Draws._make([(number >> 11) * 2.0**-53 for number in _DRAWS.unpack(digest)])


def _shuffled(size: int, *words: object) -> np.ndarray:
    """A random order of range(size)."""
    return np.argsort(_random(size, *words), kind="stable")


def _arrivals(seed: int, dataset: Dataset, epoch: int, size: int) -> np.ndarray:
    """Random times of a dataset's batches, at a rate of `probability`, in ascending order.

    Batches of several datasets merged by such times (Poisson processes) come as if each were drawn with the
    datasets' probabilities, among the datasets that still have some, but without a step through all of them.
    """
    uniform = (_random(size, seed, dataset.id, epoch, "arrivals") >> np.uint64(11)) * 2.0**-53
    return np.cumsum(-np.log1p(-uniform)) / dataset.probability


def _random(size: int, *words: object) -> np.ndarray:
    """uint64 numbers. The raw stream of a bit generator is the same in every version of numpy; shuffles may not be."""
    return np.random.Philox(key=int.from_bytes(_digest(16, *words), "little")).random_raw(size)


def _digest(size: int, *words: object) -> bytes:
    """A hash of the words."""
    digest = blake2b(digest_size=size)
    for word in words:
        digest.update(_measured(word))
    return digest.digest()


def _measured(word: object) -> bytes:
    """A word as it is hashed: its length is in it, so that ("a", "bc") and ("ab", "c") differ."""
    encoded = os.fsencode(str(word))
    return _USE.pack(len(encoded), 0) + encoded
