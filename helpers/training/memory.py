"""How much memory a training step will take, told before any weights load.

Weights, gradients, optimizer and EMA follow from shapes and dtypes, to the byte. For the activations a forward and a
backward pass run on PyTorch's meta device, where tensors have shapes and no data, while it is counted what lives. That
takes a second or two, whatever the model's size. What kernels work with for themselves is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from helpers.diffusion.noising import schedule_from_betas
from helpers.diffusion.objective import EpsilonObjective
from helpers.models.adapters import Adapter, parameter_groups, trainable_parameters
from helpers.models.denoiser import Denoiser
from helpers.models.errors import unfit
from helpers.models.gradient_checkpointing import checkpoint_everything, checkpoint_text_encoder
from helpers.models.ledger import META, AsOnCuda, Ledger
from helpers.models.text import CLIP
from helpers.sizes import Size
from helpers.training.released import Arrivals, buckets_of
from helpers.training.rounding import chunks_of, slices, whole


@dataclass(frozen=True)
class Setup:
    """What decides how much memory a training step takes.

    Attributes:
        architecture: a UNet's `config.json`.
        adapter: what is trained.
        weights, trained: the dtypes that the models are loaded in, and that what is trained is kept in. bfloat16 stands
            for float16 too, which takes as much.
        autocast: whether the computation is autocast to bfloat16.
        optimizer: a key of `STATE_BYTES`.
        size: of the largest x, in its own pixels.
        tokens: positions of the text.
        accumulates: whether gradients wait while further batches are computed.
        trains_variance: whether that is in the loss, where the UNet predicts one.
        channels: of x.
        text_encoder: the `config.json` of the text encoder; None where that is not trained.
        releases: whether weights are updated in the backward pass, and their gradients freed.
    """

    architecture: Path
    adapter: Adapter
    weights: torch.dtype
    trained: torch.dtype
    autocast: bool
    optimizer: str
    ema: bool
    checkpointing: bool
    batch_size: int
    size: Size
    tokens: int
    accumulates: bool = False
    trains_variance: bool = True
    channels: int = 3
    text_encoder: Path | None = None
    releases: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes, by what takes them.

    Attributes:
        gradients: of all that is trained; where they are released, the most of them at one time.
        activations: the most that forward and backward pass hold at one time besides gradients.
        peak: the most of all at one time, which is below their sum: gradients come as activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    peak: int

    @property
    def parts(self) -> dict[str, int]:
        """What takes memory, by its name."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "EMA": self.ema,
            "activations": self.activations,
        }

    @property
    def largest(self) -> str:
        return max(self.parts, key=self.parts.get)


def estimate(setup: Setup) -> Memory:
    """The memory of a step of a run that is under way."""
    denoiser = without_data(setup)
    trained = trainable_parameters(denoiser)
    weights = sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    optimizer = STATE_BYTES[setup.optimizer](trained)
    ema = sum(4 * parameter.numel() for parameter in trained) if setup.ema else 0
    ledger = _pass(denoiser, setup)
    gradients = ledger.most_gradients if setup.releases else sum(parameter.nbytes for parameter in trained)
    phases = [
        gradients + ledger.most_activations if setup.accumulates else ledger.most,
        0 if setup.releases else gradients + max(map(UPDATE_BYTES[setup.optimizer], parameter_groups(denoiser))),
        _in_chunks(8, 4)(trained) if setup.ema else 0,  # the average's update, when the gradients are gone
    ]
    peak = weights + optimizer + ema + max(phases)
    return Memory(weights, gradients, optimizer, ema, ledger.most_activations, peak)


@dataclass(frozen=True)
class Saved:
    """Bytes in files: of what is trained, of what goes with it into a checkpoint, and of the whole UNet."""

    trained: int
    state: int
    unet: int

    @property
    def checkpoint(self) -> int:
        return self.trained + self.state


def saved(setup: Setup) -> Saved:
    """What a run of this setup saves, but for the headers of its files."""
    denoiser = without_data(setup)
    trained = trainable_parameters(denoiser)
    average = sum(4 * parameter.numel() for parameter in trained) if setup.ema else 0
    return Saved(
        trained=sum(parameter.nbytes for parameter in trained),
        state=STATE_BYTES[setup.optimizer](trained) + average,
        unet=sum(parameter.nbytes for parameter in denoiser.unet.parameters()),
    )


def without_data(setup: Setup) -> Denoiser:
    """The model of a run on the meta device, with what is trained attached."""
    with META:
        try:
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(setup.architecture))
        except Exception as error:  # whatever a config of any content makes diffusers raise
            raise unfit("the UNet", setup.architecture.parent, error) from error
        encoder = CLIP().untrained(setup.text_encoder) if setup.text_encoder else None
        denoiser = Denoiser(unet, encoder)
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.to(setup.weights)
        setup.adapter.attach(denoiser, setup.trained)
    if setup.checkpointing:

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), AsOnCuda(setup.autocast)  # the second pass begins outside of all modes

        run = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        for net in denoiser.nets:
            checkpoint_everything(net, run)
        if encoder:
            checkpoint_text_encoder(encoder, run)
    return denoiser.train()


def _pass(denoiser: Denoiser, setup: Setup) -> Ledger:
    """A forward and a backward pass on the meta device."""
    ledger = Ledger(denoiser.parameters())
    for parameter in trainable_parameters(denoiser):
        parameter.register_post_accumulate_grad_hook(ledger.count_as_gradient)
    if setup.releases:
        _release_each_bucket(denoiser, setup.optimizer, ledger)
    with ledger, META:
        with AsOnCuda(setup.autocast):
            loss = loss_without_data(denoiser, setup)
        loss.backward()
    return ledger


def _release_each_bucket(denoiser: Denoiser, optimizer: str, ledger: Ledger) -> None:
    """As `Released` does, with the bytes that the updates work with."""

    def update(bucket: Sequence[Parameter]) -> None:
        ledger.count_work(UPDATE_BYTES[optimizer](bucket))
        for parameter in bucket:
            parameter.grad = None

    for group in parameter_groups(denoiser):
        Arrivals(buckets_of(group, whole if optimizer == "adafactor" else slices), update)


def loss_without_data(denoiser: Denoiser, setup: Setup) -> Tensor:
    """That of `step.training_loss`, of tensors on the meta device."""
    config, count = denoiser.unet.config, setup.batch_size
    objective = _objective(setup.trains_variance and config.out_channels == 2 * setup.channels)
    width = config.encoder_hid_dim or config.cross_attention_dim
    x, x_t, noise = (torch.empty(count, setup.channels, setup.size.height, setup.size.width) for _ in range(3))
    low_res = torch.empty(count, config.in_channels - setup.channels, setup.size.height, setup.size.width)
    unet_input = torch.cat([x_t, low_res], 1) if low_res.shape[1] else x_t
    text = torch.empty(count, setup.tokens, width, dtype=denoiser.dtype)
    if denoiser.text_encoder is not None:
        text = torch.empty(count, setup.tokens, dtype=torch.int64)
    t = torch.empty(count, dtype=torch.int64)
    labels = torch.empty_like(t) if config.class_embed_type or config.num_class_embeds else None
    output = denoiser(unet_input, t, text, class_labels=labels, control=_control(denoiser, setup))
    return objective(output.float(), x, x_t, noise, t)


def _control(denoiser: Denoiser, setup: Setup) -> Tensor | None:
    """The conditioning images of a batch: a ControlNet's embedding halves them at each of its levels but the first."""
    if denoiser.controlnet is None:
        return None
    factor = 2 ** (len(denoiser.controlnet.config.conditioning_embedding_out_channels) - 1)
    height, width = setup.size.height * factor, setup.size.width * factor
    return torch.empty(setup.batch_size, height, width, 3, dtype=torch.uint8)


def _objective(trains_variance: bool) -> EpsilonObjective:
    """The loss, on any schedule: its numbers make no difference."""
    with torch.device("cpu"):  # a schedule has values
        schedule = schedule_from_betas(torch.linspace(1e-4, 0.02, 1000))
    return EpsilonObjective(schedule, trains_variance, torch.ones(schedule.timesteps)).to(META)


def _moments(count: int, scalars: int = 0) -> Callable[[Sequence[Parameter]], int]:
    """`count` tensors like each parameter, and as many float32 scalars as said."""
    return lambda parameters: sum(count * parameter.nbytes + 4 * scalars for parameter in parameters)


def _bitsandbytes(parameters: Sequence[Parameter]) -> int:
    """Two moments of 8 bits with a scale for each 256, of smaller parameters in float32; and two tables of 256."""
    in_float32 = parameters[0].dtype == torch.float32  # else it is given slices of the large ones
    counts = [piece.numel() for one in parameters for piece in ([one] if in_float32 else slices(one))]
    large, small = [count for count in counts if count >= 4096], [count for count in counts if count < 4096]
    return sum(2 * count + 8 * -(-count // 256) for count in large) + 8 * sum(small) + 2048 * bool(large)


def _torchao(parameters: Sequence[Parameter]) -> int:
    """As bitsandbytes, but each with tables of its own, and of parameters that are not whole blocks as they are."""
    packed = [one.numel() for one in parameters if one.numel() >= 4096 and one.numel() % 256 == 0]
    plain = [one for one in parameters if one.numel() < 4096 or one.numel() % 256]
    return sum(2 * (count + count // 64 + 1024) + 4 for count in packed) + _moments(2, scalars=1)(plain)


def _adafactor(parameters: Sequence[Parameter]) -> int:
    """The second moment's sums over rows and columns, of weights with several dimensions; always float32."""

    def count(parameter: Parameter) -> int:
        rows = len(parameter)
        return rows if parameter.ndim < 2 else rows + parameter.numel() // rows

    return sum(4 * count(parameter) + 4 for parameter in parameters)


STATE_BYTES: Mapping[str, Callable[[Sequence[Parameter]], int]] = {
    "adamw": _moments(2, scalars=1),
    "adamw_bf16": _moments(2),
    "adamw8bit": _bitsandbytes,
    "ao_adamw8bit": _torchao,
    "adafactor": _adafactor,
    "lion": lambda parameters: sum(4 * parameter.numel() for parameter in parameters),
    "prodigy": _moments(4),  # one less for those that begin at zero
}
"""What each optimizer keeps for these parameters after its first step."""


def _in_chunks(bfloat16: int, float32: int, sliced: bool = True) -> Callable[[Sequence[Parameter]], int]:
    """Bytes for each element of the largest chunk, by the parameters' dtype."""

    def count(parameters: Sequence[Parameter]) -> int:
        pieces = [piece for one in parameters for piece in slices(one)] if sliced else parameters
        chunks = [sum(piece.numel() for piece in pieces[chunk]) for chunk in chunks_of(pieces)]
        of_each = bfloat16 if parameters[0].dtype == torch.bfloat16 else float32
        return of_each * max(chunks)

    return count


def _one_by_one(of_each: int) -> Callable[[Sequence[Parameter]], int]:
    """Bytes for each element of the largest parameter."""
    return lambda parameters: of_each * max(parameter.numel() for parameter in parameters)


UPDATE_BYTES: Mapping[str, Callable[[Sequence[Parameter]], int]] = {
    "adamw": lambda parameters: 0,
    "adamw_bf16": _in_chunks(27, 20),
    "adamw8bit": _in_chunks(15, 0),
    "ao_adamw8bit": _one_by_one(8),  # as float32 both moments; what the compiler makes of its step differs
    "adafactor": lambda parameters: max(_in_chunks(15, 0, sliced=False)(parameters), _one_by_one(12)(parameters)),
    "lion": _in_chunks(15, 0),
    "prodigy": _one_by_one(9),
}
"""What each optimizer's step works with, at the most."""
