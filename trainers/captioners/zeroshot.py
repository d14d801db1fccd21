"""Tags from a vocabulary, by CLIP: the words whose description lies nearest to the picture.

A word is described in several sentences, whose features are averaged (Radford et al. 2021); it counts only where the
picture lies nearer to it than to the same sentences about nothing in particular. Any list of words serves, and no
tagger has to be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..settings import compute_fingerprint
from . import CaptionResult
from .tags import TaggerSettings

SENTENCE_TEMPLATES = ("a photo of {}", "a picture of {}", "a drawing of {}", "an image showing {}", "{}")
NEUTRAL_WORDS = ("something", "things", "anything")  # what a picture of no particular word is a picture of
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
    """Words of one line: the best one is picked where `exclusive` is set, else each may be."""

    words: tuple[str, ...]
    exclusive: bool = False
    name: str = ""


def read_vocabulary(text: str) -> tuple[VocabularyGroup, ...]:
    """The groups of a text: `name: red, blue` picks one, other lines are words of their own; `#` begins a remark.
    ValueError when it holds no word. An empty text means the short vocabulary that comes with this file."""
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
    """A captioner over two functions with one space: pictures -> (N, D) and texts -> (N, D)."""

    image_features: Callable[[Sequence[Image.Image]], torch.Tensor]
    text_features: Callable[[Sequence[str]], torch.Tensor]
    vocabulary: tuple[VocabularyGroup, ...]
    settings: TaggerSettings = field(default_factory=TaggerSettings)
    name: str = ""  # which models the two functions ask
    identity: str = field(init=False)
    _word_features: dict[str, torch.Tensor] | None = None
    _neutral_features: torch.Tensor | None = None

    def __post_init__(self):
        groups = [[group.exclusive, *group.words] for group in self.vocabulary]
        limits = [self.settings.zero_shot_words, self.settings.zero_shot_certainty]
        self.identity = (
            f"zero-shot {self.name} {compute_fingerprint(limits, groups, SENTENCE_TEMPLATES, NEUTRAL_WORDS)}"
        )

    def caption(self, picture: Image.Image, prompt: str = "") -> CaptionResult:
        tags = self.pick_tags(self.probabilities(picture))
        return CaptionResult(", ".join(tags), tags)

    def pick_tags(self, probabilities: dict[str, float]) -> tuple[str, ...]:
        """One word of each line that asks for one, in the order of the lines, then the surest of the others."""
        sure = {word: p for word, p in probabilities.items() if p >= self.settings.zero_shot_certainty}
        best = [max(group.words, key=probabilities.get) for group in self.vocabulary if group.exclusive]
        free = {word for group in self.vocabulary if not group.exclusive for word in group.words}
        others = sorted((word for word in sure if word in free), key=lambda word: -sure[word])[
            : self.settings.zero_shot_words
        ]
        return tuple(dict.fromkeys([word for word in best if word in sure] + others))

    def probabilities(self, picture: Image.Image) -> dict[str, float]:
        """Word -> how likely it is, when the choice is between this word and something: softmax over the two."""
        words, nothing = self.encode_vocabulary()
        image = normalise_features(self.image_features([picture]))[0]
        if image.shape != nothing.shape:
            raise ValueError(
                f"The picture's features are {image.numel()} numbers and the words' {nothing.numel()}: CLIP_VISION and "
                "CLIP are no pair."
            )
        features = torch.stack(list(words.values()))
        found = (CLIP_LOGIT_SCALE * (features @ image - nothing @ image)).sigmoid()
        return dict(zip(words, found.tolist(), strict=True))

    def encode_vocabulary(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(word -> its features, the features of nothing), asked once."""
        if self._word_features is None:
            vocabulary = tuple(dict.fromkeys(word for group in self.vocabulary for word in group.words))
            told = encode_words((*vocabulary, *NEUTRAL_WORDS), self.text_features)
            self._word_features = dict(zip(vocabulary, told, strict=False))
            self._neutral_features = normalise_features(told[len(vocabulary) :].mean(0))
        return self._word_features, self._neutral_features


def encode_words(words: Sequence[str], text_features) -> torch.Tensor:
    """(words, D) of length 1: the mean direction of all sentences about each word."""
    sentences = [sentence.format(word) for word in words for sentence in SENTENCE_TEMPLATES]
    features = torch.cat([normalise_features(text_features(part)) for part in split_sentence_batches(sentences)])
    return normalise_features(features.reshape(len(words), len(SENTENCE_TEMPLATES), -1).mean(1))


def split_sentence_batches(items: Sequence[str]) -> Iterable[Sequence[str]]:
    return (items[start : start + SENTENCE_BATCH] for start in range(0, len(items), SENTENCE_BATCH))


def normalise_features(features: torch.Tensor) -> torch.Tensor:
    """The same directions, of length 1. ValueError when they are no directions."""
    features = features.detach().float().cpu()
    length = features.norm(dim=-1, keepdim=True)
    if not (length.isfinite() & (length > 0)).all():
        raise ValueError(
            "CLIP answers with features that are zero or not finite; its file is damaged, or its precision too small. "
            "Load another one."
        )
    return features / length
