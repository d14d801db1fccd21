"""Zero-shot tags by CLIP: the words of a vocabulary whose text features lie nearest to the image's features.

Each word is put into several sentences, whose features are averaged (Radford et al. 2021). It counts only where the
image lies nearer to it than to the same sentences about nothing in particular. Any list of words serves, and no tagger
has to be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..settings import compute_fingerprint
from . import CaptionResult
from .tags import TaggerSettings

SENTENCE_TEMPLATES = ("a photo of {}", "a picture of {}", "a drawing of {}", "an image showing {}", "{}")
NEUTRAL_WORDS = ("something", "things", "anything")  # what a word is compared with
CLIP_LOGIT_SCALE = 100.0  # CLIP's own temperature: exp(logit_scale) of the published models
SENTENCE_BATCH = 32  # sentences at a time

DEFAULT_VOCABULARY = """\
# One word or phrase per comma. A line with a colon picks one of its words.
medium: photo, digital painting, oil painting, watercolour, pencil sketch, line art, 3d render, pixel art, comic \
page, screenshot, logo
framing: extreme close-up, head and shoulders, half figure, whole figure, wide view
angle: seen from the front, seen from the side, seen from behind, seen from above, seen from below
place: indoors, street, city skyline, forest, mountains, beach, meadow, garden, kitchen, bedroom, office, stage, \
plain background
light: bright daylight, overcast light, golden evening light, night, neon light, candle light, studio light, backlight
colours: black and white, pastel colours, vivid colours, muted colours, warm colours, cold colours
woman, man, child, couple, crowd, portrait, hands
cat, dog, horse, bird, fish, insect, flower, tree, food, drink, car, bicycle, train, ship, aeroplane, building, \
bridge, furniture, book, toy
long hair, short hair, beard, glasses, hat, dress, suit, uniform, armour, swimsuit, jewellery, smile
water, snow, rain, fog, fire, clouds, stars, shadow, reflection, blurred background, written words, watermark, frame \
around the picture
"""


@dataclass(frozen=True)
class VocabularyGroup:
    """The words of one line of the vocabulary. `exclusive`: at most the best of them is picked."""

    words: tuple[str, ...]
    exclusive: bool = False
    name: str = ""


def read_vocabulary(text: str) -> tuple[VocabularyGroup, ...]:
    """The groups of a vocabulary text: `name: red, blue` is exclusive, the words of other lines are independent, `#`
    begins a comment. An empty text means DEFAULT_VOCABULARY. ValueError for a text without words."""
    lines = [line.partition("#")[0].strip() for line in (text if text.strip() else DEFAULT_VOCABULARY).splitlines()]
    groups = []
    for line in filter(None, lines):
        name, colon, words = line.partition(":") if ":" in line else ("", "", line)
        found = tuple(dict.fromkeys(" ".join(word.split()) for word in words.split(",") if word.strip()))
        if colon and len(found) < 2:
            raise ValueError(
                f"The line {line!r} of the vocabulary offers {len(found)} words to pick one from; write at least two, "
                "or no colon: colour: red, blue"
            )
        groups.append(VocabularyGroup(found, bool(colon), name.strip()))
    if not any(group.words for group in groups):
        raise ValueError(
            "The vocabulary holds no words, only remarks or commas. Write words with commas between them, for example "
            "cat, dog."
        )
    return tuple(group for group in groups if group.words)


@dataclass
class ZeroShotTagger:
    """A captioner over two encoders with one joint space: images -> (N, D) and texts -> (N, D)."""

    image_features: Callable[[Sequence[Image.Image]], torch.Tensor]
    text_features: Callable[[Sequence[str]], torch.Tensor]
    vocabulary: tuple[VocabularyGroup, ...]
    settings: TaggerSettings = field(default_factory=TaggerSettings)
    name: str = ""  # which models the two encoders are: part of the identity
    identity: str = field(init=False)
    _word_features: dict[str, torch.Tensor] | None = None
    _neutral_features: torch.Tensor | None = None

    def __post_init__(self):
        groups = [[group.exclusive, *group.words] for group in self.vocabulary]
        limits = [self.settings.zero_shot_words, self.settings.zero_shot_certainty]
        self.identity = (
            f"zero-shot {self.name} {compute_fingerprint(limits, groups, SENTENCE_TEMPLATES, NEUTRAL_WORDS)}"
        )

    def caption(self, image: Image.Image, prompt: str = "") -> CaptionResult:
        tags = self.pick_tags(self.probabilities(image))
        return CaptionResult(", ".join(tags), tags)

    def pick_tags(self, probabilities: dict[str, float]) -> tuple[str, ...]:
        """The best word of each exclusive group, in the vocabulary's order, then the most probable of the others."""
        sure = {word: p for word, p in probabilities.items() if p >= self.settings.zero_shot_certainty}
        best = [max(group.words, key=probabilities.__getitem__) for group in self.vocabulary if group.exclusive]
        free = {word for group in self.vocabulary if not group.exclusive for word in group.words}
        others = sorted((word for word in sure if word in free), key=lambda word: -sure[word])[
            : self.settings.zero_shot_words
        ]
        return tuple(dict.fromkeys([word for word in best if word in sure] + others))

    def probabilities(self, image: Image.Image) -> dict[str, float]:
        """Word -> its probability in a softmax over two choices, the word and the neutral words."""
        words, neutral = self.encode_vocabulary()
        seen = normalise_features(self.image_features([image]))[0]
        if seen.shape != neutral.shape:
            raise ValueError(
                f"The picture's features are {seen.numel()} numbers and the words' {neutral.numel()}: CLIP_VISION "
                "and CLIP do not match."
            )
        features = torch.stack(list(words.values()))
        found = (CLIP_LOGIT_SCALE * (features @ seen - neutral @ seen)).sigmoid()
        return dict(zip(words, found.tolist(), strict=True))

    def encode_vocabulary(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(word -> its features (D,), the features of the neutral words (D,)), encoded once."""
        if self._word_features is None or self._neutral_features is None:
            vocabulary = tuple(dict.fromkeys(word for group in self.vocabulary for word in group.words))
            encoded = encode_words((*vocabulary, *NEUTRAL_WORDS), self.text_features)
            self._word_features = dict(zip(vocabulary, encoded, strict=False))
            self._neutral_features = normalise_features(encoded[len(vocabulary) :].mean(0))
        return self._word_features, self._neutral_features


def encode_words(words: Sequence[str], text_features) -> torch.Tensor:
    """(words, D), unit length: the mean direction of all sentences about each word."""
    sentences = [sentence.format(word) for word in words for sentence in SENTENCE_TEMPLATES]
    batches = (sentences[start : start + SENTENCE_BATCH] for start in range(0, len(sentences), SENTENCE_BATCH))
    features = torch.cat([normalise_features(text_features(batch)) for batch in batches])
    return normalise_features(features.reshape(len(words), len(SENTENCE_TEMPLATES), -1).mean(1))


def normalise_features(features: torch.Tensor) -> torch.Tensor:
    """The features at unit length. ValueError when they are zero or not finite."""
    features = features.detach().float().cpu()
    length = features.norm(dim=-1, keepdim=True)
    if not (length.isfinite() & (length > 0)).all():
        raise ValueError(
            "CLIP answers with features that are zero or not finite; its file is damaged, or its precision too small. "
            "Load another one."
        )
    return features / length
