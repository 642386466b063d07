"""From jobs under way to a reply: whole, or as a stream; a client that leaves ends them."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mambactl.serving.answer_text import AnswerText, Piece
from mambactl.serving.refusals import Refused
from mambactl.serving.reply_format import DONE, Answer, ReplyFormat, Usage, sent_event
from mambactl.serving.request_fields import SamplingFields
from mambactl.serving.service import Service
from mambactl.serving.tool_calls import ToolCall, ToolText
from mambactl.serving.written_text import Job, WrittenText


@dataclass(frozen=True)
class Part:
    """A piece of one of several answers, with the calls of tools that end it."""

    index: int
    piece: Piece
    calls: Sequence[ToolCall] = ()


class Answering:
    """The answers to one request, piece by piece."""

    def __init__(
        self, service: Service, body: SamplingFields, jobs: Sequence[Job], tools: Collection[str]
    ):
        self.service, self.body, self.jobs, self.tools = service, body, jobs, tools
        self.texts = [text for job in jobs for text in job.texts]
        self.tokens = 0

    @property
    def usage(self) -> Usage:
        """Tokens of the prompts, and of the answers so far."""
        return Usage(sum(len(job.prompt) for job in self.jobs), self.tokens)

    async def parts(self) -> AsyncIterator[Part]:
        """Parts of all answers as they come; raises Refused where decoding failed."""
        if len(self.texts) == 1:
            async for part in self._of(0, self.texts[0]):
                yield part
            return
        arrived: asyncio.Queue[Part | Exception | None] = asyncio.Queue()

        async def pump(index: int, text: WrittenText) -> None:
            try:
                async for part in self._of(index, text):
                    arrived.put_nowait(part)
                arrived.put_nowait(None)
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(pump(i, text)) for i, text in enumerate(self.texts)]
        left = len(tasks)
        try:
            while left:
                found = await arrived.get()
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()

    async def _of(self, index: int, text: WrittenText) -> AsyncIterator[Part]:
        answer = AnswerText(
            self.service.renderer.tokenizer, self.body.stop or (), self.body.alternatives
        )
        tools = ToolText(self.tools)
        pause = 0.0
        while answer.finish is None:
            arrived = await text.take(pause)
            before = answer.tokens
            piece = answer.add(arrived)
            self.tokens += answer.tokens - before
            piece.text = tools.add(piece.text)
            if piece.finish is not None:
                yield self._last(index, piece, tools)
                return
            if piece.text or piece.likely:
                yield Part(index, piece)
            if arrived.failure is not None:
                raise arrived.failure
            pause = self.service.pace()

    def _last(self, index: int, piece: Piece, tools: ToolText) -> Part:
        # the row may go on behind a stop text
        if len(self.texts) == 1:
            self.end()
        rest, calls = tools.finish()
        piece.text += rest
        if calls:
            piece.finish = "tool_calls"
        return Part(index, piece, calls)

    def end(self) -> None:
        """Cancel the jobs of the request."""
        scheduler = self.service.scheduler
        # none where the server is ending, which has ended them
        if scheduler is not None:
            scheduler.cancel(self.jobs)


async def reply(
    service: Service,
    request: Request,
    body: SamplingFields,
    jobs: list[Job],
    form: ReplyFormat,
    tools: Collection[str] = (),
) -> Response:
    """Submit jobs and answer with what becomes of them; Refused where too many wait."""
    answering = Answering(service, body, jobs, tools)
    service.ready().submit(jobs)
    if body.stream:
        return TextStream(answering, _events(answering, form))
    try:
        return await _whole(request, answering, form)
    finally:
        answering.end()


class TextStream(StreamingResponse):
    """A stream that ends its jobs, however it ends itself."""

    def __init__(self, answering: Answering, events: AsyncIterator[bytes]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.end()


async def _whole(request: Request, answering: Answering, form: ReplyFormat) -> Response:
    collecting = asyncio.create_task(_collected(answering))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            # nobody reads it
            return Response(status_code=499)
        return JSONResponse(form.whole(collecting.result(), answering.usage))
    finally:
        collecting.cancel()
        leaving.cancel()


async def _collected(answering: Answering) -> list[Answer]:
    answers = [Answer() for _ in answering.texts]
    async for part in answering.parts():
        answer, piece = answers[part.index], part.piece
        answer.text += piece.text
        answer.likely += piece.likely
        answer.calls += part.calls
        answer.finish = piece.finish or answer.finish
    return answers


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(answering: Answering, form: ReplyFormat) -> AsyncIterator[bytes]:
    try:
        for index in range(len(answering.texts)):
            opening = form.opening(index)
            if opening is not None:
                yield sent_event(opening)
        async for part in answering.parts():
            yield form.sent(part.index, part.piece, part.calls)
        if answering.body.usage_in_stream:
            yield sent_event(form.usage(answering.usage))
        yield DONE
    except Refused as refusal:
        yield sent_event(refusal.content())
