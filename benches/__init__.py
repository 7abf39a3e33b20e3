"""Benchmarks of refusal_kernels: `python -m benches` from the repository root, or `pytest benches --benchmark-only`.

Every group times the same mathematics in six columns, in turns (dense, compiled, sparse, ours, floor, dense, ...), so
that what disturbs the machine disturbs all of them:

    dense      eager PyTorch with a dense [N, F] code
    compile    torch.compile of it
    sparse     PyTorch with topk, embedding_bag and index_add, written by hand
    best       the fastest sparse PyTorch path that we could find, chosen by measurement per shape among the forms of
               `torch_paths`
    ours       refusal_kernels
    floor      what no implementation of this precision can beat: the bare encoder product into a preallocated buffer,
               or a copy of the bytes that have to move

`shapes` says what is measured, `model` counts flops and bytes, `problem` makes inputs and fp64 references,
`torch_paths` and `columns` are the contestants, `bench_groups` and `bench_crossover` the pytest-benchmark files,
`memory` measures peak memory, `results` merges, prints and writes, `plot` draws. The projection, whose contestants and
sizes have nothing in common with these, is a command of its own: `python -m benches.projection`.
"""
