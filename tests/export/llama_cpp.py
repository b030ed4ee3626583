"""What llama.cpp makes of GGUF files, in a process of its own, which it ends where it meets what it cannot read.

python llama_cpp.py REQUEST.json ANSWER.json
"""

import json
import sys
from pathlib import Path

import xllamacpp


def complete(file, prompt, tokens):
    """Greedy continuation: the ids and log-probabilities of its tokens, and how many the prompt had."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    params.warmup, params.fit_params = False, False
    # as precise as the reference
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    content = answer["choices"][0]["logprobs"]["content"]
    return {
        "ids": [token["id"] for token in content],
        "logprobs": [token["logprob"] for token in content],
        "prompt_tokens": answer["usage"]["prompt_tokens"],
    }


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: complete(**request) for name, request in requests.items()}))
