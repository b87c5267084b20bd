"""Number of samples of a round of generation, counted by CP groups."""

from __future__ import annotations

from transformers import TrainingArguments


def count_generations(args: TrainingArguments, groups: int, size: int) -> None:
    """Correct the samples of a round of generation in place: TRL's arguments take each rank for one with its own.

    Args:
        args: the arguments of the trainer. Those of a trainer that does not generate stay as they are.
        groups: the number of CP groups.
        size: the ranks of a group.

    Raises:
        ValueError: if the generations of a prompt do not divide the samples of a round, or vLLM would run in the
            processes of the ranks.
    """
    if size > 1 and getattr(args, "use_vllm", False) and getattr(args, "vllm_mode", None) == "colocate":
        raise ValueError(
            f"vllm_mode='colocate' starts an engine in each process, as one of {groups} processes, and there are "
            f"{groups * size}. Set vllm_mode='server'."
        )
    if not hasattr(args, "steps_per_generation"):
        return
    args.generation_batch_size = args.per_device_train_batch_size * groups * args.steps_per_generation
    rounds = [("per_device_train_batch_size * steps_per_generation", args.generation_batch_size, args.num_generations)]
    if args.eval_strategy != "no":
        each = getattr(args, "num_generations_eval", None) or args.num_generations
        rounds.append(("per_device_eval_batch_size", args.per_device_eval_batch_size * groups, each))
    for names, samples, generations in rounds:
        if samples % generations:
            raise ValueError(
                f"{names} on {groups} CP groups is {samples} samples, which num_generations={generations} does not "
                f"divide: the ranks of a CP group share their samples. Raise it to a multiple of {generations}."
            )
