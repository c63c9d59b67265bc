"""The losses over the vocabulary equal their definitions in float64, in value and gradient, for any chunking."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_matches_reference
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.losses import traced_bytes
from halo import losses
from halo.losses import IGNORE, kl_divergence, next_token_labels, next_token_loss, token_losses

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


@pytest.mark.parametrize("count", [1, 50.0, torch.tensor(50)])
def test_count_of_the_whole_batch_divides_the_sum(inputs, count):
    h, w, labels, teacher = inputs["h"], inputs["w"], inputs["labels"], (inputs["teacher_h"], inputs["teacher_w"])
    factor = 1 / float(count)
    kl = gradients(lambda h, w: direct_kl(h, w, *teacher) * N * factor, h, w)
    ce = gradients(lambda h, w: F.cross_entropy(h @ w.T, labels, ignore_index=IGNORE, reduction="sum") * factor, h, w)
    for expected, loss in (
        (kl, lambda h, w: kl_divergence(h, w, *teacher, 8, 20, count=count)),
        (ce, lambda h, w: next_token_loss(h, w, labels, 8, 20, count=count)),
    ):
        for name, got, wanted in zip(("loss", "d_hidden", "d_weight"), gradients(loss, h, w), expected, strict=True):
            assert_matches_reference(name, got, wanted)


@pytest.mark.parametrize("size", [1, 5, 36])
def test_gradient_does_not_depend_on_the_micro_batch(inputs, size):
    """Micro-batches have different numbers of labels, down to none."""
    labels = inputs["labels"].clone()
    labels[:8] = IGNORE
    whole = gradients(lambda h, w: next_token_loss(h, w, labels), inputs["h"], inputs["w"])
    count = (labels != IGNORE).sum()

    def parts(h, w):
        pairs = zip(h.split(size), labels.split(size), strict=True)
        return sum(next_token_loss(part, w, y, count=count) for part, y in pairs)

    for name, got, wanted in zip(
        ("loss", "d_h", "d_w"), gradients(parts, inputs["h"], inputs["w"]), whole, strict=True
    ):
        assert_matches_reference(name, got, wanted)


@pytest.mark.parametrize("chunks", [(3, None), (3, 4), (2, 1)])
def test_gradcheck(chunks):
    generator = torch.Generator().manual_seed(0)
    h, w, teacher_h, teacher_w = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (7, 3), (5, 4), (7, 4))
    )
    h.requires_grad_(), w.requires_grad_()
    labels = torch.tensor([0, 6, IGNORE, 3, 3])
    assert torch.autograd.gradcheck(lambda h, w: kl_divergence(h, w, teacher_h, teacher_w, *chunks), (h, w))
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, labels, *chunks), (h, w))


def test_backward_twice_through_a_kept_graph(inputs):
    h, w = (inputs[name].clone().requires_grad_() for name in ("h", "w"))
    loss = 2 * next_token_loss(h, w, inputs["labels"])
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (h, w))
    assert all(torch.equal(x, y) for x, y in zip(kept, first, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(kept, second, strict=True))


def test_tied_gradient_is_the_sum_of_the_untied(inputs):
    """The student's head is its embedding, whose gradient gets both contributions."""
    ids, teacher = torch.arange(N) % V, (inputs["teacher_h"], inputs["teacher_w"])
    embedding, head = (inputs["w"].clone().requires_grad_() for _ in range(2))
    kl_divergence(embedding[ids].tanh(), head, *teacher, 8).backward()
    tied = inputs["w"].clone().requires_grad_()
    kl_divergence(tied[ids].tanh(), tied, *teacher, 8).backward()
    assert_matches_reference("d_weight", tied.grad, embedding.grad + head.grad)


def test_frozen_hidden_states_get_no_gradient(inputs):
    h, w = inputs["h"], inputs["w"].requires_grad_()
    next_token_loss(h, w, inputs["labels"]).backward()
    assert h.grad is None and w.grad is not None


@pytest.mark.parametrize("factor", [1, 3])
def test_the_weights_gradient_is_the_buffer_itself(inputs, factor, monkeypatch):
    """Neither a copy nor a second buffer of [V, D]."""
    buffers = []
    save = losses._Gradients.save

    def recorded(self, ctx):
        buffers.append(self.d_weight.data_ptr())
        save(self, ctx)

    monkeypatch.setattr(losses._Gradients, "save", recorded)
    w = inputs["w"].clone().requires_grad_()
    (factor * next_token_loss(inputs["h"].requires_grad_(), w, inputs["labels"])).backward()
    assert buffers == [w.grad.data_ptr()]


@pytest.mark.parametrize("wrong", [V, -1, -101, 2**40])
def test_labels_outside_the_vocabulary_are_refused(inputs, wrong):
    labels = inputs["labels"].clone()
    labels[11] = wrong
    for loss in (next_token_loss, token_losses):
        message = f"{loss.__name__}: labels must be from 0 to 52, or -100, got {wrong}$"
        with pytest.raises(ValueError, match=message):
            loss(inputs["h"], inputs["w"], labels)


def test_kl_needs_as_many_tokens_of_the_teacher(inputs):
    with pytest.raises(ValueError, match=r"kl_divergence: hidden must have the teacher's tokens \[36\], got \[37\]"):
        kl_divergence(inputs["h"], inputs["w"], inputs["teacher_h"][:-1], inputs["teacher_w"])


def test_large_logits(inputs):
    """Logits of 1,000 and more, of either sign: nothing overflows, and probabilities of zero add nothing."""
    h, w, *teacher = (inputs[name] * 20 for name in ("h", "w", "teacher_h", "teacher_w"))
    for chunks in ((8, None), (8, 20)):
        for dtype in (torch.float64, torch.float32):
            arguments = [x.to(dtype) for x in (h, w, *teacher)]
            assert_matches_reference("loss", kl_divergence(*arguments, *chunks), direct_kl(h, w, *teacher), dtype=dtype)


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_blocks_do_not_change_the_result(inputs, block, monkeypatch):
    teacher = inputs["teacher_h"], inputs["teacher_w"]
    run = lambda: (  # noqa: E731
        gradients(lambda h, w: kl_divergence(h, w, *teacher, 8), inputs["h"], inputs["w"])
        + gradients(lambda h, w: next_token_loss(h, w, inputs["labels"], 8, 20), inputs["h"], inputs["w"])
    )
    expected = run()
    monkeypatch.setattr(losses, "BLOCK", block)
    for got, wanted in zip(run(), expected, strict=True):
        assert_matches_reference("result", got, wanted)


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Give the CPU the products that PyTorch has on CUDA alone: of bf16 into fp32, under CUDA's own rules."""
    calls = []

    def check(a, b, out_dtype, out):
        calls.append(a.dtype)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == out.dtype == torch.float32

    def mm(a, b, out_dtype, *, out):
        check(a, b, out_dtype, out)
        return out.copy_(a.double() @ b.double())

    def addmm(x, a, b, out_dtype, *, beta=1, alpha=1, out):
        check(a, b, out_dtype, out)
        assert x.dtype == torch.float32 and beta == alpha == 1
        return out.copy_(x.double() + a.double() @ b.double())

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(losses, "_accumulates_bfloat16", lambda device_type: True)
    yield calls
    library._destroy()


@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), CHUNKS)
def test_bfloat16_operands_with_float32_results(inputs, bfloat16_products, token_chunk, vocab_chunk):
    """The only rounding is that of d_logits to bf16: the loss is that of fp32, the gradients are within eps of bf16."""
    arguments = [inputs[name].bfloat16() for name in ("h", "w", "teacher_h", "teacher_w")]
    h, w, *teacher = arguments
    wide_teacher = [x.double() for x in teacher]
    expected = gradients(lambda h, w: direct_kl(h, w, *wide_teacher), h.double(), w.double())
    got = gradients(lambda h, w: kl_divergence(h, w, *teacher, token_chunk, vocab_chunk), h, w)
    assert bfloat16_products and got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == torch.bfloat16
    for name, result, wanted in zip(("loss", "d_hidden", "d_weight"), got, expected, strict=True):
        assert_matches_reference(name, result, wanted)

    labels = inputs["labels"]
    expected = gradients(lambda h, w: F.cross_entropy(h @ w.T, labels), h.double(), w.double())
    got = gradients(lambda h, w: next_token_loss(h, w, labels, token_chunk, vocab_chunk), h, w)
    for name, result, wanted in zip(("loss", "d_hidden", "d_weight"), got, expected, strict=True):
        assert_matches_reference(name, result, wanted)


def test_autocast_rounds_the_operands_where_products_of_bfloat16_are_exact(inputs, bfloat16_products):
    h, w, *teacher = (inputs[name].float() for name in ("h", "w", "teacher_h", "teacher_w"))
    with torch.autocast("cpu", torch.bfloat16):
        value, d_hidden, d_weight = gradients(lambda h, w: kl_divergence(h, w, *teacher), h, w)
    assert bfloat16_products and value.dtype == d_hidden.dtype == d_weight.dtype == torch.float32
    rounded = [x.bfloat16().double() for x in (h, w, *teacher)]
    assert_matches_reference("loss", value, direct_kl(*rounded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_operands_are_widened(inputs, bfloat16_products, dtype):
    arguments = [inputs[name].to(dtype) for name in ("h", "w", "teacher_h", "teacher_w")]
    kl_divergence(*arguments)
    assert not bfloat16_products


def test_gradients_of_a_large_batch_do_not_underflow(inputs, bfloat16_products):
    """(q - p) / count is about 1e-10 here: below the range of float16, not of bf16."""
    h, w = inputs["h"].bfloat16(), inputs["w"].bfloat16()
    whole = gradients(lambda h, w: next_token_loss(h, w, inputs["labels"], count=1), h, w)
    part = gradients(lambda h, w: next_token_loss(h, w, inputs["labels"], count=2**33), h, w)
    for name, small, large in zip(("loss", "d_hidden", "d_weight"), part, whole, strict=True):
        assert torch.equal(small * 2**33, large), name


def peak_bytes(run):
    """Return the most bytes that are allocated at a time while running, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("vocab_chunk", [None, 1000])
@pytest.mark.parametrize(("loss", "workspaces"), [("kl", 2), ("ce", 1)])
def test_peak_memory(loss, workspaces, vocab_chunk, monkeypatch):
    """Beyond the gradients: the workspaces, and a block's temporaries, of which none outlives it."""
    tokens, size, vocabulary, chunk, block = 128, 16, 4000, 64, 32000
    monkeypatch.setattr(losses, "BLOCK", block)
    h, w = torch.randn(tokens, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    teacher, labels = (torch.randn(tokens, size), torch.randn(vocabulary, size)), torch.arange(tokens)

    def run():
        if loss == "kl":
            kl_divergence(h, w, *teacher, chunk, vocab_chunk).backward()
        else:
            next_token_loss(h, w, labels, chunk, vocab_chunk).backward()

    run()
    h.grad = w.grad = None
    width = vocab_chunk or vocabulary
    gradients = 4 * (tokens + vocabulary) * size
    bound = gradients + 4 * (workspaces * chunk * width + (3 if loss == "kl" else 1) * block) + 16 * 1024
    peak = peak_bytes(run)
    assert gradients + 4 * workspaces * chunk * width <= peak <= bound


@pytest.mark.parametrize("loss", ["kl_divergence", "next_token_loss"])
def test_peak_memory_of_a_large_model(loss):
    """Qwen3's vocabulary, 8k tokens: under 1.0 GB beyond bf16 inputs and the fp32 gradient of the weight.

    Two (one) workspaces of [512, V], softmax in blocks, d_hidden in fp32 and bf16; at the end, the gradient in bf16.
    """
    tokens, size, vocabulary, chunk = 8192, 2048, 151_936, 512
    workspaces, temporaries = (2, 3) if loss == "kl_divergence" else (1, 1)
    in_forward = 4 * (workspaces * chunk * vocabulary + temporaries * losses.BLOCK + tokens * size)
    at_the_end = 2 * size * vocabulary + 2 * tokens * size
    traced = traced_bytes(loss, tokens, vocabulary, size, chunk, torch.bfloat16)
    assert 0.9 * max(in_forward, at_the_end) < traced < 1.01 * max(in_forward, at_the_end) < 1e9


def test_nothing_waits_for_the_device(inputs, monkeypatch):
    """No value of a tensor is read on the way, nor a size that depends on values."""
    monkeypatch.setattr(losses, "_check_labels", lambda *_: None)  # on a GPU, an assertion on the device
    read = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                read.append(func)
            return func(*args, **(kwargs or {}))

    h, w = (inputs[name].requires_grad_() for name in ("h", "w"))
    with Recorder():
        next_token_loss(h, w, inputs["labels"], 8, 20).backward()
        next_token_loss(h, w, inputs["labels"], 8, count=torch.tensor(34)).backward()
        kl_divergence(h, w, inputs["teacher_h"], inputs["teacher_w"], 8, count=torch.tensor(34)).backward()
        token_losses(h, w, inputs["labels"], 8)
    assert not read


@pytest.mark.cuda
@pytest.mark.parametrize("vocab_chunk", [None, 20])
def test_on_a_gpu(inputs, vocab_chunk):
    """With bf16 operands and fp32 results, and without a wait."""
    h, w, *teacher = (inputs[name].bfloat16().cuda() for name in ("h", "w", "teacher_h", "teacher_w"))
    labels, exact = inputs["labels"].cuda(), [x.double() for x in (h, w, *teacher)]
    assert losses._accumulates_bfloat16("cuda")
    expected = gradients(lambda h, w: direct_kl(h, w, *exact[2:]), *exact[:2])
    expected += gradients(lambda h, w: F.cross_entropy(h @ w.T, labels), *exact[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = gradients(lambda h, w: kl_divergence(h, w, *teacher, 8, vocab_chunk), h, w)
        got += gradients(lambda h, w: next_token_loss(h, w, labels, 8, vocab_chunk), h, w)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got[0].dtype == got[3].dtype == torch.float32
    for name, result, wanted in zip(2 * ("loss", "d_hidden", "d_weight"), got, expected, strict=True):
        assert_matches_reference(name, result.cpu(), wanted.cpu())
