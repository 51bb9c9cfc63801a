"""Fingerprints of weights: which model, and which site of it, a basis was fitted for.

A weight has one fingerprint, and one for each block of its rows. The first is what a basis is found
by. The others tell what a process holds that has some rows of a weight alone, as under tensor
parallelism: no other process needs to be asked.
"""

from __future__ import annotations

import hashlib
import logging
import sys

import torch
from loki_compile.pca_store.metadata import HEX_DIGITS, MAX_BLOCKS
from torch import Tensor

SAMPLED_ELEMENTS = 4096
BLOCK_ELEMENTS = 256
BLOCK_HEX_DIGITS = 16

logger = logging.getLogger("loki_compile")


def weights_fingerprint(tensor: Tensor) -> str:
    """Fingerprint of one weight: sha256 over shape, dtype and up to 4096 evenly strided elements.

    Elements are taken in logical order, so strides and device do not matter, and cast to fp32
    (one-byte types such as fp8 and int8: their raw bytes). Reads at most 16 KiB of any tensor.
    A distributed tensor counts as what this process holds of it: as the whole weight where each
    process holds all of it. Another tensor subclass counts as the tensors it is made of.

    Args:
        tensor: any shape, dtype, device and kind of tensor.

    Returns:
        32 hex digits; "" for a weight that has no data or does not let its data be read.
    """
    try:
        with torch.no_grad():
            return _whole(_local(tensor))
    # A tensor subclass may raise anything, and a model that compiles without us must with us.
    except Exception as error:
        logger.debug("no fingerprint of a %s: %s", type(tensor).__name__, error)
        return ""


def block_fingerprints(tensor: Tensor, rows: int) -> tuple[str, ...]:
    """Fingerprints of each block of so many rows, in order: the same in a weight and in a shard.

    Args:
        tensor: (N, M), as for `weights_fingerprint`.
        rows: rows of a block, such as head_dim, so that a KV head is one block.

    Returns:
        N / rows times 16 hex digits; () where the rows make no whole blocks, or more than 4096, or
        do not let their data be read, or belong to a tensor subclass that is made of others.
    """
    try:
        with torch.no_grad():
            return _blocks(_local(tensor), rows)
    except Exception as error:  # as above
        logger.debug("no fingerprints of the rows of a %s: %s", type(tensor).__name__, error)
        return ()


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a distributed tensor; any other tensor as it is."""
    # Where nobody has imported it, nothing is one.
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        local: Tensor = tensor.detach().to_local()
        return local
    return tensor


def _inner(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that a wrapper subclass is made of, by name; None for a tensor of its own."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return None
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(tensor, name) for name in sorted(names)]


def _whole(tensor: Tensor) -> str:
    inner = _inner(tensor)
    if inner is not None:
        found = [_whole(part) for part in inner]
        if "" in found or not found:
            return ""
        made_of = f"{type(tensor).__name__} {tuple(tensor.shape)} {' '.join(found)}"
        return hashlib.sha256(made_of.encode()).hexdigest()[:HEX_DIGITS]
    if tensor.is_meta:
        return ""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    digest.update(_bytes(_sample(tensor.detach())))
    return digest.hexdigest()[:HEX_DIGITS]


def _blocks(tensor: Tensor, rows: int) -> tuple[str, ...]:
    if _inner(tensor) is not None or tensor.is_meta or tensor.dim() != 2 or not tensor.numel():
        return ()
    count, left = divmod(tensor.shape[0], rows)
    if left or count > MAX_BLOCKS:
        return ()
    width = tensor.shape[1]
    size = rows * width
    samples = min(size, BLOCK_ELEMENTS)
    flat = torch.arange(samples, device=tensor.device) * size // samples
    first = torch.arange(count, device=tensor.device)[:, None] * rows
    taken = _readable(tensor.detach())[first + flat // width, flat % width].to(torch.float32)
    head = f"{rows} {width} {tensor.dtype} ".encode()
    return tuple(
        hashlib.sha256(head + _bytes(block)).hexdigest()[:BLOCK_HEX_DIGITS] for block in taken.cpu()
    )


def _bytes(sample: Tensor) -> bytes:
    data: bytes = sample.cpu().numpy().astype("<f4").tobytes()
    return data


def _readable(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _sample(tensor: Tensor) -> Tensor:
    """Up to SAMPLED_ELEMENTS elements, evenly strided in logical order, as a 1-D fp32 tensor."""
    tensor = _readable(tensor)
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    count = min(tensor.numel(), SAMPLED_ELEMENTS)
    flat = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    return tensor[torch.unravel_index(flat, tensor.shape)].to(torch.float32)
