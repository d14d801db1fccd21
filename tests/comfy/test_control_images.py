"""Edit models see control images while they are trained as the host shows them when it samples."""

import dataclasses
import types

import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.train.previews import SamplePrompt, show_images, to_comfy_conditioning
from trainyard.nodes.train.train_lora import LoraTask, check_references
from trainyard.nodes.train.validation import MonitorConfig
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import SD1, TABLE, Family, cond, latent_shape, make
from trainyard.tests.comfy.test_host import RANK_4
from trainyard.tests.fakes_data import encoded, image
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.cache import MemoryStore
from trainyard.trainers.data.encoded import REFERENCE_LATENTS, EncodedDataset, EncodedItem
from trainyard.trainers.monitor.previews import PreviewSettings

IP2P = Family(
    "SD15_instructpix2pix", SD1 | {"in_channels": 8}, 64, latent=(4, 16, 16),
    overrides={"num_heads": 2, "num_head_channels": -1},
)  # fmt: skip
EDIT_FAMILIES = ("flux", "qwen", "ip2p")


@pytest.fixture(autouse=True)
def ip2p(monkeypatch):
    monkeypatch.setitem(TABLE, "ip2p", IP2P)


def edit_cond(family, seed, sides=(16, 16)):
    ((cross, extras),) = cond(family, seed)
    shape = (*latent_shape(family)[:-2], *sides)
    reference = torch.randn(shape, generator=torch.Generator().manual_seed(10 + seed))
    return {"cross_attn": cross, **extras, REFERENCE_LATENTS: [reference]}


def hosts_own(session, known, x, sigma):
    """x0 as the host's sampler predicts it under one conditioning at guidance 1."""
    denoiser = session.denoiser
    extras = {**known} if denoiser.family.guidance is None else {"guidance": denoiser.family.guidance, **known}
    shown = comfy.sampler_helpers.convert_cond(to_comfy_conditioning(denoiser.model, extras))
    zero = torch.zeros_like(x)
    done = comfy.samplers.process_conds(denoiser.model, x, {"positive": shown}, x.device, zero, None, 0)
    options = {"transformer_options": denoiser._make_transformer_options()}
    return comfy.samplers.calc_cond_batch(denoiser.model, [done["positive"]], x, sigma, options)[0]


@pytest.mark.parametrize("family", EDIT_FAMILIES)
def test_a_step_predicts_what_the_hosts_sampler_predicts(family):
    with torch.inference_mode(), host.session.open_training_session(make(family), RANK_4) as session, torch.no_grad():
        known = edit_cond(family, 1)
        x = session.denoiser.model_space(torch.randn(latent_shape(family), generator=torch.Generator().manual_seed(2)))
        sigma = session.denoiser.sigma_at(torch.tensor([0.6])).to(x)
        ours = session.denoiser.denoise(x, sigma, [known])
        plain = {name: value for name, value in known.items() if name != REFERENCE_LATENTS}
        assert torch.allclose(ours, hosts_own(session, known, x, sigma), atol=1e-5)
        assert (ours - session.denoiser.denoise(x, sigma, [plain])).abs().max() > 1e-3


@pytest.mark.parametrize("family", EDIT_FAMILIES)
def test_control_images_of_two_sizes_go_in_one_batch_and_gradients_are_right(family):
    with torch.inference_mode(), host.session.open_training_session(make(family), RANK_4) as session:
        conds = [edit_cond(family, 1), edit_cond(family, 2, (8, 24))]
        x0 = session.denoiser.model_space(torch.randn(latent_shape(family, 2)))
        sigma = session.denoiser.sigma_at(torch.tensor([0.6, 0.3])).to(x0)
        with torch.no_grad():
            both = session.denoiser.denoise(x0, sigma, conds)
            alone = [session.denoiser.denoise(x0[i : i + 1], sigma[i : i + 1], conds[i : i + 1]) for i in range(2)]
        assert torch.allclose(both, torch.cat(alone), atol=1e-5)
        shown = sum(cond[REFERENCE_LATENTS][0].numel() for cond in conds)
        assert session.denoiser.max_batch_numel == x0.numel() + shown, "the forecast of memory knows them"
        assert host.checks.check_gradients(session, x0, conds) < 1e-3


def dataset_with_controls(family):
    ((cross, extras),) = cond(family, 1)
    shape = latent_shape(family)[1:]
    posterior = {"mean": torch.zeros(shape), "std": None}
    store = MemoryStore({"latent": posterior, "control": posterior, "cond": {"cross_attn": cross, **extras}})
    items = [
        EncodedItem("0", "plain.png", "latent", shape, ("cond",), ("a",)),
        EncodedItem("1", "edited.png", "latent", shape, ("cond",), ("a",), controls=("control",)),
    ]
    return EncodedDataset(items, store, shape[0], "one")


@pytest.mark.parametrize("family", EDIT_FAMILIES)
def test_edit_models_take_control_images(family):
    check_references(make(family), dataset_with_controls(family))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_a_model_that_would_not_look_at_them_is_refused(family):
    with pytest.raises(ValueError, match=f"{TABLE[family].supported} takes none"):
        check_references(make(family), dataset_with_controls(family))


def test_samples_of_prompts_are_edits_of_the_datasets_control_images(tmp_path):
    for number in range(2):
        image(tmp_path / "in" / f"{number}.png", seed=number)
        image(tmp_path / "in" / f"{number}.control.png", seed=9 + number)
        (tmp_path / "in" / f"{number}.txt").write_text("make it red")
    data = encoded(tmp_path, buckets=BucketSettings(resolution=16, step=8))
    own = torch.ones(1)
    prompts = [SamplePrompt("a", {}), SamplePrompt("b", {REFERENCE_LATENTS: [own]}), SamplePrompt("c", {})]
    shown = [prompt.cond[REFERENCE_LATENTS][0] for prompt in show_images(prompts, data, make("flux").model)]
    controls = [data.load_controls(item)[REFERENCE_LATENTS][0] for item in data.items]
    assert torch.equal(shown[0], controls[0]) and shown[1] is own and torch.equal(shown[2], controls[0])


# -- read by the text encoder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen_image_clip():
    """ComfyUI's real text encoder of Qwen-Image: loader, tokenizer and vision tower, with every width small."""
    import comfy.ops
    import comfy.sd
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.qwen_vl as qwen_vl

    @dataclasses.dataclass
    class Small(llama.Qwen25_7BVLI_Config):
        hidden_size: int = 128
        intermediate_size: int = 64
        num_hidden_layers: int = 2
        num_attention_heads: int = 1
        num_key_value_heads: int = 1

    class SmallEyes(qwen_vl.Qwen2VLVisionTransformer):
        def __init__(self, **about):
            super().__init__(**{**about, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_layers": 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "Qwen25_7BVLI_Config", Small)
        patch.setattr(qwen_vl, "Qwen2VLVisionTransformer", SmallEyes)
        patch.setattr(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.QWEN25_7B)  # told by width otherwise
        shape = llama.Qwen25_7BVLI({}, torch.float32, "meta", comfy.ops.disable_weight_init)
        weights = tiny.weights(shape, 3, torch.float32)
        with torch.inference_mode():
            yield comfy.sd.load_text_encoder_state_dicts([weights], clip_type=comfy.sd.CLIPType.QWEN_IMAGE)


def shown_images(count):
    return [torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize(
    ("reader", "count"),
    [("TextEncodeQwenImageEdit", 1), ("TextEncodeQwenImageEditPlus", 1), ("TextEncodeQwenImageEditPlus", 2)],
)
def test_captions_are_read_with_their_images_as_the_hosts_node_reads_them(qwen_image_clip, reader, count):
    from comfy_extras import nodes_qwen

    images = shown_images(count)
    names = ["image"] if reader == "TextEncodeQwenImageEdit" else ["image1", "image2"]
    ours = host.encoders.TextEncoder(qwen_image_clip, reader).encode_with_images("make it red", images)
    node = getattr(nodes_qwen, reader)
    ((wanted, extras),) = node.execute(qwen_image_clip, "make it red", **dict(zip(names, images, strict=False))).args[0]
    assert torch.equal(ours["cross_attn"], wanted) and set(ours) == {"cross_attn", *extras}
    other = host.encoders.TextEncoder(qwen_image_clip, reader).encode_with_images(
        "make it red", [1 - image for image in images]
    )
    assert not torch.allclose(ours["cross_attn"], other["cross_attn"])


def test_prompts_of_samples_are_read_beside_the_control_images_that_they_show(qwen_image_clip, tmp_path):
    from comfy_extras import nodes_qwen

    for number in range(2):
        image(tmp_path / "in" / f"{number}.png", seed=number)
        image(tmp_path / "in" / f"{number}.control.png", seed=9 + number)
        (tmp_path / "in" / f"{number}.txt").write_text("make it red")
    data = encoded(tmp_path, buckets=BucketSettings(resolution=16, step=8))
    data.image_reader = "TextEncodeQwenImageEditPlus"
    previews = PreviewSettings(preview_every=1, prompts="make it blue\nmake it big\nturn it", negative_prompt="grey")
    samples, negative = MonitorConfig(previews=previews, clip=qwen_image_clip).encode_prompts(data)
    shown = [data.items[number % 2].open_controls()[0] for number in range(3)]
    node = nodes_qwen.TextEncodeQwenImageEditPlus
    assert negative is None and [sample.label for sample in samples] == ["make it blue", "make it big", "turn it"]
    for sample, image_ in zip(samples, shown, strict=True):
        for known, text in ((sample.cond, sample.prompt), (sample.avoided, "grey")):
            with torch.inference_mode():
                wanted = node.execute(qwen_image_clip, text, image1=image_).args[0][0][0]
            assert torch.equal(known["cross_attn"], wanted), text


def test_a_text_encoder_is_not_trained_on_captions_that_were_read_beside_images():
    data = dataset_with_controls("qwen")
    LoraTask(data=data).check_captions_alone()
    data.image_reader = "TextEncodeQwenImageEditPlus"
    with pytest.raises(
        ValueError, match="text_encoder is on, and .* beside control images .TextEncodeQwenImageEditPlus"
    ):
        LoraTask(data=data).check_captions_alone()


def test_the_reader_is_chosen_by_the_text_encoder(qwen_image_clip):
    assert host.encoders.TextEncoder(qwen_image_clip, "auto").image_reader == "TextEncodeQwenImageEditPlus"
    other = types.SimpleNamespace(tokenizer=object())
    assert host.encoders.resolve_image_reader(other, "auto") == ""
    with pytest.raises(ValueError, match="text encoder of Qwen-Image"):
        host.encoders.resolve_image_reader(other, "TextEncodeQwenImageEdit")


@pytest.mark.parametrize(("reader", "count"), [("TextEncodeQwenImageEdit", 2), ("TextEncodeQwenImageEditPlus", 4)])
def test_more_images_than_the_node_reads_are_refused(qwen_image_clip, reader, count):
    with pytest.raises(ValueError, match="reads at most"):
        host.encoders.TextEncoder(qwen_image_clip, reader).encode_with_images("a", shown_images(count))


def test_a_model_that_needs_an_image_is_content_with_control_images_and_names_what_has_none():
    model, data = make("ip2p"), dataset_with_controls("ip2p")
    data.items = data.items[1:]
    host.conditions.check_conditions(model, data.named_conds())
    with pytest.raises(ValueError, match=r"plain.png has no concat_latent_image.*Give every image a control image"):
        host.conditions.check_conditions(model, dataset_with_controls("ip2p").named_conds())
