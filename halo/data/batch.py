"""One batch of training samples."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """Token ids int64 [B, T], and for each token the number of its document in the row, int32 [B, T]."""

    input_ids: Tensor
    document_ids: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy to a device."""
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.document_ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which copies to a GPU run in the background."""
        return Batch(self.input_ids.pin_memory(), self.document_ids.pin_memory())

    def share(self, rank: int, world: int) -> "Batch":
        """Return the rows of one of `world` processes."""
        count = self.input_ids.shape[0] // world
        rows = slice(rank * count, (rank + 1) * count)
        return Batch(self.input_ids[rows], self.document_ids[rows])

    def split(self, size: int | None) -> list["Batch"]:
        """Split into batches of `size` sequences; None does not split."""
        if size is None or size >= self.input_ids.shape[0]:
            return [self]
        pairs = zip(self.input_ids.split(size), self.document_ids.split(size), strict=True)
        return [Batch(ids, documents) for ids, documents in pairs]

    def cu_seqlens(self) -> Tensor:
        """Return int32 [documents + 1]: where documents start in the flattened batch, and its length."""
        starts = torch.ones_like(self.document_ids, dtype=torch.bool)
        starts[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        offsets = starts.flatten().nonzero()[:, 0]
        return torch.cat([offsets, offsets.new_tensor([starts.numel()])]).int()
