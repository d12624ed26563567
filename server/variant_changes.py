"""Changes of the set of variants that this API process asked for, until they are done and seen.

The engine answers a change (`VariantChanged`) before the parent has told everybody (`Status`). Who asked is answered
after every API process has said that it goes by the new set, so that the next request finds it, whoever takes it; or
after a while, if one of them hangs.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count

from engine.messages import AddVariant, RemoveVariant, Status, VariantChanged
from server.errors import ApiError

PATIENCE_SECONDS = 5.0
STATUS_OF = {"model_not_found": "model_not_found", "shutting_down": "shutting_down"}  # other codes: variant_conflict


class VariantChanges:
    """Open changes by their id."""

    def __init__(self) -> None:
        self._ids = count(1)
        self._open: dict[int, asyncio.Future[VariantChanged]] = {}
        self._answers: dict[int, tuple[VariantChanged, float]] = {}  # not yet seen by all, and until when to wait

    def ask(self, kind: type[AddVariant] | type[RemoveVariant], name: str) -> AddVariant | RemoveVariant:
        """The command to send; `wait` for its answer."""
        command = kind(next(self._ids), name)
        self._open[command.change_id] = asyncio.get_running_loop().create_future()
        return command

    async def wait(self, command: AddVariant | RemoveVariant) -> VariantChanged:
        """The engine's answer, once all see the change. Raises ApiError for a refusal or the engine's end."""
        try:
            answer = await self._open[command.change_id]
        finally:  # or the client has gone: the change goes on
            self._open.pop(command.change_id, None)
            self._answers.pop(command.change_id, None)
        if answer.code is not None:
            param = "name" if isinstance(command, AddVariant) else None
            raise ApiError(STATUS_OF.get(answer.code, "variant_conflict"), answer.message, param, answer.code)
        return answer

    def answered(self, answer: VariantChanged, status: Status | None) -> None:
        """The engine's word on a change; `status` is the last one."""
        if answer.change_id in self._open:
            self._answers[answer.change_id] = answer, time.monotonic() + PATIENCE_SECONDS
            self.seen(status)

    def seen(self, status: Status | None) -> None:
        """A Status has come: what all go by is done, and so are refusals, which nothing shows."""
        for change_id, (answer, until) in list(self._answers.items()):
            shown = status is not None and status.info is not None and status.info.revision >= answer.revision
            settled = status is not None and (status.settled or time.monotonic() > until)
            if answer.code is not None or (shown and settled):
                del self._answers[change_id]
                future = self._open[change_id]
                if not future.done():
                    future.set_result(answer)

    def fail_all(self, error: ApiError) -> None:
        """The engine is gone."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
