"""What a model remembers of the tokens before: keys and values, or the state of a recurrent layer.

Works on transformers' DynamicCache, layer by layer: keys and values [rows, heads, columns, width], recurrent and
convolution states [rows, ...].
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from evalkit.engines.forward import Forward


def why_not(forward: Forward, layout: str) -> str:
    """Why ``forward``'s model can't be run from a cache in ``layout``; empty: its kind is no obstacle."""
    name = type(forward.model).__name__
    if not forward.cache_name or not forward.takes_positions:
        return f"{name} takes no {'position_ids' if forward.cache_name else 'cache'}"
    kinds = {type(layer) for layer in new_cache(forward).layers}
    if other := sorted(kind.__name__ for kind in kinds - {DynamicLayer, LinearAttentionLayer}):
        return f"{name} caches in {', '.join(other)}"
    if LinearAttentionLayer in kinds and layout == "tree":
        return "a recurrent layer has one state, not one a token"
    if kinds == {LinearAttentionLayer}:
        return f"no layer of {name} has attention, where transformers counts a cache's tokens"
    return ""


def new_cache(forward: Forward) -> DynamicCache:
    return DynamicCache(config=forward.model.config)


def rows_of(cache: DynamicCache, rows: Tensor | int) -> DynamicCache:
    """A cache of ``rows`` of this one (an index), or of its only row so many times; this one stays as it is."""

    def taken(tensor: Tensor) -> Tensor:
        if isinstance(rows, int):
            return tensor.expand(rows, *tensor.shape[1:])
        return tensor.index_select(0, rows.to(tensor.device))

    out = copy.copy(cache)
    out.layers = []
    for layer in cache.layers:
        one = copy.copy(layer)
        if isinstance(layer, LinearAttentionLayer):
            for name in ("conv_states", "recurrent_states"):  # updated in place: never a view
                states = {i: None if s is None else taken(s).clone() for i, s in getattr(layer, name).items()}
                setattr(one, name, states)
            one.has_previous_state = dict(layer.has_previous_state)
        elif layer.is_initialized:
            one.keys, one.values = taken(layer.keys), taken(layer.values)
        out.layers.append(one)
    return out


def row_bytes(cache: DynamicCache, columns: int) -> int:
    """What one row of ``columns`` columns takes."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            total += sum(s.element_size() * s[0].numel() for s in states if s is not None)
        else:
            total += sum(t.element_size() * t.shape[1] * columns * t.shape[3] for t in (layer.keys, layer.values))
    return total


class Slots:
    """A cache with a place for each of ``rows`` rows and ``columns`` columns, filled row by row.

    Every row is written at a column of its own, so a row that ends leaves alone and another takes its place; shapes
    stay what they are. Rows in use are the first ``used``.
    """

    def __init__(self, like: DynamicCache, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns = rows, columns
        self.used = rows
        self.width = columns
        """Columns that attention reads."""
        self.index = torch.arange(rows, device=device)
        self.next = torch.zeros(rows, dtype=torch.long, device=device)
        """The token that the next pass runs, of each row."""
        self.at = torch.zeros(rows, dtype=torch.long, device=device)
        """The column of that token, and so the tokens that the row holds."""
        self.live = torch.zeros(rows, dtype=torch.long, device=device)
        """1 where a row goes on; 0 where a pass runs what nobody reads."""
        self.cache = copy.copy(like)
        self.cache.layers = [
            _RecurrentSlots(layer, rows) if isinstance(layer, LinearAttentionLayer) else _AttentionSlots(layer, self)
            for layer in like.layers
        ]

    def use(self, rows: int, width: int) -> None:
        """The next pass runs the first ``rows`` rows and reads the first ``width`` columns."""
        self.used, self.width = rows, width
        for layer in self.cache.layers:
            if isinstance(layer, _RecurrentSlots):
                layer.use(rows)

    def mask(self) -> Tensor:
        """[used, width]: 1 where a row has tokens, its next one included."""
        columns = torch.arange(self.width, device=self.at.device)
        return (columns <= self.at[: self.used, None]).long()

    def advance(self, tokens: Tensor) -> None:
        """Each row in use holds a token more, and ``tokens`` [used] are next; what nobody reads stays where it is,
        within columns and window."""
        self.at[: self.used] += self.live[: self.used]
        self.next[: self.used] = tokens

    def leave(self, slots: Sequence[int]) -> None:
        """What is in ``slots`` has ended."""
        self.live[torch.tensor(list(slots), device=self.live.device)] = 0

    def grow(self, rows: int) -> None:
        """Make room for ``rows`` rows; those in use stay what they are."""
        self.rows = rows
        self.index = torch.arange(rows, device=self.index.device)
        self.next, self.at, self.live = (_more(one, rows) for one in (self.next, self.at, self.live))
        for layer in self.cache.layers:
            layer.grow(rows)

    def put(
        self, slots: Sequence[int], cache: DynamicCache, rows: Sequence[int], columns: Sequence[Sequence[int]]
    ) -> None:
        """Fill each of ``slots`` from the tokens at its ``columns`` in its row of ``cache``."""
        device = self.at.device
        width = max(map(len, columns))
        padded = [[*one, *[one[-1]] * (width - len(one))] for one in columns]  # masked, so anything finite will do
        where, from_, at = (torch.tensor(one, device=device) for one in (list(slots), list(rows), padded))
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            mine.put(where, theirs, from_, at)
        self.at[where] = torch.tensor([len(one) for one in columns], device=device)
        self.live[where] = 1

    def move(self, sources: Sequence[int], slots: Sequence[int]) -> None:
        """What is in each of ``sources`` to the one of ``slots`` beside it."""
        from_, to = (torch.tensor(list(one), device=self.at.device) for one in (sources, slots))
        for layer in self.cache.layers:
            for tensor in layer.tensors():
                tensor[to.to(tensor.device)] = tensor[from_.to(tensor.device)]
        for state in (self.next, self.at, self.live):
            state[to] = state[from_]
        self.live[from_] = 0


class _AttentionSlots(DynamicLayer):  # type: ignore[misc]
    is_compileable = True  # transformers then makes masks without looking at their values, which a graph can't

    def __init__(self, like: DynamicLayer, slots: Slots) -> None:
        super().__init__()
        self.slots: Slots = weakref.proxy(slots)  # they hold this layer: in a circle memory would stay
        shape = (slots.rows, like.keys.shape[1], slots.columns)
        # Zeros: attention gives columns that nobody filled no weight, but 0 * NaN would be NaN.
        self.keys = like.keys.new_zeros(*shape, like.keys.shape[3])
        self.values = like.values.new_zeros(*shape, like.values.shape[3])
        self.is_initialized = True

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def grow(self, rows: int) -> None:
        self.keys, self.values = _more(self.keys, rows), _more(self.values, rows)

    def put(self, slots: Tensor, layer: DynamicLayer, rows: Tensor, columns: Tensor) -> None:
        for mine, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
            to, from_, at = (one.to(mine.device) for one in (slots, rows, columns))
            # [slots, columns, heads, width]: what is indexed by two tensors around a slice comes first.
            mine[to, :, : at.shape[1]] = theirs[from_[:, None], :, at].transpose(1, 2)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One token a row: [used, heads, 1, width]."""
        used, width = self.slots.used, self.slots.width
        device = self.keys.device
        where = (self.slots.index[:used].to(device), slice(None), self.slots.at[:used].to(device))
        self.keys[where] = keys[:, :, 0]
        self.values[where] = values[:, :, 0]
        return self.keys[:used, :, :width], self.values[:used, :, :width]

    def get_seq_length(self) -> int:
        """So that the causal mask lets every column through: the padding mask says which a row has."""
        return self.slots.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0


class _RecurrentSlots(LinearAttentionLayer):  # type: ignore[misc]
    def __init__(self, like: LinearAttentionLayer, rows: int) -> None:
        super().__init__(number_of_states=like.number_of_states)
        for name, value in vars(like).items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)
        self._all = {
            name: {i: s.new_zeros(rows, *s.shape[1:]) for i, s in getattr(like, name).items() if s is not None}
            for name in ("conv_states", "recurrent_states")
        }

    def tensors(self) -> list[Tensor]:
        return [state for states in self._all.values() for state in states.values()]

    def grow(self, rows: int) -> None:
        self._all = {name: {i: _more(state, rows) for i, state in states.items()} for name, states in self._all.items()}

    def use(self, rows: int) -> None:
        """The layer updates states in place: a view of the rows in use is all it needs."""
        for name, states in self._all.items():
            getattr(self, name).update({i: state[:rows] for i, state in states.items()})

    def put(self, slots: Tensor, layer: LinearAttentionLayer, rows: Tensor, columns: Tensor) -> None:
        for name, states in self._all.items():
            for i, state in states.items():
                state[slots.to(state.device)] = getattr(layer, name)[i][rows.to(state.device)]


def _more(tensor: Tensor, rows: int) -> Tensor:
    out = tensor.new_zeros(rows, *tensor.shape[1:])
    out[: len(tensor)] = tensor
    return out
