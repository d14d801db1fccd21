"""Prior preservation by hand: the frozen model as teacher, class images beside the subject's, and what a run depends
on."""

import pytest
import torch
from trainyard.tests.unit.toy import Denoiser, Net, adapters, dataset, prompts, rng
from trainyard.trainers.loop import step_rng, train
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.methods.prior import PriorData, PriorSettings
from trainyard.trainers.settings import RunSettings, compute_fingerprint

CONDS = {name: prompts()[name] for name in ("cat", "dog")}


def settings(**values):
    return PriorSettings(**{"class_prompt": "cat\ndog", **values})


def method(prior=None, batch=2, seed=0, data=None):
    network = Net()
    return LoraTraining(Denoiser(network), adapters(network, seed), data or dataset(), batch=batch, prior=prior)


def shaken(made, size=0.3):
    draw = rng(4)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * size)
    return made


# -- the class prompts -------------------------------------------------------------------------------------------------


def test_class_prompts_are_lines_and_wildcards_each_once():
    asked = "a {red|blue} dog\n\n  a cat \na red dog"
    assert PriorSettings(class_prompt=asked).class_prompts() == ["a red dog", "a blue dog", "a cat"]


def test_too_many_class_prompts_are_refused_with_their_number():
    lines = "\n".join(f"dog {i}" for i in range(65))
    with pytest.raises(ValueError, match="class_prompt stands for 65 prompts and 64 is the most"):
        PriorSettings(class_prompt=lines).class_prompts()


def test_a_prior_of_nothing_is_refused_with_both_ways():
    with pytest.raises(ValueError, match="nothing to preserve. Write a class_prompt .* or connect class images"):
        PriorData(PriorSettings())


# -- the frozen model as teacher ---------------------------------------------------------------------------------------


def test_adapters_that_changed_nothing_have_nothing_to_preserve():
    with_prior, without = (method(PriorData(settings(), CONDS)), method())
    assert torch.equal(with_prior.loss(step_rng(0, 0)), without.loss(step_rng(0, 0)))


def test_what_is_preserved_adds_weight_times_the_drift_to_every_sample():
    """By hand: the mean square of (student - teacher) / sigma under the drawn prompts, at the step's own x."""
    losses = {w: shaken(method(PriorData(settings(weight=w), CONDS))).loss(step_rng(0, 0)) for w in (0.0, 1.0, 3.0)}
    drift = losses[1.0] - losses[0.0]
    assert drift[0].item() == pytest.approx(drift[1].item(), rel=1e-4) and drift[0] > 0
    assert torch.allclose(losses[3.0] - losses[0.0], 3 * drift, rtol=1e-4)
    made = shaken(method(PriorData(settings(), CONDS)))
    batch_rng = step_rng(0, 0)
    _, x, sigma = made.denoise_batch(made.data.make_batch(made.deck.next_batch(batch_rng), batch_rng), batch_rng)
    told = [CONDS[list(CONDS)[i]] for i in torch.randint(2, (2,), generator=batch_rng).tolist()]
    with torch.no_grad(), made.adapters.at_strength(0):
        teacher = made.denoiser.denoise(x, sigma, told)
    by_hand = ((made.denoiser.denoise(x, sigma, told) - teacher) / sigma.view(-1, 1, 1, 1)).square().mean()
    assert drift[0].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_the_part_that_learns_is_the_same_with_and_without():
    first = shaken(method()).loss(step_rng(0, 0))
    second = shaken(method(PriorData(settings(weight=0.0), CONDS))).loss(step_rng(0, 0))
    assert torch.equal(first, second)


def test_only_the_student_gets_a_gradient_and_the_strength_comes_back():
    made = shaken(method(PriorData(settings(), CONDS)))
    made.loss(step_rng(0, 0)).mean().backward()
    assert all(p.grad is not None for p in made.adapters.parameters()) and made.adapters.strength == 1.0


def drift_after(prior, steps=150):
    made = method(prior, data=dataset(2))
    train(made, RunSettings(steps=steps, learning_rate=0.01, batch=2))
    draw = rng(99)
    x, sigma = torch.randn(8, 2, 4, 4, generator=draw), torch.rand(8, generator=draw) * 0.9 + 0.05
    cond = [CONDS["cat"]] * 8
    with torch.no_grad():
        with made.adapters.at_strength(0):
            frozen = made.denoiser.denoise(x, sigma, cond)
        return (made.denoiser.denoise(x, sigma, cond) - frozen).square().mean().item()


def test_a_preserved_prompt_drifts_less():
    without, kept = drift_after(None), drift_after(PriorData(settings(weight=5.0), CONDS))
    assert kept < 0.5 * without, f"{without:.4f} -> {kept:.4f}"


# -- class images ------------------------------------------------------------------------------------------------------


def test_class_images_are_learnt_beside_the_subject():
    """loss = subject's + 2 * mean(class images'), each noised by the same step's chance, one after the other."""
    images = dataset(3, seed=9)
    made = method(PriorData(PriorSettings(weight=2.0), data=images))
    found = made.loss(step_rng(0, 0))
    other = method(PriorData(PriorSettings(weight=2.0), data=images))
    chance = step_rng(0, 0)
    subject = other.denoise_batch(other.data.make_batch(other.deck.next_batch(chance), chance), chance)[0]
    kept = other.denoise_batch(images.make_batch(other.prior_loss.deck.next_batch(chance), chance), chance)[0]
    assert torch.allclose(found, subject + 2 * kept.mean())


def test_a_resumed_run_draws_the_same_class_images():
    def run(parts):
        state, losses = None, []
        for steps in parts:
            made = method(PriorData(settings(), CONDS, dataset(5, seed=9)))
            if state is not None:
                made.load_state(state)
            losses += [made.loss(step_rng(0, step)).sum().item() for step in steps]
            state = made.state()
        return losses

    assert run([range(9)]) == run([range(4), range(4, 9)])


def test_a_state_without_a_prior_is_that_of_before():
    assert set(method().state()) == {"seed", "position", "epoch", "batches"}


def test_everything_that_changes_the_result_is_part_of_the_run():
    found = [
        compute_fingerprint(*prior.fingerprint_parts())
        for prior in (PriorData(settings(), CONDS, encoder_identity="a"), PriorData(settings(weight=2.0), CONDS, encoder_identity="a"), PriorData(settings(), CONDS, encoder_identity="b"),
                      PriorData(settings(), CONDS, dataset(), "a"), PriorData(settings(class_prompt="cat"), CONDS, encoder_identity="a"))
    ]  # fmt: skip
    assert len(set(found)) == 5


def test_a_class_prompt_with_the_triggers_placeholder_is_refused():
    with pytest.raises(ValueError, match=r"class_prompt says \[trigger\]"):
        PriorSettings(class_prompt="a photo of [trigger]").class_prompts()
