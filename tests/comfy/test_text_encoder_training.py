"""Training the text encoder too: what it reads, and that both models stay where they are while they are trained."""

import dataclasses
import types

import comfy.model_management as mm
import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.train.previews import PreviewRenderer, SamplePrompt
from trainyard.nodes.train.prior import encode_class_prompts
from trainyard.nodes.train.train_lora import LoraTask
from trainyard.nodes.train.validation import MonitorConfig
from trainyard.tests.comfy.test_train_lora import data, job, result
from trainyard.tests.fakes_data import captioned
from trainyard.tests.toy import lesson, sampling, world
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.encode import encode_dataset
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.monitor.previews import PreviewSettings
from trainyard.trainers.monitor.validation import ValidationSettings
from trainyard.trainers.settings import AdapterSettings

BOTH = AdapterSettings(rank=2, targets="attention", text_encoder=True)
SMALL = dict(preview_every=2, sampling_steps=1, width=64, height=64, guidance=2.0)


@pytest.fixture(scope="module")
def toy(comfy):
    with torch.inference_mode():
        return sampling.load(world.cached())


def encode_images(toy, root, *captions, **settings):
    captioned(root / "in", len(captions), (64, 64))
    for i, caption in enumerate(captions):
        (root / "in" / f"{i}.txt").write_text(caption, encoding="utf-8")
    doors = host.encoders.VaeEncoder(toy.vae), host.encoders.TextEncoder(toy.clip)
    with torch.inference_mode(), host.context.enable_gradients():
        return encode_dataset(
            read_folder(root / "in"),
            CaptionSettings(**settings),
            BucketSettings(**lesson.ENCODE),
            False,
            *doors,
            root / "cache",
        )


def text_job(toy, encoded, monitoring=None, **run):
    return dataclasses.replace(
        job("sd3", toy.model, encoded, **{"batch": 1, "steps": 2, **run}),
        task=LoraTask(data=encoded),
        clip=toy.clip,
        adapter=BOTH,
        monitoring=monitoring,
    )


@pytest.fixture
def loads(monkeypatch):
    """The models of each call of load_models_gpu."""
    called, load = [], mm.load_models_gpu
    monkeypatch.setattr(
        mm,
        "load_models_gpu",
        lambda models, *args, **kwargs: called.append(list(models)) or load(models, *args, **kwargs),
    )
    return called


def batch_of(*captions):
    return types.SimpleNamespace(captions=list(captions), conds=[{} for _ in captions])


def test_both_models_are_loaded_together_once_and_no_step_loads_anything(toy, loads):
    with torch.inference_mode(), host.session.open_training_session(toy.model, BOTH, clip=toy.clip) as session:
        together = [set(map(id, models)) for models in loads]
        assert {id(session.denoiser.patcher), id(session.text_patcher)} == together[-1]
        count = len(loads)
        for _ in range(3):
            conds = session.encode_captions(batch_of("a red star", "a blue circle"))
            x = torch.randn(2, 16, 8, 8)
            session.denoiser.denoise(x, session.denoiser.sigma_at(torch.tensor([0.5, 0.5])), conds).mean().backward()
        assert len(loads) == count, "a step loaded a model"
        assert any(p.grad is not None for p in session.text_adapters.parameters())


def test_other_clips_of_the_same_weights_are_loaded_as_ever_afterwards(toy, loads):
    with torch.inference_mode(), host.session.open_training_session(toy.model, BOTH, clip=toy.clip):
        pass
    count = len(loads)
    with torch.inference_mode():
        host.encoders.encode_caption(toy.clip, "a red star")
    assert len(loads) == count + 1


def test_after_samples_both_models_are_loaded_together_again(toy, loads, tmp_path):
    """a VAE that pushes everything out, as a large one does"""

    class Vae:
        def decode(self, latent):
            mm.unload_all_models()
            return latent[:, :3].movedim(1, -1)

    with torch.inference_mode(), host.session.open_training_session(toy.model, BOTH, clip=toy.clip) as session:
        batch = batch_of("a red star")
        (before,) = session.encode_captions(batch)
        (cond,) = host.context.clone_inference_tensors(session.encode_captions(batch))
        shown = [SamplePrompt("a red star", cond, caption="a red star")]
        avoided = SamplePrompt("", cond, caption="")
        renderer = PreviewRenderer(session, PreviewSettings(**SMALL), shown, avoided, (16, 8, 8), tmp_path, vae=Vae())
        renderer.render_images(1.0)
        assert {id(session.denoiser.patcher), id(session.text_patcher)} == set(map(id, loads[-1]))
        (after,) = session.encode_captions(batch)
        after["cross_attn"].mean().backward()
    assert torch.equal(before["cross_attn"], after["cross_attn"])


def test_captions_are_literal_and_typed_prompts_are_prompts_while_the_text_encoder_is_trained(toy):
    literal = host.encoders.encode_prompt(toy.clip, r"a \(red:1.6\) star")["cross_attn"]
    weighed = host.encoders.encode_prompt(toy.clip, "a (red:1.6) star")["cross_attn"]
    with torch.inference_mode(), host.session.open_training_session(toy.model, BOTH, clip=toy.clip) as session:
        spelled = session.encode_captions(batch_of("a (red:1.6) star", r"a \(red:1.6\) star"))
        typed = session.encode_prompt("a (red:1.6) star")["cross_attn"].detach()
        spelled = [cond["cross_attn"].detach() for cond in spelled]
    for cond in spelled:
        assert torch.allclose(cond, literal, atol=1e-5)
    assert torch.allclose(typed, weighed, atol=1e-5) and not torch.allclose(weighed, literal, atol=1e-2)


def test_samples_show_captions_literally_prompts_with_weights_and_own_conditionings_as_they_are(
    toy, folders, tmp_path, monkeypatch
):
    """what is encoded again at each sheet: the label of a conditioning that the user brought is no text"""
    encoded, once = encode_images(toy, tmp_path, "a (red) star", trigger="sks"), {"steps": 1}
    own = [[torch.zeros(1, 77, 4096), {"pooled_output": torch.zeros(1, 2048)}]]
    asked, sampled = [], []
    refresh, draw = PreviewRenderer.refresh_conditioning, host.sampling.sample_latents
    monkeypatch.setattr(
        PreviewRenderer, "refresh_conditioning", lambda self, shown: asked.append(shown) or refresh(self, shown)
    )
    monkeypatch.setattr(
        host.sampling, "sample_latents", lambda *args, **how: sampled.append(args[1][0][0]) or draw(*args, **how)
    )
    off = ValidationSettings(every=0)
    settings = PreviewSettings(**{**SMALL, "prompts": "a ([trigger]:1.5) star", "negative_prompt": "(bad)"})
    look = MonitorConfig(off, settings, clip=toy.clip, positive=own)
    result(text_job(toy, encoded, look, **once))
    by_label = {shown.label: shown for shown in asked}
    assert by_label["a (sks:1.5) star"].prompt == "a (sks:1.5) star" and by_label["(bad)"].prompt == "(bad)"
    assert by_label["positive 1"][2:] == (None, None, None)
    assert torch.equal(sampled[1], own[0][0]), "encoded as its label"
    asked.clear()
    result(text_job(toy, encoded, MonitorConfig(off, PreviewSettings(**SMALL)), name="captions", **once))
    assert {(shown.label, shown.caption, shown.prompt) for shown in asked} == {
        ("sks, a (red) star", "sks, a (red) star", None),
        ("", "", None),
    }


def test_a_text_encoder_is_not_trained_on_conditionings_that_have_no_captions(toy):
    with pytest.raises(ValueError, match="without the captions that a text encoder is trained with. Connect encoded"):
        text_job(toy, data()).check()


def test_class_prompts_are_read_as_the_captions_that_they_stand_beside(toy):
    conds, identity = encode_class_prompts(toy.clip, ["a photo of miku (vocaloid)"])
    wanted = host.encoders.encode_prompt(toy.clip, r"a photo of miku \(vocaloid\)")["cross_attn"]
    assert torch.equal(conds["a photo of miku (vocaloid)"]["cross_attn"], wanted)
    plain, plain_identity = encode_class_prompts(toy.clip, ["a photo of a singer"])
    assert identity != plain_identity == host.encoders.TextEncoder(toy.clip).identity


def test_prompts_of_samples_with_a_placeholder_or_of_whole_books_are_refused_before_the_run(toy, tmp_path):
    off = ValidationSettings(every=0)
    ask = lambda encoded, **more: text_job(
        toy, encoded, MonitorConfig(off, PreviewSettings(**SMALL, **more), clip=toy.clip)
    ).check()
    encoded = encode_images(toy, tmp_path, "a red star")
    with pytest.raises(ValueError, match=r"prompts of Validation and Previews say \[trigger\], and this run has no"):
        ask(encoded, prompts="a [trigger] star")
    with pytest.raises(ValueError, match=r"The prompt 'word word .*…' is too long: 5000 words, 5000 tokens in g \(67"):
        ask(encoded, prompts="word " * 5000)
    ask(encoded, prompts="a red star")
    named = encode_images(toy, tmp_path / "named", "a red star", trigger="sks")
    ask(named, prompts="a [trigger] star")
