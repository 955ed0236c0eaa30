"""How the tokens of a block are ranked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

import atedm_kernels as kernels
from atedm.policy.attention_map import AttentionMap

# A user-defined ranking: from q, k [B, H, N, D] and lse [B, H, N] of the self-attention to scores [B, H', N].
RankingFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Ranking(Protocol):
    """Scores the tokens of a block; those with the highest scores are kept.

    Attributes:
        is_cross: whether ``scores`` reads the map of the cross-attention, which follows the self-attention.
        iterates: whether the ranking can continue from the scores of an earlier step.
        keeps: which tokens it ranks high, in words.
    """

    is_cross: ClassVar[bool]
    iterates: ClassVar[bool]
    keeps: ClassVar[str]

    def scores(self, attention: AttentionMap, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores ``[B, H, N]``, and int32 iterations ``[B, H]``; the latter None if the ranking does not iterate.

        Args:
            initial: scores of an earlier step, ``[B, H, N]``; None to start from uniform scores, or if the ranking does
                not iterate.
        """
        ...


# Iterations from the scores of an earlier step; from uniform scores there are 5. Overlap (Jaccard index) of the kept
# set with the converged one on the embedded model (quality-fp32-convergence.json in bench/results): if every step
# ranks, 0.976 after 2 iterations and 0.985 after 3, against 0.977 after 5 from uniform scores; with whole and reused
# steps in between, 0.963 and 0.975 against 0.968. In the latter case 2 are too few under DPM++ 2M Karras: 0.889 at
# level 2, against 0.939.
WARM_ITERATIONS = 3


@dataclass(frozen=True)
class _Iterated:
    """A weighted PageRank, computed by the op of ``kernels`` that ``_op`` names."""

    max_iterations: int
    tolerance: float
    iterates: ClassVar[bool] = True
    _op: ClassVar[str]

    def scores(self, attention: AttentionMap, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        most = self.max_iterations if initial is None else min(self.max_iterations, WARM_ITERATIONS)
        return getattr(kernels, self._op)(
            attention.q,
            attention.k,
            attention.lse,
            scale=attention.scale,
            max_iterations=most,
            tolerance=self.tolerance,
            initial=initial,
        )


class PageRank(_Iterated):
    """Weighted PageRank of the self-attention map (AT-EDM, section 3.2), the paper's choice."""

    is_cross: ClassVar[bool] = False
    keeps: ClassVar[str] = "the tokens that the others attend to most, by a PageRank over its attention map"
    _op: ClassVar[str] = "weighted_page_rank"


class CrossPageRank(_Iterated):
    """Weighted PageRank of the cross-attention map (AT-EDM, section 3.2)."""

    is_cross: ClassVar[bool] = True
    keeps: ClassVar[str] = "the tokens that matter most to the text, by its cross-attention"
    _op: ClassVar[str] = "weighted_page_rank_cross"


@dataclass(frozen=True)
class KeyRanking:
    """How unlike all others a token is, by its keys: ``1 / mean_j exp(cos(k_hi, k_hj))``, from 1/e to e (ours).

    It takes one pass over the map, while PageRank takes several.
    """

    is_cross: ClassVar[bool] = False
    iterates: ClassVar[bool] = False
    keeps: ClassVar[str] = "the tokens whose keys are least like those of the others"

    def scores(self, attention: AttentionMap, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        keys = attention.of_unit_keys()
        return kernels.attention_column_sums(keys.q, keys.k, keys.lse, scale=keys.scale).reciprocal(), None


@dataclass(frozen=True)
class CustomRanking:
    """Scores by a user-defined function."""

    function: RankingFunction
    is_cross: ClassVar[bool] = False
    iterates: ClassVar[bool] = False
    keeps: ClassVar[str] = "the tokens that your function scores highest"

    def scores(self, attention: AttentionMap, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, k = attention.q.detach(), attention.k.detach()
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            # If the function breaks the graph, torch returns these from its first part, and fails to make the views.
            q, k = q.clone(), k.clone()
        with torch.no_grad():  # it may have weights that require gradients
            scores = self.function(q, k, attention.lse)
        batch, _, tokens, _ = q.shape
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if not isinstance(scores, Tensor) or scores.ndim != 3 or (shape[0], shape[2]) != (batch, tokens):
            raise ValueError(f"ranking returned {shape}; expected scores [{batch}, heads, {tokens}]")
        return scores, None


# By the name that atedm.apply takes; each is built from max_iterations and tolerance.
RANKINGS: dict[str, Callable[[int, float], Ranking]] = {
    "self": PageRank,
    "cross": CrossPageRank,
    "keys": lambda max_iterations, tolerance: KeyRanking(),
}


def make_ranking(ranking: str | RankingFunction | None, max_iterations: int, tolerance: float) -> Ranking | None:
    """The policy that ``ranking`` names, or one that calls the function ``ranking``; None for None."""
    if ranking is None:
        return None
    if isinstance(ranking, str):
        return RANKINGS[ranking](max_iterations, tolerance)
    return CustomRanking(ranking)
