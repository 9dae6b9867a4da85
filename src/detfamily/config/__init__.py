"""Configs: compose them from YAML and overrides, check them against the constructors that they name, build them.

A node is a mapping with ``_target_`` (a class or function of ours, or of torch) and that constructor's arguments; with
``_partial_: true`` it stands for a factory whose remaining arguments the code gives. The constructor's signature is the
schema: an argument that it does not have, or a value that its annotation does not allow, is an error before any work.
Mappings without ``_target_`` hold plain values; their defaults are the schema.
"""

from detfamily.config.build import build
from detfamily.config.compose import compose
from detfamily.config.containers import to_container
from detfamily.config.registry import configs_dir, groups, groups_for, groups_of
from detfamily.config.validate import validate

__all__ = ["build", "compose", "configs_dir", "groups", "groups_for", "groups_of", "to_container", "validate"]
