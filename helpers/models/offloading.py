"""Models that compute on a device which has no room for all of their weights at once."""

from __future__ import annotations

import torch
from diffusers.hooks import apply_group_offloading


def in_groups(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The same model, which brings each layer's weights to the device as it comes to compute, and takes them back.

    They wait in the host's memory; on CUDA the next layer's come over while one computes.
    """
    on_cuda = device.type == "cuda"
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=on_cuda,
        low_cpu_mem_usage=on_cuda,  # pinned layer by layer: all of T5-XXL pinned would be twice in the host's memory
    )
    return model
