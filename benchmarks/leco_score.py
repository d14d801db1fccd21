"""LECO-score on the toy world, where the true score of an image is known: how much better images really become, and
what it costs them.

    .venv/bin/python benchmarks/leco_score.py                 # everything, about 15 minutes on one quiet core
    .venv/bin/python benchmarks/leco_score.py table           # the recipes beside each other, for colourfulness
    .venv/bin/python benchmarks/leco_score.py red             # a scorer for red: up, down, and as a slider

A latent ResNet learns from drawn images whose ratings are the true score plus the noise of a rater, so it can be
fooled. Gains are in standard deviations of the true score over drawn images; damage is the Frechet distance between
images before and after, in the 24 main directions of drawn images' latents. Prompts and noise of the images that
are judged were not trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

import pack

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-21-leco-score.json"
PARTS = ("table", "red")
RATER = 0.5  # standard deviations of the rater's noise
DRAWN, UNSEEN = 900, 200  # images the scorer learns from, and is measured on
JUDGED = 96  # images before and after
DIRECTIONS = 24
RUN = dict(steps=120, learning_rate=1e-3, batch=4, seed=1, save_every=0)
RANK = 8


# -- true scores: images (B, H, W, 3) in 0..1 -> (B,) ----------------------------------------------------------------


def redness(images):
    """How much redder than green and blue, the mean over the image."""
    r, g, b = images.clamp(0, 1).unbind(-1)
    return (r - (g + b) / 2).mean((1, 2))


def colourfulness(images):
    """Hasler and Suesstrunk 2003."""
    r, g, b = images.clamp(0, 1).flatten(1, 2).unbind(-1)
    rg, yb = r - g, (r + g) / 2 - b
    spread = (rg.var(1) + yb.var(1)).sqrt()
    return spread + 0.3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt()


TRUE = {"redness": redness, "colourfulness": colourfulness}


# -- what is drawn, and a scorer that learnt from it -------------------------------------------------------------------


@dataclasses.dataclass
class Drawn:
    """Images drawn by hand, as the model sees them."""

    images: object  # (N, H, W, 3)
    x0: object  # (N, C, h, w)


def drawings(toy, denoiser, count, seed):
    import torch
    from trainyard.tests.toy import shapes
    from trainyard.tests.toy.measure import levels

    rng = torch.Generator().manual_seed(seed)
    images = torch.stack([torch.from_numpy(levels(shapes.sample(rng)[0])) / 255 for _ in range(count)])
    with torch.no_grad():
        x0 = torch.cat([denoiser.model_space(toy.vae.encode(part).clone()) for part in images.split(64)])
    return Drawn(images, x0)


def scorer(denoiser, drawn, true, noisy, seed=0, members=3, steps=500, batch=32):
    """A ScoreModel of as many networks as Train Score Model makes by default, each trained on noisy ratings of all but
    its share of images."""
    import torch
    from trainyard.trainers.scores.networks import (
        LatentResNet,
        ScoreModelInfo,
        Scorer,
        ScorerEnsemble,
        call_with_seed,
        level_to_sigma,
        to_scorer_input,
    )

    channels = drawn.x0.shape[1]
    rng = torch.Generator().manual_seed(seed)
    truth = true(drawn.images)
    ratings = (truth - truth.mean()) / truth.std()
    ratings = ratings + RATER * torch.randn(ratings.shape, generator=rng)
    networks = []
    for member in range(members):
        network = call_with_seed(seed * 10 + member, lambda: Scorer(LatentResNet(channels, 24, 1), 1))
        learnt_from = (
            torch.arange(len(ratings))[torch.arange(len(ratings)) % members != member]
            if members > 1
            else torch.arange(len(ratings))
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            pick = learnt_from[torch.randint(len(learnt_from), (batch,), generator=rng)]
            level = torch.rand(batch, generator=rng) * 0.98 * (torch.rand(batch, generator=rng) < 0.5) * noisy
            sigma = level_to_sigma(denoiser, level)
            x = denoiser.noised(drawn.x0[pick], torch.randn(drawn.x0[pick].shape, generator=rng), sigma)
            loss = (network(*to_scorer_input(denoiser, x, sigma))[:, 0] - ratings[pick]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(), rate.step()
        networks.append(network.eval().requires_grad_(False))
    return ScorerEnsemble(networks, ScoreModelInfo(channels=channels, width=24, depth=1, noisy=bool(noisy)))


def agreement(denoiser, score, drawn, true) -> dict:
    """Spearman's correlation with the true score on images that the scorer never saw, clean and noised."""
    import torch
    from trainyard.trainers.monitor.strength_curve import spearman_correlation
    from trainyard.trainers.scores.networks import level_to_sigma, to_scorer_input

    found, rng = {}, torch.Generator().manual_seed(9)
    for level in (0.0, 0.3, 0.6, 0.9):
        sigma = level_to_sigma(denoiser, torch.full((len(drawn.x0),), level))
        x = denoiser.noised(drawn.x0, torch.randn(drawn.x0.shape, generator=rng), sigma)
        with torch.no_grad():
            said = score.mean_score(*to_scorer_input(denoiser, x, sigma))
        found[f"level {level:g}"] = round(spearman_correlation(true(drawn.images).tolist(), said.tolist()), 3)
    return found


# -- judging -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Judge:
    """Draws the same images before and after, and says what has changed."""

    toy: object
    model: object  # points.Model
    true: object
    scores: list
    drawn: Drawn
    preview_prompts: list

    def __post_init__(self):
        import torch

        flat = self.drawn.x0.flatten(1)
        self.centre = flat.mean(0)
        self.axes = torch.linalg.svd(flat - self.centre, full_matrices=False).Vh[:DIRECTIONS]
        self.unit = float(self.true(self.drawn.images).std())
        known = vars(self.toy).setdefault("drawn_by_the_base_for_scores", [])
        known += [] if known else [self.draw(0.0)]
        (self.before,) = known

    def draw(self, strength, first_seed=700_000):
        import torch
        from trainyard.tests.toy import sampling
        from trainyard.trainers.monitor.strength_curve import sample_from_noise

        parts = []
        for number, scene in enumerate(self.preview_prompts):
            each = JUDGED // len(self.preview_prompts)
            noise = sampling.noise([first_seed + number * each + i for i in range(each)])
            parts.append(sample_from_noise(self.model, scene, "", noise, strength, 8, 2.0))
        return torch.cat(parts)

    def images(self, x0):
        import torch

        with torch.no_grad():
            latent = self.toy.model.model.process_latent_out(x0)
            return torch.cat([self.toy.vae.decode(part) for part in latent.split(64)]).clone()

    def frechet(self, a, b) -> float:
        import numpy as np
        from scipy.linalg import sqrtm

        a, b = (((x.flatten(1) - self.centre) @ self.axes.T).double().numpy() for x in (a, b))
        ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb))))

    def verdict(self, strength=1.0) -> dict:
        from trainyard.trainers.monitor.score_monitor import mean_distance, score_latents
        from trainyard.trainers.monitor.strength_curve import relative_drift

        after = self.draw(strength)
        gain = lambda of: float(of(after).mean() - of(self.before).mean())
        each = JUDGED // len(self.preview_prompts)
        within = [sum(mean_distance(part) for part in side.split(each)) for side in (self.before, after)]
        return {
            "true gain": round(gain(lambda x: self.true(self.images(x)) / self.unit), 3),
            "gain as the scorer says": round(gain(lambda x: score_latents(self.model.denoiser, self.scores, x)), 3),
            "frechet": round(self.frechet(self.before, after), 3),
            "drift": round(relative_drift([(self.before, after)]), 3),
            "diversity": round(within[1] / within[0], 3),
        }


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipes():
    from trainyard.trainers.methods.leco_score import ORIGINAL_LECO_SCORE, LecoScoreSettings

    free = dict(anchor=0.0, adjust=False)
    return {
        "original": ORIGINAL_LECO_SCORE,
        "next_step, anchored": LecoScoreSettings(target="next_step"),
        "x0_renoised, anchored (default)": LecoScoreSettings(),
        "x0, anchored": LecoScoreSettings(target="x0"),
        "draft_lv, anchored": LecoScoreSettings(target="draft_lv"),
        "direct_align, anchored": LecoScoreSettings(target="direct_align"),
        "next_step, no anchor": LecoScoreSettings(target="next_step", **free),
        "x0_renoised, no anchor": LecoScoreSettings(**free),
        "x0, no anchor": LecoScoreSettings(target="x0", **free),
        "draft_lv, no anchor": LecoScoreSettings(target="draft_lv", **free),
        "direct_align, no anchor": LecoScoreSettings(target="direct_align", **free),
    }


def scenes(kind):
    """Prompts that name no colour: those that are trained on name no size, those that are judged do."""
    from trainyard.tests.toy import shapes

    if kind == "trained":
        return [shapes.caption(shape, ground=ground) for shape in shapes.SEEN for ground in shapes.GROUNDS]
    return [shapes.caption(shape, size=size) for shape in shapes.SEEN for size in shapes.SIZES]


def learnt(toy, drawn, true, settings, scores, rows, look, **run):
    """look(judge) of a trained recipe, with its cost."""
    from trainyard.nodes import host
    from trainyard.tests.toy.differences import LATENT
    from trainyard.trainers.data.encoded import EncodedDataset
    from trainyard.trainers.loop import train
    from trainyard.trainers.methods.leco_score import (
        LecoScoreTraining,
        NoisedImageStates,
        build_score_tasks,
        make_rollout_states,
    )
    from trainyard.trainers.methods.rollouts import StudentTeacherModel
    from trainyard.trainers.settings import AdapterSettings, OptimizerSettings, RunSettings

    texts = list(dict.fromkeys(["", *(row.prompt for row in rows), *scenes("judged")]))
    conds = dict(zip(texts, host.encoders.TextEncoder(toy.clip).encode(texts), strict=True))
    run = RunSettings(**{**RUN, **run})
    with host.session.open_training_session(toy.model, AdapterSettings(rank=RANK), seed=run.seed) as session:
        model = StudentTeacherModel(session.denoiser, session.adapters, conds)
        judge = Judge(toy, model, true, scores, drawn, scenes("judged"))
        start = time.process_time()
        if settings.target == "direct_align":
            latent = toy.model.model.process_latent_out(drawn.x0[:300]).clone()
            data = EncodedDataset.from_core(
                [{"samples": latent}],
                [[[conds[""]["cross_attn"], {k: v for k, v in conds[""].items() if k != "cross_attn"}]]],
            )
            places = NoisedImageStates(model, data, settings, run.batch)
        else:
            places = make_rollout_states(model, build_score_tasks(rows, [LATENT], run.batch, settings), settings, 2.0)
        method = LecoScoreTraining(model, scores, places, settings)
        train(method, run, OptimizerSettings())
        cost = {"seconds of one core": round(time.process_time() - start, 1), "forwards per "
                                                                              "update": round(sum(model.forward_counts.values()) / run.steps, 1),
                "anchor at the end": round(float(method.anchor), 3), "step drift at the "
                                                                     "end": round(float(method.drift), 3)}  # fmt: skip
        return {**look(judge), **cost}


def prepared(toy):
    """(denoiser, images to learn from, images to be measured on)."""
    from trainyard.nodes import host
    from trainyard.nodes.scores import latents

    denoiser = latents.NoiseSchedule(toy.model)
    with host.context.enable_gradients():
        return denoiser, drawings(toy, denoiser, DRAWN, 1), drawings(toy, denoiser, UNSEEN, 2)


def table(toy, kept, only=(), **run):
    """Each recipe's row, given to kept() as soon as it is there."""
    from trainyard.nodes import host
    from trainyard.trainers.data.signed_prompts import SignedPrompt

    denoiser, drawn, unseen = prepared(toy)
    true = TRUE["colourfulness"]
    with host.context.enable_gradients():
        known = {noisy: scorer(denoiser, drawn, true, noisy) for noisy in (True, False)}
        found = {
            "scorers, SRCC with the true score": {
                ("noise-conditioned" if n else "clean only"): agreement(denoiser, s, unseen, true)
                for n, s in known.items()
            }
        }
    shown("scorers", found["scorers, SRCC with the true score"])
    settled = {**RUN, **run, "rank": RANK, "rater noise": RATER}
    kept({**found, "settings": settled})
    rows = [SignedPrompt(scene) for scene in scenes("trained")]
    for name, settings in recipes().items():
        if only and name not in only:
            continue
        scores = [(known[name != "original"], 1.0)]
        look = lambda judge: {f"strength {s:g}": judge.verdict(s) for s in (0.5, 1.0)}
        row = learnt(toy, drawn, true, settings, scores, rows, look, **run)
        shown(name, row)
        kept({name: row})


def red(toy, kept, only=(), **run):
    """Share of images whose shape is red, and redness, with the score going up, going down, and with the slider at
    several strengths."""
    from trainyard.nodes import host
    from trainyard.tests.toy.measure import measure
    from trainyard.trainers.data.signed_prompts import SignedPrompt
    from trainyard.trainers.methods.leco_score import LecoScoreSettings

    denoiser, drawn, unseen = prepared(toy)
    true = TRUE["redness"]
    with host.context.enable_gradients():
        score = scorer(denoiser, drawn, true, True)
        kept(
            {
                "scorer, SRCC with the true score": agreement(denoiser, score, unseen, true),
                "settings": {**RUN, **run, "rank": RANK, "rater noise": RATER},
            }
        )

    def looked(judge, strength):
        images = judge.images(judge.draw(strength))
        seen = [measure(image) for image in images]
        return {"red": round(sum(s.colour == "red" for s in seen) / len(seen), 3), "redness": round(float(true(images).mean() / judge.unit), 3),
                "a shape that can be named": round(sum(s.shape != "other" for s in seen) / len(seen), 3)}  # fmt: skip

    for name, weight, settings, strengths in (
        ("up", 1.0, LecoScoreSettings(), (0.0, 1.0)),
        ("down", -1.0, LecoScoreSettings(), (0.0, 1.0)),
        ("slider", 1.0, LecoScoreSettings(slider=True), (-1.0, -0.5, 0.0, 0.5, 1.0)),
    ):
        if only and name not in only:
            continue
        rows = [SignedPrompt(scene, weight) for scene in scenes("trained")]
        look = lambda judge, strengths=strengths: {f"strength {s:g}": looked(judge, s) for s in strengths}
        row = learnt(toy, drawn, true, settings, [(score, 1.0)], rows, look, **run)
        shown(name, row)
        kept({name: row})


# -- on the screen and in the file -------------------------------------------------------------------------------------


def shown(name, found):
    print(f"\n{name}")
    for key, value in found.items():
        print(f"  {key}: {value}")
    sys.stdout.flush()


def keep(path, kind, found):
    """Rows that were not run again stay."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = {**before, kind: {**before.get(kind, {}), **found}}
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--only", nargs="*", default=(), help="rows: recipes of the table, up, down or slider")
    parser.add_argument("--steps", type=int, default=RUN["steps"])
    parser.add_argument("--rate", type=float, default=RUN["learning_rate"])
    parser.add_argument("--seed", type=int, default=RUN["seed"])
    parser.add_argument(
        "--json", type=pathlib.Path, default=RESULTS, help="where figures are kept (default: %(default)s)"
    )
    asked = parser.parse_args()
    if unknown := [part for part in asked.parts if part not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    pack.boot()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run = dict(steps=asked.steps, learning_rate=asked.rate, seed=asked.seed)
    seed = f", seed {asked.seed}" if asked.seed != RUN["seed"] else ""
    with torch.inference_mode():
        toy = pack.toy_world()
        for part in asked.parts or PARTS:
            found = table if part == "table" else red
            found(toy, lambda rows, part=part: keep(asked.json, part + seed, rows), asked.only, **run)


if __name__ == "__main__":
    main()
