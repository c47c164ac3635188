"""Bearer tokens of the admin API: from a file that names their holders, or one from the environment."""

from __future__ import annotations

import hmac
import os
from hashlib import sha256
from pathlib import Path

from memoir_retrieval.errors import ConfigError
from memoir_vllm.config import TOKEN_VARIABLE

__all__ = ["Tokens"]

LEAST = 16  # characters


class Tokens:
    """Known tokens, kept as digests."""

    def __init__(self, names: dict[bytes, str]):
        """names: of the holders, by the digest of their token."""
        self._names = names

    @classmethod
    def read(cls, file: str | None) -> Tokens:
        """file: lines `NAME TOKEN`, empty ones and those that start with # left out.

        Raises ConfigError, which never shows a token, for a file that cannot be read, a line that is no such pair, a
        token of less than 16 characters, and a name or token that comes twice.
        """
        pairs = []
        if (token := os.environ.get(TOKEN_VARIABLE)) is not None:
            pairs.append(("admin", token, f"the environment variable {TOKEN_VARIABLE}"))
        if file is not None:
            pairs += _read_file(Path(file))
        names: dict[bytes, str] = {}
        for name, token, where in pairs:
            if len(token) < LEAST or not token.isascii() or not token.isprintable() or " " in token:
                raise ConfigError(
                    f"{where} holds no token of {LEAST} or more ASCII characters without spaces: make one with "
                    "`openssl rand -hex 24`"
                )
            digest = sha256(token.encode()).digest()
            if digest in names or name in names.values():
                raise ConfigError(f"{where} repeats a name or a token: give each holder one of their own")
            names[digest] = name
        return cls(names)

    def __bool__(self) -> bool:
        return bool(self._names)

    def holder(self, authorization: str | None) -> str | None:
        """The name of the holder of a token, or None. Takes the same time for every wrong token.

        authorization: the header of a request.
        """
        scheme, _, token = (authorization or "").partition(" ")
        token_digest = sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        holder = None
        for digest, name in self._names.items():
            if hmac.compare_digest(token_digest, digest):
                holder = name
        return holder if scheme.lower() == "bearer" else None


def _read_file(path: Path) -> list[tuple[str, str, str]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file {path} cannot be read: {getattr(error, 'strerror', 'it is not text')}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise ConfigError(f"token_file {path}, line {number}: write a name, a space and a token")
        pairs.append((parts[0], parts[1], f"token_file {path}, line {number}"))
    if not pairs:
        raise ConfigError(f"token_file {path} holds no token: write lines of a name, a space and a token")
    return pairs
