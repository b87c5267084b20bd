"""Trainers of Transformers and TRL on shards, against the same trainers on whole sequences."""
