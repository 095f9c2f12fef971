"""The JSON Schema of report.json, generated from the value objects: `report.schema.json` in this folder.

    python -m slimexport.reporting.published      # writes it again

A test holds the file to what is generated, and real reports to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimexport.artifacts import SCHEMA_VERSION, read_json, write_json
from slimexport.reporting.schema import Report

FILE = Path(__file__).with_name("report.schema.json")


def published() -> Any:
    """The schema in the package, draft 2020-12."""
    return read_json(FILE)


def generated() -> dict[str, Any]:
    """Of what `to_json` writes: strict JSON, where a number that is not finite is null."""
    from pydantic import TypeAdapter

    made = TypeAdapter(Report).json_schema(mode="serialization")
    made = _plain(made)
    assert isinstance(made, dict)
    first = {
        "schema_version": {"const": SCHEMA_VERSION},
        "passed": {"type": "boolean"},
        "verdict": {"type": "string"},
    }
    properties = made.pop("properties")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:slimexport:report:{SCHEMA_VERSION}",
        "title": "report.json of slimexport",
        **{key: value for key, value in made.items() if key not in ("title", "required")},
        "properties": {**first, **properties},
        "required": [*first, *properties],
        "additionalProperties": False,
    }


def _plain(value: Any) -> Any:
    """Every field is written, none else is; defaults and titles say nothing to who reads a report."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {
        key: {name: _plain(of) for name, of in item.items()} if key in ("properties", "$defs") else _plain(item)
        for key, item in value.items()
        if key not in ("default", "title")
    }
    if made.get("type") == "number":
        made["type"] = ["number", "null"]
    if "properties" in made:
        made |= {"required": list(made["properties"]), "additionalProperties": False}
    return made


if __name__ == "__main__":
    write_json(FILE, generated())
