"""Limits of the queue, and when a refused caller should come back."""

import pytest

from sarathi.engine.admission import Admission, OverloadedError, QueueLimits


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_full_queue_refuses_and_takes_again_when_one_has_started() -> None:
    admission = Admission(QueueLimits(max_requests=2))
    admission.enter("a")
    admission.enter("b")
    with pytest.raises(OverloadedError, match="2 requests are waiting: the limit is 2"):
        admission.enter("c")
    admission.start("a")
    admission.enter("c")
    assert admission.num_waiting == 2


def test_prompt_tokens_are_limited_in_sum_but_a_prompt_alone_may_be_longer() -> None:
    admission = Admission(QueueLimits(max_prompt_tokens=10))
    for name, length in (("long", 50), ("short", 1)):
        admission.enter(name)
        if name == "long":
            admission.set_length(name, length)
    with pytest.raises(OverloadedError, match="51 prompt tokens would be waiting: the limit is 10"):
        admission.set_length("short", 1)
    assert admission.leave("long") and not admission.leave("long")
    admission.set_length("short", 10)


def test_retry_after_is_the_time_in_which_as_many_started() -> None:
    clock = Clock()
    admission = Admission(QueueLimits(max_requests=4), clock)
    for number in range(4):
        admission.enter(str(number))
    for number in range(4):  # one every 2 s
        clock.now_s += 2
        admission.start(str(number))
        admission.enter(f"next {number}")
    clock.now_s += 2
    with pytest.raises(OverloadedError) as refused:
        admission.enter("refused")
    assert refused.value.retry_after_s == 8


def test_retry_after_is_a_minute_where_nothing_has_started() -> None:
    admission = Admission(QueueLimits(max_requests=1))
    admission.enter("a")
    with pytest.raises(OverloadedError) as refused:
        admission.enter("b")
    assert refused.value.retry_after_s == 60


def test_each_completion_counts() -> None:
    admission = Admission(QueueLimits(max_requests=4, max_prompt_tokens=100))
    admission.enter("a", n=3)
    admission.set_length("a", 30)
    with pytest.raises(OverloadedError, match="3 requests are waiting: the limit is 4"):
        admission.enter("b", n=2)
    admission.enter("c")
    with pytest.raises(OverloadedError, match="101 prompt tokens would be waiting: the limit is 100"):
        admission.set_length("c", 11)
    admission.set_length("c", 10)
    admission.start("a")
    assert admission.num_waiting == 1
