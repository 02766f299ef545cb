"""Instructions -> token ids. One class for a checkpoint's own tokenizer and for the default. No torch.

The default for models made here is byte-level: every text has an encoding, 257 ids, nothing to download.
"""

from pathlib import Path

from vla.errors import CheckpointError

FILE = "tokenizer.json"


class Tokenizer:
    """A Hugging Face fast tokenizer, read from the one file that describes it whole."""

    def __init__(self, description: str) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self._fast = FastTokenizer.from_str(description)
        self._fast.no_padding()
        self._fast.no_truncation()
        self.pad_id = 0  # any valid id: padded positions are masked wherever they could be read
        self.vocab_size = self._fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it is, with the marks that this tokenizer puts around it."""
        return self._fast.encode(text).ids

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self._fast.to_str(), encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`.

    Raises:
        CheckpointError: there is none, or its file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE}. A checkpoint brings its tokenizer along; "
            f"copy the file from where the weights came from."
        )
    try:
        return Tokenizer(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise CheckpointError(f"{path} is not a tokenizer description: {error}") from error


def byte_level() -> Tokenizer:
    """One token per UTF-8 byte; id 0 is padding."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Tokenizer(fast.to_str())
