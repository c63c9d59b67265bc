"""The losses over the vocabulary equal their definitions in float64, in value and gradient, for any chunking."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_matches_reference

from halo.losses import IGNORE, kl_divergence, mixer_mse, next_token_labels, next_token_loss, token_losses

N, D, V = 37, 16, 53
# Chunk sizes: a single chunk, divisors, non-divisors, and one token or vocabulary entry at a time.
CHUNKS = [(1024, None), (37, 53), (8, None), (10, 20), (5, 53), (1, 1)]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(V, (N,), generator=generator)
    labels[[0, 7, 36]] = IGNORE
    return {
        "h": make(N, D),
        "w": make(V, D),
        "teacher_h": make(N, 2 * D),
        "teacher_w": make(V, 2 * D),
        "labels": labels,
    }


def direct_kl(h, w, teacher_h, teacher_w):
    log_p, log_q = F.log_softmax(teacher_h @ teacher_w.T, -1), F.log_softmax(h @ w.T, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def gradients(loss, h, w):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    value = loss(h, w)
    # A factor on the loss, because the gradients are computed before the incoming one is known.
    (3 * value).backward()
    return value.detach(), h.grad, w.grad


@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), CHUNKS)
def test_kl_equals_its_definition(inputs, token_chunk, vocab_chunk):
    teacher = inputs["teacher_h"], inputs["teacher_w"]
    expected = gradients(lambda h, w: direct_kl(h, w, *teacher), inputs["h"], inputs["w"])
    result = gradients(lambda h, w: kl_divergence(h, w, *teacher, token_chunk, vocab_chunk), inputs["h"], inputs["w"])
    for name, got, wanted in zip(("loss", "d_hidden", "d_weight"), result, expected, strict=True):
        assert_matches_reference(name, got, wanted)


@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), CHUNKS)
def test_cross_entropy_equals_its_definition(inputs, token_chunk, vocab_chunk):
    labels = inputs["labels"]
    direct = lambda h, w: F.cross_entropy(h @ w.T, labels, ignore_index=IGNORE)  # noqa: E731
    expected = gradients(direct, inputs["h"], inputs["w"])
    chunked = lambda h, w: next_token_loss(h, w, labels, token_chunk, vocab_chunk)  # noqa: E731
    result = gradients(chunked, inputs["h"], inputs["w"])
    for name, got, wanted in zip(("loss", "d_hidden", "d_weight"), result, expected, strict=True):
        assert_matches_reference(name, got, wanted)


def test_kl_in_float32_is_close_to_float64(inputs):
    arguments = [inputs[name] for name in ("h", "w", "teacher_h", "teacher_w")]
    result = kl_divergence(*(x.float() for x in arguments), 8, 20)
    assert_matches_reference("loss", result, direct_kl(*(x.float().double() for x in arguments)))


def test_kl_of_half_precision_inputs_is_taken_in_float32(inputs):
    arguments = [inputs[name].bfloat16() for name in ("h", "w", "teacher_h", "teacher_w")]
    h, w, *teacher = arguments
    value, d_hidden, d_weight = gradients(lambda h, w: kl_divergence(h, w, *teacher), h, w)
    assert value.dtype == torch.float32 and d_hidden.dtype == d_weight.dtype == torch.bfloat16
    assert_matches_reference("loss", value, direct_kl(*(x.double() for x in arguments)))


def test_kl_is_zero_for_equal_models_and_positive_otherwise(inputs):
    h, w = inputs["h"], inputs["w"]
    assert kl_divergence(h, w, h, w).abs() < 1e-12
    assert kl_divergence(h + 0.1, w, h, w) > 1e-4


@pytest.mark.parametrize("position", range(0, N, 6))
def test_kl_counts_every_token(inputs, position):
    changed = inputs["h"].clone()
    changed[position] += 1
    before, after = (
        kl_divergence(h, inputs["w"], inputs["teacher_h"], inputs["teacher_w"], 8) for h in (inputs["h"], changed)
    )
    assert (before - after).abs() > 1e-4


def test_kl_needs_one_vocabulary(inputs):
    with pytest.raises(ValueError, match="kl_divergence: weight must have the teacher's vocabulary 53, got 52"):
        kl_divergence(inputs["h"], inputs["w"][:-1], inputs["teacher_h"], inputs["teacher_w"])


def test_frozen_weight_gets_no_gradient(inputs):
    h, w = inputs["h"].requires_grad_(), inputs["w"]
    kl_divergence(h, w, inputs["teacher_h"], inputs["teacher_w"]).backward()
    assert h.grad is not None and w.grad is None


def test_losses_are_unchanged_by_autocast(inputs):
    arguments = [inputs[name].float() for name in ("h", "w", "teacher_h", "teacher_w")]
    plain = kl_divergence(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl_divergence(*arguments), plain)


def test_token_losses_average_to_the_loss(inputs):
    labels = inputs["labels"]
    each = token_losses(inputs["h"], inputs["w"], labels, token_chunk=8)
    assert each.shape == labels.shape and (each[labels == IGNORE] == 0).all()
    mean = each.sum() / (labels != IGNORE).sum()
    assert_matches_reference("mean", mean, next_token_loss(inputs["h"], inputs["w"], labels))


def test_no_labels_is_no_loss(inputs):
    h = inputs["h"].requires_grad_()
    loss = next_token_loss(h, inputs["w"], torch.full((N,), IGNORE))
    loss.backward()
    assert loss == 0 and (h.grad == 0).all()


def test_labels_stop_at_documents():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert next_token_labels(ids).tolist() == [[6, 7, 8, 9, IGNORE]]
    documents = torch.tensor([[0, 0, 1, 1, 2]])
    assert next_token_labels(ids, documents).tolist() == [[6, IGNORE, 8, IGNORE, IGNORE]]


def test_mixer_mse_is_one_mean_a_layer():
    outputs, targets = [torch.zeros(2, 3, 4), torch.ones(2, 3, 4)], [torch.full((2, 3, 4), 2.0), torch.ones(2, 3, 4)]
    assert mixer_mse(outputs, targets).tolist() == [4.0, 0.0]
