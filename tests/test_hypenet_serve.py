"""`transformers serve` with a saved HypeNet, through HTTP: the same text as `generate`, and what it refuses."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from halo_tiny import tiny_tokenizer
from hypenet_models import small_model
from transformers.utils.import_utils import is_serve_available

ROOT = Path(__file__).parent.parent
START = "from transformers.cli.transformers import main; main()"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SECONDS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason='needs pip install ".[serve]"'),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = small_model(dtype=torch.float32, vocab_size=len(tokenizer), pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@contextmanager
def serving(folder, *options):
    """Yield the client of a server that runs in a process of its own."""
    from openai import OpenAI

    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", START, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--trust-remote-code", *options]
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | home, stdin=subprocess.DEVNULL)
        try:
            until = time.monotonic() + SECONDS
            while True:
                assert process.poll() is None and time.monotonic() < until, (folder / "log.txt").read_text()
                with closing(socket.socket()) as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        finally:
            process.terminate()
            process.wait(SECONDS)


def expected(model, tokenizer, text, tokens):
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    new = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_folder_is_served(saved):
    folder, model, tokenizer = saved
    asked = {"model": str(folder), "max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": "river stone"}]
    with serving(folder) as client:
        answer = client.chat.completions.create(messages=messages, **asked)
        text = expected(model, tokenizer, "user: river stone\nassistant: ", 6)
        assert answer.choices[0].message.content == text
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "length")
        streamed = list(client.chat.completions.create(messages=messages, stream=True, **asked))
        assert len(streamed) > 2
        assert "".join(x.choices[0].delta.content or "" for x in streamed if x.choices) == text
        completed = client.completions.create(prompt="river stone", **asked).choices[0].text
        assert completed == expected(model, tokenizer, "river stone", 6)


def test_the_example_of_the_documentation(saved, capsys):
    folder = saved[0]
    [block] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "serve.md").read_text(), re.MULTILINE | re.DOTALL)
    with serving(folder) as client:
        block = block.replace("http://127.0.0.1:8000/v1", str(client.base_url)).replace("OUT/model", str(folder))
        exec(compile(block, "docs/serve.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_a_compiled_static_cache_is_refused_in_the_log(saved):
    from openai import InternalServerError

    folder = saved[0]
    with serving(folder, "--compile") as client, pytest.raises(InternalServerError):
        client.completions.create(prompt="river stone", model=str(folder), max_tokens=2)
    assert "cache_implementation must be None, got 'static'" in (folder / "log.txt").read_text()
