"""Messages between front end, core and workers: immutable and serializable, since each may be a process."""

from sarathi.messages.core import CoreOutput, CoreStats, EngineFacts, RequestUpdate, Resolution, StepReport
from sarathi.messages.memory import CacheCapacity, MemoryStats, PrefixCacheStats
from sarathi.messages.steps import (
    EVERY_KEY,
    NO_CHANGES,
    NO_TOKEN_LEFT,
    NOT_FINITE,
    Arrival,
    Chunk,
    CompletedStep,
    HostTimes,
    NewRequest,
    Portion,
    PrefixChanges,
    PrefixGroup,
    PromptLogprobs,
    SampledToken,
    SchedulerOutput,
    SharedPrefix,
    StepFuture,
    StepResult,
)  # fmt: skip

__all__ = [
    "EVERY_KEY", "NOT_FINITE", "NO_CHANGES", "NO_TOKEN_LEFT", "Arrival", "CacheCapacity", "Chunk", "CompletedStep",
    "CoreOutput", "CoreStats", "EngineFacts", "HostTimes", "MemoryStats", "NewRequest", "Portion",
    "PrefixCacheStats", "PrefixChanges", "PrefixGroup", "PromptLogprobs", "RequestUpdate", "Resolution",
    "SampledToken", "SchedulerOutput", "SharedPrefix", "StepFuture", "StepReport", "StepResult",
]  # fmt: skip
