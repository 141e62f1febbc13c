"""A teacher whose weights are divided among the processes, for one that does not fit beside the student.

FSDP2 by segments of the graph: each process keeps its share of every weight; a segment's weights are gathered
when it runs and let go behind it.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh

from sqakd_fx.engine.segments import segmented


def sharded(teacher: fx.GraphModule, device: torch.device) -> nn.Module:
    """A module that computes what `teacher`, which may still be on the CPU, does; its weights become shares.

    Every process has to call it as often as the others. A weight that several segments read stays whole in
    each process.
    """
    from torch.distributed.fsdp import fully_shard  # a second and a half to import

    made = segmented(teacher, lambda segment: segment)
    readers = Counter(id(p) for part in made.children() for p in part.parameters())
    shared = {p for p in made.parameters() if readers[id(p)] > 1 or not p.ndim}
    for parameter in made.parameters():
        if parameter in shared:
            parameter.data = parameter.data.to(device)
        else:
            parameter.data = parameter.data.contiguous()  # FSDP2 divides no channels-last weights
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in made.children():
        part.requires_grad_(False)
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=shared)
    return made
