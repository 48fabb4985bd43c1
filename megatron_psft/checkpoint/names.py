"""What former releases called the tensors of a checkpoint, which are read under their present names."""

import re
from dataclasses import replace

from torch.distributed.checkpoint import Metadata

_ROUTER = re.compile(r"(?P<layer>.*)\.mlp\.router\.weight")


def rename(metadata: Metadata) -> None:
    """Gives every tensor of a checkpoint its present name in the table of contents, which says where it lies.

    The norm before a layer's experts was stored as if it were part of a plain MLP, as Megatron-Core's portable layers
    have it; with Transformer Engine it has a name of its own.
    """
    keys = metadata.state_dict_metadata
    renamed = {}
    for key in keys:
        router = _ROUTER.fullmatch(key)
        if router is not None:
            former = f"{router['layer']}.mlp.linear_fc1.layer_norm_weight"
            is_of_plain_mlp = f"{router['layer']}.mlp.linear_fc1.weight" in keys
            if former in keys and not is_of_plain_mlp:
                renamed[former] = f"{router['layer']}.pre_mlp_layernorm.weight"
    if not renamed:
        return
    metadata.state_dict_metadata = {renamed.get(key, key): value for key, value in keys.items()}
    metadata.storage_data = {
        replace(index, fqn=renamed.get(index.fqn, index.fqn)): value for index, value in metadata.storage_data.items()
    }
    if metadata.planner_data is not None:
        metadata.planner_data = {renamed.get(key, key): value for key, value in metadata.planner_data.items()}
