"""Divides a total of memory among members by max-min fairness."""

from collections.abc import Sequence
from typing import NamedTuple

_MIN_CHANGE = 64  # spare memory below 1/64 of the total is not worth a change


class Claim(NamedTuple):
    """A member's demand, in bytes.

    wish: what it could use. need: the minimum for its oldest request to continue. since_s: when that request became its
    oldest, by a clock that all members share.
    """

    wish: int = 0
    need: int = 0
    since_s: float = 0.0


class Holding(NamedTuple):
    """A member's claim, and the bytes that it may be using."""

    claim: Claim
    held: int


def divide(total: int, claims: Sequence[Claim]) -> list[int]:
    """The share of each claim, in order; the sum is at most `total`.

    Needs come first, in order of their oldest requests, so that these finish one after the other. The rest is divided
    by max-min fairness.
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
    """The bytes that a member may hold from now on. It may grow at once, and shrinks as soon as it can.

    A member gives up memory only if another member lacks it. Spare memory is divided among members with a wish.
    """
    own_share, *shares = divide(total, [own.claim, *(each.claim for each in others)])
    free = max(0, total - own.held - sum(each.held for each in others))
    lacking = sum(max(0, share - each.held) for share, each in zip(shares, others, strict=True))
    if own.held < own_share:
        return min(own_share, own.held + free)
    if lacking > free:
        return max(own_share, own.held - (lacking - free))
    spare = (free - lacking) // (1 + sum(each.claim.wish > 0 for each in others))
    return own.held + (spare if own.claim.wish and spare >= total // _MIN_CHANGE else 0)


def _shares(level: int, claims: Sequence[Claim], floors: Sequence[int]) -> list[int]:
    return [max(floor, min(level, claim.wish)) for claim, floor in zip(claims, floors, strict=True)]
