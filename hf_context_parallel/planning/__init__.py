"""Decisions that are made on the host, in integers: no process group, no tensor on a device."""
