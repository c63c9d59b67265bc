"""The three losses of the conversion. Shapes: B sequences, T tokens, D hidden size, V vocabulary, N = B * T.

Losses over the vocabulary take hidden states and the head's weight. They compute the logits of `token_chunk` tokens
(and of `vocab_chunk` entries, if given) at a time, in fp32 (fp64 for fp64 inputs), and the gradients together with
them, so that no [N, V] tensor is ever stored.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100


def kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_chunk: int = 1024,
    vocab_chunk: int | None = None,
    count=None,
) -> Tensor:
    """Compute the mean over tokens of KL(softmax(teacher logits) || softmax(student logits)) (HALO, section 4.3).

    Args:
        hidden: The student's hidden states [..., D]; differentiable.
        weight: The student's head [V, D]; differentiable.
        teacher_hidden: The teacher's hidden states [..., D'].
        teacher_weight: The teacher's head [V, D'].
        token_chunk: Tokens whose logits are computed at a time.
        vocab_chunk: Vocabulary entries whose logits are computed at a time; None for all.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If the vocabularies differ in size.
    """
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"kl_divergence: weight must have the teacher's vocabulary {teacher_weight.shape[0]}, got {weight.shape[0]}"
        )
    n = hidden[..., 0].numel()
    return (1.0 if count is None else n / count) * _LinearKL.apply(
        hidden.flatten(0, -2),
        weight,
        teacher_hidden.detach().flatten(0, -2),
        teacher_weight.detach(),
        token_chunk,
        vocab_chunk,
    )


def next_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_chunk: int = 1024, vocab_chunk: int | None = None, count=None
) -> Tensor:
    """Compute the mean cross-entropy of labels under softmax(hidden @ weight^T).

    Args:
        hidden: [..., D]; differentiable.
        weight: [V, D]; differentiable.
        labels: int64 [...]; IGNORE where a token does not count.
        token_chunk: Tokens whose logits are computed at a time.
        vocab_chunk: Vocabulary entries whose logits are computed at a time; None for all.

    Returns:
        A scalar, in nats; zero if every label is IGNORE.
    """
    n = (labels != IGNORE).sum()
    return (1.0 if count is None else n / count) * _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), token_chunk, vocab_chunk)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, token_chunk: int = 1024) -> Tensor:
    """Return the cross-entropy of each label [...] in nats, zero where it is IGNORE; without gradients."""
    h_ND, y_N = hidden.flatten(0, -2), labels.flatten()
    losses = []
    for h, y in zip(h_ND.split(token_chunk), y_N.split(token_chunk), strict=True):
        [(_, log_q)] = _log_softmax_pieces(_wide(h), weight, None)
        losses.append(-log_q.gather(-1, y.clamp(min=0)[:, None])[:, 0] * (y != IGNORE))
    return torch.cat(losses).view(labels.shape)


def next_token_labels(input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Return the token after each one [B, T]; IGNORE at the end of a sequence and before the start of a document."""
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    if document_ids is not None:
        labels[:, :-1][document_ids[:, 1:] != document_ids[:, :-1]] = IGNORE
    return labels


def mixer_mse(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Return the mean squared error [L] of each layer's mixer output [B, T, D] (HALO, section 4.2)."""
    return torch.stack([(y - t).float().square().mean() for y, t in zip(outputs, targets, strict=True)])


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight: Tensor,
        teacher_ND: Tensor,
        teacher_weight: Tensor,
        token_chunk: int,
        vocab_chunk: int | None,
    ) -> Tensor:
        grads = _Gradients(ctx, h_ND, weight, 1.0 / max(h_ND.shape[0], 1))
        total = _wide(h_ND).new_zeros(())
        with torch.autocast(h_ND.device.type, enabled=False):
            for rows in _spans(h_ND.shape[0], token_chunk):
                h, teacher = _wide(h_ND[rows]), _wide(teacher_ND[rows])
                student_pieces = _log_softmax_pieces(h, weight, vocab_chunk)
                teacher_pieces = _log_softmax_pieces(teacher, teacher_weight, vocab_chunk)
                for (columns, log_q), (_, log_p) in zip(student_pieces, teacher_pieces, strict=True):
                    p = log_p.exp()
                    total += (log_p.sub_(log_q).mul_(p)).sum()
                    if grads.needed:
                        grads.add(rows, columns, h, log_q.exp_().sub_(p))
        return grads.finish(ctx, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad), None, None, None, None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight: Tensor, labels: Tensor, token_chunk: int, vocab_chunk: int | None
    ) -> Tensor:
        grads = _Gradients(ctx, h_ND, weight, 1.0 / max(int((labels != IGNORE).sum()), 1))
        total = _wide(h_ND).new_zeros(())
        with torch.autocast(h_ND.device.type, enabled=False):
            for rows in _spans(h_ND.shape[0], token_chunk):
                h, y = _wide(h_ND[rows]), labels[rows]
                for columns, log_q in _log_softmax_pieces(h, weight, vocab_chunk):
                    inside = ((y >= columns.start) & (y < columns.stop)).nonzero()[:, 0]
                    entries = (inside, y[inside] - columns.start)
                    total -= log_q[entries].sum()
                    if grads.needed:
                        d_logits = log_q.exp_()
                        d_logits[entries] -= 1
                        grads.add(rows, columns, h, d_logits.mul_((y != IGNORE)[:, None]))
        return grads.finish(ctx, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad), None, None, None)


class _Gradients:
    """Accumulates d_hidden and d_weight over the pieces; `finish` multiplies them and the loss by `scale`."""

    def __init__(self, ctx: Any, h_ND: Tensor, weight: Tensor, scale: float) -> None:
        self.needed = any(ctx.needs_input_grad[:2])
        self.scale = scale
        self.dtypes = h_ND.dtype, weight.dtype
        self.weight = weight
        if self.needed:
            wide = torch.promote_types(h_ND.dtype, torch.float32)
            self.d_hidden = torch.zeros_like(h_ND, dtype=wide)
            self.d_weight = torch.zeros_like(weight, dtype=wide)

    def add(self, rows: slice, columns: slice, h: Tensor, d_logits: Tensor) -> None:
        self.d_hidden[rows].addmm_(d_logits, self.weight[columns].to(d_logits.dtype))
        self.d_weight[columns].addmm_(d_logits.T, h)

    def finish(self, ctx: Any, total: Tensor) -> Tensor:
        if self.needed:
            d_hidden, d_weight = self.d_hidden.mul_(self.scale), self.d_weight.mul_(self.scale)
            ctx.save_for_backward(d_hidden.to(self.dtypes[0]), d_weight.to(self.dtypes[1]))
        return total * self.scale


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    d_hidden, d_weight = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    return d_hidden * grad if need_hidden else None, d_weight * grad if need_weight else None


def _log_softmax_pieces(h: Tensor, weight: Tensor, vocab_chunk: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, log_softmax(h @ weight^T)[:, columns]) by pieces; with several, the logits are computed twice."""
    pieces = list(_spans(weight.shape[0], vocab_chunk or weight.shape[0]))
    if len(pieces) == 1:
        yield pieces[0], torch.log_softmax(h @ weight.to(h.dtype).T, dim=-1)
        return
    log_sum = h.new_full((h.shape[0],), -torch.inf)
    for columns in pieces:
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(h @ weight[columns].to(h.dtype).T, dim=-1))
    for columns in pieces:
        yield columns, (h @ weight[columns].to(h.dtype).T).sub_(log_sum[:, None])


def _wide(x: Tensor) -> Tensor:
    """Convert to float32, unless x is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _spans(total: int, size: int) -> Iterator[slice]:
    """Split range(total) into slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
