"""YAML as of version 1.2, where it matters to us."""

import re
from pathlib import Path
from typing import Any

import yaml


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's booleans, true and false alone: in 1.1 the words on and off are some, too."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))


def read_mapping(path: Path, shown: str, keys: str) -> dict[str, Any]:
    """The mapping in the file ``path``. ValueError calls the file ``shown``: no YAML, or none with ``keys``."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown} holds {type(content).__name__}: expected {keys}")
    return content
