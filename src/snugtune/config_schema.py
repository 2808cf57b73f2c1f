"""The config's JSON schema, for editors: what pydantic says of it, and the short forms that it accepts besides.

`config.schema.json` in this package is its output; a first line `# yaml-language-server: $schema=...` lets an editor use it.
"""

import json
from typing import Any

from snugtune.config import JobConfig, RunConfig

Schema = dict[str, Any]


def config_schema() -> Schema:
    """The schema (JSON Schema 2020-12) of a run's YAML: closed to unknown fields, with every field's description."""
    run, job = (kind.model_json_schema() for kind in (RunConfig, JobConfig))
    defs = {**job.pop("$defs"), **run.pop("$defs")}
    for fields, in_job in ((run["properties"], False), (job["properties"], True)):
        for name, field in fields.items():
            fields[name] = _with_type_alone(field, defs, in_job)
        fields["data"] = _with_paths(fields["data"])
    run["properties"]["jobs"]["items"] = {"$ref": "#/$defs/JobConfig"}
    job.pop("required", None)
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **run, "$defs": {**defs, "JobConfig": job}}
    return _without_titles(whole) | {"title": "snugtune config"}


def config_schema_text() -> str:
    """The schema as it is shipped."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def _with_type_alone(field: Schema, defs: Schema, in_job: bool) -> Schema:
    """Configs told apart by `type`: it may be the whole value, and be left out where it has a default.

    A job's config is laid over the run's, whose type is not known here: there it may always be left out.
    """
    branches = field.get("oneOf", [field] if "$ref" in field else [])
    kinds = {branch["$ref"]: _type_of(branch, defs) for branch in branches}
    if not kinds or None in kinds.values():
        return field
    default = field.get("default", {}).get("type")
    mappings = [
        {"$ref": ref} if in_job or kind == default else {"$ref": ref, "required": ["type"]} for ref, kind in kinds.items()
    ]
    rest = {key: value for key, value in field.items() if key not in ("oneOf", "$ref", "discriminator")}
    return {"anyOf": [{"enum": sorted(str(kind) for kind in kinds.values()), "type": "string"}, *mappings], **rest}


def _type_of(branch: Schema, defs: Schema) -> str | None:
    return defs[branch["$ref"].rpartition("/")[2]].get("properties", {}).get("type", {}).get("const")


def _with_paths(field: Schema) -> Schema:
    """A list of sources, or one, each a mapping or its path alone."""
    one = [{"type": "string", "minLength": 1}, field["items"]]
    rest = {key: value for key, value in field.items() if key not in ("items", "type")}
    return {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}}], **rest}


def _without_titles(node: Any) -> Any:
    """pydantic's titles only repeat the fields' names."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_titles(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
