"""Who of several members may hold how much of a total: the largest equal share that no member leaves unused."""

from collections.abc import Sequence
from typing import NamedTuple

_LEAST_SHARE = 64  # of the total: less that is free is not worth a change


class Claim(NamedTuple):
    """What a member asks for, in bytes.

    wish: what it could use. need: without which its oldest request cannot go on. since_s: when that request became its
    oldest, by a clock that members share.
    """

    wish: int = 0
    need: int = 0
    since_s: float = 0.0


class Holding(NamedTuple):
    """A member's claim, and the bytes that it may have in use."""

    claim: Claim
    held: int


def divide(total: int, claims: Sequence[Claim]) -> list[int]:
    """The share of each claim, in order; together at most `total`.

    Needs are met first, that of the oldest request before others: so it ends, and then the next. What is left is
    divided so that the members with the smallest shares have the most.
    """
    floors, left = [0] * len(claims), total
    for number in sorted(range(len(claims)), key=lambda each: claims[each].since_s):
        floors[number] = min(claims[number].need, left)
        left -= floors[number]
    level, above = 0, total + 1  # the highest level that fits is in [level, above)
    while level + 1 < above:
        middle = (level + above) // 2
        if sum(_shares(middle, claims, floors)) <= total:
            level = middle
        else:
            above = middle
    return _shares(level, claims, floors)


def allowance(total: int, own: Holding, others: Sequence[Holding]) -> int:
    """The bytes that a member may hold from now on: more at once, less as soon as it can.

    Nobody gives up memory unless another one lacks it. What nobody lacks is divided among those who wish for any.
    """
    own_share, *shares = divide(total, [own.claim, *(each.claim for each in others)])
    free = max(0, total - own.held - sum(each.held for each in others))
    lacking = sum(max(0, share - each.held) for share, each in zip(shares, others, strict=True))
    if own.held < own_share:
        return min(own_share, own.held + free)
    if lacking > free:
        return max(own_share, own.held - (lacking - free))
    spare = (free - lacking) // (1 + sum(each.claim.wish > 0 for each in others))
    return own.held + (spare if own.claim.wish and spare >= total // _LEAST_SHARE else 0)


def _shares(level: int, claims: Sequence[Claim], floors: Sequence[int]) -> list[int]:
    return [max(floor, min(level, claim.wish)) for claim, floor in zip(claims, floors, strict=True)]
