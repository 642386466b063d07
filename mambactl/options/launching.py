"""Options of stages that run as several processes, one per GPU, which the launcher starts."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from mambactl.errors import UsageError
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


class DeviceMapConfig(LaunchConfig):
    """Options of a stage that reads models without training them, and may spread each over GPUs."""

    # work is dealt out in parts that one process has too, so that their number decides nothing
    placement_options: ClassVar[frozenset[str]] = LaunchConfig.placement_options | {
        *("nproc", "device_map", "max_memory")
    }

    device_map: Literal["auto", "balanced"] | None = Field(
        default=None,
        description="spread a model over all GPUs, block by block: auto where one is too small, "
        "balanced always",
    )
    max_memory: float | None = Field(
        default=None,
        gt=0,
        description="GB of each GPU for the weights of a model (--device-map); default: 90% of "
        "what is free",
    )

    def require_coherent(self) -> None:
        """Raise UsageError where a device map contradicts other options."""
        super().require_coherent()
        if self.device_map is None:
            if self.max_memory is not None:
                raise UsageError("--max-memory goes with --device-map", "add --device-map auto")
            return
        if self.is_launched:
            raise UsageError(
                "--device-map gives all GPUs to one process, --nproc one to each",
                "drop one: --nproc is faster where a model fits on one GPU",
            )
        if self.device not in ("auto", "cuda"):
            raise UsageError(
                f"--device-map gives all GPUs to a model, --device {self.device} one device",
                "drop one; CUDA_VISIBLE_DEVICES chooses among GPUs",
            )
