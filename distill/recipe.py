"""Recipes on disk: a YAML file -> `Recipe`, with errors that name the nearest key; and what differs between two."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distill.stage import Recipe
from evalkit.yaml12 import Loader, read_mapping

FOLDER = Path(__file__).with_name("recipes")


def recipes() -> dict[str, Path]:
    """The recipes that evalkit ships, by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe that evalkit ships as ``name``, or of a YAML file; ``changes`` are KEY=VALUE, as `changed` takes them.

    ValueError names the field, what was found there, and for an unknown key the nearest known one.
    """
    path = Path(name)
    if name in recipes():
        path = recipes()[name]
    elif not path.is_file():
        near = difflib.get_close_matches(name, recipes(), n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no recipe {name!r}: {guess}expected a YAML file, or one of {', '.join(recipes())}")
    content = read_mapping(path, f"the recipe {path}", "keys such as teacher and stages")
    content.setdefault("name", path.stem)
    return parse(changed(content, changes), str(path))


def parse(content: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """Checked; ValueError for the first thing that is wrong."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = _place(content, first["loc"])
        if first["type"] == "extra_forbidden":
            key, known = str(first["loc"][-1]), _known(first["loc"][:-1])
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where}: unknown key {place}: {guess}Known here: {', '.join(known)}") from error
        if first["type"] == "missing":
            raise ValueError(f"{where}: {place} is missing") from error
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] == "value_error" else f" is {first['input']!r}"
        raise ValueError(f"{where}: {place}{shown}: {message[:1].lower() + message[1:]}") from error


def changed(content: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """``content`` with KEY=VALUE applied: KEY is a path such as ``seed``, ``student.keep`` or ``stages.distill.tokens``
    (a stage by its name), VALUE is YAML; null takes a stage or a source away."""
    copied: dict[str, Any] = json.loads(json.dumps(content))
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise ValueError(f"--set {change!r}: expected KEY=VALUE, e.g. stages.distill.tokens=5M")
        at: Any = copied
        *parents, last = path.split(".")
        for key in parents:
            at = _step(at, key, change)
        value = yaml.load(text, Loader)
        if isinstance(at, list):
            place = at.index(_step(at, last, change))
            at[place : place + 1] = [] if value is None else [value]
        elif isinstance(at, dict):
            at[last] = value
        else:
            raise ValueError(f"--set {change!r}: {last!r} lies in a plain value")
    return copied


def _step(at: Any, key: str, change: str) -> Any:
    if isinstance(at, list):
        for one in at:
            if isinstance(one, dict) and one.get("name") == key:
                return one
        if key.isdigit() and int(key) < len(at):
            return at[int(key)]
        named = [str(one["name"]) for one in at if isinstance(one, dict) and "name" in one]
        raise ValueError(f"--set {change!r}: there is no {key!r} among {', '.join(named) or f'{len(at)} entries'}")
    if not isinstance(at, dict):
        raise ValueError(f"--set {change!r}: {key!r} lies in a plain value")
    return at.setdefault(key, {})


def sha256(recipe: Recipe) -> str:
    """Of everything in the recipe but the seed: runs of one recipe with several seeds belong together."""
    content = recipe.model_dump(mode="json", exclude={"seed"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two dumped recipes, one "key (old, now new)" each."""
    found = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        name = f"{path}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif isinstance(old, list) and isinstance(new, list) and _named(old) and _named(new):
            found += differences(_named(old), _named(new), f"{name}.")
        elif old != new:
            found.append(f"{name} ({json.dumps(old)}, now {json.dumps(new)})")
    return found


def _named(entries: Sequence[Any]) -> dict[str, Any]:
    return {one["name"]: one for one in entries if isinstance(one, dict) and "name" in one}


def _place(content: Any, loc: Sequence[Any]) -> str:
    """stages.distill.lr rather than stages.2.lr."""
    parts: list[str] = []
    for key in loc:
        content = content[key] if isinstance(content, (dict, list)) and _has(content, key) else None
        named = isinstance(key, int) and isinstance(content, dict) and "name" in content
        parts.append(str(content["name"] if named and isinstance(content, dict) else key))
    return ".".join(parts) or "the whole"


def _has(content: Any, key: Any) -> bool:
    return key in content if isinstance(content, dict) else isinstance(key, int) and key < len(content)


def _known(loc: Sequence[Any]) -> list[str]:
    """The fields of the model at ``loc``."""
    at: Any = Recipe
    for key in loc:
        if isinstance(key, str) and key in getattr(at, "model_fields", {}):
            at = at.model_fields[key].annotation
        else:
            at = get_args(at)[-1 if isinstance(key, str) else 0]
        while not (isinstance(at, type) and issubclass(at, BaseModel)) and get_args(at) and _optional(at):
            at = next(part for part in get_args(at) if part is not type(None))
    return list(getattr(at, "model_fields", {}))


def _optional(at: Any) -> bool:
    return type(None) in get_args(at)
