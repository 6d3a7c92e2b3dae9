"""Tokenizers: a byte-level BPE trained here, or any Hugging Face tokenizer, behind one small class.

Text is always encoded as text: a document that spells out ``<|eos|>`` gets ordinary tokens for it,
so that special ids come only from the code that places them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stackwise.data.documents import DataError
from stackwise.data.hub import failure, offline_when_unreachable

PAD_TOKEN, EOS_TOKEN, MASK_TOKEN = "<|pad|>", "<|eos|>", "<|mask|>"
MIN_BPE_SIZE = 3 + 256
TRAINING_CHARACTERS = 200_000_000
_INFO_FILE = "stackwise_tokenizer.json"
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


@dataclass(frozen=True)
class TokenizerInfo:
    """The ids that matter to training.

    ``vocab_size`` counts every id, special ones included; ``special_ids`` are never masked and
    never counted as text; ``bos_id`` is None for tokenizers without one.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    mask_id: int
    bos_id: int | None
    special_ids: tuple[int, ...]


class Tokenizer:
    """Encodes, decodes, saves.

    ``backend`` is a ``tokenizers.Tokenizer`` (fast), or None for the tokenizers that exist only in
    Python; ``hf`` is the Transformers object it came from, or None for one trained here.
    """

    def __init__(self, info: TokenizerInfo, backend: Any = None, hf: Any = None) -> None:
        self.info = info
        self.vocab_size = info.vocab_size
        self.pad_id, self.eos_id, self.mask_id = info.pad_id, info.eos_id, info.mask_id
        self.bos_id = info.bos_id
        self.special_ids = info.special_ids
        self._backend = backend
        self._hf = hf
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = True

    @property
    def mask_token(self) -> str:
        """How the MASK token is written in a prompt."""
        return self._token(self.mask_id) or MASK_TOKEN

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, no special token added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; on all cores where the tokenizer is a fast one."""
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        return [
            self._hf.encode(text, add_special_tokens=False, split_special_tokens=True)
            for text in texts
        ]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ``ids``; special tokens are spelled out unless ``skip_special``."""
        numbers = [int(index) for index in ids]
        if self._backend is not None:
            return str(self._backend.decode(numbers, skip_special_tokens=skip_special))
        return str(
            self._hf.decode(
                numbers, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
        )

    def special_bytes(self, text: str) -> int:
        """UTF-8 bytes of ``text`` that are covered by special ids, such as an unknown token.

        0 for the tokenizers that exist only in Python, which report no offsets.
        """
        if self._backend is None:
            return 0
        encoding = self._backend.encode(text, add_special_tokens=False)
        special = set(self.special_ids)
        spans = {
            span
            for index, span in zip(encoding.ids, encoding.offsets, strict=True)
            if index in special
        }
        return sum(len(text[start:stop].encode()) for start, stop in spans)

    def with_mask_id(self, mask_id: int) -> Tokenizer:
        """The same tokenizer with another id as MASK; it may lie beyond the tokenizer's last id."""
        return Tokenizer(_with_mask(self.info, mask_id), self._backend, self._hf)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""
        if self._backend is not None:
            state = self._backend.to_str()
        else:
            state = json.dumps([type(self._hf).__name__, sorted(self._hf.get_vocab().items())])
        return hashlib.sha256((state + json.dumps(asdict(self.info))).encode()).hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Writes a folder that :func:`load_tokenizer` and ``transformers.AutoTokenizer`` load."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._hf is not None:
            self._hf.save_pretrained(str(folder))
        else:
            self._backend.save(str(folder / "tokenizer.json"))
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": self._token(self.pad_id),
                "eos_token": self._token(self.eos_id),
                "mask_token": self._token(self.mask_id),
                "clean_up_tokenization_spaces": False,
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        info = asdict(self.info) | {"trained_here": self._hf is None}
        (folder / _INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")
        return folder

    def _token(self, index: int) -> str | None:
        if self._backend is not None:
            token = self._backend.id_to_token(index)
        else:
            token = self._hf.convert_ids_to_tokens(index)
        return None if token is None else str(token)


def train_bpe(texts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
    """Trains a lossless byte-level BPE (Sennrich et al. 2016; byte alphabet of GPT-2).

    Ids 0, 1, 2 are ``<|pad|>``, ``<|eos|>``, ``<|mask|>``; then the 256 bytes, then the merges.
    Small corpora may have fewer merges than asked for. Reads at most 200 million characters.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_BPE_SIZE:
        raise ValueError(
            f"data.tokenizer_vocab_size must be at least {MIN_BPE_SIZE} (3 special tokens and 256 "
            f"bytes), got {vocab_size}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN, MASK_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_limited(texts, TRAINING_CHARACTERS), trainer)
    info = TokenizerInfo(backend.get_vocab_size(), 0, 1, 2, None, (0, 1, 2))
    return Tokenizer(info, backend)


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def load_tokenizer(path_or_name: str | Path, mask_id: int | None = None) -> Tokenizer:
    """A tokenizer from a folder saved here, a run folder, a Transformers folder or a Hub name.

    A PAD, EOS or MASK token it lacks is added after its last id; ``mask_id`` names an existing id
    to serve as MASK instead. Raises ``DataError`` when there is nothing to load.
    """
    folder = _tokenizer_folder(path_or_name)
    info_file = None if folder is None else folder / _INFO_FILE
    saved = json.loads(info_file.read_text()) if info_file and info_file.is_file() else None
    if saved is not None and saved.pop("trained_here"):
        from tokenizers import Tokenizer as Backend

        backend: Any = Backend.from_file(str(Path(str(folder), "tokenizer.json")))
        hf = None
    else:
        hf = _load_hf(str(folder or path_or_name))
        if saved is None:
            return _adopt(hf, mask_id)
        backend = getattr(hf, "backend_tokenizer", None)
    info = TokenizerInfo(**{**saved, "special_ids": tuple(saved["special_ids"])})
    return Tokenizer(_with_mask(info, mask_id), backend, hf)


def _tokenizer_folder(path_or_name: str | Path) -> Path | None:
    """The local folder that holds the tokenizer's files; None for a Hub name."""
    folder = Path(path_or_name).expanduser()
    if not folder.exists():
        if str(path_or_name).startswith((".", "/", "~")) or isinstance(path_or_name, Path):
            raise DataError(f"tokenizer {str(path_or_name)!r}: no such folder")
        return None
    for candidate in (folder, folder / "tokenizer"):
        if any((candidate / name).is_file() for name in _TOKENIZER_FILES):
            return candidate
    raise DataError(
        f"{folder} holds no tokenizer (looked for {', '.join(_TOKENIZER_FILES)} there and in its "
        f"subfolder tokenizer). Set data.tokenizer_path to a tokenizer folder or Hub name."
    )


def _load_hf(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with offline_when_unreachable():
            return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        instead = "use a local folder, or data.tokenizer_path null to train one on the corpus"
        raise DataError(failure(f"the tokenizer {name!r}", error, instead)) from error


def _adopt(hf: Any, mask_id: int | None) -> Tokenizer:
    """Wraps a Transformers tokenizer, adding the special tokens it lacks."""
    missing: dict[str, str] = {}
    if hf.pad_token_id is None:
        missing["pad_token"] = PAD_TOKEN
    if hf.eos_token_id is None and hf.sep_token_id is None:
        missing["eos_token"] = EOS_TOKEN
    if hf.mask_token_id is None and mask_id is None:
        missing["mask_token"] = MASK_TOKEN
    if missing:
        hf.add_special_tokens(missing)
    added = {index for index, token in hf.added_tokens_decoder.items() if token.special}
    eos_id = hf.eos_token_id if hf.eos_token_id is not None else hf.sep_token_id
    info = TokenizerInfo(
        vocab_size=max(hf.get_vocab().values()) + 1,
        pad_id=hf.pad_token_id,
        eos_id=eos_id,
        mask_id=hf.mask_token_id if mask_id is None else mask_id,
        bos_id=hf.bos_token_id,
        special_ids=tuple(sorted({*hf.all_special_ids, *added})),
    )
    return Tokenizer(_with_mask(info, mask_id), getattr(hf, "backend_tokenizer", None), hf)


def _with_mask(info: TokenizerInfo, mask_id: int | None) -> TokenizerInfo:
    """``info`` with another id as MASK, which may lie beyond the tokenizer (reserved rows)."""
    if mask_id is None:
        return info
    if mask_id < 0 or mask_id in (info.pad_id, info.eos_id):
        raise DataError(
            f"data.special_mask_id must be an id of its own that is not negative, got {mask_id} "
            f"(PAD is {info.pad_id}, EOS is {info.eos_id})"
        )
    return TokenizerInfo(
        vocab_size=max(info.vocab_size, mask_id + 1),
        pad_id=info.pad_id,
        eos_id=info.eos_id,
        mask_id=mask_id,
        bos_id=info.bos_id,
        special_ids=tuple(sorted({*info.special_ids, mask_id})),
    )
