"""Small vision-language models that transformers' real classes accept, built from configs on the spot: no weights, no
network.

    folder = tiny_vlm.build("llava", tmp_path)     # a folder as a person would download it

Their tokenizer knows the 256 bytes and a few marks, so that any text is spoken; random weights say noise, which proves
the wiring. `taught_blip` is the exception: it learns to tell three colours apart in seconds, so that a caption has a
meaning.
"""

import pathlib

import torch
from PIL import Image

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}"
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
EYES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)


def tokenizer(*marks, template=None, **names):
    """Bytes as tokens, and marks such as <image>."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>",
        additional_special_tokens=list(marks), **names,
    )  # fmt: skip
    made.chat_template = template
    return made


def ends(words):
    return dict(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id)


def eyes_processor(kind="CLIPImageProcessor", **more):
    import transformers

    return getattr(transformers, kind)(
        **(more or dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}))
    )


def saved(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return pathlib.Path(folder)


def llava(folder, template=TEMPLATE):
    import transformers as t

    template = template and template.replace("IMAGE", "<image>")
    words = tokenizer("<image>", template=template)
    image = words.convert_tokens_to_ids("<image>")
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**EYES, projection_dim=32), text_config=t.LlamaConfig(vocab_size=len(words), **TEXT, **ends(words)),
        image_token_index=image, vision_feature_layer=-1,
    )  # fmt: skip
    processor = t.LlavaProcessor(image_processor=eyes_processor(), tokenizer=words, patch_size=14, vision_feature_select_strategy="default",
                                 num_additional_image_tokens=1, chat_template=template)  # fmt: skip
    return saved(folder, t.LlavaForConditionalGeneration(config), processor)


def old_llava(folder):
    """Without a chat template, as the first LLaVA conversions were."""
    return llava(folder, template=None)


def qwen25_vl(folder):
    import transformers as t

    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", template=template)
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in
           dict(image="<|image_pad|>", video="<|video_pad|>", vision_start="<|vision_start|>", vision_end="<|vision_end|>").items()}  # fmt: skip
    text = dict(
        vocab_size=len(words), **TEXT, **ends(words), rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}
    )
    eyes = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=14, spatial_merge_size=2,
                fullatt_block_indexes=[1])  # fmt: skip
    model = t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **ids))
    images = eyes_processor("Qwen2VLImageProcessor", min_pixels=28 * 28, max_pixels=56 * 56)
    video = t.Qwen2VLVideoProcessor()
    return saved(
        folder,
        model,
        t.Qwen2_5_VLProcessor(image_processor=images, tokenizer=words, video_processor=video, chat_template=template),
    )


def qwen3_vl(folder):
    import transformers as t

    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", template=template)
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in
           dict(image="<|image_pad|>", video="<|video_pad|>", vision_start="<|vision_start|>", vision_end="<|vision_end|>").items()}  # fmt: skip
    text = dict(
        vocab_size=len(words),
        **TEXT,
        head_dim=16,
        **ends(words),
        rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3]},
    )
    eyes = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=16, spatial_merge_size=2,
                num_position_embeddings=16, deepstack_visual_indexes=[0])  # fmt: skip
    model = t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=eyes, **ids))
    images = eyes_processor(
        "Qwen2VLImageProcessor", patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    video = t.Qwen3VLVideoProcessor()
    return saved(
        folder,
        model,
        t.Qwen3VLProcessor(image_processor=images, tokenizer=words, video_processor=video, chat_template=template),
    )


def gemma3(folder):
    import transformers as t

    template = TEMPLATE.replace("IMAGE", "<start_of_image>")
    words = tokenizer(
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
        template=template,
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    config = t.Gemma3Config(
        text_config=dict(vocab_size=len(words), **TEXT, head_dim=16, sliding_window=64, **ends(words)),
        vision_config=t.SiglipVisionConfig(**EYES, vision_use_head=False).to_dict(), mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"), eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"), **ends(words),
    )  # fmt: skip
    images = eyes_processor("Gemma3ImageProcessor", size={"height": 28, "width": 28})
    processor = t.Gemma3Processor(image_processor=images, tokenizer=words, chat_template=template, image_seq_length=4)
    return saved(folder, t.Gemma3ForConditionalGeneration(config), processor)


def smolvlm(folder):
    """SmolVLM-Instruct is of the class Idefics3."""
    import transformers as t

    template = TEMPLATE.replace("IMAGE", "<image>")
    words = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", template=template)
    config = t.Idefics3Config(
        text_config=t.LlamaConfig(vocab_size=len(words), **TEXT, **ends(words)), vision_config=EYES, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=words.pad_token_id,
    )  # fmt: skip
    images = eyes_processor(
        "Idefics3ImageProcessor",
        do_image_splitting=False,
        size={"longest_edge": 28},
        max_image_size={"longest_edge": 28},
    )
    processor = t.Idefics3Processor(image_processor=images, tokenizer=words, image_seq_len=1, chat_template=template)
    return saved(folder, t.Idefics3ForConditionalGeneration(config), processor)


def internvl(folder):
    import transformers as t

    template = TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
    marks = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    words = tokenizer(*marks.values(), template=template, extra_special_tokens=marks)
    eyes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[28, 28],
        patch_size=[7, 7],
    )
    text = t.Qwen2Config(vocab_size=len(words), **TEXT, **ends(words))
    config = t.InternVLConfig(vision_config=eyes, text_config=text, image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
                              downsample_ratio=0.5)  # fmt: skip
    images = eyes_processor("GotOcr2ImageProcessor", size={"height": 28, "width": 28}, crop_to_patches=False)
    processor = t.InternVLProcessor(image_processor=images, tokenizer=words, video_processor=t.InternVLVideoProcessor(), image_seq_length=4,
                                    chat_template=template)  # fmt: skip
    return saved(folder, t.InternVLForConditionalGeneration(config), processor)


def paligemma(folder):
    import transformers as t

    words = tokenizer("<image>")
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**EYES, vision_use_head=False, projection_dim=32).to_dict(), projection_dim=32, hidden_size=32,
        text_config=dict(model_type="gemma", vocab_size=len(words) + 8, head_dim=16, **TEXT, **ends(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"), **ends(words),
    )  # fmt: skip
    images = eyes_processor("SiglipImageProcessor", size={"height": 28, "width": 28})
    images.image_seq_length = 4
    return saved(
        folder,
        t.PaliGemmaForConditionalGeneration(config),
        t.PaliGemmaProcessor(image_processor=images, tokenizer=words),
    )


def florence2(folder):
    import transformers as t

    words = tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    eyes = dict(embed_dim=[16, 32], num_heads=[2, 2], num_groups=[2, 2], depths=[1, 1], patch_size=[7, 3], patch_stride=[4, 2],
                patch_padding=[3, 1], patch_prenorm=[False, True], window_size=7, projection_dim=32, drop_path_rate=0.0,
                max_temporal_embeddings=10, max_position_embeddings=10)  # fmt: skip
    text = dict(model_type="bart", vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=512,
                decoder_start_token_id=words.eos_token_id, forced_eos_token_id=words.eos_token_id, **ends(words))  # fmt: skip
    config = t.Florence2Config(
        vision_config=eyes,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        is_encoder_decoder=True,
    )
    images = eyes_processor("CLIPImageProcessor", size={"height": 56, "width": 56}, do_center_crop=False)
    images.image_seq_length = 50
    return saved(
        folder,
        t.Florence2ForConditionalGeneration(config),
        t.Florence2Processor(image_processor=images, tokenizer=words, num_additional_image_tokens=1),
    )


def blip(folder, words=None, model=None):
    import transformers as t

    words = words or wordpieces(["red", "blue", "green", "sky", "a", "picture", "of"])
    model = model or t.BlipForConditionalGeneration(blip_config(words))
    images = eyes_processor("BlipImageProcessor", size={"height": 32, "width": 32})
    return saved(folder, model, t.BlipProcessor(image_processor=images, tokenizer=words))


def blip_config(words):
    import transformers as t

    text = dict(vocab_size=len(words), hidden_size=32, encoder_hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=32, bos_token_id=words.convert_tokens_to_ids("[DEC]"),
                eos_token_id=words.sep_token_id, pad_token_id=words.pad_token_id, sep_token_id=words.sep_token_id)  # fmt: skip
    return t.BlipConfig(text_config=text, vision_config=dict(EYES, image_size=32, patch_size=8), projection_dim=32)


def wordpieces(vocabulary):
    import tempfile

    import transformers

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "vocab.txt"
        file.write_text("\n".join([*marks, *vocabulary]))
        made = transformers.BertTokenizerFast.from_pretrained(
            folder, local_files_only=True, additional_special_tokens=["[DEC]"]
        )
    return made


def git(folder):
    import transformers as t

    words = wordpieces(["red", "blue", "green", "sky", "a", "picture", "of"])
    config = t.GitConfig(vision_config=dict(EYES), vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=64, bos_token_id=words.cls_token_id, eos_token_id=words.sep_token_id,
                         pad_token_id=words.pad_token_id)  # fmt: skip
    return saved(folder, t.GitForCausalLM(config), t.GitProcessor(image_processor=eyes_processor(), tokenizer=words))


def blip2(folder):
    import transformers as t

    words = tokenizer("<image>")
    text = t.OPTConfig(vocab_size=len(words), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
                       max_position_embeddings=256, **ends(words))  # fmt: skip
    former = t.Blip2QFormerConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        encoder_hidden_size=32,
    )
    config = t.Blip2Config(vision_config=t.Blip2VisionConfig(**EYES).to_dict(), qformer_config=former.to_dict(), text_config=text.to_dict(),
                           num_query_tokens=4, image_token_index=words.convert_tokens_to_ids("<image>"))  # fmt: skip
    images = eyes_processor("BlipImageProcessor", size={"height": 28, "width": 28})
    return saved(
        folder,
        t.Blip2ForConditionalGeneration(config),
        t.Blip2Processor(image_processor=images, tokenizer=words, num_query_tokens=4),
    )


KINDS = dict(blip=blip, git=git, blip2=blip2, florence2=florence2, llava=llava, old_llava=old_llava, qwen25_vl=qwen25_vl, qwen3_vl=qwen3_vl,
             gemma3=gemma3, paligemma=paligemma, smolvlm=smolvlm, internvl=internvl)  # fmt: skip


def build(kind, folder):
    """A folder with a random model of this kind."""
    folder = pathlib.Path(folder) / kind
    torch.manual_seed(0)
    return KINDS[kind](folder)


COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (40, 190, 60)}


def plain_image(colour, size=(32, 32)):
    return Image.new("RGB", size, COLOURS[colour])


def taught_blip(folder, steps=150):
    """BLIP that has learnt to say `red sky` of a red image, and so for blue and green."""
    import transformers as t

    torch.manual_seed(0)
    words = wordpieces(["red", "blue", "green", "sky", "a", "picture", "of"])
    model = t.BlipForConditionalGeneration(blip_config(words))
    images = eyes_processor("BlipImageProcessor", size={"height": 32, "width": 32})
    pixels = images([plain_image(colour) for colour in COLOURS], return_tensors="pt").pixel_values
    ids = words([f"{colour} sky" for colour in COLOURS], return_tensors="pt").input_ids
    ids[:, 0] = words.convert_tokens_to_ids("[DEC]")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(pixel_values=pixels, input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return blip(folder, words, model)
