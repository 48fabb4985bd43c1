"""Files to records, tokens, packs and micro-batches; each batch follows from its step, the seed and the files alone.

May import config, distributed."""
