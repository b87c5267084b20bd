"""Patches: replacements for modules and losses that would not be exact on a shard."""
