"""Generate with the installed vLLM, in a process of its own: python vllm_generate.py MODEL_DIRECTORY < requests > results.

Requests and results are one line of JSON each: {"prompts": [[token, ...], ...], "rounds": n, "options": {...}}, and
generated tokens for each prompt and round.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main():
    requests = json.load(sys.stdin)
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, **requests["options"])
    sampling = SamplingParams(temperature=0, max_tokens=requests["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in requests["prompts"]]
    for _ in range(requests["rounds"]):
        results = llm.generate(prompts, sampling, use_tqdm=False)
        print("generated:", json.dumps([list(x.outputs[0].token_ids) for x in results]))


if __name__ == "__main__":
    main()
