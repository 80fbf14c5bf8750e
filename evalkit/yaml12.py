"""YAML as of version 1.2, where it matters to us."""

import re

import yaml


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's booleans, true and false alone: in 1.1 the words on and off are some, too."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))
