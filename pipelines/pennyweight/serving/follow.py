"""Following an alias of the registry: a new version is loaded beside the old one, checked, and then served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pennyweight import tracking
from pennyweight.errors import PennyweightError, TrackingError, UsageError
from pennyweight.serving.model import Loaded, Say

CHAMPION, PREVIOUS = "champion", "previous"

#: Loads a version of the model that is followed.
Load = Callable[[str], Awaitable[Loaded]]


class Follower:
    """Keeps an eye on NAME@ALIAS. `swapped` is told of each change: with what was loaded, or None where it failed."""

    def __init__(self, name: str, alias: str, load: Load, swapped: Callable[[Loaded | None], None], say: Say) -> None:
        self.name, self.alias = name, alias
        self._load, self._swapped, self._say = load, swapped, say
        self._serves: str | None = None
        """The version that is served."""
        self._refused: str | None = None
        """The version that the alias names and that could not be served."""
        self._trouble: str | None = None
        """Why the registry could not be asked, so that it is said once."""

    async def start(self) -> Loaded:
        """Load the version that the alias names; a champion that cannot be served leaves the place to `previous`.

        Raises UsageError where there is none, TrackingError where the registry cannot be asked, and what loading raises
        where neither can be served.
        """
        version = await asyncio.to_thread(tracking.version_at, self.name, self.alias)
        if version is None:
            raise UsageError(
                f"{self.name} has no {self.alias}", "`pennyweight promote` makes one; or name a version: models:/NAME/N"
            )
        try:
            loaded = await self._load(version)
        except PennyweightError as error:
            before = await asyncio.to_thread(tracking.version_at, self.name, PREVIOUS)
            if self.alias != CHAMPION or before in (None, version):
                raise
            assert before
            self._say(f"{self.name} version {version}, the {CHAMPION}, cannot be served: {error.message}")
            loaded = await self._load(before)
            self._say(f"serving version {before}, the {PREVIOUS} one, instead")
            self._serves, self._refused = before, version
            self._swapped(None)
            return loaded
        self._serves = version
        return loaded

    async def run(self, seconds: float) -> None:
        """Look at the alias every so many seconds, for ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def look(self) -> None:
        """Serve what the alias names now. Whatever goes wrong, what is served stays."""
        try:
            version = await asyncio.to_thread(tracking.version_at, self.name, self.alias)
        except PennyweightError as error:
            self._tell(f"{error.message}; {self._staying}")
            return
        if version is None:
            self._tell(f"{self.name} has no {self.alias} any more; {self._staying}")
            return
        if version != self._refused:
            self._refused = None
        if version == self._serves or version == self._refused:
            self._trouble = None
            return
        try:
            loaded = await self._load(version)
        except TrackingError as error:  # it may do the next time
            self._tell(f"{error.message}; {self._staying}")
            return
        except Exception as error:
            reason = error.message if isinstance(error, PennyweightError) else f"{type(error).__name__}: {error}"
            self._say(f"{self.name} version {version} cannot be served: {reason}; {self._staying}")
            self._refused = version
            self._swapped(None)
            return
        self._trouble = None
        self._say(f"{self.name} version {version} is served from now on; version {self._serves} ends its requests")
        self._serves = version
        self._swapped(loaded)

    @property
    def _staying(self) -> str:
        return f"version {self._serves} is still served"

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._say(trouble)
        self._trouble = trouble
