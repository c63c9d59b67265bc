"""The vLLM plugin computes what hypenet computes, for batches of prompts, pieces of prompts and decode steps.

It runs against a stand-in for vLLM's interfaces, and, where vLLM is installed, inside vLLM.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import vllm_stand_in
from compare import assert_matches_reference
from hypenet_models import small_config, small_model, tokens

import hypenet.integrations
from hypenet import HypeNetCache, HypeNetForCausalLM

ROOT = Path(__file__).resolve().parents[1]
IS_INSTALLED = importlib.util.find_spec("vllm") is not None
CAPACITY = 64  # tokens of a sequence
BLOCKS = 12
PAGE = 8192  # bytes; the largest state has 4 * 16 * 16 * 4


@pytest.fixture
def plugin(monkeypatch):
    vllm_stand_in.install(monkeypatch)
    module = importlib.import_module("hypenet.integrations.vllm")
    yield module
    sys.modules.pop("hypenet.integrations.vllm")


def weights_of(model):
    """Return the weights by their names in a file."""
    return [(name.replace(".decay_bias", ""), weight) for name, weight in model.state_dict().items()]


class Server:
    """Runs batches as vLLM's model runner does: every sequence has a block, whose content it has to expect nothing of.

    Args:
        plugin: The module.
        model: The HypeNet with the weights.
        options: Fields of vLLM's configuration.
    """

    def __init__(self, plugin, model, **options):
        self.vllm_config = vllm_stand_in.vllm_config(model.config, **options)
        self.model = plugin.HypeNetForCausalLM(vllm_config=self.vllm_config)
        self.loaded = self.model.load_weights(weights_of(model))
        self.layers = self.vllm_config.compilation_config.static_forward_context
        self.states = {name: x for name, x in self.layers.items() if isinstance(x, plugin.PagedState)}
        for name, layer in self.layers.items():
            if name in self.states:
                pages = torch.full((BLOCKS, 1, 1, PAGE), -1, dtype=torch.int8)  # NaN in float32
                layer.bind_kv_cache(pages)
            else:
                layer.kv_cache = torch.full((BLOCKS, CAPACITY, 2, layer.num_kv_heads, layer.head_size), torch.nan)
        self.builder = plugin.StateBackend.get_builder_cls()(
            vllm_stand_in.SimpleNamespace(block_size=16), list(self.states), self.vllm_config, torch.device("cpu")
        )
        self.seen = {}

    def metadata(self, batch, blocks, padding=0):
        """Return vLLM's description of a batch {sequence: tokens}, with this many rows of padding."""
        lengths = [len(ids) for ids in batch.values()] + [0] * padding
        totals = [self.seen.get(name, 0) + len(ids) for name, ids in batch.items()] + [0] * padding
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        table = torch.tensor([blocks[name] for name in batch] + [[0] * 4] * padding, dtype=torch.int32)
        return vllm_stand_in.CommonAttentionMetadata(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds,
            seq_lens=torch.tensor(totals, dtype=torch.int32),
            num_reqs=len(lengths),
            num_actual_tokens=int(bounds[-1]) + padding,
            max_query_len=max(lengths),
            block_table_tensor=table,
            is_prefilling=torch.tensor([n == t or n > 1 for n, t in zip(lengths, totals, strict=True)]),
            seq_lens_cpu_upper_bound=torch.tensor(totals, dtype=torch.int32),
        )

    @torch.inference_mode()
    def run(self, batch, blocks, padding=0):
        """Run a batch {sequence: tokens}, sequences that decode first, and return the logits of each."""
        common = self.metadata(batch, blocks, padding)
        built = self.builder.build(0, common)
        named = {name: built if name in self.states else common for name in self.layers}
        vllm_stand_in.FORWARD_CONTEXT.attn_metadata = named
        ids = torch.cat([*batch.values(), torch.zeros(padding, dtype=torch.long)])
        positions = [torch.arange(len(x)) + self.seen.get(name, 0) for name, x in batch.items()]
        hidden = self.model(ids, torch.cat([*positions, torch.zeros(padding, dtype=torch.long)]))
        assert hidden.isfinite().all()
        for name, x in batch.items():
            self.seen[name] = self.seen.get(name, 0) + len(x)
        logits = self.model.compute_logits(hidden[: len(hidden) - padding])
        return dict(zip(batch, logits.split([len(x) for x in batch.values()]), strict=True))


# Each batch: how many tokens of which sequence. Sequences that decode come first, as vLLM sorts them.
PROMPTS = [{"a": 20, "b": 1, "c": 7}]
STEPS = [{"c": 1, "a": 1, "b": 1}, {"b": 1}, {"b": 1, "c": 1, "a": 1}]
MIXES = [{"a": 1, "d": 9}, {"d": 1, "a": 1, "b": 5, "e": 1}, {"d": 1, "c": 30, "e": 2}]


def check(plugin, model, schedule, padding=0, **options):
    """Assert that all logits of a schedule are those of hypenet for each sequence alone, and return the server."""
    single = model.float()
    double = HypeNetForCausalLM(model.config).eval()
    double.load_state_dict(single.state_dict())
    double.double()
    server, caches = Server(plugin, single, **options), {}
    texts = {name: tokens(CAPACITY) for name in "abcde"}
    blocks = {name: [i + 3] * 4 for i, name in enumerate(texts)}
    found, eager = {name: [] for name in texts}, {name: [] for name in texts}
    for batch in schedule:
        starts = {name: server.seen.get(name, 0) for name in batch}
        pieces = {name: texts[name][starts[name] : starts[name] + n] for name, n in batch.items()}
        for name, logits in server.run(pieces, blocks, padding=padding if max(batch.values()) == 1 else 0).items():
            found[name].append(logits)
            with torch.inference_mode():
                own = single(pieces[name][None], past_key_values=caches.setdefault(name, HypeNetCache(single.config)))
            eager[name].append(own.logits[0])
    with torch.inference_mode():
        reference = [double(texts[x][None, :n], use_cache=False).logits[0] for x, n in sorted(server.seen.items())]
    found, eager = (torch.cat([y for name in sorted(server.seen) for y in x[name]]) for x in (found, eager))
    assert_matches_reference("logits", found, torch.cat(reference), eager=eager)
    return server


def test_logits_are_those_of_hypenet(plugin):
    check(plugin, small_model(attn_logits_scaling="hype 50"), PROMPTS + STEPS + MIXES)


OPTIONS = {
    "published": {"tie_word_embeddings": False, "attn_logits_scaling": "hype"},
    "qwen3": {"attn_use_rope": True, "attn_use_output_gate": False, "attn_logits_scaling": 0.5},
    "llama": {"attn_use_rope": True, "attn_use_qk_norm": False, "attention_bias": True, "mlp_bias": True},
    "grouped": {"lightning_nkv": 2, "gdn_nh": 8, "mamba2_nh": 2, "mamba2_nkv": 1, "gdn_activation": "silu"},
    "no gates": {"lightning_use_output_gate": False, "gdn_use_gate": False, "lightning_use_output_norm": False},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_with_other_options(plugin, options):
    check(plugin, small_model(**OPTIONS[options]), PROMPTS + MIXES[:1])


def test_rows_of_padding_change_nothing(plugin):
    server = check(plugin, small_model(), PROMPTS + STEPS[:2], padding=3)
    for state in server.states.values():
        (pool,) = state.kv_cache
        used = [3, 4, 5]
        assert pool[used].isfinite().all()
        assert pool[[i for i in range(1, BLOCKS) if i not in used]].isnan().all()
        assert pool.stride(0) * 4 == PAGE and pool[0].is_contiguous()


def test_a_block_is_used_again(plugin):
    """A prompt of one token, alone in its batch, starts from zero and not from what an earlier sequence left."""
    model = small_model().float()
    server, ids = Server(plugin, model), tokens(9)
    server.run({"a": ids}, {"a": [2] * 4})
    again = server.run({"b": ids[:1]}, {"b": [2] * 4})["b"]
    with torch.inference_mode():
        assert_matches_reference("logits", again, model.double()(ids[None, :1]).logits[0], dtype=torch.float32)


def test_blocks_that_follow_the_sequence(plugin):
    """With prefix caching the state of a sequence is in the block of its last token."""
    server = Server(plugin, small_model(), mode="align")
    server.seen = {"a": 16, "b": 31, "c": 0}
    batch = {"a": tokens(1), "b": tokens(1), "c": tokens(3)}
    built = server.builder.build(0, server.metadata(batch, {"a": [5, 6, 0, 0], "b": [7, 8, 0, 0], "c": [9, 0, 0, 0]}))
    assert built.decode_slots.tolist() == [6, 8] and built.prefill_slots.tolist() == [9]
    assert built.cu_seqlens.tolist() == [0, 3] and built.new_blocks.tolist() == [9]


def test_recorded_graphs_read_the_slots_at_one_address(plugin):
    server = Server(plugin, small_model())
    blocks = {"a": [5] * 4, "b": [7] * 4}
    common = server.metadata({"a": tokens(1), "b": tokens(1)}, blocks, padding=1)
    captured = server.builder.build_for_cudagraph_capture(common)
    assert (captured.num_decodes, captured.decode_slots.tolist()) == (3, [5, 7, -1])
    server.seen = {"b": 4}
    built = server.builder.build(0, server.metadata({"b": tokens(1)}, blocks, padding=2))
    assert built.decode_slots.data_ptr() == captured.decode_slots.data_ptr()
    assert built.decode_slots.tolist() == [7, -1, -1] and captured.decode_slots.tolist() == [7, -1, -1]


def test_without_a_cache(plugin):
    """vLLM measures memory before there is one."""
    server = Server(plugin, small_model().float())
    state = next(iter(server.states.values()))
    run = plugin.Recurrence((torch.ones(1, 5, 4, 16),) * 3, None, None)
    for metadata in (None, {}):
        vllm_stand_in.FORWARD_CONTEXT.attn_metadata = metadata
        assert not state.recur(run).any()


def test_every_weight_is_loaded(plugin):
    model = small_model(tie_word_embeddings=False, attention_bias=True).float()
    server = Server(plugin, model)
    named = dict(server.model.named_parameters())
    assert server.loaded == set(model.state_dict()) >= set(named)
    for name, weight in model.state_dict().items():
        found = server.model.state_dict()[name]
        assert found.dtype == weight.dtype and torch.equal(found[: len(weight)], weight), name
    with pytest.raises(ValueError, match=r"no module or parameter named 'model\.layers\.1\.self_attn\.surplus'"):
        server.model.load_weights([("model.layers.1.self_attn.surplus", torch.ones(2))])


def test_a_published_file_has_no_decays(plugin):
    model = small_model(["attn", "lightning"]).float()
    server = Server(plugin, model)
    server.model.model.layers[1].self_attn.log_decay.mul_(1)
    loaded = server.model.load_weights([(n, x) for n, x in weights_of(model) if not n.endswith("log_decay")])
    assert loaded >= set(dict(server.model.named_parameters()))


def test_vllm_makes_the_linear_layers(plugin):
    server = Server(plugin, small_model())
    linears = {name: x for name, x in server.model.named_modules() if isinstance(x, torch.nn.Linear)}
    assert linears and all(type(x) is vllm_stand_in.ReplicatedLinear for x in linears.values())
    assert all(name == x.prefix for name, x in linears.items())


def test_blocks_are_sized_for_the_largest_state(plugin):
    config = small_config(gdn_nh=8, lightning_nh=4)
    given = vllm_stand_in.vllm_config(config)
    assert plugin.HypeNetForCausalLM.get_mamba_state_shape_from_config(given) == ((8, 16, 16),)
    assert plugin.HypeNetForCausalLM.get_mamba_state_dtype_from_config(given) == (torch.float32,)
    assert len(plugin.HypeNetForCausalLM.get_mamba_state_copy_func()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel_config__tensor_parallel_size": 2}, "tensor_parallel_size must be 1, got 2"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1, got 2"),
        ({"speculative_config": "ngram"}, "speculative_config must be None, got 'ngram'"),
        ({"cache_config__mamba_ssm_cache_dtype": "bfloat16"}, "mamba_ssm_cache_dtype must be 'auto' or 'float32'"),
    ],
)
def test_what_is_not_supported(plugin, options, message):
    with pytest.raises(ValueError, match=message):
        plugin.HypeNetForCausalLM(vllm_config=vllm_stand_in.vllm_config(small_config(), **options))


def test_a_model_without_attention_is_refused(plugin):
    with pytest.raises(ValueError, match="mixer_types must have a layer of 'attn'"):
        plugin.HypeNetForCausalLM(vllm_config=vllm_stand_in.vllm_config(small_config(["gdn"])))


def test_two_layers_of_one_name(plugin):
    given = vllm_stand_in.vllm_config(small_config())
    plugin.PagedState((1, 4, 4), given, "a.0")
    with pytest.raises(ValueError, match=r"PagedState: prefix must be new, got 'a\.0' again"):
        plugin.PagedState((1, 4, 4), given, "a.0")


def test_registration(plugin, monkeypatch):
    """The entry point names a function that names the model's class."""
    monkeypatch.setattr(vllm_stand_in.ModelRegistry, "models", {})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["hypenet"].split(":")
    getattr(importlib.import_module(module), function)()
    assert set(vllm_stand_in.ModelRegistry.models) == set(hypenet.integrations.ARCHITECTURES)
    for place in vllm_stand_in.ModelRegistry.models.values():
        module, name = place.split(":")
        assert getattr(importlib.import_module(module), name) is plugin.HypeNetForCausalLM


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED or torch.cuda.is_available(), reason="needs vLLM, built for the CPU")
@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no prefix cache"])
def test_generation_inside_vllm(caching, tmp_path):
    """vLLM, which finds the plugin by its entry point, generates hypenet's tokens: prompts in pieces, in mixed batches.

    The last prompt begins as another one does, and everything is asked for twice.
    """
    model = small_model(dtype=torch.float32, head_dim=32, attn_logits_scaling="hype 50")
    model.save_pretrained(tmp_path)
    prompts = [tokens(n).tolist() for n in (5, 1, 40, 150, 33)]
    prompts.append(prompts[3][:140] + tokens(10).tolist())
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    settings = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    settings["enable_prefix_caching"] = caching
    request = {"prompts": prompts, "max_tokens": 12, "rounds": 2, "options": settings}
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("vllm_generate.py"), tmp_path],
        input=json.dumps(request),
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("generated: ")]
    results = [json.loads(line.removeprefix("generated: ")) for line in lines]
    assert [x["tokens"] for x in results] == [expected] * 2
    assert (sum(results[1]["cached"]) > 0) == caching
