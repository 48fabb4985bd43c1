"""Small files of records, and data sets of them by way of a cache that lies beside them."""

import json
from pathlib import Path

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.dataset import TokenizedDataset, build_dataset
from tests.data import toys
from tests.data.toys import byte_tokenizer

TOKENIZER = byte_tokenizer(toys.CHATML)


def write_data(path: Path, count: int, *, bad_every: int = 10**9) -> Path:
    rows = [{"prompt": f"{i}?", "completion": "x" * (i % 7 + 1)} for i in range(count)]
    lines = ["{" if i % bad_every == bad_every - 1 else json.dumps(row) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    return path


def build(data: Path, tokenizer=TOKENIZER, **changes: object) -> TokenizedDataset:
    config = DataConfig(data=(str(data),), **({"data_cache_dir": str(data.parent / "cache")} | changes))
    return build_dataset(config.data, tokenizer, config, seed=0, show_progress=False, field="data")
