"""Find the extra that provides a missing package."""

import re
from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "sarathi-vattention"
_REQUIREMENT = re.compile(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]")
_DISTRIBUTIONS = {"zmq": "pyzmq", "flashinfer": "flashinfer-python", "prometheus_client": "prometheus-client"}


def name_extra(error: Exception) -> str | None:
    """The pip command for a failed import of an extra's package; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.partition(".")[0]
    extra = _extra_of(_DISTRIBUTIONS.get(module, module))
    return f"{module} is not installed: pip install '{DISTRIBUTION}[{extra}]'" if extra else None


def _extra_of(package: str) -> str | None:
    """The extra that lists the package; "dev" only if no other does."""
    try:
        found = [_REQUIREMENT.match(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return None
    extras = [each[2] for each in found if each and each[1].lower() == package.lower()]
    return next(iter(sorted(extras, key=lambda extra: extra == "dev")), None)
