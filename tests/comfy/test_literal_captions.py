"""Captions are words: what they say is no command to any of the host's tokenizers."""

import importlib
import re
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import nodes as comfy_nodes
import pytest
import torch
from comfy import supported_models
from trainyard.nodes import host
from trainyard.tests.comfy import tiny

EVERY_ENCODER = "every encoder"
# tokenizer of the host: its encoders that read brackets as weights
TOKENIZERS = {
    "comfy.sd1_clip.SD1Tokenizer": EVERY_ENCODER,
    "comfy.sdxl_clip.SDXLTokenizer": EVERY_ENCODER,
    "comfy.sdxl_clip.StableCascadeTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.anima.AnimaTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.aura_t5.AuraT5Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.boogu.BooguTokenizer": (),
    "comfy.text_encoders.cogvideo.CogVideoXTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.cosmos.CosmosT5Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.ernie.ErnieTokenizer": (),
    "comfy.text_encoders.flux.Flux2Tokenizer": (),
    "comfy.text_encoders.flux.FluxTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.flux.KleinTokenizer": (),
    "comfy.text_encoders.flux.KleinTokenizer8B": (),
    "comfy.text_encoders.genmo.MochiT5Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.gpt_oss.LensTokenizer": (),
    "comfy.text_encoders.hidream.HiDreamTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.hidream_o1.HiDreamO1Tokenizer": (),
    "comfy.text_encoders.hunyuan_image.HunyuanImageTokenizer": ("byt5",),
    "comfy.text_encoders.hunyuan_video.HunyuanVideo15Tokenizer": ("byt5",),
    "comfy.text_encoders.hunyuan_video.HunyuanVideoTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.hydit.HyditTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.ideogram4.Ideogram4Qwen3VLTokenizer": (),
    "comfy.text_encoders.ideogram4.Ideogram4Tokenizer": (),
    "comfy.text_encoders.jina_clip_2.JinaClip2TokenizerWrapper": EVERY_ENCODER,
    "comfy.text_encoders.joyimage.JoyImageTokenizer": (),
    "comfy.text_encoders.kandinsky5.Kandinsky5Tokenizer": ("l",),
    "comfy.text_encoders.kandinsky5.Kandinsky5TokenizerImage": ("l",),
    "comfy.text_encoders.krea2.Krea2Tokenizer": (),
    "comfy.text_encoders.longcat_image.LongCatImageTokenizer": (),
    "comfy.text_encoders.lt.LTXAVGemmaTokenizer": (),
    "comfy.text_encoders.lt.LTXVT5Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.lumina2.LuminaTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.lumina2.NTokenizer": (),
    "comfy.text_encoders.mage_flow.MageFlowTokenizer": (),
    "comfy.text_encoders.minimax.MiniMaxH3Tokenizer": (),
    "comfy.text_encoders.newbie.NewBieTokenizer": ("jina",),
    "comfy.text_encoders.omnigen2.Omnigen2Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.ovis.OvisTokenizer": (),
    "comfy.text_encoders.pixart_t5.PixArtTokenizer": EVERY_ENCODER,
    "comfy.text_encoders.pixeldit.PixelDiTGemma2Tokenizer": (),
    "comfy.text_encoders.qwen3vl.Qwen3VLTokenizer": (),
    "comfy.text_encoders.qwen_image.QwenImageTokenizer": (),
    "comfy.text_encoders.sa_t5.SAT5Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.sd2_clip.SD2Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.sd3_clip.SD3Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.wan.WanT5Tokenizer": EVERY_ENCODER,
    "comfy.text_encoders.z_image.ZImageTokenizer": (),
}
# what a caption says, however it is written: the prompt that means it to an encoder that weighs
CAPTIONS = {
    "miku (vocaloid), smile": r"miku \(vocaloid\), smile",
    r"miku \(vocaloid\), smile": r"miku \(vocaloid\), smile",
    "a (red:1.6) ball": r"a \(red:1.6\) ball",
    r"saber (alter) \(fate\)": r"saber \(alter\) \(fate\)",
    "((very)) large, :( and >:)": r"\(\(very\)\) large, :\( and >:\)",
    'a sign says "open (late)"': r'a sign says "open \(late\)"',
    "(unclosed": r"\(unclosed",
    "(closed) \\": "\\(closed\\) \\",  # ends with a backslash
    "a red ball": "a red ball",
    "a backslash \\": "a backslash \\",
}


class ByteVocabulary:
    """A vocabulary of bytes: rows need no files, and no two texts have the same tokens."""

    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()

    def __call__(self, text, add_special_tokens=True, **_):
        ends = [[1001], [1002]] if add_special_tokens else [[], []]
        return {"input_ids": [*ends[0], *text.encode(), *ends[1]]}

    def get_vocab(self):
        return {}

    def convert_tokens_to_ids(self, tokens):
        return [1003 for _ in tokens]


class TokenizingClip:
    """The part of a CLIP that turns text into tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize(self, text, return_word_ids=False, **kwargs):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **kwargs)


@pytest.fixture
def byte_vocabulary(monkeypatch):
    built = comfy.sd1_clip.SDTokenizer.__init__

    def init(self, *args, **kwargs):
        kwargs |= {"tokenizer_class": ByteVocabulary, "tokenizer_args": {}}
        kwargs["max_length"] = max(512, kwargs.get("max_length", 0))  # every text fits in one chunk
        built(self, *args, **kwargs)

    monkeypatch.setattr(comfy.sd1_clip.SDTokenizer, "__init__", init)
    monkeypatch.setattr(
        importlib.import_module("comfy.text_encoders.flux"), "load_mistral_tokenizer", lambda _: {}, raising=False
    )


def build_tokenizer(name, **options):
    module, _, kind = name.rpartition(".")
    data = {"gemma_spiece_model": None, "jina_spiece_model": None}
    return getattr(importlib.import_module(module), kind)(tokenizer_data=data, **options)


def ids(chunks):
    return [entry[0] for chunk in chunks for entry in chunk]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_of_the_host_reads_a_caption_as_the_words_it_says(name, byte_vocabulary):
    """Tokens are those of the prompt with escaped brackets where brackets weigh, and of the plain words elsewhere."""
    clip = TokenizingClip(build_tokenizer(name))
    read = host.encoders.CaptionTokenizer(clip)
    encoders = frozenset(clip.tokenize('"a"'))
    weighing = encoders if TOKENIZERS[name] == EVERY_ENCODER else frozenset(TOKENIZERS[name])
    assert read.weighing_encoders == weighing
    for caption, prompt in CAPTIONS.items():
        tokens, words = read(caption), prompt.replace("\\(", "(").replace("\\)", ")")
        escaped, plain = clip.tokenize(prompt), clip.tokenize(words)
        for encoder, chunks in tokens.items():
            wanted = escaped if encoder in weighing else plain
            assert ids(chunks) == ids(wanted[encoder]), (encoder, caption)
            assert {entry[1] for chunk in chunks for entry in chunk} == {1.0}, (encoder, caption)
            said = b"vocaloid" if "miku" in caption else b""
            assert said in bytes(i for i in ids(chunks) if i < 256), "the bytes of the text are there"


def test_the_table_has_a_row_for_every_tokenizer_that_the_host_gives_to_an_image_model():
    """Audio, segmentation and captioning have tokenizers too, and are not trained here. CogVideoX is named by what is
    inside its tokenizer in one place."""
    others = "ace", "minimax_music", "sa3", "sam3", "gemma4", "qwen35", "cogvideo.CogVideoXT5Tokenizer"
    source = Path(supported_models.__file__).read_text(encoding="utf-8")
    named = set(re.findall(r"ClipTarget\(\s*(?:comfy\.text_encoders\.)?([\w.]+Tokenizer\w*),", source))
    rows = {name.removeprefix("comfy.text_encoders.").removeprefix("comfy.") for name in TOKENIZERS}
    missing = {name for name in named - rows if not name.startswith(others)}
    assert len(named) > 25 and not missing, missing


# -- a loaded text encoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd15")))[1]


def conditioning(clip, prompt):
    """What ComfyUI's own encode node gives."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_conditions_as_the_prompt_that_people_type_for_it(clip, caption):
    wanted = conditioning(clip, CAPTIONS[caption])
    (encoded,) = host.encoders.TextEncoder(clip).encode([caption])
    (once,) = host.encoders.encode_captions_once(clip, [caption]).values()
    assert torch.equal(encoded["cross_attn"], wanted) and torch.equal(once["cross_attn"], wanted)


@pytest.mark.parametrize("last_layer", [None, -2])
def test_long_texts_and_clip_skip_are_read_as_the_hosts_node_reads_them(clip, last_layer):
    """More words than the encoder takes at once, and its last layers left out (CLIP Set Last Layer)."""
    text = ", ".join(f"a red ball number {number}" for number in range(30))
    chosen = clip.clone()
    if last_layer:
        chosen.clip_layer(last_layer)
    ((wanted, extras),) = comfy_nodes.CLIPTextEncode().encode(chosen, text)[0]
    assert wanted.shape[1] > 2 * 77 and torch.equal(wanted, conditioning(clip, text)) == (last_layer is None)
    encoder = host.encoders.TextEncoder(chosen)
    for encode in (encoder.encode, encoder.encode_prompts):
        (ours,) = encode([text])
        assert ours.keys() == {"cross_attn", *extras} and torch.equal(ours["cross_attn"], wanted)
        assert torch.equal(ours["pooled_output"], extras["pooled_output"])


def test_the_mask_of_a_text_encoder_is_part_of_the_conditioning():
    mask = torch.tensor([[1, 1, 0]])

    class Masked:
        def encode_from_tokens_scheduled(self, tokens, show_pbar):
            return [[torch.zeros(1, 3, 8), {"attention_mask": mask, "pooled_output": None}]]

    cond = host.encoders.encode_tokens(Masked(), {})
    assert cond["attention_mask"] is mask and cond.keys() == {"cross_attn", "attention_mask", "pooled_output"}


def test_a_typed_prompt_keeps_its_weights(clip):
    for prompt in ("a (red:1.6) ball", r"miku \(vocaloid\)", "miku (vocaloid)"):
        (encoded,) = host.encoders.encode_prompts_once(clip, [prompt]).values()
        assert torch.equal(encoded["cross_attn"], conditioning(clip, prompt))
    assert not torch.equal(conditioning(clip, "miku (vocaloid)"), conditioning(clip, r"miku \(vocaloid\)"))


def test_a_caption_loads_no_embedding_and_loses_no_word_by_it(clip, tmp_path, monkeypatch):
    """A prompt loads the file; a caption says its name, as any other words. Where there is no such file, a prompt loses
    the word."""
    torch.save({"emb_params": torch.ones(2, 768)}, tmp_path / "style.pt")
    inner = clip.tokenizer.clip_l
    monkeypatch.setattr(inner, "embedding_directory", str(tmp_path))
    count, read = host.encoders.TokenCounter(clip), host.encoders.CaptionTokenizer(clip)
    for caption in ("embedding:style", "a cat, embedding:style (old)", "embedding:missing cat"):
        tokens = ids(read(caption)["l"])
        assert all(isinstance(token, int) for token in tokens), caption
        words = inner.tokenizer(caption)["input_ids"]
        assert tokens[: len(words)] == words, caption
        assert count(caption) == {"l": len(words) - 2}
    prompt = ids(clip.tokenize("a cat, embedding:style")["l"])
    assert any(torch.is_tensor(token) for token in prompt), "a prompt loads it still"


def test_a_cancel_is_noticed_between_two_texts(clip, monkeypatch):
    encoded, asked = [], []

    def cancel():
        asked.append(len(encoded))
        if len(encoded) == 2:
            raise InterruptedError

    encode = host.encoders.encode_tokens
    monkeypatch.setattr(host.encoders, "encode_tokens", lambda *args: encoded.append(1) or encode(*args))
    monkeypatch.setattr(host.encoders, "raise_if_interrupted", cancel)
    for encode_all in (host.encoders.TextEncoder(clip).encode, host.encoders.TextEncoder(clip).encode_prompts):
        encoded.clear()
        with pytest.raises(InterruptedError):
            encode_all(["a", "b", "c", "d"])
        assert len(encoded) == 2
