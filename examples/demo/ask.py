"""Asks a model: one question, or a chat on the terminal until the end of input.

python examples/demo/ask.py runs/demo/psft/hf "What is the capital of France?"
python examples/demo/ask.py runs/demo/psft/hf
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Chat = list[dict[str, str]]


class Model:
    """A Hugging Face model with its tokenizer, which answers with its most probable tokens."""

    def __init__(self, folder: str | Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging

        logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self._network = network.to("cuda" if torch.cuda.is_available() else "cpu")

    def answers(self, chats: Sequence[Chat], *, max_new_tokens: int, batch_size: int = 16) -> Iterator[str]:
        """The next turn of each chat, in their order."""
        for start in range(0, len(chats), batch_size):
            yield from self._batch(chats[start : start + batch_size], max_new_tokens)

    def _batch(self, chats: Sequence[Chat], max_new_tokens: int) -> list[str]:
        tokenizer = self._tokenizer
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(self._network.device)
        output = self._network.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def main(argv: Sequence[str]) -> int:
    if not argv:
        print(__doc__)
        return 2
    model, chat = Model(argv[0]), []
    for question in [" ".join(argv[1:])] if argv[1:] else _typed():
        chat.append(user(question))
        (answer,) = model.answers([chat], max_new_tokens=200)
        print(answer, flush=True)
        chat.append({"role": "assistant", "content": answer})
    return 0


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
