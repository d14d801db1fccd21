"""Prompts with a direction, from lines and tables."""

import pytest
from trainyard.trainers.data.signed_prompts import (
    SignedPrompt,
    read_signed_prompt_file,
    read_signed_prompts,
    sample_signed_prompts,
)

PARTI = (
    'Prompt\tCategory\tChallenge\tNote\nan owl\tAnimals\tBasic\t\na sign that says "hi\tOutdoor\tWriting\tan odd '
    '" '
    "mark\n"
)


def test_lines_are_weight_prompt_negative_or_the_bare_prompt():
    rows = read_signed_prompts("# mine\na street, at night\n\n-1 | an ugly street | people\n 0 |a portrait\n")
    assert rows == (
        SignedPrompt("a street, at night"),
        SignedPrompt("an ugly street", -1.0, "people"),
        SignedPrompt("a portrait", 0.0),
    )
    assert [row.sign for row in rows] == [1.0, -1.0, 0.0]


def test_partiprompts_is_read_as_it_is_published():
    assert [row.prompt for row in read_signed_prompts(PARTI)] == ["an owl", 'a sign that says "hi']


def test_a_csv_may_have_weights_and_commas_in_quotes():
    assert read_signed_prompts('weight,prompt,negative\n-2,"a cat, wet",\n,a dog,blurry\n') == (
        SignedPrompt("a cat, wet", -2.0),
        SignedPrompt("a dog", 1.0, "blurry"),
    )


def test_a_line_that_merely_holds_the_word_prompt_is_no_table():
    assert read_signed_prompts("a prompt, they said")[0].prompt == "a prompt, they said"


@pytest.mark.parametrize(("text", "says"), [
    ("\n# nothing\n", "There are no prompts"),
    ("cat | dog", "Line 1: the weight is 'cat'; it must be a number: 1 for better, -1 for worse, 0 to keep"),
    ("a\n1 | b | c | d", "Line 2 has 4 parts"),
    ("prompt,weight\ncat,nan\n", "Line 2: the weight is nan; it must lie between -1000 and 1000"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(text, says):
    with pytest.raises(ValueError, match=says.replace("|", r"\|")):
        read_signed_prompts(text)


def test_a_file_is_named_in_its_errors(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"bad.txt.* is not UTF-8"):
        read_signed_prompt_file(tmp_path / "bad.txt")
    (tmp_path / "good.tsv").write_text(PARTI, encoding="utf-8")
    assert len(read_signed_prompt_file(tmp_path / "good.tsv")) == 2


def test_a_part_of_a_long_list_is_drawn_by_seed_and_keeps_its_order():
    rows = tuple(SignedPrompt(str(i)) for i in range(50))
    few = sample_signed_prompts(rows, 5, 1)
    assert (
        len(few) == 5
        and few == sample_signed_prompts(rows, 5, 1) != sample_signed_prompts(rows, 5, 2)
        and [int(r.prompt) for r in few] == sorted(int(r.prompt) for r in few)
    )
    assert sample_signed_prompts(rows, 0, 1) == sample_signed_prompts(rows, 99, 1) == rows
