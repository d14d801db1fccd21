"""How many tokens a text is to each text encoder of a CLIP. No weights are loaded for it."""

from __future__ import annotations


class TokenCounter:
    """counter(text) -> {encoder: tokens}, without the tokens of beginning, end, padding and template. Texts are
    remembered."""

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
        """ComfyUI numbers the words of a text; 0 is no word."""
        chunks = self.clip.tokenize(text, return_word_ids=True)
        return {name: sum(word != 0 for chunk in part for _, _, word in chunk) for name, part in chunks.items()}


def make_token_counter(clip) -> TokenCounter | None:
    return None if clip is None else TokenCounter(clip)
