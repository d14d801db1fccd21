"""Rows of prompts, from every format, and what is refused."""

import pytest
from trainyard.trainers.data.concept_prompts import PromptRow, read_prompt_file, read_prompts
from trainyard.trainers.methods.prompts import build_prompt_tasks

SAME = {
    "text": "# a comment\nred car -> blue car | guidance: 2 | weight: 0.5\n\ncat | action: erase\n",
    "csv": "target,positive,action,guidance,weight\nred car,blue car,replace,2,0.5\ncat,,erase,,\n",
    "tsv": "target\tpositive\taction\tguidance\tweight\nred car\tblue car\treplace\t2\t0.5\ncat\t\terase\t\t\n",
    "yaml": "- target: red car\n  positive: blue car\n  action: replace\n  guidance: 2\n  weight: 0.5\n- target: cat\n",
    "json": '[{"target": "red car", "positive": "blue car", "action": "replace", "guidance_scale": 2, "weight": 0.5}, '
    '{"target": "cat"}]',
}
SHAPES = lambda row: ((4, 8, 8),)


@pytest.mark.parametrize("form", SAME)
def test_every_format_says_the_same_with_its_name_and_without(form):
    wanted = (PromptRow("red car", "blue car", action="replace", guidance=2.0, weight=0.5), PromptRow("cat"))
    assert read_prompts(SAME[form], form) == wanted
    assert read_prompts(SAME[form]) == wanted, "guessed as another format"


def test_a_file_is_read_by_its_ending_and_errors_name_it(tmp_path):
    for ending, form in ((".txt", "text"), (".csv", "csv"), (".tsv", "tsv"), (".yml", "yaml"), (".json", "json")):
        (tmp_path / f"p{ending}").write_text(SAME[form])
        assert len(read_prompt_file(tmp_path / f"p{ending}")) == 2
    (tmp_path / "bad.yaml").write_text("- target: a\n  guidence: 4\n")
    with pytest.raises(ValueError, match=r"bad.yaml: Row 1: there is no key 'guidence'. Did you mean 'guidance'"):
        read_prompt_file(tmp_path / "bad.yaml")
    (tmp_path / "p.doc").write_text("x")
    with pytest.raises(ValueError, match=r"prompt files end in .txt"):
        read_prompt_file(tmp_path / "p.doc")


def test_the_peers_files_are_read_and_their_guidance_counts():
    """The slider repository's own files say `guidance: 4`, which its reader drops; p1atdev's say guidance_scale and
    batch_size."""
    (one,) = read_prompts(
        "- target: person\n  positive: old person\n  unconditional: young person\n  neutral: person\n  action: "
        "enhance\n  guidance: 4\n"
    )
    assert one.guidance == 4.0 and one.effective_neutral == "person" and one.effective_positive == "old person"
    (two,) = read_prompts(
        "- target: cat\n  guidance_scale: 1.5\n  batch_size: 2\n  resolution: 512\n  dynamic_resolution: true\n"
    )
    assert (two.guidance, two.batch, two.resolution, two.dynamic_resolution) == (1.5, 2, 512, True)


def test_keys_that_only_other_trainers_read_are_left_out_with_a_note():
    notes = []
    rows = read_prompts(
        "- target: cat\n  rank: 4\n  bucketing: true\n  dynamic_crops: true\n  multiplier: 1.0\n- target: dog\n  Rank: 8\n",
        notes=notes,
    )
    assert rows == (PromptRow("cat"), PromptRow("dog"))
    assert notes == [
        "rank is not read: it is set in the Train node",
        "bucketing is not read: sizes come from resolution and dynamic_resolution",
        "dynamic_crops is not read: images are trained as if they were not cropped",
        "multiplier is not read: strengths are 1 and -1",
    ]


def test_a_key_that_turns_the_direction_is_refused():
    with pytest.raises(ValueError, match=r"Row 1: multiplier is -1.0, .*swap positive and negative"):
        read_prompts("- target: cat\n  positive: big cat\n  multiplier: -1.0\n")


def test_ai_toolkits_list_of_targets_is_read():
    notes = []
    text = "targets:\n- target_class: ''\n  positive: bright\n  negative: dark\n  weight: 2.0\n  shuffle: true\n"
    assert read_prompts(text, notes=notes) == (PromptRow("", "bright", "dark", weight=2.0),)
    assert notes == ["shuffle is not read: prompts stay as they are"]


@pytest.mark.parametrize("text", [
    "- target: ''\n  positive: bright\n  unconditional: dark\n",
    "- target:\n  positive: bright\n  unconditional: dark\n",
    "target,positive,unconditional\n,bright,dark\n",
    "| positive: bright | unconditional: dark",
    '{"target": "", "positive": "bright", "unconditional": "dark"}',
])  # fmt: skip
def test_an_empty_target_is_every_image_where_the_others_give_a_direction(text):
    (row,) = read_prompts(text)
    assert row == PromptRow("", "bright", "dark")
    plus, minus = build_prompt_tasks([row], SHAPES, slider=True)[0].targets
    assert plus.weighted_prompts == ((1.0, ""), (1.0, "bright"), (-1.0, "dark")) and minus.strength == -1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "There are no prompts"),
        ("# only a comment", "There are no prompts"),
        ("- target: ''", "target is empty"),
        ("- target: ''\n  positive: dog\n  unconditional: dog", "no direction to train|target is empty"),
        ("target,guidance\n,2\n", "target is empty"),
        ("- positive: cat", "Row 1 has no target"),
        ("cat | action: remove", "Line 1: action is 'remove'; choose one of erase, enhance, replace"),
        ("cat | guidance: 0", "guidance is 0; it must be above 0, or there is nothing to learn"),
        ("cat | guidance: strong", "guidance is 'strong'; it must be a number"),
        ("cat | guidance: nan", "guidance is nan; it must be above 0"),
        ("cat | weight: -1", "weight is -1"),
        ("cat | batch: 1.5", "batch is '1.5'; it must be a whole number"),
        ("cat | resolution: -8", "resolution is '-8'"),
        ("cat | dynamic_resolution: maybe", "must be true or false"),
        ("cat | strong", "'strong' is not 'key: value'"),
        ("cat -> cat", "write what 'cat' is to become"),
        ("cat | action: replace", "write what 'cat' is to become"),
        ("cat | positive: dog | unconditional: dog", "no direction to train"),
        ("cat | guidance: 1 | guidance_scale: 2", "mean the same"),
        ("target,positive\na,b,c,d\n", "more cells than the header"),
        ("[1, 2]", "list of rows"),
        ('[{"target": ["a"]}]', "it must be text"),
        ("[{", "This is not JSON"),
        ("- target: [", "This is not YAML"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(text)


def test_defaults_fill_what_a_row_leaves_out():
    one, two = read_prompts("cat\ndog | guidance: 3", defaults={"guidance": 2.0, "action": "enhance"})
    assert (one.guidance, two.guidance, one.action) == (2.0, 3.0, "enhance")


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_a_row_becomes_a_task_and_what_it_preserves_others():
    (row,) = read_prompts("red car | positive: red | preserve: blue car; tree | weight: 2")
    erase, *kept = build_prompt_tasks([row], SHAPES, preserve_weight=0.5)
    assert (
        dict((p, w) for w, p in erase.targets[0].weighted_prompts) == {"": 2.0, "red": -1.0}
        and erase.rollout_prompt == "red car"
        and erase.weight == 2.0
    )
    assert [(task.rollout_prompt, task.weight, task.targets[0].weighted_prompts) for task in kept] == [
        ("blue car", 0.5, ((1.0, "blue car"),)),
        ("tree", 0.5, ((1.0, "tree"),)),
    ]


def test_attributes_are_put_before_every_prompt_in_turn():
    (row,) = read_prompts(
        "- target: person\n  positive: old person\n  negative: young person\n  attributes: male, female\n  guidance: "
        "2\n"
    )
    male, female = build_prompt_tasks([row], SHAPES, slider=True)
    assert [pull.strength for pull in male.targets] == [1.0, -1.0]
    assert male.targets[0].weighted_prompts == (
        (1.0, "male person"),
        (2.0, "male old person"),
        (-2.0, "male young person"),
    )
    assert female.rollout_prompt == "female person" and male.weight == female.weight == 0.5


def test_a_goal_that_the_model_reaches_already_is_refused():
    """p1atdev's default for enhance, guidance 1, is: uncond + 1 * (target - uncond), the target itself."""
    with pytest.raises(ValueError, match="nothing would be learnt. Raise guidance above 1"):
        build_prompt_tasks(read_prompts("cat | action: enhance"), SHAPES)
    assert build_prompt_tasks(read_prompts("cat | action: enhance | guidance: 2"), SHAPES)
