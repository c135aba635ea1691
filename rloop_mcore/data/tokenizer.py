"""The tokenizer of an HF folder: text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import read_json

_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class TextTokenizer:
    """The tokenizer of an HF folder: its tokenizer.json, and the end token that tokenizer_config.json names.

    Loaded with `tokenizers` alone: importing transformers for the same ids costs seconds. `config`: the latter file;
    `special_tokens`: the texts of those that it names, by name.
    """

    def __init__(self, folder: Path) -> None:
        files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"{file} does not exist; AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...) "
                    "of transformers writes it"
                )
        try:
            self._tokenizer = Tokenizer.from_buffer(files[0].read_bytes())  # a path is UTF-8 to it, whatever the locale
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{files[0]} is not a tokenizer: {error}") from None
        # transformers saves what the last call before asked for, and asks for neither where nobody says so
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.folder = folder
        self.config = read_json(files[1])
        stated = {name: self._stated(name) for name in _SPECIAL_TOKENS}
        self.special_tokens = {name: token for name, token in stated.items() if token is not None}
        for beside in (folder / "special_tokens_map.json", folder / "added_tokens.json"):  # engines read them
            if beside.exists():
                read_json(beside)
        eos = stated["eos_token"]
        eos_id = self._tokenizer.token_to_id(eos) if eos else None
        if eos_id is None:
            raise UserError(f"{files[1]}: eos_token is {eos!r}; it must name a token of tokenizer.json")
        self.eos_id: int = eos_id

    def _stated(self, name: str) -> str | None:
        """The text of a special token by its name in tokenizer_config.json, which has it or a description of it."""
        token = self.config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str | None):
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: {name} is {token!r:.60}; it must be a text")
        return text

    def encode(self, text: str, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text. `special_tokens`: with those (a BOS, say) that the tokenizer itself puts around it."""
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"the tokenizer cannot encode {text!r:.200}: {error}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens dropped."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def special(self, token: int) -> str | None:
        """The text of a special token, which `decode` drops; None for an id that is not one's."""
        added = self._tokenizer.get_added_tokens_decoder().get(token)
        return added.content if added is not None and added.special else None
