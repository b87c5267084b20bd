"""Memory that a rank needs for a step of training, by arithmetic."""
