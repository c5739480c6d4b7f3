"""A small vocabulary for CLIP's tokenizer: every known word is one token, others fall to pieces.

CLIP's tokenizer is a byte pair encoding: a word begins as its bytes, the last of them marked, and
pairs are joined in the order of a list. Joining pairs of the known words until each of them is one
token gives the list; the same words give the same one.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

END, START, STOP = "</w>", "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """Return the printable characters that stand for bytes 0 to 255 in byte-level encodings."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + number) for number in range(256))
    return [chr(byte) if byte in plain else next(others) for byte in range(256)]


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """List the pairs to join, commonest first, until each of the ASCII words is one token."""
    pieces = {word: [*word[:-1], word[-1] + END] for word in sorted(set(words))}
    merges = []
    while any(len(parts) > 1 for parts in pieces.values()):
        pairs = Counter(pair for parts in pieces.values() for pair in pairwise(parts))
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        pieces = {word: _join(parts, merges[-1]) for word, parts in pieces.items()}
    return merges


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined, at = [], 0
    while at < len(parts):
        found = tuple(parts[at : at + 2]) == pair
        joined.append("".join(pair) if found else parts[at])
        at += 2 if found else 1
    return joined


def mini_tokenizer(words: Sequence[str], max_length: int):
    """Build a ``CLIPTokenizer`` whose single tokens are ``words``; prompts get ``max_length``."""
    from transformers import CLIPTokenizer

    merges = learn_merges(words)
    alphabet = byte_characters()
    tokens = [*alphabet, *(c + END for c in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, STOP])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def unknown_words(tokenizer, prompts: Sequence[str]) -> list[str]:
    """List the words of prompts that are no single token, sorted."""
    said = sorted({word for prompt in prompts for word in prompt.lower().split()})
    return [word for word in said if len(tokenizer.tokenize(word)) > 1]
