"""Communication between ranks: process groups, messages, and agreement that all ranks go on."""
