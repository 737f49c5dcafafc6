"""The decoder against transformers: the same logits for prefills, chunks and decodes, and the same greedy tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pagedattn.engine.kv_cache import KVCache
from pagedattn.engine.model import Decoder, ModelConfig, RopeConfig
from pagedattn.engine.weights import RANDOM_MODELS, load_model
from tests.engine.checkpoints import make_model, save_directory
from tests.engine.paged_run import PagedRun

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2-hybrid": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "num_hidden_layers": 5},
    ),
    "qwen3-alternating": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
}


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@torch.inference_mode()
def oracle_logits(model: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_for_prefills_chunks_and_decodes(name: str, tmp_path: Path) -> None:
    architecture, overrides = MODELS[name]
    model = make_model(architecture, **overrides)
    decoder = load_model(save_directory(model, tmp_path), device="cpu").decoder
    texts = {seq: random_ids(length, seed=seq) for seq, length in enumerate((150, 1, 33))}
    expected = {seq: oracle_logits(model, ids) for seq, ids in texts.items()}
    run = PagedRun(decoder, num_seqs=3, max_len=160, block_size=4)

    # Prefill of one and two chunks of another, then mixed with decodes, with padding rows behind.
    plan = [({0: 90, 1: 1}, 0), ({0: 50, 2: 20}, 3), ({0: 1, 2: 12}, 0), ({0: 8}, 0), ({0: 1, 2: 1}, 5)]
    for counts, num_padding in plan:
        starts = {seq: run.lengths[seq] for seq in counts}
        chunks = {seq: texts[seq][starts[seq] : starts[seq] + count] for seq, count in counts.items()}
        logits = run.step(chunks, num_padding)
        theirs = [expected[seq][starts[seq] : starts[seq] + count] for seq, count in counts.items()]
        assert_same_logits(logits, torch.cat(theirs))
    assert run.lengths == [150, 1, 33]


def test_logits_of_asked_rows_only() -> None:
    decoder = load_model("random", device="cpu").decoder
    everything = PagedRun(decoder, 1, 16, 4).step({0: random_ids(10, seed=0)})
    run = PagedRun(decoder, 1, 16, 4)
    seen: dict[str, Any] = {}
    forward = decoder.forward

    def capture(batch: Any, cache: KVCache) -> Tensor:
        fields = {**vars(batch), "logits_indices": torch.tensor([9, 2])}
        seen["logits"] = forward(SimpleNamespace(**fields), cache)  # type: ignore[arg-type]
        return seen["logits"]

    decoder.forward = capture  # type: ignore[method-assign, assignment]
    run.step({0: random_ids(10, seed=0)})
    torch.testing.assert_close(seen["logits"], everything[[9, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(dtype: torch.dtype) -> None:
    ids = random_ids(40, seed=0)
    exact = PagedRun(load_model("random", device="cpu").decoder, 1, 40, 16).step({0: ids})
    decoder = load_model("random", dtype=dtype, device="cpu").decoder
    logits = PagedRun(decoder, 1, 40, 16).step({0: ids})
    assert decoder.dtype == dtype
    assert logits.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    assert (logits - exact).square().mean().sqrt() < 8 * epsilon * exact.square().mean().sqrt()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_logits_on_a_gpu_equal_the_cpus(name: str, tmp_path: Path) -> None:
    architecture, overrides = MODELS[name]
    directory = save_directory(make_model(architecture, **overrides), tmp_path)
    ids = random_ids(100, seed=0)
    exact = PagedRun(load_model(directory, device="cpu").decoder, 1, 100, 16).step({0: ids})
    for dtype in (torch.float32, torch.bfloat16):
        run = PagedRun(load_model(directory, dtype=dtype, device="cuda").decoder, 1, 100, 16)
        logits = torch.cat([run.step({0: ids[:70]}), run.step({0: ids[70:99]}), run.step({0: ids[99:]})]).cpu()
        error = (logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 8 * torch.finfo(dtype).eps + 1e-5, (dtype, error)


@pytest.mark.parametrize("parameters", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_rope_frequencies_equal_transformers(parameters: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(hidden_size=1024, num_attention_heads=8, head_dim=128, rope_parameters=parameters)
    kind = parameters["rope_type"]
    expected, attention_factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    rope = RopeConfig(
        theta=10_000.0,
        rotary_dim=128,
        scaling=kind,
        factor=parameters["factor"],
        attention_factor=attention_factor,
        original_max_position_embeddings=64,
    )
    torch.testing.assert_close(rope.inverse_frequencies(), expected, rtol=1e-6, atol=0)
    table = rope.cos_sin_table(3, torch.device("cpu"))
    angles = torch.arange(3)[:, None] * expected
    torch.testing.assert_close(table, torch.cat([angles.cos(), angles.sin()], -1) * attention_factor)


def test_cache_layout_and_size() -> None:
    config = RANDOM_MODELS["random"]
    cache = KVCache(config, num_blocks=5, block_size=8, dtype=torch.bfloat16, device="cpu")
    assert len(cache.layers) == config.num_layers
    tensors = [tensor for layer in cache.layers for tensor in layer[:2]]
    assert all(tensor.shape == (5, 8, config.num_kv_heads, config.head_size) for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert total == 5 * KVCache.bytes_per_block(config, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="num_blocks is 0; it must be at least 1"):
        KVCache(config, 0, 8, torch.bfloat16, "cpu")


def test_every_weight_has_one_slot_and_all_must_be_filled() -> None:
    decoder = Decoder(RANDOM_MODELS["random"], torch.float32, "cpu")
    slots = decoder.weight_slots()
    pointers = {slot.data_ptr() for slot in slots.values()}
    assert len(pointers) == len(slots)
    weights = {name: torch.full(slot.shape, float(index)) for index, (name, slot) in enumerate(slots.items())}
    decoder.load_weights(weights.items())
    for index, (name, slot) in enumerate(slots.items()):
        assert (slot == index).all(), name

    for drop, message in (
        (["layers.1.gate"], r"missing weights: layers\.1\.gate$"),
        (list(slots)[:5], r"missing weights: .+, .+, .+ and 2 more$"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.load_weights((name, weight) for name, weight in weights.items() if name not in drop)
    with pytest.raises(ValueError, match=r"unexpected weight 'layers\.2\.gate'"):
        decoder.load_weights([("layers.2.gate", weights["layers.1.gate"])])
    with pytest.raises(ValueError, match="weight 'final_norm' comes twice"):
        decoder.load_weights([("final_norm", weights["final_norm"])] * 2)
    with pytest.raises(ValueError, match=r"weight 'layers.0.key' has shape \[3, 3\]; expected \[32, 64\]"):
        decoder.load_weights([("layers.0.key", torch.zeros(3, 3))])


def test_position_table_is_as_long_as_asked() -> None:
    config = RANDOM_MODELS["random"]
    assert Decoder(config, torch.float32, "cpu").cos_sin.shape == (config.max_position_embeddings, 16)
    assert Decoder(config, torch.float32, "cpu", max_model_len=100).cos_sin.shape == (100, 16)
    for length in (0, config.max_position_embeddings + 1):
        with pytest.raises(ValueError, match=f"max_model_len is {length}; it must be between 1 and"):
            Decoder(config, torch.float32, "cpu", max_model_len=length)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers is 0; it must be a positive integer"),
        ("vocab_size", True, "vocab_size is True; it must be a positive integer"),
        ("num_kv_heads", 3, "num_heads is 4; it must be a multiple of num_kv_heads 3"),
        ("head_size", 12, "head_size is 12; it must be a multiple of 8"),
        ("head_size", 8, "rope rotary_dim is 16; it must be at most head_size 8"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan; it must be positive and finite"),
        ("sliding_window", 0, "sliding_window is 0; it must be None or at least 1"),
    ],
)
def test_config_names_the_bad_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**vars(RANDOM_MODELS["random"]), field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling": "dynamic"}, "rope scaling is 'dynamic'; supported: none, linear"),
        ({"rotary_dim": 15}, "rope rotary_dim is 15; it must be positive and even"),
        ({"theta": float("inf")}, "rope theta is inf"),
        ({"scaling": "yarn"}, "needs original_max_position_embeddings"),
        ({"scaling": "per_frequency", "frequency_divisors": (1.0,)}, "has 1 entries; rotary_dim 16 needs 8"),
        (
            {"scaling": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
            "low_freq_factor is 4.0 and high_freq_factor 4.0",
        ),
    ],
)
def test_rope_config_names_the_bad_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**{"theta": 10_000.0, "rotary_dim": 16, **fields})


def test_smollm2_greedy_tokens_equal_transformers(smollm2_path: Path) -> None:
    loaded = load_model(smollm2_path, device="cpu")
    prompt = loaded.tokenizer.encode(
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Name 3 colours, briefly."}]),
        add_special_tokens=False,
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    run = PagedRun(loaded.decoder, num_seqs=1, max_len=len(prompt) + 16, block_size=16)
    tokens, pending = [], prompt
    for _ in range(16):
        pending = [int(run.step({0: pending})[-1].argmax())]
        tokens += pending
    assert tokens == expected[0, len(prompt) :].tolist()
