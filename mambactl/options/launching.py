"""Options of stages that run as several processes, one per GPU, which the launcher starts."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from mambactl.options.fields import StageConfig


def _several(count: int | None) -> int | None:
    return None if count == 1 else count


Processes = Annotated[int | None, AfterValidator(_several)]


class LaunchConfig(StageConfig):
    """Options of a stage that several processes share."""

    # options for the launcher alone: its processes are told by their environment
    launcher_options: ClassVar[frozenset[str]] = frozenset({"nproc"})

    nproc: Processes = Field(default=None, ge=1, description="processes, one per GPU")

    @property
    def processes(self) -> int:
        """Number of processes that work together."""
        return self.nproc or 1

    @property
    def is_launched(self) -> bool:
        """True if processes are started for it."""
        return self.processes > 1

    @property
    def splits_weights(self) -> bool | None:
        """True if the processes share one set of weights; None: where a GPU cannot hold all."""
        return False

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a GPU per parameter of the model, whole; 0 for a run that cannot be split."""
        return 0
