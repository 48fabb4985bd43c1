"""Bridge's training batches, read ahead of training through a loader of our own."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.bridge.data.batch_utils import prepare_finetuning_batch
from megatron.bridge.data.iterator_utils import make_data_iterator_list
from megatron.bridge.data.loaders import get_train_valid_test_num_samples, setup_data_iterators
from megatron.bridge.data.utils import get_dataset_provider
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection


class BatchesAhead:
    """The same global batches that training gets, as Bridge's samplers follow from the number of samples before them.

    Bridge does not hand out the training iterator, so that this is a second one, made by the same functions from the
    same configuration. It only goes forward.
    """

    def __init__(self, state: GlobalState, chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> None:
        self._state = state
        self._chunks = chunks
        self._groups = groups
        self._iterator: Iterator[Any] | None = None
        self._next_step = 0

    def micro_batches(self, step: int) -> tuple[Any, int]:
        """This rank's part of global batch `step` (from 0), which must not lie before the last one asked for.

        Returns:
            What Megatron-Core's schedules take: an iterator over micro-batches, or one for each model chunk; and the
            length of their rows.
        """
        if self._iterator is None:
            self._iterator, self._next_step = self._open_at(step), step
        assert step >= self._next_step, "the loader has passed this step"
        while self._next_step < step:
            for _ in range(1 if self._has_global_batches else get_num_microbatches()):
                next(self._iterator)
            self._next_step += 1
        self._next_step += 1
        return self._split(self._iterator)

    @property
    def _has_global_batches(self) -> bool:
        """Whether the loader yields a rank's part of a global batch at a time, and not a micro-batch."""
        return self._state.cfg.dataset.dataloader_type == "batch"

    def _split(self, iterator: Iterator[Any]) -> tuple[Any, int]:
        """As Bridge's `train_step` does it."""
        micro_batches, seq_length = iterator, self._state.cfg.model.seq_length
        if self._has_global_batches:
            micro_batches, seq_length = prepare_finetuning_batch(
                data_iterator=iterator, num_microbatches=get_num_microbatches(), default_seq_length=seq_length
            )
        else:
            # The chunks of an interleaved pipeline share what they have read ahead; it must end with the step.
            micro_batches = iter([next(iterator) for _ in range(get_num_microbatches())])
        return make_data_iterator_list(model=self._chunks, data_iterator=micro_batches), seq_length

    def _open_at(self, step: int) -> Iterator[Any]:
        config, train_state = self._state.cfg, copy.copy(self._state.train_state)
        train_state.consumed_train_samples += (step - train_state.step) * config.train.global_batch_size
        train_set, *_ = self._dataset_provider()(get_train_valid_test_num_samples(config), config.dataset)
        iterator, *_ = setup_data_iterators(
            cfg=config,
            train_state=train_state,
            model_length=len(self._chunks),
            train_valid_test_datasets_provider=lambda *_: (train_set, None, None),
            dp_group=self._groups.dp,
        )
        return iterator

    def _dataset_provider(self) -> Callable[..., Any]:
        """Bridge's function for the kind of data set, with what it wants to know."""
        provider = get_dataset_provider(self._state.cfg.dataset)
        wanted = inspect.signature(provider).parameters
        known: dict[str, Any] = {"pg_collection": self._groups}
        if "tokenizer" in wanted:
            known["tokenizer"] = build_tokenizer(self._state.cfg.tokenizer)
        given = {name: value for name, value in known.items() if name in wanted}
        return lambda *args: provider(*args, **given)
