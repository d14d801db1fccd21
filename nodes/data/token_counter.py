"""Counts a text's tokens in each text encoder of a CLIP, without loading its weights."""

from __future__ import annotations


class TokenCounter:
    """counter(text) -> {encoder: number of tokens}, without start, end, padding and template tokens. Counts are
    cached."""

    def __init__(self, clip):
        self.clip, self.cached_counts = clip, {}
        self.template_counts = self.count_tokens("")

    def __call__(self, text: str) -> dict[str, int]:
        if text not in self.cached_counts:
            self.cached_counts[text] = {
                name: count - self.template_counts[name] for name, count in self.count_tokens(text).items()
            }
        return self.cached_counts[text]

    def count_tokens(self, text):
        """Encoder -> tokens that belong to a word; ComfyUI gives all others the word id 0."""
        chunks = self.clip.tokenize(text, return_word_ids=True)
        return {name: sum(word != 0 for chunk in part for _, _, word in chunk) for name, part in chunks.items()}


def make_token_counter(clip) -> TokenCounter | None:
    return None if clip is None else TokenCounter(clip)
