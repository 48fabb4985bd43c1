"""Labels and masks on their way to the head."""

import pytest
import torch

from tests.nemo.bridge import needs_bridge

pytestmark = needs_bridge


def test_labels_that_do_not_count_are_marked_and_the_rest_of_the_batch_is_as_it_was():
    from megatron_psft.nemo.policy import IGNORED, MarkedLabels

    batch = {
        "tokens": torch.tensor([[5, 6, 7]]),
        "labels": torch.tensor([[6, 7, 0]]),
        "loss_mask": torch.tensor([[0, 1, 0]]),
    }
    (marked,) = MarkedLabels(iter([batch]))
    assert marked["labels"].tolist() == [[IGNORED, 7, IGNORED]]
    assert batch["labels"].tolist() == [[6, 7, 0]], "Bridge may show the batch to another model chunk"
    assert marked["tokens"] is batch["tokens"]


def test_batch_without_labels_passes():
    """As on ranks without the output layer."""
    from megatron_psft.nemo.policy import MarkedLabels

    (marked,) = MarkedLabels(iter([{"tokens": torch.tensor([[5]]), "labels": None, "loss_mask": None}]))
    assert marked == {"tokens": torch.tensor([[5]]), "labels": None, "loss_mask": None}


@pytest.mark.parametrize("label_ids", [[3, 4], [3, 5, 4], [3, 4, 5, 6]], ids=["fewer", "in another order", "more"])
def test_scores_of_other_labels_are_refused(label_ids):
    from megatron_psft.nemo.policy import _log_probs_of

    scored = torch.tensor([[3.0, 4.0, 5.0], [-1.0, -2.0, -3.0]])
    assert _log_probs_of(torch.tensor([3, 4, 5]), scored).tolist() == [-1.0, -2.0, -3.0]
    with pytest.raises(RuntimeError, match="other labels than training got"):
        _log_probs_of(torch.tensor(label_ids), scored)


def test_schedules_find_the_device_of_what_is_scored():
    """They ask for it after a pass that only scores, where the model has experts."""
    from megatron.core.pipeline_parallel.schedules import get_tensor_device

    from megatron_psft.loss.labels import LabelInputs, LabelStats
    from megatron_psft.nemo.policy import PolicyOutput

    ids, stats = torch.tensor([3, 4]), LabelStats(torch.tensor([-1.0, -2.0]), torch.zeros(2))
    output = PolicyOutput(stats=stats, loss=None, label_ids=ids, given=LabelInputs())
    assert get_tensor_device(output) == torch.device("cpu")
    assert output.scored.tolist() == [[3.0, 4.0], [-1.0, -2.0]]
