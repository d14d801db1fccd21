"""A score model finds the true score of latents, whatever the task."""

import numpy as np
import pytest
from trainyard.tests.unit.test_score_training import TASK_FIGURES, task_data, task_ratings


@pytest.mark.parametrize(("task", "figure"), TASK_FIGURES.items())
def test_every_task_learns_what_can_be_learnt(task, figure):
    made, ratings, spreads = task_ratings(task)
    assert made.model.info.trained and figure in made.model.info.metrics, made.report
    correlation = np.corrcoef(ratings, [item.score for item in task_data(task).items])[0, 1]
    print(f"{task}: correlation {correlation:.3f}, {figure} {made.model.info.metrics[figure]}")
    assert correlation > 0.6 and min(spreads) >= 0
