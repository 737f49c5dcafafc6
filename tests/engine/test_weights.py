"""Loading: what a checkpoint holds is what runs, and what is wrong with a file is one line that names it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedattn.engine.gguf_file import GgufFile
from pagedattn.engine.weights import RANDOM_MODELS, load_model
from tests.engine.checkpoints import make_model, save_directory, save_gguf
from tests.engine.paged_run import PagedRun
from tests.engine.test_model import LLAMA3, assert_same_logits, oracle_logits, random_ids

IDS = random_ids(40, seed=0)


def logits_of(path: Path) -> torch.Tensor:
    return PagedRun(load_model(path, device="cpu").decoder, 1, 40, 16).step({0: IDS})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint; tests that break it work on a copy."""
    return save_directory(make_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def broken(directory: Path, tmp_path: Path) -> Path:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields; None removes one."""
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_sharded_checkpoint_equals_whole(directory: Path, tmp_path: Path) -> None:
    sharded = save_directory(make_model("llama"), tmp_path, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(sharded), logits_of(directory))


def test_config_of_transformers_4_is_read_alike(tmp_path: Path) -> None:
    model = make_model("llama", rope_parameters=LLAMA3)
    directory = save_directory(model, tmp_path)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    new = load_model(directory, device="cpu").config
    edit_json(
        directory / "config.json",
        rope_parameters=None,
        rope_scaling=scaling,
        rope_theta=10_000.0,
        dtype=None,
        torch_dtype="float32",
    )
    assert load_model(directory, device="cpu").config == new
    assert_same_logits(logits_of(directory), oracle_logits(model, IDS))


def test_redundant_weights_are_ignored(tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    directory = save_directory(model, tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors")
    assert_same_logits(logits_of(directory), oracle_logits(model, IDS))


def test_end_of_sequence_ids_come_from_all_files(broken: Path) -> None:
    assert load_model(broken, device="cpu").config.eos_token_ids == (258,)
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (broken / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": {"content": "a"}})
    )
    loaded = load_model(broken, device="cpu")
    assert loaded.config.eos_token_ids == loaded.tokenizer.eos_token_ids == (7, 9, 258)
    assert loaded.tokenizer.bos_token_id == ord("a")


def test_dtype_follows_device_and_request(directory: Path) -> None:
    assert load_model(directory, device="cpu").decoder.dtype == torch.float32
    assert load_model("random-135m", device="cpu").decoder.dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        decoder = load_model(directory, dtype=dtype, device="cpu").decoder
        assert {slot.dtype for slot in decoder.weight_slots().values()} == {torch.bfloat16}


@pytest.mark.gpu
def test_dtype_on_a_gpu_is_the_checkpoints(directory: Path, smollm2_path: Path) -> None:
    assert load_model(directory).decoder.dtype == torch.float32
    loaded = load_model(smollm2_path)
    assert loaded.decoder.dtype == torch.bfloat16
    assert loaded.decoder.embedding.is_cuda


def test_gguf_equals_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = make_model("llama", attention_bias=True)
    path = save_gguf(model, tmp_path / "model.gguf")
    loaded = load_model(path, device="cpu")
    assert_same_logits(logits_of(path), oracle_logits(model, IDS))
    assert loaded.config.dtype == torch.float32
    assert loaded.config.eos_token_ids == (257,)
    assert loaded.config.bos_token_id == 256


def test_gguf_quantized_tensors(tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=96, intermediate_size=96)
    path = save_gguf(model, tmp_path / "model.gguf", quantize=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(path, device="cpu")
    assert loaded.config.dtype == torch.bfloat16  # what it runs in on a GPU
    weights = dict(model.named_parameters())
    for ours, theirs in (
        (loaded.decoder.lm_head, weights["lm_head.weight"]),
        (loaded.decoder.weight_slots()["layers.1.query"], weights["model.layers.1.self_attn.q_proj.weight"]),
        (loaded.decoder.weight_slots()["layers.0.down"], weights["model.layers.0.mlp.down_proj.weight"]),
    ):
        assert 0 < (ours - theirs).abs().max() <= theirs.abs().max() / 254 * 1.01  # half a step of 8 bits


def test_gguf_half_precision_tensors(tmp_path: Path) -> None:
    path = save_gguf(make_model("llama").half(), tmp_path / "model.gguf")
    assert load_model(path, device="cpu").config.dtype == torch.float16


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 64,
            },
            {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
    ids=["linear", "yarn"],
)
def test_gguf_rope_scaling(metadata: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    model = make_model("llama", rope_parameters=rope)
    path = save_gguf(model, tmp_path / "model.gguf", **metadata)
    assert_same_logits(logits_of(path), oracle_logits(model, IDS))


def test_gguf_llama3_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", rope_parameters=LLAMA3)
    plain = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    divisors = plain / model.model.rotary_emb.inv_freq
    assert divisors.max() == 8
    assert divisors.min() == 1
    write = gguf.GGUFWriter.write_header_to_file

    def with_divisors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
    path = save_gguf(model, tmp_path / "model.gguf")
    assert_same_logits(logits_of(path), oracle_logits(model, IDS))


def test_smollm2_weights_equal_transformers(smollm2_path: Path) -> None:
    file = GgufFile(smollm2_path)
    reader = gguf.GGUFReader(smollm2_path)
    assert set(file.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors[::40]:
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(file.tensor(tensor.name), expected), tensor.name
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == field.contents(), key


def test_random_models_are_the_same_every_time() -> None:
    first, second = load_model("random", device="cpu"), load_model("random", device="cpu")
    for name, slot in first.decoder.weight_slots().items():
        assert torch.equal(slot, second.decoder.weight_slots()[name]), name
    assert first.config.vocab_size == first.tokenizer.vocab_size
    assert first.config.eos_token_ids == first.tokenizer.eos_token_ids
    logits = PagedRun(first.decoder, 1, 40, 16).step({0: IDS})
    assert 0.5 < logits.std() < 2


def test_random_8b_has_llama_3s_shape() -> None:
    config = RANDOM_MODELS["random-8b"]
    layer = config.hidden_size * (config.num_heads + config.num_kv_heads) * 2 * config.head_size
    layer += 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    total = config.num_layers * layer + 2 * config.vocab_size * config.hidden_size + config.hidden_size
    assert total == 8_030_261_248


BROKEN_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read: No such file or directory"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json holds list; expected a JSON object"),
    "architecture": (
        lambda d: edit_json(d / "config.json", model_type="gpt2"),
        "architecture 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3",
    ),
    "missing field": (lambda d: edit_json(d / "config.json", hidden_size=None), "the field 'hidden_size' is missing"),
    "bad field": (lambda d: edit_json(d / "config.json", num_hidden_layers="2"), "num_layers is '2'; it must be"),
    "activation": (
        lambda d: edit_json(d / "config.json", hidden_act="gelu"),
        "hidden_act is 'gelu'; supported: 'silu'",
    ),
    "quantization": (
        lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "awq"}),
        "quantization_config is .*awq.*; supported: None",
    ),
    "rope": (
        lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}),
        "rope_type is 'dynamic'; supported: 'default', 'linear', 'llama3', 'yarn'",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"has no \*.safetensors; .*pickles"),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors is not a readable safetensors file",
    ),
    "foreign": (lambda d: (d / "model.safetensors").write_bytes(b"PK\3\4" * 99), "is not a readable safetensors file"),
    "shape": (
        lambda d: edit_json(d / "config.json", intermediate_size=96),
        r"weight 'layers.0.down' has shape \[48, 80\]; expected \[48, 96\]",
    ),
    "too many layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=1), "unexpected weight 'layers.1"),
    "too few layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=3), "missing weights: layers.2"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json is not a readable tokenizer"),
    "shard missing": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors is missing; model.safetensors.index.json lists it",
    ),
    "shard elsewhere": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "names files outside its directory",
    ),
}


@pytest.mark.parametrize("name", BROKEN_DIRECTORIES)
def test_broken_directory_is_named_in_one_line(name: str, broken: Path) -> None:
    damage, message = BROKEN_DIRECTORIES[name]
    damage(broken)
    with pytest.raises(ValueError, match=message) as error:
        load_model(broken, device="cpu")
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)


def test_windows_of_each_layer_are_read(tmp_path: Path) -> None:
    model = make_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    config = load_model(save_directory(model, tmp_path), device="cpu").config
    assert config.layer_windows == (None, 5)


def test_unknown_kinds_of_layers_are_refused(tmp_path: Path) -> None:
    directory = save_directory(make_model("qwen2"), tmp_path)
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"]}
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="layer_types has 'chunked_attention'; supported: 'sliding_attention'"):
        load_model(directory, device="cpu")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
BROKEN_GGUF = {
    "empty": (b"", "is empty; expected a GGUF file"),
    "foreign": (b"PK\3\4" * 20, "is not a GGUF file"),
    "version": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "is GGUF version 99; supported: 2 and 3"),
    "header only": (b"GGUF\3", "truncated or corrupt"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "truncated or corrupt"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "truncated or corrupt"),
    "long string": (HEADER + struct.pack("<Q", 1 << 62), "a string of 4611686018427387904 bytes at 32 ends past"),
    "long array": (
        HEADER + string("a") + struct.pack("<IIQ", 9, 8, 1 << 62),
        "an array of 4611686018427387904 elements",
    ),
    "nested array": (HEADER + string("a") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 9, "an array of the unknown type 9"),
    "value type": (HEADER + string("a") + struct.pack("<I", 77), "a metadata value of the unknown type 77"),
    "not UTF-8": (HEADER + struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 20, "truncated or corrupt"),
    "alignment": (HEADER + string("general.alignment") + struct.pack("<II", 4, 0), "general.alignment is 0"),
    "tensor past the end": (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + string("w") + struct.pack("<IQIQ", 1, 64, 0, 0),
        r"tensor 'w' ends \d+ bytes past the file",
    ),
    "tensor type": (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + string("w") + struct.pack("<IQIQ", 1, 64, 999, 0),
        "tensor 'w' has the unknown GGUF type 999",
    ),
    "partial block": (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + string("w") + struct.pack("<IQIQ", 1, 33, 8, 0),
        r"tensor 'w' of shape \[33\] does not divide into blocks of 32",
    ),
    "architecture": (
        HEADER + string("general.architecture") + struct.pack("<I", 8) + string("mamba"),
        "architecture 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3",
    ),
    "no keys": (
        HEADER + string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        "the metadata key 'llama.attention.head_count' is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN_GGUF)
def test_broken_gguf_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN_GGUF[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_model(path, device="cpu")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_gguf_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = save_gguf(make_model("llama"), tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (*range(1, 200, 17), *range(200, len(whole), len(whole) // 40)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            load_model(cut, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be 'auto', 'float32', 'float16', 'bfloat16'"),
        ({"dtype": torch.float64}, "dtype is torch.float64; it must be"),
        ({"device": "tpu0"}, "device is 'tpu0'; it must be 'cpu', 'cuda' or 'cuda:<index>'"),
        ({"device": "meta"}, "device is 'meta'; it must be"),
        ({"device": "cuda:64"}, r"device is 'cuda:64'; this machine has \d+ CUDA devices"),
        (
            {"max_model_len": 0},
            "max_model_len is 0; it must be between 1 and the model's max_position_embeddings, 4096",
        ),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model("random", **options)
