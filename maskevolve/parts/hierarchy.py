"""Every nested partition of one solve: a binary tree of splits for each image."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_whole
from .segmentation import renumber


class PartHierarchy(NamedTuple):
    """Every nested partition of one solve: a binary tree of splits for each image, and the order to make them in.

    Nodes are numbered as in a heap: the whole image is 1, the two sides of node n are 2n and 2n + 1.
    """

    leaves: Tensor
    """[B, N] int64: the deepest node that holds each patch."""
    order: Tensor
    """[B, 2 ** depth] int64: the place of each inner node among the splits, best first; 2 ** depth for no split."""
    num_parts: int
    """The number of parts that the solve was asked for."""

    def cut(self, num_parts: int) -> Tensor:
        """The partition that the best `num_parts - 1` splits give, a child never before its parent.

        Args:
            num_parts: number of parts K that is wanted, from 1 to that of the hierarchy.

        Returns:
            Parts [B, N] as of `GraphCutPartitioner.forward`. Every cut(K) is a coarsening of cut(K + 1).

        Raises:
            ValueError: where num_parts is no whole number, below 1, or above that of the hierarchy.

        Examples:
            >>> from maskevolve import GraphCutPartitioner
            >>> affinity = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))[None]
            >>> GraphCutPartitioner().hierarchy(affinity).cut(2)
            tensor([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
        """
        num_parts, most = check_num_parts(num_parts), self.order.shape[1]
        if num_parts > self.num_parts:
            made_for = f"num_parts={num_parts} is more than the {self.num_parts} parts that this hierarchy was made for"
            raise ValueError(f"{made_for}: make it with hierarchy(affinity, num_parts={num_parts})")
        depth = most.bit_length() - 1
        # The splits that are made lie on the way from the root: their number is the depth of a patch's part.
        ancestors = self.leaves[..., None] >> torch.arange(depth, 0, -1, device=self.leaves.device)
        made = self.order.gather(1, ancestors.flatten(1)).view_as(ancestors) < min(num_parts - 1, most)
        return renumber(self.leaves >> (depth - made.sum(-1)))


def check_num_parts(num_parts: Any, default: int | None = None) -> int:
    """The number of parts of a call, the default where it names none; ValueError where that is no count."""
    num_parts = default if num_parts is None else num_parts
    check_whole("num_parts", num_parts, 1, "how many parts to cut an image into")
    return int(num_parts)
