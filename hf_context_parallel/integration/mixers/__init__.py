"""Modules that mix tokens otherwise than by attention."""
