"""Continuous batching for models that are called as PyTorch modules: requests join after any token, whatever their
length, and leave with their last one."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pennyweight.runtimes import Batching, Occupancy, Progress
from pennyweight.runtimes.sampling import Chooser
from pennyweight.runtimes.waves import Request, Waves

if TYPE_CHECKING:
    from transformers import DynamicCache

#: Tokens of prompts, padding included, that are read in one step.
MOST_READ = 2048


class Continuous(Waves):
    """The generating half of such a session. A step reads the prompts of those who join, all at once, or else gives
    everyone at work a token more.

    All share one cache of keys and values, (requests, heads, positions, size) a layer, in which each request's last
    token is at the end and what stands before its first is masked.
    """

    device: Any = "cpu"
    caches_by_position = True
    """The model remembers by keys and values alone. What it keeps otherwise cannot be put side by side: it is served in
    waves."""

    def __init__(self) -> None:
        super().__init__()
        self._going: list[Request] = []
        self._choosers: dict[int, Chooser] = {}
        self._cache: DynamicCache | None = None
        self._mask = torch.empty(0)
        self._last = torch.empty(0)

    @abstractmethod
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits (requests, vocabulary) of what follows `ids` (requests, new positions), which stand at `places` of
        their texts. `mask`: int64 (requests, positions in the cache and new ones), 0 where nothing stands. What is new
        is put into `cache`."""

    @property
    def batching(self) -> Batching:
        return "continuous" if self.caches_by_position else "waves"

    def step(self) -> list[Progress]:
        if not self.caches_by_position:
            return super().step()
        self._leave()
        if joining := self._admit():
            logits, members = self._read(joining), joining
        else:
            logits, members = self._go_on(), self._going
        tokens = self._choose(members, logits)
        column = torch.from_numpy(tokens)[:, None].to(logits.device)
        self._last = torch.cat([self._last, column]) if len(members) < len(self._going) else column
        return self._progress(members, tokens)

    def abort(self, request: int) -> None:
        super().abort(request)
        for member in self._going:
            if member.number == request:
                member.left = 0
        self._leave()

    def occupancy(self) -> Occupancy:
        if not self.caches_by_position:
            return super().occupancy()
        return Occupancy(sum(request.left > 0 for request in self._going), None)

    def cancel(self) -> None:
        super().cancel()
        self._going, self._cache = [], None
        self._choosers.clear()

    def _admit(self) -> list[Request]:
        """Those of the waiting, the oldest first, for whom there is room in the batch and in the step."""
        joining: list[Request] = []
        longest = 0
        for request in self._waiting[: self.at_once - len(self._going)]:
            longest = max(longest, len(request.ids))
            if joining and longest * (len(joining) + 1) > MOST_READ:
                break
            joining.append(request)
        self._waiting = self._waiting[len(joining) :]
        return joining

    def _read(self, joining: list[Request]) -> torch.Tensor:
        """Logits after the prompts of those who join; they then are among those at work."""
        from transformers import DynamicCache

        longest = max(len(request.ids) for request in joining)
        ids, mask = np.zeros((2, len(joining), longest), np.int64)
        for row, request in enumerate(joining):
            ids[row, longest - len(request.ids) :] = request.ids
            mask[row, longest - len(request.ids) :] = 1
        read, own = torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)
        cache = DynamicCache()
        logits = self.forward(read, own, (own.cumsum(-1) - 1).clamp(min=0), cache)
        if self._going:
            assert self._cache is not None
            self._mask = _side_by_side(self._mask, own)
            for layer, joins in zip(self._cache.layers, cache.layers):
                layer.keys = _side_by_side(layer.keys, joins.keys, -2)
                layer.values = _side_by_side(layer.values, joins.values, -2)
        else:
            self._mask, self._cache = own, cache
        self._going = [*self._going, *joining]
        return logits

    def _go_on(self) -> torch.Tensor:
        """Logits after the last token of everyone at work."""
        assert self._cache is not None
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self.forward(self._last, self._mask, self._mask.sum(-1, keepdim=True) - 1, self._cache)

    def _choose(self, members: list[Request], logits: torch.Tensor) -> np.ndarray:
        """The next token of each, int64 (requests,)."""
        ends = self.ends()
        allowed = logits.float()
        if ends and (kept := [row for row, member in enumerate(members) if not member.stop]):
            allowed = allowed.clone()
            allowed[torch.tensor(kept)[:, None], torch.tensor(ends)] = -torch.inf
        tokens = allowed.argmax(-1).cpu().numpy()
        for row, member in enumerate(members):
            if member.sampling.temperature == 0 and member.sampling.logprobs is None:
                continue
            if member.number not in self._choosers:
                self._choosers[member.number] = Chooser([member.sampling], never=() if member.stop else ends)
            tokens[row] = self._choosers[member.number](logits[row, None].float().cpu().numpy())[0]
        return tokens

    def _progress(self, members: list[Request], tokens: np.ndarray) -> list[Progress]:
        now, ends, found = time.perf_counter(), self.ends(), []
        for member, token in zip(members, tokens.tolist()):
            member.left = 0 if member.stop and token in ends else member.left - 1
            chooser = self._choosers.get(member.number)
            scored = chooser.scored[0] if chooser else None
            found.append(Progress(member.number, [token], now, not member.left, [scored] if scored else None))
        return found

    def _leave(self) -> None:
        """Take out the rows of those who are finished, and the positions that nobody is left to need."""
        kept = [row for row, request in enumerate(self._going) if request.left]
        if len(kept) == len(self._going):
            return
        for request in self._going:
            if not request.left:
                self._choosers.pop(request.number, None)
        self._going = [self._going[row] for row in kept]
        if not kept or self._cache is None:
            self._cache = None
            return
        rows = torch.tensor(kept, device=self._mask.device)
        self._mask, self._last = self._mask[rows], self._last[rows]
        empty = int((self._mask.cumsum(-1) == 0).sum(-1).min())
        self._mask = self._mask[:, empty:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[rows, :, empty:]
            layer.values = layer.values[rows, :, empty:]


def _side_by_side(ours: torch.Tensor, theirs: torch.Tensor, positions: int = -1) -> torch.Tensor:
    """Rows of both, the shorter ones filled up with zeros in front. `positions`: the dimension that they differ in."""
    longest = max(ours.shape[positions], theirs.shape[positions])
    behind = (0, 0) * (-positions - 1)
    padded = [torch.nn.functional.pad(part, (*behind, longest - part.shape[positions], 0)) for part in (ours, theirs)]
    return torch.cat(padded)
