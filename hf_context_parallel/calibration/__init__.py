"""Rates of this machine: how they are measured, kept and read."""
