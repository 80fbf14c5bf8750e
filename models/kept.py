"""Which layers keep their softmax attention: a list, a preset, or a rule; all others become KDA."""

import difflib

PRESETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "qwen3-0.6b": (28, (0, 2, 6, 11, 13, 18, 21)),
}
"""Name -> (layers the teacher must have, layers kept). qwen3-0.6b: GenDistill (arXiv:2603.26556), by beam search."""

UNIFORM = 4
"""`uniform` keeps one layer in four: three KDA layers to one of attention, as Kimi Linear (arXiv:2510.26692)."""


def keep_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """The layers, counted from 0 and in order, whose attention stays as it is.

    spec: "0,2,6" (a list), "none", "all", "uniform:N" (the last layer of every N: N - 1, 2N - 1, ...; "uniform" is
    "uniform:4"), or the name of a preset. ValueError says what was found and what would do.
    """
    text = spec.strip()
    if text in ("none", "all"):
        return tuple(range(num_layers)) if text == "all" else ()
    name, colon, number = text.partition(":")
    if name == "uniform":
        return _uniform(spec, number if colon else str(UNIFORM), num_layers)
    if text in PRESETS:
        layers, kept = PRESETS[text]
        if layers != num_layers:
            raise ValueError(
                f"keep is {spec!r}, a preset for a teacher of {layers} layers, but this one has {num_layers}; "
                f"use uniform, or list the layers"
            )
        return kept
    parts = [part.strip() for part in text.split(",")]
    if not text or not all(part.removeprefix("-").isdecimal() for part in parts):
        near = difflib.get_close_matches(text, ["uniform", "none", "all", *PRESETS], n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"keep is {spec!r}: expected layers such as 0,2,6, uniform, uniform:N, none, all, "
            f"or a preset ({', '.join(PRESETS)}){guess}"
        )
    return check_layers([int(part) for part in parts], num_layers)


def check_layers(layers: list[int], num_layers: int) -> tuple[int, ...]:
    """``layers`` in order; ValueError for one that is named twice or that a teacher of ``num_layers`` lacks."""
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"keep names layer {layer}: expected 0 to {num_layers - 1}, as the teacher's are counted")
        if layers.count(layer) > 1:
            raise ValueError(f"keep names layer {layer} {layers.count(layer)} times: expected each layer once")
    return tuple(sorted(layers))


def _uniform(spec: str, number: str, num_layers: int) -> tuple[int, ...]:
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"keep is {spec!r}: expected uniform:N with N of at least 1, which keeps one layer in N")
    kept = tuple(range(int(number) - 1, num_layers, int(number)))
    if not kept:
        raise ValueError(f"keep is {spec!r}, which keeps no layer of {num_layers}: use a smaller N, or none")
    return kept
