"""What becomes of an unfinished run's directory when it ends early: it is kept to go on with, or nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import RESUMABLE, DeviceMemoryError, Interrupted, ResumeError, SnpError, first_line
from .libraries import out_of_memory
from .workspace import Workspace


@contextmanager
def kept_for_later(workspace: Workspace | None, left: Callable[[Workspace], str], smaller: str) -> Iterator[None]:
    """Whatever ends the run early, leave what can be gone on with and say so, or nothing at all, and say that, too.

    left: what an unfinished run has to show and how to go on, empty if there is nothing; smaller: what to do where the
    device has not enough memory. What an earlier run has left is never removed here: a wrong option must not cost what
    took days.
    """
    try:
        yield
    except BaseException as error:
        if out_of_memory(error):
            error = DeviceMemoryError(f"the device ran out of memory ({first_line(error)}); {smaller}")
        if workspace is not None and workspace.earlier:
            workspace.keep()
            stays = f"the unfinished run in {workspace.directory} stays"
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"interrupted; {stays}") from error
            if isinstance(error, SnpError):
                raise type(error)(f"{error}; {stays}") from error
            raise error
        there, removed = "" if workspace is None else left(workspace), False
        # The same command can go on from here; after a ResumeError another one can, as its own sentence says.
        resumable = not isinstance(error, SnpError) or isinstance(error, RESUMABLE)
        if workspace is not None:
            if workspace.resumed or (there and (resumable or isinstance(error, ResumeError))):
                workspace.keep()
            else:
                workspace.discard()
                there, removed = "", bool(there)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {there or 'nothing was left behind'}") from error
        if there and resumable and isinstance(error, SnpError):
            raise type(error)(f"{error}; {there}") from error
        if removed and isinstance(error, SnpError):
            raise type(error)(
                f"{error}; what was measured or finished by then is removed: no other run could go on with it"
            ) from error
        raise error
