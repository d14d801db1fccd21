# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, BROWN, GREEN, VIOLET
from ..workflow_parts import IMAGE_FOLDER

RESULT = "a messy folder checked, without its copies, split, saved"
NOTE = """# A messy folder, checked

1. **Load.** Choose a folder in *Load Dataset*. It may be messy: broken files are reported and skipped, subfolders such as *10_cat* count as repeats.

2. **Check.** *Check Dataset* measures every picture: size, blur, enlarged copies, near-duplicates, contrast, exposure, bars, captions. The sheet shows the worst first, with the figure and the limit. *on_reject* = *drop* takes the unusable ones out with their captions and masks; *flag* only marks them.

3. **Copies.** *Deduplicate* keeps the best of each group of near-duplicates.

4. **Sizes.** *Bucket Dataset* shows at which size every picture would be trained, what is cut off, and which picture would be alone in its size.

5. **Save.** The clean set goes to a new folder in *output/datasets*; *Split Dataset* has put a tenth aside for validation. Your own folder is never changed."""
NOTE_SIZE = (400, 560)


def build(workflow):
    workflow.add_group("1 · Pictures", BLUE, 430, -80, (340, [
        ("load", "TrainyardLoadDataset", 280, IMAGE_FOLDER), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found")]))  # fmt: skip
    workflow.add_group("2 · Check", BROWN, 840, -80, (420, [
        ("check", "TrainyardCheckDataset", 640, {"on_reject": "drop"}, {"dataset": "load.dataset"}),
        ("told", "PreviewAny", 260, {}, {"source": "check.report"}, "What is wrong")]))  # fmt: skip
    workflow.add_group("3 · Copies and sizes", VIOLET, 1330, -80,
        (380, [("copies", "TrainyardDeduplicateDataset", 460, {}, {"dataset": "check.dataset"}),
               ("sizes", "TrainyardBucketDataset", 440, {}, {"dataset": "copies.dataset"})]),
        (340, [("kept", "PreviewAny", 180, {}, {"source": "copies.report"}, "What was kept"),
               ("cut", "PreviewAny", 240, {}, {"source": "sizes.report"}, "What is cut")]))  # fmt: skip
    workflow.add_group("4 · Look and save", GREEN, 2140, -80, (400, [
        ("split", "TrainyardSplitDataset", 220, {}, {"dataset": "copies.dataset"}),
        ("look", "TrainyardPreviewDataset", 420, {}, {"dataset": "split.train"}),
        ("save", "TrainyardSaveDataset", 260, {"name": "my_clean_pictures"}, {"dataset": "split.train"})]))  # fmt: skip
