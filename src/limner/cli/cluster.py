"""The dask cluster that a command is told to compute on."""

from __future__ import annotations

from importlib.util import find_spec

SECONDS_TO_ANSWER = 10  # within which a cluster's scheduler must


def check_scheduler(address: str) -> None:
    """Raise ValueError where dask.distributed is not installed, or no scheduler answers at an address."""
    if find_spec("distributed") is None:
        raise ValueError("--scheduler: distributed is not installed; pip install limner[cluster], or leave it out")
    from distributed import Client

    try:
        Client(address, timeout=SECONDS_TO_ANSWER, set_as_default=False).close()
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())
        raise ValueError(
            f"--scheduler: {address} does not answer ({found}); give the address of a dask scheduler that runs"
        ) from None
