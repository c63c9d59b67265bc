"""The losses over the vocabulary. Shapes: B sequences, T tokens, D hidden size, V vocabulary, N = B * T.

They take hidden states and the head's weight. The logits of `token_chunk` tokens (and of
`vocab_chunk` entries, if given) are computed at a time, into workspaces that are reused, and turned into the gradient
with respect to the logits in place; d_hidden and d_weight are computed from it in the forward pass. Memory beyond the
weights and their gradient: one fp32 [token_chunk, V] for the cross-entropy, two for the KL divergence, and a few blocks
of at most BLOCK elements. Nothing in here waits for a GPU.

Precision: logits, losses and d_weight are fp32. The operands of the matrix products are bf16 on a GPU if hidden states
and weight are (or under autocast to bf16), with fp32 accumulation and fp32 results; otherwise they are fp32. The
gradient with respect to the logits is rounded to bf16 after its division by `count`; float16 has too little range for
that, so float16 inputs are widened. With any float64 input, everything is float64.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
BLOCK = 2**23  # elements of the temporaries of softmax: 32 MB in fp32

Count = int | float | Tensor | None


def kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_chunk: int = 512,
    vocab_chunk: int | None = None,
    count: Count = None,
) -> Tensor:
    """Compute the sum over tokens of KL(softmax(teacher logits) || softmax(student logits)), divided by `count`.

    The objective of HALO's stage 2 (section 4.3).

    Args:
        hidden: The student's hidden states [..., D]; differentiable.
        weight: The student's head [V, D]; differentiable.
        teacher_hidden: The teacher's hidden states [..., D'].
        teacher_weight: The teacher's head [V, D'].
        token_chunk: Tokens whose logits are computed at a time.
        vocab_chunk: Vocabulary entries whose logits are computed at a time, at the price of computing them twice; None
            for all.
        count: Tokens of the whole batch, of which these may be a part: a number, or a 0-dim tensor; less than 1 counts
            as 1. None for the tokens of this call, which gives their mean.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If the vocabularies or the numbers of tokens differ.
    """
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"kl_divergence: weight must have the teacher's vocabulary {teacher_weight.shape[0]}, got {weight.shape[0]}"
        )
    if hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"kl_divergence: hidden must have the teacher's tokens {list(teacher_hidden.shape[:-1])}, "
            f"got {list(hidden.shape[:-1])}"
        )
    h_ND = hidden.flatten(0, -2)
    scale = _reciprocal(h_ND.shape[0] if count is None else count)
    chunks = token_chunk, vocab_chunk
    teacher = teacher_hidden.detach().flatten(0, -2), teacher_weight.detach()
    return _LinearKL.apply(h_ND, weight, *teacher, scale, chunks)


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_chunk: int = 512,
    vocab_chunk: int | None = None,
    count: Count = None,
) -> Tensor:
    """Compute the summed cross-entropy of labels under softmax(hidden @ weight^T), divided by `count`.

    Args:
        hidden: [..., D]; differentiable.
        weight: [V, D]; differentiable.
        labels: int64 [...]; IGNORE where a token does not count.
        token_chunk: Tokens whose logits are computed at a time.
        vocab_chunk: Vocabulary entries whose logits are computed at a time, at the price of computing them twice; None
            for all.
        count: Labels of the whole batch that are not IGNORE, of which these may be a part: a number, or a 0-dim tensor;
            less than 1 counts as 1. None for those of this call, which gives their mean.

    Returns:
        A scalar, in nats; zero if every label is IGNORE.

    Raises:
        ValueError: On the CPU, if a label is neither IGNORE nor an entry of the vocabulary; on a GPU this is a
            device-side assertion, as in torch.nn.functional.cross_entropy.
    """
    labels = labels.flatten()
    _check_labels("next_token_loss", labels, weight.shape[0])
    scale = _reciprocal((labels != IGNORE).sum() if count is None else count)
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels, scale, (token_chunk, vocab_chunk))


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, token_chunk: int = 512) -> Tensor:
    """Return the cross-entropy of each label [...] in nats, zero where it is IGNORE; without gradients.

    Raises:
        ValueError: As in `next_token_loss`.
    """
    h_ND, y_N = hidden.flatten(0, -2), labels.flatten()
    _check_labels("token_losses", y_N, weight.shape[0])
    head = _Head(h_ND, weight, torch.promote_types(h_ND.dtype, torch.float32), (token_chunk, None))
    losses_N = torch.zeros(len(y_N), dtype=head.logit_dtype, device=h_ND.device)
    with torch.autocast(h_ND.device.type, enabled=False):
        for rows in _spans(len(y_N), token_chunk):
            logits, y, losses = head.logits(head.operand(h_ND[rows]), slice(None)), y_N[rows], losses_N[rows]
            for block in _blocks(logits):
                log_q = torch.log_softmax(logits[block], -1)
                picked = log_q.gather(-1, y[block].clamp(min=0)[:, None])[:, 0]
                losses[block] = torch.where(y[block] == IGNORE, 0.0, -picked)
    return losses_N.view(labels.shape)


@torch.no_grad()
def token_divergences(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    token_chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Compare a model with a teacher token by token; without gradients.

    Args:
        hidden: The model's hidden states [..., D].
        weight: Its head [V, D].
        teacher_hidden: The teacher's hidden states [..., D'].
        teacher_weight: Its head [V, D'].
        labels: int64 [...]; IGNORE where there is none.
        token_chunk: Tokens whose logits are computed at a time.

    Returns:
        KL(softmax(teacher logits) || softmax(logits)) of each token, and the cross-entropy of its label, zero where it
        is IGNORE; each [...], in nats.

    Raises:
        ValueError: As in `next_token_loss`.
    """
    h_ND, t_ND, y_N = hidden.flatten(0, -2), teacher_hidden.flatten(0, -2), labels.flatten()
    _check_labels("token_divergences", y_N, weight.shape[0])
    dtype = torch.promote_types(torch.promote_types(h_ND.dtype, t_ND.dtype), torch.float32)
    student, teacher = (_Head(x, w, dtype, (token_chunk, None)) for x, w in ((h_ND, weight), (t_ND, teacher_weight)))
    divergences_N, losses_N = torch.zeros(2, len(y_N), dtype=dtype, device=h_ND.device).unbind()
    with torch.autocast(h_ND.device.type, enabled=False):
        for rows in _spans(len(y_N), token_chunk):
            q_logits = student.logits(student.operand(h_ND[rows]), slice(None))
            p_logits = teacher.logits(teacher.operand(t_ND[rows]), slice(None))
            y, divergences, losses = y_N[rows], divergences_N[rows], losses_N[rows]
            for block in _blocks(q_logits):
                log_q, log_p = torch.log_softmax(q_logits[block], -1), torch.log_softmax(p_logits[block], -1)
                picked = log_q.gather(-1, y[block].clamp(min=0)[:, None])[:, 0]
                losses[block] = torch.where(y[block] == IGNORE, 0.0, -picked)
                p = log_p.exp()
                divergences[block] = log_p.sub_(log_q).mul_(p).sum(-1)
                del log_q, log_p, p  # or they are still there while the next block's are computed
    return divergences_N.view(labels.shape), losses_N.view(labels.shape)


def next_token_labels(input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Return the token after each one [B, T]; IGNORE at the end of a sequence and before the start of a document."""
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    if document_ids is not None:
        labels[:, :-1][document_ids[:, 1:] != document_ids[:, :-1]] = IGNORE
    return labels


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight: Tensor,
        teacher_ND: Tensor,
        teacher_weight: Tensor,
        scale: float | Tensor,
        chunks: tuple[int, int | None],
    ) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(h_ND.dtype, teacher_ND.dtype), torch.float32)
        student, teacher = _Head(h_ND, weight, dtype, chunks), _Head(teacher_ND, teacher_weight, dtype, chunks)
        grads = _Gradients(ctx, h_ND, student)
        total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            for rows in _spans(h_ND.shape[0], chunks[0]):
                h, t = student.operand(h_ND[rows]), teacher.operand(teacher_ND[rows])
                q_sum, p_sum = student.log_sum(h), teacher.log_sum(t)
                for columns in student.pieces:
                    q_logits, p_logits = student.logits(h, columns), teacher.logits(t, columns)
                    d_logits = student.in_place(q_logits)
                    for block in _blocks(q_logits):
                        log_q, log_p = _log_softmax(q_logits, q_sum, block), _log_softmax(p_logits, p_sum, block)
                        p = log_p.exp()
                        total += log_p.sub_(log_q).mul_(p).sum()
                        if grads.needed:
                            d_logits[block] = log_q.exp_().sub_(p).mul_(scale)
                        del log_q, log_p, p  # or they are still there while the next block's are computed
                    grads.add(rows, columns, h, d_logits)
        grads.save(ctx)
        return total.mul_(scale).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad), None, None, None, None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float | Tensor,
        chunks: tuple[int, int | None],
    ) -> Tensor:
        head = _Head(h_ND, weight, torch.promote_types(h_ND.dtype, torch.float32), chunks)
        grads = _Gradients(ctx, h_ND, head)
        total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            for rows in _spans(h_ND.shape[0], chunks[0]):
                h, y = head.operand(h_ND[rows]), labels[rows, None]
                log_sum = head.log_sum(h)
                row_scale = (y != IGNORE).to(head.logit_dtype) * scale
                for columns in head.pieces:
                    logits = head.logits(h, columns)
                    d_logits = head.in_place(logits)
                    inside = (y >= columns.start) & (y < columns.stop)
                    entry = (y - columns.start).clamp(0, logits.shape[1] - 1)
                    for block in _blocks(logits):
                        log_q = _log_softmax(logits, log_sum, block)
                        total -= torch.where(inside[block], log_q.gather(1, entry[block]), 0.0).sum()
                        if grads.needed:
                            d_log_q = log_q.exp_().scatter_add_(1, entry[block], -inside[block].to(log_q.dtype))
                            d_logits[block] = d_log_q.mul_(row_scale[block])
                            del d_log_q
                        del log_q
                    grads.add(rows, columns, h, d_logits)
        grads.save(ctx)
        return total.mul_(scale).to(head.logit_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad), None, None, None)


class _Head:
    """A head's logits, computed piece by piece into one workspace.

    Args:
        h_ND: The hidden states.
        weight: [V, D].
        logit_dtype: float32 or float64.
        chunks: Tokens, and vocabulary entries or None, at a time.
    """

    def __init__(self, h_ND: Tensor, weight: Tensor, logit_dtype: torch.dtype, chunks: tuple[int, int | None]) -> None:
        rows, width = min(chunks[0], h_ND.shape[0]), chunks[1] or weight.shape[0]
        self.logit_dtype = logit_dtype
        self.dtype = _operand_dtype(h_ND, weight, logit_dtype)
        self.weight = weight.to(self.dtype)
        self.pieces = list(_spans(weight.shape[0], width))
        self.workspace = torch.empty(rows * min(width, weight.shape[0]), dtype=logit_dtype, device=h_ND.device)

    def operand(self, h: Tensor) -> Tensor:
        """Return hidden states as an operand of the matrix products."""
        return h.to(self.dtype)

    def logits(self, h: Tensor, columns: slice) -> Tensor:
        """Compute the logits of some entries; they are valid until the next call."""
        weight = self.weight[columns]
        logits = self.workspace[: len(h) * len(weight)].view(len(h), len(weight))
        return _mm(h, weight.T, out=logits)

    def log_sum(self, h: Tensor) -> Tensor | None:
        """Compute logsumexp over the vocabulary [rows, 1] if it is in several pieces."""
        if len(self.pieces) == 1:
            return None
        log_sum = torch.full((len(h), 1), -torch.inf, dtype=self.logit_dtype, device=h.device)
        for columns in self.pieces:
            logits = self.logits(h, columns)
            for block in _blocks(logits):
                log_sum[block] = torch.logaddexp(log_sum[block], torch.logsumexp(logits[block], -1, keepdim=True))
        return log_sum

    def in_place(self, logits: Tensor) -> Tensor:
        """Return the memory of the logits as an operand of the same shape, for rows to be written in ascending order.

        A narrower row starts at or before the row of logits that it replaces, so it never overwrites a later one.
        """
        return logits.flatten().view(self.dtype)[: logits.numel()].view(logits.shape)


class _Gradients:
    """Accumulates d_hidden and d_weight over the pieces, in the dtype of the logits."""

    def __init__(self, ctx: Any, h_ND: Tensor, head: _Head) -> None:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        self.needed = need_hidden or need_weight
        self.head, self.hidden_dtype = head, h_ND.dtype
        self.d_hidden = torch.zeros_like(h_ND, dtype=head.logit_dtype) if need_hidden else None
        self.d_weight = torch.zeros_like(head.weight, dtype=head.logit_dtype) if need_weight else None

    def add(self, rows: slice, columns: slice, h: Tensor, d_logits: Tensor) -> None:
        """Add the contribution of d_logits [rows, columns], an operand."""
        if self.d_hidden is not None:
            _addmm(self.d_hidden[rows], d_logits, self.head.weight[columns])
        if self.d_weight is not None:
            _addmm(self.d_weight[columns], d_logits.T, h)

    def save(self, ctx: Any) -> None:
        """Save both for the backward, where autograd converts d_weight if the weight has another dtype."""
        d_hidden = None if self.d_hidden is None else self.d_hidden.to(self.hidden_dtype)
        ctx.save_for_backward(d_hidden, self.d_weight)


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return d_hidden and d_weight times grad; in the saved buffers themselves, unless the graph is used again."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    return tuple(x if x is None else x * grad if kept else x.mul_(grad) for x in ctx.saved_tensors)


def _operand_dtype(h: Tensor, weight: Tensor, logit_dtype: torch.dtype) -> torch.dtype:
    if logit_dtype == torch.float64 or not _accumulates_bfloat16(h.device.type):
        return logit_dtype
    autocast = torch.is_autocast_enabled(h.device.type)
    dtypes = {torch.get_autocast_dtype(h.device.type)} if autocast else {h.dtype, weight.dtype}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else logit_dtype


@cache
def _accumulates_bfloat16(device_type: str) -> bool:
    """Return whether matrix products of bf16 can be added to fp32 on this kind of device: CUDA, in recent PyTorch."""
    if device_type != "cuda":
        return False
    try:
        _addmm(torch.zeros(8, 8, device=device_type), *torch.ones(2, 8, 8, dtype=torch.bfloat16, device=device_type))
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute out = a @ b, accumulated in the dtype of `out`."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute out += a @ b, accumulated in the dtype of `out`."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _log_softmax(logits: Tensor, log_sum: Tensor | None, block: slice) -> Tensor:
    """Return log_softmax of some rows; log_sum [rows, 1] is given if the logits are not the whole vocabulary."""
    return torch.log_softmax(logits[block], -1) if log_sum is None else logits[block] - log_sum[block]


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Split the rows of the logits into blocks of at most BLOCK elements, or one row."""
    return _spans(len(logits), max(1, BLOCK // max(1, logits.shape[1])))


def _check_labels(name: str, labels: Tensor, size: int) -> None:
    valid = (((labels >= 0) & (labels < size)) | (labels == IGNORE)).all()
    if labels.device.type != "cpu":
        torch._assert_async(valid, f"{name}: labels must be below {size}, or {IGNORE}")
    elif not valid:
        outside = labels[((labels < 0) | (labels >= size)) & (labels != IGNORE)]
        raise ValueError(f"{name}: labels must be from 0 to {size - 1}, or {IGNORE}, got {int(outside[0])}")


def _reciprocal(count: int | float | Tensor) -> float | Tensor:
    """Return 1 / max(count, 1), on the device of `count`."""
    return count.clamp(min=1).double().reciprocal() if isinstance(count, Tensor) else 1.0 / max(count, 1)


def _wide(x: Tensor) -> Tensor:
    """Convert to float32, unless x is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _spans(total: int, size: int) -> Iterator[slice]:
    """Split range(total) into slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
