"""Runs vLLM's engine on CPU for `test_vllm`, in the environment of vLLM.

Reads a request as JSON from standard input, ``{"model", "options", "rounds", "max_tokens"}``, and
prints one line of JSON for each round of prompts.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    engine = LLM(request["model"], disable_log_stats=False, **request["options"])
    sampling = SamplingParams(max_tokens=request["max_tokens"], temperature=0, ignore_eos=True)
    for prompts in request["rounds"]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(inputs, sampling, use_tqdm=False)
        counters = {x.name: x.value for x in engine.get_metrics() if hasattr(x, "value")}
        result = {
            "tokens": [list(x.outputs[0].token_ids) for x in outputs],
            "cached": [x.num_cached_tokens for x in outputs],
            "preemptions": counters["vllm:num_preemptions"],
        }
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":  # vLLM imports this file again in the process of its engine
    main()
