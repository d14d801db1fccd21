"""An adapter is pulled up a score: LECO whose goal is no prompt but a score model (civitai 5416, "LECO-score").

The student denoises a prompt in part; there one step is taken with gradient, a score model judges what it leads to, and the adapter moves
up that score. Held by nothing, every variant of this learns to please the score model instead of becoming better, or collapses; so the
step is also held near what the frozen model says there (the anchor, DRaFT+ of NeMo-Aligner), by a force that finds its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.encoded import Deck, Encoded
from ..data.signed_prompts import SignedPrompt
from ..diffusion import mse, per_sample, randn_like, slope
from ..scores.networks import ScoreModel, level_of, mixing, sigma_of_level, unit_view
from ..scores.objective import NOISIEST
from ..settings import NoiseSettings, PointSettings, Settings, choice, number, switch, text
from .rollouts import Model, Pull, Rollouts, Task, noise_of, one_of, pick, way_levels

TARGETS = ("x0_renoised", "next_step", "x0", "direct_align", "draft_lv")
BANDS = 5  # of noise levels, whose gradients are made equally large
MEMORY = 0.9  # of the running figures
ADJUST = 10  # updates between two changes of the anchor
STEP_UP = 1.5  # of the anchor


@dataclass(frozen=True, kw_only=True)
class LecoScoreSettings(Settings):
    """Where a step is graded, what the score model sees of it, and what holds the student back."""

    target: str = choice(
        "x0_renoised", TARGETS,
        "What the score model sees. x0_renoised: the picture the step leads to, noised again. next_step: the state after the step. "
        "x0: the picture itself. direct_align: your own pictures, noised and denoised by one step. draft_lv: the last step only.",
    )  # fmt: skip
    slider: bool = switch(False, "Learn up at strength +1 and down at -1 in one step, so that the strength becomes a signed dial.")
    anchor: float = number(0.5, 0.0, 100_000.0, "Force that holds each step near what the frozen model says. 0 means none, and nothing then keeps "
                           "the score model from being fooled.", step=0.5)  # fmt: skip
    adjust: bool = switch(True, "Raise the anchor while the drift is above drift_high, and lower it while it is below drift_low.")
    drift_low: float = number(0.4, 0.0, 10.0, "Below this distance from the frozen model's noise or velocity the anchor gives way.", step=0.05,
                              advanced=True)  # fmt: skip
    drift_high: float = number(1.0, 0.0, 10.0, "Above this distance the anchor grows.", step=0.05, advanced=True)
    sampling_steps: int = number(20, 2, 1000, "Steps of one way from noise to picture.")
    guidance_scale: float = number(0.0, 0.0, 30.0, "Classifier-free guidance while drawing; 1 halves the cost. 0 means 3, or 1 for models with "
                                   "guidance distilled into them such as Flux.", step=0.5)  # fmt: skip
    first_step: float = number(0.0, 0.0, 1.0, "Steps are graded from here on: 0 is pure noise, 1 the finished picture.", unit="of the way",
                               step=0.05)  # fmt: skip
    last_step: float = number(0.8, 0.0, 1.0, "Steps are graded up to here. Close to 1 only fine detail can change, which is where score models "
                              "are fooled.", unit="of the way", step=0.05)  # fmt: skip
    ways: int = number(4, 1, 4096, "How many ways are kept and learnt from at the same time.", advanced=True)
    refresh: int = number(6, 1, 1_000_000, "After so many updates the oldest way is walked anew by the student as it is now.",
                          unit="updates", advanced=True)  # fmt: skip
    renoise_low: float = number(0.8, 0.0, 1.0, "x0_renoised: least noise that the score model sees, as a share of the step's own noise level.",
                                step=0.05, advanced=True)  # fmt: skip
    renoise_high: float = number(1.0, 0.0, 1.0, "x0_renoised: most noise that the score model sees, as a share of the step's own noise level.",
                                 step=0.05, advanced=True)  # fmt: skip
    draws: int = number(2, 1, 64, "x0_renoised, draft_lv: noised copies of each picture that are judged.", advanced=True)
    uncertainty: float = number(1.0, 0.0, 100.0, "Takes off so many standard deviations between the members of a score model, so that what they "
                                "disagree about is not sought.", step=0.25)  # fmt: skip
    cap: float = number(0.0, 0.0, 100.0, "A score above this counts as enough and pulls no longer, in standard deviations of the ratings above "
                        "their mean. 0 means no cap.", step=0.25)  # fmt: skip
    relative: float = number(0.0, 0.0, 10.0, "Judge by the difference between good_words and bad_words, (1 + this) * good - bad, for score models "
                             "that read text. 0 means off; SRPO uses 0.1 to 0.3.", step=0.05, advanced=True)  # fmt: skip
    good_words: str = text("", "With relative: put before the prompt for the good side.", advanced=True)
    bad_words: str = text("", "With relative: put before the prompt for the bad side.", advanced=True)
    balance: bool = switch(True, "Make the score's gradient equally large at all noise levels; otherwise the noisy ones drown the rest.",
                           advanced=True)  # fmt: skip
    as_clean: bool = switch(False, "Tell the score model that what it sees is clean, whatever its noise: the original recipe.", advanced=True)

    def __post_init__(self):
        super().__post_init__()
        for low, high in (("first_step", "last_step"), ("drift_low", "drift_high"), ("renoise_low", "renoise_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} is {getattr(self, low)} and {high} is {getattr(self, high)}; {low} must be the smaller one.")
        if self.relative and not (self.good_words.strip() and self.bad_words.strip()):
            raise ValueError(f"relative is {self.relative}, good_words {self.good_words!r} and bad_words {self.bad_words!r}: write both, or set relative to 0.")

    @property
    def needs_noise(self) -> bool:
        """Whether a score model must know noised latents."""
        return not self.as_clean and self.target in ("x0_renoised", "next_step")


# The recipe of the first LECO-score: 26 steps, a state anywhere on a way of its own, one step, a scorer of clean latents, and no anchor.
ORIGINAL = LecoScoreSettings(target="next_step", anchor=0.0, adjust=False, sampling_steps=26, first_step=0.0, last_step=0.96, ways=1, refresh=1,
                             uncertainty=0.0, balance=False, as_clean=True)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a step is graded: x (B, C, ...) at sigma (B,), the step leading to `after`. `base`: what the frozen model says there, x0 too."""

    x: Tensor
    sigma: Tensor
    after: Tensor
    conds: list
    pulls: tuple[Pull, ...]  # strength and sign; their goals are not used
    base: Tensor | None = None
    noise: Tensor | None = None  # that is known to be in x
    words: tuple[str, ...] = ()


# -- where to grade -------------------------------------------------------------------------------------------------------------------


def tasks_of(prompts: Sequence[SignedPrompt], shapes: Sequence[tuple[int, ...]], batch: int, settings: LecoScoreSettings) -> list[Task]:
    """One task per prompt, drawn as often as the size of its weight says; a weight of 0 is drawn like one of 1, and only anchored."""
    if held := [row.prompt for row in prompts if not row.sign and not settings.anchor]:
        raise ValueError(f"{held[0]!r} has weight 0: it is only anchored, and anchor is 0, so nothing would be learnt from it. Raise anchor, or "
                         "give it another weight.")
    asked = lambda prompt: ((1.0, prompt),) if settings.anchor else ()
    pulls = lambda row: tuple(Pull(row.prompt, asked(row.prompt), strength, sign) for strength, sign in ends(row.sign, settings.slider))
    return [Task(pulls(row), row.prompt, row.negative, abs(row.weight) or 1.0, tuple(shapes), batch) for row in prompts]


def ends(sign: float, slider: bool) -> tuple[tuple[float, float], ...]:
    """(strength, sign of the score) of the pulls of one update."""
    return ((1.0, sign), (-1.0, -sign)) if slider else ((1.0, sign),)


def levels_of(settings: LecoScoreSettings) -> tuple[float, float]:
    """(lowest, highest) level of the states that are graded, 1 being pure noise; draft_lv has the last one of a way only."""
    if settings.target == "draft_lv":
        return 1 / settings.sampling_steps, 1 / settings.sampling_steps
    return 1 - settings.last_step, 1 - settings.first_step


class Walked:
    """Places on ways that the student walks from noise to a prompt's picture."""

    def __init__(self, model: Model, tasks: list[Task], settings: LecoScoreSettings, guidance: float):
        points = PointSettings(sampling_steps=settings.sampling_steps, ways=settings.ways, refresh=settings.refresh)
        self.model, self.tasks = model, tasks
        self.ways = Rollouts(model, tasks, points, NoiseSettings(), guidance)
        self.ways.low, self.ways.high = levels_of(settings)

    def draw(self, rng) -> Place:
        point = self.ways.draw(rng)
        task = self.tasks[point.task]
        conds, base = [self.model.conds[task.scene]] * len(point.x), point.answers.get(task.scene)
        return Place(point.x, point.sigma, point.after, conds, task.pulls, base, words=(task.scene,) * len(point.x))

    def state(self) -> dict:
        return self.ways.state()

    def load_state(self, state: dict) -> None:
        self.ways.load_state(state)


class Alone:
    """Places on ways of their own, each walked no further than to the state that is graded: as all other trainers do, and the dearest."""

    def __init__(self, model: Model, tasks: list[Task], settings: LecoScoreSettings, guidance: float):
        self.model, self.tasks, self.settings, self.guidance = model, tasks, settings, guidance

    def draw(self, rng) -> Place:
        task = self.tasks[pick(self.tasks, rng)]
        strength = one_of(sorted({pull.strength for pull in task.pulls}), rng)
        noise = noise_of((task.batch, *one_of(task.shapes, rng)), self.model.denoiser, rng)
        levels, wanted = way_levels(self.settings.sampling_steps, task.batch, *levels_of(self.settings), rng)
        last = one_of([number for number, good in enumerate(wanted) if good], rng)
        sigmas = self.sigmas(levels[: last + 1]).to(noise)
        x, sigma = self.model.walk(noise, sigmas, task, strength, self.guidance)[-1]
        after = self.sigmas((levels[last] - 1 / self.settings.sampling_steps).clamp(min=0)).to(noise)
        base = self.model.frozen(x, sigma, task.asked)[task.scene] if task.asked else None
        return Place(x, sigma, after, [self.model.conds[task.scene]] * len(x), task.pulls, base, words=(task.scene,) * len(x))

    def sigmas(self, levels):
        return self.model.denoiser.sigma_at(levels.flatten()).view(levels.shape)

    def state(self) -> dict:
        return {"spent": dict(self.model.spent)}

    def load_state(self, state: dict) -> None:
        self.model.spent = dict(state["spent"])


def walking(model: Model, tasks: list[Task], settings: LecoScoreSettings, guidance: float) -> Walked | Alone:
    """The places of prompts, as the settings want them walked."""
    return (Alone if settings.ways == settings.refresh == 1 else Walked)(model, tasks, settings, guidance)


class Injected:
    """Places on pictures of a dataset with noise that is known, so that one step gives the whole picture (Direct-Align of SRPO, 2025)."""

    def __init__(self, model: Model, data: Encoded, settings: LecoScoreSettings, batch: int):
        self.model, self.data, self.settings, self.deck = model, data, settings, Deck(data, batch)

    def draw(self, rng) -> Place:
        batch = self.data.batch(self.deck.draw(rng), rng)
        x0 = self.model.denoiser.model_space(batch.x0)
        low, high = levels_of(self.settings)
        levels = low + (high - low) * torch.rand(len(x0), generator=rng)
        sigma, after = (self.model.denoiser.sigma_at(u.clamp(min=0)).to(x0) for u in (levels, levels - 1 / self.settings.sampling_steps))
        noise = randn_like(x0, rng)
        x = self.model.denoiser.noised(x0, noise, sigma)
        pulls = tuple(Pull("", (), strength, sign) for strength, sign in ends(1.0, self.settings.slider))
        base = frozen(self.model, x, sigma, batch.conds) if self.settings.anchor else None
        return Place(x, sigma, after, batch.conds, pulls, base, noise, tuple(batch.captions))

    def state(self) -> dict:
        return {"deck": self.deck.state(), "spent": dict(self.model.spent)}

    def load_state(self, state: dict) -> None:
        self.deck.load_state(state["deck"])
        self.model.spent = dict(state["spent"])


@torch.no_grad()
def frozen(model: Model, x, sigma, conds) -> Tensor:
    model.spent["frozen"] += len(x)
    with model.adapters.at(0):
        return model.denoiser.denoise(x, sigma, conds)


# -- what is judged -------------------------------------------------------------------------------------------------------------------


def stepped(place: Place, x0: Tensor) -> Tensor:
    """The state after an Euler step along what the student says."""
    return place.x + slope(place.x, place.sigma, x0) * per_sample(place.after - place.sigma, place.x)


def next_step(method, place, x0, rng):
    return [(stepped(place, x0), place.after)]


def picture(method, place, x0, rng):
    return [(x0, torch.zeros_like(place.sigma))]


def renoised(method, place, x0, rng):
    """The picture under fresh noise, nearly as much as the state had: x0 is a blur where there is much, and no score model has seen blurs
    under little noise (fixed levels of 0.1 to 0.5 fooled it: benchmarks/README.md)."""
    s, level = method.settings, level_of(method.denoiser, place.sigma)
    shares = (s.renoise_low + (s.renoise_high - s.renoise_low) * torch.rand(len(x0), generator=rng).to(x0) for _ in range(s.draws))
    sigmas = [sigma_of_level(method.denoiser, (share * level).clamp(max=NOISIEST)) for share in shares]
    return [(method.denoiser.noised(x0, randn_like(x0, rng), sigma), sigma) for sigma in sigmas]


def aligned(method, place, x0, rng):
    """The picture that is left when the known noise is taken out of the state after the step: right also where x0 is a blur."""
    a, b = mixing(method.denoiser, place.after)
    return [((stepped(place, x0) - per_sample(b, x0) * place.noise) / per_sample(a, x0), torch.zeros_like(place.sigma))]


def last_steps(method, place, x0, rng):
    """The picture noised anew to the last level and denoised again, several times (DRaFT-LV, Clark et al. 2023)."""
    again = [method.denoiser.noised(x0.detach(), randn_like(x0, rng), place.sigma) for _ in range(method.settings.draws)]
    return [(method.student(x, place.sigma, place.conds), torch.zeros_like(place.sigma)) for x in again]


SEEN = {"x0_renoised": renoised, "next_step": next_step, "x0": picture, "direct_align": aligned, "draft_lv": last_steps}


# -- the method -----------------------------------------------------------------------------------------------------------------------


@dataclass
class LecoScore:
    """`scores`: score models with their weights. `places.draw(rng)` gives where a step is graded."""

    model: Model
    scores: Sequence[tuple[ScoreModel, float]]
    places: object
    settings: LecoScoreSettings = LecoScoreSettings()

    def __post_init__(self):
        check(self.scores, self.settings)
        self.updates = 0
        self.anchor, self.drift = self.model.here(torch.tensor(float(self.settings.anchor))), self.model.here(torch.zeros(()))
        self.bands = self.model.here(torch.zeros(BANDS))  # running size of the score's gradient, 0 where none was seen

    @property
    def denoiser(self):
        return self.model.denoiser

    def parameters(self):
        return list(self.model.adapters.parameters())

    def loss(self, rng):
        """(pulls * B,) minus the score, plus the anchor."""
        place = self.places.draw(rng)
        self.updates += 1
        return torch.cat([self.pulled(pull, place, rng) for pull in place.pulls])

    def pulled(self, pull: Pull, place: Place, rng) -> Tensor:
        """`pull.weight` is the sign of the score: up, down, or 0 for what is only held."""
        with self.model.adapters.at(pull.strength):
            x0 = self.student(place.x, place.sigma, place.conds)
            loss = torch.zeros(len(x0), device=x0.device)
            if pull.weight:
                reward = self.reward(SEEN[self.settings.target](self, place, x0, rng), pull.weight, place.words)
                loss = loss - self.balanced(reward, x0, place.sigma)
        return loss if place.base is None else loss + self.held(place, x0)

    def student(self, x, sigma, conds) -> Tensor:
        """x0 (B, ...) with the adapters at their strength of now, with gradient."""
        self.model.spent["student"] += len(x)
        return self.denoiser.denoise(x, sigma, conds)

    def reward(self, seen, sign: float, words=()) -> Tensor:
        """(B,) what goes up: sign * score - uncertainty * deviation between members, the mean over what is seen, at most `cap`."""
        total = sum(weight for _, weight in self.scores)
        means = [sum(weight * self.said(score, x, sigma, sign, words) for score, weight in self.scores) / total for x, sigma in seen]
        reward = sum(means) / len(means)
        return reward if not self.settings.cap else self.settings.cap - (self.settings.cap - reward).relu()

    def said(self, score: ScoreModel, x, sigma, sign, words) -> Tensor:
        """(B,) of one score model, pessimistic in either direction."""
        view, level = unit_view(self.denoiser, x, sigma)
        level = torch.zeros_like(level) if self.settings.as_clean else level
        members = self.compared(score, view, level, words) if self.settings.relative and reads(score) else told(score, view, level, words)
        if len(members) == 1 or not self.settings.uncertainty:
            return sign * members.mean(0)
        return sign * members.mean(0) - self.settings.uncertainty * (members.var(0, unbiased=False) + 1e-12).sqrt()

    def compared(self, score, view, level, words) -> Tensor:
        """(M, B) (1 + k) * S(good) - S(bad): what both sides have in common, such as a favourite colour, cancels (SRP of SRPO, 2025)."""
        good, bad = sides(self.settings, words)
        return (1 + self.settings.relative) * score.members_told(view, level, good) - score.members_told(view, level, bad)

    def held(self, place: Place, x0) -> Tensor:
        """(B,) anchor * mean square of the change of noise or velocity, and the bookkeeping of the drift."""
        away = mse(slope(place.x, place.sigma, x0), slope(place.x, place.sigma, place.base))
        loss = self.anchor * away
        self.remember(away.detach().mean().sqrt())
        return loss

    def remember(self, drift: Tensor):
        """Running drift, and every ADJUST updates an anchor that answers to it. On the device: nothing waits for it."""
        self.drift = torch.where(self.drift == 0, drift, MEMORY * self.drift + (1 - MEMORY) * drift)
        if self.settings.adjust and self.updates % ADJUST == 0:
            factor = torch.where(self.drift > self.settings.drift_high, STEP_UP, torch.where(self.drift < self.settings.drift_low, 1 / STEP_UP, 1.0))
            self.anchor = (self.anchor * factor).clamp(self.settings.anchor / 100, self.settings.anchor * 1000)

    def balanced(self, reward: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """The reward times a factor per sample that makes its gradient on the network's own output as large in one band of noise levels
        as in another: x0 hardly depends on the network where there is little noise left."""
        if not (self.settings.balance and self.settings.target != "draft_lv" and reward.requires_grad):
            return reward
        (gradient,) = torch.autograd.grad(reward.sum(), x0, retain_graph=True)
        size = gradient.flatten(1).norm(dim=1) * self.denoiser.native_scale(sigma)
        band = (level_of(self.denoiser, sigma) * BANDS).long().clamp(0, BANDS - 1)
        here = torch.nn.functional.one_hot(band, BANDS).to(size) * (size > 0).to(size)[:, None]  # (B, BANDS); a capped reward has no gradient
        count = here.sum(0)
        mean = (here * size[:, None]).sum(0) / count.clamp(min=1)
        self.bands = torch.where(count == 0, self.bands, torch.where(self.bands == 0, mean, MEMORY * self.bands + (1 - MEMORY) * mean))
        known = (self.bands > 0).to(size)
        wanted = (self.bands * known).sum() / known.sum().clamp(min=1)
        return reward * (wanted / self.bands.clamp(min=1e-12))[band].clamp(0.1, 10.0)

    def state(self) -> dict:
        numbers = {name: getattr(self, name).detach().cpu().clone() for name in ("anchor", "drift", "bands")}
        return {"places": self.places.state(), "updates": self.updates, **numbers}

    def load_state(self, state: dict) -> None:
        self.places.load_state(state["places"])
        self.updates = state["updates"]
        for name in ("anchor", "drift", "bands"):
            setattr(self, name, self.model.here(state[name].clone()))


def reads(score) -> bool:
    """Whether a score model judges a picture by a text: `members_told(x, level, texts)`, and `read(texts)` beforehand."""
    return hasattr(score, "members_told")


def told(score, view, level, words) -> Tensor:
    """(M, B) what the members say; those that read and have no `words` of their own compare each picture with its text."""
    return score.members_told(view, level, list(words)) if reads(score) and not getattr(score, "words", "") else score.members(view, level)


def sides(settings: LecoScoreSettings, words) -> tuple[list[str], list[str]]:
    """(good, bad) texts for the relative reward."""
    return tuple([f"{side.strip()}. {word}" for word in words] for side in (settings.good_words, settings.bad_words))


def texts_to_read(settings: LecoScoreSettings, words) -> list[str]:
    """All that a run will ask of score models that read."""
    return [*words, *(text for side in (sides(settings, words) if settings.relative else ()) for text in side)]


def check(scores, settings: LecoScoreSettings) -> None:
    """Raises ValueError for a score model that this target cannot use."""
    if not scores or not sum(weight for _, weight in scores) > 0:
        raise ValueError(f"The score models have the weights {', '.join(f'{w:g}' for _, w in scores) or 'of none'}: their sum must be above 0.")
    for score, _ in scores:
        if settings.needs_noise and not score.about.noisy:
            fits = ", ".join(t for t in TARGETS if not LecoScoreSettings(target=t).needs_noise)
            raise ValueError(f"target is {settings.target!r}, which shows the score model noised latents, and this one was trained on clean pictures "
                             f"only. Train it with 'noisy' on, or choose one of {fits}.")
    if settings.relative and not any(reads(score) for score, _ in scores):
        raise ValueError(f"relative is {settings.relative}, and no score model here ({scores[0][0].about.backbone}) reads text: with good and bad words they "
                         "say the same. Set relative to 0, or use Prompt Match Score.")
