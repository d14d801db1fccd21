"""Tables as spreadsheets and other tools write them: of images, labels, pairs and prompts."""

import json
import pathlib

import pytest
from PIL import Image
from trainyard.trainers.data.concept_prompts import PromptRow, read_prompt_file, read_prompts
from trainyard.trainers.data.labels import read_labels
from trainyard.trainers.data.ratings import read_preference_table
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.signed_prompts import SignedPrompt, read_signed_prompt_file, read_signed_prompts
from trainyard.trainers.data.tables import parse_decimal, read_text_table

NAMES = ("1.png", "2.png")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    return tmp_path


def captions(dataset):
    return [record.captions for record in dataset]


def notes(dataset):
    return [reason for _, reason in dataset.skipped]


# -- the forms a table has ---------------------------------------------------------------------------------------------

FORMS = {
    "plain": 'image,caption\n1.png,"a toy, red"\n2.png,a cube\n',
    "a space after the comma": 'image, caption\n1.png, "a toy, red"\n2.png, a cube\n',
    "semicolons": "image;caption\n1.png;a toy, red\n2.png;a cube\n",
    "tabs": "image\tcaption\n1.png\ta toy, red\n2.png\ta cube\n",
    "quoted names": '"image","caption"\n"1.png","a toy, red"\n"2.png","a cube"\n',
    "a separator in a name": '"image";"caption"\n"1.png";"a toy, red"\n2.png;a cube\n',
    "capitals": 'Image,CAPTION \n1.png,"a toy, red"\n2.png,a cube\n',
    "a byte order mark": '\ufeffimage,caption\n1.png,"a toy, red"\n2.png,a cube\n',
    "a byte order mark and quotes": '\ufeff"image","caption"\n1.png,"a toy, red"\n2.png,a cube\n',
    "Windows lines": 'image,caption\r\n1.png,"a toy, red"\r\n2.png,a cube\r\n',
    "old Mac lines": 'image,caption\r1.png,"a toy, red"\r2.png,a cube\r',
    "empty lines": '\nimage,caption\n\n1.png,"a toy, red"\n,\n2.png,a cube\n\n',
    "empty cells at the end": 'image,caption,,\n1.png,"a toy, red",,\n2.png,a cube,,,,\n',
    "empty cells beyond the header": 'image,caption\n1.png,"a toy, red",,\n2.png,a cube,\n',
    "Excel's first line": "sep=;\nimage;caption\n1.png;a toy, red\n2.png;a cube\n",
    "Excel's first line and a mark": "\ufeff\"sep=;\"\r\nimage;caption\r\n1.png;a toy, red\r\n2.png;a cube\r\n",
    "another separator in texts": "sep=|\nimage|caption\n1.png|a toy, red\n2.png|a cube\n",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_says_the_same(form):
    table = read_text_table(FORMS[form])
    assert [name for name in table.columns if name] == ["image", "caption"]
    assert [dict(row.cells) for row in table.rows] == [
        {"image": "1.png", "caption": "a toy, red"},
        {"image": "2.png", "caption": "a cube"},
    ]
    assert not table.error and not any(row.extra for row in table.rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", FORMS)
def test_metadata_labels_pairs_and_prompts_are_read_in_every_form(folder, form, encoding):
    def put(name, *renamed):
        text = FORMS[form]
        for old, new in renamed:
            text = text.replace(old, new).replace(old.capitalize(), new.capitalize()).replace(old.upper(), new.upper())
        (folder / name).write_bytes(text.encode(encoding))
        return folder / name

    put("metadata.csv")
    dataset = read_folder(folder)
    assert (captions(dataset), dataset.skipped) == ([("a toy, red",), ("a cube",)], ())
    assert read_labels(put("labels.csv", ("image", "file"), ("caption", "label")), dataset) == ["a toy, red", "a cube"]
    (folder / "metadata.csv").unlink()
    pairs = put("pairs.csv", ("image", "better"), ("caption", "worse"), ("a toy, red", "2.png"), ("a cube", "1.png"))
    assert read_preference_table(pairs, [record.path for record in dataset]) == [(0, 1), (1, 0)]
    prompts = put("prompts.csv", ("image", "positive"), ("caption", "target"))
    assert read_prompt_file(prompts) == (PromptRow("a toy, red", "1.png"), PromptRow("a cube", "2.png"))
    signed = put("signed.csv", ("image", "negative"), ("caption", "prompt"))
    rows = (SignedPrompt("a toy, red", 1.0, "1.png"), SignedPrompt("a cube", 1.0, "2.png"))
    if "\t" not in FORMS[form]:
        assert read_signed_prompt_file(signed) == rows


def test_a_quotation_mark_that_begins_a_text_is_kept_where_it_closes_before_the_end():
    table = read_text_table('image,caption\n1.png, "red" ball\n')
    assert [row.cells["caption"] for row in table.rows] == ['"red" ball'] and not table.error


@pytest.mark.parametrize(("text", "says"), [
    ('target,positive\na,b\n"c,d\n', "The table cannot be read: line 3 cannot be read as CSV"),
    ("target,target\na,b\n", "The table cannot be read: line 1 names two columns target"),
    ("target;positive\na;b;c\n", "Line 2 has more cells than the header. Put texts that hold ';' in double quotes"),
])  # fmt: skip
def test_a_table_of_prompts_that_is_broken_is_refused_with_its_line(text, says):
    with pytest.raises(ValueError, match=says):
        read_prompts(text, "csv")


def test_a_row_is_named_by_its_line_in_the_file(folder):
    with pytest.raises(ValueError, match="Line 6: guidance is 'much'"):
        read_prompts('target,guidance\n\n"two\nlines",1\n\ncat,much\n', "csv")


def test_a_table_that_is_pasted_is_known_by_its_header():
    for text in ('"target","positive"\ncat,dog\n', "target;positive\ncat;dog\n", "\ufeffTarget, positive\ncat, dog\n"):
        assert read_prompts(text) == (PromptRow("cat", "dog"),), text
    assert read_signed_prompts("Prompt\ncat\n") == read_signed_prompts("cat") == (SignedPrompt("cat"),)
    assert read_signed_prompts('"prompt";"weight"\ncat;-0,5\n') == (SignedPrompt("cat", -0.5),)


def test_excels_unicode_text_is_a_table_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("target\tpositive\r\nkätzchen\tdog\r\n".encode("utf-16"))
    assert read_prompt_file(tmp_path / "prompts.txt") == (PromptRow("kätzchen", "dog"),)


@pytest.mark.parametrize(("text", "number"), [("7,5", 7.5), (" -0,25 ", -0.25), ("1e3", 1000.0), ("7.5", 7.5)])
def test_a_decimal_comma_is_one(text, number):
    assert parse_decimal(text) == number


@pytest.mark.parametrize("text", ["1,000", "1,5,2", "1.000,5", "", "many"])
def test_what_may_be_thousands_is_no_number(text):
    with pytest.raises(ValueError, match="could not convert"):
        parse_decimal(text)


# -- what a row says ---------------------------------------------------------------------------------------------------


def jsonl(folder, **values):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", **values}), encoding="utf-8")
    return read_folder(folder)


@pytest.mark.parametrize(("values", "expected"), [
    ({"prompt": "a ball"}, ("a ball",)),
    ({"description": "a ball"}, ("a ball",)),
    ({"prompt": ["a ball", "a sphere"]}, ("a ball", "a sphere")),
    ({"description": "of the artist", "prompt": "a ball"}, ("a ball",)),
    ({"text": "a ball", "prompt": "no", "description": "no"}, ("a ball",)),
    ({"tags": ["red", "round"], "description": "of the artist"}, ("red, round",)),
    ({"tag_string": "1girl long_hair  solo"}, ("1girl, long_hair, solo",)),
    ({"tag_string": "1girl, long hair"}, ("1girl, long hair",)),
    ({"tags": "red ball, round", "tag_string": "no"}, ("red ball, round",)),
    ({"Text": "a ball"}, ("a ball",)),
    ({"prompt": {"3": {"class_type": "KSampler"}}}, ()),
    ({"tags": {"red": 0.9, "round": 1}}, ("red, round",)),
    ({"tags": {"general": ["red", "round"], "character": ["ball", "red"]}}, ("red, round, ball",)),
    ({"tags": {}}, ()),
])  # fmt: skip
def test_a_caption_may_be_called_prompt_or_description_and_tags_may_be_categories(folder, values, expected):
    first, _ = jsonl(folder, **values)
    assert first.captions == expected


@pytest.mark.parametrize(
    "tags", [{"general": ["red"], "round": 0.5}, {"general": "red, round"}, {"a": True}, {"a": [1]}, {"a": {"b": 1}}]
)
def test_tags_of_another_form_take_their_image_out_and_name_the_row(folder, tags):
    dataset = jsonl(folder, tags=tags)
    assert len(dataset) == 1 and "metadata.jsonl, line 1: tags is {" in notes(dataset)[0]
    assert "a number for each tag, or a list of tags for each category" in notes(dataset)[0]


@pytest.mark.parametrize("column", ["filename", "File Path".replace(" ", "_"), "image_path", "FILE_NAME"])
def test_the_column_of_images_may_have_other_usual_names(folder, column):
    (folder / "metadata.csv").write_text(f"{column},text\n1.png,a ball\n")
    assert captions(read_folder(folder)) == [("a ball",), ()]


def test_columns_that_are_not_understood_are_named_and_stop_nothing(folder):
    (folder / "metadata.csv").write_text("file,captoin,artist,empty\n1.png,a ball,me,\n2.png,a cube,,\n")
    dataset = read_folder(folder, strict=True)
    assert len(dataset) == 2
    assert [pathlib.Path(path).name for path, _ in dataset.skipped] == ["metadata.csv"]
    assert notes(dataset)[0].startswith("2 columns not read: captoin (caption?), artist. Read are the image's name and")


def test_columns_that_other_tools_need_are_not_named(folder):
    (folder / "metadata.json").write_text(json.dumps({"1": {"caption": "a", "train_resolution": [512, 512]}}))
    assert read_folder(folder).skipped == ()


def test_scores_with_a_decimal_comma_are_read(folder):
    (folder / "metadata.csv").write_text("file;score\n1.png;7,5\n2.png;1,000\n")
    dataset = read_folder(folder)
    assert [record.score for record in dataset] == [7.5] and "score is '1,000'" in notes(dataset)[0]
