"""An adapter learns to raise a score: LECO whose goal is a score model in place of a prompt (civitai 5416,
"LECO-score").

The student denoises a prompt in part; there one step is taken with gradient, a score model judges what it leads to, and
the adapter moves up that score. Held by nothing, every variant of this learns to please the score model instead of
becoming better, or collapses; so the step is also held near what the frozen model says there (the anchor, DRaFT+ of
NeMo-Aligner), by a force that finds its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.encoded import BucketBatchSampler, EncodedDataset
from ..data.signed_prompts import SignedPrompt
from ..diffusion import (
    cpu_randn_like,
    noising_coefficients,
    per_sample,
    per_sample_mse,
    sigmas_at_levels,
    slope,
    sum_tensors,
)
from ..memory.transfer import copy_like
from ..protocols import PointSource
from ..scores.networks import ScorerEnsemble, level_to_sigma, sigma_to_level, to_scorer_input
from ..scores.objective import MAX_SCORE_NOISE
from ..settings import NoiseSettings, PointSettings, Settings, choice_field, number_field, switch_field, text_field
from .rollouts import (
    PromptTarget,
    PromptTask,
    RolloutPoints,
    StudentTeacherModel,
    sample_element,
    sample_latent_noise,
    sample_rollout_levels,
    sample_task_index,
)

SCORE_TARGETS = ("x0_renoised", "next_step", "x0", "direct_align", "draft_lv")
NOISE_LEVEL_BANDS = 5  # of noise levels, whose gradients are made equally large
RUNNING_MEAN_DECAY = 0.9  # of the running figures
ANCHOR_UPDATE_INTERVAL = 10  # updates between two changes of the anchor
ANCHOR_GROWTH = 1.5  # of the anchor


@dataclass(frozen=True, kw_only=True)
class LecoScoreSettings(Settings):
    """Where a step is graded, what the score model sees of it, and what holds the student back."""

    target: str = choice_field(
        "x0_renoised",
        SCORE_TARGETS,
        "What the score model sees. x0_renoised: the picture the step leads to, noised again. next_step: the state "
        "after the step. x0: the picture itself. direct_align: your own pictures, noised and denoised by one step. "
        "draft_lv: the last step only.",
    )
    slider: bool = switch_field(
        False, "Train up at strength +1 and down at -1 in each step, so that the strength becomes a slider."
    )
    anchor: float = number_field(
        0.5,
        0.0,
        100_000.0,
        "Strength of the penalty that keeps each step near the frozen model's prediction. 0 means none; then "
        "nothing keeps the LoRA from exploiting the score model.",
        step=0.5,
    )
    adjust: bool = switch_field(
        True, "Raise the anchor while the drift is above drift_high, and lower it while the drift is below drift_low."
    )
    drift_low: float = number_field(
        0.4,
        0.0,
        10.0,
        "Below this drift from the frozen model's noise or velocity the anchor shrinks.",
        step=0.05,
        advanced=True,
    )
    drift_high: float = number_field(1.0, 0.0, 10.0, "Above this drift the anchor grows.", step=0.05, advanced=True)
    sampling_steps: int = number_field(20, 2, 1000, "Sampling steps of one trajectory from noise to image.")
    guidance_scale: float = number_field(
        0.0,
        0.0,
        30.0,
        "Classifier-free guidance (CFG) during a rollout; 1 halves the cost. 0 means 3, or 1 for "
        "guidance-distilled models such as Flux.",
        step=0.5,
    )
    first_step: float = number_field(
        0.0,
        0.0,
        1.0,
        "Scoring begins here on the trajectory: 0 is pure noise, 1 the finished image.",
        unit="of the way",
        step=0.05,
    )
    last_step: float = number_field(
        0.8,
        0.0,
        1.0,
        "Scoring ends here. Close to 1 only fine detail can change, which score models misjudge.",
        unit="of the way",
        step=0.05,
    )
    ways: int = number_field(4, 1, 4096, "Number of trajectories kept and trained on at the same time.", advanced=True)
    refresh: int = number_field(
        6,
        1,
        1_000_000,
        "After this many updates, the current model resamples the oldest trajectory.",
        unit="updates",
        advanced=True,
    )
    renoise_low: float = number_field(
        0.8,
        0.0,
        1.0,
        "x0_renoised: least noise on the score model's input, as a share of the step's own noise level.",
        step=0.05,
        advanced=True,
    )
    renoise_high: float = number_field(
        1.0,
        0.0,
        1.0,
        "x0_renoised: most noise on the score model's input, as a share of the step's own noise level.",
        step=0.05,
        advanced=True,
    )
    draws: int = number_field(2, 1, 64, "x0_renoised, draft_lv: noised copies of each image to score.", advanced=True)
    uncertainty: float = number_field(
        1.0,
        0.0,
        100.0,
        "Subtracts this many standard deviations between the score model's members, so that the LoRA does not "
        "exploit what they disagree about.",
        step=0.25,
    )
    cap: float = number_field(
        0.0,
        0.0,
        100.0,
        "Scores above this give no further gradient, in standard deviations of the ratings above their mean. 0 "
        "means no cap.",
        step=0.25,
    )
    relative: float = number_field(
        0.0,
        0.0,
        10.0,
        "Score by the difference between good_words and bad_words, (1 + this) * good - bad, for score models that"
        " read text. 0 means off; SRPO uses 0.1 to 0.3.",
        step=0.05,
        advanced=True,
    )
    good_words: str = text_field("", "With relative: put before the prompt on the good side.", advanced=True)
    bad_words: str = text_field("", "With relative: put before the prompt on the bad side.", advanced=True)
    balance: bool = switch_field(
        True,
        "Give the score's gradient the same size at all noise levels; otherwise high noise levels dominate.",
        advanced=True,
    )
    as_clean: bool = switch_field(
        False,
        "Tell the score model that its input is clean at every noise level, as in the original recipe.",
        advanced=True,
    )

    def __post_init__(self):
        super().__post_init__()
        for low, high in (("first_step", "last_step"), ("drift_low", "drift_high"), ("renoise_low", "renoise_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} is {getattr(self, low)} and {high} is {getattr(self, high)}; {low} must be the smaller one."
                )
        if self.relative and not (self.good_words.strip() and self.bad_words.strip()):
            raise ValueError(
                f"relative is {self.relative}, good_words {self.good_words!r} and bad_words {self.bad_words!r}: write "
                "both, or set relative to 0."
            )

    @property
    def needs_noise(self) -> bool:
        """Whether a score model must know noised latents."""
        return not self.as_clean and self.target in ("x0_renoised", "next_step")


# The recipe of the first LECO-score: 26 steps, a state anywhere on a trajectory of its own, one step, a scorer of clean
# latents, and no anchor.
ORIGINAL_LECO_SCORE = LecoScoreSettings(
    target="next_step",
    anchor=0.0,
    adjust=False,
    sampling_steps=26,
    first_step=0.0,
    last_step=0.96,
    ways=1,
    refresh=1,
    uncertainty=0.0,
    balance=False,
    as_clean=True,
)


@dataclass(frozen=True)
class ScoredState:
    """Where a step is graded: x (B, C, ...) at sigma (B,), the step leading to `next_sigma`. `teacher_x0`: the frozen
    model's prediction there."""

    x: Tensor
    sigma: Tensor
    next_sigma: Tensor
    conds: list
    targets: tuple[PromptTarget, ...]  # strength and sign; their goals are not used
    teacher_x0: Tensor | None = None
    noise: Tensor | None = None  # that is known to be in x
    prompts: tuple[str, ...] = ()


# -- where to grade ----------------------------------------------------------------------------------------------------


def build_score_tasks(
    prompts: Sequence[SignedPrompt], shapes: Sequence[tuple[int, ...]], batch: int, settings: LecoScoreSettings
) -> list[PromptTask]:
    """One task per prompt, drawn as often as the size of its weight says; a weight of 0 is drawn like one of 1, and
    only anchored."""
    if held := [row.prompt for row in prompts if not row.sign and not settings.anchor]:
        raise ValueError(
            f"{held[0]!r} has weight 0: it is only anchored, and anchor is 0, so nothing would be learnt from it. "
            "Raise anchor, or give it another weight."
        )
    asked = lambda prompt: ((1.0, prompt),) if settings.anchor else ()
    targets = lambda row: tuple(
        PromptTarget(row.prompt, asked(row.prompt), strength, sign)
        for strength, sign in signed_strengths(row.sign, settings.slider)
    )
    return [
        PromptTask(targets(row), row.prompt, row.negative, abs(row.weight) or 1.0, tuple(shapes), batch)
        for row in prompts
    ]


def signed_strengths(sign: float, slider: bool) -> tuple[tuple[float, float], ...]:
    """(strength, sign of the score) of the targets of one update."""
    return ((1.0, sign), (-1.0, -sign)) if slider else ((1.0, sign),)


def graded_noise_levels(settings: LecoScoreSettings) -> tuple[float, float]:
    """(lowest, highest) level of the states that are graded, 1 being pure noise; draft_lv has the last one of a
    trajectory only."""
    if settings.target == "draft_lv":
        return 1 / settings.sampling_steps, 1 / settings.sampling_steps
    return 1 - settings.last_step, 1 - settings.first_step


class RolloutStates:
    """States on trajectories that the student samples from noise under a prompt."""

    def __init__(
        self, model: StudentTeacherModel, tasks: list[PromptTask], settings: LecoScoreSettings, guidance: float
    ):
        points = PointSettings(sampling_steps=settings.sampling_steps, ways=settings.ways, refresh=settings.refresh)
        self.model, self.tasks = model, tasks
        self.points = RolloutPoints(model, tasks, points, NoiseSettings(), guidance)
        self.points.low, self.points.high = graded_noise_levels(settings)

    def draw(self, rng) -> ScoredState:
        point = self.points.draw(rng)
        assert point.after is not None  # points of a rollout know the noise level of their next step
        task = self.tasks[point.task]
        conds, base = [self.model.conds[task.rollout_prompt]] * len(point.x), point.answers.get(task.rollout_prompt)
        return ScoredState(
            point.x, point.sigma, point.after, conds, task.targets, base, prompts=(task.rollout_prompt,) * len(point.x)
        )

    def state(self) -> dict:
        return self.points.state()

    def load_state(self, state: dict) -> None:
        self.points.load_state(state)


class SingleRolloutStates:
    """States on trajectories of their own, each sampled no further than to the state that is graded: as all other
    trainers do, and the most expensive."""

    def __init__(
        self, model: StudentTeacherModel, tasks: list[PromptTask], settings: LecoScoreSettings, guidance: float
    ):
        self.model, self.tasks, self.settings, self.guidance = model, tasks, settings, guidance

    def draw(self, rng) -> ScoredState:
        task = self.tasks[sample_task_index(self.tasks, rng)]
        strength = sample_element(sorted({target.strength for target in task.targets}), rng)
        noise = sample_latent_noise((task.batch, *sample_element(task.shapes, rng)), self.model.denoiser, rng)
        levels, wanted = sample_rollout_levels(
            self.settings.sampling_steps, task.batch, *graded_noise_levels(self.settings), rng
        )
        last = sample_element([number for number, good in enumerate(wanted) if good], rng)
        sigmas = copy_like(sigmas_at_levels(self.model.denoiser, levels[: last + 1]), noise)
        x, sigma = self.model.rollout_student(noise, sigmas, task, strength, self.guidance)[-1]
        next_levels = (levels[last] - 1 / self.settings.sampling_steps).clamp(min=0)
        after = copy_like(sigmas_at_levels(self.model.denoiser, next_levels), noise)
        base = (
            self.model.predict_teacher(x, sigma, task.teacher_prompts)[task.rollout_prompt]
            if task.teacher_prompts
            else None
        )
        return ScoredState(
            x,
            sigma,
            after,
            [self.model.conds[task.rollout_prompt]] * len(x),
            task.targets,
            base,
            prompts=(task.rollout_prompt,) * len(x),
        )

    def state(self) -> dict:
        return {"spent": dict(self.model.forward_counts)}

    def load_state(self, state: dict) -> None:
        self.model.forward_counts = dict(state["spent"])


def make_rollout_states(
    model: StudentTeacherModel, tasks: list[PromptTask], settings: LecoScoreSettings, guidance: float
) -> RolloutStates | SingleRolloutStates:
    """The states of prompts, sampled as the settings say."""
    return (SingleRolloutStates if settings.ways == settings.refresh == 1 else RolloutStates)(
        model, tasks, settings, guidance
    )


class NoisedImageStates:
    """States on images of a dataset with noise that is known, so that one step gives the whole image (Direct-Align of
    SRPO, 2025)."""

    def __init__(self, model: StudentTeacherModel, data: EncodedDataset, settings: LecoScoreSettings, batch: int):
        self.model, self.data, self.settings, self.deck = model, data, settings, BucketBatchSampler(data, batch)

    def draw(self, rng) -> ScoredState:
        batch = self.data.make_batch(self.deck.next_batch(rng), rng)
        x0 = self.model.denoiser.model_space(batch.x0)
        low, high = graded_noise_levels(self.settings)
        levels = low + (high - low) * torch.rand(len(x0), generator=rng)
        sigma, after = (
            copy_like(self.model.denoiser.sigma_at(u.clamp(min=0)), x0)
            for u in (levels, levels - 1 / self.settings.sampling_steps)
        )
        noise = cpu_randn_like(x0, rng)
        x = self.model.denoiser.noised(x0, noise, sigma)
        targets = tuple(
            PromptTarget("", (), strength, sign) for strength, sign in signed_strengths(1.0, self.settings.slider)
        )
        base = predict_without_adapters(self.model, x, sigma, batch.conds) if self.settings.anchor else None
        return ScoredState(x, sigma, after, batch.conds, targets, base, noise, tuple(batch.captions))

    def state(self) -> dict:
        return {"deck": self.deck.state(), "spent": dict(self.model.forward_counts)}

    def load_state(self, state: dict) -> None:
        self.deck.load_state(state["deck"])
        self.model.forward_counts = dict(state["spent"])


@torch.no_grad()
def predict_without_adapters(model: StudentTeacherModel, x, sigma, conds) -> Tensor:
    model.forward_counts["frozen"] += len(x)
    with model.adapters.at_strength(0):
        return model.denoiser.denoise(x, sigma, conds)


# -- what is judged ----------------------------------------------------------------------------------------------------


def euler_step(state: ScoredState, x0: Tensor) -> Tensor:
    """The state after an Euler step along the student's prediction."""
    return state.x + slope(state.x, state.sigma, x0) * per_sample(state.next_sigma - state.sigma, state.x)


def next_step_inputs(method, state, x0, rng):
    return [(euler_step(state, x0), state.next_sigma)]


def x0_inputs(method, state, x0, rng):
    return [(x0, torch.zeros_like(state.sigma))]


def renoised_inputs(method, state, x0, rng):
    """The image under fresh noise, nearly as much as the state had: x0 is a blur where there is much, and no score
    model has seen blurs under little noise (fixed levels of 0.1 to 0.5 fooled it: benchmarks/README.md)."""
    s, level = method.settings, sigma_to_level(method.denoiser, state.sigma)
    shares = (
        s.renoise_low + (s.renoise_high - s.renoise_low) * copy_like(torch.rand(len(x0), generator=rng), x0)
        for _ in range(s.draws)
    )
    sigmas = [level_to_sigma(method.denoiser, (share * level).clamp(max=MAX_SCORE_NOISE)) for share in shares]
    return [(method.denoiser.noised(x0, cpu_randn_like(x0, rng), sigma), sigma) for sigma in sigmas]


def direct_align_inputs(method, state, x0, rng):
    """The image that is left when the known noise is taken out of the state after the step: right also where x0 is a
    blur."""
    a, b = noising_coefficients(method.denoiser, state.next_sigma)
    return [
        ((euler_step(state, x0) - per_sample(b, x0) * state.noise) / per_sample(a, x0), torch.zeros_like(state.sigma))
    ]


def draft_lv_inputs(method, state, x0, rng):
    """The image noised again to the last level and denoised again, several times (DRaFT-LV, Clark et al. 2023)."""
    again = [
        method.denoiser.noised(x0.detach(), cpu_randn_like(x0, rng), state.sigma) for _ in range(method.settings.draws)
    ]
    return [(method.predict_student(x, state.sigma, state.conds), torch.zeros_like(state.sigma)) for x in again]


SCORE_INPUTS = {
    "x0_renoised": renoised_inputs,
    "next_step": next_step_inputs,
    "x0": x0_inputs,
    "direct_align": direct_align_inputs,
    "draft_lv": draft_lv_inputs,
}


# -- the method --------------------------------------------------------------------------------------------------------


@dataclass
class LecoScoreTraining:
    """`scores`: score models with their weights. `state_source.draw(rng)` gives the states where a step is graded."""

    model: StudentTeacherModel
    scores: Sequence[tuple[ScorerEnsemble, float]]
    state_source: PointSource[ScoredState]
    settings: LecoScoreSettings = LecoScoreSettings()

    def __post_init__(self):
        check_target_scorers(self.scores, self.settings)
        self.updates = 0
        self.anchor, self.drift = (
            self.model.to_device(torch.tensor(float(self.settings.anchor))),
            self.model.to_device(torch.zeros(())),
        )
        self.bands = self.model.to_device(
            torch.zeros(NOISE_LEVEL_BANDS)
        )  # running size of the score's gradient, 0 where none was seen

    @property
    def denoiser(self):
        return self.model.denoiser

    def parameters(self):
        return list(self.model.adapters.parameters())

    def loss(self, rng):
        """(targets * B,) minus the score, plus the anchor."""
        state = self.state_source.draw(rng)
        self.updates += 1
        return torch.cat([self.target_loss(target, state, rng) for target in state.targets])

    def target_loss(self, target: PromptTarget, state: ScoredState, rng) -> Tensor:
        """`target.weight` is the sign of the score: up, down, or 0 for what is only anchored."""
        with self.model.adapters.at_strength(target.strength):
            x0 = self.predict_student(state.x, state.sigma, state.conds)
            loss = torch.zeros(len(x0), device=x0.device)
            if target.weight:
                reward = self.reward(
                    SCORE_INPUTS[self.settings.target](self, state, x0, rng), target.weight, state.prompts
                )
                loss = loss - self.balance_by_band(reward, x0, state.sigma)
        return loss if state.teacher_x0 is None else loss + self.anchor_loss(state, x0)

    def predict_student(self, x, sigma, conds) -> Tensor:
        """x0 (B, ...) with the adapters at their strength of now, with gradient."""
        self.model.forward_counts["student"] += len(x)
        return self.denoiser.denoise(x, sigma, conds)

    def reward(self, seen, sign: float, words=()) -> Tensor:
        """(B,) what goes up: sign * score - uncertainty * deviation between members, the mean over what is seen, at
        most `cap`."""
        total = sum(weight for _, weight in self.scores)
        means = [
            sum_tensors(weight * self.pessimistic_score(score, x, sigma, sign, words) for score, weight in self.scores)
            / total
            for x, sigma in seen
        ]
        reward = sum_tensors(means) / len(means)
        return reward if not self.settings.cap else self.settings.cap - (self.settings.cap - reward).relu()

    def pessimistic_score(self, score: ScorerEnsemble, x, sigma, sign, words) -> Tensor:
        """(B,) of one score model, pessimistic in either direction."""
        view, level = to_scorer_input(self.denoiser, x, sigma)
        level = torch.zeros_like(level) if self.settings.as_clean else level
        members = (
            self.relative_scores(score, view, level, words)
            if self.settings.relative and is_text_scorer(score)
            else predict_member_scores(score, view, level, words)
        )
        if len(members) == 1 or not self.settings.uncertainty:
            return sign * members.mean(0)
        return sign * members.mean(0) - self.settings.uncertainty * (members.var(0, unbiased=False) + 1e-12).sqrt()

    def relative_scores(self, score, view, level, words) -> Tensor:
        """(M, B) (1 + k) * S(good) - S(bad): what both sides have in common, such as a favourite colour, cancels (SRP
        of SRPO, 2025)."""
        good, bad = good_and_bad_texts(self.settings, words)
        return (1 + self.settings.relative) * score.members_for_prompts(view, level, good) - score.members_for_prompts(
            view, level, bad
        )

    def anchor_loss(self, state: ScoredState, x0) -> Tensor:
        """(B,) anchor * mean square of the change of noise or velocity, and the bookkeeping of the drift."""
        away = per_sample_mse(slope(state.x, state.sigma, x0), slope(state.x, state.sigma, state.teacher_x0))
        loss = self.anchor * away
        self.update_anchor(away.detach().mean().sqrt())
        return loss

    def update_anchor(self, drift: Tensor):
        """Running drift, and every ADJUST updates an anchor that answers to it. On the device: nothing waits for it."""
        self.drift = torch.where(
            self.drift == 0, drift, RUNNING_MEAN_DECAY * self.drift + (1 - RUNNING_MEAN_DECAY) * drift
        )
        if self.settings.adjust and self.updates % ANCHOR_UPDATE_INTERVAL == 0:
            factor = torch.where(
                self.drift > self.settings.drift_high,
                ANCHOR_GROWTH,
                torch.where(self.drift < self.settings.drift_low, 1 / ANCHOR_GROWTH, 1.0),
            )
            self.anchor = (self.anchor * factor).clamp(self.settings.anchor / 100, self.settings.anchor * 1000)

    def balance_by_band(self, reward: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """The reward times a factor per sample that makes its gradient on the network's own output as large in one band
        of noise levels
        as in another: x0 hardly depends on the network where there is little noise left."""
        if not (self.settings.balance and self.settings.target != "draft_lv" and reward.requires_grad):
            return reward
        (gradient,) = torch.autograd.grad(reward.sum(), x0, retain_graph=True)
        size = gradient.flatten(1).norm(dim=1) * self.denoiser.native_scale(sigma)
        band = (sigma_to_level(self.denoiser, sigma) * NOISE_LEVEL_BANDS).long().clamp(0, NOISE_LEVEL_BANDS - 1)
        here = (
            torch.nn.functional.one_hot(band, NOISE_LEVEL_BANDS).to(size) * (size > 0).to(size)[:, None]
        )  # (B, BANDS); a capped reward has no gradient
        count = here.sum(0)
        mean = (here * size[:, None]).sum(0) / count.clamp(min=1)
        self.bands = torch.where(
            count == 0,
            self.bands,
            torch.where(self.bands == 0, mean, RUNNING_MEAN_DECAY * self.bands + (1 - RUNNING_MEAN_DECAY) * mean),
        )
        known = (self.bands > 0).to(size)
        wanted = (self.bands * known).sum() / known.sum().clamp(min=1)
        return reward * (wanted / self.bands.clamp(min=1e-12))[band].clamp(0.1, 10.0)

    def state(self) -> dict:
        numbers = {name: getattr(self, name).detach().cpu().clone() for name in ("anchor", "drift", "bands")}
        return {"places": self.state_source.state(), "updates": self.updates, **numbers}

    def load_state(self, state: dict) -> None:
        self.state_source.load_state(state["places"])
        self.updates = state["updates"]
        for name in ("anchor", "drift", "bands"):
            setattr(self, name, self.model.to_device(state[name].clone()))


def is_text_scorer(score) -> bool:
    """Whether a score model judges an image by a text: `members_for_prompts(x, level, texts)`, and
    `encode_prompts(texts)` beforehand."""
    return hasattr(score, "members_for_prompts")


def predict_member_scores(score, view, level, words) -> Tensor:
    """(M, B) the members' predictions; those that read text and have no `words` of their own compare each image with
    its text."""
    return (
        score.members_for_prompts(view, level, list(words))
        if is_text_scorer(score) and not getattr(score, "words", "")
        else score.member_scores(view, level)
    )


def good_and_bad_texts(settings: LecoScoreSettings, words) -> tuple[list[str], list[str]]:
    """(good, bad) texts for the relative reward."""
    good, bad = settings.good_words.strip(), settings.bad_words.strip()
    return [f"{good}. {text}" for text in words], [f"{bad}. {text}" for text in words]


def list_score_texts(settings: LecoScoreSettings, words) -> list[str]:
    """All that a run will ask of score models that read."""
    return [
        *words,
        *(text for side in (good_and_bad_texts(settings, words) if settings.relative else ()) for text in side),
    ]


def check_target_scorers(scores, settings: LecoScoreSettings) -> None:
    """Raises ValueError for a score model that this target cannot use."""
    if not scores or not sum(weight for _, weight in scores) > 0:
        raise ValueError(
            f"The score models have the weights {', '.join(f'{w:g}' for _, w in scores) or 'of none'}: their sum must "
            "be above 0."
        )
    for score, _ in scores:
        if settings.needs_noise and not score.info.noisy:
            fits = ", ".join(t for t in SCORE_TARGETS if not LecoScoreSettings(target=t).needs_noise)
            raise ValueError(
                f"target is {settings.target!r}, which shows the score model noised latents, and this one was "
                f"trained on clean images only. Train it with 'noisy' on, or choose one of {fits}."
            )
    if settings.relative and not any(is_text_scorer(score) for score, _ in scores):
        raise ValueError(
            f"relative is {settings.relative}, and no score model here ({scores[0][0].info.backbone}) reads text: "
            "good and bad words give the same score. Set relative to 0, or use Prompt Match Score."
        )
