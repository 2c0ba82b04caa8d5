"""What a model's passes hold of memory, counted: on the meta device too, where tensors have shapes and no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Counts the bytes that live besides `known` tensors: the storages that operations return, until they are freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = list(known)  # kept alive, so that nothing else gets their addresses
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in self._known}
        self._activations = self._gradients = 0
        self.most_activations = self.most_gradients = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return result

    def count_as_gradient(self, parameter: Parameter) -> None:
        """Book a parameter's gradient, which an operation returned, as such."""
        storage = parameter.grad.untyped_storage()
        size, self._bytes[storage._cdata] = self._bytes[storage._cdata], 0
        self._activations -= size
        self._gradients += size
        self.most_gradients = max(self.most_gradients, self._gradients)
        weakref.finalize(storage, self._free_gradient, size)

    def count_work(self, nbytes: int) -> None:
        """Book what something works with for a moment, besides what lives."""
        self.most = max(self.most, self._activations + self._gradients + nbytes)

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._bytes:
            return
        self._bytes[storage._cdata] = storage.nbytes()
        self._activations += storage.nbytes()
        self.most_activations = max(self.most_activations, self._activations)
        self.most = max(self.most, self._activations + self._gradients)
        weakref.finalize(storage, self._leave, storage._cdata)

    def _leave(self, key: int) -> None:
        self._activations -= self._bytes.pop(key)

    def _free_gradient(self, size: int) -> None:
        self._gradients -= size


class AsOnCuda(TorchFunctionMode):
    """Has the meta device compute as CUDA does: attention fused, and in autocast's dtypes (ATen/autocast_mode.h)."""

    IN_BFLOAT16 = frozenset({
        F.conv2d, F.linear, F.scaled_dot_product_attention, torch.bmm, torch.einsum, torch.matmul,
        Tensor.matmul, Tensor.__matmul__,
    })  # fmt: skip
    IN_FLOAT32 = frozenset({F.group_norm, F.interpolate, F.layer_norm})

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self._autocast = autocast
        self._cast_parameters: dict[Tensor, Tensor] = {}

    def __exit__(self, *exception: object) -> None:
        self._cast_parameters.clear()
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._autocast and func in self.IN_BFLOAT16 | self.IN_FLOAT32:
            dtype = torch.bfloat16 if func in self.IN_BFLOAT16 else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._cast(tensor, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if not (isinstance(tensor, Parameter) and tensor.requires_grad and dtype == torch.bfloat16):
            return tensor.to(dtype)
        if tensor not in self._cast_parameters:  # autocast keeps these until its context ends
            self._cast_parameters[tensor] = tensor.to(dtype)
        return self._cast_parameters[tensor]
