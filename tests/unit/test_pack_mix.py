"""Packing and mixing as properties: nothing lost, nothing twice, nothing too long, the same answer every time."""

import math
from collections import Counter
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snugtune.data.mix import epoch_order, split, step_indices, total_steps
from snugtune.data.pack import best_fit, collate, cut_step, derive_seed, even_fit, make_chunk
from snugtune.types import Chunk, Example

MANY = settings(deadline=None, derandomize=True, max_examples=150)

lengths_lists = st.lists(st.integers(1, 40), max_size=25)
capacities = st.integers(0, 50)


# Packing ---------------------------------------------------------------------------------------------------------------


@MANY
@given(lengths_lists, capacities)
def test_best_fit_loses_nothing_and_keeps_the_capacity(lengths: list[int], capacity: int):
    """Every index once; a group over the capacity is one sequence that is itself too long."""
    groups = best_fit(lengths, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert sum(lengths[i] for i in group) <= capacity or len(group) == 1
    assert best_fit(tuple(lengths), capacity) == groups


@MANY
@given(lengths_lists, capacities)
def test_best_fit_is_best_fit_decreasing(lengths: list[int], capacity: int):
    """Replayed from long to short: each sequence lies in the fullest group that still took it, or none would have."""
    home = {i: number for number, group in enumerate(best_fit(lengths, capacity)) for i in group}
    used: Counter[int] = Counter()
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fullest = max((used[g] for g in used if used[g] + lengths[i] <= capacity), default=None)
        assert used.get(home[i]) == fullest
        used[home[i]] += lengths[i]


@MANY
@given(lengths_lists, capacities)
def test_even_fit_has_as_few_groups_and_none_larger(lengths: list[int], capacity: int):
    """Nothing lost, no more groups, and the largest no larger; sequences beyond the capacity stay alone."""
    tight, even = best_fit(lengths, capacity), even_fit(lengths, capacity)
    assert sorted(i for group in even for i in group) == list(range(len(lengths))) and len(even) <= len(tight)
    sizes = lambda groups: [sum(lengths[i] for i in g) for g in groups]  # noqa: E731
    largest = max((size for size in sizes(even) if size <= capacity), default=0)
    assert all(len(group) == 1 for group, size in zip(even, sizes(even), strict=True) if size > capacity)
    assert largest <= max((size for size in sizes(tight) if size <= capacity), default=0)


def test_even_fit_shares_a_step_out():
    assert best_fit([4, 4, 4, 4, 4], 16) == [[0, 1, 2, 3], [4]]
    assert even_fit([4, 4, 4, 4, 4], 16) == [[0, 1, 2], [3, 4]]
    assert even_fit([30, 4, 4, 4, 4, 4], 16) == [[0], [1, 2, 3], [4, 5]]
    assert even_fit([5], 16) == [[0]] and even_fit([], 16) == [] and even_fit([3, 1, 2], 0) == [[0], [2], [1]]


def fewest_groups(lengths: list[int], capacity: int) -> int:
    """By trying: first-fit over every order finds an optimum."""
    best = len(lengths)
    for order in permutations(lengths):
        bins: list[int] = []
        for length in order:
            fitting = next((b for b, used in enumerate(bins) if used + length <= capacity), None)
            if fitting is None:
                bins.append(length)
            else:
                bins[fitting] += length
        best = min(best, len(bins))
    return best


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(20, 30))
def test_best_fit_needs_few_groups(lengths: list[int], capacity: int):
    """Within 11/9 of the fewest possible, plus a part of one: the bound known for decreasing fits (Johnson 1974)."""
    groups = best_fit(lengths, capacity)
    assert len(groups) <= 11 / 9 * fewest_groups(lengths, capacity) + 1
    fills = sorted(sum(lengths[i] for i in group) for group in groups)
    assert len(groups) == 1 or fills[0] + fills[1] > capacity, "two groups could have been one"


def test_best_fit_prefers_the_tightest_group():
    """First-fit would put the last two into the first group that has room."""
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert best_fit([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit([3, 12, 3], 6) == [[1], [0, 2]]
    assert best_fit([3, 1, 2], 0) == [[0], [2], [1]]


# Chunks ----------------------------------------------------------------------------------------------------------------


@st.composite
def example_lists(draw, min_size: int = 1, max_size: int = 8) -> list[Example]:
    """Examples whose every token is different, so that a mix-up shows. First tokens may carry weight: they must not count."""
    examples: list[Example] = []
    for number in range(draw(st.integers(min_size, max_size))):
        length = draw(st.integers(1, 7))
        weights = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.5]), min_size=length, max_size=length))
        tokens = torch.arange(length) + 1000 * (number + 1)
        examples.append(Example(tokens, torch.tensor(weights), f"data.jsonl:{number + 1}"))
    return examples


def scored(chunk: Chunk) -> list[tuple[int, int, float]]:
    """(token at the position, the token it must predict, weight), in order."""
    return [(int(chunk.tokens[r]), int(t), float(w)) for r, t, w in zip(chunk.rows, chunk.targets, chunk.weights, strict=True)]


def sequences(chunk: Chunk) -> list[list[int]]:
    return [part.tolist() for part in chunk.tokens.split(list(chunk.lengths))]


@MANY
@given(example_lists(), st.integers(0, 20))
def test_a_step_is_cut_into_exactly_its_sequences(examples: list[Example], capacity: int):
    """Whole, each once, no chunk over the capacity unless it is one sequence; capacity 0 is one sequence a chunk."""
    chunks = cut_step(examples, capacity, "job", 3, 5)
    found = sorted(s for chunk in chunks for s in sequences(chunk))
    assert found == sorted(e.tokens.tolist() for e in examples)
    for index, chunk in enumerate(chunks):
        assert sum(chunk.lengths) == len(chunk.tokens)
        assert len(chunk.tokens) <= capacity or len(chunk.lengths) == 1
        assert (chunk.job, chunk.step, chunk.index) == ("job", 3, index)
        assert chunk.tokens.dtype == chunk.rows.dtype == chunk.targets.dtype == torch.int64
        assert chunk.weights.dtype == torch.float32
    if capacity == 0:
        assert len(chunks) == len(examples)


@MANY
@given(example_lists(), st.integers(0, 20))
def test_a_position_is_scored_if_its_next_token_carries_weight(examples: list[Example], capacity: int):
    """Against loops over the examples. Tokens are unique, so a position that crossed into a neighbour would show."""
    wanted = Counter(
        (int(e.tokens[i]), int(e.tokens[i + 1]), float(e.weights[i + 1]))
        for e in examples
        for i in range(len(e.tokens) - 1)
        if e.weights[i + 1] != 0
    )
    found: Counter[tuple[int, int, float]] = Counter()
    for chunk in cut_step(examples, capacity, "job", 0, 0):
        found.update(scored(chunk))
        assert chunk.rows.tolist() == sorted(set(chunk.rows.tolist()))
    assert found == wanted


def test_a_sequence_of_one_token_scores_nothing():
    """Neither by itself nor through its neighbours: its weight would be a target for the sequence before."""
    one = Example(torch.tensor([7]), torch.tensor([1.0]), "d:1")
    two = Example(torch.tensor([8, 9]), torch.tensor([1.0, 1.0]), "d:2")
    alone = make_chunk([one], "job", 0, 0, 0)
    assert len(alone.rows) == len(alone.targets) == len(alone.weights) == 0
    assert scored(make_chunk([two, one, two, one, one], "job", 0, 0, 0)) == [(8, 9, 1.0), (8, 9, 1.0)]


@MANY
@given(example_lists(max_size=4), st.integers(0, 20))
def test_cutting_is_a_pure_function(examples: list[Example], capacity: int):
    """The same arguments give the same bits, and the examples are left as they were."""
    before = [(e.tokens.clone(), e.weights.clone()) for e in examples]
    first, second = (cut_step(examples, capacity, "job", 1, 2) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.lengths, a.seed) == (b.lengths, b.seed)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "rows", "targets", "weights"))
    assert all(torch.equal(e.tokens, t) and torch.equal(e.weights, w) for e, (t, w) in zip(examples, before, strict=True))


def test_every_chunk_has_a_seed_of_its_own():
    """Another job seed, step or index is another seed; the job's name does not matter, so that a rename changes nothing."""
    one = [Example(torch.tensor([7, 8]), torch.tensor([0.0, 1.0]), "d:1")]
    seeds = {s: [c.seed for c in cut_step(one * 3, 0, "job", s[0], s[1])] for s in product(range(4), range(4))}
    every = [seed for group in seeds.values() for seed in group]
    assert len(set(every)) == len(every)
    assert [c.seed for c in cut_step(one * 3, 0, "other", 1, 2)] == seeds[1, 2]


def test_derived_seeds_never_change():
    """They decide dropout, order and split; a new value would break the resume of every run already on disk."""
    assert derive_seed(0, 0, 0) == 1575460756106095924
    assert derive_seed(1, 2, 3) == 1452325159219566277
    assert len({derive_seed(*parts) for parts in product(range(-2, 5), repeat=3)}) == 343
    assert all(0 <= derive_seed(i, 1) < 2**62 for i in range(100))
    torch.Generator().manual_seed(derive_seed(2**40, 3))


# Batches ---------------------------------------------------------------------------------------------------------------


@MANY
@given(st.lists(example_lists(max_size=3), min_size=1, max_size=4), st.integers(0, 40))
def test_chunks_lie_side_by_side(groups: list[list[Example]], min_rows: int):
    """Positions restart at each sequence, segments tile the chunks' tokens, and a filler makes up the rest."""
    chunks = [make_chunk(examples, f"job-{i}", 0, i, i) for i, examples in enumerate(groups)]
    batch = collate(chunks, min_rows)
    own = sum(len(c.tokens) for c in chunks)
    total = max(own, min_rows)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, total)
    assert batch.input_ids[0, :own].tolist() == [t for c in chunks for t in c.tokens.tolist()]
    assert sum(batch.lengths) == total
    assert batch.lengths[: sum(len(c.lengths) for c in chunks)] == tuple(n for c in chunks for n in c.lengths)
    assert batch.position_ids[0].tolist() == [p for n in batch.lengths for p in range(n)]
    at = 0
    for chunk, segment in zip(chunks, batch.segments, strict=True):
        assert (segment.job, segment.seed) == (chunk.job, chunk.seed)
        assert segment.tokens == slice(at, at + len(chunk.tokens))
        assert torch.equal(batch.input_ids[0, segment.tokens], chunk.tokens)
        at = segment.tokens.stop
    assert at == own, "the filler belongs to no segment"
    fillers = len(batch.lengths) - sum(len(c.lengths) for c in chunks)
    assert fillers == (1 if own < min_rows else 0), "one filler sequence, and only where rows are missing"


# Mixing ----------------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 30)
batch_sizes = st.integers(1, 12)
seeds = st.integers(0, 2**63)


def stream(examples: int, batch_size: int, epochs: float | None, steps: int | None, seed: int) -> list[list[int]]:
    """The examples of all steps."""
    total = total_steps(examples, batch_size, epochs, steps)
    return [step_indices(k, examples, batch_size, epochs, steps, seed) for k in range(total)]


@MANY
@given(sizes, batch_sizes, st.one_of(st.none(), st.integers(1, 4)), seeds)
def test_every_example_comes_once_an_epoch(examples: int, batch_size: int, epochs: int | None, seed: int):
    """All steps are full but the last, and each epoch is a permutation, also where a step spans two of them."""
    steps = stream(examples, batch_size, epochs, None, seed)
    flat = [i for step in steps for i in step]
    times = epochs or 1
    assert len(flat) == examples * times
    for epoch in range(times):
        assert sorted(flat[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert all(len(step) == batch_size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch_size


@MANY
@given(sizes, batch_sizes, st.floats(0.01, 3.0), seeds)
def test_parts_of_an_epoch(examples: int, batch_size: int, epochs: float, seed: int):
    """As many examples as that part holds (at least one), none more often than another by more than one."""
    steps = stream(examples, batch_size, epochs, None, seed)
    flat = [i for step in steps for i in step]
    assert abs(len(flat) - max(1, examples * epochs)) <= 0.5
    assert all(len(step) == batch_size for step in steps[:-1]) and steps[-1]
    counts = Counter(flat)
    assert max(counts.values()) <= math.ceil(len(flat) / examples)
    assert len(flat) < examples or min(counts[i] for i in range(examples)) >= len(flat) // examples


@MANY
@given(sizes, batch_sizes, st.integers(1, 12), seeds)
def test_a_number_of_steps_cycles_through_the_data(examples: int, batch_size: int, steps: int, seed: int):
    """Every step is full, however small the data; each round through it is a permutation."""
    taken = stream(examples, batch_size, None, steps, seed)
    assert len(taken) == steps and all(len(step) == batch_size for step in taken)
    flat = [i for step in taken for i in step]
    for start in range(0, len(flat), examples):
        part = flat[start : start + examples]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(examples))


@MANY
@given(sizes, batch_sizes, st.integers(1, 6), seeds, st.randoms())
def test_a_step_does_not_depend_on_the_steps_before(examples: int, batch_size: int, steps: int, seed: int, random):
    """Resuming asks for step k alone: in any order, with the global generator anywhere, it is the same."""
    wanted = stream(examples, batch_size, None, steps, seed)
    shuffled = list(range(steps))
    random.shuffle(shuffled)
    for k in shuffled:
        state = torch.get_rng_state()
        assert step_indices(k, examples, batch_size, None, steps, seed) == wanted[k]
        assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
        torch.rand(1)


@MANY
@given(sizes, batch_sizes, st.integers(1, 5))
def test_length_given_as_epochs_or_steps_is_the_same_order(examples: int, batch_size: int, epochs: int):
    """A run given in steps starts like the one given in epochs."""
    by_epochs = stream(examples, batch_size, epochs, None, 7)
    by_steps = stream(examples, batch_size, None, len(by_epochs), 7)
    assert by_steps[:-1] == by_epochs[:-1]
    assert by_steps[-1][: len(by_epochs[-1])] == by_epochs[-1]


def test_orders_differ_between_epochs_and_seeds():
    """50! orders: a repeat would be no chance."""
    orders = {(seed, epoch): tuple(epoch_order(50, epoch, seed)) for seed in range(5) for epoch in range(5)}
    assert len(set(orders.values())) == 25
    assert tuple(range(50)) not in orders.values()


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "steps", "expected"),
    [
        (10, 4, None, None, 3),
        (10, 4, 2, None, 5),
        (10, 4, 0.5, None, 2),
        (10, 4, 0.01, None, 1),
        (3, 16, 1, None, 1),
        (3, 16, None, 7, 7),
    ],
)
def test_how_many_steps_a_job_takes(examples, batch_size, epochs, steps, expected: int):
    assert total_steps(examples, batch_size, epochs, steps) == expected


# Splitting -------------------------------------------------------------------------------------------------------------


@MANY
@given(st.integers(2, 60), st.floats(0.001, 0.999), seeds)
def test_a_split_is_complete_and_has_two_sides(count: int, fraction: float, seed: int):
    """Nothing on both sides, nothing on neither, the held-out part as large as asked to within half an item or one."""
    items = [f"item {i}" for i in range(count)]
    training, held_out = split(items, fraction, seed)
    assert sorted(training + held_out) == sorted(items)
    assert training and held_out
    assert len(held_out) in (1, count - 1) or abs(len(held_out) - fraction * count) <= 0.5
    assert training == [i for i in items if i in set(training)], "the order of the file is kept"
    assert split(items, fraction, seed) == (training, held_out)


def test_splits_differ_between_seeds():
    """A fixed tail of the file would be another thing than a random part."""
    assert len({tuple(split(range(40), 0.2, seed)[1]) for seed in range(10)}) == 10
