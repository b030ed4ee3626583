"""The routes of the server: OpenAI's API in front of an engine."""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.responses import Response as Answer
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flextron_lit.model import FlextronModel
from flextron_lit.serving.asked import Asked, read
from flextron_lit.serving.engine import Engine, Job, Piece
from flextron_lit.serving.load_policy import LoadPolicy
from flextron_lit.serving.metrics import Metrics
from flextron_lit.serving.objects import Response, sent
from flextron_lit.serving.offer import Offer, Offered
from flextron_lit.serving.refusal import RequestError
from flextron_lit.serving.telling import Teller
from flextron_lit.serving.tokens import Lengths, ends_of, prompt_tokens, text_of

SWALLOWED = 16
"""So many times the longest body are read and thrown away before a longer one is refused: who still sends hears it."""
AGAIN = {"Retry-After": "1"}


@dataclass(frozen=True)
class Rules:
    """What the operator allows."""

    lengths: Lengths
    policy: LoadPolicy
    body_bytes: int
    key: str | None = None
    """What clients must send; None lets everybody in."""


@dataclass
class _Ticket:
    """A request while it is answered."""

    asked: Asked
    job: Job
    response: Response
    pieces: asyncio.Queue[Piece]
    budget: str
    begun: float
    first: float | None = None
    end: str = "gone"
    text: list[str] = field(default_factory=list)

    async def each(self) -> AsyncIterator[Piece]:
        """What comes, until the last piece."""
        while self.end == "gone":
            piece = await self.pieces.get()
            self.first = self.first or time.monotonic()
            self.end = piece.end or "gone"
            yield piece


class Service:
    """What the routes call.

    Args:
        model: makes tokens and texts.
        offer: the budgets.
        engine: runs the network.
        rules: what requests may do.
    """

    def __init__(self, model: FlextronModel, offer: Offer, engine: Engine, rules: Rules) -> None:
        self._model, self._offer, self._engine, self._rules = model, offer, engine, rules
        self._metrics = Metrics(lambda: engine.running, lambda: engine.waiting)
        self._stops = ends_of(model)[1]
        self._pressed = False
        self._begun = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completion, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/health", self._health),
                Route("/metrics", self._told),
            ],
            exception_handlers={
                RequestError: self._refused,
                HTTPException: self._no_route,
                ClientDisconnect: _gone,
                500: _broken,
            },
        )

    # --- routes -------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Answer:
        return await self._answer(request, chat=True)

    async def _completion(self, request: Request) -> Answer:
        return await self._answer(request, chat=False)

    async def _models(self, request: Request) -> Answer:
        self._check_key(request)
        return JSONResponse(self._offer.listed(self._begun))

    async def _one_model(self, request: Request) -> Answer:
        self._check_key(request)
        return JSONResponse(self._offer.row(request.path_params["name"], self._begun))

    async def _health(self, request: Request) -> Answer:
        alive, engine = self._engine.alive, self._engine
        told = {"status": "ok" if alive else "down", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(told, status_code=200 if alive else 503)

    async def _told(self, request: Request) -> Answer:
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _refused(self, request: Request, error: Exception) -> Answer:
        assert isinstance(error, RequestError)
        self._metrics.refused.labels(str(error.status)).inc()
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: AGAIN, 503: AGAIN}.get(error.status)
        return JSONResponse(error.to_json(), error.status, headers)

    async def _no_route(self, request: Request, error: Exception) -> Answer:
        assert isinstance(error, HTTPException)
        what = f"{error.detail}: {request.method} {request.url.path}"
        return await self._refused(request, RequestError(error.status_code, what))

    # --- one request --------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, *, chat: bool) -> Answer:
        self._check_key(request)
        asked = read(await self._body(request), chat=chat)
        wanted = self._offer.named(asked.model, asked.budget)
        least = None if asked.least_budget is None else self._offer.limited(asked.least_budget, "least_budget")
        # apart from the loop: a long text takes a while
        tokens = await asyncio.to_thread(prompt_tokens, self._model, asked)
        most = self._rules.lengths.room(len(tokens), asked.most)
        policy, house = self._rules.policy, self._engine.running + self._engine.waiting
        self._pressed = policy.pressed(self._pressed, house + 1)
        given = policy.answered(wanted, least, self._pressed)
        ticket = self._ticket(asked, tokens, most, wanted, given)
        headers = {f"x-flextron-{name}": str(value) for name, value in ticket.response.flextron.items()}
        self._engine.submit(ticket.job)
        if given is not wanted:
            self._metrics.gave_way.labels(wanted.budget, given.budget).inc()
        if asked.stream:
            return _Stream(self._events(ticket), lambda: self._over(ticket), headers)
        try:
            return JSONResponse(await self._whole(request, ticket), headers=headers)
        finally:
            self._over(ticket)

    def _ticket(self, asked: Asked, tokens: list[int], most: int, wanted: Offered, given: Offered) -> _Ticket:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        teller = Teller(lambda ids: text_of(self._model, ids), (*asked.stops, *self._stops))

        def hear(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = Job(
            prompt=tokens,
            sub_network=given.sub_network,
            most=most,
            sampling=asked.sampling,
            teller=teller,
            hear=hear,
        )
        told = {"asked": wanted.budget, "budget": given.budget}
        kind = "chatcmpl" if asked.chat else "cmpl"
        name = f"{kind}-{uuid.uuid4().hex}"
        response = Response(name, int(time.time()), self._offer.model(given), asked.chat, told)
        return _Ticket(asked, job, response, pieces, given.budget, time.monotonic())

    async def _whole(self, request: Request, ticket: _Ticket) -> Any:
        """The answer at once, unless the client leaves before."""

        async def listen() -> str:
            return "".join([piece.text async for piece in ticket.each()])

        said, left = asyncio.ensure_future(listen()), asyncio.ensure_future(request.receive())
        try:
            # whatever a client that has sent its request still sends means that it is gone
            await asyncio.wait({said, left}, return_when=asyncio.FIRST_COMPLETED)
            if not said.done():
                raise ClientDisconnect()
        finally:
            said.cancel()
            left.cancel()
        if ticket.end == "failed":
            raise FAILED
        return ticket.response.whole(said.result(), ticket.end, len(ticket.job.prompt), len(ticket.job.tokens))

    async def _events(self, ticket: _Ticket) -> AsyncIterator[str]:
        """The answer as a stream."""
        first, tokens = True, 0
        async for piece in ticket.each():
            tokens = piece.tokens
            if piece.end == "failed":
                yield sent(FAILED.to_json())
            elif piece.text or piece.end or first:
                yield sent(ticket.response.chunk(piece.text, piece.end, first=first))
            first = False
        if ticket.asked.usage and ticket.end != "failed":
            yield sent(ticket.response.count(len(ticket.job.prompt), tokens))
        yield sent("[DONE]")

    def _over(self, ticket: _Ticket) -> None:
        """Free a slot that is still taken, and count."""
        self._engine.leave(ticket.job)
        metrics, now = self._metrics, time.monotonic()
        metrics.requests.labels(ticket.budget, ticket.end).inc()
        metrics.tokens.labels(ticket.budget, "prompt").inc(len(ticket.job.prompt))
        metrics.tokens.labels(ticket.budget, "answer").inc(len(ticket.job.tokens))
        metrics.whole.labels(ticket.budget).observe(now - ticket.begun)
        metrics.first.labels(ticket.budget).observe((ticket.first or now) - ticket.begun)

    def _check_key(self, request: Request) -> None:
        key = self._rules.key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """What a client sent.

        Raises:
            RequestError: if it is longer than it may be, or not sent as JSON: pages of other sites cannot do that.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the body must be sent as JSON, with the header Content-Type: application/json")
        most, found, length = self._rules.body_bytes, bytearray(), 0
        async for part in request.stream():
            length += len(part)
            if length <= most:
                found += part
            elif length > SWALLOWED * most:
                break
        if length > most:
            raise RequestError(413, f"the body is longer than the {most} bytes that are read here", code="too_large")
        return bytes(found)


class _Stream(StreamingResponse):
    """A stream of events, with what is to be done however it ends."""

    def __init__(self, events: AsyncIterator[str], over: Any, headers: dict[str, str]) -> None:
        kept = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers={**headers, **kept}, media_type="text/event-stream")
        self._at_the_end = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_the_end()


FAILED = RequestError(500, "the network failed on the batch that this request was part of", code="engine_failed")


async def _gone(request: Request, error: Exception) -> Answer:
    """For nobody."""
    return Answer(status_code=499)


async def _broken(request: Request, error: Exception) -> Answer:
    """For what nobody foresaw; the server's log has it."""
    return JSONResponse(RequestError(500, "the server made a mistake; its log says which").to_json(), 500)
