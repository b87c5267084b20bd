"""What travels between ranks: process groups, messages, and agreement that all go on."""
