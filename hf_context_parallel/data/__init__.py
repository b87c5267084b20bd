"""From whole batches to one rank's share of them, and the loaders that deal samples to groups."""
