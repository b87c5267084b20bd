"""Settings of CP: communication by layer, and groups of another size."""

import pytest

import hf_context_parallel as hcp
from hf_context_parallel.attention.kernels import registry
from hf_context_parallel.config import KERNELS, ContextParallelConfig


def test_groups_of_another_size_keep_what_they_can_of_subgroups():
    config = ContextParallelConfig(size=8, comm_type="a2a+p2p", a2a_size=4)
    assert [config.of_size(size).a2a_size for size in (8, 6, 2, 1)] == [4, 2, 2, 1]
    assert ContextParallelConfig(size=8).of_size(2) == ContextParallelConfig(size=2)


def test_layers_have_their_own():
    config = ContextParallelConfig(size=2, comm_type=["p2p", "a2a"])
    assert [config.comm_type_of("full_attention", layer) for layer in range(2)] == ["p2p", "a2a"]
    config.check_layers(2)
    by_type = ContextParallelConfig(size=2, comm_type={"sliding_attention": "p2p", "full_attention": "a2a"})
    assert by_type.comm_type_of("sliding_attention", 7) == "p2p"
    for wrong, message in (
        (lambda: config.check_layers(3), "lists 2 entries, but the model has 3 layers"),
        (lambda: config.comm_type_of("full_attention", None), "this attention has no layer number"),
        (lambda: by_type.comm_type_of("chunked_attention", 0), "Add 'chunked_attention'"),
        (lambda: ContextParallelConfig(size=2, comm_type=["ring"]), r"comm_type\[0\]='ring' is not one of"),
        (lambda: ContextParallelConfig(comm_type={"full_atention": "p2p"}), "Did you mean 'full_attention'"),
        (lambda: ContextParallelConfig(size=4, a2a_size=3), "a2a_size=3 does not divide size=4. Give one of 1, 2, 4"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": "2"}, "size='2'"),
        ({"layout": "zigzak"}, "Did you mean 'zigzag'"),
        ({"comm_type": "ring"}, "comm_type='ring' is not one of 'p2p', 'all_gather', 'a2a'"),
        ({"check_batch": 1}, "check_batch=1"),
        ({"on_save_error": "ignore"}, "on_save_error='ignore'"),
        ({"verify": "yes"}, "verify='yes'"),
        ({"tile_tokens": 0}, "tile_tokens=0 is not a number of tokens. Give an integer of 1 or more, or None"),
    ],
)
def test_settings_are_validated_where_they_are_written(values, message):
    with pytest.raises(ValueError, match=message):
        hcp.ContextParallelConfig(**values)


def test_every_kernel_can_be_asked_for():
    assert set(KERNELS) == {"auto", *registry.KERNELS}
    assert ContextParallelConfig(kernel="cudnn").kernel == "cudnn"
