"""The figures of a caption report, worked by hand."""

from trainyard.trainers.data.captions.caption_report import build_caption_report, format_caption_report
from trainyard.trainers.data.records import ImageDataset, ImageRecord


def dataset(*captions, tags=()):
    return ImageDataset(
        tuple(
            ImageRecord(id=str(i), path=f"/set/{i}.png", size=(8, 8), captions=c, tags=tags)
            for i, c in enumerate(captions)
        )
    )


def words(text):
    return {"l": len(text.split()), "t5xxl": 10 * len(text.split())}


MIXED = dataset(
    ("sks, red ball",),
    ("sks, red ball",),
    ("SKS, Red_Ball, a very long piece of prose about it",),
    (),
    ("ball", "a ball"),
)


def test_by_hand():
    """five images, one without caption, two that share theirs, one with two captions"""
    found = build_caption_report(MIXED, trigger="sks")
    assert (found["pictures"], found["captioned"], found["captions"], found["different captions"]) == (5, 4, 5, 4)
    assert (found["with alternatives"], found["pictures with the same caption"]) == (1, 2)
    assert (found["without caption"], found["trigger missing"], found["longest"]) == (
        ["3.png"],
        ["3.png", "4.png"],
        "2.png",
    )
    assert found["tags"] == {"red ball": 3, "sks": 3, "a ball": 1, "ball": 1}, (
        "prose is no tag, and spelling does not count"
    )
    assert found["words"] == {"mean": 3.8, "most": 10}
    assert found["most repeated"] == {"sks, red ball": 2}


def test_a_pictures_own_tags_count_once_with_those_of_its_caption():
    assert build_caption_report(dataset(("cat, mat",), tags=("Cat", "outdoors")))["tags"] == {
        "cat": 1,
        "mat": 1,
        "outdoors": 1,
    }


def test_tokens_are_counted_per_text_encoder_with_the_limit_of_each():
    found = build_caption_report(dataset((" ".join("a" * 76),), ("a b",)), count_tokens=words)
    assert found["tokens"]["l"] == {
        "mean": 39.0,
        "most": 76,
        "longest": "0.png",
        "limit": 75,
        "over": ["0.png"],
        "chunks": 2,
    }
    assert found["tokens"]["t5xxl"] == {"mean": 390.0, "most": 760, "longest": "0.png", "limit": 512, "over": ["0.png"]}


def test_warnings_say_what_and_which():
    found = build_caption_report(MIXED, trigger="sks", count_tokens=lambda text: {"l": 100})["warnings"]
    assert found == [
        "1 of 5 images have no caption: 3.png",
        "2 of 5 images do not say the trigger 'sks': 3.png, 4.png",
        "2 of 5 images share their caption with another (40% > 30%); equal words teach no difference",
        "5 captions have more than 75 tokens in l (read in up to 2 chunks): 0.png, 1.png, 2.png, 4.png, 4.png",
    ]
    assert build_caption_report(dataset(("a",), ("b",), ("c",), ("c",)))["warnings"] != []
    assert build_caption_report(dataset(("a",), ("b",), ("c",)), count_tokens=words)["warnings"] == []


def test_the_report_reads_well():
    assert format_caption_report(build_caption_report(MIXED, trigger="sks"), tags=2).splitlines() == [
        "5 images, 4 with captions, 1 with alternatives",
        "5 captions, 4 different",
        "words: 3.8 on average, 10 at most; longest: 2.png",
        "! 1 of 5 images have no caption: 3.png",
        "! 2 of 5 images do not say the trigger 'sks': 3.png, 4.png",
        "! 2 of 5 images share their caption with another (40% > 30%); equal words teach no difference",
        "",
        "most repeated captions",
        "    2 sks, red ball",
        "",
        "4 tags (images that have them)",
        "    3 red ball",
        "    3 sks",
        "  ... 2 more",
    ]


def test_a_dataset_without_any_caption_has_a_report_too():
    assert format_caption_report(build_caption_report(dataset((), ()), count_tokens=words)).splitlines() == [
        "2 images, 0 with captions, 0 with alternatives", "0 captions, 0 different", "! 2 of 2 images have no "
                                                                                       "caption: 0.png, "
                                                                                       "1.png"]  # fmt: skip


def test_a_caption_that_is_too_long_to_train_with_is_named_and_not_counted():
    """2049 words of one letter are too many tokens; 40 000 letters are too many characters, and no tokenizer sees
    them"""
    counted = []
    count = lambda text: counted.append(len(text)) or words(text)
    found = build_caption_report(dataset(("a " * 2049,), ("ab",), ("x" * 40_000,)), count_tokens=count)
    assert found["too long"] == {
        "0.png": "2049 words, 2049 tokens in l (28 chunks of 75), 20490 tokens in t5xxl",
        "2.png": "1 words, 40000 characters",
    }
    assert found["warnings"][:2] == [
        "the caption of 0.png is too long to be trained with (at most 2048 tokens): 2049 words, 2049 tokens in l (28 "
        "chunks of 75), 20490 tokens in t5xxl",
        "the caption of 2.png is too long to be trained with (at most 2048 tokens): 1 words, 40000 characters",
    ]
    assert found["tokens"]["l"]["most"] == 1 and max(counted) < 40_000


def test_a_placeholder_is_the_trigger_and_without_a_trigger_it_is_told():
    captions = dataset(("a photo of [trigger]",), ("a cat",))
    assert build_caption_report(captions, trigger="sks")["trigger missing"] == ["1.png"]
    found = build_caption_report(captions)
    assert found["trigger unset"] == ["0.png"] and build_caption_report(captions, "sks")["trigger unset"] == []
    assert (
        "1 of 2 images say [trigger], which Encode Dataset replaces with its trigger; set one there: 0.png"
        in (found["warnings"])
    )


def test_an_encoder_that_reads_a_part_of_the_captions_only_is_counted_where_it_reads():
    """HunyuanImage has an encoder for quoted text alone"""
    count = lambda text: {"qwen": len(text.split()), **({"byt5": 3} if '"' in text else {})}
    found = build_caption_report(dataset(("a cat",), ('a sign "no"',)), count_tokens=count)["tokens"]
    assert (found["byt5"]["mean"], found["byt5"]["longest"], found["qwen"]["most"]) == (1.5, "1.png", 3)
