"""Two answers streamed side by side, as their tokens come out of the same batch; one is given up early.

python examples/streaming.py [--model random]
"""

from __future__ import annotations

import argparse
import contextlib

from pagedattn import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    llm = LLM(parser.parse_args().model, max_num_seqs=8, num_blocks=256)

    prompts = ["Once upon a time, a fox", "The recipe needs flour, eggs and"]
    names: dict[str, str] = {}
    for output in llm.stream(prompts, SamplingParams(temperature=0.0, max_tokens=16)):
        name = names.setdefault(output.request_id, f"answer {len(names) + 1}")
        print(f"{name}: {output.outputs[0].delta_text!r}")

    # Closing the stream cancels what it has not finished: the blocks are free at once.
    with contextlib.closing(llm.stream("Count to a thousand: 1, 2,", SamplingParams(max_tokens=1000))) as stream:
        next(stream)
        print("blocks in use:", llm.engine.stats().num_used_blocks)
    print("blocks in use after closing:", llm.engine.stats().num_used_blocks)


if __name__ == "__main__":
    main()
