"""From `config.json` (shape) to Megatron-Core's GPT model (gpt): portable layers, experts, fp8, parameters by name.

May import config, distributed, head."""
