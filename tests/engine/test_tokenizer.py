"""Tokenizers: the model's own ids, text that survives the round trip and streaming, and chat templates in a sandbox."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn.engine.gguf_file import GgufFile
from pagedattn.engine.gguf_tokenizer import BYTE_LEVEL_RULES, build_backend
from pagedattn.engine.tokenizer import Tokenizer, byte_characters

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "  two  spaces   three",
    "tabs\t\tand\n\nnewlines \n x\r\n\r\n",
    "12345 67 8.90 $1,234 in 2024",
    "def f(x):\n    return x ** 2  # a comment\n",
    "I'm you're we'll THEY'VE don't",
    "h\u00e9llo na\u00efve fa\u00e7ade \u00dcn\u0131",
    "u\u0308 decomposed e\u0301",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u4e2d\u6587\u3002",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 flags \U0001f1eb\U0001f1f7",
    "\u00a0nbsp\u2003em\u200bzero\x00\x7f",
    "a" * 60,
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|> x <file_sep>y <| im_end |>",
    "https://example.org/a?b=c&d=%20e",
    '{"key": [1, 2.5, null], "text": "\\u00e9"}',
]
DIGITS_AFTER_SPACES = ["   12", "x\n\n8\n  4,", "\u00bd \u00b2 \u0663", "a  \u2168"]
CONVERSATION = [
    {"role": "system", "content": "Be brief. <|im_end|>"},
    {"role": "user", "content": "Hi {{ 1 + 1 }} {% raw %}"},
    {"role": "assistant", "content": " Hello \n"},
    {"role": "user", "content": "\u00e9\U0001f642"},
]


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    ranges = [(32, 127), (0xA0, 0x600), (0x4E00, 0x4F00), (0x1F600, 0x1F650), (32, 33), (10, 11)]
    return [
        "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(60)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GgufFile(smollm2_path).metadata, eos_token_ids=[2])


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


def test_smollm2_ids_equal_transformers(smollm2: Tokenizer, oracle: Any) -> None:
    for text in TEXTS:
        assert smollm2.encode(text) == oracle.encode(text), text
    # transformers does not know this file's pre-tokenizer and cuts digits as GPT-2 does; the model's tokenizer.json
    # sets every digit apart first, which shows where more than one space goes before it.
    oracle.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in TEXTS + DIGITS_AFTER_SPACES + random_texts(100):
        ids = smollm2.encode(text)
        assert ids == oracle.encode(text), text
        for skip in (False, True):
            assert smollm2.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_smollm2_digits_stand_alone(smollm2: Tokenizer) -> None:
    assert [smollm2.token_text(token) for token in smollm2.encode("in 2024.")] == ["in", " ", "2", "0", "2", "4", "."]


def test_smollm2_special_ids(smollm2: Tokenizer) -> None:
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.bos_token_id == 1
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("<|im_end|>") == [2]
    assert smollm2.decode([2, 28120]) == smollm2.token_text(28120)
    assert smollm2.token_text(2) == "<|im_end|>"


def test_smollm2_chat_template_equals_transformers(smollm2: Tokenizer, oracle: Any) -> None:
    assert smollm2.has_chat_template
    for messages in (CONVERSATION, CONVERSATION[1:2], CONVERSATION[:1]):
        for prompt in (True, False):
            expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert smollm2.apply_chat_template(messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("kind", ["smollm2", "bytes"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_streamed_text_equals_decoded_text(kind: str, smollm2: Tokenizer, data: st.DataObject) -> None:
    tokenizer = smollm2 if kind == "smollm2" else Tokenizer.byte_level(300)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(st.text(max_size=30)))
    skip = data.draw(st.booleans())
    stream = tokenizer.new_stream(skip_special_tokens=skip)
    pieces = [stream.step(token) for token in ids]
    assert not any(piece is not None and piece.endswith("\ufffd") for piece in pieces)
    assert "".join(piece or "" for piece in pieces) + stream.flush() == tokenizer.decode(ids, skip)
    stream, num_steps = tokenizer.new_stream(skip_special_tokens=skip), data.draw(st.integers(0, len(ids)))
    pieces = [stream.step(token) for token in ids[:num_steps]]
    assert "".join(piece or "" for piece in pieces) + stream.flush(ids[num_steps:]) == tokenizer.decode(ids, skip)


def test_stream_holds_back_half_a_character() -> None:
    tokenizer = Tokenizer.byte_level(259)
    stream = tokenizer.new_stream()
    emoji = "\U0001f642"
    assert [stream.step(token) for token in tokenizer.encode("a" + emoji)] == ["a", None, None, None, emoji]
    assert stream.flush() == ""
    assert stream.step(emoji.encode()[0]) is None
    assert stream.flush() == "\ufffd"


def test_byte_level_ids_are_bytes() -> None:
    tokenizer = Tokenizer.byte_level(300)
    for text in TEXTS[:16]:
        ids = tokenizer.encode(text)
        assert bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [257, 97, 258]
    assert tokenizer.encode("<270>") == [*b"<270>"]
    assert tokenizer.decode([270, 97]) == "<270>a"
    assert tokenizer.token_text(270) == "<270>"
    assert tokenizer.token_text(0xC3) == "\ufffd"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.eos_token_ids == (258,)
    assert tokenizer.vocab_size == 300
    assert tokenizer.apply_chat_template(CONVERSATION[3:]) == (
        "<|im_start|>user\n\u00e9\U0001f642<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="vocab_size is 258; a byte-level tokenizer needs at least 259"):
        Tokenizer.byte_level(258)


def gguf_metadata(pre: str | None, **options: Any) -> dict[str, Any]:
    """A byte-level vocabulary with merges that show how text was cut."""
    merges = ["1 2", "12 3", "\u0120 \u0120", "\u010a \u010a", "' s", "h i", "hi '", "hi 's"]
    merged = ["".join(merge.split(" ")) for merge in merges]
    tokens = [*byte_characters(), *merged, "12345", "<s>", "</s>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        **{f"tokenizer.ggml.{key}": value for key, value in options.items()},
    }


def pieces(metadata: dict[str, Any], text: str) -> list[str]:
    tokenizer = Tokenizer.from_gguf(metadata)
    return [tokenizer.token_text(token) for token in tokenizer.encode(text)]


def test_gguf_pre_tokenizers_cut_differently() -> None:
    text = "hi's 12345 123\n\n  1"
    assert pieces(gguf_metadata("gpt-2"), text) == [
        *("hi", "'s", " ", "123", "4", "5", " ", "123", "\n\n", " ", " ", "1")
    ]
    assert pieces(gguf_metadata("smollm"), text) == [
        *("hi", "'s", " ", "1", "2", "3", "4", "5", " ", "1", "2", "3", "\n\n", "  ", "1")
    ]
    assert pieces(gguf_metadata("llama-bpe"), text) == [
        *("<s>", "hi", "'s", " ", "123", "4", "5", " ", "123", "\n\n", " ", " ", "1")
    ]
    assert pieces(gguf_metadata("qwen2"), text) == [
        *("hi", "'s", " ", "1", "2", "3", "4", "5", " ", "1", "2", "3", "\n\n", " ", " ", "1")
    ]


def test_gguf_split_expressions_equal_transformers() -> None:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as mapping
    except ImportError:
        pytest.skip("this version of transformers has no such table")
    for name, rule in BYTE_LEVEL_RULES.items():
        if rule.split is not None:
            ours = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rule.split), "isolated")
            theirs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(mapping[name]), "isolated")
            for text in TEXTS + DIGITS_AFTER_SPACES + random_texts(50):
                assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), (name, text)


def test_gguf_beginning_and_end_of_text() -> None:
    assert pieces(gguf_metadata("gpt-2", add_bos_token=True, add_eos_token=True), "hi") == ["<s>", "hi", "</s>"]
    assert pieces(gguf_metadata("llama-bpe", add_bos_token=False), "hi") == ["hi"]
    tokenizer = Tokenizer.from_gguf(gguf_metadata("llama-bpe"))
    assert [tokenizer.token_text(token) for token in tokenizer.encode("hi", add_special_tokens=False)] == ["hi"]


def test_gguf_user_defined_tokens_match_whole_and_are_not_skipped() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata("gpt-2"))
    ids = tokenizer.encode("hi<think></s>")
    assert [tokenizer.token_text(token) for token in ids] == ["hi", "<think>", "</s>"]
    assert tokenizer.decode(ids) == "hi<think>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; supported: 'gpt2', 'llama'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; supported: gpt-2, smollm, llama-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre is None; supported"),
        ({"tokens": []}, "no vocabulary: tokenizer.ggml.tokens is missing"),
        ({"bos_token_id": 10**6}, "bos_token is id 1000000, outside the vocabulary of 268"),
        ({"model": "llama"}, "tokenizer.ggml.scores has 0 entries for 268 tokens"),
    ],
)
def test_gguf_tokenizers_that_are_not_supported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backend(gguf_metadata(**{"pre": "gpt-2", **options}))


def sentencepiece_metadata(**options: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with byte fallback: letters, words and their parts, best-scored first."""
    words = [
        "\u2581the",
        "\u2581th",
        "\u2581t",
        "he",
        "\u2581a",
        "an",
        "\u2581an",
        "\u2581and",
        "nd",
        "in",
        "\u2581\u2581",
    ]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,T"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))],
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-rank) for rank in range(len(words) + len(letters))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in options.items()},
    }


def test_sentencepiece_ids_equal_transformers(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = Tokenizer.from_gguf(metadata)
    for text in [*TEXTS, "the band and the inn", "  The  theatre", "a\nthe"]:
        ids = ours.encode(text, add_special_tokens=False)
        if not text.startswith(" "):  # there transformers' versions disagree with each other
            assert ids == theirs.encode(text, add_special_tokens=False), text
            assert theirs.decode(ids) == text
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == text
        stream = ours.new_stream()
        assert "".join(stream.step(token) or "" for token in ids) + stream.flush() == text


def test_sentencepiece_pieces() -> None:
    ours = Tokenizer.from_gguf(sentencepiece_metadata())
    ids = ours.encode("the band \u00e9")
    assert [ours.token_text(token) for token in ids] == [*("<s>", " the", " ", "b", "an", "d", " ", "\ufffd", "\ufffd")]
    spaces = ours.encode(" the</s>the", add_special_tokens=False)
    assert [ours.token_text(token) for token in spaces] == [" ", " the", "</s>", " the"]
    assert ours.token_bytes(ids[-2]) + ours.token_bytes(ids[-1]) == "\u00e9".encode()
    bare = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert bare.decode(bare.encode("the the")) == "the the"
    assert bare.token_text(bare.encode("the")[0]) == "t"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    Tokenizer.byte_level(259).backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_directory_templates_and_special_tokens(directory: Path) -> None:
    assert not Tokenizer.from_directory(directory).has_chat_template
    settings_path = directory / "tokenizer_config.json"
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    for chat_template in (template, [{"name": "tools", "template": "-"}, {"name": "default", "template": template}]):
        settings_path.write_text(json.dumps({"bos_token": "<|endoftext|>", "chat_template": chat_template}))
        tokenizer = Tokenizer.from_directory(directory, eos_token_ids=[5])
        assert tokenizer.apply_chat_template(CONVERSATION[3:]) == "<|endoftext|>\u00e9\U0001f642"
        assert tokenizer.bos_token_id == 256
        assert tokenizer.eos_token_ids == (5,)
    (directory / "chat_template.jinja").write_text("from a file")
    assert Tokenizer.from_directory(directory).apply_chat_template(CONVERSATION) == "from a file"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [97]),
        ({"add_bos_token": True}, [256, 97]),
        ({"add_bos_token": True, "add_eos_token": True}, [256, 97, 258]),
        ({"add_bos_token": False}, [97]),
    ],
)
def test_directory_adds_special_tokens(settings: dict[str, Any], expected: list[int], directory: Path) -> None:
    named = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({**named, **settings}))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_directory_truncation_and_padding_are_dropped(directory: Path) -> None:
    backend = Tokenizer.byte_level(259).backend
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_directory(directory).encode("abc") == [97, 98, 99]


def template_tokenizer(template: str) -> Tokenizer:
    return Tokenizer(Tokenizer.byte_level(259).backend, chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
        "a{% generation %}{{ messages[2].content | trim }}{% endgeneration %}b",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ undefined_name }}",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_template_text_equals_transformers(template: str) -> None:
    tokenizer = template_tokenizer(template)
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    expected = oracle.apply_chat_template(
        CONVERSATION, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.apply_chat_template(CONVERSATION) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "chat template failed"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template failed"),
        ("{{ messages.__class__.__init__.__globals__ }}", "chat template failed"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "chat template failed"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_templates_cannot_leave_the_sandbox(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template_tokenizer(template).apply_chat_template(CONVERSATION)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a non-empty list"),
        ("hello", "messages must be a non-empty list"),
        ({"role": "user", "content": "a"}, "messages must be a non-empty list"),
        ([{"role": "user"}], r"messages\[0\] needs 'content', a string"),
        ([CONVERSATION[0], {"role": 3, "content": ""}], r"messages\[1\] needs 'role', a string"),
        ([["user", "hi"]], r"messages\[0\] needs 'role', a string"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\] needs 'content', a string"),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.byte_level(259).apply_chat_template(messages)


def test_no_template() -> None:
    tokenizer = Tokenizer(Tokenizer.byte_level(259).backend)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="this model has no chat template"):
        tokenizer.apply_chat_template(CONVERSATION)
