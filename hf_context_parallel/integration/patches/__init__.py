"""What modules compute on a shard in the place of what they would."""
