"""Options of `push`."""

from typing import Annotated

from pydantic import Field

from mambactl.options.fields import CommandConfig, Shown


class PushConfig(CommandConfig):
    """Upload a checkpoint to the hub."""

    repo: Annotated[str, Shown("REPO", positional=True)] = Field(
        description="org/name on the hub, made if it is not there"
    )
    public: bool = Field(default=False, description="for everybody to read (default: private)")
    dry_run: bool = Field(default=False, description="list the files and send nothing")
