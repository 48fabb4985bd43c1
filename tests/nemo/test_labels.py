"""Labels and masks on their way to the head."""

import pytest
import torch

from tests.nemo.bridge import needs_bridge

pytestmark = needs_bridge


def test_labels_that_do_not_count_are_marked_and_the_rest_of_the_batch_is_as_it_was():
    from megatron_psft.nemo.labels import IGNORED, MaskedLabels

    batch = {
        "tokens": torch.tensor([[5, 6, 7]]),
        "labels": torch.tensor([[6, 7, 0]]),
        "loss_mask": torch.tensor([[0, 1, 0]]),
    }
    (marked,) = MaskedLabels(iter([batch]))
    assert marked["labels"].tolist() == [[IGNORED, 7, IGNORED]]
    assert batch["labels"].tolist() == [[6, 7, 0]], "Bridge may show the batch to another model chunk"
    assert marked["tokens"] is batch["tokens"]


def test_batch_without_labels_passes():
    """As on ranks without the output layer."""
    from megatron_psft.nemo.labels import MaskedLabels

    (marked,) = MaskedLabels(iter([{"tokens": torch.tensor([[5]]), "labels": None, "loss_mask": None}]))
    assert marked == {"tokens": torch.tensor([[5]]), "labels": None, "loss_mask": None}


def question_about_scored_labels():
    from megatron_psft.config.schema import ObjectiveConfig
    from megatron_psft.nemo.labels import MaskedQuestion, ScoredLabels
    from megatron_psft.objectives.objective import Objective

    scored = ScoredLabels(torch.tensor([3, 4, 5], dtype=torch.int32), torch.tensor([-1.0, -2.0, -3.0]))
    return MaskedQuestion(Objective(config=ObjectiveConfig()), iter([scored]))


def test_question_has_the_scores_of_the_labels_that_count():
    question = question_about_scored_labels()
    inputs = question(torch.tensor([[3, -100, 4, 5]]))
    assert inputs.labels.tolist() == [[3, 0, 4, 5]]
    assert inputs.label_positions.tolist() == [0, 2, 3]
    assert question.label_ids.tolist() == [3, 4, 5]
    assert question.given.old_log_probs.tolist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("label_ids", [[3, 4], [3, 5, 4], [3, 4, 5, 6]], ids=["fewer", "in another order", "more"])
def test_question_about_other_labels_than_were_scored_is_refused(label_ids):
    with pytest.raises(RuntimeError, match="other labels than training got"):
        question_about_scored_labels()(torch.tensor([label_ids]))


def test_schedules_find_the_device_of_what_is_scored():
    """They ask for it after a pass that only scores, where the model has experts."""
    from megatron.core.pipeline_parallel.schedules import get_tensor_device

    from megatron_psft.head.layer import HeadOutput
    from megatron_psft.objectives.labels import LabelStats

    output = HeadOutput(stats=LabelStats(torch.tensor([-1.0, -2.0]), torch.zeros(2)), loss=None)
    assert get_tensor_device(output) == torch.device("cpu")
