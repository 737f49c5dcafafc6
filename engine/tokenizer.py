"""Text to token ids and back, streams of text from streams of ids, and chat templates.

Contract: every tokenizer is a ``tokenizers.Tokenizer``: read from a ``tokenizer.json``, built from a GGUF file's
metadata, or byte-level for models without a vocabulary. A text gets the ids that the model was trained on. Templates
come from model files and are untrusted: they run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2
    import tokenizers

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_token_ids: ids that end a generation.
        bos_token_id: the id that begins a text, if the model has one.
        has_chat_template: whether ``apply_chat_template`` works.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """``special_tokens`` are what a template may refer to: "bos_token" and so on, by text."""
        self._backend = backend
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.bos_token_id = bos_token_id
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_directory(cls, directory: Path, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
        """From a Hugging Face model directory; ``eos_token_ids`` (the model's) come before the tokenizer's own.

        Raises:
            ValueError: ``tokenizer.json`` is missing or unreadable.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{directory} has no tokenizer.json; other tokenizer formats are not supported")
        try:
            backend = import_tokenizers().Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        settings = read_json_object(directory / "tokenizer_config.json", missing_ok=True)
        special = {name: text for name in SPECIAL_TOKEN_NAMES if (text := _token_text(settings.get(name)))}
        ids = {name: backend.token_to_id(text) for name, text in special.items()}
        if "add_bos_token" in settings or "add_eos_token" in settings:
            before = special.get("bos_token") if settings.get("add_bos_token") else None
            after = special.get("eos_token") if settings.get("add_eos_token") else None
            surround_with_special_tokens(backend, before, after)
        own_eos = [ids["eos_token"]] if ids.get("eos_token") is not None else []
        return cls(
            backend,
            eos_token_ids=[*eos_token_ids, *own_eos],
            bos_token_id=ids.get("bos_token"),
            chat_template=_chat_template(directory, settings),
            special_tokens=special,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], eos_token_ids: Sequence[int] = ()) -> Tokenizer:
        """From a GGUF file's metadata; see ``pagedattn.engine.gguf_tokenizer`` for what is supported."""
        from pagedattn.engine.gguf_tokenizer import build_backend, special_token_ids

        backend = build_backend(metadata)
        ids = special_token_ids(metadata)
        return cls(
            backend,
            eos_token_ids=eos_token_ids,
            bos_token_id=ids.get("bos_token"),
            chat_template=metadata.get("tokenizer.chat_template"),
            special_tokens={name: metadata["tokenizer.ggml.tokens"][token] for name, token in ids.items()},
        )

    @classmethod
    def byte_level(cls, vocab_size: int) -> Tokenizer:
        """One id per byte, three ChatML tokens, and ids up to ``vocab_size`` that no text encodes to.

        The last kind decodes to its number in angle brackets, so that a model with random weights and any vocabulary
        has something to say. ``vocab_size`` must be at least 259.
        """
        specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        first_filler = 256 + len(specials)
        if vocab_size < first_filler:
            raise ValueError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {first_filler}")
        package = import_tokenizers()
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        vocabulary |= {text: 256 + index for index, text in enumerate(specials)}
        vocabulary |= {f"<{index}>": index for index in range(first_filler, vocab_size)}
        backend = package.Tokenizer(package.models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = package.decoders.ByteLevel()
        backend.add_special_tokens([package.AddedToken(text, normalized=False, special=True) for text in specials])
        end_of_text, _, end_of_turn = range(256, first_filler)
        return cls(
            backend,
            eos_token_ids=[end_of_turn],
            bos_token_id=end_of_text,
            chat_template=CHATML_TEMPLATE,
            special_tokens={"bos_token": specials[0], "eos_token": specials[2]},
        )

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The ``tokenizers`` object, for what is not wrapped here."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the model's output may be padded to more."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """``add_special_tokens``: put a beginning-of-text id in front where the model expects one.

        Text from ``apply_chat_template`` has its special tokens already: encode it without.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            if not isinstance(text, str):
                raise
        bad = next((char for char in text if "\ud800" <= char <= "\udfff"), "")
        raise ValueError(f"text holds {bad!r}, which is no character: what it was read from must be UTF-8")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def new_stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for ids that come one at a time."""
        return TextStream(self._backend, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one id stands for in the text, which may be part of a character; b"" outside the vocabulary."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_token_ids:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One id as text by itself: leading space kept, an incomplete character as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    @cached_property
    def _added_token_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        # Its vocabulary spells each byte as one character; the decoder, or one step of it, says so.
        return "ByteLevel" in repr(self._backend.decoder)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            add_generation_prompt: end with what introduces the assistant's answer.

        Raises:
            ValueError: no template, malformed messages, or the template refused them (it says why).
        """
        if self._chat_template is None:
            raise ValueError("this model has no chat template; give a prompt instead of messages")
        _check_messages(messages)
        import jinja2

        try:
            return self._compiled_template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, OverflowError) as error:
            raise ValueError(f"the model's chat template failed: {error}") from error

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        assert self._chat_template is not None
        return _template_environment().from_string(self._chat_template)


class TextStream:
    """Text from ids that come one at a time, never half a character.

    The texts that ``step`` and ``flush`` return, joined, are what ``Tokenizer.decode`` returns for all ids at once.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._stream = import_tokenizers().decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
        self._context: list[int] = []  # ids of the last text that came out
        self._pending: list[int] = []  # ids since then

    def step(self, token_id: int) -> str | None:
        """The text that became certain with this id; None if it ends within a character or is not text."""
        text = self._stream.step(self._backend, token_id)
        self._pending.append(token_id)
        if text is not None:
            self._context, self._pending = self._pending, []
        return text

    def flush(self, last_ids: Sequence[int] = ()) -> str:
        """The text of ids held back so far and of the last ones, an incomplete character as U+FFFD; call once.

        For many ids this takes a tenth of the time of a ``step`` for each.
        """
        self._pending.extend(last_ids)
        decoded = self._backend.decode(self._context + self._pending, skip_special_tokens=self._skip_special_tokens)
        said = self._backend.decode(self._context, skip_special_tokens=self._skip_special_tokens)
        self._pending = []
        return decoded.removeprefix(said)


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table), by byte.

    Printable bytes stand for themselves, the others are moved up from U+0100 in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved: Iterator[int] = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(byte_characters())}


def import_tokenizers() -> Any:
    """The ``tokenizers`` package, imported on first use."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError as error:
        raise ImportError("tokenizers are needed for text: pip install 'pagedattn[models]'") from error
    return tokenizers


def surround_with_special_tokens(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Make ``encode`` put these special tokens around a text; neither: nothing at all."""
    around = [text for text in (before, after) if text is not None]
    template = " ".join(text for text in (before, "$A", after) if text is not None)
    backend.post_processor = import_tokenizers().processors.TemplateProcessing(
        single=template, special_tokens=[(text, backend.token_to_id(text)) for text in around]
    )


def read_json_object(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON file that holds an object; ``ValueError`` naming the file if it does not. Missing: {} where allowed."""
    if missing_ok and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def _token_text(token: Any) -> str | None:
    """A special token in ``tokenizer_config.json``: its text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise ValueError(f"messages[{index}] needs {key!r}, a string; it is {message!r:.80}")


def _template_environment() -> jinja2.Environment:
    """The environment that chat templates are written for; the names in it are transformers'."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install 'pagedattn[models]'") from error

    class GenerationTag(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's words for training; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
