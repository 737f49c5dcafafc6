"""Many prompts at once, each with its own sampling parameters.

python examples/offline_batch.py                    # SmolLM2-135M-Instruct, fetched on first use
python examples/offline_batch.py --model random     # no download, no sense
"""

from __future__ import annotations

import argparse

from pagedattn import LLM, SamplingParams

QUESTIONS = [
    "What is the capital of Norway?",
    "Name three rivers in Africa.",
    "Write a haiku about the sea.",
    "What is two plus two?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    llm = LLM(parser.parse_args().model, max_num_seqs=8, num_blocks=256)

    # One conversation for each question. The third is sampled, and repeatable by its seed; the others are greedy.
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    greedy = SamplingParams(temperature=0.0, max_tokens=32)
    sampled = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=32)
    outputs = llm.chat(conversations, [greedy, greedy, sampled, greedy])

    for question, output in zip(QUESTIONS, outputs, strict=True):
        choice = output.outputs[0]
        print(f"> {question}\n{choice.text.strip()}\n[{len(choice.token_ids)} tokens, {choice.finish_reason}]\n")
    stats = llm.engine.stats()
    print(f"{stats.num_generated_tokens} tokens in {stats.num_steps} steps")


if __name__ == "__main__":
    main()
