"""`hypenet chat`, and the chat template in `hypenet generate`, on a small saved model."""

import pytest
import torch
from hypenet_models import VOCABULARY, small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from halo.hypenet_cli import app
from hypenet import HypeNetForCausalLM

# Each message is its role's token, the text and w93; the answer begins after w92.
MESSAGE = "{{ {'system': 'w90', 'user': 'w91', 'assistant': 'w92'}[m.role] }} {{ m.content }} w93 "
TEMPLATE = f"{{% for m in messages %}}{MESSAGE}{{% endfor %}}{{% if add_generation_prompt %}}w92 {{% endif %}}"
FORGETFUL = TEMPLATE.replace("messages %", "messages[-1:] %")  # as templates that leave out former thinking
REFUSING = "{{ raise_exception('Roles must alternate') }}"
GREEDY = ("--temperature", 0, "--max-new-tokens", 6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    small_model(dtype=torch.float32, attn_logits_scaling="hype 50").save_pretrained(path)
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)} | {"<unk>": VOCABULARY}  # the model writes no special token
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def templated(plain, tmp_path):
    """Return a function that gives the folder a chat template."""

    def make(template=TEMPLATE):
        AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(plain)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return make


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(x) for x in arguments], **options)


def answers(*arguments, **options):
    result = run("chat", *arguments, **options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout.splitlines()


def refusal(*arguments, **options):
    result = run(*arguments, **options)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and len(lines) == 1, result.output
    return lines[0]


def continued(folder, text):
    """Return the greedy continuation of a text, computed at once."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tokenizer.decode(new[0, ids.shape[1] :])


@pytest.fixture
def lengths(monkeypatch):
    """Return the list of the numbers of tokens of every call of the model."""
    seen, forward = [], HypeNetForCausalLM.forward

    def counted(self, input_ids, **options):
        seen.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(HypeNetForCausalLM, "forward", counted)
    return seen


def test_chat_reads_only_what_is_new(templated, lengths):
    folder = templated()
    first, second = answers("--model", folder, *GREEDY, input="w1 w2\n\nw3\n")
    # the second turn: the last token of the answer, w93 w91 w3 w93 w92
    assert lengths == [5, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1]
    assert first == continued(folder, "w91 w1 w2 w93 w92")
    assert second == continued(folder, f"w91 w1 w2 w93 w92 {first} w93 w91 w3 w93 w92")


def test_a_long_turn_is_read_in_pieces(templated, lengths):
    folder = templated()
    long = " ".join(["w7"] * 11)
    whole = answers("--model", folder, *GREEDY, input=f"w1\n{long}\n")
    pieces = lengths.copy()
    lengths.clear()
    assert answers("--model", folder, *GREEDY, "--prefill-chunk", 9, input=f"w1\n{long}\n") == whole
    assert pieces[6] == 16 and lengths[6:8] == [9, 7]


def test_a_template_that_changes_former_turns_is_read_anew(templated, lengths):
    folder = templated(FORGETFUL)
    first, second = answers("--model", folder, *GREEDY, input="w1\nw3\n")
    assert lengths[0] == lengths[6] == 4
    assert [first, second] == [continued(folder, f"w91 {word} w93 w92") for word in ("w1", "w3")]


def test_reset_quit_and_the_system_message(templated):
    folder = templated()
    options = ("--model", folder, *GREEDY, "--system", "w80")
    lines = answers(*options, input="w1\nw3\n/reset\nw1\n/quit\nw5\n")
    assert len(lines) == 3 and lines[2] == lines[0] == continued(folder, "w90 w80 w93 w91 w1 w93 w92")


def test_sampling_in_chat_follows_the_seed(templated):
    folder = templated()

    def sample(seed):
        return answers("--model", folder, "--temperature", 1.5, "--max-new-tokens", 20, "--seed", seed, input="w1\n")

    assert sample(1) == sample(1) != sample(2)


def test_chat_without_a_template_continues_plain_text(plain):
    line = refusal("chat", "--model", plain, input="w1\n")
    assert line == "hypenet: model: must have a tokenizer with a chat template, got none; --raw continues plain text"
    first, second = answers("--model", plain, "--raw", *GREEDY, input="w1 w2\nw3\n")
    assert first == continued(plain, "w1 w2") and second == continued(plain, f"w1 w2 {first} w3")
    assert "--system: must be left out" in refusal("chat", "--model", plain, "--raw", "--system", "w1", input="")


def test_what_chat_refuses(templated):
    folder = templated(REFUSING)
    line = refusal("chat", "--model", folder, input="w1\n")
    assert "chat template: must write this conversation, got Roles must alternate; --raw does without" in line
    assert "standard input, line 2: must be UTF-8, got byte 0xff at 0" in refusal(
        "chat", "--raw", "--model", folder, input=b"w1\n\xff\n"
    )
    assert answers("--model", folder, input="") == []


def test_generate_answers_with_the_template_unless_raw(templated, tmp_path_factory):
    folder = templated()
    context = tmp_path_factory.mktemp("text") / "context.txt"
    context.write_text("w5 ")
    arguments = ("generate", "--model", folder, "--prompt", "w1 w2", "--context", context, *GREEDY)
    result = run(*arguments)
    assert result.exit_code == 0 and result.stderr.startswith("prefill 6 tokens in ")
    assert ", decode 5 tokens in " in result.stderr
    assert result.stdout == continued(folder, "w91 w5 w1 w2 w93 w92") + "\n"
    assert run(*arguments, "--raw").stdout == "w1 w2" + continued(folder, "w5 w1 w2") + "\n"
