"""What transformers calls the cache of keys and values: the name has changed from version to version."""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

#: Argument of a model's forward pass, and field of what it returns.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
