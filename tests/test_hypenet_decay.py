"""The decays of recurrent layers: in full precision in every model, saved, loaded, and never made up."""

import copy
from datetime import timedelta

import pytest
import torch
from compare import rms
from hypenet_models import small_config, small_model, tokens
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from halo.compute import Compute
from halo.sharding import shard_student
from hypenet import HypeNetForCausalLM
from hypenet.mixers import MIXERS, alibi_log_decay
from hypenet.mixers.decay import LogDecay
from hypenet.modeling_hypenet import rotary_embedding

LAYERS = ["attn", "lightning-attn", "gdn", "mamba2"]
LIGHTNING, GDN, MAMBA2 = 1, 2, 3
HALF_LIVES = torch.tensor([3.0, 50.0, 700.0, 1e4])


def default_model(dtype=torch.float32):
    model = small_model(LAYERS, dtype)
    model.model.rotary_emb = rotary_embedding(model.config)  # `to` casts its frequencies, a file leaves them exact
    return model


def calibrated_model(dtype=torch.float32):
    """Return a model whose Lightning layer has other half-lives than the ALiBi slopes give."""
    model = default_model(dtype)
    model.model.layers[LIGHTNING].self_attn.log_decay.copy_(torch.tensor(0.5).log() / HALF_LIVES)
    return model


def assert_same_decays(model, other):
    mixers = [[layer.self_attn for layer in m.model.layers] for m in (model, other)]
    assert mixers[0][LIGHTNING].log_decay.dtype == torch.float32
    assert torch.equal(mixers[0][LIGHTNING].log_decay, mixers[1][LIGHTNING].log_decay)
    for layer in (GDN, MAMBA2):
        for name in ("A_log", "dt_bias"):
            own, other = (found[layer].decay_bias.get_parameter(name) for found in mixers)
            assert own.dtype == torch.float32 and torch.equal(own, other)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


# ---- saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [calibrated_model, default_model])
def test_decays_survive_a_file(tmp_path, dtype, make):
    model = make(dtype)
    model.save_pretrained(tmp_path)
    loaded, report = HypeNetForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    assert_same_decays(loaded, model)
    ids = tokens(2, 9)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert_same_decays(HypeNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model)


def test_decays_survive_meta_initialisation():
    for make in (calibrated_model, default_model):
        model = make()
        with torch.device("meta"):
            empty = HypeNetForCausalLM(model.config)
        for assign in (False, True):
            other = copy.deepcopy(empty) if assign else copy.deepcopy(empty).to_empty(device="cpu")
            other.load_state_dict(model.state_dict(), strict=True, assign=assign)
            assert_same_decays(other, model)


def test_a_state_without_decays_means_the_default():
    model = default_model()
    state = {name: x for name, x in model.state_dict().items() if not name.endswith("log_decay")}
    with torch.device("meta"):
        empty = HypeNetForCausalLM(model.config)
    empty.to_empty(device="cpu").load_state_dict(state, strict=True)
    assert_same_decays(empty, model)
    other = calibrated_model()
    other.load_state_dict(state, strict=True)
    assert_same_decays(other, model)


def test_memory_without_values_is_never_a_decay():
    with torch.device("meta"):
        model = HypeNetForCausalLM(small_config(LAYERS))
    model.to_empty(device="cpu")
    assert torch.equal(model.model.layers[LIGHTNING].self_attn.log_decay, alibi_log_decay(4))
    expected = calibrated_model()
    moved = copy.deepcopy(expected).to_empty(device="cpu")
    decays = [m.model.layers[LIGHTNING].self_attn.log_decay for m in (moved, expected)]
    assert torch.equal(*decays)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_in_bfloat16_gives_float32_decays(assign):
    model = small_model(LAYERS, torch.bfloat16)
    state = {name: x.bfloat16() for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    ids = tokens(1, 7)
    assert logits(model, ids).isfinite().all()
    for name in (
        "layers.1.self_attn.log_decay",
        "layers.2.self_attn.decay_bias.A_log",
        "layers.3.self_attn.decay_bias.dt_bias",
    ):
        saved = model.model.state_dict()[name]
        assert saved.dtype == torch.float32 and torch.equal(saved, state[f"model.{name}"].float())


def test_files_have_the_published_names(tmp_path):
    """A_log and dt_bias are the mixer's own in a file; files and states that name the submodule load too."""
    model = default_model()
    model.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    names = {f"model.layers.{layer}.self_attn.{name}" for layer in (2, 3) for name in ("A_log", "dt_bias")}
    assert names <= published.keys() and not any("decay.A_log" in name for name in published)

    other = default_model()
    missing, unexpected = other.load_state_dict(published, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    assert_same_decays(other, model)

    state = {name: x.clone() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = HypeNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_decays(loaded, model)


def test_offloaded_to_disk(tmp_path):
    pytest.importorskip("accelerate")
    model = calibrated_model()
    model.save_pretrained(tmp_path / "model")
    placement = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    placement |= {f"model.layers.{i}": "disk" for i in range(4)}
    options = {"device_map": placement, "offload_folder": tmp_path / "offload", "offload_buffers": True}
    ids = tokens(2, 9)
    for offload_buffers in (False, True):
        options["offload_buffers"] = offload_buffers
        loaded = HypeNetForCausalLM.from_pretrained(tmp_path / "model", **options)
        assert all(loaded.model.layers[i].self_attn.decay_bias.A_log.is_meta for i in (GDN, MAMBA2))
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        new = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.generate(ids, **new), model.generate(ids, **new))


def test_dispatched(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = calibrated_model()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    ids = tokens(2, 9)
    for include_buffers in (False, True):
        with accelerate.init_empty_weights(include_buffers=include_buffers):
            empty = HypeNetForCausalLM(model.config)
        empty.tie_weights()
        if include_buffers:
            empty.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # not in any state
        file = str(tmp_path / "pytorch_model.bin")
        loaded = accelerate.load_checkpoint_and_dispatch(empty, file, device_map={"": "cpu"}).eval()
        assert_same_decays(loaded, model)
        assert torch.equal(logits(loaded, ids), logits(model, ids))


# ---- initial values


@pytest.mark.parametrize(("kind", "smallest"), [("gdn", 0.0), ("mamba2", 1.0)])
def test_decays_start_in_their_range(kind, smallest):
    """In a new model, and in a mixer made from a teacher's layer: A in (smallest, 16), dt in [0.001, 0.1]."""
    sizes = {"num_attention_heads": 512, "num_key_value_heads": 1, "head_dim": 2, "hidden_size": 8}
    model = HypeNetForCausalLM(small_config(["attn", kind], **sizes, attn_use_output_gate=False))
    attention, own = (layer.self_attn for layer in model.model.layers)
    converted = MIXERS[kind].from_attention(attention, small_config(["attn", kind], **sizes), 1)
    for mixer in (own, converted):
        A, dt = mixer.decay_bias.A_log.exp(), torch.nn.functional.softplus(mixer.decay_bias.dt_bias)
        assert smallest <= A.min() < smallest + 0.2 and 15.8 < A.max() <= 16.001
        assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101
        assert abs(dt.log().mean() - dt.new_tensor(1e-2).log()) < 0.3  # log-uniform


# ---- precision


def test_gradients_keep_the_precision_of_their_parameters():
    model = default_model().train()
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    before = model.model.layers[GDN].self_attn.decay_bias.A_log.grad.clone()
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
    assert torch.equal(model.model.layers[GDN].self_attn.decay_bias.A_log.grad, before)
    torch.optim.AdamW(model.parameters()).step()


# ---- FSDP


def gradients_without_sharding(model, rows):
    """Return the mean of the gradients of single rows, with bfloat16 weights and float32 decays."""
    for name, parameter in model.named_parameters():
        if ".decay_bias." not in name:
            parameter.data = parameter.data.bfloat16()
    gradients = []
    for row in rows:
        model.zero_grad()
        model(row[None], labels=row[None], use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.float() for name, parameter in model.named_parameters()})
    return {name: sum(own[name] for own in gradients) / len(rows) for name in gradients[0]}


def shard(model, together):
    """Shard with bfloat16 arithmetic and float32 reductions, the decays in float32 units of their own."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    full = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    decays = [
        layer.self_attn.decay_bias for layer in model.model.layers if layer.self_attn.mixer_type in ("gdn", "mamba2")
    ]
    for unit in [decays] if together else decays:
        fully_shard(unit, mp_policy=full)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=half)
    return fully_shard(model, mp_policy=half)


def flatten(model):
    """Shard with FSDP 1, each layer a unit, and the decays of a mixer one of their own, as its docstring says."""
    policy = ModuleWrapPolicy({LogDecay, type(model.model.layers[0])})
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def worker(rank, directory):
    """Write the gradients of sharded models beside those of one process, from rank 0."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    options = {"world_size": 2, "rank": rank, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", **options)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, rows = default_model(dtype).train(), tokens(2, 21)
        expected = gradients_without_sharding(copy.deepcopy(model), rows)
        for together in (False, True):
            sharded = shard(copy.deepcopy(model), together)
            row = rows[rank : rank + 1]
            sharded(row, labels=row, use_cache=False).loss.backward()
            own = {name: parameter.grad.full_tensor().float() for name, parameter in sharded.named_parameters()}
            results.append((dtype, own, expected))
    flat = flatten(copy.deepcopy(model))  # in bfloat16
    flat(row, labels=row, use_cache=False).loss.backward()
    with FullyShardedDataParallel.summon_full_params(flat, with_grads=True):
        own = {name: parameter.grad.float() for name, parameter in flat.module.named_parameters()}
    results.append((dtype, {name.replace("_fsdp_wrapped_module.", ""): x for name, x in own.items()}, expected))
    dtypes = dtypes_in_training(rows[rank : rank + 1], rank)
    if rank == 0:
        torch.save(results, f"{directory}/gradients.pt")
        torch.save(dtypes, f"{directory}/dtypes.pt")
    dist.destroy_process_group()


class Loss(torch.nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, row):
        return self.student(row, labels=row, use_cache=False).loss


def dtypes_in_training(row, rank):
    """Return the dtypes of the mixers' parameters in a forward pass of halo's training in bfloat16, by name."""
    compute = Compute(torch.device("cpu"), torch.bfloat16, rank, 2, init_device_mesh("cpu", (2,)))
    student, seen = default_model(torch.float32).train(), {}
    root = Loss(student)
    shard_student(root, student, compute)
    for layer in student.model.layers:
        for module in layer.self_attn.modules():
            module.register_forward_hook(
                lambda module, *_: seen.update({name: x.dtype for name, x in module.named_parameters(recurse=False)})
            )
    with compute.autocast():
        root(row).backward()
    return seen


def test_sharded_gradients_equal_those_of_one_process(tmp_path):
    """With FSDP 2 and 1; also for a bfloat16 model, whose units would otherwise mix two dtypes, which both refuse."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    dtypes = torch.load(tmp_path / "dtypes.pt")  # of halo's own sharding
    assert dtypes.pop("A_log") == dtypes.pop("dt_bias") == torch.float32
    assert {*dtypes.values()} == {torch.bfloat16}
    for dtype, gradients, expected in torch.load(tmp_path / "gradients.pt"):
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            # The sum over the processes is rounded to the parameters' dtype; the decays' is float32 in both models.
            bound = 1e-5 if ".decay_bias." in name else max(2 * torch.finfo(dtype).eps, 1e-5)
            assert rms(gradient) > 0
            assert rms(gradients[name] - gradient) <= bound * rms(gradient), name
