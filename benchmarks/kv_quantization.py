"""What a quantized KV cache costs in accuracy, on real activations: perplexity and greedy agreement of SmolLM2.

    python -m benchmarks.kv_quantization [--tokens 20480] [--json OUT]

The text is Python's own language reference, as every Python ships it (``pydoc_data.topics``), in windows of 1024
tokens. Each window is one prefill; every token attends to keys and values as the cache stored them. Perplexity is over
all tokens but each window's first; agreement is the share of positions where the most likely next token is that of the
cache that is not quantized, at the same prefix. Scales per tensor and head are calibrated on the first window (largest
magnitude over the format's largest number); scales per (token, head) come from the append itself.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.kv_cache import KVCache, LayerCache
from pagedattn.engine.model import Decoder
from pagedattn.engine.weights import load_model
from pagedattn.kernels.quantization import LARGEST

WINDOW, BLOCK_SIZE = 1024, 16
DTYPES = {"fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2, "int8": torch.int8, "int4": torch.uint8}
SCALES = ("per tensor", "per head", "per token and head")


def text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def window_batch(tokens: Tensor) -> BatchTensors:
    """One whole prefill, with logits for every row."""
    count = len(tokens)
    device = tokens.device
    blocks = -(-count // BLOCK_SIZE)
    return BatchTensors(
        input_ids=tokens,
        positions=torch.arange(count, device=device),
        slot_mapping=torch.arange(count, device=device)[None],
        block_table=torch.arange(blocks, dtype=torch.int32, device=device)[None, None],
        seq_lens=torch.tensor([count], dtype=torch.int32, device=device),
        query_start_loc=torch.tensor([0, count], dtype=torch.int32, device=device),
        logits_indices=torch.arange(count, device=device),
        max_query_len=count,
        max_seq_len=count,
    )


@torch.inference_mode()
def evaluate(decoder: Decoder, cache: KVCache, windows: Tensor) -> tuple[float, Tensor]:
    """Perplexity over windows [W, 1024], and the most likely next token after each of their tokens."""
    loss, best = 0.0, []
    for tokens in windows:
        logits = decoder.forward(window_batch(tokens), cache).float()
        loss += float(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
        best.append(logits.argmax(-1))
    return math.exp(loss / (windows.numel() - len(windows))), torch.stack(best)


def calibrated(plain: KVCache, quantized: KVCache, scales: str) -> list[LayerCache]:
    """The quantized layers with scales per tensor or head, from what ``plain`` holds."""
    layers = []
    for source, target in zip(plain.layers, quantized.layers, strict=True):
        found = []
        for values in source[:2]:
            largest = values.float().abs().amax((0, 1, 3)) / LARGEST[target.key.dtype]
            found.append(largest.amax() if scales == "per tensor" else largest)
        layers.append(LayerCache(target.key, target.value, *found))
    return layers


def measure(num_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    loaded = load_model("smollm2-135m-instruct", str(dtype).removeprefix("torch."), device)
    decoder, config = loaded.decoder, loaded.config
    ids = loaded.tokenizer.encode(text())[:num_tokens]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW], device=device).view(-1, WINDOW)
    blocks = WINDOW // BLOCK_SIZE
    plain = KVCache(config, blocks, BLOCK_SIZE, dtype, device)
    perplexity, expected = evaluate(decoder, plain, windows)
    rows: list[dict[str, Any]] = [
        {"cache": str(dtype).removeprefix("torch."), "scales": "-", "perplexity": perplexity, "agreement": 1.0}
    ]
    evaluate(decoder, plain, windows[:1])  # what the scales are calibrated on
    for name, stored in DTYPES.items():
        for scales in SCALES:
            cache = KVCache(config, blocks, BLOCK_SIZE, stored, device)
            if scales != "per token and head":
                cache.layers = calibrated(plain, cache, scales)
            perplexity, best = evaluate(decoder, cache, windows)
            agreement = float((best == expected).float().mean())
            rows.append({"cache": name, "scales": scales, "perplexity": perplexity, "agreement": agreement})
            print(f"{name:9} {scales:19} perplexity {perplexity:8.3f}  agreement {agreement:.2%}", file=sys.stderr)
    return {
        "benchmark": "kv_quantization",
        "model": loaded.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "num_tokens": windows.numel(),
        "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "torch": torch.__version__,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20 * WINDOW)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    document = measure(arguments.tokens, torch.device(arguments.device), getattr(torch, arguments.dtype))
    for row in document["rows"]:
        print(f"| {row['cache']} | {row['scales']} | {row['perplexity']:.3f} | {row['agreement']:.2%} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
