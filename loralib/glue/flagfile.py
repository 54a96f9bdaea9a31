"""Reads JSON and YAML files of flags."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from loralib.errors import InputError

SUFFIXES = (".json", ".yaml", ".yml")
LARGEST = 1_000_000  # bytes; all flags with long values need far less


class _Loader(yaml.SafeLoader):
    """Reads YAML as SafeLoader does, but 1e-3 is a number, and an alias may only stand for a single value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):  # a few lines of such aliases can unfold to gigabytes
            raise yaml.MarkedYAMLError(problem="an alias stands for a list or mapping", problem_mark=node.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_flags(path: Path) -> dict[str, Any]:
    """Read the flags of a file.

    Returns:
        By name a text, as it would be typed behind the flag; None for null; a list of texts; or a dict.

    Raises:
        InputError: the file is missing, too large, not valid, or no mapping from names to values.
    """
    kind = "JSON" if path.suffix == ".json" else "YAML"
    if not path.is_file():
        raise InputError(f"the file {path} does not exist: give a .json or .yaml file, or flags.")
    size = path.stat().st_size
    if size > LARGEST:
        raise InputError(f"{path} has {size:,} bytes, a file of flags has at most {LARGEST:,}: is it another file?")
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = _json_pairs(text) if kind == "JSON" else _yaml_pairs(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid {kind}: byte {error.start} is not UTF-8.") from error
    except RecursionError as error:
        raise InputError(
            f"{path} is not valid {kind} for flags: its lists or mappings are nested too deeply."
        ) from error
    except yaml.MarkedYAMLError as error:  # its text would show the line, which may hold a token
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise InputError(f"{path} is not valid YAML: {error.problem}{line}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not valid {kind}: {' '.join(str(error).split())[:200]}.") from error
    if pairs is None:
        raise InputError(f"{path} must hold one mapping of flag names to values.")
    names = [name for name, _ in pairs]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{path} gives {twice[:80]} twice: keep one of the two.")
    return dict(pairs)


def _json_pairs(text: str) -> list[tuple[str, Any]] | None:
    class Pairs(list[tuple[str, Any]]):
        """An object of the file as pairs, so that names that come twice are not lost."""

    found = json.loads(text, object_pairs_hook=Pairs)

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value} if isinstance(value, Pairs) else value

    def typed(value: Any) -> Any:
        if isinstance(value, list) and not isinstance(value, Pairs):
            return [typed(v) for v in value]
        value = plain(value)
        return value if value is None or isinstance(value, dict) else str(value)

    return [(name, typed(value)) for name, value in found] if isinstance(found, Pairs) else None


def _yaml_pairs(text: str) -> list[tuple[str, Any]] | None:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()

        def typed(node: Any) -> Any:
            if isinstance(node, yaml.SequenceNode):
                return [typed(item) for item in node.value]
            if isinstance(node, yaml.MappingNode) or node.tag not in loader.yaml_constructors:  # refuses unknown tags
                return dict(loader.construct_object(node, deep=True))
            return None if node.tag == "tag:yaml.org,2002:null" else node.value

        if not isinstance(root, yaml.MappingNode):
            return None
        return [(str(key.value), typed(value)) for key, value in root.value]
    finally:
        loader.dispose()
