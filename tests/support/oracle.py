"""The oracle: Proximal SFT from its formulas, in plain PyTorch on one process, which the trainer must agree with.

It shares no code with the package, and it is slow on purpose: one record per forward pass, so that there is no padding,
packing or sharding to get wrong.
"""

import copy
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tests.support import tiny

Example = tuple[list[int], list[bool]] | tuple[list[int], list[bool], Mapping[str, Tensor]]
"""Token ids of a record, and which of them are labels: predicted from the tokens before them; then what the model takes
besides the ids, such as pixels, if anything."""

PARITY_LR = 5e-4
"""Within a window of 4 steps at this rate a tiny model clips many tokens, and yet a relative error of 1e-7 in its
weights stays below 1e-5 in every mean and gradient norm of 12 steps. At twice the rate it does not: Adam moves elements
with next to no gradient as far as all others."""


def train(
    hf_dir: Path,
    batches: Iterable[Sequence[Example]],
    *,
    lr: float | Callable[[int], float],
    objective: str = "psft",
    clip_ratio_high: float = 0.28,
    old_policy_interval: int | Literal["fixed"] = 8,
    sft_warmup_iters: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_grad: float = 1.0,
    adapter: Path | None = None,
) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """Trains the checkpoint in fp32, one optimizer step per global batch; returns every step's metrics, and the model.

    `lr` is a constant or a function of the step, which counts from 1. With the folder of an `adapter` it is this alone
    that is trained, by `peft`.
    """
    model = load_model(hf_dir)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), betas=betas, eps=adam_eps)
    old_model = None
    initial_model = copy.deepcopy(model) if objective in ANCHORED else None
    history = []
    for step, batch in enumerate(batches, start=1):
        proximal_steps = step - 1 - sft_warmup_iters  # taken so far
        if objective == "psft" and proximal_steps >= 0 and _starts_window(proximal_steps, old_policy_interval):
            old_model = copy.deepcopy(model)
        is_warmup = objective == "psft" and proximal_steps < 0
        loss_of = functools.partial(token_losses, "sft" if is_warmup else objective, clip_ratio_high=clip_ratio_high)
        metrics = _accumulate_gradients(model, old_model, initial_model, batch, loss_of, clip_ratio_high)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = lr(step) if callable(lr) else lr
        optimizer.step()
        optimizer.zero_grad()
        history.append({"step": step, **metrics, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]})
    return history, model


def load_model(hf_dir: Path) -> torch.nn.Module:
    """The checkpoint in fp32 with the attention that is written out in Python, and all of the gradient: transformers
    leaves out what the embedding of `pad_token_id` gets as an input, also where that token ends a turn."""
    model = tiny.load_model(hf_dir, dtype=torch.float32, attn_implementation="eager")
    model.get_input_embeddings().padding_idx = None
    return model


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]  # a tied matrix only once
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() == 1], "weight_decay": 0.0},
    ]


def _starts_window(proximal_steps: int, old_policy_interval: int | str) -> bool:
    if old_policy_interval == "fixed":
        return proximal_steps == 0
    return proximal_steps % old_policy_interval == 0


def _accumulate_gradients(
    model: torch.nn.Module,
    old_model: torch.nn.Module | None,
    initial_model: torch.nn.Module | None,
    batch: Sequence[Example],
    loss_of: Callable[..., Tensor],
    clip_ratio_high: float,
) -> dict[str, float]:
    """Adds the gradient of the token mean of `loss_of` over the global batch to the parameters."""
    label_tokens = sum(sum(label_mask) for _, label_mask, *_ in batch)
    columns: dict[str, list[Tensor]] = {"loss": [], "nll": [], "entropy": [], "ratio": [], "clipped": [], "kl": []}
    with torch.no_grad():
        nll_z = nll_z_of([label_statistics(model, *example)[0] for example in batch])
    for example, z in zip(batch, nll_z, strict=True):
        distribution, labels = label_distributions(model, *example)
        log_probs, entropy = distribution.gather(1, labels[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)
        old_log_probs, initial_log_probs = log_probs.detach(), None
        with torch.no_grad():
            if old_model is not None:
                old_log_probs, _ = label_statistics(old_model, *example)
            if initial_model is not None:
                initial_log_probs, _ = label_statistics(initial_model, *example)
        ratio = torch.exp(torch.clamp(log_probs - old_log_probs, -20, 20))
        known = {"old_log_probs": old_log_probs, "ref_log_probs": initial_log_probs, "nll_z": z}
        losses = loss_of(distribution, labels, **known)
        (losses.sum() / label_tokens).backward()
        exact = ratio.detach().double()  # near r = 1 the divergence is a small difference of large numbers
        values = (losses, -log_probs, entropy, exact, exact > 1 + clip_ratio_high, exact - 1 - torch.log(exact))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value.detach().double())
    table = {name: torch.cat(column) for name, column in columns.items()}
    return {
        **{name: float(table[name].mean()) for name in ("loss", "nll", "entropy")},
        "ratio_mean": float(table["ratio"].mean()),
        **{f"ratio_p{percent:02}": nearest_rank(table["ratio"], percent) for percent in (5, 50, 95)},
        "ratio_max": float(table["ratio"].max()),
        "clip_fraction": float(table["clipped"].mean()),
        "approx_kl": float(table["kl"].mean()),
        "tokens": sum(len(ids) - 1 for ids, *_ in batch),  # the last one predicts nothing
        "label_tokens": label_tokens,
        "records": len(batch),
    }


def nearest_rank(values: Tensor, percent: int) -> float:
    """The least of the values that at least `percent` % of them do not exceed."""
    return float(values.sort().values[math.ceil(percent * len(values) / 100) - 1])


def label_statistics(
    model: torch.nn.Module, ids: list[int], label_mask: list[bool], seen: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label token, and entropy in nats of the distribution it was drawn from: both [labels]."""
    log_distribution, labels = label_distributions(model, ids, label_mask, seen)
    entropy = -(log_distribution.exp() * log_distribution).sum(dim=-1)
    return log_distribution.gather(1, labels[:, None])[:, 0], entropy


def label_distributions(
    model: torch.nn.Module, ids: list[int], label_mask: list[bool], seen: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the whole vocabulary where a label is predicted, [labels, vocabulary], and the labels."""
    assert not label_mask[0], "nothing comes before the first token to predict it from"
    logits = model(input_ids=torch.tensor([ids]), **(seen or {})).logits[0, :-1]
    is_label = torch.tensor(label_mask[1:])
    return torch.log_softmax(logits.float(), dim=-1)[is_label], torch.tensor(ids[1:])[is_label]


ANCHORED = ("sft-kl", "iw-sft", "asft")
"""Objectives that compare with the initial model."""


def token_losses(
    objective: str,
    log_distribution: Tensor,
    labels: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    ref_distribution: Tensor | None = None,
    nll_z: float | Tensor = 0.0,
    advantage: float = 1.0,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
    kl_coef: float = 0.5,
    kl_top_k: int = 0,
    p_power_q: float = 1.0,
    tv_threshold: float = 0.15,
    tv_ratio_cap: float = 20.0,
    cadft_beta: float = 1.0,
    **settings: object,
) -> Tensor:
    """The loss of each label token of one record, as papers have it, from [labels, vocabulary] log-probabilities."""
    log_probs = log_distribution.gather(1, labels[:, None])[:, 0]
    probs = log_probs.exp()
    if objective == "sft":
        return -advantage * log_probs
    if objective == "psft":
        ratio = torch.exp(torch.clamp(log_probs - old_log_probs, -20, 20))
        bounded = torch.clamp(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
        return -torch.minimum(ratio * advantage, bounded * advantage)
    if objective == "dppo-tv":
        old_probs = old_log_probs.exp()
        change = (probs - old_probs).detach() * (1 if advantage > 0 else -1)  # towards where the advantage pulls
        capped = torch.minimum((probs / old_probs).detach(), torch.full_like(probs, tv_ratio_cap))
        return torch.where(change <= tv_threshold, -advantage * capped * log_probs, 0.0 * log_probs)
    if objective in ("sft-kl", "asft"):
        plain = -log_probs if objective == "sft-kl" else -probs.detach() * log_probs
        if kl_top_k:
            return plain + kl_coef * _divergence(ref_distribution, log_distribution, kl_top_k)
        reverse_ratio = ref_log_probs.exp() / probs
        return plain + kl_coef * (reverse_ratio - 1 - torch.log(reverse_ratio))
    if objective == "cadft":
        incompatibility = torch.clamp(torch.as_tensor(nll_z), min=0)
        return -torch.exp(-cadft_beta * incompatibility) * probs.detach() * log_probs
    if objective == "p-power":
        return (1 - probs**p_power_q) / p_power_q
    if objective == "deft":
        exponent = log_distribution.detach().exp().square().sum(dim=1)
        return (1 - probs**exponent) / exponent
    weights = _token_weights(objective, log_distribution.detach(), probs.detach(), ref_log_probs, **settings)
    return -weights * log_probs


def _divergence(initial: Tensor, current: Tensor, top_k: int) -> Tensor:
    """KL(initial || current) of [labels, vocabulary] log-probabilities, all but the initial `top_k` as one token."""
    order = initial.argsort(dim=1, descending=True)
    first, second = (
        torch.cat([part[:, :top_k], part[:, top_k:].logsumexp(dim=1, keepdim=True)], dim=1)
        for part in (initial.gather(1, order), current.gather(1, order))
    )
    return (first.exp() * (first - second)).sum(dim=1)


def _token_weights(
    objective: str,
    log_distribution: Tensor,
    probs: Tensor,
    ref_log_probs: Tensor | None,
    *,
    iw_level: str = "sequence",
    eaft_alpha: float = 1.0,
    trsft_alpha: float = 0.1,
    profit_threshold: float = 0.1,
) -> Tensor:
    """What the objectives that weigh cross-entropy multiply it with."""
    if objective == "dft":
        return probs
    if objective == "eaft":
        top = log_distribution.exp().sort(dim=1, descending=True).values[:, :20]
        top = top / top.sum(dim=1, keepdim=True)
        return (-(top * top.log()).sum(dim=1) / 3) ** eaft_alpha
    if objective == "trsft":  # grad p / max(p, alpha), and grad p is p times grad log p
        return torch.where(probs >= trsft_alpha, torch.ones_like(probs), probs / trsft_alpha)
    if objective == "profit":
        return (probs >= profit_threshold).to(probs.dtype)
    assert objective == "iw-sft", objective
    if iw_level == "token":
        return torch.clamp(probs / ref_log_probs.exp(), 0.2, 1.8)
    mean = (probs.log() - ref_log_probs).sum() / max(len(probs), 1)
    return torch.clamp(torch.exp(2 * mean), 0, 16)


def nll_z_of(log_probs: Sequence[Tensor]) -> list[float]:
    """How far the mean NLL of each record lies above that of the batch, in standard deviations of these means."""
    means = [float(-record.double().mean()) if len(record) else None for record in log_probs]
    known = [mean for mean in means if mean is not None]
    center, spread = statistics.fmean(known), statistics.pstdev(known)
    return [0.0 if mean is None else (mean - center) / (spread + 1e-6) for mean in means]


def aggregate(losses: Sequence[Tensor], loss_aggregation: str) -> Tensor:
    """The loss of a batch from the token losses of each of its records."""
    labelled = [record for record in losses if len(record)]
    if loss_aggregation == "token-mean":
        return torch.cat(labelled).mean()
    per_record = [record.mean() if loss_aggregation == "seq-mean-token-mean" else record.sum() for record in labelled]
    return torch.stack(per_record).mean()


def chatml_example(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Renders ChatML by hand; labels are the content of the assistant's messages and the `<|im_end|>` after it."""
    ids: list[int] = []
    label_mask: list[bool] = []
    for message in messages:
        pieces = (f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>", "\n")
        for index, piece in enumerate(pieces):
            piece_ids = tokenizer.encode(piece, add_special_tokens=False)
            ids += piece_ids
            label_mask += [index == 1 and message["role"] == "assistant"] * len(piece_ids)
    return ids, label_mask


def chatml_batches(
    path: Path, tokenizer: PreTrainedTokenizerBase, global_batch_size: int, steps: int
) -> Iterator[list[Example]]:
    """The first `steps` global batches of a file of `{"messages"}` records in file order, starting over at its end."""
    with open(path, encoding="utf-8") as file:
        examples = [chatml_example(json.loads(line)["messages"], tokenizer) for line in file]
    for step in range(steps):
        first = step * global_batch_size
        yield [examples[index % len(examples)] for index in range(first, first + global_batch_size)]
