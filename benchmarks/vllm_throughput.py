"""vLLM's output tokens per second on traces given on stdin, for ``benchmarks.throughput``, which says what it is for.

Reads one JSON object (shape, traces, max_model_len, max_num_seqs, temperature) and ends with one JSON line: output
tokens per second by trace. A process of its own, because an engine does not give a GPU's memory back. Weights are
dummies of that shape; the warm-up is the first tokens of each trace.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def write_config(shape: dict[str, Any], folder: Path, max_model_len: int) -> None:
    """A Llama of this shape, as Hugging Face describes it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(request: dict[str, Any]) -> dict[str, float]:
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        write_config(request["shape"], Path(folder), request["max_model_len"])
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=request["max_model_len"],
            max_num_seqs=request["max_num_seqs"],
            enable_prefix_caching=False,
        )

    def run(trace: list[tuple[list[int], int]]) -> float:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in trace]
        params = [
            vllm.SamplingParams(
                temperature=request["temperature"], max_tokens=length, ignore_eos=True, detokenize=False, seed=index
            )
            for index, (_, length) in enumerate(trace)
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(out.outputs[0].token_ids) != length for out, (_, length) in zip(outputs, trace, strict=True)):
            raise RuntimeError("a request has another number of tokens than it asked for")
        return seconds

    rates = {}
    for name, trace in request["traces"].items():
        run([(prompt, min(length, 8)) for prompt, length in trace])
        rates[name] = sum(length for _, length in trace) / run(trace)
    return rates


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.read()))))
