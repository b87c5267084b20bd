"""The border of a decoder: whole batches outside, shards inside; and the head of a language model on the shard."""
