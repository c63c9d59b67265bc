"""Generate with the installed vLLM, in a process of its own: python vllm_generate.py MODEL_DIRECTORY < request.

The request is JSON: {"prompts": [[token, ...], ...], "max_tokens": n, "rounds": n, "options": {...}}. Every round
prints "generated: " and JSON: {"tokens": those of each prompt, "cached": how many of each prompt the prefix cache had}.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main():
    request = json.load(sys.stdin)
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, **request["options"])
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    for _ in range(request["rounds"]):
        results = llm.generate(prompts, sampling, use_tqdm=False)
        found = {"tokens": [list(x.outputs[0].token_ids) for x in results]}
        print("generated:", json.dumps(found | {"cached": [x.num_cached_tokens for x in results]}))


if __name__ == "__main__":
    main()
