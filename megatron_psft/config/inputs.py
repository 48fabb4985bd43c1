"""What a run reads and where its results go: the sections of weights and data. The others are in schema.py."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_psft.config.flags import require_at_least, require_positive
from megatron_psft.config.named_paths import sets_by_name
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Where weights and tokenizer come from, and where results go."""

    load_hf: PathText
    """Hugging Face folder or hub ID with config, tokenizer and safetensors: the model the run starts from."""
    model_source: Literal["auto", "native", "bridge"] = "auto"
    """What builds and converts the model: this package, for the families that it knows (native), or NVIDIA's
    Megatron-Bridge (bridge), on Python 3.12. auto takes bridge for families that are not native alone."""
    random_init: bool = False
    """Read only config and tokenizer from `load_hf` and draw the weights from `seed`. No effect where `save` or `load`
    holds a checkpoint."""
    tokenizer: PathText | None = None
    """Folder or hub ID of the tokenizer and its chat template; `load_hf` if unset."""
    resize_vocab: bool = False
    """Add rows to the embedding and the output layer where the tokenizer has ids without one, each the mean of those
    that there are; such a tokenizer is refused otherwise. No effect on others."""
    save: PathText
    """Run folder: metrics.jsonl, config.yaml and checkpoints. Where it holds one already, the run resumes from it."""
    save_interval: int | None = None
    """Steps between checkpoints; if unset, one is written at the end only."""
    keep_last: int | None = None
    """Number of newest checkpoints to keep in `save`; all if unset."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on; the last one is finished before the run ends."""
    load: PathText | None = None
    """Run folder, or one step folder of it, to go on from in `save`: step, optimizer and place in the data are kept,
    and settings compared as on resume. Or a folder that `psft convert` wrote, whose weights take the place of those of
    `load_hf`. No effect where `save` holds a checkpoint. An objective that compares with the model at the start
    compares with this one."""
    init_from: PathText | None = None
    """Run folder, one step folder of it, or a folder that `psft convert` wrote: a new run starts from its weights
    instead of those of `load_hf`, at step 0 with a new optimizer. Data, objective and layout may be others, the model's
    shape must be the same. No effect where `save` holds a checkpoint. An objective that compares with the model at the
    start compares with this one."""
    export_hf: PathText | None = None
    """Folder that receives the trained model in Hugging Face format; none is written if unset."""
    export_interval: int | None = None
    """Checkpoints of `save_interval` from one that is also exported to the next: of 2, every other one, to
    `step_0000012_hf` beside it in `save`, where it stays whatever `keep_last` says. None is if unset."""
    steal_lock: bool = False
    """Take `save` and `export_hf` at once from a process of another host that holds their lock and is gone; otherwise
    they are free 10 minutes after its last sign of life. A process that lives on this host is never robbed."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "save_interval", "keep_last", "export_interval")
        if self.init_from is not None and self.load is not None:
            raise UserError(
                f"init_from ({self.init_from}) starts a run, load ({self.load}) goes on with one; remove one of them"
            )
        if self.init_from is not None and self.random_init:
            raise UserError(f"random_init (True) has no effect with init_from ({self.init_from}); remove one of them")

    @property
    def reads_hf_weights(self) -> bool:
        """Whether the weights of `load_hf` are asked for, and not only its config and tokenizer."""
        return not self.random_init and self.init_from is None

    @property
    def exports(self) -> bool:
        """Whether the run writes the model in Hugging Face format, at its end or beside checkpoints."""
        return self.export_hf is not None or self.export_steps is not None

    @property
    def export_steps(self) -> int | None:
        """Steps between exports beside checkpoints; None without such exports."""
        if self.save_interval is None or self.export_interval is None:
            return None
        return self.save_interval * self.export_interval

    @property
    def tokenizer_source(self) -> str:
        return self.load_hf if self.tokenizer is None else self.tokenizer


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """How conversations become text."""

    chat_template: PathText | None = None
    """File with the Jinja chat template to use in place of the tokenizer's."""
    chat_template_kwargs: str | None = field(default=None, metadata={"is_json": True})
    """JSON object of variables for the chat template, as '{"enable_thinking": false}'. A row's own win over these."""

    def __post_init__(self) -> None:
        _ = self.template_variables  # raises where they are no object

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables that `chat_template_kwargs` gives."""
        if self.chat_template_kwargs is None:
            return {}
        try:
            variables = json.loads(self.chat_template_kwargs)
        except (ValueError, RecursionError) as error:
            raise UserError(f"chat_template_kwargs ({self.chat_template_kwargs}) must be JSON: {error}") from None
        if not isinstance(variables, dict):
            raise UserError(f"chat_template_kwargs ({self.chat_template_kwargs}) must be a JSON object")
        return variables


@dataclass(frozen=True, kw_only=True)
class DataConfig(TemplateConfig):
    """Records, and how they become tokens and label tokens."""

    data: tuple[PathText, ...]
    """Training records: JSON Lines, JSON or Parquet files, folders of them or written by `datasets`, or hub IDs, of
    which the training split is taken; `FOLDER[:SUB-FOLDER][@SPLIT]` and `ID[:CONFIG][@SPLIT]` name another. `PATH=F`
    takes F passes over a source per epoch, as 2 or 0.3; a fraction is a random part, drawn once from `seed`. With
    objective dpo a record is a preference pair of `chosen` and `rejected`."""
    valid_data: tuple[PathText, ...] = ()
    """Validation records, as for `data`; of several splits one must be named. `NAME=PATH` is a set of its own, with
    metrics `valid_nll/NAME` and `valid_entropy/NAME`; paths without a name are one set. Needs `eval_interval`."""
    eval_interval: int | None = None
    """Steps between evaluations; there is one before the first step, too. Needs `valid_data` or
    `drift_data`."""
    eval_iters: int | None = None
    """Global batches of each set of `valid_data` per evaluation; all of it if unset. Needs `valid_data`."""
    drift_data: tuple[PathText, ...] = ()
    """The initial model's own answers to general prompts, as `psft rollout --drift-set` writes them: how much likelier
    they were to it than to the model in training estimates the divergence from it, metrics `drift` and `drift_stderr`.
    `NAME=PATH` is a set of its own, with metrics `drift/NAME` and `drift_stderr/NAME`; paths without a name are one
    set. Evaluated whole, with `valid_data`. Needs `eval_interval`."""
    stop_at_drift: float | None = None
    """End the run with a checkpoint after an evaluation in which a `drift` is at least this, in nats per token. It goes
    on with a higher value, or without. Needs `drift_data`."""
    seq_length: int = 4096
    """Length of the longest record that is trained on whole, in tokens; `overlong` says what happens to longer ones.
    With packing also the room of a pack. Of a preference pair the longer sequence counts, and a pack has room for twice
    as much."""
    packing: bool = True
    """Put as many records as fit into each sequence of `seq_length` tokens; they do not see each other. Otherwise each
    has a sequence of its own."""
    shuffle: bool = True
    """Draw a new order from `seed` for each epoch. Otherwise records are trained on in file order, and with packing
    packs in the order of their first records; which records share a pack depends on their lengths."""
    overlong: Literal["drop", "truncate", "error"] = "error"
    """What to do with records longer than `seq_length`: leave them out, cut their end off (not of preference pairs), or
    stop."""
    prompt_key: str = "prompt"
    """Name of the prompt in records of prompt and completion; dots go into objects (`extra_info.question`). If set,
    each row must have it, and other forms of records are not read."""
    completion_key: str = "completion"
    """Name of the completion, as `prompt_key` is of the prompt; its default also finds `demonstration`."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows and messages to read as if they were not there. A key that may change what is learned, and that is
    not supported, is refused otherwise."""
    system_prompt: str | None = None
    """System message of all records, instead of their own; each record's if unset."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that count as labels: those of all assistant turns, of the last assistant turn, or of the whole text (not
    of preference pairs, of which only what differs is labels). With all, rows of plain text, `{"text": ...}`, are
    records, too; they need no chat template."""
    keep_reasoning: bool = False
    """Where the chat template drops the reasoning of a turn, render the turn as the last of its own conversation: a
    sequence of its own for each such turn. Otherwise earlier turns that lose their reasoning are no labels, and a
    record whose last turn does is bad."""
    loss_on_empty_think: bool = True
    """Count an empty block of reasoning that the chat template writes before an answer as labels."""
    split_special_tokens: bool = False
    """Take special tokens that stand in a record's own text as plain text. Otherwise they become control tokens."""
    skip_bad_records: bool = False
    """Train without the records that cannot be used, after listing them, instead of stopping."""
    data_cache_dir: PathText = "~/.cache/megatron_psft"
    """Folder that keeps tokenized records for later runs and for the other processes of a node. `psft data --cache
    prune` makes room in it."""
    data_workers: int | None = None
    """Processes on each node that tokenize, the first time; one per usable core, at most 32, if unset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "eval_interval", "eval_iters", "data_workers")
        require_at_least(2, self, "seq_length")  # the shortest sequence with a token to predict
        if self.loss_on == "all" and (self.keep_reasoning or not self.loss_on_empty_think):
            name = "keep_reasoning" if self.keep_reasoning else "no_loss_on_empty_think"
            raise UserError(f"{name} needs loss_on assistant or last, and loss_on is all; change one of them")
        if not self.data:
            raise UserError("data () must name at least one file or folder")
        _ = self.valid_sets, self.drift_sets  # raise for a name that is empty, unfit or given twice
        if self.stop_at_drift is not None:
            require_positive(self, "stop_at_drift")

    @property
    def valid_sets(self) -> dict[str, tuple[str, ...]]:
        """The paths of each set of `valid_data` by its name, which is empty for those without."""
        return sets_by_name("valid_data", self.valid_data)

    @property
    def drift_sets(self) -> dict[str, tuple[str, ...]]:
        """The same of `drift_data`."""
        return sets_by_name("drift_data", self.drift_data)
