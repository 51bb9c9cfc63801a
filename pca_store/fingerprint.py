"""Fingerprints of weights: which model, and which site of it, a basis was fitted for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLED_ELEMENTS = 4096
HEX_DIGITS = 32


def weights_fingerprint(tensor: Tensor) -> str:
    """Fingerprint of one weight: sha256 over shape, dtype and up to 4096 evenly strided elements.

    Elements are taken in logical order, so strides and device do not matter, and cast to fp32
    (one-byte types such as fp8 and int8: their raw bytes). Reads at most 16 KiB of any weight.

    Args:
        tensor: any shape, dtype and device; not on the meta device.

    Returns:
        32 hex digits.

    Raises:
        ValueError: the tensor has no data (meta device).
    """
    if tensor.is_meta:
        raise ValueError(
            f"weights of shape {tuple(tensor.shape)} are on the meta device and hold no data; "
            "a fingerprint needs loaded weights: load the checkpoint first"
        )
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    digest.update(_sample(tensor.detach()).cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:HEX_DIGITS]


def combine_fingerprints(fingerprints: Iterable[str]) -> str:
    """One fingerprint (32 hex digits) for several; their order does not count, repetition does.

    Makes a site's fingerprint of its weights (key projection, bias, key norm), and a model's of
    its sites.
    """
    return hashlib.sha256(" ".join(sorted(fingerprints)).encode()).hexdigest()[:HEX_DIGITS]


def _sample(tensor: Tensor) -> Tensor:
    """Up to SAMPLED_ELEMENTS elements, evenly strided in logical order, as a 1-D fp32 tensor."""
    if tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    count = min(tensor.numel(), SAMPLED_ELEMENTS)
    flat = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    return tensor[torch.unravel_index(flat, tensor.shape)].to(torch.float32)
