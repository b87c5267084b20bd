"""What is decided on the host: integers alone, no process group, no tensor on a device."""
