"""Reading a manifest: YAML, the environment over it, flags over both; and every problem with them in one line."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from supir_batch import store
from supir_batch.errors import ManifestError, StoreError
from supir_batch.settings import Manifest, is_model_folder
from supir_model.config import MODELS, TINY

ENVIRONMENT_PREFIX = "SUPIR_BATCH__"


def load_manifest(
    uri: str, overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> Manifest:
    """Read a manifest, layer ``SUPIR_BATCH__SECTION__KEY`` variables and then ``overrides`` (dotted keys) over it.

    Relative local paths count from the manifest's folder, those in variables and overrides from the current folder.
    ``environ`` is the process's environment when None. Raises ManifestError with one line per problem.
    """
    if not store.exists(uri):
        raise ManifestError(f"{uri}: no such manifest; give the path of a YAML file")
    return _layered(_parse_yaml(store.read_text(uri), uri), uri, overrides, environ)


def manifest_name(uri: str) -> str:
    """What the manifest at ``uri`` calls itself; "" if it does not, or cannot be read."""
    try:
        found = _parse_yaml(store.read_text(uri), uri).get("name")
    except (ManifestError, StoreError):
        return ""
    return found if isinstance(found, str) else ""


def manifest_of_folder(
    folder: str, output: str, overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> Manifest:
    """The manifest that names a folder, an output and nothing else, with the layers of ``load_manifest``."""
    here = store.resolve(os.getcwd(), folder)
    data = {"inputs": [here], "output": {"uri": store.resolve(os.getcwd(), output)}}
    return _layered(data, folder, overrides, environ)


def to_yaml(manifest: Manifest) -> str:
    """The manifest with what environment and flags laid over it, and every place absolute: for another machine."""
    given = manifest.model_dump(mode="json", exclude_unset=True)
    return json.dumps(given, indent=2, ensure_ascii=False) + "\n"  # is YAML, and no word in it becomes a number


def _layered(
    data: dict[str, Any], uri: str, overrides: Mapping[str, str] | None, environ: Mapping[str, str] | None
) -> Manifest:
    _refuse_credentials(data, uri)
    origins = dict.fromkeys(_leaves(data), "manifest")
    _make_absolute(data, store.parent(store.resolve(os.getcwd(), uri)))

    layers = [("environment", variable, value) for variable, value in _from_environment(environ).items()]
    layers += [("flag", key, value) for key, value in (overrides or {}).items()]
    for origin, label, text in layers:
        key = _environment_key(label) if origin == "environment" else label
        layer = _override(key, text, f"{origin} {label}")
        _refuse_credentials(layer, f"{origin} {label}")
        _make_absolute(layer, os.getcwd())
        _merge(data, layer)
        origins[key] = origin

    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        lines = _joined(dict.fromkeys(_error_lines(error, origins)))
        raise ManifestError("\n".join(f"{uri}: {line}" for line in lines)) from error
    manifest.note_origins(origins)
    return manifest


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: ``off`` and ``no`` are words, ``1e-3`` is a number, no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's protocol)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                problem = f"key '{key.value}' is already given on line {seen[key.value]}; remove one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


_TAG_ERRORS = (ValueError, TypeError, AttributeError)  # what PyYAML raises for a tag that does not fit: !!int x


def _parse_yaml(text: str, uri: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, *_TAG_ERRORS) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{uri}:{mark.line + 1}" if mark else uri
        raise ManifestError(f"{place}: {getattr(error, 'problem', None) or 'is not valid YAML'}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{uri}: is no manifest: expected keys such as 'inputs' and 'output', saw {_shown(data)}")
    return {str(key): value for key, value in data.items()}


def _from_environment(environ: Mapping[str, str] | None) -> dict[str, str]:
    values = os.environ if environ is None else environ
    return {key: values[key] for key in sorted(values) if key.startswith(ENVIRONMENT_PREFIX)}


def _environment_key(variable: str) -> str:
    return variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")


def _override(key: str, text: str, label: str) -> dict[str, Any]:
    """The nested mapping that ``key=text`` stands for."""
    parts = key.split(".")
    if not all(parts):
        raise ManifestError(f"{label}: '{key}' is not a key; write section.key=value, such as engine.steps=20")
    value: Any = text
    if not _takes_only_text(parts):
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, *_TAG_ERRORS) as error:
            raise ManifestError(f"{label}: cannot read the value {text!r}") from error
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _takes_only_text(parts: Sequence[str]) -> bool:
    """Whether the field is a plain string, so that ``--set name=1911`` stays one; ``null`` then is only a word."""
    model: type[BaseModel] = Manifest
    for part in parts[:-1]:
        section = _section(model, part)
        if section is None:
            return False
        model = section
    field = model.model_fields.get(parts[-1])
    if field is None:
        return False
    return field.annotation is str


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        below = base.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            base[key] = value


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in data.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _refuse_credentials(value: object, place: str) -> None:
    """The whole manifest is copied beside the run log."""
    if isinstance(value, str):
        try:
            store.refuse_credentials(value)
        except StoreError as error:
            raise ManifestError(f"{place}: {error}") from None
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            _refuse_credentials(one, place)


def _make_absolute(data: dict[str, Any], folder: str) -> None:
    """Resolve what names places against ``folder``; values of a wrong type are left to validation."""
    inputs = data.get("inputs")
    if isinstance(inputs, str) and inputs:
        data["inputs"] = [_absolute_input(folder, inputs)]
    elif isinstance(inputs, list):
        data["inputs"] = [_absolute_input(folder, one) if isinstance(one, str) and one else one for one in inputs]
    engine = data.get("engine")
    weights = engine.get("weights") if isinstance(engine, dict) else None
    if isinstance(engine, dict) and isinstance(weights, str) and weights and weights != TINY.name:
        absolute = store.resolve(folder, weights)
        # a bare name of a model is a folder only if there is one, so that the message can speak of the name
        data["engine"] = {
            **engine,
            "weights": weights if weights in MODELS and not store.is_folder(absolute) else absolute,
        }
    output = data.get("output")
    if isinstance(output, dict) and isinstance(output.get("uri"), str) and output["uri"]:
        data["output"] = {**output, "uri": store.resolve(folder, output["uri"])}
    caption = data.get("caption")
    if isinstance(caption, dict) and isinstance(caption.get("model"), str) and is_model_folder(caption["model"]):
        data["caption"] = {**caption, "model": store.resolve(folder, caption["model"])}
    signing = data.get("signing")
    if isinstance(signing, dict):
        files = {key: signing[key] for key in ("key", "certificates") if isinstance(signing.get(key), str)}
        files = {key: store.resolve(folder, name) for key, name in files.items() if name and "-----" not in name}
        data["signing"] = {**signing, **files}


def _absolute_input(folder: str, reference: str) -> str:
    literal = store.resolve(folder, reference)
    if literal != reference and store.has_glob(reference) and not (store.exists(literal) or store.is_folder(literal)):
        return store.resolve(glob.escape(folder), reference)  # a folder named "[1911]" is not part of the pattern
    return literal


# --- messages ------------------------------------------------------------------------------------------------------


def _error_lines(error: ValidationError, origins: Mapping[str, str]) -> Iterable[str]:
    for problem in error.errors():
        path, model = _path(problem["loc"])
        source = {"environment": " (from the environment)", "flag": " (from --set)"}.get(origins.get(path, ""), "")
        kind, message = problem["type"], problem["msg"]
        if kind == "extra_forbidden":
            yield f"{path}{source}: unknown key{_key_hint(path.rpartition('.')[2], model)}"
        elif kind == "missing":
            yield f"{path}: is required but missing"
        elif kind == "value_error":
            text = str(problem["ctx"]["error"])
            given = problem["input"]
            where = f"{path}{source}: " if path else ""
            yield f"{where}{_shown(given)} {text}" if isinstance(given, str) else f"{where}{text}"
        elif kind in ("model_type", "model_attributes_type"):
            yield f"{path}{source}: is a section; write 'key: value' lines below it, saw {_shown(problem['input'])}"
        else:
            text = plain_words(message)
            yield f"{path}{source}: {text[:1].lower()}{text[1:]}, saw {_shown(problem['input'])}"


def plain_words(message: str) -> str:
    """A pydantic message in the words of ours: ``must be an integer`` for ``Input should be a valid integer``."""
    message = message.replace("Input should be", "must be").replace("should have", "must have")
    return message.replace("a valid integer", "an integer").replace("a valid ", "a ")


def _joined(lines: Iterable[str]) -> list[str]:
    """One line for each value that fits none of its alternatives: ``must be a number or 'off', saw 'abc'``."""
    merged: list[str] = []
    for line in lines:
        head, _, seen = line.rpartition(", saw ")
        subject, separator, wanted = head.partition(": must be ")
        if separator and merged and merged[-1].startswith(f"{subject}: must be ") and merged[-1].endswith(seen):
            merged[-1] = f"{merged[-1].rpartition(', saw ')[0]} or {wanted}, saw {seen}"
        else:
            merged.append(line)
    return merged


def _path(location: Sequence[int | str]) -> tuple[str, type[BaseModel]]:
    """The dotted key of an error and the section it is in; what pydantic appends for union members is dropped."""
    model: type[BaseModel] = Manifest
    keys: list[str] = []
    for part in location:
        keys.append(str(part))
        section = _section(model, str(part))
        if section is None:
            break
        model = section
    return ".".join(keys), model


def _key_hint(key: str, model: type[BaseModel]) -> str:
    near = _hint(key, model.model_fields)
    if near:
        return near
    for section, field in Manifest.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and key in inner.model_fields:
            return f"; did you mean '{section}.{key}'?"
    return f"; known keys: {', '.join(model.model_fields)}"


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), {k.lower(): k for k in known}, n=1)
    return "".join(f"; did you mean '{k}'?" for k in known if near and k.lower() == near[0])


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
