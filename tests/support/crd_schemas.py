"""The schemas of Kubernetes' custom resources, as the API server applies them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import yaml


def schema_of(definition: Path, version: str = "v1") -> dict[str, Any]:
    """The JSON schema in a CustomResourceDefinition (YAML, gzipped), in which unknown fields are errors.

    The server drops unknown fields where a schema does not keep them, and `kubectl` refuses them.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte, which takes the other ten times as long
    resource = yaml.load(gzip.decompress(definition.read_bytes()), loader)
    served = next(each for each in resource["spec"]["versions"] if each["name"] == version)
    return closed(served["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """The same schema, or part of one, where objects that list their properties may have no others."""
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(value) for name, value in schema.items()}
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and "properties" in schema and not keeps_unknown:
        result["additionalProperties"] = False
    return result
