"""PSFT on images in Megatron-Bridge's loop, by its recipes, against the plain loop over transformers' model."""

import functools
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoProcessor

from tests.nemo import cpu
from tests.nemo.bridge import assert_same_run, needs_bridge, overrides_of
from tests.support import oracle, tiny
from tests.support.layouts import LAYOUTS

pytestmark = [
    needs_bridge,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed"),
    pytest.mark.slow,
    pytest.mark.both,
]

STEPS, GLOBAL_BATCH_SIZE, INTERVAL, RECORDS = 4, 4, 2, 8
PIXELS = {"min_pixels": 200_704, "max_pixels": 1_003_520}
"""How large Bridge's collator makes an image."""


@pytest.fixture(scope="session")
def seen(tmp_path_factory) -> Path:
    """A folder with the records; models are put there too."""
    from tests.nemo import vision_models

    folder = tmp_path_factory.mktemp("vision")
    vision_models.write_records(folder / "data", RECORDS)
    return folder


@pytest.fixture(scope="session")
def model(seen):
    """The folder of a family's model."""
    from tests.nemo import vision_models

    return functools.cache(lambda family: vision_models.build_model(seen / family, family))


@pytest.fixture(scope="session")
def examples(seen, model):
    """The records, rendered by hand, with what transformers' own processor makes of the drawings."""

    @functools.cache
    def render(family: str) -> list[oracle.Example]:
        from tests.nemo import vision_models

        processor = AutoProcessor.from_pretrained(model(family) / "processor")
        found = []
        for images, question, reply in vision_models.read_records(seen / "data"):
            drawing = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
            asked = f"<|im_start|>user\n{drawing}{question}<|im_end|>\n<|im_start|>assistant\n"
            labelled = f"{reply}<|im_end|>\n"  # Bridge's labels go on to the line's end after a turn's
            inputs = dict(processor(text=[asked + labelled], images=images, return_tensors="pt", **PIXELS))
            ids, labels = inputs.pop("input_ids")[0].tolist(), len(processor.tokenizer(labelled)["input_ids"])
            del inputs["attention_mask"]
            found.append((ids, [False] * (len(ids) - labels) + [True] * labels, inputs))
        return found

    return render


@pytest.fixture(scope="session")
def expected(model, examples):
    """What the oracle says of each step, and its model."""

    @functools.cache
    def train(family: str):
        # The order of Bridge's loader `cyclic`, of one epoch as long as the run.
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(STEPS * GLOBAL_BATCH_SIZE, generator=generator).remainder(RECORDS)
        batches = [[examples(family)[index] for index in step] for step in order.view(STEPS, -1).tolist()]
        return oracle.train(model(family), batches, lr=oracle.PARITY_LR, old_policy_interval=INTERVAL)

    return train


@pytest.fixture
def run(bridge_pool, seen, model, tmp_path):
    """What Bridge says of each step of a run that saves in `tmp_path`, where its export is too."""

    def train(family: str, *overrides: str, layout: str = "one") -> list[dict[str, float]]:
        folder = model(family)
        job = {"family": family, "model": folder, "processor": folder / "processor", "data": seen / "data"}
        own = [f"train.train_iters={STEPS}", f"train.global_batch_size={GLOBAL_BATCH_SIZE}"]
        own += [f"psft.old_policy_interval={INTERVAL}", f"optimizer.lr={oracle.PARITY_LR}", "checkpoint.save=null"]
        overridden = [*own, *(it for it in overrides_of(layout) if not it.startswith("dataset.")), *overrides]
        path, nproc = tmp_path / "job.json", LAYOUTS[layout].world_size
        path.write_text(json.dumps({**job, "save": tmp_path, "overrides": overridden}, default=str))
        for exit in bridge_pool.run(cpu.run, nproc, "tests.nemo.run_vision", [str(path)]):
            assert exit.code == 0, exit.out[-2000:] + exit.err[-8000:]
        return [json.loads(line) for line in (tmp_path / f"bridge_{nproc - 1}.jsonl").read_text().splitlines()]

    return train


UNPACKED = ("dataset.enable_in_batch_packing=false", "dataset.pad_to_max_length=true")
CASES = [
    ("qwen2_5_vl", "TP2", ()),  # as the recipe has it
    ("qwen3_vl", "one", ()),
    ("qwen2_5_vl", "PP2", UNPACKED),  # two rows, which are not contiguous in Bridge
    ("qwen3_vl", "TP2-SP", ()),
]


@pytest.mark.parametrize(("family", "layout", "overrides"), CASES)
def test_bridge_follows_the_oracle_over_two_windows_of_images(
    run, examples, expected, tmp_path, family, layout, overrides
):
    wanted, learned = expected(family)
    assert all(wanted[step]["clip_fraction"] > 0.1 for step in (1, 3)), "the clip must matter in this comparison"
    assert_same_run(run(family, *overrides, layout=layout), wanted)
    events = EventAccumulator(str(tmp_path)).Reload()
    (gap,) = events.Scalars("scoring_gap_max")
    assert gap.value <= 1e-5, "the old policy's pass and training say the same of the same pixels"
    exported = tiny.load_model(tmp_path / "exported", dtype=torch.float32)
    for example in examples(family)[:2]:
        with torch.no_grad():
            (found, _), (log_probs, _) = (oracle.label_statistics(it, *example) for it in (exported, learned))
        torch.testing.assert_close(found, log_probs, atol=1e-3, rtol=0)
