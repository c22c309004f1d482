"""Scores of all experts, and the choice among them, in one kernel: a program for each token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _choose(
    logits,
    correction,
    shares,
    chosen,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTION: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < EXPERTS
    values = tl.load(logits + token * EXPERTS + expert, mask=inside, other=float("-inf"))
    values = values.to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(values)
    else:
        powers = tl.exp(values - tl.max(values, axis=0))
        scores = powers / tl.sum(powers, axis=0)
    ranked = scores
    if CORRECTION:
        ranked += tl.load(correction + expert, mask=inside, other=0.0).to(tl.float32)
    ranked = tl.where(inside, ranked, float("-inf"))
    if GROUPS > 1:
        group = expert // (EXPERTS // GROUPS)
        strengths = tl.full([BLOCK], float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            mine = tl.where(group == g, ranked, float("-inf"))
            strength = tl.max(mine, axis=0)
            if CORRECTION:
                # The two best ones.
                first = tl.argmax(mine, axis=0)
                strength += tl.max(tl.where(expert == first, float("-inf"), mine), axis=0)
            strengths = tl.where(expert == g, strength, strengths)
        allowed = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.argmax(strengths, axis=0)
            allowed |= group == best
            strengths = tl.where(expert == best, float("-inf"), strengths)
        ranked = tl.where(allowed, ranked, float("-inf"))
    choice = tl.arange(0, CHOICES)
    taken = tl.zeros([CHOICES], dtype=tl.float32)
    number = tl.zeros([CHOICES], dtype=tl.int32)
    for i in tl.static_range(TOP_K):
        # Of values that are no numbers any would be the largest, also one beyond the last.
        best = tl.minimum(tl.argmax(ranked, axis=0), EXPERTS - 1)
        score = tl.sum(tl.where(expert == best, scores, 0.0), axis=0)
        taken = tl.where(choice == i, score, taken)
        number = tl.where(choice == i, best, number)
        ranked = tl.where(expert == best, float("-inf"), ranked)
    if RENORMALIZE:
        taken = taken / tl.sum(taken, axis=0)
    at = token * TOP_K + choice
    tl.store(shares + at, taken * scale, mask=choice < TOP_K)
    tl.store(chosen + at, number.to(tl.int64), mask=choice < TOP_K)


def choose(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool,
    sigmoid: bool = False,
    correction: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What `models.routing.Router` makes of its logits; of equals the first expert is chosen.

    Args:
        logits: [tokens, experts], contiguous.
        top_k: experts of a token.
        renormalize: whether what they count sums to one, before it is scaled.
        sigmoid: scores are sigmoids, and not a softmax.
        correction: [experts], added to scores where experts are chosen.
        groups: of experts, side by side.
        top_groups: those that a token's experts are in.
        scale: what the shares are multiplied by.

    Returns:
        What each chosen expert counts, float32, and its number, int64: [tokens, top_k] each.
    """
    tokens, experts = logits.shape
    shares = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    if not tokens:
        return shares, chosen
    assert logits.is_contiguous()
    _choose[(tokens,)](
        logits,
        logits if correction is None else correction,
        shares,
        chosen,
        scale,
        EXPERTS=experts,
        TOP_K=top_k,
        SIGMOID=sigmoid,
        CORRECTION=correction is not None,
        GROUPS=groups,
        TOP_GROUPS=top_groups,
        RENORMALIZE=renormalize,
        BLOCK=max(triton.next_power_of_2(experts), triton.next_power_of_2(groups)),
        CHOICES=triton.next_power_of_2(top_k),
        num_warps=1,
    )
    return shares, chosen
