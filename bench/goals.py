"""What the CPU kernels were to reach, beside what a record says of it."""

DELTA, GLA = "chunk_gated_delta_rule", "chunk_simple_gla"
HEADS, ATTENTION = "H=32 K=128 V=128", "H=32 HK=8 D=128"
LENGTHS, PASSES = (1024, 4096), ("fwd", "fwd+bwd")
HEADER = ["what", "goal", "measured"]


def rows(record):
    """[what, goal, measured] of every goal whose cases were all timed; several cases by semicolons, in their order."""
    timed = {row["name"]: row for row in record["rows"] if row["ours"] is not None}
    found = []
    for what, goal, measured in _goals(timed):
        try:
            found.append([what, goal, ", ".join(part() for part in measured)])
        except KeyError:  # not timed, or without this peer
            continue
    return found


def _goals(timed):
    def chunk(op, kind, dtype="float32", lengths=LENGTHS):
        return [f"{op} {kind} B=1 T={T} {HEADS} {dtype}" for T in lengths]

    def attention(kind, dtype="float32", lengths=LENGTHS):
        return [f"hype_attention {kind} B=1 T={T} {ATTENTION} {dtype}" for T in lengths]

    def decode(dtype="float32", batches=(1, 8)):
        return [f"hype_attention_decode fwd B={B} S=32768 {ATTENTION} {dtype}" for B in batches]

    def small(op):
        return [f"{op} {kind} B=1 T={T} H=2 K={K} V={K} float32" for T, K in ((16, 16), (128, 64)) for kind in PASSES]

    def small_attention(gated=""):
        sizes = ((16, 16), (128, 64))
        return [f"hype_attention {kind} B=1 T={T} H=2 HK=1 D={D}{gated} float32" for T, D in sizes for kind in PASSES]

    def over(peer, names):
        return lambda: _listed([timed[name]["peers"][peer]["ratio"] for name in names], ".3g", f"x {peer}")

    def faster(names, than):
        ratios = zip(names, than, strict=True)
        return lambda: _listed([timed[b]["ours"]["median"] / timed[a]["ours"]["median"] for a, b in ratios], ".3g", "x")

    def of_product(names):
        return lambda: _listed([100 * timed[name]["fraction"] for name in names], ".0f", "% of the product")

    def of_copy(names):
        def share(row):
            return 1e5 * row["bytes"] / row["ours"]["median"] / row["memory"]["copy"]

        return lambda: _listed([share(timed[name]) for name in names], ".0f", "% of a copy")

    forward, both = (chunk(DELTA, kind) for kind in PASSES)
    steps = [f"gated_delta_step fwd B={B} {HEADS} float32" for B in (1, 16)]
    in_cache = [f"gated_delta_step fwd B=1 {HEADS} cached=1 float32"]
    short = LENGTHS[:1]
    halves = [*(chunk(op, "fwd", "bfloat16", short)[0] for op in (DELTA, GLA)), *attention("fwd", "bfloat16", short)]
    singles = [*(chunk(op, "fwd", lengths=short)[0] for op in (DELTA, GLA)), *attention("fwd", lengths=short)]
    return [
        (
            "gated delta chunk forward, T = 1024; 4096",
            "5 x transformers, 3 x ggml, 70 % of the product",
            (over("transformers", forward), over("ggml", forward), of_product(forward)),
        ),
        ("the same, forward + backward", "5 x transformers", (over("transformers", both),)),
        ("simple GLA over gated delta, forward", "1.3 x", (faster(chunk(GLA, "fwd"), forward),)),
        ("the same, forward + backward", "1.3 x", (faster(chunk(GLA, "fwd+bwd"), both),)),
        (
            "gated delta step from memory, batch 1; 16",
            "10 x transformers, 2 x ggml, 70 % of a copy",
            (over("transformers", steps), over("ggml", steps), of_copy(steps)),
        ),
        (
            "the same from cache, batch 1",
            "10 x transformers, 2 x ggml",
            (over("transformers", in_cache), over("ggml", in_cache)),
        ),
        ("HyPE attention forward, T = 1024; 4096", "1.2 x torch SDPA", (over("torch SDPA", attention("fwd")),)),
        ("the same, forward + backward", "1.0 x torch SDPA", (over("torch SDPA", attention("fwd+bwd")),)),
        ("HyPE decode, 32k keys, batch 1; 8", "80 % of a copy", (of_copy(decode()),)),
        (
            "bfloat16 over float32: delta; GLA; attention forward; decode, batch 1; 8",
            "no slower",
            (faster([*halves, *decode("bfloat16")], [*singles, *decode()]),),
        ),
        (
            "small, T = 16; 128, each forward; forward + backward: delta, attention, gated attention",
            "no slower",
            (
                over("transformers", small(DELTA)),
                over("torch SDPA", small_attention()),
                over("torch SDPA", small_attention(" gated=1")),
            ),
        ),
    ]


def _listed(numbers, form, unit):
    return f"{'; '.join(format(number, form) for number in numbers)} {unit}"
