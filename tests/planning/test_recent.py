"""Tests of the cache by which batches that are alike are planned once."""

from hf_context_parallel.planning.recent import Recent


def test_what_was_not_used_for_longest_is_made_again():
    made = []

    def get(key):
        return recent.get(key, lambda: made.append(key) or key)

    recent = Recent(2)
    for key, expected in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "abc"), ("a", "abc"), ("b", "abcb")):
        assert get(key) == key
        assert "".join(made) == expected
    assert len(recent) == 2


def test_large_values_are_forgotten_but_for_the_last():
    recent = Recent(10, 100, bytes_of=lambda size: size)
    for key, kept in ((60, 1), (40, 2), (1, 3), (2, 3), (1000, 4), (3, 1), (4, 2)):
        recent.put(key, key)
        assert len(recent) == kept, key
