"""An answer as it is written: tokens in, deltas out, and when it ends.

Nothing here knows a model, a cache or a tensor. So an answer can be written again from its tokens alone.
"""

from collections.abc import Iterable, Sequence

from tightrope.backends.protocol import Tokenizer
from tightrope.engine.errors import BackendFailed
from tightrope.engine.text.banned_strings import BannedStrings, PendingToken
from tightrope.engine.text.detokenizer import Detokenizer
from tightrope.engine.types import Delta, Finish, FinishReason, GenerateRequest, Timings, Token, TopToken

UNTIMED = Timings(0.0, 0.0, 0.0)  # The loop has the clock: it puts the times of a choice into its last delta.

Top = Iterable[tuple[int, float]]  # They are the likeliest token ids at a place, with their log probabilities.


class Writer:
    """Writes one choice of a request by the request's rules: stops, banned strings, special tokens, length.

    What is taken decides what comes out, and nothing else does: the same tokens give the same deltas again.
    """

    def __init__(self, request: GenerateRequest, index: int, tokenizer: Tokenizer, max_tokens: int) -> None:
        """max_tokens: the answer ends there by any means. Raises InvalidRequest where banned strings break limits."""
        self.tokenizer = tokenizer
        self.num_tokens = 0  # Ends and held ones count, those that were taken back don't.
        self.is_finished = False
        self._request_id, self.index = request.request_id, index
        self._stop = request.stop
        self._skips_special = request.skip_special_tokens
        self._shown = frozenset(text.encode() for text in request.shown_tokens)
        self._max_tokens = max_tokens
        self._detokenizer = Detokenizer(request.stop.strings, keep_stop_text=request.stop.keep_stop_text)
        banned = request.sampling.banned_strings
        self._banned = BannedStrings(banned) if banned else None

    def excluded(self) -> tuple[int, ...]:
        """Ids that may not come next: ends that would be too early, and beginnings of banned strings found here."""
        stop = self._stop
        is_early = self.num_tokens < stop.min_tokens
        ids = tuple(self.tokenizer.eos_ids) if stop.ignore_eos or is_early else ()
        if is_early:
            ids += tuple(i for i in stop.token_ids if 0 <= i < self.tokenizer.vocab_size)
        return ids if self._banned is None else ids + self._banned.excluded_at(self.num_tokens)

    def take(
        self, token_id: int, logprob: float | None = None, top: Top = (), *, is_complete: bool = False
    ) -> list[Delta]:
        """Add a token; return what may be given out now: a delta for each token, or one without any.

        is_complete: a grammar lets nothing but an end follow. Where a banned string has come about, it is taken back:
        `num_tokens` is then less than before, and the answer goes on from there. Nothing may be taken after the end.
        """
        assert not self.is_finished
        tokenizer, stop = self.tokenizer, self._stop
        self.num_tokens += 1
        raw, is_special = tokenizer.token_bytes(token_id), tokenizer.is_special(token_id)
        is_end = token_id in tokenizer.eos_ids or token_id in stop.token_ids
        before = self._detokenizer if self._banned is None else self._detokenizer.copy()
        shown = text = ""
        if not is_end and not (is_special and self._skips_special and raw not in self._shown):
            shown, text = self._detokenizer.feed(raw, watch=self.num_tokens > stop.min_tokens)
        alternatives = top_tokens(top, tokenizer) if top else ()
        given = [PendingToken(Token(token_id, raw, text, logprob, is_special, alternatives), shown, before)]
        if self._banned is not None:
            num_banned = self._banned.feed(given[0])
            if num_banned is not None:
                return self._take_back(self._banned, num_banned)
            given = self._banned.release()
        if (ending := self._ending(token_id, is_end=is_end, is_complete=is_complete)) is not None:
            return self.end(ending[0], given, matched=ending[1])
        return [self._delta(one.shown, (one.token,)) for one in given] or [self._delta("", ())]

    def replay(self, token_ids: Sequence[int]) -> None:
        """Take tokens that were given out before, by another writer: nothing of them comes out again.

        Raises BackendFailed where they end the answer, as they may in a window that is smaller now.
        """
        for token_id in token_ids:
            if not self.is_finished:
                self.take(token_id)
        if self._banned is not None:
            self._banned.release_all()
        if self.is_finished or self.num_tokens != len(token_ids):
            raise BackendFailed("the engine that was started anew can't go on with this answer")

    def end(
        self,
        reason: FinishReason,
        given: Iterable[PendingToken] = (),
        *,
        matched: str | int | None = None,
        message: str | None = None,
    ) -> list[Delta]:
        """End the answer: the last deltas, one a token, of what is given out now and of what was held back."""
        self.is_finished = True
        held = [*given, *(self._banned.release_all() if self._banned is not None else ())]
        rest = "" if reason == "stop_string" else self._detokenizer.flush()
        deltas = [self._delta(one.shown, (one.token,)) for one in held[:-1]]
        shown = "".join(one.shown for one in held[-1:]) + rest
        finish = Finish(reason, self.num_tokens, UNTIMED, matched, message)
        return [*deltas, self._delta(shown, tuple(one.token for one in held[-1:]), finish)]

    def _ending(
        self, token_id: int, *, is_end: bool, is_complete: bool
    ) -> tuple[FinishReason, str | int | None] | None:
        """Why the answer ends with this token, and what matched; None where it goes on."""
        is_full = self.num_tokens >= self._max_tokens
        if is_full and self._stop.length_first:
            return "length", None
        if is_end:
            return ("eos" if token_id in self.tokenizer.eos_ids else "stop_token"), token_id
        if self._detokenizer.stopped_by is not None:
            return "stop_string", self._detokenizer.stopped_by
        if is_complete:  # Only an end token may follow, which is not waited for.
            return "eos", None
        return ("length", None) if is_full else None

    def _take_back(self, banned: BannedStrings, num_tokens: int) -> list[Delta]:
        """Go back to before the tokens that became a banned string; the first of them is excluded there."""
        self._detokenizer = banned.take_back(num_tokens).before
        self.num_tokens -= num_tokens
        if banned.is_stuck:
            return self.end("error", message="every way on leads to a banned string")
        return [self._delta("", ())]

    def _delta(self, text: str, tokens: tuple[Token, ...], finish: Finish | None = None) -> Delta:
        return Delta(self._request_id, self.index, text, tokens, None, finish)


def plain_token(token_id: int, tokenizer: Tokenizer, logprob: float | None = None, top: Top = ()) -> Token:
    """A token outside any answer, with its own text."""
    raw = tokenizer.token_bytes(token_id)
    text, is_special = raw.decode("utf-8", "replace"), tokenizer.is_special(token_id)
    return Token(token_id, raw, text, logprob, is_special, top_tokens(top, tokenizer))


def top_tokens(top: Top, tokenizer: Tokenizer) -> tuple[TopToken, ...]:
    """What is told of the likeliest tokens at a place."""
    return tuple(TopToken(i, tokenizer.token_bytes(i), logprob, tokenizer.is_special(i)) for i, logprob in top)
